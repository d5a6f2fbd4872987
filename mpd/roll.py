"""Who stands in a slot, and what to do about it: the table of states, the books and the policy of matchmaking.

`MOVES` says what may follow upon what. `Register` remembers what is known of every peer that was sighted, `Roll` is its
summary for one moment, and `decide` is the whole policy: a pure function from a roll and the time to a verdict and a
sentence that explains it. The sentence serves the log, the status page and the tests alike. Messages are the business
of mpd/matchmaking.py.
"""

import math
from dataclasses import dataclass
from enum import Enum, auto

from mpd.ids import PeerId, show_peer
from mpd.messages import MAX_COLLECTED, Join

MAX_HEARSAY = 512  # peers remembered though they have not spoken to us; a hostile DHT could name any number

# Why a live peer is not in a group.
READY = "was ready {until}, and had not joined this group"
NOT_READY = "its trainer had not asked for a step {until}"
SILENT = "was waited for in vain, and has said nothing since"

UNKNOWN_STAMP = -1  # of a peer that has not said that it is ready; smaller than any published one

Rank = tuple[bool, int, PeerId]


@dataclass(frozen=True, slots=True)
class MatchLimits:
    """How long to wait for what.

    `window_s`: for announced peers that are not ready, by a leader that has company. `alone_s`: for any company at all.
    `settle_s`: after the last newcomer, where more peers are expected than are known, and `quick_s`, where there may be
    one more or none. `answer_s`: for the answer to a
    `Join`. `leader_s`: for a leader that took us in; its window may be longer than ours.
    """

    window_s: float = 5.0
    settle_s: float = 1.0
    quick_s: float = 0.3
    answer_s: float = 1.0
    alone_s: float = 5.0
    leader_s: float = 5.0


# ---------------------------------------------------------------------------------------------------------- the states


class State(Enum):
    """Where a peer stands in its slot."""

    EXPECTED = "expected"  # announced ahead; its trainer has not asked
    SEEKING = "seeking"  # ready, without leader or followers
    LEADING = "leading"  # has followers
    JOINING = "joining"  # has asked `leader`
    FOLLOWING = "following"  # was accepted by `leader`
    BEGUN = "begun"
    ALONE = "alone"


class Move(Enum):
    """What takes a peer from one state to the next."""

    READY = auto()  # the trainer asked
    FOLLOWED = auto()  # somebody joined us
    DESERTED = auto()  # the last follower went
    ASK = auto()  # somebody smaller invites
    ACCEPTED = auto()  # the leader said yes
    LET_GO = auto()  # the leader refused, disbanded, is silent or gone, or turned out to be larger than we are
    BEGIN = auto()  # the group is closed
    GIVE_UP = auto()  # no group, or no wish for one


_FOLLOWER_MOVES = {
    Move.ACCEPTED: State.FOLLOWING,
    Move.LET_GO: State.SEEKING,
    Move.BEGIN: State.BEGUN,
    Move.GIVE_UP: State.ALONE,
}
MOVES: dict[State, dict[Move, State]] = {
    State.EXPECTED: {Move.READY: State.SEEKING, Move.GIVE_UP: State.ALONE},
    State.SEEKING: {Move.FOLLOWED: State.LEADING, Move.ASK: State.JOINING, Move.GIVE_UP: State.ALONE},
    State.LEADING: {
        Move.FOLLOWED: State.LEADING,
        Move.DESERTED: State.SEEKING,
        Move.ASK: State.JOINING,
        Move.BEGIN: State.BEGUN,
        Move.GIVE_UP: State.ALONE,
    },
    State.JOINING: _FOLLOWER_MOVES,
    State.FOLLOWING: _FOLLOWER_MOVES,
    State.BEGUN: {},
    State.ALONE: {},
}


# ----------------------------------------------------------------------------------------------------------- the books


@dataclass(frozen=True, slots=True)
class Sighting:
    """A peer seen in this slot. `ready`, with its stamp, is its own word; without it this may be stale or hearsay.

    `silent`: it was waited for in vain, and has said nothing since. `knows_us`: it has seen us here in the same way.
    """

    peer: PeerId
    inbound: bool
    ready: bool
    stamp: int
    silent: bool = False
    knows_us: bool = False


def rank(peer: PeerId, inbound: bool, stamp: int) -> Rank:
    """Return the place of a ready peer in the order of leaders; the smallest leads.

    Who accepts no connections comes last, because two such peers cannot reach each other.
    """
    return (not inbound, stamp, peer)


@dataclass(slots=True)
class Known:
    """What is known of another peer in this slot."""

    inbound: bool = True
    stamp: int = UNKNOWN_STAMP
    gone: str = ""  # why it does not count in this attempt
    silent: bool = False  # nobody waits for it until it speaks
    ticket: Join | None = None  # it follows us
    time_ends_s: float = math.inf  # of its step, as far as its ticket says
    knows_us: bool = False
    invited: bool = False  # we told it that we are ready, and have not turned it away since
    inviting: bool = False  # it said that it is ready, or another peer calls it a leader
    asked: bool = False  # by us, since it last said so itself
    pointed_to: PeerId | None = None  # the leader that we named to it

    @property
    def is_ready(self) -> bool:
        """True if it said itself that its trainer has asked."""
        return self.stamp != UNKNOWN_STAMP

    @property
    def may_be_asked(self) -> bool:
        """True if it has an invitation out that we have not used."""
        return self.inviting and not self.asked and not self.gone and self.ticket is None


class Register:
    """All peers that were sighted in a slot, and when the last new one was."""

    def __init__(self) -> None:
        self.peers: dict[PeerId, Known] = {}
        self.news_s = -math.inf

    def meet(self, now: float, peer: PeerId, in_person: bool, revive: bool) -> Known:
        """Return what is known of `peer`, from now on at the latest.

        Who is gone begins afresh if `revive`, and who speaks `in_person` is not silent. Once `MAX_HEARSAY` peers are
        known, what is said about others than those who speak `in_person` is forgotten at once.
        """
        known = self.peers.get(peer)
        if known is None or (known.gone and revive):
            known = Known()
            if in_person or len(self.peers) < MAX_HEARSAY:
                self.peers[peer] = known
                self.news_s = now
        known.silent &= not in_person
        return known

    def lose(self, peer: PeerId, reason: str) -> None:
        """`peer` does not count any more, unless it comes back."""
        if peer in self.peers:
            self.peers[peer] = Known(gone=reason)

    @property
    def followers(self) -> dict[PeerId, Join]:
        """Who joined us, with what."""
        return {peer: known.ticket for peer, known in self.peers.items() if known.ticket is not None}

    @property
    def awaited(self) -> tuple[PeerId, ...]:
        """Live peers that have not joined us and are worth waiting for."""
        live = (peer for peer, known in self.peers.items() if not known.gone and not known.silent)
        return tuple(peer for peer in live if self.peers[peer].ticket is None)

    @property
    def lost(self) -> tuple[PeerId, ...]:
        """Peers that were announced and are gone or silent."""
        return tuple(peer for peer, known in self.peers.items() if known.gone or known.silent)

    def missing(self, *, until: str) -> dict[PeerId, str]:
        """Return why each peer that had not joined us `until` some moment, told in words, is missing."""
        return {
            peer: known.gone
            or (SILENT if known.silent else (READY if known.is_ready else NOT_READY).format(until=until))
            for peer, known in self.peers.items()
            if known.ticket is None
        }

    def rank_of(self, peer: PeerId) -> Rank:
        """Return the rank of `peer` as far as it is known."""
        known = self.peers[peer]
        return rank(peer, known.inbound, known.stamp)

    def to_ask(self, mine: Rank) -> PeerId | None:
        """Return the smallest peer below `mine` that may be asked."""
        smaller = (peer for peer, known in self.peers.items() if known.may_be_asked and self.rank_of(peer) < mine)
        return min(smaller, key=self.rank_of, default=None)

    def to_point(self, leader: PeerId) -> list[PeerId]:
        """Return who waits for our `Join` and has not heard from us that we follow `leader`."""
        return [
            peer
            for peer, known in self.peers.items()
            if known.may_be_asked and known.pointed_to != leader and peer != leader
        ]


# ---------------------------------------------------------------------------------------------------------- the policy


class Verdict(Enum):
    """What `decide` wants done."""

    WAIT = auto()
    ASK = auto()  # send a Join to `Roll.to_ask`
    DROP = auto()  # the leader does not answer
    POINT = auto()  # tell those who wait for our Join whom we follow
    BEGIN = auto()
    GIVE_UP = auto()


@dataclass(frozen=True, slots=True)
class Roll:
    """A register at one moment, as a ready peer sees it. Times are absolute, in seconds.

    `members` counts those who joined, ourselves included; `awaited` are the live peers that have not, `lost` those that
    will not. `line_size` is how many peers the grid expects (0: unknown), and `line_low` how many at least. `to_ask` is
    the smallest peer that may be asked. `leader` is whom we asked at `asked_s`, `accepted` says that it agreed, and
    `to_point` that others wait for our `Join` meanwhile. `news_s` is when the last newcomer was sighted or we became
    ready.
    """

    members: int
    awaited: tuple[PeerId, ...]
    lost: tuple[PeerId, ...]
    line_size: int
    line_low: int
    to_ask: PeerId | None
    leader: PeerId | None
    accepted: bool
    to_point: bool
    asked_s: float
    news_s: float
    window_ends_s: float
    alone_ends_s: float
    time_ends_s: float

    @property
    def announced(self) -> int:
        """All peers of the slot that were ever sighted, and we."""
        return self.members + len(self.awaited) + len(self.lost)


def decide(now: float, roll: Roll, limits: MatchLimits) -> tuple[Verdict, str]:
    """Return what a ready peer does next, and why in one sentence."""
    if now >= roll.time_ends_s:
        return Verdict.GIVE_UP, "the step's time was up before a group began"
    if roll.leader is not None:
        return _decide_with_leader(now, roll, limits, roll.leader)
    if roll.to_ask is not None:
        return Verdict.ASK, f"{name(roll.to_ask)} leads"
    if roll.members > 1:
        return _decide_as_leader(now, roll, limits)
    if now < roll.alone_ends_s:
        return Verdict.WAIT, _waiting_for(roll)
    if roll.announced > 1:
        return Verdict.GIVE_UP, f"window ended and nobody had joined; missing: {_left_out(roll)}"
    return Verdict.GIVE_UP, "nobody else has announced this run"


def _decide_with_leader(now: float, roll: Roll, limits: MatchLimits, leader: PeerId) -> tuple[Verdict, str]:
    is_overdue = now >= roll.asked_s + limits.answer_s
    if not roll.accepted:
        if is_overdue:
            return Verdict.DROP, f"did not answer within {limits.answer_s:g} s"
        return Verdict.WAIT, f"asking {name(leader)} for a place in its group"
    if now >= _begins_by(roll, limits):
        return Verdict.DROP, f"took us in and did not begin within {limits.leader_s + limits.answer_s:g} s"
    # Not at once: nearly always the group begins before this, and nobody needs to be told.
    if is_overdue and roll.to_point:
        return Verdict.POINT, f"telling others to ask {name(leader)}"
    return Verdict.WAIT, f"waiting for {name(leader)} to begin"


def _begins_by(roll: Roll, limits: MatchLimits) -> float:
    """Return when a leader that took us in has had its whole window, which began before we asked."""
    return roll.asked_s + limits.leader_s + limits.answer_s


def _decide_as_leader(now: float, roll: Roll, limits: MatchLimits) -> tuple[Verdict, str]:
    left_out = f"; left out: {_left_out(roll)}" if roll.awaited or roll.lost else ""
    if roll.members == MAX_COLLECTED:
        return Verdict.BEGIN, f"full: no leader takes in more than {MAX_COLLECTED} members{left_out}"
    is_settled = roll.members >= roll.line_size or now >= roll.news_s + _settle_s(roll, limits)
    if not roll.awaited and is_settled:
        return Verdict.BEGIN, f"full: {roll.members} of {roll.announced} announced peers are ready{left_out}"
    if now >= roll.window_ends_s:
        return Verdict.BEGIN, f"window ended with {roll.members} members{left_out}"
    return Verdict.WAIT, _waiting_for(roll)


def _settle_s(roll: Roll, limits: MatchLimits) -> float:
    return limits.quick_s if roll.members >= roll.line_low else limits.settle_s


def _waiting_for(roll: Roll) -> str:
    if roll.awaited:
        return f"waiting for {len(roll.awaited)} of {roll.announced} announced peers: {_names(roll.awaited)}"
    if roll.members > 1:
        return f"{roll.members} of {roll.line_size} expected peers are here: waiting for newcomers"
    return "nobody else has announced this run yet"


def next_change(now: float, roll: Roll, limits: MatchLimits) -> float:
    """Return the first time after `now` at which `decide` may answer differently about the same roll."""
    due: tuple[float, ...]
    if roll.leader:
        due = roll.asked_s + limits.answer_s, _begins_by(roll, limits)
    else:
        due = roll.window_ends_s, roll.alone_ends_s, roll.news_s + _settle_s(roll, limits)
    return min((at for at in (*due, roll.time_ends_s) if at > now), default=math.inf)


def name(peer: PeerId) -> str:
    """Return as much of a peer's name as fits into a sentence."""
    return f"{show_peer(peer)[:8]}.."


def _left_out(roll: Roll) -> str:
    return _names(roll.awaited + roll.lost)


def _names(peers: tuple[PeerId, ...]) -> str:
    more = f" and {len(peers) - 4} more" if len(peers) > 4 else ""
    return ", ".join(name(peer) for peer in peers[:4]) + more
