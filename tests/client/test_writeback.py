"""A write-back is interrupted at every point it can be, and the tensors are whole all the same."""

from typing import Any

import numpy as np
import pytest

from mpd.client.numpy_arrays import NumpyArray
from mpd.client.tensors import BLOCK_ELEMS
from mpd.client.writeback import Replace, Shift, run_to_end

SIZES = (BLOCK_ELEMS + 5, 3, 2 * BLOCK_ELEMS)


class Interrupted(NumpyArray):
    """Raises KeyboardInterrupt once: at the call numbered `at`, before or after it did its work."""

    calls = 0
    at = -1
    after = False

    def _interruptible(self, work: Any) -> Any:
        kind = type(self)
        kind.calls += 1
        if kind.calls != kind.at:
            return work()
        if kind.after:
            work()
        raise KeyboardInterrupt

    def load(self, window: Any) -> None:
        self._interruptible(lambda: NumpyArray.load(self, window))

    def moved(self, own: Any, average: Any, snapshot: Any) -> Any:
        return self._interruptible(lambda: NumpyArray.moved(self, own, average, snapshot))

    def assign(self, own: Any, values: Any) -> None:
        self._interruptible(lambda: NumpyArray.assign(self, own, values))


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, after: bool) -> None:
    for name, value in (("calls", 0), ("at", at), ("after", after)):
        monkeypatch.setattr(Interrupted, name, value)


def arrays(value: float) -> list[np.ndarray]:
    return [np.full(size, value, np.float32) for size in SIZES]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_replacement_is_whole(monkeypatch: pytest.MonkeyPatch, at: int, after: bool) -> None:
    own = arrays(1)
    tensors = [Interrupted(f"t{index}", array) for index, array in enumerate(own)]
    interrupt(monkeypatch, at, after)
    with pytest.raises(KeyboardInterrupt):
        run_to_end(Replace(tensors, arrays(2)))
    assert all((array == 2).all() for array in own)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(1, 11))
def test_an_interrupted_shift_happens_exactly_once(monkeypatch: pytest.MonkeyPatch, at: int, after: bool) -> None:
    own = arrays(10)
    tensors = [Interrupted(f"t{index}", array) for index, array in enumerate(own)]
    interrupt(monkeypatch, at, after)
    shift = Shift(tensors, arrays(4), arrays(3))
    with pytest.raises(KeyboardInterrupt):
        run_to_end(shift)
    assert all((array == 11).all() for array in own)
    shift.run()
    assert all((array == 11).all() for array in own)


def test_an_unchanged_tensor_becomes_the_average_to_the_bit() -> None:
    own = np.array([1e8, 3.0, -2e-7], np.float32)
    average = np.array([1.0, 1 / 3, 5e9], np.float32)
    run_to_end(Shift([NumpyArray("t", own)], [average], [own.copy()]))
    assert own.tobytes() == average.tobytes()
