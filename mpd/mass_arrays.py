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
    parts: Ints
    cells: Cells

    def enter(self, peers: Ints, weights: Floats) -> None:
        """Let these peers (m,) begin a cycle with their trainers' weights (m,), wherever they are."""
        self.mass[peers] = np.minimum(weights, MAX_WEIGHT)
        self.heads[peers] = 1.0
        self.origin[peers] = NOWHERE
        self.seen[peers] = -1
        self.full[peers] = False
        self.parts[peers] = 1

    def weigh(self, peers: Ints, weights: Floats) -> None:
        """Let these peers (m,) bring their trainers' weights (m,), as in a run where no mass moves."""
        self.mass[peers] = np.minimum(weights, MAX_WEIGHT)


def newcomers(weights: Floats, cells: Cells) -> Standings:
    """Return the standings of peers that have taken part in nothing yet."""
    n = len(weights)
    (mass, heads), (origin, seen, parts) = np.zeros((2, n)), np.zeros((3, n), dtype=np.int64)
    standings = Standings(mass, heads, origin, seen, np.zeros(n, dtype=bool), parts, cells)
    standings.enter(np.arange(n), weights)
    return standings


@dataclass(frozen=True)
class SharesOfGroups:
    """What the members of round `number` weigh, as `mpd.mass.Shares`: by member (m,), and `whole` by group.

    Lines are never cut: `parts` of a group is 1.
    """

    number: int
    shape: Shape
    weights: Floats
    heads: Floats
    whole: Bools


def shares(standings: Standings, groups: Groups, number: int, shape: Shape, exact: bool) -> SharesOfGroups:
    """Return what the members of the groups of round `number` weigh. Each group must be one line of the grid."""
    axis = axis_of(number, shape)
    who = groups.members
    if axis == 0:
        return SharesOfGroups(
            number, shape, standings.mass[who], np.ones(len(who)), whole=np.ones(groups.n_groups, dtype=bool)
        )
    stands = standings.seen[who] == number - 1
    mates = _Mates(standings.origin[who], groups, stands)
    part = np.where(stands, 1 / mates.counts, 0.0)
    return SharesOfGroups(
        number,
        shape,
        weights=standings.mass[who] * part if exact else standings.mass[who],
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
    """True for groups in which each of the `m` cells is there with all its origins, no other cell's, and is full."""
    who, group_of = groups.members[stands], groups.group_of_member[stands]
    coordinates = standings.cells[who, axis]
    cells = group_of * m + coordinates
    one_of_pair = np.unique(mates.index * m + coordinates, return_index=True)[1]  # a claim is of one group only
    n_origins = np.bincount(cells[one_of_pair], minlength=groups.n_groups * m)
    n_cells = (n_origins.reshape(-1, m) > 0).sum(axis=1)
    n_pairs = np.bincount(group_of[one_of_pair], minlength=groups.n_groups)
    is_good = standings.full[who] & (standings.parts[who] == n_origins[cells])
    all_good = np.bincount(group_of[~is_good], minlength=groups.n_groups) == 0
    return np.asarray(all_good & (n_cells == m) & (n_pairs == mates.n_origins))


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
    standings.parts[ends] = 1
    standings.cells[ends] = cells[completed]


def certificates(groups: Groups, weighed: SharesOfGroups, contributed: Bools) -> tuple[Bools, Ints]:
    """Return (exact, heads) of each group, (n_groups,) each: see `mpd.mass.certificate`."""
    axis = axis_of(weighed.number, weighed.shape)
    counted = contributed | (weighed.weights == 0)
    n_lines = np.prod(weighed.shape) // weighed.shape[axis]
    exact = weighed.whole & groups.all(counted) & (axis == len(weighed.shape) - 1)
    return exact, np.rint(groups.sums(np.where(counted, weighed.heads, 0.0)) * n_lines).astype(np.int64)
