"""The mass rule for all groups of a round at once: `mpd.mass` on arrays, for simulations of up to a million peers.

The functions are those of `mpd.mass`, in the same order, and the tests compare every number with what those return.
Only the id of a round differs: a group is known by a number that no other group of the simulation has.
"""

from dataclasses import dataclass

import numpy as np

from mpd.grid import MAX_PEERS, Shape, axis_of
from mpd.grid_arrays import Cells, next_cells
from mpd.layout import MAX_WEIGHT
from mpd.mass import MAX_MASS
from mpd.meetings import Bools, Floats, Groups, Ints

NOWHERE = -1  # as an origin: before the first round of a cycle


@dataclass
class Standings:
    """What every peer brings into a round, as `mpd.mass.Standing`: arrays of (n,), `cells` of (n, d)."""

    mass: Floats
    heads: Floats
    origin: Ints
    seen: Ints
    full: Bools
    cells: Cells

    def enter(self, peers: Ints, weights: Floats) -> None:
        """Let these peers (m,) begin a cycle with their trainers' weights (m,), wherever they are."""
        self.mass[peers] = np.minimum(weights, MAX_WEIGHT)
        self.heads[peers] = 1.0
        self.origin[peers] = NOWHERE
        self.seen[peers] = -1
        self.full[peers] = False


def newcomers(weights: Floats, cells: Cells) -> Standings:
    """Return the standings of peers that have taken part in nothing yet."""
    n = len(weights)
    none = np.zeros(n)
    standings = Standings(none, none.copy(), np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, bool), cells)
    standings.enter(np.arange(n), weights)
    return standings


@dataclass(frozen=True)
class SharesOfGroups:
    """What the members of round `number` weigh, as `mpd.mass.Shares`: by member (m,), and `whole` by group."""

    number: int
    shape: Shape
    weights: Floats
    heads: Floats
    whole: Bools


def shares(standings: Standings, groups: Groups, number: int, shape: Shape, exact: bool) -> SharesOfGroups:
    """Return what the members of the groups of round `number` weigh. Each group must be one line of the grid."""
    axis = axis_of(number, shape)
    who = groups.members
    if axis == 0 or not exact:
        whole = np.full(groups.n_groups, exact or len(shape) == 1)
        return SharesOfGroups(number, shape, standings.mass[who], np.ones(len(who)), whole)
    stands = standings.seen[who] == number - 1
    mates = _Mates(standings.origin[who], groups, stands)
    part = np.where(stands, 1 / mates.counts, 0.0)
    return SharesOfGroups(
        number,
        shape,
        weights=standings.mass[who] * part,
        heads=standings.heads[who] * part,
        whole=_are_whole(standings, groups, stands, mates, axis, shape[axis]),
    )


class _Mates:
    """The standing members of each group that come from the same round; the others count as one of themselves."""

    def __init__(self, origins: Ints, groups: Groups, stands: Bools) -> None:
        self.first = int(origins.min(initial=NOWHERE))
        self.width = int(origins.max(initial=NOWHERE)) - self.first + 1
        keys = groups.group_of_member * self.width + origins - self.first
        distinct, inverse, n_mates = np.unique(keys[stands], return_inverse=True, return_counts=True)
        self.counts = np.ones(len(origins), dtype=np.int64)
        self.counts[stands] = n_mates[inverse]
        self.index = inverse  # of the standing members' claims among all claims of all groups
        self.n_origins = np.bincount(distinct // self.width, minlength=groups.n_groups)


def _are_whole(standings: Standings, groups: Groups, stands: Bools, mates: _Mates, axis: int, m: int) -> Bools:
    """True for groups in which each of the `m` cells is there, with one origin that no other cell has, and is full."""
    who, group_of = groups.members[stands], groups.group_of_member[stands]
    coordinates = standings.cells[who, axis]
    n_cells = np.bincount(np.unique(group_of * m + coordinates) // m, minlength=groups.n_groups)
    pairs = np.unique(mates.index * m + coordinates)  # a claim belongs to one group already
    group_of_claim = np.zeros(int(mates.index.max(initial=-1)) + 1, dtype=np.int64)
    group_of_claim[mates.index] = group_of
    n_pairs = np.bincount(group_of_claim[pairs // m], minlength=groups.n_groups)
    all_full = np.bincount(group_of[~standings.full[who]], minlength=groups.n_groups) == 0
    return np.asarray(all_full & (n_cells == m) & (mates.n_origins == m) & (n_pairs == m))


def after(
    standings: Standings, groups: Groups, weighed: SharesOfGroups, contributed: Bools, completed: Bools, first_id: int,
    record_n: int,
) -> None:  # fmt: skip
    """Give every member (m,) that `completed` the round its new standing.

    Args:
        contributed: (m,), whether a member's piece is in every chunk of its group's result.
        first_id: the origin of group 0; group g has `first_id + g`.
    """
    number, shape = weighed.number, weighed.shape
    axis = axis_of(number, shape)
    who, group_of = groups.members, groups.group_of_member
    counted = contributed | (weighed.weights == 0)
    cells = next_cells(standings.cells[who], number, groups.places, record_n, shape)
    used = np.zeros((groups.n_groups, shape[axis]), dtype=bool)
    used[group_of[counted], cells[counted, axis]] = True
    n_cells = used.sum(axis=1)
    masses = np.minimum(groups.sums(np.where(counted, weighed.weights, 0.0)) / np.maximum(1, n_cells), MAX_MASS)
    heads = np.minimum(groups.sums(np.where(counted, weighed.heads, 0.0)) / np.maximum(1, n_cells), MAX_PEERS)
    full = weighed.whole & groups.all(counted) & (n_cells == shape[axis])
    ends, of = who[completed], group_of[completed]
    standings.mass[ends] = masses[of]
    standings.heads[ends] = heads[of]
    standings.origin[ends] = first_id + of
    standings.seen[ends] = number
    standings.full[ends] = full[of]
    standings.cells[ends] = cells[completed]


def certificates(groups: Groups, weighed: SharesOfGroups, contributed: Bools) -> tuple[Bools, Ints]:
    """Return (exact, heads) of each group, (n_groups,) each: see `mpd.mass.certificate`."""
    axis = axis_of(weighed.number, weighed.shape)
    counted = contributed | (weighed.weights == 0)
    n_lines = np.prod(weighed.shape) // weighed.shape[axis]
    exact = weighed.whole & groups.all(counted) & (axis == len(weighed.shape) - 1)
    return exact, np.rint(groups.sums(np.where(counted, weighed.heads, 0.0)) * n_lines).astype(np.int64)
