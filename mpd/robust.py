"""What to take instead of the mean where members may be bad: a centred clip, or a trimmed mean.

Strategy: both need all contributions to a chunk side by side, so these are copied into pooled memory as they arrive and
combined when the chunk is closed, in blocks that stay in the cache. Coordinates are sorted with Batcher's odd-even
merge network (Knuth, The Art of Computer Programming, vol. 3, 5.2.2), whose comparators are a minimum and a maximum of
two rows: an eighth of the time of sorting one column after the other.

An open chunk takes the memory of all its contributions, in the dtype of the tensors, where a mean takes that of one
sum. A reducer whose whole shard is open so holds what everybody sent it: one more vector, if all members reduce.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from mpd.errors import PeerError, RoundFailed
from mpd.layout import ITEM_BYTES
from mpd.reduce import (
    SUM_TYPES,
    AccumulatorPool,
    Buffer,
    MemoryPool,
    as_array,
    check_finite,
    check_planned,
    first_non_finite,
    narrow,
    widen,
)

MAX_VOTE = 2.0  # what a member counts in a clip at most, where a member of median weight counts 1

_CLIP_STEPS = 5
_BLOCK_ELEMS = 16 * 1024

Array = npt.NDArray[Any]


class Pieces:
    """The contributions to one chunk: `arrays` as `as_array` shows them, all of one size, and the weight of each."""

    def __init__(self, dtype: str, arrays: Sequence[Array], weights: Sequence[float], memories: MemoryPool) -> None:
        self.weights = weights
        self.n = len(arrays)
        self.n_elems = arrays[0].size
        self._dtype = dtype
        self._arrays = arrays
        self._memories = memories

    @contextmanager
    def scratch(self, n_values: int) -> Iterator[Array]:
        """Lend an array of the type of sums; what is in it means nothing."""
        sum_type = np.dtype(SUM_TYPES[self._dtype])
        memory = self._memories.take(n_values * sum_type.itemsize)
        yield memory.view(sum_type)[:n_values]
        self._memories.give(memory)

    def blocks(self) -> Iterator[slice]:
        """Yield the chunk in parts that stay in the cache."""
        for start in range(0, self.n_elems, _BLOCK_ELEMS):
            yield slice(start, min(start + _BLOCK_ELEMS, self.n_elems))

    def load(self, block: slice, scratch: Array) -> Array:
        """Write a block of every contribution to `scratch` and return it there: shape (n, values of the block)."""
        n_values = block.stop - block.start
        rows = scratch[: self.n * n_values].reshape(self.n, n_values)
        for array, row in zip(self._arrays, rows, strict=True):
            widen(array[block], self._dtype, row)
        return rows

    def store(self, values: Array, block: slice, result: Array) -> None:
        """Round `values` into a block of `result`."""
        narrow(values, self._dtype, result[block])


Rule = Callable[[Pieces, Array], None]
"""Writes what becomes of the contributions to an array as `as_array` shows it; what overflows is NaN or Inf there."""


def trimmed_mean(pieces: Pieces, result: Array) -> None:
    """Average each coordinate without its largest and its smallest values: a fifth of either, and at least one.

    So three and four members are left with their median, and two with their mean, which protects nobody. Weights do
    not count: values are dropped per coordinate, and those that stay would weigh what their senders say.

    Coordinate-wise trimmed mean: Yin et al., ICML 2018.
    """
    n = pieces.n
    n_trimmed = max(n // 5, 1) if n > 2 else 0
    with pieces.scratch((n + 1) * _BLOCK_ELEMS) as scratch:
        for block in pieces.blocks():
            rows = _sorted(pieces.load(block, scratch), scratch[n * _BLOCK_ELEMS :])
            pieces.store(_mean(rows[n_trimmed : n - n_trimmed]), block, result)


def centred_clip(pieces: Pieces, result: Array) -> None:
    """Move from the coordinate-wise median to the mean of all members, each pulling from `radius` away at most.

    The radius is the distance from that median within which more than half of the members lie. Weights count, up to
    `MAX_VOTE` median ones. Equal contributions come out unchanged, and two members are left with their weighted mean,
    which protects nobody. In larger groups whatever a minority sends moves the result by a few times its share of the
    votes in radii at most.

    All estimates on the way are sums of the contributions, so their products with each other say how far each of them
    is from any estimate, and only the first and the last step touch the values. Differences of more than about 1e17
    between float32 values are too large for that: a minority that is so far away is left out.

    Centred clipping: Karimireddy, He and Jaggi, ICML 2021. Raises RoundFailed if half of the members are far away.
    """
    with pieces.scratch(pieces.n_elems) as centre, pieces.scratch((pieces.n + 1) * _BLOCK_ELEMS) as scratch:
        products = _products_around_median(pieces, centre, scratch)
        # Whoever is too far away may pull at infinity for all we know: not at all.
        is_far = ~np.isfinite(products.diagonal())
        products[is_far] = products[:, is_far] = 0
        parts = _clipped_parts(products, is_far, np.array(pieces.weights))
        for block in pieces.blocks():
            rows = pieces.load(block, scratch)
            rows -= centre[block]
            rows[is_far] = 0
            pieces.store(centre[block] + np.einsum("i,ik->k", parts.astype(rows.dtype), rows), block, result)


def _products_around_median(pieces: Pieces, centre: Array, scratch: Array) -> npt.NDArray[np.float64]:
    """Write the coordinate-wise median to `centre`; return the inner products of all differences from it, (n, n)."""
    n = pieces.n
    products = np.zeros((n, n))
    for block in pieces.blocks():
        ordered = _sorted(pieces.load(block, scratch), scratch[n * _BLOCK_ELEMS :])
        centre[block] = _mean(ordered[(n - 1) // 2 : n // 2 + 1])
        rows = pieces.load(block, scratch)
        rows -= centre[block]
        for i in range(n):  # einsum: a matrix product would wake the threads of BLAS
            products[i, i:] += np.einsum("jk,k->j", rows[i:], rows[i])
    return np.asarray(np.triu(products) + np.triu(products, 1).T)


def _clipped_parts(
    products: npt.NDArray[np.float64], is_far: npt.NDArray[np.bool_], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return how much of each member's difference from the median is in the clipped mean; 0 of the far ones."""
    squares = products.diagonal()
    radius_squared = np.sort(np.where(is_far, np.inf, squares))[len(weights) // 2]
    if not math.isfinite(radius_squared):
        raise RoundFailed("the members' values are too far apart to be clipped: scale them down")
    votes = np.minimum(weights, MAX_VOTE * np.median(weights))
    votes /= votes.sum()
    if len(weights) < 3:  # neither of two can be told to be the bad one
        return np.asarray(votes)
    parts = np.zeros(len(weights))
    for _ in range(_CLIP_STEPS):
        distances_squared = squares - 2 * products @ parts + parts @ products @ parts
        is_outside = distances_squared > radius_squared
        pulls = votes * np.sqrt(np.divide(radius_squared, distances_squared, out=np.ones_like(votes), where=is_outside))
        pulls[is_far] = 0
        parts += pulls - pulls.sum() * parts
    return parts


def _sorted(rows: Array, spare: Array) -> list[Array]:
    """Return views of `rows`, overwritten by each column in ascending order. `spare` has room for one more row."""
    ordered, free = list(rows), spare[: rows.shape[1]]
    for low, high in _comparators(len(ordered)):
        np.minimum(ordered[low], ordered[high], out=free)
        np.maximum(ordered[low], ordered[high], out=ordered[high])
        ordered[low], free = free, ordered[low]
    return ordered


@functools.cache
def _comparators(n: int) -> tuple[tuple[int, int], ...]:
    """Return the comparators of Batcher's odd-even merge sort of `n` values, in order: (place of min, place of max)."""
    network = []
    sorted_size = 1
    while sorted_size < n:
        stride = sorted_size
        while stride >= 1:
            for start in range(stride % sorted_size, n - stride, 2 * stride):
                for low in range(start, min(start + stride, n - stride)):
                    if low // (2 * sorted_size) == (low + stride) // (2 * sorted_size):
                        network.append((low, low + stride))
            stride //= 2
        sorted_size *= 2
    return tuple(network)


def _mean(rows: Sequence[Array]) -> Array:
    """Return the mean of `rows`, in the memory of one of them; equal values come out unchanged."""
    first, *others = rows
    if others:
        total = np.subtract(others[0], first, out=others[0])
        for row in others[1:]:
            np.add(total, np.subtract(row, first, out=row), out=total)
        np.add(first, np.divide(total, len(rows), out=total), out=first)
    return first


class Stack:
    """The contributions to one chunk of `n_elems` values of `dtype`, and the rule by which they become one.

    In the place of an `Accumulator`: same methods, same errors. Not for two threads at once.
    """

    def __init__(self, dtype: str, n_elems: int, rule: Rule, memories: MemoryPool) -> None:
        self.dtype = dtype
        self.n_elems = n_elems
        self._n_bytes = n_elems * ITEM_BYTES[dtype]
        self._rule = rule
        self._memories = memories
        self._kept: list[npt.NDArray[np.uint8]] = []
        self._weights: list[float] = []

    def add(self, values: Buffer, weight: float) -> None:
        """Keep a copy of `values`. Raises PeerError, having kept nothing, where `Accumulator.add` does."""
        check_planned(values, self.dtype, self.n_elems, weight)
        memory = self._memories.take(self._n_bytes)
        memory[: self._n_bytes] = np.frombuffer(values, np.uint8)
        try:  # the copy is what counts, and what nobody can change any more
            check_finite(memory[: self._n_bytes].data, self.dtype)
        except PeerError:
            self._memories.give(memory)
            raise
        if weight == 0:
            self._memories.give(memory)
        else:
            self._kept.append(memory)
            self._weights.append(weight)

    def mean_into(self, out: Buffer, total_weight: float) -> None:
        """Write what becomes of the contributions to the writable `out`, rounded to nearest even to `dtype`.

        The rule has its own bounds on weights, so `total_weight` is only that of an `Accumulator` in this place. Raises
        ValueError if nothing of positive weight was added, and RoundFailed if values overflow.
        """
        if not self._kept:
            raise ValueError(f"no mean of nothing: total weight is {total_weight}")
        result = as_array(out, self.dtype)
        if result.size != self.n_elems:
            raise ValueError(f"the result has room for {result.size} elements: {self.n_elems} expected")
        arrays = [as_array(memory[: self._n_bytes].data, self.dtype) for memory in self._kept]
        with np.errstate(over="ignore", invalid="ignore"):  # it shows in the result, where it has a name
            self._rule(Pieces(self.dtype, arrays, self._weights, self._memories), result)
        bad = first_non_finite(out, self.dtype)
        if bad is not None:
            raise RoundFailed(f"the values of element {bad} are too far apart for {self.dtype}: scale them down")

    def forget(self) -> None:
        """Give all memory back; nothing was added then."""
        for memory in self._kept:
            self._memories.give(memory)
        self._kept, self._weights = [], []


class StackPool:
    """Hands out stacks with one rule and pooled memory, as `AccumulatorPool` does accumulators: one thread only."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._memories = MemoryPool()

    def take(self, dtype: str, n_elems: int) -> Stack:
        """Return an empty stack."""
        return Stack(dtype, n_elems, self._rule, self._memories)

    def give(self, stack: Stack) -> None:
        """Take a stack back that nobody uses any more."""
        stack.forget()


_RULES: dict[str, Rule] = {"clip": centred_clip, "trimmed": trimmed_mean}


def pool_for(aggregate: str) -> AccumulatorPool | StackPool:
    """Return the pool of what combines contributions under the term `aggregate`, one of `AGGREGATE_NAMES`."""
    return AccumulatorPool() if aggregate == "mean" else StackPool(_RULES[aggregate])
