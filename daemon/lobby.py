"""From "my trainer asks" to BEGIN: this peer's place in a run, and the company it keeps there.

A lobby stands in one slot at a time, with a `Matchmaker` that has not begun. It moves to the next slot as soon as a
round begins, so that by the time a trainer asks again, everybody in the line is known, linked, and has been told who is
here. Peers are found through the rendezvous and believed on links; a peer that could not be reached is forgotten until
it speaks up or publishes something newer. On a grid of several axes rounds have numbers, and whoever is behind goes on
with those whom it meets.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from mpd.config import RoundLimits
from mpd.deadlines import Pace
from mpd.errors import PeerError
from mpd.grid import Cell, ShapeRecord, axis_of, fit, line_of, next_cell, slot
from mpd.grouping import check_weights, compose_begins
from mpd.ids import Endpoint, PeerId, RoundId, peer_id, show_peer
from mpd.layout import Terms
from mpd.mass import Standing
from mpd.matchmaking import Alone, Begun, Matchmaker, Sighting, State
from mpd.messages import MAX_ROUND_S, Begin, Declined, Here, Join, Joined, Quit, RunTerms
from mpd.schedule import MAX_STACKED_VECTORS, MIN_CHUNK_BYTES

from . import faults
from .budgets import ByteGate
from .company import Company
from .contacts import Contacts
from .containment import supervise
from .links import Link
from .peers import Peers
from .rendezvous import Rendezvous
from .roster import Roster, Seen
from .shaping import Shaping
from .strangers import Strangers
from .waits import Waits

_POLL_S = 0.15  # while a shape is awaited
_MATCH_POLL_S = 0.3  # while company is awaited
_SLOW_POLL_S = 1.0  # while nobody asks for anything
_IDLE_POLL_S = 10.0  # once the run has its shape
_ARRIVAL_S = 2.0  # how long those whom the rendezvous has just met may take to publish there
_FRESH_S = 10.0  # how long a new attachment polls fast
_MAX_TIMER_S = 0.25
_MAX_LEFT_S = MAX_ROUND_S - 1  # of a ticket: added to a clock and taken away again, an hour may become a little more
_OVERTIME_S = 0.5  # that a step may take to find out where its line is
_MIN_AHEAD = 2  # one alone may only have counted its failures
_NOT_HERE = "is known to this line, and has not come to this round"
_QUIET_S = 0.5  # rounds that follow upon each other sooner need no word of who is there beforehand
_MAX_SMALLER = 3  # peers that would write the shape before us, whom we call to see whether they are there
_FAREWELL_S = 0.3  # how long taking announcements back may take


@dataclass(frozen=True, slots=True)
class LobbyServices:
    """What every lobby of a daemon shares."""

    own: PeerId
    peers: Peers
    rendezvous: Rendezvous
    limits: RoundLimits
    rng: random.Random
    wall_ms: Callable[[], int]
    dials: ByteGate  # calls under way to addresses that records name
    refuse: Callable[[RoundId], None]  # a BEGIN came too late for us
    warn: Callable[[str], None]


@dataclass
class _Post:
    """This peer's stand in one slot."""

    slot: bytes
    number: int
    matchmaker: Matchmaker
    greets_at: float  # when those who are known to come here hear that we are here
    company: set[PeerId] = field(default_factory=set)
    greeted: set[PeerId] = field(default_factory=set)
    pending: set[PeerId] = field(default_factory=set)  # who may come, and has not said that it is here
    quitters: set[PeerId] = field(default_factory=set)  # who has said that it is not
    is_ready: bool = False


class Lobby:
    """This peer's place in the run `run`."""

    def __init__(self, run: str, terms: Terms, services: LobbyServices) -> None:
        self.run = run
        self.terms = terms
        self.cell: Cell = ()
        self.last_cell: Cell = ()  # where the round that began last found us
        self.number = 0
        self.age = 0  # rounds that lie behind our vector
        self.reason = "looking for other peers of this run"
        self.pace = Pace(services.limits.progress_s, services.limits.window_s)
        self._services = services
        self._contacts = Contacts(services.peers, services.dials, self._on_absent, self._on_back)
        self._roster = Roster(run, terms, services.own, services.rendezvous, services.limits, services.rng)
        self._roster.is_live = self._contacts.is_live
        self._strangers = Strangers(run, terms, self._contacts)
        self.shaping = Shaping(terms, self._roster, self._contacts)
        self._waits = Waits(terms, self.pace, self._roster, self.shaping)
        self._post: _Post | None = None
        self._begun: _Post | None = None  # the slot of the group that began last
        self._phases_at = float("-inf")  # when we last looked where most of our lines is
        self._company = Company(self._contacts.is_linked)
        self._lost: set[PeerId] = set()  # company of our line that has gone without a goodbye
        self._was_deserted = False  # the last step found that nobody else has announced the run
        self._was_alone = False  # the last step came to no group
        self._nudged = trio.Event()
        self._leaving = trio.CancelScope()  # for another shape; ends when a group begins in this one
        self._looking = trio.CancelScope()  # for others in our slot; ends when we stand in another one
        self._changed = trio.Event()
        self._wanted = 0
        self._is_aside = False
        self._stood: _Post | None = None  # where we stood before we stepped aside

    @property
    def own(self) -> PeerId:
        """This peer."""
        return self._services.own

    @property
    def record(self) -> ShapeRecord | None:
        """The shape record that this peer goes by."""
        return self.shaping.record

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells per axis, empty while the run has no shape."""
        return self.record.shape if self.record is not None else ()

    @property
    def company(self) -> list[PeerId]:
        """The peers known to stand in our line now, or in the roster while there is no line."""
        return sorted(self._post.company if self._post is not None else self._roster.others)

    @property
    def differences(self) -> dict[PeerId, str]:
        """Peers that use this run's name with other terms: the first difference."""
        return self._strangers.differences

    @property
    def absences(self) -> dict[PeerId, str]:
        """Peers of this run that went, or could not be reached, in the last moments: why."""
        return self._contacts.absences

    @property
    def overlooked(self) -> list[PeerId]:
        """Whom we knew to stand where the last group began, and who is neither in it nor named as left out."""
        post = self._begun
        verdict = post.matchmaker.verdict if post is not None else None
        if post is None or not isinstance(verdict, Begun) or verdict.leader or verdict.begin.parts > 1:
            return []
        named = {member.peer for member in verdict.begin.members} | set(verdict.begin.left_out)
        return sorted(peer for peer in post.company if peer not in named)

    # ------------------------------------------------------------------------------------------------------- lifetime

    async def serve(self) -> None:
        """Keep this peer's place in the run until cancelled; then take it back from the rendezvous."""
        try:
            async with trio.open_nursery() as nursery:
                self._contacts.nursery = nursery
                if self._post is not None:  # an unexpected error has ended that stand
                    self._stand()
                nursery.start_soon(supervise, "look at a run", self._watch_roster)
                nursery.start_soon(supervise, "look at a run", self._watch_slot)
                nursery.start_soon(supervise, "call those who were lost", self._contacts.keep_calling)
        finally:
            self._contacts.nursery = None
            self._contacts.watch({})
            if self._post is not None:
                self._post.matchmaker.cancel(trio.current_time(), "no trainer here takes part in the run any more")
                self._pump(self._post)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _FAREWELL_S):
                await self._roster.withdraw()

    async def _watch_roster(self) -> None:
        """Find out who wants this run; settle its shape if it has none."""
        await self._roster.announce(self._endpoint)
        fresh_until = trio.current_time() + _FRESH_S
        while True:
            await self._roster.read()
            self._strangers.review(self._roster.strangers)
            if self.record is None:
                await self._settle_shape()
            if self.record is not None:
                self.shaping.call_everybody()
                await self.shaping.look(self.record)
                await self._rest()
            else:
                is_urgent = self._wanted or self._roster.others or trio.current_time() < fresh_until
                await self._pause(_POLL_S if is_urgent else _SLOW_POLL_S)

    async def _rest(self) -> None:
        """Wait before the next look, shorter if there is news, or more peers now: two parts of a swarm may have met."""
        n_peers = self._services.rendezvous.snapshot().peers
        for _ in range(int(_IDLE_POLL_S / _SLOW_POLL_S)):
            slice_ends = trio.current_time() + _SLOW_POLL_S
            while trio.current_time() < slice_ends:
                if self.shaping.is_urgent:
                    return
                with trio.move_on_at(slice_ends):
                    await self.shaping.stirred.wait()
            if self.shaping.is_restless:
                return
            before, n_peers = n_peers, self._services.rendezvous.snapshot().peers
            if n_peers > before:
                await trio.sleep(_ARRIVAL_S)
                return

    async def _adopt(self, deadline: float) -> None:
        """Go over to a shape that replaces ours, if it is time: between two cycles."""
        place = await self.shaping.next_place(deadline)
        if place is not None:
            self._go_over(*place)

    def _go_over(self, record: ShapeRecord, cell: Cell, number: int) -> None:
        """Go by `record` from now on, at its `cell` and round `number`."""
        if self._post is not None:
            self._post.matchmaker.cancel(trio.current_time(), "the run goes on in another shape")
            self._pump(self._post)
        self.shaping.go_by(record)
        self._was_deserted = False
        self.last_cell, self.number, self.cell = cell, number, cell
        self._stand(line_size=record.n_peers if len(record.shape) == 1 else None)
        self._expect_others()

    def _expect_others(self) -> None:
        """We have gone over to another shape: let everybody know, and await those who will stand in our line there."""
        record, post = self.record, self._post
        if record is None or post is None:
            return
        axis, own = axis_of(self.number, record.shape), self.cell
        for peer, seen in self._roster.others.items():
            cell = self._roster.cell_of(record, peer) if len(record.shape) > 1 else own
            shared = [i for i in range(len(record.shape)) if cell is not None and line_of(cell, i) == line_of(own, i)]
            for phase in shared:
                self._company.expect(peer, slot(self.run, record, phase, line_of(own, phase)))
            if self._contacts.is_linked(peer) and axis in shared:
                self._meet(post, peer)
            elif self._contacts.is_linked(peer):
                self._contacts.say(peer, Here(self.run, post.slot, post.number, False, 0, record.epoch))
            elif axis in shared:
                self._contacts.note(seen)
                self._greet(post, peer)
            elif shared:
                self._contacts.note(seen)
                self._contacts.call(peer)
        if record.roster:
            self._company.foresee()
        self._update_line(post)
        self._pump(post)

    async def _settle_shape(self) -> None:
        for seen in self._to_call():
            self._contacts.note(seen)
            self._contacts.call(seen.peer)
        record = await self._roster.find_shape()
        if record is not None:
            self.cell, self.number = await self._roster.first_place(record)
            self.shaping.go_by(record)
            self._stand(line_size=record.n_peers if len(record.shape) == 1 else None)

    def _to_call(self) -> list[Seen]:
        """Return whom to call while there is no shape, since records outlive those who made them.

        If all will be one group, everybody calls everybody. In a larger run that would be a link for each pair of
        peers: only who is to write the shape calls all, and the others call those who would have to write it first.
        """
        others = sorted(self._roster.others.values(), key=lambda seen: seen.peer)
        if len(fit(len(others) + 1, self.terms.group_size)) > 1 and others[0].peer < self.own:
            return [seen for seen in others[:_MAX_SMALLER] if seen.peer < self.own]
        # Each of us begins at its own place in the order, so no ids, however chosen, are called first by everybody.
        return sorted(others, key=lambda seen: (seen.peer < self.own, seen.peer))

    async def _watch_slot(self) -> None:
        """Announce this peer where it stands, and look who else is there."""
        while True:
            post = self._post
            if post is not None:
                await self._roster.stand(post.slot, self._endpoint, post.number, self.cell, self._company.slots)
            else:
                await self._roster.stand_nowhere()
            if post is self._post:
                with trio.CancelScope() as self._looking:
                    if post is not None:
                        await self._look(post)
                    if post is not None and trio.current_time() >= post.greets_at:
                        self._greet_mates(post)
                    if post is self._post:
                        await self._pause(self._poll_s(post))

    def _poll_s(self, post: _Post | None) -> float:
        """Return how long to wait before the next look at our slot."""
        if post is None:
            return _SLOW_POLL_S
        greets_in_s = post.greets_at - trio.current_time()
        return min(_MATCH_POLL_S if post.is_ready else _SLOW_POLL_S, greets_in_s if greets_in_s > 0 else math.inf)

    async def _look(self, post: _Post) -> None:
        """Look who stands in our slot, if it is time."""
        now = trio.current_time()
        # Where a round has begun, newcomers look for us.
        is_urgent = post.is_ready and not (post.company and self._company.has_met(post.slot))
        last = self._company.sought.get(post.slot, -math.inf)
        if now - last >= (_MATCH_POLL_S if is_urgent else _IDLE_POLL_S):
            self._company.sought[post.slot] = now
            found = await self._roster.look(post.slot)
            self._take_in(post, found)
            await self._join_phase(post)

    def _take_in(self, post: _Post, found: list[Seen]) -> None:
        """Make use of what the rendezvous shows. On a grid of several axes that is who was there in some round."""
        now = self._post
        if now is None or (now.slot, now.number) != (post.slot, post.number):
            return
        post = now  # a round may have begun meanwhile, and the next one is in the same slot
        mates = [seen for seen in found if seen.place.digest == self.terms.digest]
        for seen in mates:
            self._contacts.note(seen)
            if len(self.shape) == 1:
                self._meet(post, seen.peer)
            else:
                self._greet(post, seen.peer)
        self._pump(post)

    async def _join_phase(self, post: _Post) -> None:
        """Go to the phase in which most of our lines is, if we have come to be with a few others in another one.

        Exact cycles begin in the same phase for all; where every step is one round, two halves that are a round apart
        would never meet. A record is no proof, so those it speaks of have to be linked to us.
        """
        record, d, now = self.record, len(self.shape), trio.current_time()
        if record is None or d == 1 or self.terms.rounds == "exact" or now - self._phases_at < _IDLE_POLL_S:
            return
        most = self._waits.expected(record, post.number, self.cell)[1]
        if 2 * max(1 + len(post.company), self._known_size(post)) > most:
            return  # here is most of it
        self._phases_at = now
        lines = await self._roster.lines(record, self.cell)
        phases = Counter(seen.place.number % d for seen in lines)
        phase, n_there = max(phases.items(), key=lambda item: item[1], default=(0, 0))
        if phase == post.number % d or n_there < max(_MIN_AHEAD, 2 * (1 + phases[post.number % d])):
            return
        there = [seen for seen in lines if seen.place.number % d == phase]
        for seen in there:
            self._contacts.note(seen)
            self._contacts.call(seen.peer)
        is_known = sum(self._contacts.is_linked(seen.peer) for seen in there) >= _MIN_AHEAD
        if is_known and post is self._post and not post.is_ready:
            self._go_to(max(seen.place.number for seen in there), self.cell)

    async def _pause(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._nudged.wait()

    def _nudge(self) -> None:
        """Let the watchers look again at once."""
        self._nudged.set()
        self._nudged = trio.Event()

    def _look_elsewhere(self) -> None:
        """We stand somewhere else now, or nowhere: what is found where we stood is of no use."""
        self._looking.cancel()
        self._nudge()

    def _change(self) -> None:
        """Let `form` look again at once."""
        self._changed.set()
        self._changed = trio.Event()

    def step_aside(self) -> None:
        """Stand nowhere, so that nobody waits for us, until `come_back` or until a trainer wants a group."""
        post, self._post, self._is_aside = self._post, None, True
        if post is not None:
            self._stood = post
            post.matchmaker.cancel(trio.current_time(), "its trainer loads a state")
            self._pump(post)
            self._look_elsewhere()

    def come_back(self) -> None:
        """Stand where we stood before `step_aside`."""
        if self._is_aside:
            self._is_aside = False
            if self.record is not None:
                self._stand()
            post, before, self._stood = self._post, self._stood, None
            if post is not None and before is not None and post.slot == before.slot:
                for peer in filter(self._contacts.is_linked, sorted(before.company)):
                    self._meet(post, peer)  # they have forgotten us, and may begin before the rendezvous shows us again
                self._pump(post)

    async def find_peers(self) -> dict[PeerId, Endpoint | None]:
        """Return the other peers of this run that seem to be there, and where each can be dialled."""
        await self._roster.read()
        found = {peer: self._services.peers.get(peer) for peer in self.company}
        linked = {peer: link.endpoint for peer, link in found.items() if link is not None}
        return linked | {peer: seen.endpoint for peer, seen in self._roster.others.items()}

    # ------------------------------------------------------------------------------------------------- forming a group

    async def form(self, standing: Callable[[Cell], Standing], deadline: float) -> Begun | Alone:
        """Take part in the next round of the run; return the group, or why there is none.

        `standing` is called with this peer's cell once it is known. Bounded by `deadline` and the window.
        """
        self.come_back()
        self._wanted += 1
        try:
            if self.terms.rounds != "exact" and (self.number % max(1, len(self.shape)) == 0 or self._was_alone):
                await self._adopt(deadline)
            self._nudge()
            if not await self._await_shape(deadline):
                return self._alone(Alone(self.reason, {}))
            verdict, post = await self._match(standing, deadline, may_leave=True)
            if verdict is None:
                if self.terms.rounds == "exact":
                    self._enter_cycle()
                verdict, post = await self._match(standing, deadline)
            assert verdict is not None, "one leaves for another shape once in a call"
        finally:
            self._wanted -= 1
        self._was_alone = isinstance(verdict, Alone)
        self._was_deserted = self._was_alone and not self._is_accompanied(post)
        if self._was_alone:
            self.shaping.is_deserted()
        return self._alone(verdict) if isinstance(verdict, Alone) else verdict

    async def _await_shape(self, deadline: float) -> bool:
        """Wait until the run has a shape: one window while nobody else is there, and not at all the second time."""
        alone_until = min(deadline, trio.current_time() + self._services.limits.window_s)
        while self.record is None:
            now = trio.current_time()
            if self._roster.others:
                self._was_deserted = False
                self.reason = "the peers of this run have not agreed on its shape yet"
                if now >= deadline:
                    return False
            elif self._was_deserted or now >= alone_until:
                self._was_deserted = True
                self.reason = "nobody else has announced this run"
                return False
            with trio.move_on_at(min(deadline, now + _POLL_S)):
                await self._changed.wait()
        return True

    async def _match(
        self, standing: Callable[[Cell], Standing], deadline: float, *, may_leave: bool = False
    ) -> tuple[Begun | Alone | None, _Post]:
        """Be ready in the slot where this peer stands, until that comes to an end; None: it has gone over elsewhere."""
        post, record = self._post, self.record
        assert post is not None
        assert record is not None
        begins_cycle = axis_of(post.number, record.shape) == 0
        machine = post.matchmaker
        now = trio.current_time()
        post.is_ready = True
        try:
            if self._was_deserted and not self._is_accompanied(post):
                machine.cancel(now, "nobody else has announced this run")
            else:
                ticket = self._ticket(post, standing(self.cell), max(0.001, deadline - now))
                # On a grid that has come apart nobody knows how many a line has, but for those who have met there.
                n_known = self._known_size(post)
                line = self._waits.line(record, post.number, self.cell, n_known) if self._waits.is_apart else None
                limits = self._waits.limits(post.number, len(record.shape), post.company)
                machine.on_ready(now, ticket, limits, line if len(record.shape) > 1 else None)
                if machine.state is State.SEEKING:
                    self._greet_mates(post)
            self._pump(post)
            while machine.verdict is None:
                self.reason = machine.reason
                self._contacts.watch(self.pace.patience(post.company))
                latest = trio.current_time() + _MAX_TIMER_S
                with trio.move_on_at(min(machine.wakeup if machine.wakeup is not None else latest, latest)):
                    await self._changed.wait()
                machine.on_tick(trio.current_time())
                if self._is_left_behind(post):
                    machine.cancel(trio.current_time(), "the round of its line began without it")
                self._pump(post)
                waited_s = math.inf if begins_cycle else trio.current_time() - now
                if may_leave and self.shaping.may_leave(waited_s) and machine.verdict is None:
                    may_leave, place = False, None  # one try; meanwhile a group may begin after all
                    with trio.CancelScope() as self._leaving:
                        place = await self.shaping.next_place(deadline)
                    if place is not None and machine.verdict is None:
                        self._go_over(*place)
                        return None, post
        except BaseException:
            self._take_back(post)
            raise
        finally:
            self._contacts.watch({})
        self._pump(post)  # if that went wrong when the group began, we still have to move on
        self.reason = machine.reason
        self.pace.note_arrivals(machine.lateness(trio.current_time()))
        if isinstance(machine.verdict, Alone) and self._is_left_behind(post):
            self._go_to(self.number + 1, self.cell)
        elif isinstance(machine.verdict, Alone):
            await self._stay(deadline)
        return machine.verdict, post

    def _is_left_behind(self, post: _Post) -> bool:
        """Return whether most of our line has said that it is not here, and nobody that it is: they have gone on."""
        if len(self.shape) == 1 or self.record is None or self._is_accompanied(post):
            return False
        return 2 * len(post.quitters) > self._waits.expected(self.record, post.number, self.cell)[1]

    def _take_back(self, post: _Post) -> None:
        """The trainer does not want this any more."""
        verdict = post.matchmaker.verdict
        if isinstance(verdict, Begun):
            self._services.refuse(RoundId(verdict.begin.round_id))
        else:
            post.matchmaker.cancel(trio.current_time(), "cancelled by the trainer")
        if self._contacts.nursery is not None:  # else the run ends here, and this was its last stand
            self._go_to(self.number, self.last_cell if isinstance(verdict, Begun) else self.cell)
        self._pump(post)  # last, so that nobody waits for a peer that has just changed its mind

    def _alone(self, verdict: Alone) -> Alone:
        """Add what this peer knows beyond the slot."""
        self.reason = verdict.reason
        if self.differences and not verdict.missing:
            peer, difference = next(iter(self.differences.items()))
            self.reason += f"; {show_peer(peer)} uses other terms: {difference}"
        awaited = dict.fromkeys(self._roster.others, self.reason) if self.record is None else {}
        return Alone(self.reason, {**awaited, **self._contacts.absences, **self.differences, **verdict.missing})

    def _ticket(self, post: _Post, standing: Standing, time_left_s: float) -> Join:
        endpoint = self._endpoint
        assert self.record is not None
        return Join(
            run=self.run,
            slot=post.slot,
            digest=self.terms.digest,
            epoch=self.record.epoch,
            number=post.number,
            stamp=self._services.wall_ms(),
            standing=standing,
            host=endpoint.host if endpoint else "",
            port=endpoint.port if endpoint else 0,
            inbound=endpoint is not None and self._services.peers.is_reachable,
            bandwidth=self.pace.download(trio.current_time()),
            time_left_s=min(time_left_s, _MAX_LEFT_S),
            age=self.age,
            newest=self.shaping.to_tell(post.number),
        )

    # --------------------------------------------------------------------------------------------------- where we stand

    async def begin_cycle(self, deadline: float) -> None:
        """An exact cycle begins: go over to another shape if it is time, and stand where it begins."""
        await self._adopt(deadline)
        self._enter_cycle()

    def _enter_cycle(self) -> None:
        self.shaping.begin_cycle()
        self.start_cycle()

    def start_cycle(self) -> None:
        """Stand where the next exact cycle begins: all peers of a run start it at the same phase."""
        d = max(1, len(self.shape))
        if self.number % d:
            self._go_to(self.number + d - self.number % d, self.cell)

    def fall_back(self) -> None:
        """The round that began has failed here: our cell is still the old one."""
        if self.cell != self.last_cell:
            self._go_to(self.number, self.last_cell)

    def _move_on(self, post: _Post, begin: Begin) -> None:
        """Announce ahead: where we shall stand is known as soon as the round begins."""
        assert self.record is not None
        self.shaping.hear(begin.newest)
        self._leaving.cancel()
        self._begun, self.last_cell = post, self.cell
        place = [member.peer for member in begin.members].index(self.own)
        if len(self.record.shape) == 1:
            # On a single line they are our company for good, also those that only our leader had met so far.
            for member in begin.members:
                if member.peer != self.own:
                    peer = peer_id(member.peer)
                    self._contacts.came(peer, Endpoint(member.host, member.port) if member.port else None)
                    post.company.add(peer)
            self._stand(silent=frozenset(begin.left_out), together=frozenset(member.peer for member in begin.members))
        else:
            self._waits.note_size(self.record, begin, self.cell)
            others = {peer_id(member.peer): seat for seat, member in enumerate(begin.members) if seat != place}
            self._company.began(post.slot, begin.number, others)
            n_peers, shape = self.record.n_peers, self.record.shape
            cell = next_cell(self.cell, begin.number, place, n_peers, shape)
            mates = [
                p for p, seat in others.items() if next_cell(self.cell, begin.number, seat, n_peers, shape) == cell
            ]
            self._go_to(begin.number + 1, cell, mates)

    async def _stay(self, deadline: float) -> None:
        """There was no group. A cycle goes on all the same; and if our line is somewhere else, we join it there."""
        assert self.record is not None
        number, d = self.number, len(self.shape)
        is_cycle = self.terms.rounds == "exact" and d > 1
        self._go_to(number + 1 if is_cycle else number, self.cell)
        found = None
        with trio.move_on_at(deadline + _OVERTIME_S):  # a lookup may wait for nodes that are gone
            found = await self._roster.find_number(self.record, self.cell, near=number)
        # Who is less than a cycle behind is on its way to us.
        if found is not None and (found > number or found < number - d):
            self._go_to(found, self.cell)

    def _go_to(self, number: int, cell: Cell, mates: Sequence[PeerId] = ()) -> None:
        """Stand at `cell` for round `number`; the `mates` will be in the same cell."""
        self.number, self.cell = number, cell
        self._stand(mates=mates)

    def _stand(
        self,
        line_size: int | None = None,
        silent: frozenset[bytes] = frozenset(),
        together: frozenset[bytes] = frozenset(),
        mates: Sequence[PeerId] = (),
    ) -> None:
        """Take a fresh stand in the slot of `number` and `cell`.

        Those who are `silent` were waited for in vain; that one wait is all that a frozen peer costs. Who goes there
        `together` with us knows that by the same message, so nobody has to say so. `mates` go to our cell.
        """
        if self._is_aside:
            return
        record, old = self.record, self._post
        assert record is not None
        axis = axis_of(self.number, record.shape)
        line = line_of(self.cell, axis)
        key = slot(self.run, record, axis, line)
        line_low, d = line_size, len(record.shape)
        if line_size is None:
            line_low, line_size = self._waits.expected(record, self.number, self.cell)
        self._company.dwell([slot(self.run, record, phase, line_of(self.cell, phase)) for phase in range(d)])
        for peer in mates:
            self._company.expect(peer, key)
        limits = self._waits.first_limits()
        greets_at = trio.current_time() + _QUIET_S if self._company.has_met(key) else -math.inf
        machine = Matchmaker(
            self.own, key, self.run, self.number, self._compose, limits, line_size, line_low, record.epoch, d, greets_at
        )
        post = self._post = _Post(key, self.number, machine, greets_at)
        if old is not None and (old.slot, old.number) == (key, self.number):
            for peer in sorted(old.company):
                self._meet(post, peer, peer in silent, peer in together)
        else:
            self._look_elsewhere()
        for peer, here in self._company.take(key):
            self._hear(post, peer, here)
        if d > 1:
            post.pending.update(peer for peer in self._company.mates(key) if peer not in post.company)
            self._update_line(post)
            if not self._company.has_met(key):
                self._greet_mates(post)
        self._pump(post)

    def _greet(self, post: _Post, peer: PeerId) -> None:
        """Ask a peer that stood in this slot in an earlier round whether it does now; once, and nobody waits for it."""
        if peer not in post.company and peer not in post.greeted:
            post.greeted.add(peer)
            post.pending.add(peer)
            self._contacts.say(peer, post.matchmaker.greeting())

    def _greet_mates(self, post: _Post) -> None:
        """Greet all who stood here in the last round and have not said anything yet."""
        for peer in sorted(post.pending):
            self._greet(post, peer)
        post.matchmaker.on_tick(trio.current_time())
        self._pump(post)

    def _known_size(self, post: _Post) -> int:
        """Return how many of our line were here in its last round, or are now; 0 if we have not been in one yet.

        Those who have not answered count if they are linked: they are late, or their trainers do something else. In a
        new shape all count whom its roster names, as long as nothing speaks against it.
        """
        if len(self.shape) == 1 or not self._company.has_met(post.slot):
            return 0
        is_foreseen, is_linked = self._company.is_foreseen, self._contacts.is_linked
        return 1 + len(post.company) + sum(is_foreseen or is_linked(peer) for peer in post.pending)

    def _is_accompanied(self, post: _Post) -> bool:
        """Return whether anybody is known to be in our line, or to come there."""
        return bool(post.company) or any(map(self._contacts.is_linked, post.pending))

    def _update_line(self, post: _Post) -> None:
        """Somebody has answered, has come or has gone: tell the machine how many are to be waited for."""
        if self.record is not None and (n_known := self._known_size(post)):
            line = self._waits.line(self.record, post.number, self.cell, n_known)
            post.matchmaker.on_line(trio.current_time(), *line)

    def _compose(self, members: tuple[tuple[PeerId, Join], ...], left_out: dict[PeerId, str]) -> tuple[Begin, ...]:
        assert self.record is not None
        assert self._post is not None
        now, others = trio.current_time(), [peer for peer, _ in members if peer != self.own]
        left_out = {**dict.fromkeys(sorted(self._post.pending - {*others}), _NOT_HERE), **left_out}
        return compose_begins(
            members,
            left_out,
            shape=self.record.shape,
            n_peers=self.record.n_peers,
            exact=self.terms.rounds == "exact",
            rng=self._services.rng,
            progress_s=self.pace.progress_s(others),
            payload_bytes=self.terms.layout.payload_bytes,
            uploads={peer: self.pace.upload(now, peer) for peer in others},
            group_size=self.terms.group_size,
        )

    @property
    def _endpoint(self) -> Endpoint | None:
        endpoint = self._services.peers.endpoint
        return endpoint if endpoint.port else None

    # -------------------------------------------------------------------------------------------------------- company

    def _check_stack(self, begin: Begin) -> None:
        """Raise PeerError if we were to keep the pieces of too large a shard: a robust rule needs all at once."""
        share = sum(member.fraction for member in begin.members if member.peer == self._services.own)
        if share * (len(begin.members) - 1) > MAX_STACKED_VECTORS:
            raise PeerError(
                f"it begins a round in which this machine reduces {share:.0%} for {len(begin.members)} members: "
                f"with {self.terms.aggregate!r} that takes the memory of more than {MAX_STACKED_VECTORS} vectors"
            )

    def on_message(self, link: Link, message: Any) -> None:
        """A peer said something about this run, or about a slot of ours. Raises PeerError if it may not say that."""
        self._contacts.came(link.peer, link.endpoint)
        if isinstance(message, Begin) and message.chunk_bytes < MIN_CHUNK_BYTES:  # its books alone would keep us busy
            raise PeerError(
                f"it begins a round in chunks of {message.chunk_bytes} bytes: {MIN_CHUNK_BYTES} or more expected"
            )
        if isinstance(message, Begin) and self.terms.aggregate != "mean":
            self._check_stack(message)
        if isinstance(message, Begin) and self.record is not None and message.epoch == self.record.epoch:
            check_weights(message, self.shape, self.terms.rounds == "exact")
        if isinstance(message, RunTerms):
            self._on_terms(link, message)
            return
        if isinstance(message, Begin) and self._is_part_of(message):
            return  # passed on by a member that had it first; we had it from our leader
        has_terms = isinstance(message, Join | Begin)
        if isinstance(message, Here | Declined) or (has_terms and message.digest == self.terms.digest):
            self.shaping.hear(message.epoch, is_there=True)
        post = next((p for p in (self._post, self._begun) if p is not None and p.slot == message.slot), None)
        if isinstance(message, Here) and self._is_early(message):
            self._company.hear(link.peer, message)
            self._nudge()
            return
        if post is None:
            epoch = self.record.epoch if self.record is not None else 0
            if isinstance(message, Here | Join) and 0 < message.epoch < epoch:
                detail = f"the shape of the run's grid is number {epoch} here, {message.epoch} there"
                link.send(Declined(message.slot, "older_record", detail, epoch=epoch))
            elif isinstance(message, Join):
                link.send(Declined(message.slot, "other_number", f"the next round here is {self.number}"))
            self._nudge()  # it knows more of this run than we do
        else:
            self._hear(post, link.peer, message)
        if isinstance(message, Here) and (post is None or post.matchmaker.verdict is not None):
            self._company.expect(link.peer, message.slot)
            link.send(Quit(message.slot))  # nobody should wait for us there
        if isinstance(message, Begin) and not self._is_part_of(message):
            self._services.refuse(RoundId(message.round_id))

    def _is_early(self, here: Here) -> bool:
        """Whether somebody stands where we shall come, in a later round or in a newer shape, so we may then be late."""
        if self.record is None or self._is_aside:
            return False
        is_now = self._post is not None and self._post.slot == here.slot
        return here.epoch > self.record.epoch or (not is_now and self._company.is_early(here))

    def _hear(self, post: _Post, peer: PeerId, message: Any) -> None:
        """`peer` said something about the slot of `post`."""
        if isinstance(message, Join):
            message = replace(message, time_left_s=min(message.time_left_s, _MAX_LEFT_S))
        elif isinstance(message, Here) and peer in post.greeted:
            message = replace(message, answer=False)  # our greeting is on its way
        if isinstance(message, Here | Join) and post.matchmaker.may_meet(message.number):
            self._meet(post, peer)
        elif isinstance(message, Quit):
            post.company.discard(peer)
            post.pending.discard(peer)
            post.greeted.discard(peer)
            post.quitters.add(peer)
            self._company.quit(peer, post.slot)
        post.matchmaker.on_message(trio.current_time(), peer, message)
        self._update_line(post)
        self._pump(post)

    def stands_in(self, key: bytes) -> bool:
        """Return True if `key` is a slot of this lobby."""
        return any(post is not None and post.slot == key for post in (self._post, self._begun))

    def forget(self, peer: PeerId, key: bytes) -> None:
        """`peer` no longer stands in `key`, nor do we now: a slot of another round, or of a shape that is to come."""
        self._company.quit(peer, key)

    def on_gone(self, peer: PeerId, reason: str) -> None:
        """The peer said goodbye, or its link ended."""
        self._company.lose(peer)
        self._contacts.went(peer, reason)

    def _on_absent(self, peer: PeerId, reason: str) -> None:
        self._strangers.lose(peer)
        if self._post is not None:
            if peer in self._post.company:
                self._lost.add(peer)
            self._post.company.discard(peer)
            self._post.pending.discard(peer)
            self._update_line(self._post)
            self._post.matchmaker.on_gone(trio.current_time(), peer, reason)
            self._pump(self._post)

    def _on_back(self, peer: PeerId) -> None:
        """A peer that was absent is linked again. On a single line it is company as before."""
        self.shaping.is_back()
        was_lost = peer in self._lost
        self._lost.discard(peer)
        if was_lost and self._post is not None and len(self.shape) == 1:
            self._meet(self._post, peer)
            self._pump(self._post)
        elif was_lost and self._post is not None:
            self._post.greeted.discard(peer)
            self._greet(self._post, peer)

    def _on_terms(self, link: Link, message: RunTerms) -> None:
        difference = self._strangers.on_terms(link, message)
        if difference is not None:
            self._services.warn(
                f"{show_peer(link.peer)} uses run {self.run!r} with other terms: {difference}; we shall not meet"
            )

    def _is_part_of(self, begin: Begin) -> bool:
        verdicts = [post.matchmaker.verdict for post in (self._post, self._begun) if post is not None]
        return any(isinstance(v, Begun) and v.begin.round_id == begin.round_id for v in verdicts)

    def _meet(self, post: _Post, peer: PeerId, is_silent: bool = False, knows_us: bool = False) -> None:
        post.company.add(peer)
        post.pending.discard(peer)
        post.quitters.discard(peer)
        inbound = self._contacts.accepts_calls(peer)
        sighting = Sighting(peer, inbound, ready=False, stamp=0, silent=is_silent, knows_us=knows_us)
        post.matchmaker.on_sighted(trio.current_time(), sighting)

    def _pump(self, post: _Post) -> None:
        """Send what the machine has to say. Once a group begins, what else comes is for our stand in the next slot."""
        for action in post.matchmaker.take_actions():
            if faults.armed and isinstance(action.message, Join | Joined):
                faults.strike("propose")
            if faults.armed and isinstance(action.message, Begin):
                faults.strike("begin")
            self._contacts.say(action.peer, action.message)
        verdict = post.matchmaker.verdict
        if isinstance(verdict, Begun) and post is self._post:
            if faults.armed and not verdict.leader:
                faults.strike("begin")
            self._move_on(post, verdict.begin)
        self._change()
