"""From whatever a training script passes as its tensors to a list of named ones that can be copied in and out.

Strategy: one small adapter per kind (`torch_tensors.py`, `numpy_arrays.py`), loaded with the first tensor of that kind;
the rest of the client knows only the `Tensor` protocol. Everything that would make averaging wrong is found here, once,
and named: dtypes, tied and overlapping tensors, arrays that cannot be written. A *window* is a tensor or array of the
same dtype and shape over shared memory.
"""

import mmap
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from mpd.errors import LocalError
from mpd.layout import TensorSpec

BLOCK_ELEMS = 1 << 15  # arithmetic goes block by block: what is between stays in the cache, and torch in one thread


@dataclass(frozen=True, order=True)
class Extent:
    """The memory that a tensor certainly owns: bytes `start` to `end` on `device`."""

    device: str
    start: int
    end: int


class Tensor(Protocol):
    """One registered tensor."""

    spec: TensorSpec
    extent: Extent

    def check(self) -> None:
        """Raise LocalError if this is no longer what was registered."""

    def is_finite(self) -> bool:
        """True if no element is NaN or infinite."""

    def window(self, region: mmap.mmap, offset: int) -> Any:
        """Return a window on `region`, `offset` bytes into it."""

    def store(self, window: Any) -> None:
        """Copy the elements into `window`."""

    def load(self, window: Any) -> None:
        """Replace the elements by those in `window`."""

    def blocks(self, average: Any, snapshot: Any) -> Sequence[tuple[Any, ...]]:
        """Return (own elements, average, snapshot) block by block; the own ones are writable views."""

    def moved(self, own: Any, average: Any, snapshot: Any) -> Any:
        """Return average + (own - snapshot) of one block, in float32 or float64, and change nothing."""

    def assign(self, own: Any, values: Any) -> None:
        """Replace the elements of a block by `values`, rounded to its dtype."""

    def ensure_adoptable(self) -> None:
        """Raise LocalError if the elements cannot move into shared memory."""

    def adopt(self, window: Any) -> None:
        """Move the elements into `window`, where they live from now on."""

    def lives_in(self, window: Any) -> bool:
        """True if `adopt(window)` still holds."""


def register(tensors: Mapping[str, Any] | Iterable[Any]) -> list[Tensor]:
    """Return `tensors` as named adapters. Raises LocalError with the name of whatever cannot be averaged."""
    adapted = [_adapt(name, tensor) for name, tensor in _named(tensors)]
    if not adapted:
        raise LocalError("there are no tensors to average (a generator can be passed only once)")
    _refuse_duplicates(adapted)
    return adapted


def _named(tensors: Any) -> Iterator[tuple[str, Any]]:
    if _kind(tensors):
        raise LocalError("a single tensor was passed: pass a list of tensors, or a mapping of names to them")
    if isinstance(tensors, Mapping):
        yield from tensors.items()
        return
    if not isinstance(tensors, Iterable) or isinstance(tensors, str | bytes):
        raise LocalError(
            f"a {type(tensors).__name__} was passed: an iterable of tensors, for example model.parameters(), "
            "or a mapping of names to tensors expected"
        )
    for index, item in enumerate(tensors):
        if isinstance(item, tuple) and len(item) == 2:
            yield item
        else:
            yield f"tensors[{index}]", item


def _adapt(name: Any, tensor: Any) -> Tensor:
    if not isinstance(name, str):
        raise LocalError(f"{name!r} is no tensor name: a string expected")
    match _kind(tensor):
        case "torch":
            from .torch_tensors import adapt_tensor

            return adapt_tensor(name, tensor)
        case "numpy":
            from .numpy_arrays import NumpyArray

            return NumpyArray(name, tensor)
    raise LocalError(f"tensor {name!r} is a {type(tensor).__name__}: a torch tensor or numpy array expected")


def _kind(value: Any) -> str | None:
    """Return which library `value` is a tensor of. One that is not loaded cannot have made it."""
    for library, name in (("torch", "Tensor"), ("numpy", "ndarray")):
        if library in sys.modules and isinstance(value, getattr(sys.modules[library], name)):
            return library
    return None


def _refuse_duplicates(tensors: list[Tensor]) -> None:
    """Elements that are averaged under two names would get the same update twice."""
    placed = sorted((each.extent, each.spec.name) for each in tensors if each.spec.n_elems)
    for (first, first_name), (second, second_name) in pairwise(placed):
        if first.device == second.device and second.start < first.end:
            raise LocalError(
                f"tensors {first_name!r} and {second_name!r} share memory (are they tied?): pass one of them"
            )
