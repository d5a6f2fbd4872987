"""One run on this daemon: its trainers, its memory, and its steps.

A step goes through four hands: the trainers' vectors become one (`_gather`), the lobby finds a group, a session
averages it, and the result is published in the out region that all trainers of the run share. In an exact run that is
a cycle of as many rounds as the grid has axes, each starting from the result of the one before; if a later round fails,
the result of the last good one stands. Nothing is written to a region that somebody may still read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import trio

from mpd.codecs import codec_named
from mpd.config import RoundLimits
from mpd.control import LoadState, StateLoaded, Step, Stepped
from mpd.errors import LocalError, RoundFailed
from mpd.grid import Cell, ShapeRecord
from mpd.ids import PeerId, RoundId, peer_id, show_peer
from mpd.layout import Terms
from mpd.mass import Shares, Standing, after, certificate, enter
from mpd.matchmaking import Alone
from mpd.messages import Begin
from mpd.reduce import combine, members_of
from mpd.robust import pool_for
from mpd.schedule import chunks

from . import faults
from .containment import UNEXPECTED, contained, report
from .history import History, left_out
from .loading import Loading
from .lobby import Lobby
from .memory import OutRegion, Region, give_up, private
from .sessions import RoundSession, Sessions
from .shelf import Commit, HeldState, Shelf
from .vault import RegionVault


class TrainerSeat:
    """One attached trainer: its in region, and its place in the run."""

    def __init__(self, run: "Run", label: str, in_region: Region) -> None:
        self.label = label
        self.in_region = in_region
        self.snapshot: Region | None = None
        self.known_out = run.out  # the out region that this trainer has mapped
        self._run = run

    @property
    def out_region(self) -> OutRegion:
        """The region in which results are published now."""
        return self._run.out

    async def open_snapshot(self) -> Region:
        """Return a second region of the in region's size; made at the first call. One call at a time."""
        if self.snapshot is None:
            self.snapshot = await Region.make(self.in_region.n_bytes)
        return self.snapshot

    async def step(self, request: Step) -> Stepped:
        """Take part in the run's next step. Cancelled: the trainer takes it back. Raises LocalError if it cannot be."""
        if request.source == "snapshot" and self.snapshot is None:
            raise LocalError("there is no snapshot region yet: ask for one before stepping from it")
        ask = _Ask(self, request)
        self._run.add(ask)
        try:
            await ask.answered.wait()
        finally:
            self._run.remove(ask)
        return ask.answer

    async def load_state(self, request: LoadState) -> tuple[StateLoaded, OutRegion | None]:
        """Get the run's vector from those who hold it; the region has it. Cancelled: the trainer takes it back."""
        answer, state = await self._run.load(request)
        if state is None:
            return answer, None
        self.known_out = state.region
        if state.region is self._run.out:
            self._run.readers.add(self)
        return answer, state.region

    def release(self, seq: int) -> None:
        """The trainer has copied its result."""
        self._run.readers.discard(self)

    def close(self) -> None:
        """The trainer has gone."""
        self._run.leave(self)
        for region in (self.in_region, self.snapshot):
            if region is not None:
                region.close()

    def source(self, request: Step) -> memoryview:
        """Return the memory that `request` wants averaged."""
        region = self.snapshot if request.source == "snapshot" else self.in_region
        assert region is not None
        return region.view


@dataclass(eq=False)
class _Ask:
    """One trainer's wish for a step."""

    seat: TrainerSeat
    request: Step
    answered: trio.Event = field(default_factory=trio.Event)
    answer: Stepped = field(init=False)

    def __post_init__(self) -> None:
        reason = f"kept the old values: {UNEXPECTED}; the others may have averaged"
        self.answer = Stepped(self.request.seq, averaged=False, reason=reason)  # unless there is a better one


@dataclass
class _Tally:
    """What a step has come to so far."""

    began: float
    vector: memoryview | None = None  # the result of the last round that succeeded
    exact: bool = False
    heads: int = 0
    heads_certified: bool = False
    peers: dict[PeerId, None] = field(default_factory=dict)
    contributors: tuple[PeerId, ...] = ()
    confirmed: tuple[PeerId, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    trainers: dict[str, str] = field(default_factory=dict)  # of this machine, that had not asked: part of `missing`
    rounds: int = 0
    commit: Commit = field(default_factory=lambda: Commit(b"", 0, b""))
    failures: list[str] = field(default_factory=list)
    met: bool = False  # a group began, so others may have averaged although we did not
    bytes_sent: int = 0
    bytes_received: int = 0


class Run:
    """A run and everything of it that lives on this daemon. `vanished` is called when its last trainer has gone.

    `shelf` is where its results are published, and closed in the end; `load` gets the vector of others.
    """

    def __init__(
        self, name: str, terms: Terms, lobby: Lobby, sessions: Sessions, limits: RoundLimits, shelf: Shelf
    ) -> None:
        self.name = name
        self.terms = terms
        self.lobby = lobby
        self.shelf = shelf
        self.loading: Callable[[LoadState], Loading]  # set by whoever knows the peers
        self.seats: list[TrainerSeat] = []
        self.readers: set[TrainerSeat] = set()  # who may still copy from the out region
        self.rounds = 0
        self.history = History(name)
        self.vanished: Callable[[], None] = lambda: None
        self.idle = trio.Event()  # replaced by a new one for the length of each step
        self.idle.set()
        self._sessions = sessions
        self._limits = limits
        self._loads = trio.Lock()
        self._pool = pool_for(terms.aggregate)
        self._generation = 0
        self._asks: list[_Ask] = []
        self._asked = trio.Event()
        self._current: list[_Ask] = []
        self._scope: trio.CancelScope | None = None
        self._session: RoundSession | None = None  # the round that the step in progress waits for
        self._standing: Standing | None = None  # from one step to the next, where a step is one round
        self._spare: memoryview | None = None  # between the rounds of an exact cycle
        self._gathered: memoryview | None = None  # where several trainers are averaged first
        self._lingering: list[tuple[memoryview, RoundSession]] = []
        self._nursery: trio.Nursery | None = None

    @property
    def out(self) -> OutRegion:
        """Where results are published now."""
        return self.shelf.out

    # -------------------------------------------------------------------------------------------------------- trainers

    def sit(self, label: str, in_region: Region) -> TrainerSeat:
        """Attach a trainer whose values will lie in `in_region`, which its seat closes."""
        seat = TrainerSeat(self, label, in_region)
        self.seats.append(seat)
        return seat

    def leave(self, seat: TrainerSeat) -> None:
        """A trainer has gone; with the last one the run ends on this daemon."""
        if seat in self.seats:
            self.seats.remove(seat)
            self.readers.discard(seat)
            self._wake()
            if not self.seats:
                self._free()
                self.vanished()

    async def load(self, request: LoadState) -> tuple[StateLoaded, HeldState | None]:
        """Get the vector of this run from those who hold it. One at a time: whoever waited finds it here already."""
        loading = self.loading(request)  # its time runs from now on
        with trio.move_on_after(request.timeout_s) as patience:
            await self._loads.acquire()
        if patience.cancelled_caught:
            reason = f"it took longer than {request.timeout_s:g} s: another trainer of this machine loads just now"
            return StateLoaded(request.seq, False, reason, seconds=request.timeout_s), None
        try:
            if len(self.seats) == 1:  # nobody here steps meanwhile, so no other peer should wait for us
                self.lobby.step_aside()
            loaded = await loading.run()
        finally:
            self.lobby.come_back()
            self._loads.release()
        self.lobby.age = self.shelf.age
        return loaded

    def add(self, ask: _Ask) -> None:
        """A trainer wants a step; whatever it was given before it has copied by now."""
        self.readers.discard(ask.seat)
        self._asks.append(ask)
        self._wake()

    def remove(self, ask: _Ask) -> None:
        """A trainer takes its wish back, or has its answer."""
        if ask in self._asks:
            self._asks.remove(ask)
            self._wake()
        if ask in self._current:
            self._current.remove(ask)
            if not self._current and self._scope is not None:
                self._scope.cancel()

    def _wake(self) -> None:
        self._asked.set()
        self._asked = trio.Event()

    # ----------------------------------------------------------------------------------------------------------- steps

    async def serve(self) -> None:
        """Do the steps that trainers ask for, until cancelled."""
        self.shelf.end_write()  # an unexpected end of the last time has left that undone,
        self._answer_all(None)  # and these waiting
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self.lobby.serve)
            while True:
                while not self._asks:
                    await self._asked.wait()
                await self._step()

    async def _step(self) -> None:
        self.idle = trio.Event()
        tally, n_before = _Tally(began=trio.current_time()), self.history.n_added
        with trio.CancelScope() as self._scope:
            try:
                await self._collect(tally)
                if self._current:
                    await self._average(tally)
                if tally.vector is not None and self._current:
                    self._publish(tally)
            except (RoundFailed, LocalError) as error:
                tally.failures.append(str(error))
                self._remember_step(tally, str(error), tally.missing)
            except Exception as error:  # noqa: BLE001  # a bug costs the step
                report("step", error)
                tally.failures.append(UNEXPECTED)
                tally.vector = None  # it may be the very thing that is broken
                self._remember_step(tally, UNEXPECTED, tally.missing)
        if self._scope.cancelled_caught and self.history.n_added == n_before:
            self._remember_step(tally, "cancelled by the trainer", tally.missing)
        self.shelf.end_write()
        self._answer_all(tally)

    def _answer_all(self, tally: _Tally | None) -> None:
        """Tell every trainer of the step how it went; without a `tally`, that nobody knows."""
        for ask in self._current:
            if tally is not None:
                with contained("step"):
                    ask.answer = self._answer(ask, tally)
            ask.answered.set()
        self._current, self._scope = [], None
        self.idle.set()

    async def _collect(self, tally: _Tally) -> None:
        """Wait for all trainers of this run, half a window at most: other peers wait for us meanwhile."""
        with trio.move_on_after(min(self._limits.window_s, self._asks[0].request.timeout_s) / 2):
            while 0 < len({ask.seat for ask in self._asks}) < len(self.seats):
                await self._asked.wait()
        self._current, self._asks = self._asks, []
        asked = {ask.seat for ask in self._current}
        for seat in self.seats:
            if seat not in asked:
                tally.trainers[f"trainer {seat.label}"] = "had not asked for a step when the window ended"
        tally.missing.update(tally.trainers)

    async def _gather(self) -> tuple[memoryview, float]:
        """Return one vector and its weight for all trainers that asked."""
        asks = list(self._current)
        vectors = [ask.seat.source(ask.request) for ask in asks]
        if len(asks) == 1:
            return vectors[0], asks[0].request.weight
        if self._gathered is None:
            self._gathered = await private(self.terms.layout.n_bytes)
        weights = [ask.request.weight for ask in asks]
        segments = self.terms.layout.segments
        await trio.to_thread.run_sync(combine, vectors, weights, segments, self._gathered)
        return self._gathered, sum(weights)

    async def _average(self, tally: _Tally) -> None:
        deadline = tally.began + min(ask.request.timeout_s for ask in self._current)
        await self._renew_out()
        vector, weight = await self._gather()
        await trio.lowlevel.checkpoint_if_cancelled()  # a thread did that, and the run may have ended meanwhile
        is_exact = self.terms.rounds == "exact"
        standing = None if is_exact else self._standing  # only heads move from step to step
        self._standing = None
        if is_exact:
            await self.lobby.begin_cycle(deadline)
        turn = 0
        while True:
            turn += 1
            entering, record, number = standing, self.lobby.record, self.lobby.number

            def bring(
                cell: Cell, entering: Standing | None = entering, record: ShapeRecord | None = record
            ) -> Standing:
                # If our line has gone on to the next cycle, we begin that with everybody else: afresh.
                is_same_grid = self.lobby.record is record
                return self._bring(entering if is_same_grid else None, self.lobby.number, weight, cell)

            verdict = await self.lobby.form(bring, deadline)
            if self.lobby.record is not record:  # the run goes on in another shape, and we begin there afresh
                standing, turn = None, 1
            n_rounds = max(1, len(self.lobby.shape)) if is_exact else 1
            n_left = -self.lobby.number % n_rounds  # the lobby stands where the next round will be
            where = "" if n_rounds == 1 else f"round {n_rounds - n_left} of {n_rounds}: "
            if isinstance(verdict, Alone):
                tally.failures.append(where + verdict.reason)
                missing = {show_peer(peer): why for peer, why in verdict.missing.items()}
                tally.missing.update(missing)
                self._remember_step(tally, where + verdict.reason, {**tally.trainers, **missing})
                if self.lobby.record is record:
                    self.lobby.shaping.note_round(number, 1)
                tally.heads_certified = False
                ends_cycle = True
            else:
                best = tally.vector if tally.vector is not None else vector
                begins_cycle = verdict.begin.number % n_rounds == 0
                absent = {**tally.trainers, **left_out(verdict, self.lobby.overlooked)}
                target = await self._target(verdict.begin, best, n_left)
                source = vector if begins_cycle else best
                session = await self._exchange(verdict.begin, source, target, deadline, absent)
                number = verdict.begin.number
                standing = self._bring(standing, number, weight, self.lobby.last_cell)
                standing = self._account(tally, session, standing, where, absent)
                ends_cycle = (number + 1) % max(1, len(self.lobby.shape)) == 0
            if not n_left or turn == n_rounds:
                break
        if is_exact or ends_cycle:
            self.lobby.shaping.note_cycle(tally.heads, is_certified=tally.heads_certified)
        if not is_exact:
            self._standing = standing

    def _bring(self, standing: Standing | None, number: int, weight: float, cell: Cell) -> Standing:
        """Return what we bring into round `number` at `cell`, if `standing` is what the round before has left us."""
        if standing is None or number % max(1, len(self.lobby.shape)) == 0:
            return enter(weight, cell)
        if self.terms.rounds != "exact":  # plain weights, whatever happens
            standing = replace(standing, mass=enter(weight, cell).mass)
        return replace(standing, cell=cell)

    async def _exchange(
        self, begin: Begin, source: memoryview, target: memoryview, deadline: float, absent: dict[str, str]
    ) -> RoundSession:
        """Run one round from `source` to `target`; return its session, finished. A cancelled one names `absent`."""
        assert self._nursery is not None
        members = begin.members
        plan = chunks(self.terms.layout.segments, [member.fraction for member in members], begin.chunk_bytes)
        me = [member.peer for member in members].index(self.lobby.own)
        vault = RegionVault(plan, source, target, [member.weight for member in members], me)
        vault.use(codec_named(self.terms.codec), self._pool)
        others = [peer_id(member.peer) for member in members if member.peer != self.lobby.own]
        pace = self.lobby.pace
        progress_s = pace.accept_progress_s(begin.progress_s, others)
        session = self._sessions.begin(begin, me, vault, deadline, progress_s, pace.patience(others))
        self._lingering.append((target, session))
        self._nursery.start_soon(self._carry, session)
        self._session = session
        try:
            await session.finished.wait()
        except trio.Cancelled:
            session.cancel("cancelled by the trainer")
            self.history.add_round(session, session.result(), absent)
            raise
        finally:
            self._session = None
        return session

    async def _carry(self, session: RoundSession) -> None:
        try:
            with contained("round"):
                await session.run()
            session.cancel(UNEXPECTED)  # which says nothing if it is gone, as it should be
        finally:
            session.cancel("this daemon is leaving")
            self._sessions.end(session)
            self._lingering = [(view, other) for view, other in self._lingering if other is not session]

    async def _target(self, begin: Begin, best: memoryview, rounds_left: int) -> memoryview:
        """Return where the result of a round goes: not over the best one so far, and the last into the out region."""
        self.shelf.begin_write()
        target = self.out.view
        if best is target or (rounds_left % 2 == 1 and best is not self._spare):
            try:
                if self._spare is None:
                    self._spare = await private(self.terms.layout.n_bytes)
            except BaseException:
                self._sessions.refuse(RoundId(begin.round_id))
                self.lobby.fall_back()
                raise
            target = self._spare
        self._reclaim(target)
        return target

    def _reclaim(self, view: memoryview) -> None:
        """End the rounds that still serve others from `view`: it is about to be written."""
        for other, session in list(self._lingering):
            if other is view:
                session.cancel("the memory of this round is needed for the next one")

    def _account(
        self, tally: _Tally, session: RoundSession, standing: Standing, where: str, absent: dict[str, str]
    ) -> Standing | None:
        """Add a finished round, from which `absent` were missing, to the tally; return our standing in the next one."""
        begin, result = session.begin, session.result()
        self.lobby.pace.note_round(trio.current_time(), session.reports())
        tally.met = True
        tally.bytes_sent += result.bytes_sent
        tally.bytes_received += result.bytes_received
        tally.peers.update(dict.fromkeys(session.members))
        tally.missing.update(absent)
        tally.missing.update((show_peer(session.members[i]), why) for i, why in result.missing.items())
        self.history.add_round(session, result, absent)
        if not result.success:
            tally.failures.append(where + result.reason)
            tally.heads_certified = False
            self.lobby.shaping.note_round(begin.number, len(begin.members) * begin.parts)
            self.lobby.fall_back()
            return standing if standing.seen >= 0 else None
        self.rounds += 1
        tally.rounds += 1
        tally.vector = session.vault.slots
        metadata = next((ask.request.metadata for ask in self._current if ask.request.metadata), b"")
        tally.commit = Commit(begin.round_id, begin.age, metadata)
        tally.contributors = tuple(session.members[i] for i in members_of(result.contributors))
        tally.confirmed = tuple(session.members[i] for i in members_of(result.confirmed))
        record = self.lobby.record
        assert record is not None
        shares = Shares(
            number=begin.number,
            shape=record.shape,
            weights=tuple(member.weight for member in begin.members),
            heads=tuple(member.heads for member in begin.members),
            whole=begin.whole,
            parts=begin.parts,
        )
        tally.heads_certified, tally.heads = certificate(shares, result.contributors)
        # One round is the mean of all only if all are in it; and nothing but a mean can be certified.
        is_whole_cycle = self.terms.rounds == "exact" or len(record.shape) == 1
        tally.exact = tally.heads_certified and is_whole_cycle and self.terms.aggregate == "mean"
        self.lobby.shaping.note_round(begin.number, len(begin.members) * begin.parts)
        return after(standing, session.me, shares, result.contributors, begin.round_id, record.n_peers)

    def _remember_step(self, tally: _Tally, reason: str, missing: dict[str, str]) -> None:
        """Keep for `mpd rounds` that a step, or a round of it, came to no group."""
        record = self.lobby.record
        epoch = record.epoch if record is not None else 0
        self.history.add_step(self.lobby.number, epoch, reason, missing, trio.current_time() - tally.began)

    @property
    def state(self) -> str:
        """What the run does now, and what it waits for, in one sentence."""
        if self.idle.is_set():
            has_shape = self.lobby.record is not None
            return "idle: no trainer has asked for a step" if has_shape else self.lobby.reason
        if not self._current:
            asked = {ask.seat for ask in self._asks}
            late = [seat.label for seat in self.seats if seat not in asked]
            return f"waiting for {len(late)} of {len(self.seats)} trainers of this machine to ask: {', '.join(late)}"
        if self._session is None or self._session.finished.is_set():
            return self.lobby.reason
        n_others = len(self._session.members) - 1
        others = f"{n_others} other peer{'s' * (n_others != 1)}"
        return f"averaging with {others}, waiting for {self._session.exchange.waiting_for()}"

    # ---------------------------------------------------------------------------------------------------------- memory

    async def _renew_out(self) -> None:
        """If a trainer is still copying the last result, leave that region to it for good and take a new one."""
        if self.readers:
            if not self.shelf.turn():
                self.shelf.replace(await OutRegion.make(self.terms.layout.n_bytes))
            self.readers.clear()

    def _free(self) -> None:
        """Let go of everything large now: what ends the run waits for other peers."""
        self.shelf.close()
        unused = [view for view in (self._spare, self._gathered) if view is not None]
        self._spare = self._gathered = None
        give_up(unused)

    def _publish(self, tally: _Tally) -> None:
        vector = tally.vector
        assert vector is not None
        if vector is not self.out.view:
            self._reclaim(self.out.view)
            self.out.view[:] = vector
        if faults.armed:
            faults.strike("write-back")
        self._generation += 1
        self.out.publish(self._generation)
        self.shelf.publish(tally.commit)
        self.lobby.age = self.shelf.age

    def _answer(self, ask: _Ask, tally: _Tally) -> Stepped:
        averaged = tally.vector is not None
        new_out = averaged and ask.seat.known_out is not self.out
        if averaged:
            ask.seat.known_out = self.out
            self.readers.add(ask.seat)
        contributors = {show_peer(peer) for peer in tally.contributors}
        return Stepped(
            seq=ask.request.seq,
            averaged=averaged,
            reason=_reason(tally),
            exact=averaged and tally.exact,
            heads=tally.heads if averaged else 0,
            peers=tuple(map(show_peer, tally.peers)),
            contributors=tuple(sorted(contributors)),
            confirmed=tuple(sorted(map(show_peer, tally.confirmed))),
            missing={peer: why for peer, why in tally.missing.items() if peer not in contributors},
            rounds=tally.rounds,
            seconds=trio.current_time() - tally.began,
            bytes_sent=tally.bytes_sent,
            bytes_received=tally.bytes_received,
            generation=self._generation if averaged else 0,
            new_out=new_out,
        )


def _reason(tally: _Tally) -> str:
    failures = "; ".join(tally.failures)
    if tally.vector is not None:
        met = f"averaged with {len(tally.peers) - 1} other peer{'s' * (len(tally.peers) != 2)}"
        return f"{met}; {failures}" if failures else met
    others = "; the others may have averaged" if tally.met else ""
    return f"kept the old values: {failures or 'cancelled'}{others}"
