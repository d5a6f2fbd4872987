"""What a fitted grid promises, for every number of peers and over long times: the arrays make it quick to look.

Margins are wide against what was measured when the rules were chosen; each test names that figure in brackets.
"""

import os
import random

import numpy as np
import pytest
from core.grid_sim import CarrySwarm, rank_cells

from mpd.grid import axis_of, fit
from mpd.grid_arrays import emptiest_cells, lines_of, n_lines, next_cells, random_cells
from mpd.grid_arrays import rank_cells as rank_cell_array
from mpd.meetings import groups_by_label
from mpd.policies import Moshpit

IS_SOAK = "MPD_SOAK" in os.environ
GROUP_SIZES = (4, 8, 16, 32)


def everybody(n_peers):
    return np.ones(n_peers, dtype=bool)


def cycle(policy, values, rng):
    """Average one whole cycle; return the last `Mixed` and the sizes of the largest and the smallest group."""
    largest, shortest = 0, policy.n_peers
    for m in policy.shape:
        groups = policy.meet(everybody(policy.n_peers), rng)
        largest, shortest = max(largest, groups.sizes.max()), min(shortest, groups.sizes.min() - m)
        mixed = policy.mix(values, groups)
    return mixed, largest, shortest


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_cycle_is_exact_and_certified_for_every_number_of_peers(group_size):
    """All 15,992 cases of the full form are exact to 2.2e-16; without MPD_SOAK every 17th, weights in turn."""
    rng = np.random.default_rng(group_size)
    for n_peers in range(2, 2001) if IS_SOAK else range(2 + group_size % 5, 2001, 17):
        kinds = (True, False) if IS_SOAK else (n_peers % 2 == 0,)
        for is_equal in kinds:
            weights = np.ones(n_peers) if is_equal else rng.uniform(0.1, 10, n_peers)
            policy = Moshpit(weights, fit(n_peers, group_size))
            values = rng.normal(size=(n_peers, 1))
            mean = weights @ values / weights.sum()
            mixed, largest, _ = cycle(policy, values, rng)
            assert np.abs(values - mean).max() < 1e-14
            assert mixed.exact.all()
            assert (mixed.heads == n_peers).all()
            assert largest <= group_size + 2


def test_lines_stay_long_enough_in_the_cycles_that_follow():
    rng = np.random.default_rng(1)
    for group_size in GROUP_SIZES:
        for n_peers in range(40, 2001, 163):
            policy = Moshpit(rng.uniform(0.1, 10, n_peers), fit(n_peers, group_size))
            for _ in range(4):
                values = rng.normal(size=(n_peers, 1))
                mean = policy.weights @ values / policy.weights.sum()
                _, largest, spare = cycle(policy, values, rng)
                assert spare >= 0
                assert largest <= group_size + 2
                assert np.abs(values - mean).max() < 1e-14


@pytest.mark.parametrize(("n_peers", "shape"), [(40, (4, 4)), (300, (5, 5, 5)), (200, (3, 4, 4))])
def test_a_line_may_be_split_before_the_last_round_and_not_in_it(n_peers, shape):
    """Halves of lines that have enough for two lose nothing in the first round (8e-17), and much in the last (0.1)."""
    for split in (0, len(shape) - 1):
        rng = np.random.default_rng(split)
        policy = Moshpit(np.ones(n_peers), shape)
        values = rng.normal(size=(n_peers, 1))
        mean = values.mean()
        for axis, m in enumerate(shape):
            groups = policy.meet(everybody(n_peers), rng)
            if axis == split:
                groups = groups_by_label(*rng.permutation(np.stack([groups.members, groups.group_of_member]), axis=1))
                half = (groups.places >= m) & (groups.sizes[groups.group_of_member] >= 2 * m)
                groups = groups_by_label(groups.members, groups.group_of_member * 2 + half)
            policy.mix(values, groups)
        error = np.abs(values - mean).max()
        assert error < 1e-12 if split == 0 else error > 1e-3


@pytest.mark.parametrize("first", ["emptiest", "random"])
def test_any_first_cells_are_forgotten(first):
    """Groups of 16: emptiest of four exact in the first cycle (1.00); all, random ones too, in the third (1.00)."""
    rng = np.random.default_rng(2)
    numbers = range(20, 2001) if IS_SOAK else range(20, 2001, 19)
    n_exact = 0
    for n_peers in numbers:
        shape = fit(n_peers, 16)
        counts = np.zeros(n_lines(0, shape), dtype=np.int64)
        cells = (
            emptiest_cells(rng, n_peers, shape, counts, 0) if first == "emptiest" else random_cells(rng, n_peers, shape)
        )
        policy = Moshpit(np.ones(n_peers), shape, cells=cells)
        for number in range(3):
            values = rng.normal(size=(n_peers, 1))
            mean = values.mean()
            mixed, *_ = cycle(policy, values, rng)
            is_exact = np.abs(values - mean).max() < 1e-12
            assert is_exact or not mixed.exact.any()
            n_exact += number == 0 and is_exact
        assert is_exact
    if first == "emptiest":
        assert n_exact >= 0.95 * len(numbers)


def test_carried_masses_do_not_concentrate():
    """1000 rounds with a fifth absent: largest to mean 2.6, to smallest 5.8 at most."""
    swarm = CarrySwarm(random.Random(3), (9, 9), rank_cells(100, (9, 9)))
    for _ in range(1000 if IS_SOAK else 200):
        swarm.round(absent=0.2)
        mean = sum(swarm.masses) / 100
        assert mean == pytest.approx(1, abs=0.05)
        assert max(swarm.masses) <= 4 * mean
        assert max(swarm.masses) <= 12 * min(swarm.masses)


class Carried:
    """Moves with a mass per peer that is carried from round to round, on arrays; each peer may have its own phase."""

    def __init__(self, rng, masses, shape, width=1):
        self.rng, self.shape, self.masses = rng, shape, masses.astype(float)
        self.cells = rank_cell_array(len(masses), shape)
        self.values = rng.normal(size=(len(masses), width))
        self.phases = np.zeros(len(masses), dtype=np.int64)

    def round(self, members):
        """Let `members` average with those of their line that are in the same phase, and go on to the next."""
        n_peers = len(self.masses)
        moved = self.cells.copy()
        for phase in range(len(self.shape)):
            who = self.rng.permutation(members[self.phases[members] == phase])
            if not len(who):
                continue
            groups = groups_by_label(who, lines_of(self.cells[who], phase, self.shape))
            who, of = groups.members, groups.group_of_member
            totals = groups.sums(self.masses[who])
            self.values[who] = (groups.sums(self.masses[who, None] * self.values[who]) / totals[:, None])[of]
            moved[who] = next_cells(self.cells[who], phase, groups.places, n_peers, self.shape)
            claims = of * self.shape[phase] + moved[who, phase]
            mates = np.bincount(claims)
            n_cells = np.bincount(np.unique(claims) // self.shape[phase])
            self.masses[who] = totals[of] / n_cells[of] / mates[claims]
        self.cells = moved
        self.phases[members] = (self.phases[members] + 1) % len(self.shape)

    def adopt(self):
        """Let each peer take the phase in which its line has at least twice the peers that it has in the peer's own."""
        n_peers, d = len(self.masses), len(self.shape)
        lines = np.stack([lines_of(self.cells, phase, self.shape) for phase in range(d)], axis=1)
        counts = [np.bincount(lines[self.phases == phase, phase], minlength=lines.max() + 1) for phase in range(d)]
        seen = np.stack([counts[phase][lines[:, phase]] for phase in range(d)], axis=1)
        own = seen[np.arange(n_peers), self.phases]
        best = seen.argmax(axis=1)
        self.phases = np.where(seen[np.arange(n_peers), best] >= 2 * own, best, self.phases)


@pytest.mark.parametrize("adopts", [True, False])
def test_late_peers_must_go_where_their_line_is(adopts):
    """200 peers, 1% late in each round: 5.0 rounds, 99% in one phase; with counters of their own never."""
    rounds, shares = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        swarm = Carried(rng, np.ones(200), fit(200, 16))
        n_rounds = 0
        while swarm.values.var() >= 1e-9 and n_rounds < 60:
            if adopts:
                swarm.adopt()
            swarm.round(np.flatnonzero(rng.uniform(size=200) >= 0.01))
            n_rounds += 1
        rounds.append(n_rounds)
        shares.append(np.bincount(swarm.phases).max() / 200)
    if adopts:
        assert sum(rounds) / 5 <= 9
        assert sum(shares) / 5 >= 0.95
    else:
        assert sum(rounds) / 5 > 40


def train(average, values, targets, rng, n_steps=400):
    """Plain SGD on (x - z)^2 / 2, where each peer has its own target z; return the mean of late models."""
    models = []
    for step in range(n_steps):
        noise = rng.normal(size=values.shape)
        values -= 0.05 * (values - targets + noise)
        average()
        if step >= n_steps // 2:
            models.append(values.mean(axis=0))
    return np.mean(models, axis=0)


def test_plain_weights_train_towards_the_weighted_optimum_and_carried_masses_do_not():
    """60 peers on 4 x 4, targets that go with the weights: bias 0.005 plain, 0.147 carried, 1e-30 apart if exact."""
    rng = np.random.default_rng(5)
    weights = rng.uniform(0.1, 2, 60)
    targets = rng.normal(size=(60, 40)) + 0.5 * (weights - weights.mean())[:, None]
    optimum = weights @ targets / weights.sum()

    def bias(model):
        return float(np.sqrt(np.mean((model - optimum) ** 2)))

    plain, values = Moshpit(weights, (4, 4), exact=False), np.zeros((60, 40))
    trained = train(lambda: plain.mix(values, plain.meet(everybody(60), rng)), values, targets, rng)
    assert bias(trained) <= 0.03

    carried = Carried(rng, weights, (4, 4), width=40)
    carried.values[:] = 0
    trained = train(lambda: carried.round(np.arange(60)), carried.values, targets, rng)
    assert bias(trained) >= 0.1

    exact, values = Moshpit(weights, (4, 4)), np.zeros((60, 40))
    trained = train(lambda: cycle(exact, values, rng), values, targets, rng, n_steps=200)
    assert bias(trained) <= 0.03
    assert values.var(axis=0).max() < 1e-20
    assert axis_of(exact.number, exact.shape) == 0
