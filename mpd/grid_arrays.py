"""The grid for all peers of a swarm at once: the moves of `mpd.grid` on arrays, for simulations of a million peers.

A daemon moves one peer and asks `mpd.grid`; here the same numbers come out for whole columns of them. Nothing is
decided in this file: lines, offsets and first places are those of `mpd.grid.Table`, and the tests compare every element
with what the daemon's functions return.

The cells of n peers are an int array of shape (n, d), one row a peer. A line is one number, its place in the order in
which the table counts: a key to sort by, and an index into the table's offsets.
"""

import math

import numpy as np
import numpy.typing as npt

from mpd.grid import Shape, axis_of, table
from mpd.meetings import Groups, Ints, Random

Cells = npt.NDArray[np.int32]


def lines_of(cells: Cells, axis: int, shape: Shape) -> Ints:
    """Return for each of the `cells`, (n, d), the number of its line along `axis`, 0 to P / M - 1: int64, (n,)."""
    lines = np.zeros(len(cells), dtype=np.int64)
    for other in _order(axis, len(shape)):
        lines *= shape[other]
        lines += cells[:, other]
    return lines


def n_lines(axis: int, shape: Shape) -> int:
    """Return how many lines there are along `axis`."""
    return math.prod(shape) // shape[axis]


def next_cells(cells: Cells, number: int, places: Ints, record_n: int, shape: Shape) -> Cells:
    """Return the cells (n, d) of peers that sat at `places` (n,) in their groups of round `number`.

    `mpd.grid.next_cell` for many peers.
    """
    axis = axis_of(number, shape)
    moved = cells.copy()
    moved[:, axis] = (places + table(record_n, shape).firsts(axis)[lines_of(cells, axis, shape)]) % shape[axis]
    return moved


def seated(groups: Groups, cells: Cells, number: int, record_n: int, shape: Shape) -> Groups:
    """Return the groups of round `number` with their members by place: who can stay in its cell stays.

    `cells` (n, d) are those of all peers. `mpd.grid.seating` for many groups, with numbers of peers for ids; which of
    the places that lead to one cell a member has is left open.
    """
    axis = axis_of(number, shape)
    order = np.lexsort((groups.members, groups.group_of_member))
    who, m = groups.members[order], shape[axis]
    stands = groups.group_of_member * m + cells[who, axis]
    leads = groups.group_of_member * m + next_cells(cells[who], number, groups.places, record_n, shape)[:, axis]
    most = len(who) + 1
    _, stayers, taken = np.intersect1d(
        stands * most + _nth(stands), leads * most + _nth(leads), assume_unique=True, return_indices=True
    )
    by_place = np.empty_like(who)
    by_place[taken] = who[stayers]
    by_seat = np.argsort(leads, kind="stable")
    by_place[by_seat[~np.isin(by_seat, taken)]] = np.delete(who, stayers)
    return Groups(by_place, groups.starts)


def _nth(keys: Ints) -> Ints:
    """Return how many equal keys stand before each of the `keys` (m,): int64, (m,)."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order][:1] - 1))
    nth = np.empty_like(keys)
    nth[order] = np.arange(len(keys)) - np.repeat(starts, np.diff(starts, append=len(keys)))
    return nth


def rank_cells(n_peers: int, shape: Shape) -> Cells:
    """Return the first cells (n, d) of peers that rank 0 to n - 1 in a roster: `mpd.grid.rank_cell` for all of them."""
    last = len(shape) - 1
    firsts = table(n_peers, shape).firsts(last)
    lines = np.repeat(np.arange(len(firsts)), np.diff(firsts, append=n_peers))
    cells = np.empty((n_peers, len(shape)), dtype=np.int32)
    for axis in reversed(_order(last, len(shape))):
        lines, cells[:, axis] = np.divmod(lines, shape[axis])
    cells[:, last] = np.arange(n_peers) % shape[last]
    return cells


def random_cells(rng: Random, n_peers: int, shape: Shape) -> Cells:
    """Return cells (n, d) drawn at random, each for itself."""
    return _cells_at(_below(math.prod(shape), rng, n_peers), shape)


def emptiest_cells(
    rng: Random, n_peers: int, shape: Shape, counts: Ints, axis: int, blind: int = 1, k: int = 4
) -> Cells:
    """Return the cells (n, d) of newcomers that take the emptiest of `k` sampled cells, one after the other.

    Args:
        counts: how many peers each line along `axis` has, in the order of `lines_of`; the newcomers are added to it.
        axis: that of the newcomers' first round.
        blind: so many newcomers come at a moment and do not see each other.

    The rule of `mpd.grid.sample_cells` and `emptiest`: as many different cells as there are, ties at random.
    """
    cells = np.empty((n_peers, len(shape)), dtype=np.int32)
    for start in range(0, n_peers, blind):
        stop = min(start + blind, n_peers)
        sampled = _cells_at(_different(rng, math.prod(shape), (stop - start, k)).ravel(), shape)
        lines = lines_of(sampled, axis, shape).reshape(stop - start, -1)
        best = np.argmin(counts[lines], axis=1)  # the first of equals, in an order that is random
        cells[start:stop] = sampled.reshape(stop - start, -1, len(shape))[np.arange(stop - start), best]
        np.add.at(counts, lines[np.arange(stop - start), best], 1)
    return cells


def _order(axis: int, n_axes: int) -> tuple[int, ...]:
    """Return the other axes in the order in which the table counts lines along `axis`: slowest first."""
    return (*range(axis - 1, -1, -1), *range(n_axes - 1, axis, -1))


def _cells_at(indices: Ints, shape: Shape) -> Cells:
    cells = np.empty((len(indices), len(shape)), dtype=np.int32)
    for axis, m in enumerate(shape):
        indices, cells[:, axis] = np.divmod(indices, m)
    return cells


def _different(rng: Random, n: int, size: tuple[int, int]) -> Ints:
    """Return rows of different numbers below `n` in random order: all n of them if those are fewer."""
    rows, columns = size
    if n <= 4 * columns:
        return np.argsort(rng.uniform(size=(rows, n)), axis=1)[:, :columns]
    drawn = _below(n, rng, size)
    while len(again := np.flatnonzero((np.diff(np.sort(drawn, axis=1), axis=1) == 0).any(axis=1))):
        drawn[again] = _below(n, rng, (len(again), columns))
    return drawn


def _below(n: int, rng: Random, size: int | tuple[int, int]) -> Ints:
    """Return numbers 0 to n - 1, drawn in a way that both kinds of generators know."""
    return (rng.uniform(size=size) * n).astype(np.int64)
