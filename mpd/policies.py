"""How a simulated swarm averages: the interface of all policies, and those that average in groups.

A `Policy` is asked twice a round. `meet` says who meets whom among those that are present; `mix` lets them average.
Between the two, a caller may look at the meeting: to price it, or to decide who will be lost in the middle of it. A
policy keeps what peers remember between rounds (cells, masses, weights of messages) and nothing about failures.

`moshpit` is what the daemon does. The others are what it is compared with, as the paper's own simulation has them where
it has them (Ryabinin et al., NeurIPS 2021, averaging_experiments of its repository).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from mpd.grid import Shape, axis_of
from mpd.grid_arrays import Cells, emptiest_cells, lines_of, n_lines, rank_cells, seated
from mpd.mass_arrays import SharesOfGroups, after, certificates, newcomers, shares
from mpd.meetings import Bools, Floats, Groups, Ints, Meeting, Random, groups_by_label
from mpd.mixing import exchange


@dataclass(frozen=True)
class Mixed:
    """How a round ended, by peer (n,).

    `completed`: it holds the result of its round. `exact`: it was certified that this is the exact weighted mean of all
    peers that took part in the first round of the cycle, and `heads` is their number; both only where a policy knows.
    """

    completed: Bools
    exact: Bools
    heads: Ints


class Policy(ABC):
    """One way to average, with what the peers of one swarm remember of it."""

    n_peers: int

    @abstractmethod
    def meet(self, present: Bools, rng: Random) -> Meeting:
        """Return who meets whom in the next round, of the peers that are `present` (n,)."""

    @abstractmethod
    def mix(self, values: Floats, meeting: Meeting, lost_at: Floats | None = None) -> Mixed:
        """Carry out the round of `meeting` on `values` (n, W), in place, and go on to the next one.

        `lost_at` (n,) is the part of the round, 0 to 1, that was over when a peer was lost, and infinite for those that
        stayed. Calls of `meet` and `mix` alternate.
        """

    @abstractmethod
    def replace(self, peers: Ints, rng: Random) -> None:
        """Let newcomers take the places of these `peers` (m,): they remember nothing. Called between rounds."""


class GroupPolicy(Policy):
    """A policy that averages in groups, with equal weights and without a memory."""

    def __init__(self, n_peers: int, group_size: int) -> None:
        self.n_peers = n_peers
        self.group_size = group_size
        self.number = 0
        """Number of the next round, from 0."""

    @abstractmethod
    def meet(self, present: Bools, rng: Random) -> Groups:
        """Return the groups of the next round; each peer that is `present` (n,) is in one."""

    def mix(self, values: Floats, meeting: Meeting, lost_at: Floats | None = None) -> Mixed:
        """Average in groups by the rules of the daemon's exchange: see `mpd.mixing`."""
        assert isinstance(meeting, Groups)
        exchanged = exchange(values, meeting, np.ones(len(meeting.members)), lost_at)
        self.number += 1
        return _uncertified(self.n_peers, meeting.members[exchanged.completed])

    def replace(self, peers: Ints, rng: Random) -> None:
        """There is nothing to forget."""


def _uncertified(n_peers: int, completed: Ints) -> Mixed:
    mixed = Mixed(np.zeros(n_peers, bool), np.zeros(n_peers, bool), np.zeros(n_peers, np.int64))
    mixed.completed[completed] = True
    return mixed


class Moshpit(Policy):
    """The daemon's policy: a fitted grid, moves by the table, exact cycles with the mass in the cells.

    With `exact` False every round stands for itself, with the trainers' weights: a run with `rounds=1`, Moshpit SGD.
    """

    def __init__(
        self, weights: Floats, shape: Shape, *, exact: bool = True, cells: Cells | None = None, record_n: int = 0
    ) -> None:
        self.n_peers = len(weights)
        self.weights = weights
        self.shape = shape
        self.exact = exact
        self.number = 0
        self.record_n = record_n or self.n_peers
        first = rank_cells(self.n_peers, shape) if cells is None else cells
        self.standings = newcomers(weights, first.copy())
        self._next_id = 0
        self._weighed: SharesOfGroups | None = None

    @property
    def axis(self) -> int:
        """The axis that the next round averages."""
        return axis_of(self.number, self.shape)

    def meet(self, present: Bools, rng: Random) -> Groups:
        """Return the lines of those present."""
        who, cells = np.flatnonzero(present), self.standings.cells
        groups = groups_by_label(who, lines_of(cells[who], self.axis, self.shape))
        return seated(groups, cells, self.number, self.record_n, self.shape)

    def mix(self, values: Floats, meeting: Meeting, lost_at: Floats | None = None) -> Mixed:
        """Average by mass, move everybody who completed the round, and certify what can be certified."""
        assert isinstance(meeting, Groups)
        if self.axis == 0:
            self.standings.enter(meeting.members, self.weights[meeting.members])
        elif not self.exact:
            self.standings.weigh(meeting.members, self.weights[meeting.members])
        weighed = shares(self.standings, meeting, self.number, self.shape, self.exact)
        exchanged = exchange(values, meeting, weighed.weights, lost_at)
        exact, heads = certificates(meeting, weighed, exchanged.contributed)
        after(
            self.standings, meeting, weighed, exchanged.contributed, exchanged.completed, self._next_id, self.record_n
        )
        self._next_id += meeting.n_groups
        self.number += 1
        mixed = _uncertified(self.n_peers, ends := meeting.members[exchanged.completed])
        of = meeting.group_of_member[exchanged.completed]
        if self.exact or len(self.shape) == 1:  # otherwise heads have moved, but no mass with them
            mixed.exact[ends] = exact[of]
        mixed.heads[ends] = heads[of]
        return mixed

    def replace(self, peers: Ints, rng: Random) -> None:
        """Newcomers take the emptiest of four cells, one after the other."""
        if not len(peers):
            return
        stayed = np.ones(self.n_peers, dtype=bool)
        stayed[peers] = False
        lines = lines_of(self.standings.cells[stayed], self.axis, self.shape)
        counts = np.bincount(lines, minlength=n_lines(self.axis, self.shape))
        self.standings.cells[peers] = emptiest_cells(rng, len(peers), self.shape, counts, self.axis)
        self.standings.enter(peers, self.weights[peers])


class PaperGrid(GroupPolicy):
    """The paper's simulation: a cell of its own for each peer, at random; round t averages along axis t mod d.

    Rounds count from 1 there, so the second axis comes first. Nobody moves: who sits alone in a line stays alone there.
    """

    def __init__(self, n_peers: int, shape: Shape, rng: Random) -> None:
        super().__init__(n_peers, max(shape))
        self.shape = shape
        n_cells = int(np.prod(shape))
        self.cells = np.stack(np.unravel_index(rng.permutation(n_cells)[:n_peers], shape), axis=1).astype(np.int32)

    def meet(self, present: Bools, rng: Random) -> Groups:
        """Return the lines of those present."""
        who = np.flatnonzero(present)
        return groups_by_label(who, lines_of(self.cells[who], (self.number + 1) % len(self.shape), self.shape))


class RandomGroups(GroupPolicy):
    """Groups of `group_size`, drawn anew each round from those present; what is left over joins them, one by one."""

    def meet(self, present: Bools, rng: Random) -> Groups:
        """Return floor(present / group_size) groups, but one at least."""
        who = np.flatnonzero(present)
        rng.shuffle(who)
        n_groups = max(1, len(who) // self.group_size)
        labels = np.arange(len(who)) // self.group_size
        left_over = np.arange(n_groups * self.group_size, len(who))
        labels[left_over] = left_over % n_groups
        return groups_by_label(who, labels)


class Pairs(RandomGroups):
    """Random pairs, as AD-PSGD averages; with an odd number present, one of them is three."""

    def __init__(self, n_peers: int) -> None:
        super().__init__(n_peers, 2)


class AllReduce(GroupPolicy):
    """Everybody in one group, all or nothing: if anyone is absent or lost, nobody moves."""

    def __init__(self, n_peers: int) -> None:
        super().__init__(n_peers, n_peers)

    def meet(self, present: Bools, rng: Random) -> Groups:
        """Return the group of all, which forms only if all are present."""
        who = np.flatnonzero(present)
        return groups_by_label(who, np.zeros(len(who), dtype=np.int64))

    def mix(self, values: Floats, meeting: Meeting, lost_at: Floats | None = None) -> Mixed:
        """Average if everybody was there from beginning to end."""
        assert isinstance(meeting, Groups)
        if len(meeting.members) == self.n_peers and (lost_at is None or np.isinf(lost_at).all()):
            return super().mix(values, meeting)
        self.number += 1
        return _uncertified(self.n_peers, np.zeros(0, np.int64))
