"""Mass in an exact cycle: the mean comes out exact for every swarm, and a certificate is never wrong about it."""

import math
import random
from dataclasses import replace

import pytest
from core.grid_sim import (
    EVERYBODY,
    CarrySwarm,
    Faults,
    Swarm,
    emptiest_cells,
    line_sizes,
    moved,
    random_cells,
    rank_cells,
    rounds_of_bits,
    rounds_of_random_groups,
    variance,
)
from hypothesis import given
from hypothesis import strategies as st

from mpd.errors import PeerError
from mpd.grid import MAX_PEERS, fit
from mpd.layout import MAX_WEIGHT
from mpd.mass import MAX_MASS, MAX_PARTS, Standing, after, certificate, cuts, enter, shares

ROUND = b"r" * 16
ORIGINS = [bytes([i]) * 16 for i in range(4)]


def arrived(cell, origin, mass=6.0, **change):
    """A peer that completed round 0 of a (2, 2) grid."""
    return replace(Standing(mass=mass, heads=1.5, origin=origin, seen=0, full=True, cell=cell), **change)


LINE = [arrived((0, 0), ORIGINS[0]), arrived((0, 0), ORIGINS[0]), arrived((0, 1), ORIGINS[1], mass=4.0)]


def test_the_first_round_weighs_as_the_trainers_say():
    group = [enter(weight, (c, 1)) for weight, c in [(2.0, 0), (0.0, 1), (6.0, 1)]]
    weighed = shares(group, 0, (2, 2), exact=True)

    assert weighed.weights == (2.0, 0.0, 6.0)
    assert weighed.heads == (1.0, 1.0, 1.0)
    assert weighed.whole


def test_a_cell_counts_once_however_many_turn_up():
    weighed = shares(LINE, 1, (2, 2), exact=True)

    assert weighed.weights == (3.0, 3.0, 4.0)
    assert weighed.heads == (0.75, 0.75, 1.5)
    assert weighed.whole
    assert shares(LINE[1:], 1, (2, 2), exact=True).weights == (6.0, 4.0)


def test_who_missed_the_round_before_weighs_nothing():
    late = [enter(5.0, (0, 0)), arrived((0, 0), ORIGINS[0], seen=-1), arrived((0, 1), ORIGINS[1], seen=3)]
    weighed = shares([*LINE, *late], 1, (2, 2), exact=True)

    assert weighed.weights == (3.0, 3.0, 4.0, 0.0, 0.0, 0.0)
    assert weighed.heads[3:] == (0.0, 0.0, 0.0)
    assert weighed.whole


@pytest.mark.parametrize(
    "group",
    [
        LINE[:2],  # a cell is missing
        [*LINE[:2], replace(LINE[2], full=False)],
        [*LINE, arrived((0, 1), ORIGINS[2])],  # two groups were closed in one line
        [LINE[0], arrived((0, 1), ORIGINS[0])],
        [LINE[0], arrived((0, 1), ORIGINS[0]), arrived((0, 1), ORIGINS[1])],
        [enter(1.0, (0, 0)), enter(1.0, (0, 1))],
        [],
    ],
)
def test_a_later_round_is_whole_only_if_each_cell_is_there_once(group):
    assert not shares(group, 1, (2, 2), exact=True).whole


def test_single_rounds_weigh_as_the_trainers_say_on_every_axis():
    group = [enter(2.0, (0, 0)), arrived((0, 1), ORIGINS[1], mass=5.0)]
    weighed = shares(group, 1, (2, 2), exact=False)

    assert weighed.weights == (2.0, 5.0)
    assert not weighed.whole
    assert certificate(weighed, EVERYBODY) == (False, 3)  # the first one has not been counted in this cycle


def test_single_rounds_count_heads_all_the_same():
    weighed = shares(LINE, 1, (2, 2), exact=False)

    assert weighed.weights == (6.0, 6.0, 4.0)
    assert weighed.heads == (0.75, 0.75, 1.5)
    assert certificate(weighed, EVERYBODY) == (True, 6)


@pytest.mark.parametrize("cells", [[(0, 0), (1, 1)], [(0, 0), (0, 2)], [(0,)], [(0, -1)]])
def test_a_group_off_the_line_is_the_fault_of_who_made_it(cells):
    with pytest.raises(PeerError, match="not one line along axis 1"):
        shares([enter(1.0, cell) for cell in cells], 1, (2, 2), exact=True)


def test_after_a_round_each_cell_has_its_part_of_the_mass():
    group = [enter(weight, (c, 1)) for weight, c in [(2.0, 0), (4.0, 1), (6.0, 1)]]
    weighed = shares(group, 0, (2, 2), exact=True)
    ends = [after(me, place, weighed, EVERYBODY, ROUND, record_n=5) for place, me in enumerate(group)]

    assert {(e.mass, e.heads, e.origin, e.seen, e.full) for e in ends} == {(6.0, 1.5, ROUND, 0, True)}
    assert sorted(e.cell for e in ends) in ([(0, 1), (0, 1), (1, 1)], [(0, 1), (1, 1), (1, 1)])
    assert certificate(weighed, EVERYBODY) == (False, 6)  # there is another round to come


def test_a_lost_piece_takes_its_mass_and_the_certificate_with_it():
    weighed = shares(LINE, 1, (2, 2), exact=True)
    end = after(LINE[0], 0, weighed, 0b110, ROUND, record_n=6)

    assert (end.mass, end.heads, end.full) == (3.5, 1.125, False)
    assert certificate(weighed, 0b110) == (False, 4)
    assert certificate(weighed, 0b111) == (True, 6)


def test_who_weighs_nothing_need_not_send_anything():
    joined = [*LINE, enter(5.0, (0, 0))]
    weighed = shares(joined, 1, (2, 2), exact=True)

    assert certificate(weighed, 0b0111) == (True, 6)
    assert after(joined[3], 3, weighed, 0b0111, ROUND, record_n=6).full


def test_an_unused_coordinate_ends_the_certificate_before_the_last_round():
    alone = [enter(1.0, (0, 0))]
    weighed = shares(alone, 0, (2, 2), exact=True)
    end = after(alone[0], 0, weighed, EVERYBODY, ROUND, record_n=6)

    assert (end.mass, end.full) == (1.0, False)


def test_a_group_without_any_weight_ends_without_mass():
    group = [enter(0.0, (0, 0)), enter(0.0, (1, 0))]
    weighed = shares(group, 0, (2, 2), exact=True)

    assert after(group[0], 0, weighed, EVERYBODY, ROUND, record_n=6).mass == 0.0


def test_masses_at_the_limit_stay_legal():
    group = [arrived((0, 0), origin, mass=MAX_MASS, heads=float(MAX_PEERS)) for origin in ORIGINS]
    end = after(group[0], 0, shares(group, 1, (2, 2), exact=True), EVERYBODY, ROUND, record_n=6)

    assert (end.mass, end.heads) == (MAX_MASS, MAX_PEERS)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("shape", "cells"), [((1,), [(0,)] * 5), ((3,), [(0,), (1,), (2,), (0,), (0,)])])
def test_on_one_axis_a_round_is_a_cycle(exact, shape, cells):
    for number in (0, 7):
        weighed = shares([enter(2.0, cell) for cell in cells], number, shape, exact=exact)
        assert weighed.weights == (2.0,) * 5
        assert certificate(weighed, EVERYBODY) == (True, 5)
        assert certificate(weighed, 0b11011) == (False, 4)
        assert after(enter(2.0, cells[0]), 0, weighed, EVERYBODY, ROUND, record_n=5).full


@pytest.mark.parametrize(
    "change",
    [
        {"mass": -1.0},
        {"mass": math.nan},
        {"mass": math.inf},
        {"mass": 2 * MAX_WEIGHT},
        {"mass": 1e9},
        {"mass": 2 * MAX_MASS, "origin": ROUND},
        {"mass": math.nan, "origin": ROUND},
        {"mass": -1.0, "origin": ROUND},
        {"heads": -1.0},
        {"heads": math.nan},
        {"heads": MAX_PEERS + 1.0},
        {"origin": b"short"},
        {"origin": b"l" * 17},
        {"seen": -2},
        {"parts": 0},
        {"parts": MAX_PARTS + 1},
    ],
)
def test_standing_refuses_nonsense(change):
    with pytest.raises(ValueError, match="expected"):
        replace(enter(1.0, (0, 0)), **change)


def test_the_trainers_of_a_peer_weigh_no_more_than_one_may():
    assert enter(MAX_WEIGHT, (0,)).mass == enter(8 * MAX_WEIGHT, (0,)).mass == MAX_WEIGHT


def test_the_whole_swarm_at_its_heaviest_fits_into_a_cell():
    group = [arrived((0, c), origin, mass=MAX_MASS / 2, heads=1.0) for c, origin in enumerate(ORIGINS[:2])]
    assert shares(group, 1, (2, 2), exact=True).weights == (MAX_MASS / 2, MAX_MASS / 2)
    assert MAX_MASS == MAX_WEIGHT * MAX_PEERS


@given(
    st.lists(
        st.builds(
            Standing,
            mass=st.floats(0, MAX_WEIGHT) | st.just(MAX_WEIGHT),
            heads=st.floats(0, MAX_PEERS),
            origin=st.sampled_from([b"", *ORIGINS]),
            seen=st.integers(-1, 3),
            full=st.booleans(),
            cell=st.tuples(st.just(1), st.integers(0, 1)),
        )
        | st.builds(
            Standing,
            mass=st.floats(0, MAX_MASS),
            heads=st.floats(0, MAX_PEERS),
            origin=st.sampled_from(ORIGINS),
            seen=st.integers(-1, 3),
            full=st.booleans(),
            cell=st.tuples(st.just(1), st.integers(0, 1)),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 63),
)
def test_no_hostile_standing_makes_an_honest_peer_illegal(group, contributors):
    weighed = shares(group, 1, (2, 2), exact=True)
    end = after(group[0], 0, weighed, contributors, ROUND, record_n=6)

    assert 0 <= end.mass <= MAX_MASS
    assert sum(weighed.weights) <= sum(s.mass for s in group) * (1 + 1e-9)
    assert certificate(weighed, contributors)[1] >= 0


@pytest.mark.parametrize("group_size", [2, 3, 4, 8, 16, 32])
def test_cycles_from_ranks_are_exact_and_certified_for_every_number_of_peers(group_size):
    rng = random.Random(group_size)
    for n_peers in [*range(1, 50), *range(50, 400, 37), 1000]:
        swarm = Swarm(rng, fit(n_peers, group_size), rank_cells(n_peers, fit(n_peers, group_size)), weighs=True)
        for _ in range(2):
            result = swarm.cycle()
            assert result.is_exact
            assert {certified for _, certified in result.ends} == {(True, n_peers)}


def test_a_cycle_may_start_in_any_phase():
    rng = random.Random(6)
    for n_peers, group_size in [(11, 3), (60, 4), (200, 8), (500, 16)]:
        shape = fit(n_peers, group_size)
        for number in range(len(shape)):
            swarm = CarrySwarm(rng, shape, rank_cells(n_peers, shape), number=number)
            assert swarm.rounds_to_agree() <= len(shape)
            assert variance(swarm.values) < 1e-24


def test_filled_cells_keep_every_line_long_enough_for_ever():
    rng = random.Random(8)
    for n_peers in range(30, 1000, 97):
        shape = fit(n_peers, 8)
        cells = emptiest_cells(rng, n_peers, shape)
        filled = set(cells) | set(rank_cells(n_peers, shape))
        cells = [*filled, *cells]  # every cell has somebody, the rest is anywhere
        for number in range(3 * len(shape)):
            assert min(line_sizes(cells, number % len(shape)).values()) >= shape[number % len(shape)]
            cells = moved(cells, number, shape, n_peers, rng)


def test_joiners_in_the_middle_of_a_cycle_change_nothing_and_end_exact():
    rng = random.Random(9)
    for n_peers, shape in [(64, (3, 3)), (300, (3, 4, 4)), (900, (5, 5, 5))]:
        swarm = Swarm(rng, shape, rank_cells(n_peers, shape), weighs=True)
        for _ in range(5):
            result = swarm.cycle(Faults(absent=0.2), Faults())
            assert result.n_first < n_peers == len(result.ends)
            assert result.is_exact
            assert {certified for _, certified in result.ends} == {(True, result.n_first)}


def test_a_split_line_loses_nothing_before_the_last_round():
    rng = random.Random(10)
    for n_peers, shape in [(40, (4, 4)), (300, (5, 5, 5)), (200, (3, 4, 4))]:
        swarm = Swarm(rng, shape, rank_cells(n_peers, shape), weighs=True)
        result = swarm.cycle(Faults(split=1.0), Faults())
        assert result.is_exact
        assert not any(exact for _, (exact, _) in result.ends)  # nobody could know


@pytest.mark.parametrize(("n_peers", "shape"), [(40, (2, 2)), (64, (2, 2, 2)), (150, (3, 3)), (500, (3, 4, 4))])
def test_a_line_that_is_cut_by_its_leader_is_exact_and_certified(n_peers, shape):
    rng = random.Random(20)
    swarm = Swarm(rng, shape, rank_cells(n_peers, shape), weighs=True, cap=8)
    for _ in range(5):
        result = swarm.cycle(Faults(absent=0.05), Faults())
        assert result.is_exact
        assert {certified for _, certified in result.ends} == {(True, result.n_first)}


@pytest.mark.parametrize(("n_peers", "shape"), [(40, (2, 2)), (500, (3, 4, 4))])
def test_a_cut_in_the_last_round_costs_the_mean_and_the_certificate(n_peers, shape):
    swarm = Swarm(random.Random(21), shape, rank_cells(n_peers, shape), cap=8, last_too=True)
    result = swarm.cycle()
    assert max(error for error, _ in result.ends) > 1e-3
    assert not any(exact for _, (exact, _) in result.ends)


def test_a_cut_keeps_the_certificate_honest_under_faults():
    rng = random.Random(22)
    n_certified = n_inexact = 0
    for n_peers, shape in [(60, (2, 2)), (80, (2, 3, 3)), (200, (4, 4))]:
        swarm = Swarm(rng, shape, random_cells(rng, n_peers, shape), weighs=True, cap=7)
        for _ in range(60):
            faults = Faults(*(rng.choice([0, most / 10, most]) for most in (0.2, 0.05, 0.2, 0.1)))
            result = swarm.cycle(faults)
            n_inexact += not result.is_exact
            for error, (exact, heads) in result.ends:
                if exact:
                    n_certified += 1
                    assert error < 1e-12
                    assert heads == result.n_first
    assert n_certified > 2000
    assert n_inexact > 20


@pytest.mark.parametrize(
    ("n_members", "number", "n_groups"),
    [(6, 0, 1), (7, 0, 2), (16, 0, 3), (16, 1, 1), (64, 1, 1), (65, 1, 2), (200, 1, 4), (200, 0, 34)],
)
def test_lines_are_cut_as_rarely_as_the_cap_allows(n_members, number, n_groups):
    assert cuts(n_members, number, (2, 2), 6, 64) == n_groups


def test_a_cut_leaves_somebody_for_every_coordinate():
    assert cuts(20, 0, (9, 9), 6, 64) == 2
    assert cuts(17, 0, (9, 9), 6, 64) == 1
    assert cuts(300, 0, (1,), 6, 64) == 5


def test_of_a_cell_that_two_groups_have_filled_both_must_be_there():
    halves = [arrived((0, c), origin, parts=2) for c, origin in zip((0, 0, 1, 1), ORIGINS, strict=True)]
    assert shares(halves, 1, (2, 2), exact=True).whole
    assert shares(halves, 1, (2, 2), exact=True).weights == (6.0,) * 4
    assert not shares(halves[1:], 1, (2, 2), exact=True).whole
    assert not shares([replace(halves[0], parts=1), *halves[1:]], 1, (2, 2), exact=True).whole


def test_first_cells_are_forgotten_within_three_cycles():
    rng = random.Random(11)
    sample = [20, 33, 61, 100, 150, 219, 288, 289, 400, 509, 700, 1000, 2000]
    chosen = [Swarm(rng, fit(n, 16), emptiest_cells(rng, n, fit(n, 16))) for n in sample * 2]
    drawn = [Swarm(rng, fit(n, 16), random_cells(rng, n, fit(n, 16))) for n in sample]

    assert sum(swarm.cycle().is_exact for swarm in chosen) >= 0.95 * len(chosen)
    assert sum(swarm.cycle().is_exact for swarm in drawn) <= len(drawn) - 3  # 219, 288 and 2000 have few peers a cell
    for swarm in chosen + drawn:
        swarm.cycle()
        assert swarm.cycle().is_exact


@pytest.mark.parametrize(
    ("n_peers", "shape", "absent", "n_cycles"), [(64, (4, 4), 0.05, 100), (1000, (6, 6, 6), 0.1, 20)]
)
def test_mates_make_up_for_absence(n_peers, shape, absent, n_cycles):
    swarm = Swarm(random.Random(12), shape, rank_cells(n_peers, shape))
    carried = CarrySwarm(random.Random(12), shape, rank_cells(n_peers, shape))

    assert sum(swarm.cycle(Faults(absent=absent)).is_exact for _ in range(n_cycles)) >= 0.9 * n_cycles
    assert sum(carried.cycle_is_exact(absent) for _ in range(n_cycles)) <= 0.2 * n_cycles


def test_a_certificate_is_never_wrong():
    rng = random.Random(13)
    n_certified = n_inexact = 0
    for n_peers, shape in [(64, (4, 4)), (100, (7, 7)), (200, (4, 4, 5)), (30, (2, 2, 3))]:
        for first in (rank_cells(n_peers, shape), random_cells(rng, n_peers, shape)):
            swarm = Swarm(rng, shape, first, weighs=True)
            for _ in range(50):
                faults = Faults(*(rng.choice([0, most / 10, most]) for most in (0.2, 0.05, 0.2, 0.1)))
                result = swarm.cycle(faults)
                n_inexact += not result.is_exact
                for error, (exact, heads) in result.ends:
                    if exact:
                        n_certified += 1
                        assert error < 1e-12
                        assert heads == result.n_first

    assert n_certified > 5000
    assert n_inexact > 100


@pytest.mark.parametrize(("absent", "most"), [(0.05, 10), (0.01, 7.5)])
def test_absence_costs_few_rounds(absent, most):
    cells = rank_cells(512, (16, 16))
    rounds = [CarrySwarm(random.Random(seed), (16, 16), cells).rounds_to_agree(absent) for seed in range(10)]

    assert sum(rounds) / 10 <= most


@pytest.mark.parametrize("n_peers", [512, 768, 900])
def test_two_rounds_where_other_schemes_need_four(n_peers):
    rng = random.Random(n_peers)
    shape = fit(n_peers, 32)

    assert CarrySwarm(rng, shape, rank_cells(n_peers, shape)).rounds_to_agree() == 2
    assert sum(rounds_of_random_groups(rng, n_peers, 32) for _ in range(10)) / 10 >= 4
    assert sum(rounds_of_bits(rng, n_peers, 32) for _ in range(10)) / 10 >= 4
