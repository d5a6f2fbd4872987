"""How long to wait, and for whom: limits learnt from what was measured, each with a floor and a cap.

Nobody should guess timeouts. A limit begins at a value that suits most links, and follows the measurements as soon as
there are `MIN_SAMPLES` of them. It is a multiple of their median, or of their upper decile if the spread is wide: so a
single odd measurement moves nothing, and a longer one never makes a limit shorter. Limits that hold for several peers
follow the median peer, so that no minority, slow or lying, decides how long everybody waits for the dead.

What is in here (all pure: time comes in as an argument; seconds on any monotonic clock, bytes per second):

* `Bounds`, and the three of them that are used: `PROGRESS`, `WINDOW`. `Bounds.limit(gauge)` is the rule above.
* `Gauge`: a bounded history of one quantity.
* `Pace`: what one peer has learnt in one run. Feed it `note_round(now, rounds)` with a `SenderReport` per member after
  each round and `note_arrivals(lateness)` after each matchmaking; ask it for `progress_s(peers)`,
  `accept_progress_s(proposed, peers)`, `patience(peers)`, `window_s(peers)`, `upload(now, peer)` and `download(now)`.
* `is_left_behind(...)`: whether a member that delivers, but slowly, is waited for no longer within the round.

Progress limits are the idea of phi accrual and of TCP's retransmission timer (RFC 6298), with quantiles in the place
of mean and variance because the outliers here are other peers' faults.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mpd.ids import PeerId

HISTORY = 32  # measurements kept of each quantity
MIN_SAMPLES = 3  # so many make a limit
MAX_PEERS = 256  # remembered by a `Pace`; who was measured longest ago is forgotten first
FRESH_S = 120.0  # a bandwidth measured longer ago counts as unknown, so that a peer that was slow is tried again
MIN_MEASURED_BYTES = 1 << 20  # received in a round; less tells of latency, not of bandwidth
MAX_LEADER_FACTOR = 4.0  # times what our own links show: no leader makes us wait longer for the silent

PATIENCE_FACTOR = 2.0  # times what most members took
PATIENCE_SLACK = 0.5  # plus so many progress limits: how long a member is waited for without a look at its rate
HOPE = 2.0  # times that, unless its rate says that it will not be done by then


class Gauge:
    """The last `HISTORY` measurements of one quantity. What is no finite number from 0 on is no measurement."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=HISTORY)

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, sample: float) -> None:
        """Note a measurement."""
        if 0 <= sample < math.inf:
            self._samples.append(sample)

    def quantile(self, part: float) -> float:
        """Return the smallest sample that at least `part` of all do not exceed; 0 without samples."""
        ordered = sorted(self._samples)
        return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else 0.0

    @property
    def median(self) -> float:
        """The lower median; 0 without samples."""
        return self.quantile(0.5)


@dataclass(frozen=True, slots=True)
class Bounds:
    """A limit in seconds: `first_s` until enough was measured, then between `floor_s` and `cap_s`.

    In between it is `of_median` times the median, or `of_tail` times the upper decile, whichever is longer.
    """

    floor_s: float
    first_s: float
    cap_s: float
    of_median: float
    of_tail: float

    def starting_at(self, first_s: float) -> "Bounds":
        """Return the same bounds with another first value, widened to contain it."""
        floor_s, cap_s = min(self.floor_s, first_s), max(self.cap_s, first_s)
        return Bounds(floor_s, first_s, cap_s, self.of_median, self.of_tail)

    def limit(self, gauge: Gauge) -> float:
        """Return the limit that `gauge` suggests."""
        if len(gauge) < MIN_SAMPLES:
            return self.first_s
        return self.clamp(max(self.of_median * gauge.median, self.of_tail * gauge.quantile(0.9)))

    def clamp(self, seconds: float) -> float:
        """Return `seconds` within the bounds."""
        return min(max(seconds, self.floor_s), self.cap_s)


PROGRESS = Bounds(floor_s=0.5, first_s=2.0, cap_s=20.0, of_median=4.0, of_tail=2.0)
"""How long a member may deliver nothing while somebody waits for it. Measured: its longest pause in each round."""
WINDOW = Bounds(floor_s=1.0, first_s=5.0, cap_s=10.0, of_median=2.0, of_tail=1.5)
"""How long a leader that has company waits for announced peers. Measured: how long after us each became ready."""


@dataclass(frozen=True, slots=True)
class SenderReport:
    """How the pieces of one member came in during one round, as its receiver saw it.

    `n_done` of `n_owed` pieces of together `owed_bytes` had come after `seconds`; `pause_s` is the longest time between
    two of them, or before the first. `n_members` is the size of the group.
    """

    n_done: int
    n_owed: int
    owed_bytes: int
    seconds: float
    pause_s: float
    n_members: int

    @property
    def upload(self) -> float:
        """What the member sent to the whole group, in bytes per second, if it treated everybody alike.

        Half a piece more than has come: the next one was on its way.
        """
        part = min(self.n_done + 0.5, self.n_owed) / self.n_owed if self.n_owed else 0.0
        return part * self.owed_bytes * (self.n_members - 1) / self.seconds if self.seconds > 0 else 0.0


class _Rate:
    """Bandwidths and when they were measured."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=HISTORY)

    def add(self, now: float, bandwidth: float) -> None:
        if 0 < bandwidth < math.inf:
            self._samples.append((now, bandwidth))

    def at(self, now: float) -> float:
        """Return the median of what is fresh; 0 if that is too little."""
        fresh = sorted(bandwidth for at, bandwidth in self._samples if now - at <= FRESH_S)
        return fresh[len(fresh) // 2] if len(fresh) >= MIN_SAMPLES else 0.0


class _PeerPace:
    """What is known of one peer."""

    def __init__(self) -> None:
        self.pauses = Gauge()
        self.lateness = Gauge()
        self.upload = _Rate()


class Pace:
    """What one peer has learnt about those it meets in one run.

    Args:
        progress_s: the progress limit until something was measured; `PROGRESS` bounds it afterwards.
        window_s: likewise for the matchmaking window and `WINDOW`.

    Everything is measured here or bounded here: no peer's word moves a limit beyond the bounds.
    """

    def __init__(self, progress_s: float = PROGRESS.first_s, window_s: float = WINDOW.first_s) -> None:
        self.progress = PROGRESS.starting_at(progress_s)
        self.window = WINDOW.starting_at(window_s)
        self._peers: OrderedDict[PeerId, _PeerPace] = OrderedDict()
        self._download = _Rate()

    # ------------------------------------------------------------------------------------------------- what goes in

    def note_round(self, now: float, reports: Mapping[PeerId, SenderReport]) -> None:
        """A round has ended, successfully or not: how every member that owed us pieces delivered them."""
        for peer, report in reports.items():
            pace = self._meet(peer)
            if report.n_done:  # silence says nothing about how long a pause of a live member takes
                pace.pauses.add(report.pause_s)
        if sum(report.owed_bytes for report in reports.values()) >= MIN_MEASURED_BYTES:
            for peer, report in reports.items():
                self._meet(peer).upload.add(now, report.upload)
            uploads = sorted(report.upload for report in reports.values())
            self._download.add(now, uploads[len(uploads) // 2])  # what most senders got through to us

    def note_arrivals(self, lateness: Mapping[PeerId, float]) -> None:
        """How many seconds after us each peer became ready; 0 for those that were before us."""
        for peer, seconds in lateness.items():
            self._meet(peer).lateness.add(seconds)

    # ----------------------------------------------------------------------------------------------- what comes out

    def progress_s(self, peers: Iterable[PeerId]) -> float:
        """Return the progress limit for a group with these other members: that of the median member."""
        limits = sorted(self.progress.limit(pace.pauses) for pace in map(self._known, peers))
        return limits[len(limits) // 2] if limits else self.progress.first_s

    def patience(self, peers: Iterable[PeerId]) -> dict[PeerId, float]:
        """Return how long each of `peers` may give no sign of life at all before its link is ended."""
        return {peer: self.progress.limit(self._known(peer).pauses) for peer in peers}

    def accept_progress_s(self, proposed_s: float, peers: Iterable[PeerId]) -> float:
        """Return the progress limit to use where a leader proposes `proposed_s`.

        Never below what our own links need, and not above `MAX_LEADER_FACTOR` times that.
        """
        own_s = self.progress_s(peers)
        return self.progress.clamp(min(max(proposed_s, own_s), MAX_LEADER_FACTOR * own_s))

    def window_s(self, peers: Iterable[PeerId]) -> float:
        """Return how long to wait, from being ready on, until all of `peers` that will come in time have come.

        Whoever is usually later than the longest window is not waited for.
        """
        gauges = [pace.lateness for pace in map(self._known, peers)]
        awaited = [gauge for gauge in gauges if gauge.median <= self.window.cap_s]
        if not gauges:
            return self.window.first_s
        return max((self.window.limit(gauge) for gauge in awaited), default=self.window.floor_s)

    def upload(self, now: float, peer: PeerId) -> float:
        """Return how fast `peer` sends to its whole group, in bytes per second; 0 if that is not known."""
        return self._known(peer).upload.at(now)

    def download(self, now: float) -> float:
        """Return how fast we receive from a whole group, in bytes per second; 0 if that is not known."""
        return self._download.at(now)

    def peers(self) -> list[PeerId]:
        """Return all peers of which something is known."""
        return sorted(self._peers)

    def _known(self, peer: PeerId) -> _PeerPace:
        return self._peers.get(peer) or _PeerPace()

    def _meet(self, peer: PeerId) -> _PeerPace:
        pace = self._peers.setdefault(peer, _PeerPace())
        self._peers.move_to_end(peer)
        while len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)
        return pace


def patience_s(typical_s: float, progress_s: float) -> float:
    """Return how long a member may take whatever its rate, where most members took `typical_s`."""
    return PATIENCE_FACTOR * typical_s + PATIENCE_SLACK * progress_s


def is_left_behind(
    elapsed_s: float, n_done: int, last_s: float, n_owed: int, typical_s: float, progress_s: float
) -> bool:
    """Return True if a member that has delivered `n_done` of `n_owed` records is not waited for any longer.

    To be asked only where most members have delivered everything; the last of that majority took `typical_s`. A member
    gets `patience_s`, and `HOPE` times that unless its rate says that it will not be done by then. The rate is that of
    its records up to the last, which came after `last_s`: a member that stumbles is not mistaken for a slow one, and
    one that has delivered nothing is a matter of the progress limit.
    """
    patience = patience_s(typical_s, progress_s)
    if n_done >= n_owed or elapsed_s < patience:
        return False
    is_too_slow = n_done > 0 and last_s * n_owed / n_done > HOPE * patience
    return is_too_slow or elapsed_s >= HOPE * patience
