"""How long averaging takes: an event model of many peers, each with a clock of its own.

Rounds are given as groups; who meets whom is the business of mpd/grid.py and of the policies on it. A group begins
when its members are there, or when its window ends without those who are late; mpd/pricing.py says how long it lasts;
each member then goes on from its own end. So groups do not wait for each other, except through the peers that move from
one to the next, and no barrier is ever put up. A round is a handful of array operations, however large the swarm is.
"""

from dataclasses import dataclass

import numpy as np

from mpd.costs import Costs
from mpd.deadlines import WINDOW
from mpd.pricing import NOBODY, Bools, Floats, Ints, Peers, Work, price
from mpd.roll import MatchLimits

ABSENT = -1  # in place of the number of a group


@dataclass(frozen=True)
class Round:
    """One round of a swarm, arrays of shape (N,).

    `size` is that of each peer's group, 0 for who took no part; `ready`, `begun` and `ended` are seconds since the
    start; `sent` is in bytes, and as many are received; `limit` is an index into `mpd.pricing.LIMITS`, -1 for who took
    no part.
    """

    size: Ints
    ready: Floats
    begun: Floats
    ended: Floats
    sent: Floats
    limit: Ints

    @property
    def took_part(self) -> Bools:
        """Who was in a group."""
        return np.asarray(self.size > 0)


class Timeline:
    """The clocks of `peers` while they average.

    Args:
        work: what a round averages.
        costs: what a round costs beside its bytes.
        train_s: seconds that each peer trains before a round, a number or shape (N,).

    `ready` (N,) holds when each peer has its last result, in seconds since the start.
    """

    def __init__(self, peers: Peers, work: Work, costs: Costs, train_s: Floats | float = 0.0) -> None:
        self.ready: Floats = np.zeros(len(peers))
        self._peers, self._work, self._costs, self._train_s = peers, work, costs, train_s
        self._settle_s = MatchLimits().settle_s

    def play(self, groups: Ints, lost_at: Floats | None = None) -> Round:
        """Play one round.

        Args:
            groups: (N,), the number of each peer's group; `ABSENT` for who sits this round out.
            lost_at: (N,), the part of the round after which a peer's machine vanishes, inf for those that stay.

        Who was absent or came too late goes on with the others, when half of them have their result. A peer that finds
        no company waits for it one window.
        """
        places = places_of(groups)
        ready = self.ready + self._train_s
        size, begun, ended, sent = np.zeros(len(ready), np.int64), ready.copy(), ready.copy(), np.zeros(len(ready))
        limit = np.full(len(ready), -1, np.int64)
        if len(places):
            places, starts, alone = self._begin(places, ready)
            paid = price(self._peers, self._work, self._costs, places, None if lost_at is None else lost_at[places])
            here = places != NOBODY
            who, n = places[here], here.sum(axis=1)
            row = np.nonzero(here)[0]
            size[who], begun[who], sent[who], limit[who] = n[row], starts[row], paid.sent[here], paid.limit[row]
            ended[who] = starts[row] + paid.seconds[here]
            ended[alone] = ready[alone] + WINDOW.first_s
        was_out = size == 0
        if was_out.any() and not was_out.all():
            ended[was_out] = np.maximum(ended[was_out], np.median(ended[~was_out]))
        self.ready = ended
        return Round(size, ready, begun, ended, sent, limit)

    def _begin(self, places: Ints, ready: Floats) -> tuple[Ints, Floats, Ints]:
        """Return the groups that begin, when each does, and who found no company."""
        here = places != NOBODY
        at = np.where(here, ready[places], np.inf)
        first = at.min(axis=1)
        # On a single line they have learnt how late each other comes; of strangers nobody has.
        window_s = WINDOW.first_s if self._work.is_grid else WINDOW.cap_s
        is_late = here & (at > first[:, None] + window_s)
        last = np.where(here & ~is_late, at, -np.inf).max(axis=1)
        starts = np.where(is_late.any(axis=1), first + window_s, last)
        if self._work.is_grid:  # a line that is shorter than the grid says waits a moment for newcomers
            is_short = here.sum(axis=1) < self._full(here)
            starts = np.where(is_short, np.maximum(starts, first + self._settle_s), starts)
        places = np.where(is_late, NOBODY, places)
        n = (places != NOBODY).sum(axis=1)
        alone = places[n == 1]
        return places[n > 1], starts[n > 1], alone[alone != NOBODY]

    def _full(self, here: Bools) -> int:
        """Return how many members a line of this round has at least if nobody is absent."""
        return len(self._peers) // len(here)


def places_of(groups: Ints) -> Ints:
    """Return the members of each group by place, (groups, places), filled up with `NOBODY`."""
    present = np.nonzero(groups >= 0)[0]
    if not len(present):
        return np.zeros((0, 0), np.int64)
    order = present[np.argsort(groups[present], kind="stable")]
    _, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    places = np.full((len(sizes), int(sizes.max())), NOBODY, np.int64)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    places[rows, np.arange(len(order)) - np.repeat(starts, sizes)] = order
    return places
