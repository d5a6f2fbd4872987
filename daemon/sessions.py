"""Rounds in progress: each joins one `Exchange` machine to its memory and to the links of its members.

The machine says what is to be sent, the session queues it on the member's link and looks the bytes up only when their
turn comes, so that a plan which changed meanwhile wastes nothing. Records arrive with a round id; `Sessions` finds the
round, or asks the sender for its BEGIN, which may still be on its way from the leader.
"""

import collections
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from mpd.deadlines import PROGRESS, SenderReport
from mpd.errors import PeerError, RoundFailed
from mpd.exchange import (
    CloseLink,
    Ended,
    Exchange,
    ExchangeMessage,
    Finished,
    Gone,
    RoundPlan,
    Send,
    SendPiece,
    SendResult,
)
from mpd.ids import Endpoint, PeerId, RoundId, peer_id
from mpd.messages import (
    EXCHANGE,
    Ask,
    Begin,
    Commit,
    Done,
    Few,
    Need,
    NewPlan,
    Prepare,
    Promise,
    Scoped,
    UnknownRound,
    Want,
)
from mpd.roll import name
from mpd.wire import Header, Kind

from . import faults
from .containment import UNEXPECTED, confine, contained, report
from .links import MAX_REPAIRS, Landing, Link
from .peers import Peers, Unreachable
from .transfers import Arrival, Bye, Departure, Notice
from .vault import RegionVault

_TICK_S = 0.1  # the machine's timers are looked at this often at least
_KNOWN_ENDED = 256  # rounds whose late records are recognised and dropped
_MAX_HELD = 64  # messages kept per link for rounds whose BEGIN has not arrived; the newest count
_MAX_HELD_BYTES = 65536  # no message that can come before BEGIN is longer
_BEGIN_S = 2.0  # how long a record of an unknown round waits for its BEGIN


@dataclass(frozen=True, slots=True)
class RoundResult:
    """How a round ended here. Masks and keys are places in `Begin.members`."""

    success: bool
    reason: str
    contributors: int
    confirmed: int
    missing: dict[int, str]
    seconds: float
    bytes_sent: int
    bytes_received: int
    notes: tuple[str, ...] = ()  # what went otherwise than planned, and cost nobody its place
    last_delivery: tuple[int, float] | None = None  # who delivered last, and how long after the round began


class RoundSession:
    """One round of this daemon."""

    def __init__(self, begin: Begin, plan: RoundPlan, vault: RegionVault, peers: Peers) -> None:
        now = trio.current_time()
        self.begin = begin
        self.round_id = RoundId(begin.round_id)
        self.me = plan.me
        self.vault = vault
        self.members = tuple(peer_id(member.peer) for member in begin.members)
        self.finished = trio.Event()
        self.gone = trio.Event()
        self._stirred = trio.Event()  # `run` has something to do before its time
        self.bytes_sent = 0
        self.bytes_received = 0
        self.exchange = Exchange(plan, vault, now)
        self.landings: dict[int, Arrival] = {}  # results being received straight into their slots
        self.patience: Mapping[PeerId, float] = {}  # links that may be silent for longer than the progress limit
        self._progress_s = plan.progress_s
        self._began = now
        self._seconds = 0.0
        self._bytes_sent_by_end = 0
        self._notes: list[str] = []
        self._last_delivery: tuple[int, float] | None = None
        self._peers = peers
        self._links: dict[int, Link] = {}
        self._waiting: dict[int, list[Any]] = {}  # what to send to members that are not linked yet
        self.left: set[int] = set()
        vault.before_write = self._before_write

    async def run(self) -> None:
        """Carry the round until nobody needs this member any more."""
        async with trio.open_nursery() as nursery:
            for place in range(len(self.members)):
                if place != self.me:
                    nursery.start_soon(confine, "member of a round", self._connect, place)
            while not self.gone.is_set():
                now = trio.current_time()
                wakeup = self.exchange.wakeup
                with trio.move_on_at(min(wakeup if wakeup is not None else now + _TICK_S, now + _TICK_S)):
                    await self._stirred.wait()
                self._stirred = trio.Event()
                if not self.gone.is_set():
                    self.feed(self.exchange.on_tick)
            nursery.cancel_scope.cancel()

    def result(self) -> RoundResult:
        """Return how the round ended; valid once `finished` is set."""
        machine = self.exchange
        success = machine.ended is Ended.SUCCESS
        # Whoever owns every chunk may end with its own values only: true to the rules, but not an average.
        met_nobody = success and not any(mask & ~(1 << self.me) for mask in machine.chunk_contributors)
        success = success and not met_nobody
        return RoundResult(
            success=success,
            reason="nobody else's values arrived" if met_nobody else machine.reason,
            contributors=machine.contributors if success else 0,
            confirmed=machine.confirmed,
            missing=dict(machine.missing),
            seconds=self._seconds,
            bytes_sent=self._bytes_sent_by_end,
            bytes_received=self.bytes_received,
            notes=tuple(self._notes),
            last_delivery=self._last_delivery,
        )

    def reports(self) -> dict[PeerId, SenderReport]:
        """Return how every member has delivered its pieces, in a round that has ended."""
        tempo = self.exchange.tempo
        owed_bytes = sum(chunk.n_bytes for chunk in self.vault.chunks if chunk.owner == self.me)
        return {
            self.members[place]: SenderReport(
                n_done=delivery.n_done,
                n_owed=tempo.n_owed,
                owed_bytes=owed_bytes,
                seconds=self._seconds if delivery.seconds is None else delivery.seconds,
                pause_s=delivery.pause_s,
                n_members=len(self.members),
            )
            for place, delivery in tempo.deliveries().items()
        }

    def cancel(self, reason: str) -> None:
        """Give the round up: as a failure if it has not ended, else only the lingering for others."""
        if not self.finished.is_set():
            self.feed(self.exchange.cancel, reason)
        if not self.gone.is_set():
            self._leave()

    # ---------------------------------------------------------------------------------------------- from the members

    def place_of(self, peer: PeerId) -> int | None:
        """Return the place of a member, None for anybody else."""
        return self.members.index(peer) if peer in self.members else None

    def on_message(self, link: Link, body: bytes) -> None:
        """A message of the exchange."""
        place = self._place_on(link)
        if place is not None:
            self.feed(self.exchange.on_message, place, EXCHANGE.decode(body))

    def on_link_down(self, link: Link, reason: str) -> None:
        """The link is over, and why."""
        self._on_lost(link, f"its link ended {self._age_s():.1f} s into the round: {reason}")

    def on_bye(self, link: Link) -> None:
        """The member has left this round."""
        self._on_lost(link, f"it left the round {self._age_s():.1f} s after it began")

    def _age_s(self) -> float:
        return trio.current_time() - self._began

    def _on_lost(self, link: Link, reason: str) -> None:
        place = self.place_of(link.peer)
        if place is not None and self._links.get(place, link) is link:
            self._lose(place, reason)

    def landing(self, link: Link, header: Header) -> Landing | None:
        """Say where a record goes. Raises PeerError if it cannot be part of this round."""
        if header.kind is Kind.BYE:
            return Notice(lambda: self.on_bye(link))
        place = self._place_on(link)
        if place is None or self.gone.is_set():
            return None
        why = self.vault.accepts(header.chunk, header.member, header.length, header.codec)
        if why:
            raise PeerError(f"it sent {why}")
        if header.kind is Kind.PIECE:
            self.exchange.wants_piece(place, header.chunk, header.version)  # or it raises
        elif self.exchange.wants_result(place, header.chunk, header.version) and self._is_free(header.chunk):
            landing = Arrival(self, place, header, self.vault.slot_view(header.chunk))
            self.landings[header.chunk] = landing
            return landing
        return Arrival(self, place, header)

    def _is_free(self, chunk: int) -> bool:
        """True if a result may be received in its place: nothing is overwritten that others may still want."""
        return self.vault.codec.identity and chunk not in self.landings and not self.exchange.is_occupied(chunk)

    # ------------------------------------------------------------------------------------------------------- to them

    def feed(self, event: Callable[..., None], *args: Any) -> None:
        """Tell the machine that something happened now, and do what it asks for."""
        now = trio.current_time()
        try:
            try:
                event(now, *args)
            except RoundFailed as error:  # our own values or sums are no good: the others go on without us
                self.exchange.cancel(now, str(error))
            self._perform()
            wakeup = self.exchange.wakeup
            if wakeup is not None and wakeup <= now:
                self._stirred.set()
        except PeerError:
            raise
        except Exception as error:  # noqa: BLE001  # a bug costs the round
            report("round", error)
            self._give_up()

    def _give_up(self) -> None:
        """End this round whatever state it is in: something unexpected has happened in it, and may happen again."""
        with contained("round"):
            self.exchange.cancel(trio.current_time(), UNEXPECTED)
            self._perform()
        if not self.finished.is_set():
            with contained("round"):
                self._finish(succeeded=self.exchange.ended is Ended.SUCCESS)
        self.finished.set()
        if not self.gone.is_set():
            with contained("round"):
                self._leave()

    def _perform(self) -> None:
        for action in self.exchange.take_actions():
            match action:
                case SendPiece() | SendResult():
                    self._to(action.to, Departure(self, action))
                case Send():
                    if faults.armed:
                        faults.strike(_point_of(action.message))
                    self._to(action.to, Scoped(self.round_id, EXCHANGE.encode(action.message)))
                case CloseLink():
                    self._part(action.to)
                case Finished():
                    self._finish(succeeded=action.success)
                case Gone():
                    self._leave()

    def _finish(self, *, succeeded: bool) -> None:
        self._seconds = trio.current_time() - self._began
        self._take_notes()
        self._bytes_sent_by_end = self.bytes_sent
        if succeeded:  # the others still get what this member owes them
            owed = (record.n_bytes() for link in self._links.values() for record in link.unsent(self))
            self._bytes_sent_by_end += sum(owed)
        self._let_go()
        self.finished.set()

    async def _connect(self, place: int) -> None:
        member = self.begin.members[place]
        if not (member.inbound or self.begin.members[self.me].inbound):
            return
        try:
            link = await self._peers.link(
                self.members[place], Endpoint(member.host, member.port) if member.inbound else None
            )
        except Unreachable as error:
            self._lose(place, str(error))
            return
        if self.gone.is_set() or place in self.left:
            if place not in self.left:  # the round was over for us before there was a way to say so
                link.ship(Bye(self.round_id))
            return
        self._links[place] = link
        link.busy += 1
        link.patience_s = max(self._progress_s, self.patience.get(link.peer, 0.0))
        link.repairs_left = MAX_REPAIRS
        for item in self._waiting.pop(place, []):
            self._to(place, item)

    def _to(self, place: int, item: Any) -> None:
        link = self._links.get(place)
        if link is None:
            if place not in self.left:
                self._waiting.setdefault(place, []).append(item)
        elif isinstance(item, Scoped):
            link.send(item)
        else:
            link.ship(item)

    def _place_on(self, link: Link) -> int | None:
        """Return the place of the peer behind `link`, None if it is not a member or is lost to this round."""
        place = self.place_of(link.peer)
        return None if place is None or place in self.left else place

    def _lose(self, place: int, reason: str) -> None:
        if place not in self.left:
            self._drop(place)
            self.feed(self.exchange.on_lost, place, reason)

    def _part(self, place: int) -> None:
        """Tell a member that nothing more passes between us in this round."""
        link = self._links.get(place)
        self._drop(place)
        if link is not None:
            link.ship(Bye(self.round_id))

    def _drop(self, place: int) -> None:
        self.left.add(place)
        self._waiting.pop(place, None)
        link = self._links.pop(place, None)
        if link is not None:
            link.busy -= 1
            link.drop_shipments(self)
            link.detach(self)

    def _take_notes(self) -> None:
        """Note what had to be done twice, while it is still known."""
        machine = self.exchange
        if machine.last_delivery is not None:
            place, at = machine.last_delivery
            self._last_delivery = place, at - self._began
        for owner, n_chunks in sorted(machine.redone.items()):
            note = f"{n_chunks} of {len(self.vault.chunks)} chunks of {self._name(owner)} were reduced again by others"
            why = machine.troubles.get(owner)
            self._notes.append(f"{note}: {why}" if why else note)
        for place, link in sorted(self._links.items()):
            n_repairs = MAX_REPAIRS - link.repairs_left
            if n_repairs:
                times = "once" if n_repairs == 1 else f"{n_repairs} times"
                to = f"the data connection to {self._name(place)}"
                self._notes.append(f"{to} was replaced {times}: {link.repair_cause}")

    def _name(self, place: int) -> str:
        return "this machine" if place == self.me else name(self.members[place])

    def _let_go(self) -> None:
        """Make what is being sent independent of the memory: it goes back to its owner now."""
        for link in self._links.values():
            link.detach(self)

    def _leave(self) -> None:
        self.gone.set()
        self._stirred.set()
        self._waiting.clear()
        for place in list(self._links):
            if self.exchange.confirmed >> place & 1:
                self._drop(place)
            else:
                self._part(place)
        for chunk in list(self.landings):
            self._before_write(chunk)
        self.vault.before_write = lambda chunk: None  # or session and vault would keep each other, and their memory

    def _before_write(self, chunk: int) -> None:
        landing = self.landings.pop(chunk, None)
        if landing is not None:
            landing.revoke()
        for link in self._links.values():
            link.detach(self, chunk)


@dataclass(frozen=True, slots=True)
class _Held:
    """Something that came before the BEGIN of its round: a message, or None for a goodbye."""

    round_id: RoundId
    body: bytes | None


class Sessions:
    """All rounds of this daemon, by round id."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._sessions: dict[RoundId, RoundSession] = {}
        self._ended: collections.OrderedDict[RoundId, None] = collections.OrderedDict()
        self._held: dict[Link, collections.deque[_Held]] = {}
        self._began = trio.Event()
        self._told: tuple[Link, RoundId] | None = None  # who heard last that we take no part in a round

    async def wait_quiet(self) -> None:
        """Wait until no round is under way here."""
        while under_way := [each for each in self._sessions.values() if not each.finished.is_set()]:
            await under_way[0].finished.wait()

    def begin(
        self,
        begin: Begin,
        me: int,
        vault: RegionVault,
        deadline: float = math.inf,
        progress_s: float | None = None,
        patience: Mapping[PeerId, float] | None = None,
    ) -> RoundSession:
        """Make a session; whoever waits for this round goes on. The caller runs it and calls `end` afterwards.

        The round ends at `deadline` (of this member's step) or when BEGIN says so, whichever comes first. `progress_s`
        is the progress limit as this member accepts it; by default BEGIN's, within the bounds. `patience` may name
        members whose links are given more time than that before they are ended.
        """
        deadline = min(deadline, trio.current_time() + begin.timeout_s)
        plan = _plan(begin, me, vault, deadline, progress_s)
        session = RoundSession(begin, plan, vault, self._peers)
        session.patience = patience or {}
        session.feed(session.exchange.start)  # before anything can arrive for it
        self._sessions[session.round_id] = session
        for link, held in self._take_held(session.round_id):
            self._hand_in(session, link, held)
        self._wake()
        return session

    def end(self, session: RoundSession) -> None:
        """Forget a session that is gone."""
        self._sessions.pop(session.round_id, None)
        self.refuse(session.round_id)

    def refuse(self, round_id: RoundId) -> None:
        """Drop whatever belongs to this round from now on."""
        self._take_held(round_id)
        self._ended[round_id] = None
        while len(self._ended) > _KNOWN_ENDED:
            self._ended.popitem(last=False)
        self._wake()

    def expects(self, link: Link, header: Header) -> bool:
        """Return whether a record belongs to a round that is known here, or needs none."""
        return header.round_id in self._sessions or header.kind is Kind.BYE

    async def landing(self, link: Link, header: Header) -> Landing | None:
        """Find the round of a record; if it is unknown, ask for its BEGIN and wait a moment."""
        session = self._sessions.get(header.round_id)
        if session is None and header.kind is Kind.BYE:
            return Notice(lambda: self._on_early_bye(link, header.round_id))
        if session is None:
            session = await self._wait_for(link, header.round_id)
        if session is None:
            return Notice(lambda: self._turn_away(link, header.round_id))
        return session.landing(link, header)

    def on_scoped(self, link: Link, message: Scoped) -> None:
        """A message for the machine of a round."""
        round_id = RoundId(message.round_id)
        session = self._sessions.get(round_id)
        if session is not None:
            session.on_message(link, message.body)
        elif round_id not in self._ended and len(message.body) <= _MAX_HELD_BYTES:
            self._hold(link, _Held(round_id, message.body))
            link.send(UnknownRound(round_id))

    def on_unknown_round(self, link: Link, message: UnknownRound) -> None:
        """A member missed BEGIN: pass it on."""
        session = self._sessions.get(RoundId(message.round_id))
        if session is not None and session.place_of(link.peer) is not None:
            link.send(session.begin)

    def on_link_down(self, link: Link, reason: str) -> None:
        """Every round on that link has lost this member."""
        self._held.pop(link, None)
        for session in list(self._sessions.values()):
            session.on_link_down(link, reason)

    def _on_early_bye(self, link: Link, round_id: RoundId) -> None:
        """A goodbye to a round that is unknown here, or was when it began to arrive."""
        session = self._sessions.get(round_id)
        if session is not None:
            session.on_bye(link)
        else:
            self._hold(link, _Held(round_id, None))

    def _turn_away(self, link: Link, round_id: RoundId) -> None:
        """A record of a round in which we take no part has come: say so, once."""
        if (link, round_id) != self._told:
            self._told = (link, round_id)
            link.ship(Bye(round_id))

    def _hold(self, link: Link, held: "_Held") -> None:
        if held.round_id not in self._ended:
            self._held.setdefault(link, collections.deque(maxlen=_MAX_HELD)).append(held)

    def _take_held(self, round_id: RoundId) -> list[tuple[Link, "_Held"]]:
        """Take out what arrived early for a round."""
        taken = [(link, held) for link, waiting in self._held.items() for held in waiting if held.round_id == round_id]
        for link, held in taken:
            self._held[link].remove(held)
        return taken

    def _hand_in(self, session: RoundSession, link: Link, held: "_Held") -> None:
        try:
            if held.body is None:
                session.on_bye(link)
            else:
                session.on_message(link, held.body)
        except PeerError as error:
            link.close(str(error))

    async def _wait_for(self, link: Link, round_id: RoundId) -> RoundSession | None:
        if round_id not in self._ended:
            link.send(UnknownRound(round_id))
        with trio.move_on_after(max(link.patience_s, _BEGIN_S)):
            while round_id not in self._sessions and round_id not in self._ended:
                await self._began.wait()
        return self._sessions.get(round_id)

    def _wake(self) -> None:
        self._began.set()
        self._began = trio.Event()


def _point_of(message: ExchangeMessage) -> str:
    """Return the fault point that sending `message` passes."""
    match message:
        case Done() | Commit():
            return "commit"
        case Need() | Few() | Prepare() | Promise() | NewPlan() | Want() | Ask():
            return "repair"


def _plan(begin: Begin, me: int, vault: RegionVault, deadline: float, progress_s: float | None) -> RoundPlan:
    chunks = vault.chunks
    return RoundPlan(
        n_members=len(begin.members),
        me=me,
        owners=tuple(chunk.owner for chunk in chunks),
        inbound=sum(1 << place for place, member in enumerate(begin.members) if member.inbound),
        senders=sum(1 << place for place, member in enumerate(begin.members) if member.weight > 0),
        deadline=deadline,
        progress_s=PROGRESS.clamp(begin.progress_s if progress_s is None else progress_s),
    )
