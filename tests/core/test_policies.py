"""Group policies: who meets whom, and what a round makes of their values."""

import math
import random

import numpy as np
import pytest

from mpd.grid import fit, table
from mpd.grid_arrays import lines_of, random_cells
from mpd.policies import AllReduce, Moshpit, Pairs, PaperGrid, RandomGroups

EVERYBODY = np.ones(100, dtype=bool)


def everybody(n_peers):
    return np.ones(n_peers, dtype=bool)


def play(policy, values, rng, n_rounds, absent=0.0):
    for _ in range(n_rounds):
        present = rng.uniform(size=len(values)) >= absent
        mixed = policy.mix(values, policy.meet(present, rng))
    return mixed


def test_random_groups_spread_what_is_left_over():
    rng = np.random.default_rng(1)
    groups = RandomGroups(100, 16).meet(EVERYBODY, rng)

    assert sorted(groups.sizes) == [16, 16, 17, 17, 17, 17]
    assert sorted(groups.members) == list(range(100))
    assert RandomGroups(5, 16).meet(everybody(5), rng).sizes.tolist() == [5]
    assert sorted(Pairs(5).meet(everybody(5), rng).sizes) == [2, 3]
    absent = np.arange(100) >= 40
    assert sorted(RandomGroups(100, 16).meet(absent, rng).members) == list(range(40, 100))
    assert RandomGroups(3, 2).meet(np.zeros(3, dtype=bool), rng).n_groups == 0


def test_an_all_reduce_is_all_or_nothing():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(100, 1))
    before = values.copy()
    policy = AllReduce(100)
    lost_at = np.where(np.arange(100) == 3, 0.9, np.inf)

    assert not policy.mix(values, policy.meet(np.arange(100) > 0, rng)).completed.any()
    assert not policy.mix(values, policy.meet(EVERYBODY, rng), lost_at).completed.any()
    assert (values == before).all()
    assert policy.mix(values, policy.meet(EVERYBODY, rng)).completed.all()
    assert np.allclose(values, before.mean(), atol=1e-15)


def test_the_papers_grid_gives_each_peer_a_cell_and_begins_with_the_second_axis():
    rng = np.random.default_rng(3)
    policy = PaperGrid(100, (16, 16), rng)

    assert len(np.unique(policy.cells, axis=0)) == 100
    for other in (0, 1, 0):
        groups = policy.meet(EVERYBODY, rng)
        for group in range(groups.n_groups):
            members = groups.members[groups.starts[group] : groups.starts[group + 1]]
            assert len(set(policy.cells[members, other])) == 1
        policy.mix(rng.normal(size=(100, 1)), groups)


def test_a_full_grid_of_the_paper_is_exact_after_d_rounds():
    rng = np.random.default_rng(4)
    for shape in [(3, 3), (3, 3, 3), (8, 8), (4, 4, 4), (32, 32)]:
        n_peers = math.prod(shape)
        values = rng.normal(size=(n_peers, 1))
        mean = values.mean()
        play(PaperGrid(n_peers, shape, rng), values, rng, len(shape))
        assert np.abs(values - mean).max() < 1e-14


@pytest.mark.parametrize(("n_peers", "group_size"), [(2, 4), (7, 4), (100, 8), (768, 32), (1000, 4)])
def test_a_cycle_of_moshpit_is_exact_and_certified(n_peers, group_size):
    rng = np.random.default_rng(n_peers)
    weights = rng.uniform(0.1, 10, n_peers)
    policy = Moshpit(weights, fit(n_peers, group_size))
    for _ in range(3):
        values = rng.normal(size=(n_peers, 1))
        mean = (weights @ values) / weights.sum()
        mixed = play(policy, values, rng, len(policy.shape))
        assert np.abs(values - mean).max() < 1e-12
        assert mixed.exact.all()
        assert (mixed.heads == n_peers).all()


def test_a_peer_that_is_absent_keeps_its_value_and_its_cell():
    rng = np.random.default_rng(6)
    policy = Moshpit(np.ones(40), (4, 4))
    values = rng.normal(size=(40, 1))
    before, cells = values.copy(), policy.standings.cells.copy()
    mixed = policy.mix(values, policy.meet(np.arange(40) != 7, rng))

    assert values[7] == before[7]
    assert (policy.standings.cells[7] == cells[7]).all()
    assert mixed.completed.tolist() == [i != 7 for i in range(40)]


def test_single_rounds_keep_the_weighted_mean_and_move_alike():
    rng = np.random.default_rng(7)
    weights = rng.uniform(0.1, 10, 200)
    policy = Moshpit(weights, (13, 13), exact=False)
    values = rng.normal(size=(200, 1))
    mean = weights @ values / weights.sum()
    mixed = play(policy, values, rng, 9, absent=0.05)

    assert weights @ values / weights.sum() == pytest.approx(mean, abs=1e-14)
    assert not mixed.exact.any()
    assert values.var() < 1e-6


def test_lines_of_moshpit_are_as_the_table_says():
    rng = np.random.default_rng(8)
    policy = Moshpit(np.ones(300), (4, 5, 5))
    for number in range(7):
        groups = policy.meet(everybody(300), rng)
        expected = np.diff(table(300, (4, 5, 5)).firsts(number % 3), append=300)
        assert groups.sizes.tolist() == expected.tolist()
        policy.mix(rng.normal(size=(300, 1)), groups)


def test_newcomers_of_moshpit_go_where_peers_are_few():
    rng = np.random.default_rng(9)
    policy = Moshpit(np.ones(300), (5, 5, 5), cells=random_cells(rng, 300, (5, 5, 5)))
    for seed in range(20):
        policy.replace(np.array(random.Random(seed).sample(range(300), 30)), rng)
    sizes = np.bincount(lines_of(policy.standings.cells, 0, (5, 5, 5)), minlength=25)

    assert sizes.min() >= 10
    assert sizes.max() <= 14
    assert (policy.standings.mass == 1).all()
