"""Fractions, chunks and sending order, judged by coverage, balance and an independent optimum."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.errors import LocalError
from mpd.layout import ITEM_BYTES, Layout, TensorSpec
from mpd.schedule import (
    ALIKE,
    MAX_CHUNK_BYTES,
    MAX_SHARE,
    MAX_STACKED_VECTORS,
    MIN_CHUNK_BYTES,
    chunk_bytes_for,
    chunks,
    fractions,
    sending_order,
    tempered_fractions,
)

KIB, MIB = 1024, 1024 * 1024


def segments_of(**n_elems: int):
    return Layout(tuple(TensorSpec(dtype, dtype, (count,)) for dtype, count in n_elems.items())).segments


def slowest_s(bandwidths, shares) -> float:
    n = len(bandwidths)
    return max((1 + (n - 2) * share) / b for b, share in zip(bandwidths, shares, strict=True) if b > 0)


def optimum_s(bandwidths) -> float:
    """Bisect the least time in which members can reduce the whole vector between them."""
    n = len(bandwidths)
    slowest = min(b for b in bandwidths if b > 0)
    low, high = 0.0, n / slowest
    for _ in range(200):
        middle = (low + high) / 2
        room = [min(max((middle * b - 1) / (n - 2), 0.0), 1.0) for b in bandwidths if b > 0]
        low, high = (low, middle) if sum(room) >= 1 else (middle, high)
    return max(high, 1 / slowest)


def test_equal_bandwidths_share_equally():
    assert fractions([5.0] * 4) == (0.25,) * 4


def test_a_slow_member_reduces_nothing():
    assert fractions([100, 100, 100, 10]) == pytest.approx((1 / 3, 1 / 3, 1 / 3, 0))


@pytest.mark.parametrize(
    ("bandwidths", "expected"),
    [
        ([3.0], (1,)),
        ([3, 1], (0.75, 0.25)),
        ([0, 2], (0, 1)),
        ([0, 0, 7, 0], (0, 0, 1, 0)),
        ([1e308] * 3, (1 / 3,) * 3),
    ],
)
def test_small_and_extreme_groups(bandwidths, expected):
    assert fractions(bandwidths) == pytest.approx(expected)


@pytest.mark.parametrize("bandwidths", [[], [0, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_impossible_bandwidths_are_refused(bandwidths):
    with pytest.raises(LocalError):
        fractions(bandwidths)


@given(st.lists(st.one_of(st.just(0.0), st.floats(0.01, 1000)), min_size=3, max_size=48).filter(any))
def test_fractions_are_the_optimum(bandwidths):
    shares = fractions(bandwidths)
    assert sum(shares) == pytest.approx(1)
    assert all(share >= 0 for share in shares)
    assert all(share == 0 for share, b in zip(shares, bandwidths, strict=True) if b == 0)
    assert slowest_s(bandwidths, shares) <= optimum_s(bandwidths) * (1 + 1e-9)


CLAIMS = st.one_of(st.just(0.0), st.floats(allow_nan=True, allow_infinity=True))


@given(st.lists(st.tuples(CLAIMS, st.booleans()), min_size=2, max_size=64).filter(lambda m: any(can for _, can in m)))
def test_no_claims_starve_everybody_or_bloat_anybody(members):
    """Whatever all of them say: the shards cover the vector, and nobody reduces more than twice an equal share."""
    bandwidths, inbound = zip(*members, strict=True)
    n, n_reducers = len(members), sum(inbound)
    shares = tempered_fractions(bandwidths, inbound)
    assert sum(shares) == pytest.approx(1)
    assert all(0 <= share <= 1 and (can or share == 0) for share, can in zip(shares, inbound, strict=True))
    assert max(shares) <= MAX_SHARE / n_reducers + 1e-9
    if n_reducers * MAX_STACKED_VECTORS >= n - 1:
        assert max(shares) * (n - 1) <= MAX_STACKED_VECTORS + 1e-9


@given(st.lists(st.floats(1e6, 1e6 * ALIKE), min_size=5, max_size=48), CLAIMS, st.data())
def test_one_lie_changes_no_other_share_by_much(honest, lie, data):
    """Honest members that are alike: a liar gets between nothing and twice its share, they share the rest equally."""
    place = data.draw(st.integers(0, len(honest) - 1))
    equal = 1 / len(honest)
    shares = tempered_fractions([*honest[:place], lie, *honest[place + 1 :]], [True] * len(honest))
    others = shares[:place] + shares[place + 1 :]
    assert 0 <= shares[place] <= MAX_SHARE * equal + 1e-9
    assert max(others) <= MAX_SHARE * equal + 1e-9
    assert tempered_fractions(honest, [True] * len(honest)) == pytest.approx([equal] * len(honest))


def test_members_that_differ_certainly_reduce_by_their_bandwidth():
    assert tempered_fractions([100.0] * 7 + [30.0], [True] * 8) == pytest.approx([1 / 8] * 8)
    assert tempered_fractions([100.0] * 7 + [20.0], [True] * 8) == pytest.approx([1 / 7] * 7 + [0])
    fast = tempered_fractions([100.0] * 7 + [1000.0], [True] * 8)
    assert fast[0] < 1 / 8 < fast[7] == pytest.approx(2 / 8)
    assert tempered_fractions([100.0, 1.0], [True, True]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("vector_bytes", "n_members", "expected"),
    [
        (4, 2, 64 * KIB),
        (MIB, 8, 64 * KIB),
        (2 * 2 * MIB, 2, 512 * KIB),
        (2 * 5 * MIB, 2, 1280 * KIB),
        (8 * MIB, 2, MIB),
        (32 * MIB, 8, MIB),
        (32 * MIB, 4, 2 * MIB),
        (2**40, 48, 2 * MIB),
    ],
)
def test_chunk_sizes_follow_the_shard(vector_bytes, n_members, expected):
    assert chunk_bytes_for(vector_bytes, n_members, bandwidth=1e9) == expected


@pytest.mark.parametrize(
    ("bandwidth", "expected"),
    [
        (0.0, 256 * KIB),  # nobody has measured anything
        (5e-324, 64 * KIB),
        (1e6, 64 * KIB),  # 8 Mbit/s: 20 ms are 20 kB, but 64 KiB is the least
        (12.5e6, 192 * KIB),  # 100 Mbit/s
        (50e6, 960 * KIB),
        (60e6, 1152 * KIB),
        (125e6, 2 * MIB),
        (1e308, 2 * MIB),
    ],
)
def test_chunks_are_short_on_slow_links(bandwidth, expected):
    assert chunk_bytes_for(256 * MIB, 8, bandwidth) == expected
    assert chunk_bytes_for(MIB, 8, bandwidth) == 64 * KIB


@given(st.integers(1, 2**40), st.integers(2, 64), st.floats(0, allow_infinity=False))
def test_chunk_sizes_are_whole_steps_within_the_bounds(vector_bytes, n_members, bandwidth):
    size = chunk_bytes_for(vector_bytes, n_members, bandwidth)
    assert MIN_CHUNK_BYTES <= size <= MAX_CHUNK_BYTES
    assert size % MIN_CHUNK_BYTES == 0


@given(
    st.dictionaries(st.sampled_from(list(ITEM_BYTES)), st.integers(1, 5000), min_size=1),
    st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 10)), min_size=1, max_size=20).filter(any),
    st.integers(1, 40).map(lambda blocks: 64 * blocks),
)
def test_every_element_is_in_exactly_one_legal_chunk(n_elems, shares, chunk_bytes):
    segments = segments_of(**n_elems)
    cut = chunks(segments, shares, chunk_bytes)
    assert [chunk.index for chunk in cut] == list(range(len(cut)))
    assert [chunk.owner for chunk in cut] == sorted(chunk.owner for chunk in cut)
    assert all(shares[chunk.owner] > 0 for chunk in cut)
    assert all(0 < chunk.n_bytes <= chunk_bytes for chunk in cut)
    remaining = list(cut)
    for segment in segments:
        cursor = segment.offset
        while cursor < segment.end:
            chunk = remaining.pop(0)
            assert (chunk.dtype, chunk.offset) == (segment.dtype, cursor)
            assert chunk.end % 64 == 0 or chunk.end == segment.end
            cursor = chunk.end
        assert cursor == segment.end
    assert remaining == []


@given(
    st.dictionaries(st.sampled_from(list(ITEM_BYTES)), st.integers(1, 5000), min_size=1),
    st.lists(st.floats(0, 10), min_size=1, max_size=20).filter(lambda shares: sum(shares) > 0.1),
)
def test_shards_are_as_large_as_their_shares_say(n_elems, shares):
    segments = segments_of(**n_elems)
    total = sum(segment.n_bytes for segment in segments)
    cut = chunks(segments, shares, 4096)
    for owner, share in enumerate(shares):
        size = sum(chunk.n_bytes for chunk in cut if chunk.owner == owner)
        assert abs(size - total * share / sum(shares)) <= 64 + 1


def test_bytes_on_the_wire_stay_within_a_percent_of_the_butterfly():
    n = 16
    cut = chunks(segments_of(float32=MIB // 4), fractions([1.0] * n), chunk_bytes_for(MIB, n, 0.0))
    for me in range(n):
        mine = sum(chunk.n_bytes for chunk in cut if chunk.owner == me)
        assert (MIB - mine) + (n - 1) * mine == pytest.approx(2 * (1 - 1 / n) * MIB, rel=0.01)


def test_chunks_of_a_shard_are_even():
    sizes = {chunk.n_bytes for chunk in chunks(segments_of(float32=(MIB + 64 * KIB) // 4), [1], MIB)}
    assert sizes == {(MIB + 64 * KIB) // 2}
    sizes = sorted(chunk.n_bytes for chunk in chunks(segments_of(float32=100_000), [1], 64 * KIB))
    assert len(sizes) == 7
    assert sizes[-1] - sizes[0] <= 128


@pytest.mark.parametrize("shares", [[1], [0.25] * 4, [0, 0.5, 0.5, 0]])
def test_a_single_element_is_a_single_chunk(shares):
    (chunk,) = chunks(segments_of(float16=1), shares, MIB)
    assert (chunk.offset, chunk.n_elems, chunk.n_bytes) == (0, 1, 2)
    assert shares[chunk.owner] > 0


def test_a_large_vector_is_cut_into_thousands_of_chunks():
    cut = chunks(segments_of(float32=8192 * MIB // 4), fractions([1.0] * 8), MIB)
    assert len(cut) == 8192
    assert {chunk.n_bytes for chunk in cut} == {MIB}


@pytest.mark.parametrize("shares", [[], [0, 0], [1, -0.1], [1, float("nan")], [float("inf")]])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(LocalError, match="shares"):
        chunks(segments_of(float32=1), shares, MIB)


@pytest.mark.parametrize("chunk_bytes", [0, -64, 63, 100])
def test_impossible_chunk_sizes_are_refused(chunk_bytes):
    with pytest.raises(LocalError, match="chunk_bytes"):
        chunks(segments_of(float32=1), [1], chunk_bytes)


@given(st.integers(2, 12), st.randoms(use_true_random=False))
def test_everything_is_sent_once_right_neighbour_first(n_members, dice: random.Random):
    shares = [dice.choice((0, 1, 2)) for _ in range(n_members - 1)] + [1]
    cut = chunks(segments_of(float32=4000), shares, 1024)
    for me in range(n_members):
        order = sending_order(cut, me, n_members)
        assert sorted(order) == [chunk.index for chunk in cut if chunk.owner != me]
        distance = [(cut[index].owner - me) % n_members for index in order]
        assert distance == sorted(distance)
        assert all(a < b for a, b in pairwise(order) if cut[a].owner == cut[b].owner)
