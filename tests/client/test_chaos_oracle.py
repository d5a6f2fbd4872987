"""Numbers that tell where they came from: every set of peers has a mean of its own, and nothing else is one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.client.chaos_oracle import MAX_PEERS, Vectors


def averaged(n: int, contributions: dict[int, int], n_bytes: int = 64) -> Vectors:
    """Return a result: the mean of what these peers contribute to these steps of theirs."""
    all_of_them = [Vectors(peer, n, n_bytes) for peer in contributions]
    for vectors, step in zip(all_of_them, contributions.values(), strict=True):
        vectors.fill(step)
    result = Vectors(0, n, n_bytes)
    weight = np.float32(1 / len(all_of_them))
    result.values[:] = sum(vectors.values for vectors in all_of_them) * weight
    result.steps[:] = sum(vectors.steps for vectors in all_of_them) / len(all_of_them)
    return result


def test_no_two_sets_of_peers_look_alike() -> None:
    """The means alone would: of 8 peers, 11 pairs of sets have the same one."""
    for n in range(2, MAX_PEERS + 1):
        masks = np.arange(1, 1 << n)
        bits = masks[:, None] >> np.arange(n) & 1
        sizes = bits.sum(axis=1)
        means = [
            (bits @ powers / sizes).astype(np.float32) for powers in (2.0 ** np.arange(n), 2.0 ** np.arange(n)[::-1])
        ]
        assert len(np.unique(np.stack(means, axis=1), axis=0)) == len(masks)


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_every_set_is_read_back(n: int) -> None:
    for mask in range(1, 1 << n):
        contributions = {i: 10 + i for i in range(n) if mask >> i & 1}
        reading = averaged(n, contributions).read()
        assert reading.sets == ((mask, 16), (mask, n + 2))
        assert dict(reading.steps) == contributions


@given(st.sets(st.integers(0, MAX_PEERS - 1), min_size=1), st.integers(1, 1 << 40))
def test_large_swarms_and_late_steps_are_read_back(peers: set[int], step: int) -> None:
    reading = averaged(MAX_PEERS, dict.fromkeys(sorted(peers), step)).read()
    assert reading.sets[0][0] == sum(1 << peer for peer in peers)
    assert dict(reading.steps) == dict.fromkeys(peers, step)


def test_stretches_of_different_sets_are_told_apart() -> None:
    result, other = averaged(4, {0: 1, 1: 1}), averaged(4, {0: 1, 2: 7})
    result.values[10:] = other.values[10:]
    assert result.read().sets == ((0b11, 10), (0b101, 6), (0b11, 6))


@pytest.mark.parametrize("place", [0, 1, 7])
def test_a_wrong_element_is_the_mean_of_nobody(place: int) -> None:
    result = averaged(4, {0: 1, 1: 1, 3: 1})
    result.values[place] *= 1.01
    with pytest.raises(ValueError, match="the mean of nobody"):
        result.read()


@pytest.mark.parametrize(("place", "value"), [(0, 0.0), (2, 1.0), (1, 0.4)])
def test_steps_belong_to_contributors(place: int, value: float) -> None:
    result = averaged(4, {0: 3, 1: 3, 3: 3})
    result.steps[place] = value
    with pytest.raises(ValueError, match="the numbers of steps"):
        result.read()


def test_it_is_noticed_when_tensors_change() -> None:
    vectors = Vectors(1, 3, 64)
    vectors.fill(5)
    assert vectors.is_filled(5)
    assert not vectors.is_filled(6)
    vectors.values[3] += 1
    assert not vectors.is_filled(5)


@pytest.mark.parametrize(("n_bytes", "n_elems"), [(1, 2), (8, 2), (64, 16), (71, 16), (1 << 20, 1 << 18)])
def test_the_size_is_what_was_asked_for(n_bytes: int, n_elems: int) -> None:
    vectors = Vectors(0, 2, n_bytes)
    assert vectors.tensors["values"].shape == (n_elems,)
    assert vectors.tensors["steps"].shape == (4,)
