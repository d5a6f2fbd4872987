"""numpy arrays against a piece of memory: dtypes, strides, the arithmetic of a shift, and what is refused."""

import mmap
from collections.abc import Callable

import numpy as np
import pytest

from mpd.client.numpy_arrays import NumpyArray
from mpd.client.tensors import BLOCK_ELEMS
from mpd.errors import LocalError

DTYPES = ["float64", "float32", "float16"]


def region() -> mmap.mmap:
    return mmap.mmap(-1, 8 << 20)


@pytest.mark.parametrize("dtype", [*DTYPES, ">f4"])
@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a.T,
        lambda a: a[:, ::2],
        lambda a: a[::-1],
        lambda a: a[1, 1, ...],
        lambda a: a[:0],
        lambda a: a.reshape(-1)[:1].reshape(()),
    ],
    ids=["contiguous", "transposed", "every other", "reversed", "part", "empty", "scalar"],
)
def test_what_goes_in_comes_out(dtype: str, view: Callable[[np.ndarray], np.ndarray]) -> None:
    array = view(np.arange(60, dtype=dtype).reshape(3, 4, 5))
    tensor = NumpyArray("a", array)
    window = tensor.window(region(), 64)
    before = array.copy()
    tensor.store(window)
    array[...] = 0
    tensor.load(window)
    np.testing.assert_array_equal(array, before)
    assert window.flags.c_contiguous
    assert window.shape == array.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (BLOCK_ELEMS + 3,), (2, BLOCK_ELEMS)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_shift_is_average_plus_local_steps(dtype: str, shape: tuple[int, ...], contiguous: bool) -> None:
    rng = np.random.default_rng(1)
    wide = np.result_type(np.float32, dtype)
    own = rng.normal(size=(*shape, 2)).astype(dtype)[..., 0] if not contiguous else rng.normal(size=shape).astype(dtype)
    own = np.asarray(own) if contiguous or shape else np.ones((), dtype)
    average, snapshot = rng.normal(size=shape).astype(dtype), rng.normal(size=shape).astype(dtype)
    expected = (average.astype(wide) + (own.astype(wide) - snapshot.astype(wide))).astype(dtype)
    tensor = NumpyArray("a", own)
    for block in tensor.blocks(np.asarray(average), np.asarray(snapshot)):
        tensor.assign(block[0], tensor.moved(*block))
    np.testing.assert_array_equal(own, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("strided", [False, True])
def test_one_bad_element_is_found(dtype: str, bad: float, strided: bool) -> None:
    array = np.full((1000, 2), np.finfo(dtype).max, dtype)[:, 0 if strided else slice(None)]
    tensor = NumpyArray("a", array)
    assert tensor.is_finite()
    array[777] = bad
    assert not tensor.is_finite()


def read_only() -> np.ndarray:
    array = np.ones(3)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (read_only, "array 'a' is read-only"),
        (lambda: np.lib.stride_tricks.as_strided(np.ones(1), (3,), (0,)), "array 'a' repeats its elements"),
        (lambda: np.ones(3, np.complex64), "tensor 'a' is complex64"),
        (lambda: np.ones(3, "f4,f4"), "tensor 'a' is void64"),
    ],
)
def test_what_cannot_be_averaged_is_refused(make: Callable[[], np.ndarray], sentence: str) -> None:
    with pytest.raises(LocalError, match=sentence):
        NumpyArray("a", make())


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda array: array.resize(5, refcheck=False), r"registered as float64\[4\] and is now float64\[5\]"),
        (lambda array: setattr(array.flags, "writeable", False), "is read-only"),
    ],
)
def test_an_array_that_changed_is_named(spoil: Callable[[np.ndarray], None], sentence: str) -> None:
    array = np.ones(4)
    tensor = NumpyArray("a", array)
    tensor.check()
    spoil(array)
    with pytest.raises(LocalError, match=sentence):
        tensor.check()


def test_an_array_cannot_be_adopted() -> None:
    tensor = NumpyArray("a", np.ones(4))
    with pytest.raises(LocalError, match="array 'a' cannot be adopted: a numpy array cannot move"):
        tensor.ensure_adoptable()
    assert not tensor.lives_in(tensor.window(region(), 0))
