"""When a run should get another grid: what each cycle has counted goes in, and at most one new shape record comes out.

A grid is exact as long as every line has a member for each of its cells, and cheap as long as no group is much larger
than asked for. Both bear a good deal of coming and going, and a change of shape costs a cycle or two. So a grid stays
while it fits roughly: it is left when three cycles in a row there were too few peers to fill it, or too many in one
line; and, without hurry, when twenty cycles in a row a grid with fewer rounds per cycle would do.

How many peers there are, the cycles count themselves (mpd/mass.py): a certified count is exact. Where a cycle was not
certified, the size of its lines tells roughly. The median of the last five bears what is wrong with one or two.

The peer that writes is the one with the smallest id among those who have finished a cycle in the current grid, so that
no newcomer writes of what it does not know; if it does not, the others follow one after the other, each three cycles
later. A record follows from the one before and from the count, so two that write at once mostly write the same.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from mpd.grid import MAX_ROSTER, Shape, ShapeRecord, fit, roster_of

COUNTS = 5  # of so many cycles the median is taken
HURRY_CYCLES = 3
EASE_CYCLES = 20
HOLD_S = 3.0  # however fast cycles are, links and DHT need that long to show what they show
CROWD = 1.25
FULL = 1.05  # peers per cell that a grid needs
HEADROOM = 1.1  # peers more than there are that a grid with fewer axes must hold
EPOCH_LEAP = 1024  # how far one record may be ahead of the next older one that is known
MAX_EPOCH = 2**62
N_LEAP = 4  # how many times as many peers as are announced a record may speak of
N_FREE = 256  # or this many, if that is more: so small a grid is soon replaced


@dataclass(frozen=True, slots=True)
class CycleCount:
    """What one peer saw of one cycle.

    `heads`: how many peers the swarm has, exact if `is_certified`, otherwise estimated; `largest`: how many peers the
    largest line had in which it stood.
    """

    heads: int
    is_certified: bool
    largest: int


class _Streak:
    """How many cycles in a row, and since when, something has been so."""

    def __init__(self) -> None:
        self.n, self.since = 0, 0.0

    def note(self, now: float, holds: bool) -> None:
        if not holds:
            self.n = 0
            return
        if not self.n:
            self.since = now
        self.n += 1

    def lasted(self, now: float, n_cycles: int, seconds: float) -> bool:
        return self.n >= n_cycles and now - self.since >= seconds


class Elastic:
    """One peer's judgement of the grid that its run goes by. Times are seconds on any monotonic clock."""

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size
        self._record: ShapeRecord | None = None
        self._counts: deque[CycleCount] = deque(maxlen=COUNTS)
        self._misfit, self._roomy = _Streak(), _Streak()

    def adopt(self, record: ShapeRecord) -> None:
        """The run goes by another record from now on; what was counted speaks of the one before."""
        self._record = record
        self._counts.clear()
        self._misfit, self._roomy = _Streak(), _Streak()

    def note(self, now: float, count: CycleCount) -> None:
        """A cycle has ended."""
        if self._record is None:
            return
        self._counts.append(count)
        self._misfit.note(now, bool(self._objection()))
        self._roomy.note(now, self._is_roomy())

    @property
    def n_peers(self) -> int:
        """How many peers the run has: the median of the last certified counts, or else of the last ones; 0: unknown."""
        counts = [count.heads for count in self._counts if count.is_certified == self.is_certified]
        return statistics.median_low(counts or [0])

    @property
    def is_certified(self) -> bool:
        """Whether `n_peers` is exact, or was so a cycle or two ago: what was certified before that may be over."""
        return any(count.is_certified for count in list(self._counts)[-HURRY_CYCLES:])

    @property
    def has_finished_a_cycle(self) -> bool:
        """Whether this peer has come to the end of a cycle in the record that it goes by."""
        return bool(self._counts)

    @property
    def is_restless(self) -> bool:
        """Whether the last cycle spoke against the grid."""
        return self._misfit.n > 0 or self._roomy.n >= EASE_CYCLES - HURRY_CYCLES

    def wants_another(self, now: float, n_before: int = 0) -> bool:
        """Whether it is time to write another record, if `n_before` peers should have done so before us."""
        later = HURRY_CYCLES * n_before
        return self._misfit.lasted(now, HURRY_CYCLES + later, HOLD_S * (1 + n_before)) or self._roomy.lasted(
            now, EASE_CYCLES + later, HOLD_S * (1 + n_before)
        )

    def successor(self, peers: list[bytes]) -> ShapeRecord:
        """Return the record that should come next; `peers`, all that are known, say who begins where."""
        record = self._record
        assert record is not None, "there is something to replace"
        n_peers = max(1, self.n_peers)
        return ShapeRecord(record.epoch + 1, n_peers, self._fitted(n_peers), record.digest, roster_of(peers))

    def says(self) -> str:
        """Return what the counts say about the grid, in one sentence for people."""
        record, n_peers = self._record, self.n_peers
        if record is None:
            return "the run has no shape yet"
        if not self._counts:
            return "no cycle has ended in this shape yet"
        about = "" if self.is_certified else "about "
        if self._misfit.n:
            progress = f"{self._misfit.n} of {HURRY_CYCLES} cycles in a row that ask for another shape"
            return f"{self._objection()}: {progress}"
        if self._roomy.n:
            progress = f"{self._roomy.n} of {EASE_CYCLES} cycles in a row"
            return f"{about}{n_peers} peers would do with fewer rounds per cycle: {progress}"
        n_spare = n_peers - _fewest(record.shape)
        if n_spare < 0 or math.prod(record.shape) == 1:
            return f"the shape fits {about}{n_peers} peers"
        return f"the shape fits {about}{n_peers} peers; with {n_spare + 1} fewer it would not"

    def _objection(self) -> str:
        """Return why the grid should be another one, or an empty string."""
        assert self._record is not None
        shape, n_peers, largest = self._record.shape, self.n_peers, self._counts[-1].largest
        if not n_peers or self._fitted(n_peers) == shape:
            return ""
        if n_peers < _fewest(shape):
            return f"{n_peers} peers are too few for {math.prod(shape)} cells"
        if largest > max_line(self._group_size):
            return f"a line of {largest} peers is too long for groups of {self._group_size}"
        return ""

    def _is_roomy(self) -> bool:
        assert self._record is not None
        n_rounds = len(self._fitted(math.ceil(HEADROOM * self.n_peers))) if self.n_peers else math.inf
        return n_rounds < len(self._record.shape)

    def _fitted(self, n_peers: int) -> Shape:
        return fit(n_peers, self._group_size)


def max_line(group_size: int) -> float:
    """Return how many members a line may have before it is too long."""
    return CROWD * group_size + 2


def _fewest(shape: Shape) -> int:
    """Return how many peers a grid must have; a single cell needs nobody in particular."""
    n_cells = math.prod(shape)
    return math.ceil(FULL * n_cells) if n_cells > 1 else 0


def believable(records: Iterable[ShapeRecord], group_size: int, n_known: int) -> list[ShapeRecord]:
    """Return which `records` of a run may be followed, oldest first; any member may have published them.

    Each must have the grid that everybody fits to its number of peers. That number must not be far beyond the `n_known`
    peers that are announced, unless those are more than can be seen; and epochs lead on in steps, so that no single
    record uses them up.
    """
    most = math.inf if n_known > MAX_ROSTER else max(N_FREE, N_LEAP * n_known)
    believed: list[ShapeRecord] = []
    for record in sorted(records, key=lambda record: record.epoch):
        if believed and record.epoch > believed[-1].epoch + EPOCH_LEAP:
            break
        if record.n_peers <= most and record.epoch < MAX_EPOCH and record.shape == fit(record.n_peers, group_size):
            believed.append(record)
    return believed
