"""Numbers that tell where they came from: what a trainer of `mpd chaos` averages, and how its result is read.

Strategy: peer i of n contributes 2^i in every even element and 2^(n-1-i) in every odd one. A mean of powers of two
nearly always names the peers that it is the mean of, and together with the mean of the mirrored powers it always does,
for up to 17 peers (tests/client/test_chaos_oracle.py tries all sets). A second tensor carries at place i the number of
peer i's step, so a result also says from which step of whom each value came: two results that share one of these are
of one round, and values left over from an earlier one are seen at once.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MAX_PEERS = 17
_CLOSE = 1e-6  # sums are whole numbers, and their means are rounded to float32


@dataclass(frozen=True, slots=True)
class Reading:
    """What a result says about itself.

    `sets` has a mask of contributors and a number of elements for each stretch of equal elements; `steps` are pairs of
    a peer and the number of its step.
    """

    sets: tuple[tuple[int, int], ...]
    steps: tuple[tuple[int, int], ...]


class Vectors:
    """The tensors of peer `index` among `n_peers`, with at least `n_bytes` in all."""

    def __init__(self, index: int, n_peers: int, n_bytes: int) -> None:
        self.values: Array = np.zeros(max(2, n_bytes // 8 * 2), np.float32)
        self.steps: Array = np.zeros(n_peers + 2, np.float64)
        self._index, self._n = index, n_peers
        self._own = 2.0**index, 2.0 ** (n_peers - 1 - index)

    @property
    def tensors(self) -> dict[str, Array]:
        """Both, by name."""
        return {"values": self.values, "steps": self.steps}

    def fill(self, step: int) -> None:
        """Make them this peer's contribution to its step number `step`, which is above 0."""
        self.values[0::2], self.values[1::2] = self._own
        self.steps[:] = 0
        self.steps[self._index] = step
        self.steps[self._n :] = self._own

    def is_filled(self, step: int) -> bool:
        """Return whether they are still what `fill(step)` made them."""
        expected = Vectors(self._index, self._n, 0)
        expected.fill(step)
        pairs = self.values.reshape(-1, 2)
        return bool((pairs == self._own).all() and (self.steps == expected.steps).all())

    def read(self) -> Reading:
        """Return what the result in them says. Raises ValueError if it is the mean of no set of peers."""
        pairs = self.values.reshape(-1, 2)
        changes = np.flatnonzero((pairs[1:] != pairs[:-1]).any(axis=1)) + 1
        starts = [0, *changes.tolist(), len(pairs)]
        sets = [(self._mask(*pairs[start].tolist()), 2 * (end - start)) for start, end in itertools.pairwise(starts)]
        mask = self._mask(*self.steps[self._n :].tolist())
        steps = self.steps[: self._n] * mask.bit_count()
        if any(bool(step) != bool(mask >> i & 1) or abs(step - round(step)) > 1e-3 for i, step in enumerate(steps)):
            raise ValueError(f"the numbers of steps {steps} are not those of the peers {mask:b}")
        return Reading(
            (*sets, (mask, len(self.steps))), tuple((i, round(step)) for i, step in enumerate(steps) if step)
        )

    def _mask(self, mean: float, mirrored: float) -> int:
        for k in range(1, self._n + 1):
            mask = round(mean * k)
            if mask.bit_count() == k and abs(mean * k - mask) < _CLOSE * mask and mask < 1 << self._n:
                other = sum(1 << (self._n - 1 - i) for i in range(self._n) if mask >> i & 1)
                if abs(mirrored * k - other) < _CLOSE * other:
                    return mask
        raise ValueError(f"{mean} with {mirrored} is the mean of nobody")
