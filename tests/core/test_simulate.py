"""Simulated swarms: settings that make sense, the same swarm from the same seed, and theory beside measurement."""

import dataclasses
import json
import math

import numpy as np
import pytest

from mpd.errors import LocalError
from mpd.grid import fit
from mpd.meetings import Groups
from mpd.simulate import COMPARED, POLICIES, Settings, Swarm, compare, expected_variance, generator, simulate, summary


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_peers": 0}, "0 peers: 1 to"),
        ({"n_peers": 2**20 + 1}, "1 to 1048576 expected"),
        ({"policy": "moshpits"}, "no policy: one of moshpit, "),
        ({"group_size": 1}, "at least 2 expected"),
        ({"absent": 1.5}, "a probability of absence of 1.5"),
        ({"absent": math.nan}, "a probability of absence of nan"),
        ({"mid_round": -0.1}, "a probability of loss"),
        ({"churn": 2}, "a probability of churn"),
        ({"rounds": 0}, "at least 1"),
        ({"repeat": 0}, "at least 1"),
        ({"seed": -1}, "seed at least 0"),
        ({"target": 0.0}, "a positive number expected"),
        ({"target": math.nan}, "a positive number expected"),
        ({"shape": ()}, "axes of at least one cell"),
        ({"shape": (3, 0)}, "axes of at least one cell"),
        ({"shape": (2,) * 21}, "1 to 20 axes"),
        ({"shape": (4096, 4096)}, "at most"),
        ({"shape": (2, 3), "policy": "paper-grid"}, "6 cells has no cell of its own for each of 20 peers"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(change, words):
    with pytest.raises(LocalError, match=words) as caught:
        dataclasses.replace(Settings(20), **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_seed_is_one_swarm(policy):
    settings = Settings(60, policy, group_size=8, absent=0.05, mid_round=0.05, churn=0.01, rounds=8, repeat=2, seed=3)
    first, again, other = simulate(settings), simulate(settings), simulate(dataclasses.replace(settings, seed=4))

    assert [run.variance.tolist() for run in first.runs] == [run.variance.tolist() for run in again.runs]
    assert first.runs[1].variance.tolist() == other.runs[0].variance.tolist()
    assert first.runs[0].variance.tolist() != first.runs[1].variance.tolist()


@pytest.mark.parametrize("legacy_random", [False, True])
@pytest.mark.parametrize("n_peers", [1, 2, 3, 5])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_smallest_swarms_work_too(policy, n_peers, legacy_random):
    settings = Settings(
        n_peers, policy, 2, absent=0.3, mid_round=0.2, churn=0.1, rounds=6, repeat=2, legacy_random=legacy_random
    )
    for run in simulate(settings).runs:
        assert np.isfinite(run.variance).all()
        assert run.variance.shape == (7,)


def test_a_run_tells_what_happened():
    result = simulate(Settings(100, "moshpit", 8, rounds=6, repeat=3))
    shape = fit(100, 8)

    assert result.rounds_to(1e-9) == len(shape) == 3
    assert result.n_reached(1e-9) == 3
    for run in result.runs:
        assert run.exact.tolist() == [0, 0, 1, 0, 0, 1]
        assert run.largest.max() <= 10
        assert run.error[2] < 1e-24
        lines = [math.prod(shape) / shape[axis] for axis in (0, 1, 2, 0, 1, 2)]
        assert run.vectors == pytest.approx([2 * (1 - n / 100) for n in lines])
    assert result.runs[0].rounds_to(0.0) is None
    assert json.loads(json.dumps(summary(result)))["rounds_to_target"] == 3


def test_a_run_that_never_gets_there_counts_with_all_its_rounds():
    result = simulate(Settings(64, "gossip", rounds=5, repeat=2))
    assert (result.rounds_to(1e-9), result.n_reached(1e-9)) == (5, 0)


def test_a_swarm_may_be_told_who_is_there():
    settings = Settings(50, "moshpit", 8, absent=1.0, mid_round=1.0)
    swarm = Swarm(settings, generator(settings, 0))
    seen = swarm.round(np.arange(50) != 3)

    assert seen.lost_at is None
    assert isinstance(seen.meeting, Groups)
    assert seen.meeting.group_of(50)[3] == -1
    assert seen.mixed.completed.sum() == 49
    assert not swarm.round().present.any()


def test_churn_brings_newcomers():
    settings = Settings(200, "moshpit", 8, churn=0.1, rounds=12, repeat=1)
    swarm = Swarm(settings, generator(settings, 0))
    n_left = sum(len(swarm.round().left) for _ in range(12))

    assert 180 < n_left < 300
    assert 1e-3 < swarm.variance < 0.5


@pytest.mark.parametrize("absent", [0.0, 0.1])
@pytest.mark.parametrize(
    ("policy", "n_peers", "group_size"),
    [("random", 64, 8), ("random", 60, 8), ("random", 100, 8), ("pairs", 51, 2), ("pairs", 64, 2)],
)
def test_random_groups_contract_as_theory_says(policy, n_peers, group_size, absent):
    """Within 3 standard errors of 200 seeds: without absence the factor is (r - 1) / (N - 1) a round."""
    result = simulate(Settings(n_peers, policy, group_size, absent=absent, rounds=3, repeat=200))
    factors = np.array([run.variance[1] / run.variance[0] for run in result.runs])
    expected = result.theory[1] / result.theory[0]
    assert abs(factors.mean() - expected) < 3 * factors.std(ddof=1) / 200**0.5
    if not absent:
        assert expected == pytest.approx((n_peers // group_size - 1) / (n_peers - 1))
    check_against_theory(result)


@pytest.mark.parametrize(
    ("policy", "absent"),
    [("allreduce", 0.0), ("allreduce", 0.02), ("gossip", 0.0), ("chebyshev", 0.0), ("pushsum", 0.0), ("moshpit", 0.0)],
)
def test_other_policies_do_what_theory_says(policy, absent):
    check_against_theory(simulate(Settings(64, policy, shape=(4, 4, 4), absent=absent, rounds=4, repeat=200)))


def check_against_theory(result):
    """Every mean of a variance is within 4 standard errors of the formula (a few of so many miss 3), rounding apart."""
    variances = np.array([run.variance for run in result.runs])
    errors = variances.std(axis=0, ddof=1) / len(variances) ** 0.5
    assert (abs(variances.mean(axis=0) - result.theory) < 4 * errors + 1e-28).all()


def test_theory_is_silent_where_it_knows_nothing():
    for policy in POLICIES:
        assert expected_variance(Settings(60, policy, 8, mid_round=0.1)) is None
        assert expected_variance(Settings(60, policy, 8, churn=0.1)) is None
    for policy in set(POLICIES) - {"random", "pairs", "allreduce"}:
        assert expected_variance(Settings(60, policy, 8, absent=0.1)) is None
    assert expected_variance(Settings(60, "paper-grid", 8)) is None
    assert expected_variance(Settings(64, "paper-grid", 8)) is not None
    assert expected_variance(Settings(8, "moshpit", shape=(3, 3))) is None


def test_policies_are_compared_from_the_same_values():
    starts = {float(r.runs[0].variance[0]) for r in compare(Settings(64, rounds=1, repeat=1), COMPARED)}
    assert len(starts) == 1
