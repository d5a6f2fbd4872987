"""The grid on arrays says what `mpd.grid` says, element by element."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpd.grid import axis_of, emptiest, fit, line_of, next_cell, rank_cell, seating, table
from mpd.grid_arrays import emptiest_cells, lines_of, n_lines, next_cells, random_cells, rank_cells, seated
from mpd.meetings import groups_by_label

GRIDS = [(6, (1,)), (9, (4,)), (11, (3, 3)), (40, (2, 3, 4)), (300, (4, 5, 5)), (5, (3, 4, 2)), (1000, (3, 3, 4, 4))]


@pytest.mark.parametrize(("n_peers", "shape"), GRIDS)
def test_lines_are_numbered_as_the_table_counts_them(n_peers, shape):
    cells = np.array(list(itertools.product(*map(range, shape))), dtype=np.int32)
    for axis in range(len(shape)):
        lines = lines_of(cells, axis, shape)
        firsts = table(n_peers, shape).firsts(axis)
        assert sorted(set(lines)) == list(range(n_lines(axis, shape))) == list(range(len(firsts)))
        for cell, line in zip(cells, lines, strict=True):
            assert firsts[line] == table(n_peers, shape).offset(axis, line_of(tuple(cell.tolist()), axis))


@pytest.mark.parametrize(("n_peers", "shape"), GRIDS)
def test_next_cells_are_those_of_the_daemon(n_peers, shape):
    rng = np.random.default_rng(n_peers)
    cells = random_cells(rng, 200, shape)
    places = rng.integers(0, 40, 200)
    for number in range(2 * len(shape)):
        moved = next_cells(cells, number, places, n_peers, shape)
        assert [tuple(cell) for cell in moved.tolist()] == [
            next_cell(tuple(cell), number, int(place), n_peers, shape)
            for cell, place in zip(cells.tolist(), places, strict=True)
        ]
        cells = moved


@pytest.mark.parametrize(("n_peers", "shape"), GRIDS)
def test_the_same_peers_stay_as_with_the_daemon(n_peers, shape):
    rng = np.random.default_rng(n_peers)
    cells = random_cells(rng, n_peers, shape)
    for number in range(2 * len(shape)):
        axis = axis_of(number, shape)
        present = np.flatnonzero(rng.uniform(size=n_peers) < 0.9)
        met = groups_by_label(present, lines_of(cells[present], axis, shape))
        groups = seated(met, cells, number, n_peers, shape)
        assert (groups.starts == met.starts).all()
        moved = cells.copy()
        moved[groups.members] = next_cells(cells[groups.members], number, groups.places, n_peers, shape)
        for first, stop in zip(met.starts, met.starts[1:], strict=False):
            line = {bytes(divmod(int(i), 256)): tuple(cells[i].tolist()) for i in met.members[first:stop]}
            order = seating(line, number, n_peers, shape, b"r" * 16)
            for place, name in enumerate(order):
                peer = name[0] * 256 + name[1]
                assert tuple(moved[peer].tolist()) == next_cell(line[name], number, place, n_peers, shape)
        cells = moved


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 100))
@settings(deadline=None, max_examples=50)
def test_rank_cells_are_those_of_the_daemon(sides, n_more):
    shape, n_peers = tuple(sides), math.prod(sides) + n_more
    assert [tuple(cell) for cell in rank_cells(n_peers, shape).tolist()] == [
        rank_cell(rank, shape, n_peers) for rank in range(n_peers)
    ]


@pytest.mark.parametrize("shape", [(1,), (1, 3), (2, 3), (6, 6, 6)])
@pytest.mark.parametrize("kind", [np.random.default_rng, np.random.RandomState])
def test_newcomers_take_the_emptiest_of_four_different_cells(shape, kind):
    """Each newcomer goes where a daemon that had sampled any four cells and counted the same lines could have gone."""
    rng = kind(1)
    for axis in range(len(shape)):
        counts = np.zeros(n_lines(axis, shape), dtype=np.int64)
        cells = emptiest_cells(rng, 150, shape, counts, axis)
        seen: dict[tuple[int, ...], int] = {}
        for cell in map(tuple, cells.tolist()):
            everywhere = list(itertools.product(*map(range, shape)))
            fuller = sum(seen.get(line_of(other, axis), 0) >= seen.get(line_of(cell, axis), 0) for other in everywhere)
            assert fuller >= min(4, len(everywhere))
            if len(everywhere) <= 4:
                best = {emptiest(seen, everywhere, axis, random.Random(seed)) for seed in range(40)}
                assert cell in best
            seen[line_of(cell, axis)] = seen.get(line_of(cell, axis), 0) + 1
        assert counts.tolist() == np.bincount(lines_of(cells, axis, shape), minlength=len(counts)).tolist()


def test_newcomers_that_do_not_see_each_other_herd_a_little():
    rng = np.random.default_rng(4)
    shape = fit(500, 16)
    largest = {}
    for blind in (1, 32, 500):
        counts = np.zeros(n_lines(0, shape), dtype=np.int64)
        emptiest_cells(rng, 500, shape, counts, 0, blind)
        assert counts.sum() == 500
        largest[blind] = counts.max()
    assert largest[1] <= 16 < largest[500]
    assert largest[32] <= largest[500]


def test_random_cells_reach_the_whole_grid():
    cells = random_cells(np.random.default_rng(2), 2000, (3, 4, 5))
    assert len({tuple(cell) for cell in cells.tolist()}) == 60
