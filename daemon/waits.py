"""For how many peers a line waits, and how long: what a lobby tells its matchmaker.

A line knows its mates once it has met; until then the grid says how many there should be. Neither is certain while a
run grows or shrinks. So there are three times to wait: for peers that are here and not ready, the window; for those who
are known or counted upon and not here, shorter; and for newcomers nobody knows of, shorter still.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

from mpd.deadlines import Pace
from mpd.grid import MAX_ROSTER, Cell, ShapeRecord, axis_of, line_of, table
from mpd.ids import PeerId
from mpd.layout import Terms
from mpd.matchmaking import MatchLimits
from mpd.messages import MAX_COLLECTED, Begin

from .roster import Roster
from .shaping import Shaping

MAX_LATE_S = 5.0  # by how much peers may be later because they had to wait in the rounds before
RESYNC_S = 0.4  # how long a line waits for newcomers in a swarm that has come apart


class Waits:
    """The waits of one run at this peer."""

    def __init__(self, terms: Terms, pace: Pace, roster: Roster, shaping: Shaping) -> None:
        self._terms = terms
        self._pace = pace
        self._roster = roster
        self._shaping = shaping
        self._uneven_until = -1  # the round until which lines may be larger than the grid expects

    @property
    def is_apart(self) -> bool:
        """Whether the swarm has come apart: its lines are of any size, and parts of it go round after each other."""
        return self._terms.rounds == "exact" and not self._shaping.is_settled

    def expected(self, record: ShapeRecord, number: int, cell: Cell) -> tuple[int, int]:
        """Return how many peers the line of `cell` should have in round `number`, at least and at most.

        While a run grows or shrinks that is not what its grid was made for.
        """
        if len(record.shape) == 1:
            return 0, 0  # nobody leaves it, so all are known
        n_peers = len(self._roster.others) + 1  # if all of them can be seen
        n_peers = max(record.n_peers, n_peers) if n_peers > MAX_ROSTER else n_peers
        expected = math.ceil(_of_table(record, number, cell) * n_peers / record.n_peers)
        if not self._shaping.counted:
            return expected, expected
        n_lines = math.prod(record.shape) // record.shape[axis_of(number, record.shape)]
        most = expected + 1 if number <= self._uneven_until else expected
        return min(expected, max(self._shaping.counted, n_peers) // n_lines), most

    def line(self, record: ShapeRecord, number: int, cell: Cell, n_known: int) -> tuple[int, int]:
        """Return how many peers a leader waits for, at least and at most, where `n_known` are known to the line.

        Where fewer are known than the grid expects, one who has moved may be on its way.
        """
        if self.is_apart:
            return n_known, MAX_COLLECTED
        return n_known, max(n_known, self.expected(record, number, cell)[1])

    def note_size(self, record: ShapeRecord, begin: Begin, cell: Cell) -> None:
        """Watch for lines that are larger than the grid expects.

        Whoever has come back in another cell moves one member from line to line, until two such moves cancel each
        other. Until we have seen none for a cycle, any line may have one more.
        """
        if len(begin.members) + len(begin.left_out) > _of_table(record, begin.number, cell):
            self._uneven_until = begin.number + len(record.shape)

    def first_limits(self) -> MatchLimits:
        """Return how long to wait for what as long as our trainer has not asked."""
        window = self._pace.window
        return MatchLimits(window_s=window.first_s, alone_s=window.first_s, leader_s=window.cap_s + MAX_LATE_S)

    def limits(self, number: int, d: int, company: Iterable[PeerId]) -> MatchLimits:
        """Return how long to wait for what in round `number`, on a grid of `d` axes, when our trainer asks."""
        limits, phase = replace(self.first_limits(), window_s=self._pace.window_s(company)), number % d
        if self._terms.rounds != "exact" or d == 1:
            return limits
        if not self.is_apart:
            # Whoever had to wait for somebody in the rounds of this cycle before is later by as much.
            late_s = min(phase * limits.settle_s, MAX_LATE_S)
            return replace(
                limits,
                window_s=limits.window_s + late_s,
                settle_s=limits.settle_s + late_s,
                quick_s=limits.quick_s * (1 + phase),
            )
        # If all lines take the same time, whatever their size, and somewhat more where cycles begin, the parts catch
        # each other. For whom a line knows to be on its way it waits for twice as long.
        late_s, quick_s = min(phase * limits.settle_s, MAX_LATE_S), RESYNC_S * (1 if phase else d - 1)
        return replace(
            limits,
            window_s=limits.window_s + late_s + quick_s,
            alone_s=2 * quick_s,
            settle_s=2 * RESYNC_S,
            quick_s=quick_s,
        )


def _of_table(record: ShapeRecord, number: int, cell: Cell) -> int:
    axis = axis_of(number, record.shape)
    return table(record.n_peers, record.shape).expected(axis, line_of(cell, axis))
