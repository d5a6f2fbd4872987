"""What one round costs the groups that meet in it: all groups at once, as arrays of shape (groups, places).

The bytes: member j with fraction w of the vector V sends V (1 - w) of pieces and V w (n - 1) of means, and receives as
many. On every connection pieces go first and means follow as their chunks close, so the two do not compete: a member is
done when the slower of its two directions is, and the group when its last necessary member is.

The rules are the daemon's own: shards come from mpd/schedule.py, the patience with slow members and the limits on
silence from mpd/deadlines.py; mpd/costs.py has what a round costs beside its bytes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpd.costs import (
    DIAL_HOPS,
    INITIAL_WINDOW_BYTES,
    LARGE_GROUP_HOPS,
    MAX_LINKS,
    NEW_SLOT_HOPS,
    REDO_HOPS,
    STEP_HOPS,
    WIRE_OVERHEAD,
    Costs,
    lookup_hops,
)
from mpd.deadlines import HOPE, PATIENCE_FACTOR, PATIENCE_SLACK, PROGRESS
from mpd.errors import LocalError
from mpd.schedule import chunk_bytes_for, tempered_fractions

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NOBODY = -1  # at a place that no member has
LIMITS = ("uplink", "downlink", "processor", "latency", "slow member", "lost member")
"""What takes the largest part of a group's round."""


@dataclass(frozen=True)
class Peers:
    """The machines of a swarm, arrays of shape (N,).

    `up` and `down` in bytes per second of its link; `rtt` in seconds, a peer's round trip to the others: between two
    peers it is the mean of theirs. `cores` is what a machine has, and each peer has one, or all share one (`one_host`).
    Raises LocalError on values that no machine has.
    """

    up: Floats
    down: Floats
    rtt: Floats
    cores: float = 4.0
    one_host: bool = False

    def __post_init__(self) -> None:
        if not len(self.up) == len(self.down) == len(self.rtt) >= 2:
            raise LocalError(f"{len(self.up)} peers: 2 or more expected, with up, down and rtt of each")
        if not ((self.up > 0).all() and (self.down > 0).all() and (self.rtt >= 0).all() and self.cores > 0):
            raise LocalError("bandwidths and cores above 0, and round trips from 0 on, expected")

    def __len__(self) -> int:
        return len(self.up)


@dataclass(frozen=True)
class Work:
    """What is averaged and how: `vector_bytes` a peer; with `is_grid`, groups change from round to round.

    With `is_known` the bandwidths have been measured, as in any swarm after its first rounds.
    """

    vector_bytes: int
    is_grid: bool = False
    is_known: bool = True

    def __post_init__(self) -> None:
        if self.vector_bytes < 1:
            raise LocalError(f"a vector of {self.vector_bytes} bytes: 1 or more expected")


@dataclass(frozen=True)
class Price:
    """What a round takes: `seconds` (groups, places) from its group's beginning to each member's result.

    `sent` (groups, places) in bytes, and as many are received; `limit` (groups,) is an index into `LIMITS`; `shares`
    (groups, places) are the fractions that members reduce.
    """

    seconds: Floats
    sent: Floats
    limit: Ints
    shares: Floats


def price(peers: Peers, work: Work, costs: Costs, places: Ints, lost_at: Floats | None = None) -> Price:
    """Return what one round of these groups takes.

    Args:
        places: (groups, places), the numbers of the members, filled up with `NOBODY`.
        lost_at: (groups, places), the part of the round, 0 to 1, after which a member's machine vanishes, inf for those
            that stay.

    On one host the groups of a round share its processors, as if they all began together.
    """
    is_there = places != NOBODY
    n = is_there.sum(axis=1)
    up, down = (np.where(is_there, each[places] / WIRE_OVERHEAD, np.inf) for each in (peers.up, peers.down))
    shares = _shares(peers, work, places, is_there)
    v, others = float(work.vector_bytes), (n - 1)[:, None]
    pieces = np.where(is_there, v * (1 - shares), 0.0)
    sent = np.where(is_there & (others > 0), pieces + v * shares * others, 0.0)
    chunk = _chunk_bytes(peers, work, places, is_there)
    records = 2 * others * np.ceil(v * shares / chunk[:, None])  # that a member's own shard makes, both ways

    processor, talk = _processor_s(peers, work, costs, n, sent, records)
    own = np.maximum(np.maximum(sent / up, sent / down), processor)
    piece_s = np.maximum(np.maximum(pieces / up, v * shares * others / down), np.where(shares > 0, processor / 2, 0.0))
    progress = _progress_s(chunk, n, up, is_there)

    kept, patience = _kept(piece_s, is_there, n, progress)
    slow_reducer = (own > HOPE * _patience(_middle(own, is_there, n), progress)[:, None]) & (shares > 0) & ~kept
    necessary = is_there & kept & ~slow_reducer
    done = np.where(necessary, own, 0.0).max(axis=1)
    done = np.where((is_there & ~kept).any(axis=1), np.maximum(done, patience), done)
    redo = (np.where(slow_reducer, shares, 0.0)).sum(axis=1)
    hop = _hop_s(peers, places, is_there)
    typical_up = _middle(np.minimum(up, down), is_there, n)
    redo_s = np.where(redo > 0, 2 * redo * v / typical_up + REDO_HOPS * hop, 0.0)
    lost_s = np.zeros(len(n))
    if lost_at is not None:
        is_lost = is_there & (lost_at <= 1)
        undone = np.where(is_lost, shares * (1 - np.minimum(lost_at, 1.0)), 0.0).sum(axis=1)
        # Silence has to be noticed; then the rest of its shard is reduced by others, pieces and means anew.
        lost_s = np.where(is_lost.any(axis=1), progress + 2 * undone * v / typical_up + REDO_HOPS * hop, 0.0)
    done = done + redo_s + lost_s
    receive_s = np.where(is_there, np.where(kept, 0.0, pieces / down), 0.0)
    held = np.where(is_there, np.maximum(done[:, None], receive_s), np.inf)
    latency = _latency_s(work, n, hop, len(peers), np.where(is_there, up, 0.0).max(axis=1), v)
    copies = v * costs.copy_s * (1.0 if not peers.one_host else 0.0)
    # Nobody succeeds before a quorum holds everything (mpd/rounds.py).
    quorum = np.take_along_axis(np.sort(held, axis=1), np.maximum(n - n // 2 - 1, 0)[:, None], axis=1)
    seconds = np.where(is_there, np.maximum(held, quorum) + (latency + talk)[:, None] + copies, 0.0)
    limit = _limit(sent, up, down, processor, talk + copies, latency, necessary, done, redo_s, lost_s)
    return Price(np.where(others > 0, seconds, 0.0), sent, limit, shares)


def _shares(peers: Peers, work: Work, places: Ints, is_there: Bools) -> Floats:
    """Return what each member reduces, as the leader of each group would split it.

    A member says how fast it receives, as far as others could send; how fast it sends is known to those who met it.
    """
    shares = np.zeros(places.shape)
    known = np.zeros(len(peers))
    if work.is_known:
        known = np.minimum(peers.down, np.median(peers.up) if work.is_grid else peers.up)
    for row, members in enumerate(places):
        here = is_there[row]
        if here.any():
            shares[row, here] = tempered_fractions(known[members[here]].tolist(), [True] * int(here.sum()))
    return shares


def _chunk_bytes(peers: Peers, work: Work, places: Ints, is_there: Bools) -> Floats:
    slowest = np.where(is_there, np.minimum(peers.up, peers.down)[places], np.inf).min(axis=1)
    n = is_there.sum(axis=1)
    bandwidth = slowest if work.is_known else np.zeros(len(n))
    return np.array(
        [
            chunk_bytes_for(work.vector_bytes, max(1, size), rate)
            for size, rate in zip(n.tolist(), bandwidth.tolist(), strict=True)
        ],
        dtype=np.float64,
    )


def _processor_s(
    peers: Peers, work: Work, costs: Costs, n: Ints, sent: Floats, records: Floats
) -> tuple[Floats, Floats]:
    """Return processor time: (groups, places) for the bytes, while they move, and (groups,) for talking beforehand.

    On a machine of its own a daemon moves bytes on one core, and when that is what limits it, more than a few packets
    wait for it each time. On one host everybody waits for the sum of all work.
    """
    moving = costs.byte_s * sent + costs.record_s * records
    if peers.one_host and float(np.median(peers.up)) * costs.byte_s < 1:  # lines slower than a core moves bytes
        moving = moving + costs.line_byte_s * sent
    is_slot = 1.0 if work.is_grid else 0.0
    talking = np.where(n > 1, costs.member_s + (costs.pair_s + costs.slot_s * is_slot) * (n - 1), 0.0)
    if not peers.one_host:
        return moving, talking
    copies = costs.copy_s * work.vector_bytes * n.sum()
    n_all = int(n.sum())
    everything = costs.wall_s(float(moving.sum()) + copies, n_all, peers.cores)
    talk = costs.wall_s(float((talking * n).sum()), n_all, peers.cores)
    return np.full(sent.shape, everything), np.full(len(n), talk)


def _middle(values: Floats, is_there: Bools, n: Ints) -> Floats:
    """Return for each group the value that the faster half of its members does not exceed."""
    ordered = np.sort(np.where(is_there, values, np.inf), axis=1)
    return np.take_along_axis(ordered, np.maximum((n + 1) // 2 - 1, 0)[:, None], axis=1)[:, 0]


def _patience(typical_s: Floats, progress_s: Floats) -> Floats:
    return PATIENCE_FACTOR * typical_s + PATIENCE_SLACK * progress_s


def _kept(piece_s: Floats, is_there: Bools, n: Ints, progress_s: Floats) -> tuple[Bools, Floats]:
    """Return who is waited for as a sender, and how long the patience with the others is (mpd/deadlines.py)."""
    patience = _patience(_middle(piece_s, is_there, n), progress_s)
    return is_there & (piece_s <= HOPE * patience[:, None]), patience


def _progress_s(chunk: Floats, n: Ints, up: Floats, is_there: Bools) -> Floats:
    """Return the limit on silence that members learn: pieces of one sender come this far apart."""
    pause = chunk * np.maximum(n - 1, 0) / _middle(up, is_there, n)
    return np.clip(PROGRESS.of_median * pause, PROGRESS.floor_s, PROGRESS.cap_s)


def _hop_s(peers: Peers, places: Ints, is_there: Bools) -> Floats:
    """Return the one-way delay between the two members of each group that are farthest apart."""
    rtt = np.sort(np.where(is_there, peers.rtt[places], 0.0), axis=1)
    return rtt[:, -2:].mean(axis=1) / 2 if rtt.shape[1] > 1 else np.zeros(len(rtt))


def _latency_s(work: Work, n: Ints, hop: Floats, n_peers: int, up: Floats, v: float) -> Floats:
    """Return what is spent on round trips: messages, the search for strangers, and windows of TCP that open."""
    count = np.select([n == size for size in STEP_HOPS], list(STEP_HOPS.values()), LARGE_GROUP_HOPS).astype(np.float64)
    if work.is_grid:
        count += NEW_SLOT_HOPS - 2 + lookup_hops(n_peers) + (DIAL_HOPS if n_peers > MAX_LINKS else 0)
    others = np.maximum(n - 1, 1)
    window = np.minimum(up / others * 2 * hop, v / np.maximum(n, 1))  # on one connection, and no more than it carries
    doublings = np.log2(np.maximum(window / INITIAL_WINDOW_BYTES, 1.0))
    return np.where(n > 1, (count + 2 * doublings) * hop, 0.0)


def _limit(
    sent: Floats,
    up: Floats,
    down: Floats,
    processor: Floats,
    talk: Floats | float,
    latency: Floats,
    necessary: Bools,
    done: Floats,
    redo_s: Floats,
    lost_s: Floats,
) -> Ints:
    """Return the index into `LIMITS` of what takes the largest part of each group's round."""

    def worst(values: Floats) -> Floats:
        return np.asarray(np.where(necessary, values, 0.0).max(axis=1))

    parts = [worst(sent / up), worst(sent / down), worst(processor) + talk, latency]
    busy = np.maximum(np.maximum(parts[0], parts[1]), parts[2])
    slow = np.maximum(done - lost_s - redo_s - busy, 0.0) + redo_s
    return np.asarray(np.argmax(np.stack([*parts, slow, lost_s]), axis=0))
