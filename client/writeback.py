"""How a result gets into a trainer's tensors: entirely, and once.

Strategy: an exception can come out of nowhere between two lines (Ctrl-C, an alarm), and a model that is half old and
half new is worth nothing. So a write-back is something that can be run again after it was interrupted, from wherever
it was; `run_to_end` does that and then lets the exception go on.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from .tensors import Tensor


class WriteBack(Protocol):
    """A change to tensors. Running it again after an interruption completes it; after its end that does nothing new."""

    def run(self) -> None: ...


class Replace:
    """Each tensor becomes the average."""

    def __init__(self, tensors: Sequence[Tensor], average: Sequence[Any]) -> None:
        self._pairs = list(zip(tensors, average, strict=True))

    def run(self) -> None:
        for tensor, average in self._pairs:
            tensor.load(average)


class Shift:
    """Each tensor becomes average + (tensor - snapshot): local steps since the snapshot survive.

    Summed in this order, a tensor that did not change meanwhile becomes the average to the bit.
    """

    def __init__(self, tensors: Sequence[Tensor], average: Sequence[Any], snapshot: Sequence[Any]) -> None:
        self._parts = list(zip(tensors, average, snapshot, strict=True))
        self._at = 0
        self._current: _TensorShift | None = None
        self._current_of = -1

    def run(self) -> None:
        while self._at < len(self._parts):
            if self._current is None or self._current_of != self._at:
                self._current = _TensorShift(*self._parts[self._at])
                self._current_of = self._at
            self._current.run()
            self._at += 1


class _TensorShift:
    """The shift of one tensor. Blocks go through a scratch copy, so an interruption neither loses nor repeats one."""

    def __init__(self, tensor: Tensor, average: Any, snapshot: Any) -> None:
        self._tensor = tensor
        self._blocks = tensor.blocks(average, snapshot)
        self._at = 0
        self._scratch: Any = None
        self._scratch_of = -1

    def run(self) -> None:
        while self._at < len(self._blocks):
            own, average, snapshot = self._blocks[self._at]
            if self._scratch_of != self._at:
                self._scratch = self._tensor.moved(own, average, snapshot)
                self._scratch_of = self._at
            self._tensor.assign(own, self._scratch)
            self._at += 1


def run_to_end(write_back: WriteBack) -> None:
    """Run `write_back`; if something interrupts it, finish it before the exception goes on."""
    try:
        write_back.run()
    except BaseException:
        write_back.run()
        raise
