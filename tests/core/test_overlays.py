"""Gossip on fixed graphs: what one round does, as matrices, and that no scheme loses more than it must."""

import numpy as np
import pytest

from mpd.overlays import Chebyshev, Gossip, PaperPushSum, PushSum

KINDS = (Gossip, Chebyshev, PushSum, PaperPushSum)


def matrix(policy, present=None):
    """The matrix that a round is, from what it makes of unit vectors: W columns are one each."""
    n_peers = policy.n_peers
    values = np.eye(n_peers)
    there = np.ones(n_peers, dtype=bool) if present is None else present
    policy.mix(values, policy.meet(there, np.random.default_rng(0)))
    return values


def test_gossip_takes_the_mean_of_three():
    assert matrix(Gossip(5))[2].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0])
    without_3 = matrix(Gossip(5), np.arange(5) != 3)
    assert without_3[2].tolist() == [0, 0.5, 0.5, 0, 0]
    assert without_3[3].tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("n_peers", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("kind", [Gossip, Chebyshev, PushSum])
def test_rounds_keep_the_mean_of_all_if_nobody_is_absent(kind, n_peers):
    policy = kind(n_peers)
    for _ in range(5):
        mixing = matrix(policy)
        assert mixing.sum(axis=0) == pytest.approx(np.ones(n_peers))
        assert mixing.sum(axis=1) == pytest.approx(np.ones(n_peers))


def test_the_ring_shrinks_by_its_eigenvalue():
    values = np.cos(2 * np.pi * np.arange(16) / 16)[:, np.newaxis]
    policy = Gossip(16)
    policy.mix(after := values.copy(), policy.meet(np.ones(16, dtype=bool), np.random.default_rng(0)))
    assert after == pytest.approx(values * (1 + 2 * np.cos(2 * np.pi / 16)) / 3)


def test_chebyshev_needs_the_rounds_that_are_known_on_a_ring_of_64():
    """About 111 rounds to a variance of 1e-9 from N(0, 1)."""
    needed = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        policy, values, n_rounds = Chebyshev(64), rng.normal(size=(64, 1)), 0
        while values.var() >= 1e-9:
            policy.mix(values, policy.meet(np.ones(64, dtype=bool), rng))
            n_rounds += 1
        needed.append(n_rounds)
    assert 100 < sum(needed) / len(needed) < 120


def test_push_sum_keeps_the_mean_whoever_is_absent():
    rng = np.random.default_rng(5)
    policy, values = PushSum(100), rng.normal(size=(100, 3))
    mean = values.mean(axis=0)
    for _ in range(160):
        policy.mix(values, policy.meet(rng.uniform(size=100) >= 0.2, rng))
    assert np.abs(values - mean).max() < 1e-7


def test_without_weights_the_mean_drifts():
    rng = np.random.default_rng(5)
    policy, values = PaperPushSum(100), rng.normal(size=(100, 3))
    mean = values.mean(axis=0)
    for _ in range(80):
        policy.mix(values, policy.meet(rng.uniform(size=100) >= 0.2, rng))
    assert values.var(axis=0).max() < 1e-7
    assert np.abs(values.mean(axis=0) - mean).max() > 1e-3


def test_push_sum_of_the_paper_is_displaced_where_it_wraps():
    """The first round of 9 peers: hops of 4 and 8 of 9 in the paper's code, whose rounds begin with h = 1."""
    policy = PaperPushSum(9)
    hops = [2 ** policy.hop(), 2 ** (policy.hop() + 1)]
    diagonal = np.diag(np.full(9, 0.5))
    rolled = diagonal + sum(np.roll(diagonal, hop) for hop in hops)
    assert matrix(policy) == pytest.approx(rolled / rolled.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_lost_in_a_round_counts_for_the_chunks_before(kind):
    rng = np.random.default_rng(6)
    start = rng.normal(size=(20, 64))
    lost_at = np.where(np.arange(20) == 4, 0.5, np.inf)

    def after(present, lost):
        policy, values = kind(20), start.copy()
        policy.mix(values, policy.meet(present, rng), lost)
        return values

    everybody = np.ones(20, dtype=bool)
    with_it, without_it, got = after(everybody, None), after(np.arange(20) != 4, None), after(everybody, lost_at)
    is_with = np.isclose(got, with_it).all(axis=0)
    assert (is_with ^ np.isclose(got, without_it).all(axis=0)).all()
    assert is_with.mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_newcomers_take_part_like_everybody(kind):
    rng = np.random.default_rng(7)
    policy, values = kind(16), rng.normal(size=(16, 1))
    for _ in range(300):
        policy.mix(values, policy.meet(np.ones(16, dtype=bool), rng))
    values[[3, 5]] = 1.0
    mean = values.mean()
    policy.replace(np.array([3, 5]), rng)
    for _ in range(300):
        policy.mix(values, policy.meet(np.ones(16, dtype=bool), rng))
    assert values.var() < 1e-9
    if kind in (Gossip, Chebyshev):  # the others weigh peers as the graph has it
        assert values == pytest.approx(mean, abs=1e-4)
