"""The arithmetic, against float64 references, exact integers that decode to who was averaged, and torch's bfloat16."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpd.errors import LocalError, PeerError, RoundFailed
from mpd.layout import ITEM_BYTES, MAX_WEIGHT, Segment
from mpd.reduce import (
    MIN_WEIGHT,
    Accumulator,
    AccumulatorPool,
    as_array,
    bf16_from_f32,
    combine,
    f32_from_bf16,
    first_non_finite,
    mask_of,
    members_of,
)

DTYPES = list(ITEM_BYTES)
BITS = {"float64": np.uint64, "float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}
EPSILON = {"float64": 2**-52, "float32": 2**-23, "bfloat16": 2**-8, "float16": 2**-11}


def packed(values, dtype: str) -> bytearray:
    """Return the bytes of `values`, which must be exact in `dtype`."""
    if dtype == "bfloat16":
        return bytearray((np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return bytearray(np.asarray(values, dtype).tobytes())


def unpacked(buffer, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (as_array(buffer, dtype).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return as_array(buffer, dtype).astype(np.float64)


def mean_of(inputs, weights, dtype: str) -> bytearray:
    sums = Accumulator(dtype, len(inputs[0]) // ITEM_BYTES[dtype])
    for values, weight in zip(inputs, weights, strict=True):
        sums.add(values, weight)
    out = bytearray(len(inputs[0]))
    sums.mean_into(out, sum(weights))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_array_is_a_view(dtype):
    buffer = bytearray(4 * ITEM_BYTES[dtype])
    as_array(buffer, dtype)[3] = 1
    assert any(buffer[-ITEM_BYTES[dtype] :])
    assert as_array(b"", dtype).size == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 1, 70, 99])
def test_the_first_non_finite_value_is_found(dtype, bad, position):
    values = np.linspace(-3, 3, 100, dtype=np.float32).astype(np.float16).astype(np.float32)
    values = np.trunc(values * 8)
    values[position] = values[99] = bad
    assert first_non_finite(packed(values, dtype), dtype) == position


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_values_are_finite_however_large(dtype):
    exponent_and_sign = {"float64": 0x7FF0 << 48, "float32": 0x7F80 << 16, "bfloat16": 0x7F80, "float16": 0x7C00}[dtype]
    largest = np.full(1000, exponent_and_sign - 1, BITS[dtype])
    assert first_non_finite(largest.data.cast("B"), dtype) is None
    largest[1::2] |= BITS[dtype](1 << 8 * ITEM_BYTES[dtype] - 1)
    assert first_non_finite(largest.data.cast("B"), dtype) is None
    largest[500] += BITS[dtype](1)
    assert first_non_finite(largest.data.cast("B"), dtype) == 500
    assert first_non_finite(b"", dtype) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_pattern_is_judged_right(dtype):
    torch_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float16
    patterns = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    finite = torch.isfinite(torch.from_numpy(patterns.view(np.int16)).view(torch_dtype)).numpy()
    judged = [first_non_finite(patterns[i : i + 1].tobytes(), dtype) is None for i in range(65536)]
    assert judged == finite.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mean_of_powers_of_two_decodes_to_its_contributors(dtype):
    n = 8  # bits that every dtype's significand holds
    inputs = [packed(np.full(33, 2.0**member), dtype) for member in range(n)]
    for mask in (0b1, 0b10, 0b1011, 0b11111111):
        members = members_of(mask)
        sums = Accumulator(dtype, 33)
        for member in members:
            sums.add(inputs[member], 1.0)
        out = bytearray(len(inputs[0]))
        sums.mean_into(out, 1.0)  # the plain sum
        assert (unpacked(out, dtype) == mask).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [[1, 1, 1], [3, 1, 4], [0.5, 0, 0.25], [0, 0, 2], [1, 2, 1]])
def test_the_mean_of_exact_sums_is_rounded_once(dtype, weights):
    """Small integers sum exactly; what is left is a division and a rounding to nearest even, which torch can judge."""
    rng = np.random.default_rng(1)
    values = [rng.integers(-100, 100, 501).astype(np.float32) for _ in weights]
    out = mean_of([packed(v, dtype) for v in values], weights, dtype)
    sum_dtype = np.float64 if dtype == "float64" else np.float32
    weighted_sum = sum(w * v.astype(np.float64) for w, v in zip(weights, values, strict=True))
    expected = torch.from_numpy(weighted_sum.astype(sum_dtype) / sum_dtype(sum(weights))).to(getattr(torch, dtype))
    assert (unpacked(out, dtype) == expected.double().numpy()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 6), n_elems=st.integers(1, 300))
def test_random_means_are_close_to_float64(dtype, seed, n, n_elems):
    rng = np.random.default_rng(seed)
    inputs = [bytearray(n_elems * ITEM_BYTES[dtype]) for _ in range(n)]
    for buffer in inputs:
        values = rng.standard_normal(n_elems).astype(np.float32)
        if dtype == "bfloat16":
            bf16_from_f32(values, as_array(buffer, dtype))
        else:
            as_array(buffer, dtype)[:] = values
    weights = rng.uniform(0.1, 10, n).tolist()
    reference = np.average([unpacked(buffer, dtype) for buffer in inputs], axis=0, weights=weights)
    scale = np.average([abs(unpacked(buffer, dtype)) for buffer in inputs], axis=0, weights=weights)
    # Half a unit of rounding for the result, and a few in the type of the sum.
    sum_error = (2 * n + 2) * (EPSILON["float64"] if dtype == "float64" else EPSILON["float32"])
    tiny = 2.0**-25 if dtype == "float16" else 0  # half of the smallest subnormal
    error = abs(unpacked(mean_of(inputs, weights, dtype), dtype) - reference)
    assert (error <= EPSILON[dtype] * abs(reference) + sum_error * scale + tiny).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_contribution_leaves_the_sum_untouched(dtype):
    sums = Accumulator(dtype, 4)
    good = packed([1, 2, 3, 4], dtype)
    sums.add(good, 1.0)
    for bad, message in [
        (packed([9, 9, np.nan, 9], dtype), "element 2"),
        (packed([np.inf, 9, 9, 9], dtype), "element 0"),
        (good[:-1], "bytes"),
        (good[: ITEM_BYTES[dtype]], "bytes"),
        (good + good, "bytes"),
        (b"", "bytes"),
    ]:
        for weight in (0.0, 1.0, 0.5):
            with pytest.raises(PeerError, match=message):
                sums.add(bad, weight)
    for weight in (float("nan"), float("inf"), -1.0, 1e300, 1e-300, MIN_WEIGHT / 2, MAX_WEIGHT * 2):
        with pytest.raises(PeerError, match="weight"):
            sums.add(good, weight)
    out = bytearray(len(good))
    sums.mean_into(out, 1.0)
    assert out == good


def test_weights_at_the_limits_are_accepted():
    values = packed([1.5, -2], "float32")
    for weight in (MIN_WEIGHT, MAX_WEIGHT):
        assert mean_of([values, values], [weight, weight], "float32") == values


def test_there_is_no_mean_of_nothing():
    sums = Accumulator("float32", 2)
    out = bytearray(8)
    with pytest.raises(ValueError, match="nothing"):
        sums.mean_into(out, 1.0)
    sums.add(packed([1, 2], "float32"), 0.0)
    with pytest.raises(ValueError, match="nothing"):
        sums.mean_into(out, 1.0)
    sums.add(packed([1, 2], "float32"), 1.0)
    for total_weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="nothing"):
            sums.mean_into(out, total_weight)
    with pytest.raises(ValueError, match="room for 1"):
        sums.mean_into(bytearray(4), 1.0)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_an_overflowing_sum_fails_the_round(dtype):
    largest = np.full(3, (0x7FF0 << 48) - 1, np.uint64) if dtype == "float64" else np.full(3, 0x7F7F0000, np.uint32)
    values = packed(largest.view(np.float64 if dtype == "float64" else np.float32), dtype)
    with pytest.raises(RoundFailed, match="element 0 is too large"):
        mean_of([values, values], [1, 1], dtype)
    with pytest.raises(RoundFailed, match="element 0 is too large"):
        mean_of([values], [1024], dtype)
    assert mean_of([values], [1], dtype) == values


def test_the_largest_float16_values_do_not_overflow():
    values = packed(np.full(64, 65504.0), "float16")
    assert mean_of([values] * 48, [7] * 48, "float16") == values


@pytest.mark.parametrize("dtype", DTYPES)
def test_readonly_and_unaligned_contributions_are_fine(dtype):
    values = packed([1, 2, 3], dtype)
    unaligned = memoryview(b"\0" + bytes(values))[1:]
    assert mean_of([unaligned, memoryview(bytes(values))], [1, 2], dtype) == values


@given(st.integers(0, 2**64 - 1))
def test_masks_and_members_are_the_same_set(mask):
    members = members_of(mask)
    assert list(members) == sorted(set(members))
    assert mask_of(reversed(members)) == mask
    assert sum(2**member for member in members) == mask


def test_all_bfloat16_patterns_survive_float32():
    patterns = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    wide, back = np.empty(65536, np.float32), np.empty(65536, np.uint16)
    f32_from_bf16(patterns, wide)
    bf16_from_f32(wide, back)
    theirs = torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16).float().numpy()
    is_nan = np.isnan(theirs)
    assert (np.isnan(wide) == is_nan).all()
    assert (wide.view(np.uint32) == theirs.view(np.uint32))[~is_nan].all()
    assert (back == patterns)[~is_nan].all()
    assert np.isnan(unpacked(back.tobytes(), "bfloat16"))[is_nan].all()


def test_float32_is_rounded_to_bfloat16_as_torch_does():
    rng = np.random.default_rng(2)
    ties = (rng.integers(0, 2**16, 50_000, dtype=np.uint32) << 16) | 0x8000
    edges = np.array(
        [0, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 1], np.uint32
    )
    bits = np.concatenate(
        [ties, ties - 1, ties + 1, edges, edges | 0x80000000, rng.integers(0, 2**32, 100_000, np.uint32)]
    )
    values, mine = bits.view(np.float32), np.empty(bits.size, np.uint16)
    bf16_from_f32(values, mine)
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    is_nan = np.isnan(values)
    assert (mine == theirs)[~is_nan].all()
    assert np.isnan(unpacked(mine.tobytes(), "bfloat16"))[is_nan].all()


def test_pooled_memory_is_used_again_and_starts_empty():
    pool = AccumulatorPool()
    first = pool.take("float32", 50_000)
    first.add(packed(np.ones(50_000), "float32"), 1.0)
    memory = first._memory
    pool.give(first)
    second = pool.take("bfloat16", 49_999)  # the same power of two
    assert second._memory is memory
    with pytest.raises(ValueError, match="nothing"):
        second.mean_into(bytearray(2 * 49_999), 1.0)


def test_accumulators_that_are_out_share_no_sums():
    pool = AccumulatorPool()
    accumulators = [pool.take("float32", 10) for _ in range(3)]
    for number, sums in enumerate(accumulators):
        sums.add(packed(np.full(10, number), "float32"), 1.0)
        sums.add(packed(np.full(10, number), "float32"), 3.0)
    for number, sums in enumerate(accumulators):
        out = bytearray(40)
        sums.mean_into(out, 4.0)
        assert (unpacked(out, "float32") == number).all()


def test_an_accumulator_given_twice_is_handed_out_once():
    pool = AccumulatorPool()
    sums = pool.take("float32", 10)
    pool.give(sums)
    pool.give(sums)
    assert pool.take("float32", 10)._memory is not pool.take("float32", 10)._memory
    with pytest.raises(PeerError, match="bytes"):
        sums.add(bytes(40), 1.0)


def test_trainers_are_combined_segment_by_segment_and_gaps_stay():
    n_float64, n_float32 = 200_000, 300_001  # several blocks each, the last one short
    segments = (Segment("float64", 0, n_float64), Segment("float32", n_float64 * 8, n_float32))
    n_bytes = segments[1].end + 60
    rng = np.random.default_rng(3)
    inputs, weights = [bytearray(n_bytes) for _ in range(3)], [1.0, 0.0, 3.0]
    for region in inputs:
        for segment in segments:
            view = np.frombuffer(region, segment.dtype, segment.n_elems, segment.offset)
            view[:] = rng.integers(-1000, 1000, segment.n_elems)
    out = bytearray(b"\xaa" * n_bytes)
    combine(inputs, weights, segments, out)
    for segment in segments:
        columns = [np.frombuffer(region, segment.dtype, segment.n_elems, segment.offset) for region in inputs]
        expected = ((columns[0] + 3 * columns[2]) / 4).astype(segment.dtype)
        assert (np.frombuffer(out, segment.dtype, segment.n_elems, segment.offset) == expected).all()
    assert out[segments[1].end :] == b"\xaa" * 60
    first = inputs[0]
    combine(inputs, weights, segments, first)
    assert first[: segments[1].end] == out[: segments[1].end]


def test_a_trainer_with_bad_values_is_named():
    segments = (Segment("float32", 0, 4),)
    inputs = [packed(np.ones(4), "float32"), packed([1, 1, np.nan, 1], "float32")]
    with pytest.raises(LocalError, match=r"trainer 1.*element 2"):
        combine(inputs, [1, 1], segments, bytearray(16))
    with pytest.raises(LocalError, match=r"trainer 0.*12 bytes"):
        combine([inputs[0][:12]], [1], segments, bytearray(16))
    with pytest.raises(LocalError, match=r"trainer 0.*weight"):
        combine([inputs[0], inputs[0]], [-1, 2], segments, bytearray(16))
    for weights in ([0, 0], [1], [float("nan"), 1]):
        with pytest.raises(LocalError, match="weights"):
            combine(inputs, weights, segments, bytearray(16))
