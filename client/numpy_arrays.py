"""numpy arrays as the client sees them. Only loaded once a trainer has passed one."""

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from mpd.errors import LocalError
from mpd.layout import TensorSpec

from .tensors import BLOCK_ELEMS, Extent

Array = npt.NDArray[Any]


class NumpyArray:
    """A writable array of float16, float32 or float64, of any shape and strides. Raises LocalError on others."""

    def __init__(self, name: str, array: Array) -> None:
        self.spec = TensorSpec(name, array.dtype.name, array.shape)
        self._array = array
        self._dtype = array.dtype
        self._wide = np.result_type(np.float32, array.dtype)
        start = array.__array_interface__["data"][0]
        # Of an array with gaps only the first element is certain: its neighbours may belong to another one.
        self.extent = Extent("cpu", start, start + (array.nbytes if array.flags.forc else array.itemsize))
        self._refuse_repeated_elements()
        self.check()

    def check(self) -> None:
        array, name = self._array, self.spec.name
        if array.dtype != self._dtype or array.shape != self.spec.shape:
            raise LocalError(
                f"array {name!r} was registered as {self.spec} and is now {array.dtype}{list(array.shape)}: "
                "open a new averager for it"
            )
        if not array.flags.writeable:
            raise LocalError(f"array {name!r} is read-only, so the average cannot be written to it: pass a copy")

    def is_finite(self) -> bool:
        return bool(np.isfinite(self._array).all())

    def window(self, region: mmap.mmap, offset: int) -> Array:
        if not self.spec.n_elems:
            return np.empty(self.spec.shape, self.spec.dtype)
        flat = np.frombuffer(region, self.spec.dtype, self.spec.n_elems, offset)
        return flat.reshape(self.spec.shape)

    def store(self, window: Array) -> None:
        np.copyto(window, self._array)

    def load(self, window: Array) -> None:
        np.copyto(self._array, window)

    def blocks(self, average: Array, snapshot: Array) -> list[tuple[Array, ...]]:
        if not self._array.flags.c_contiguous:
            return [(self._array, average, snapshot)]
        flat = [each.reshape(-1) for each in (self._array, average, snapshot)]
        starts = range(0, self.spec.n_elems, BLOCK_ELEMS)
        return [tuple(each[at : at + BLOCK_ELEMS] for each in flat) for at in starts]

    def moved(self, own: Array, average: Array, snapshot: Array) -> Array:
        moved = own.astype(self._wide)
        moved -= snapshot
        moved += average
        return moved

    def assign(self, own: Array, values: Array) -> None:
        np.copyto(own, values, casting="same_kind")

    def ensure_adoptable(self) -> None:
        raise LocalError(
            f"array {self.spec.name!r} cannot be adopted: a numpy array cannot move to other memory; "
            "pass torch tensors, or leave out adopt=True"
        )

    def adopt(self, window: Array) -> None:
        self.ensure_adoptable()

    def lives_in(self, window: Array) -> bool:
        return False

    def _refuse_repeated_elements(self) -> None:
        sides = zip(self._array.shape, self._array.strides, strict=True)
        if self.spec.n_elems and any(size > 1 and stride == 0 for size, stride in sides):
            raise LocalError(f"array {self.spec.name!r} repeats its elements (it was broadcast): pass a copy")
