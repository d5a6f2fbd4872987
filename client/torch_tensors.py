"""torch tensors as the client sees them. Only loaded once a trainer has passed one.

Strategy: all writing goes through `detach()`, which needs no `no_grad` and still counts as a change for autograd, so a
backward pass that saved the old values complains instead of computing nonsense. Tensors on an accelerator travel
through a bounded, pinned piece of memory: shared memory is pageable, and copies between that and a GPU are slow.
"""

import functools
import math
import mmap
import warnings
from typing import Any

import torch

from mpd.errors import LocalError
from mpd.layout import ITEM_BYTES, TensorSpec

from .tensors import BLOCK_ELEMS, Extent

STAGING_BYTES = 16 << 20


def adapt_tensor(name: str, tensor: torch.Tensor) -> "TorchTensor":
    """Return `tensor` as the client sees it. Raises LocalError if it cannot be averaged."""
    return (TorchTensor if tensor.device.type == "cpu" else StagedTensor)(name, tensor)


class TorchTensor:
    """A strided tensor or parameter of a dtype that mpd averages. Raises LocalError on others."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.spec = TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        self._tensor = tensor
        self._dtype, self._device = tensor.dtype, tensor.device
        self._wide = torch.promote_types(torch.float32, tensor.dtype)
        self._refuse_what_cannot_be_written()
        start = tensor.data_ptr()
        # Of a tensor with gaps only the first element is certain: its neighbours may belong to another one.
        n_bytes = self.spec.n_bytes if tensor.is_contiguous() else tensor.element_size()
        self.extent = Extent(str(tensor.device), start, start + n_bytes)

    def check(self) -> None:
        tensor = self._tensor
        if (tensor.dtype, tensor.shape, tensor.device) != (self._dtype, self.spec.shape, self._device):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise LocalError(
                f"tensor {self.spec.name!r} was registered as {self.spec} on {self._device} and is now "
                f"{dtype}{list(tensor.shape)} on {tensor.device}: open a new averager for it"
            )

    def is_finite(self) -> bool:
        if not self.spec.n_elems:
            return True
        # NaN wins both comparisons, so this is exact, and it runs at the speed of memory where isfinite does not.
        return all(math.isfinite(extreme) for extreme in torch.aminmax(self._tensor.detach()))

    def window(self, region: mmap.mmap, offset: int) -> torch.Tensor:
        if not self.spec.n_elems:
            return torch.empty(self.spec.shape, dtype=self._dtype)
        with warnings.catch_warnings():
            # The out region cannot be written, and torch warns that it could not stop us from trying.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(region, dtype=self._dtype, count=self.spec.n_elems, offset=offset)
        return flat.view(self.spec.shape)

    def store(self, window: torch.Tensor) -> None:
        window.copy_(self._tensor.detach())

    def load(self, window: torch.Tensor) -> None:
        self._tensor.detach().copy_(window)

    def blocks(self, average: torch.Tensor, snapshot: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        own = self._tensor.detach()
        if not own.is_contiguous():
            return [(own, average, snapshot)]
        flat = [torch.split(each.view(-1), BLOCK_ELEMS) for each in (own, average, snapshot)]
        return list(zip(*flat, strict=True))

    def moved(self, own: torch.Tensor, average: torch.Tensor, snapshot: torch.Tensor) -> torch.Tensor:
        local_steps = own.to(self._wide) - snapshot.to(self._device, self._wide)
        return local_steps.add_(average.to(self._device, self._wide))

    def assign(self, own: torch.Tensor, values: torch.Tensor) -> None:
        own.copy_(values)

    def ensure_adoptable(self) -> None:
        if self._device.type != "cpu":
            raise LocalError(
                f"tensor {self.spec.name!r} cannot be adopted: it lives on {self._device}, and shared memory does not; "
                "leave out adopt=True"
            )
        if not self._tensor.is_contiguous():
            raise LocalError(f"tensor {self.spec.name!r} cannot be adopted: it is not contiguous; leave out adopt=True")

    def adopt(self, window: torch.Tensor) -> None:
        self.store(window)
        self._tensor.data = window

    def lives_in(self, window: torch.Tensor) -> bool:
        return self._tensor.data_ptr() == window.data_ptr()

    def _refuse_what_cannot_be_written(self) -> None:
        tensor, name = self._tensor, self.spec.name
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            raise LocalError(f"tensor {name!r} has no plain memory ({tensor.layout} on {tensor.device}): leave it out")
        if tensor.is_inference():
            raise LocalError(f"tensor {name!r} was made in inference mode and cannot be written: pass a clone")
        sides = zip(tensor.shape, tensor.stride(), strict=True)
        if self.spec.n_elems and any(size > 1 and stride == 0 for size, stride in sides):
            raise LocalError(f"tensor {name!r} repeats its elements (it was expanded): pass a clone")


class StagedTensor(TorchTensor):
    """A tensor that is copied through pinned memory, one piece after the other."""

    def store(self, window: torch.Tensor) -> None:
        staging = self._staging()
        for source, target in self._pieces(self._tensor.detach().reshape(-1), window):
            staged = staging[: source.numel()]
            staged.copy_(source)
            target.copy_(staged)

    def load(self, window: torch.Tensor) -> None:
        own = self._tensor.detach()
        dense = own if own.is_contiguous() else torch.empty(own.shape, dtype=own.dtype, device=own.device)
        staging = self._staging()
        for target, source in self._pieces(dense.view(-1), window):
            staged = staging[: source.numel()]
            staged.copy_(source)
            target.copy_(staged)
        if dense is not own:
            own.copy_(dense)

    def _pieces(self, own: torch.Tensor, window: torch.Tensor) -> Any:
        n_elems = STAGING_BYTES // ITEM_BYTES[self.spec.dtype]
        return zip(torch.split(own, n_elems), torch.split(window.view(-1), n_elems), strict=True)

    def _staging(self) -> torch.Tensor:
        return _staging(pinned=self._device.type == "cuda").view(self._dtype)


@functools.cache
def _staging(pinned: bool) -> torch.Tensor:
    return torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=pinned)
