"""The robust rules against plain float64 references, against members that cheat, and against values at the limits."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.errors import PeerError, RoundFailed
from mpd.layout import AGGREGATE_NAMES, ITEM_BYTES, MAX_WEIGHT
from mpd.reduce import SUM_TYPES, AccumulatorPool, as_array, bf16_from_f32, f32_from_bf16
from mpd.robust import MAX_VOTE, Stack, StackPool, _sorted, pool_for

DTYPES = list(ITEM_BYTES)
RULES = ["clip", "trimmed"]
N_ELEMS = 40_000  # several blocks, the last one short
LARGEST = {"float64": 1.7e308, "float32": 3.4e38, "bfloat16": 3.3e38, "float16": 65504.0}
EPSILON = {"float64": 2**-52, "float32": 2**-23, "bfloat16": 2**-8, "float16": 2**-10}


def packed(values, dtype: str) -> bytearray:
    """Return the bytes of `values`, rounded to `dtype`."""
    memory = bytearray(len(values) * ITEM_BYTES[dtype])
    if dtype == "bfloat16":
        bf16_from_f32(np.asarray(values, np.float32), as_array(memory, dtype))
    else:
        as_array(memory, dtype)[:] = values
    return memory


def unpacked(memory, dtype: str) -> np.ndarray:
    values = as_array(memory, dtype)
    if dtype == "bfloat16":
        wide = np.empty(values.size, np.float32)
        f32_from_bf16(values, wide)
        values = wide
    return values.astype(np.float64)


def combined(rule: str, members, weights=None, dtype: str = "float32") -> np.ndarray:
    """Return what becomes of the values of `members`, one row each."""
    stack = pool_for(rule).take(dtype, len(members[0]))
    for values, weight in zip(members, weights or [1.0] * len(members), strict=True):
        stack.add(packed(values, dtype), weight)
    out = bytearray(len(members[0]) * ITEM_BYTES[dtype])
    stack.mean_into(out, float(len(members)))
    return unpacked(out, dtype)


def trimmed_reference(members: np.ndarray) -> np.ndarray:
    n = len(members)
    if n < 3:
        return members.mean(axis=0)
    if n < 5:
        return np.median(members, axis=0)
    return np.sort(members, axis=0)[n // 5 : n - n // 5].mean(axis=0)


def clip_reference(members: np.ndarray, weights) -> np.ndarray:
    """Centred clipping as its paper writes it, on whole vectors."""
    votes = np.minimum(weights, MAX_VOTE * np.median(weights))
    estimate = np.median(members, axis=0)
    if len(members) < 3:
        return np.average(members, axis=0, weights=votes)
    radius = np.sort(np.linalg.norm(members - estimate, axis=1))[len(members) // 2]
    for _ in range(5):
        pulls = members - estimate
        distances = np.linalg.norm(pulls, axis=1)
        scales = np.minimum(1, np.divide(radius, distances, out=np.ones(len(members)), where=distances > 0))
        estimate = estimate + (votes * scales) @ pulls / votes.sum()
    return estimate


# ------------------------------------------------------------------------------------------------------------ sorting


@pytest.mark.parametrize("n", range(1, 12))
def test_the_network_sorts_everything_if_it_sorts_zeros_and_ones(n):
    columns = np.array(list(itertools.product([0.0, 1.0], repeat=n))).T.copy()
    expected = np.sort(columns, axis=0)
    assert (np.array(_sorted(columns, np.empty(columns.shape[1]))) == expected).all()


@pytest.mark.parametrize("n", [12, 13, 31, 32, 33, 48, 63, 64])
def test_the_network_sorts_large_groups(n):
    columns = np.random.default_rng(n).integers(0, 100, (n, 1000)).astype(np.float32)
    expected = np.sort(columns, axis=0)
    assert (np.array(_sorted(columns, np.empty(1500, np.float32))) == expected).all()


# ------------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 10, 15])
def test_results_are_those_of_the_plain_formulas(n, dtype):
    rng = np.random.default_rng(n)
    members = [unpacked(packed(rng.standard_normal(N_ELEMS) + 0.5, dtype), dtype) for _ in range(n)]
    weights = rng.uniform(0.5, 4, n).tolist()
    expected = {
        "trimmed": trimmed_reference(np.array(members)),
        "clip": clip_reference(np.array(members), weights),
    }
    for rule in RULES:
        tolerance = EPSILON[dtype] * abs(expected[rule]) + (1e-13 if dtype == "float64" else 1e-5)
        assert (abs(combined(rule, members, weights, dtype) - expected[rule]) <= tolerance).all(), rule


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), n=st.integers(1, 10))
def test_equal_contributions_come_out_unchanged(rule, dtype, data, n):
    values = data.draw(st.lists(st.floats(-LARGEST[dtype], LARGEST[dtype]), min_size=1, max_size=20))
    weights = data.draw(st.lists(st.floats(1e-3, MAX_WEIGHT), min_size=n, max_size=n))
    assert (combined(rule, [values] * n, weights, dtype) == unpacked(packed(values, dtype), dtype)).all()


@pytest.mark.parametrize("rule", RULES)
def test_who_comes_first_does_not_matter(rule):
    members = list(np.random.default_rng(1).standard_normal((7, 500)))
    there, back = combined(rule, members), combined(rule, members[::-1])
    np.testing.assert_allclose(there, back, atol=1e-6)


@pytest.mark.parametrize(
    ("n_elems", "spread", "most"),
    [(10_000, 0.0, 0.002), (16, 0.0, 0.1), (10_000, 0.5, 0.2)],
    ids=["alike", "few values", "loud and quiet members"],
)
@pytest.mark.parametrize("n", [3, 5, 8, 16])
def test_among_honest_members_a_clip_is_close_to_the_mean(n, n_elems, spread, most):
    """Its distance from the mean, averaged over runs, in distances of a member from the mean."""
    rng = np.random.default_rng(n)
    distances = []
    for _ in range(20):
        loudness = np.exp(spread * rng.standard_normal((n, 1)))
        members = rng.standard_normal(n_elems) + loudness * rng.standard_normal((n, n_elems))
        mean = members.mean(axis=0)
        bias = np.linalg.norm(combined("clip", members) - mean)
        distances.append(bias / np.linalg.norm(members - mean, axis=1).mean())
    assert np.mean(distances) <= most


def test_two_members_have_their_mean_which_only_a_clip_weighs():
    members = [np.zeros(100), np.full(100, 3.0)]
    np.testing.assert_allclose(combined("clip", members, [1.0, 2.0]), 2.0, rtol=1e-6)
    np.testing.assert_allclose(combined("trimmed", members, [1.0, 2.0]), 1.5)


# ------------------------------------------------------------------------------------------------------------- cheating


@pytest.mark.parametrize("signal", [0.0, 0.3, 3.0])
@pytest.mark.parametrize(
    ("rule", "n", "n_bad", "lie", "norm"),
    [
        ("clip", 8, 1, 1000, 1.2),
        ("clip", 8, 1, -1, 1.2),
        ("clip", 8, 1, -1000, 1.2),
        ("clip", 8, 2, 1000, 1.5),
        ("clip", 8, 2, -1000, 1.5),
        ("trimmed", 8, 1, 1000, 1.3),
        ("trimmed", 8, 1, -1, 1.3),
        ("trimmed", 8, 1, -1000, 1.3),
        ("trimmed", 10, 2, 1000, 1.7),
        ("trimmed", 10, 2, -1000, 1.7),
    ],
)
def test_liars_do_not_set_the_norm(rule, n, n_bad, lie, norm, signal):
    """For 100 rounds some members send a multiple of honest values, all the same.

    `signal` is what honest values have in common, in standard deviations: from pure noise to near agreement.
    """
    rng = np.random.default_rng(7)
    for _ in range(100):
        values = signal * rng.standard_normal(1000) + rng.standard_normal((n, 1000))
        honest_mean = values[n_bad:].mean(axis=0)
        members = [*([lie * values[0]] * n_bad), *values[n_bad:]]
        result = combined(rule, members)
        assert np.linalg.norm(result) <= norm * np.linalg.norm(honest_mean)
    plain_mean = np.mean(members, axis=0)
    assert lie == -1 or np.linalg.norm(plain_mean) > 10 * np.linalg.norm(honest_mean)  # what it takes without


def test_a_weight_counts_for_two_members_at_most_in_a_clip():
    members = list(np.random.default_rng(3).standard_normal((7, 1000)))
    boast = combined("clip", members, [MAX_WEIGHT, *[1.0] * 6])
    np.testing.assert_allclose(boast, combined("clip", members, [MAX_VOTE, *[1.0] * 6]), atol=1e-6)
    assert np.linalg.norm(boast - combined("clip", members)) > 0.1  # and for more than one


def test_weights_do_not_count_in_a_trimmed_mean():
    members = list(np.random.default_rng(4).standard_normal((7, 1000)))
    assert (combined("trimmed", members, [1.0, 2.0, 3.0, 1e8, 1e-3, 1.0, 1.0]) == combined("trimmed", members)).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_finite_value_of_a_minority_spoils_the_result(rule, dtype):
    honest = np.random.default_rng(5).standard_normal((6, 200))
    for lies in itertools.product([LARGEST[dtype], -LARGEST[dtype], 1e4], repeat=1 if rule == "trimmed" else 2):
        members = [*honest, *(np.full(200, lie) for lie in lies)]
        result = combined(rule, members, dtype=dtype)
        assert (abs(result) <= abs(honest).max()).all()


def test_whoever_is_too_far_away_to_measure_is_left_out_of_a_clip():
    honest = list(np.random.default_rng(6).standard_normal((6, 200)))
    near = combined("clip", [*honest, np.full(200, 1e16)])
    far = combined("clip", [*honest, np.full(200, 1e30)])
    assert np.linalg.norm(near - far) > 0.5  # one pulls with all its might, the other not at all
    assert np.linalg.norm(far - np.mean(honest, axis=0)) < 0.5


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_values_without_any_majority_in_reach_fail_the_round(dtype):
    largest = LARGEST[dtype]
    members = [[largest] * 3, [-largest] * 3]
    for rule in RULES:
        with pytest.raises(RoundFailed, match="too far apart"):
            combined(rule, members, dtype=dtype)
    with pytest.raises(RoundFailed, match="too far apart"):
        combined("clip", [*members, [0.0] * 3, [largest / 2] * 3], dtype=dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_finite_values_give_finite_ones_or_fail_the_round(rule, dtype, data):
    limit = LARGEST[dtype]
    corners = st.sampled_from([0.0, limit, -limit, limit / 3, 5e-324, 1e-40, -1e-20, 1e17, 1e19]).filter(
        lambda value: abs(value) <= limit
    )
    columns = st.lists(st.floats(-limit, limit) | corners, min_size=3, max_size=3)
    members = data.draw(st.lists(columns, min_size=1, max_size=8))
    weights = data.draw(st.lists(st.floats(1e-6, MAX_WEIGHT), min_size=len(members), max_size=len(members)))
    try:
        result = combined(rule, members, weights, dtype)
    except RoundFailed:
        return
    sent = np.array([unpacked(packed(values, dtype), dtype) for values in members])
    # Every rule takes averages of what was sent, so nothing comes out that lies outside, a rounding apart.
    slack = 1e-5 * abs(sent).max(axis=0) if SUM_TYPES[dtype] is np.float32 else 1e-12 * abs(sent).max(axis=0)
    assert np.isfinite(result).all()
    assert (result >= sent.min(axis=0) - slack - 1e-7).all()
    assert (result <= sent.max(axis=0) + slack + 1e-7).all()


# ---------------------------------------------------------------------------------------------------- memory and errors


class CountedMemory:
    """How much memory a pool has made, and whether any of it is out."""

    def __init__(self, pool: StackPool) -> None:
        self._free = pool._memories._free

    def n_free(self) -> int:
        return sum(len(memories) for memories in self._free.values())


@pytest.mark.parametrize("rule", RULES)
def test_memory_is_pooled(rule):
    pool = pool_for(rule)
    memory = CountedMemory(pool)
    values = packed(np.ones(50_000), "float32")
    made = []
    for _ in range(3):
        stack = pool.take("float32", 50_000)
        for _ in range(5):
            stack.add(values, 1.0)
        stack.mean_into(bytearray(values), 5.0)
        pool.give(stack)
        pool.give(stack)
        made.append(memory.n_free())
    assert made[0] == made[1] == made[2]


def test_stacks_that_are_out_share_nothing():
    pool = pool_for("trimmed")
    stacks = [pool.take("float32", 10) for _ in range(3)]
    for _ in range(3):
        for number, stack in enumerate(stacks):
            stack.add(packed(np.full(10, number), "float32"), 1.0)
    for number, stack in enumerate(stacks):
        out = bytearray(40)
        stack.mean_into(out, 3.0)
        assert (unpacked(out, "float32") == number).all()


@pytest.mark.parametrize("rule", RULES)
def test_what_was_added_is_a_copy(rule):
    stack = pool_for(rule).take("float32", 10)
    values = packed(np.ones(10), "float32")
    stack.add(values, 1.0)
    values[:] = packed(np.full(10, np.nan), "float32")
    out = bytearray(40)
    stack.mean_into(out, 1.0)
    assert (unpacked(out, "float32") == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_contribution_leaves_the_stack_untouched(dtype):
    pool = pool_for("trimmed")
    stack = pool.take(dtype, 4)
    good = packed([1, 2, 3, 4], dtype)
    stack.add(good, 1.0)
    for bad, message in [
        (packed([9, 9, np.nan, 9], dtype), "element 2"),
        (packed([np.inf, 9, 9, 9], dtype), "element 0"),
        (good[:-1], "bytes"),
        (good + good, "bytes"),
        (b"", "bytes"),
    ]:
        for weight in (0.0, 1.0):
            with pytest.raises(PeerError, match=message):
                stack.add(bad, weight)
    for weight in (float("nan"), float("inf"), -1.0, 1e-300, 10 * MAX_WEIGHT):
        with pytest.raises(PeerError, match="weight"):
            stack.add(good, weight)
    stack.add(packed([9, 9, 9, 9], dtype), 0.0)
    out = bytearray(len(good))
    stack.mean_into(out, 1.0)
    assert out == good
    pool.give(stack)
    assert CountedMemory(pool).n_free() == 3  # one piece, another that was refused, and the scratch


def test_there_is_no_mean_of_nothing():
    stack = pool_for("clip").take("float32", 2)
    stack.add(packed([1, 2], "float32"), 0.0)
    with pytest.raises(ValueError, match="nothing"):
        stack.mean_into(bytearray(8), 1.0)
    stack.add(packed([1, 2], "float32"), 1.0)
    with pytest.raises(ValueError, match="room for 1"):
        stack.mean_into(bytearray(4), 1.0)


def test_every_aggregate_has_its_pool():
    assert isinstance(pool_for("mean"), AccumulatorPool)
    assert all(isinstance(pool_for(name).take("float32", 1), Stack) for name in AGGREGATE_NAMES if name != "mean")
    with pytest.raises(KeyError):
        pool_for("median")
