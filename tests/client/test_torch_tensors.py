"""torch tensors against a piece of memory: dtypes, strides, autograd, adoption, staging, and what is refused."""

import mmap
from collections.abc import Callable

import pytest
import torch

from mpd.client import torch_tensors
from mpd.client.tensors import BLOCK_ELEMS
from mpd.client.torch_tensors import StagedTensor, TorchTensor, adapt_tensor
from mpd.errors import LocalError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, 2),
    "every other": lambda t: t[:, ::2],
    "part": lambda t: t[1, 1],
    "empty": lambda t: t[:0],
    "scalar": lambda t: t[0, 0, 0],
}


def region() -> mmap.mmap:
    return mmap.mmap(-1, 8 << 20)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [TorchTensor, StagedTensor])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_what_goes_in_comes_out(
    device: str,
    kind: type[TorchTensor],
    dtype: torch.dtype,
    view: Callable[[torch.Tensor], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_tensors, "STAGING_BYTES", 64)  # several pieces, the last one shorter
    torch_tensors._staging.cache_clear()
    values = view(torch.arange(60, dtype=dtype, device=device).reshape(3, 4, 5))
    tensor = kind("t", values)
    window = tensor.window(region(), 64)
    before = values.clone()
    tensor.store(window)
    values.zero_()
    tensor.load(window)
    torch_tensors._staging.cache_clear()
    assert torch.equal(values, before)
    assert window.is_contiguous()
    assert window.shape == values.shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (BLOCK_ELEMS + 3,), (2, BLOCK_ELEMS)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_shift_is_average_plus_local_steps(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], contiguous: bool
) -> None:
    draw = torch.Generator().manual_seed(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    own = torch.randn(*shape, 2, generator=draw).to(device, dtype)[..., 0]
    own = own.contiguous() if contiguous else own
    average, snapshot = (torch.randn(shape, generator=draw).to(dtype) for _ in range(2))
    expected = (average.to(wide) + (own.cpu().to(wide) - snapshot.to(wide))).to(dtype)
    tensor = TorchTensor("t", own)
    for block in tensor.blocks(average, snapshot):
        tensor.assign(block[0], tensor.moved(*block))
    assert torch.equal(own.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("strided", [False, True])
def test_one_bad_element_is_found(device: str, dtype: torch.dtype, bad: float, strided: bool) -> None:
    values = torch.full((1000, 2), torch.finfo(dtype).max, dtype=dtype, device=device)
    values = values[:, 0] if strided else values
    tensor = TorchTensor("t", values)
    assert tensor.is_finite()
    values[777] = bad
    assert not tensor.is_finite()


def test_loading_counts_as_a_change_for_autograd() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    tensor = TorchTensor("w", weight)
    loss = (weight * weight).sum()
    window = torch.full((3,), 2.0)
    tensor.load(window)
    assert weight.requires_grad
    assert weight.is_leaf
    assert weight.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_an_adopted_parameter_lives_in_the_region_and_outlives_it() -> None:
    weight = torch.nn.Parameter(torch.arange(4.0))
    weight.grad = torch.ones(4)
    tensor = TorchTensor("w", weight)
    shared = region()
    window = tensor.window(shared, 128)
    tensor.adopt(window)
    assert weight.tolist() == [0, 1, 2, 3]
    weight.data.add_(1)
    assert memoryview(shared)[128:144].cast("f").tolist() == [1, 2, 3, 4]
    assert tensor.lives_in(window)
    del shared, window
    weight.data.mul_(2)
    assert weight.tolist() == [2, 4, 6, 8]
    assert weight.grad.tolist() == [1, 1, 1, 1]


def test_a_parameter_that_moved_out_is_noticed() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    tensor = TorchTensor("w", weight)
    window = tensor.window(region(), 0)
    tensor.adopt(window)
    weight.data = weight.data.clone()
    assert not tensor.lives_in(window)


def test_a_tensor_that_is_not_contiguous_cannot_be_adopted() -> None:
    with pytest.raises(LocalError, match="tensor 't' cannot be adopted: it is not contiguous"):
        TorchTensor("t", torch.ones(2, 3).T).ensure_adoptable()


def in_inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(3)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: torch.ones(3, dtype=torch.complex64), "tensor 't' is complex64"),
        (lambda: torch.ones(3, dtype=torch.int8), "tensor 't' is int8"),
        (lambda: torch.ones(3, device="meta"), "tensor 't' has no plain memory"),
        (lambda: torch.eye(3).to_sparse(), "tensor 't' has no plain memory"),
        (lambda: torch.ones(1).expand(3), "tensor 't' repeats its elements"),
        (in_inference, "tensor 't' was made in inference mode"),
    ],
)
def test_what_cannot_be_averaged_is_refused(make: Callable[[], torch.Tensor], sentence: str) -> None:
    with pytest.raises(LocalError, match=sentence):
        adapt_tensor("t", make())


@pytest.mark.parametrize(
    ("spoil", "now"),
    [
        (lambda t: t.resize_(5), r"float32\[5\] on cpu"),
        (lambda t: setattr(t, "data", t.data.double()), r"float64\[4\] on cpu"),
        (lambda t: setattr(t, "data", t.data[:, None]), r"float32\[4, 1\] on cpu"),
    ],
)
def test_a_tensor_that_changed_is_named(spoil: Callable[[torch.Tensor], None], now: str) -> None:
    values = torch.ones(4)
    tensor = TorchTensor("t", values)
    tensor.check()
    spoil(values)
    with pytest.raises(LocalError, match=rf"'t' was registered as float32\[4\] on cpu and is now {now}"):
        tensor.check()
