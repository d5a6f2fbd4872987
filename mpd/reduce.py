"""The arithmetic of averaging: exact about what is summed, strict about what is let in, and free of allocations.

Strategy: 16- and 32-bit values are summed in float32, float64 in float64, one contribution after the other into memory
that is used again for the next chunk, because touching fresh pages costs more than the addition. Whatever comes in is
checked for length and NaN/Inf before the first element is added, so a bad contribution costs its sender and nothing
else. bfloat16 has no numpy dtype: its patterns are uint16 here and are shifted into float32 and rounded back.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mpd.errors import LocalError, NotFinite, PeerError, RoundFailed
from mpd.layout import ITEM_BYTES, MAX_WEIGHT, Segment

Buffer = bytes | bytearray | memoryview

MIN_WEIGHT = 2.0**-32  # below, float32 values would be lost to underflow on the way into the sum
SUM_TYPES = {"float64": np.float64, "float32": np.float32, "bfloat16": np.float32, "float16": np.float32}

_MAX_TOTAL_WEIGHT = 64 * MAX_WEIGHT
_VALUE_TYPES = {"float64": "<f8", "float32": "<f4", "bfloat16": "<u2", "float16": "<f2"}
# Exponent all ones. Patterns from here on, sign apart, are Inf and NaN.
_INF_PATTERNS = {"bfloat16": 0x7F80, "float16": 0x7C00}
_BF16_BLOCK_ELEMS = 32 * 1024
_COMBINE_BLOCK_BYTES = 1024 * 1024
_MIN_POOLED_BYTES = 64 * 1024


def as_array(buffer: Buffer, dtype: str) -> npt.NDArray[Any]:
    """Return `buffer` as a flat array of `dtype` without a copy; bfloat16 becomes uint16 patterns."""
    return np.frombuffer(buffer, dtype=_VALUE_TYPES[dtype])


def first_non_finite(buffer: Buffer, dtype: str) -> int | None:
    """Return the index of the first NaN or Inf among the `dtype` values in `buffer`, None if all are finite."""
    values = as_array(buffer, dtype)
    if dtype in _INF_PATTERNS:
        return _first_non_finite_pattern(values.view(np.uint16), _INF_PATTERNS[dtype])
    # NaN and Inf survive any sum, so one pass without a temporary clears nearly every buffer; finite values can
    # overflow it, hence the second look. einsum: np.dot would wake BLAS threads and np.sum takes twice as long.
    if math.isfinite(np.einsum("i->", values)):
        return None
    finite = np.isfinite(values)
    return None if finite.all() else int(finite.argmin())


def _first_non_finite_pattern(patterns: npt.NDArray[np.uint16], inf: int) -> int | None:
    if patterns.size == 0:
        return None
    # As unsigned numbers negative values come last, as signed ones positive values do: two maxima, no temporary.
    if patterns.max() < inf | 0x8000 and patterns.view(np.int16).max() < inf:
        return None
    non_finite = (patterns & inf) == inf
    return int(non_finite.argmax()) if non_finite.any() else None


def f32_from_bf16(patterns: npt.NDArray[np.uint16], out: npt.NDArray[np.float32]) -> None:
    """Write the values of bfloat16 `patterns` to `out`, exactly. Both flat and of one size."""
    bits = out.view(np.uint32)
    bits[...] = patterns
    np.left_shift(bits, 16, out=bits)


def bf16_from_f32(values: npt.NDArray[np.float32], out: npt.NDArray[np.uint16]) -> None:
    """Write `values` to `out` as bfloat16 patterns, rounded to nearest, ties to even; NaN stays NaN. Both flat."""
    for start in range(0, values.size, _BF16_BLOCK_ELEMS):  # blocks keep the temporaries in the cache
        block = slice(start, start + _BF16_BLOCK_ELEMS)
        bits = values[block].view(np.uint32)
        # Half a unit of the last bit that stays, or just below half if that bit is 0; a carry runs into the exponent.
        rounded = (bits >> 16) & 1
        rounded += bits
        rounded += 0x7FFF
        rounded >>= 16
        if not math.isfinite(np.einsum("i->", values[block])):
            is_nan = np.isnan(values[block])  # the carry could have turned these into Inf or zero
            rounded[is_nan] = (bits[is_nan] >> 16) | 0x0040
        out[block] = rounded


def widen(values: npt.NDArray[Any], dtype: str, out: npt.NDArray[Any]) -> None:
    """Write `values` as `as_array` shows them to `out`, which has the type of their sum, exactly. Both flat."""
    if dtype == "bfloat16":
        f32_from_bf16(values, out)
    else:
        np.copyto(out, values)


def narrow(values: npt.NDArray[Any], dtype: str, out: npt.NDArray[Any]) -> None:
    """Write `values`, of the type of sums, to `out` as `as_array` shows `dtype`, rounded to nearest even. Both flat."""
    if dtype == "bfloat16":
        bf16_from_f32(values, out)
    else:
        np.copyto(out, values, casting="same_kind")


def check_planned(values: Buffer, dtype: str, n_elems: int, weight: float) -> None:
    """Raise PeerError unless these are as many bytes as planned, and a weight of 0 or MIN_WEIGHT to MAX_WEIGHT."""
    n_bytes, planned_bytes = memoryview(values).nbytes, n_elems * ITEM_BYTES[dtype]
    if n_bytes != planned_bytes:
        raise PeerError(f"a contribution has {n_bytes} bytes: {planned_bytes} expected")
    if weight != 0 and not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise PeerError(f"a contribution has weight {weight}: 0 or {MIN_WEIGHT} to {MAX_WEIGHT:g} expected")


def check_finite(values: Buffer, dtype: str) -> None:
    """Raise NotFinite if there is a NaN or Inf among the values."""
    bad = first_non_finite(values, dtype)
    if bad is not None:
        raise NotFinite(f"a contribution has a NaN or Inf at element {bad}: finite values expected")


class Accumulator:
    """The weighted sum of one chunk: `n_elems` values of `dtype`, summed in float32 (float64 for float64).

    Args:
        scratch: uint8 array of at least `n_elems` sums, used only within a call, so accumulators may share it.
        memory: uint8 array of at least `n_elems` sums, which this accumulator keeps.

    Both are made where not given. Not for two threads at once.
    """

    def __init__(
        self,
        dtype: str,
        n_elems: int,
        scratch: npt.NDArray[np.uint8] | None = None,
        memory: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        self.dtype = dtype
        self.n_elems = n_elems
        sum_bytes = _sum_bytes(dtype, n_elems)
        self._memory = np.empty(sum_bytes, np.uint8) if memory is None else memory
        self._sums: npt.NDArray[Any] = self._memory[:sum_bytes].view(SUM_TYPES[dtype])
        spare = np.empty(sum_bytes, np.uint8) if scratch is None else scratch
        self._scratch: npt.NDArray[Any] = spare[:sum_bytes].view(SUM_TYPES[dtype])
        self._is_empty = True

    def add(self, values: Buffer, weight: float) -> None:
        """Add `weight` times `values`. Raises PeerError, with the sum untouched, if this cannot be part of a mean.

        That is: another length than `n_elems`, a NaN or Inf, a weight that is neither 0 nor in MIN_WEIGHT..MAX_WEIGHT.
        The weight is rounded to the type of the sum; values of weight 0 are checked like any others.
        """
        check_planned(values, self.dtype, self.n_elems, weight)
        check_finite(values, self.dtype)
        if weight != 0:
            with np.errstate(over="ignore"):  # an overflow shows in the result, where it has a name
                self._add(self._widened(as_array(values, self.dtype)), weight)

    def mean_into(self, out: Buffer, total_weight: float) -> None:
        """Write sum / `total_weight` to the writable `out`, rounded to nearest even to `dtype`.

        Raises ValueError if nothing of positive weight was added, and RoundFailed if the sum overflowed; what is in
        `out` then means nothing.
        """
        if self._is_empty or not MIN_WEIGHT <= total_weight <= _MAX_TOTAL_WEIGHT:
            raise ValueError(f"no mean of nothing: total weight is {total_weight}")
        result = as_array(out, self.dtype)
        if result.size != self.n_elems:
            raise ValueError(f"the result has room for {result.size} elements: {self.n_elems} expected")
        with np.errstate(over="ignore"):
            if result.dtype == self._sums.dtype:
                np.divide(self._sums, total_weight, out=result)
            else:
                narrow(np.divide(self._sums, total_weight, out=self._scratch), self.dtype, result)
        bad = first_non_finite(out, self.dtype)
        if bad is not None:
            raise RoundFailed(
                f"the sum of element {bad} is too large for {self._sums.dtype}: scale values or weights down"
            )

    def detach_memory(self) -> npt.NDArray[np.uint8]:
        """Take the memory out, for the next accumulator. This one is of no use afterwards."""
        memory, self._memory = self._memory, np.empty(0, np.uint8)
        self._sums = self._scratch = self._memory.view(SUM_TYPES[self.dtype])
        self.n_elems = 0
        return memory

    def _widened(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return `values` in the type of the sum: in `_scratch`, unless they are in that type already."""
        if values.dtype == self._sums.dtype:
            return values
        widen(values, self.dtype, self._scratch)
        return self._scratch

    def _add(self, values: npt.NDArray[Any], weight: float) -> None:
        if self._is_empty:  # memory is not zeroed first: that would be one more pass over it
            np.multiply(values, weight, out=self._sums)
            self._is_empty = False
        elif weight == 1:
            np.add(self._sums, values, out=self._sums)
        else:
            np.add(self._sums, np.multiply(values, weight, out=self._scratch), out=self._sums)


class MemoryPool:
    """Hands out memory that was touched before, so that a chunk costs no page faults.

    Memory comes in powers of two, because chunk sizes change a little from round to round; for each power the pool
    holds as much as was ever out at once.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[npt.NDArray[np.uint8]]] = {}

    def take(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Return at least `n_bytes` of memory; what is in it means nothing."""
        capacity = max(_MIN_POOLED_BYTES, 1 << (n_bytes - 1).bit_length())
        free = self._free.get(capacity)
        return free.pop() if free else np.empty(capacity, np.uint8)

    def give(self, memory: npt.NDArray[np.uint8]) -> None:
        """Take memory back that nobody uses any more."""
        self._free.setdefault(memory.size, []).append(memory)


class AccumulatorPool:
    """Hands out accumulators with pooled memory. They share one scratch: one thread only."""

    def __init__(self) -> None:
        self._memories = MemoryPool()
        self._scratch = np.empty(0, np.uint8)

    def take(self, dtype: str, n_elems: int) -> Accumulator:
        """Return an empty accumulator."""
        memory = self._memories.take(_sum_bytes(dtype, n_elems))
        if self._scratch.size < memory.size:
            self._scratch = np.empty(memory.size, np.uint8)
        return Accumulator(dtype, n_elems, self._scratch, memory)

    def give(self, accumulator: Accumulator) -> None:
        """Take an accumulator back that nobody uses any more."""
        self._memories.give(accumulator.detach_memory())


def combine(inputs: Sequence[Buffer], weights: Sequence[float], segments: Sequence[Segment], out: Buffer) -> None:
    """Write the weighted mean of several trainers' regions to `out`, which may be one of them.

    Same arithmetic as between peers. Gaps between segments are left alone. Raises LocalError naming the trainer by its
    position if its values or weight cannot be part of a mean, RoundFailed on overflow.
    """
    total_weight = math.fsum(weights)
    if len(inputs) != len(weights) or not total_weight > 0:
        raise LocalError(f"{len(inputs)} inputs have weights {list(weights)}: one each, with a positive sum, expected")
    regions = [memoryview(region).cast("B") for region in inputs]
    result = memoryview(out).cast("B")
    pool = AccumulatorPool()
    for segment in segments:
        for start in range(segment.offset, segment.end, _COMBINE_BLOCK_BYTES):
            block = slice(start, min(start + _COMBINE_BLOCK_BYTES, segment.end))
            sums = pool.take(segment.dtype, (block.stop - block.start) // ITEM_BYTES[segment.dtype])
            for position, (region, weight) in enumerate(zip(regions, weights, strict=True)):
                try:
                    sums.add(region[block], weight)
                except PeerError as error:
                    raise LocalError(f"trainer {position}, bytes from {start} on: {error}") from error
            sums.mean_into(result[block], total_weight)
            pool.give(sums)


def members_of(mask: int) -> tuple[int, ...]:
    """Return the members in a contributor set, lowest first: bit i stands for member i."""
    return tuple(member for member in range(mask.bit_length()) if mask >> member & 1)


def mask_of(members: Iterable[int]) -> int:
    """Return the contributor set of `members`."""
    mask = 0
    for member in members:
        mask |= 1 << member
    return mask


def _sum_bytes(dtype: str, n_elems: int) -> int:
    return n_elems * np.dtype(SUM_TYPES[dtype]).itemsize
