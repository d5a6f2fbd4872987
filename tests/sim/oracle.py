"""What must hold whatever goes wrong, looked at after every event of every machine.

* I1: a closed version of a chunk is the weighted mean of the inputs of its contributors, and is closed once.
* I2: all members of a round that ever succeed, also if they die a moment later, hold the same bytes and the same sets.
* I3: what was published is not written again, and inputs do not change while their round is on.
* I4: every member ends by its own deadline, and every step by its trainer's; a round in which a majority was let alone
  succeeds for all of that majority.
* I5: contributors are in the mean, the missing are not, whoever is confirmed did not succeed with anything else; a
  result that is certified as the exact mean of H peers is that.
* I8: after one crash nothing travels twice to the same member, and repair stays within its bound; only where links are
  quick, because a coordinator that has a quorum waits a quarter of a second for the word of those who still write.

The books are kept per round, and survive the members that wrote them.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sim.faults import Fault
from sim.peer import CODE, MAX_PEERS, Daemon, Memory, peer_of

from mpd.control import StateLoaded, Stepped
from mpd.daemon.sessions import RoundSession
from mpd.exchange import Ended
from mpd.ids import show_peer
from mpd.messages import Begin
from mpd.reduce import members_of
from mpd.wire import Header, Kind

if TYPE_CHECKING:
    from sim.wires import Link
    from sim.world import World

SLACK_S = 0.3  # a session looks at its machine's timers every 0.1 s
AMPLE_S = 12.0  # a round with that much time must not run out of it
AFTERMATH_S = 4.0  # links that a fault has hurt may end that much later


class Violation(AssertionError):
    """A promise is broken."""


@dataclass
class Live:
    """A round as one member lives it."""

    daemon: Daemon
    session: RoundSession
    inputs: bytes
    began_s: float
    ended_s: float = 0.0
    result: bytes = b""
    is_served: bool = True  # to whoever still asks for it, so it must not change

    time_s: float = 0.0  # that it had

    @property
    def deadline(self) -> float:
        return self.session.exchange._round.deadline


@dataclass
class Book:
    """A round as everybody lived it. `closed` has who closed which version of which chunk."""

    begin: Begin
    lives: dict[int, list[Live]] = field(default_factory=dict)  # by place
    closed: dict[tuple[int, int], int] = field(default_factory=dict)
    first: tuple[list[int], bytes] | None = None  # the first success
    has_leaver: bool = False  # somebody left while others may still have wanted something
    has_death: bool = False  # a member died in the middle of it
    n_again: int = 0  # results that came to a member that had them
    n_repairs: int = 0  # pieces and results of redone versions, results from somebody else than their writer
    n_early: int = 0  # redone results that overtook their plan: those are dropped, and travel twice
    n_lacked: int = 0  # chunks of the dead that some survivor lacked, at the time of death

    def inputs(self, place: int) -> npt.NDArray[np.float64]:
        return np.frombuffer(self.lives[place][0].inputs, np.float64)


class Oracle:
    """Listens to all machines of a world."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.books: dict[bytes, Book] = {}
        self.n_averaged = 0
        self.n_certified = 0
        self.n_left_behind = 0  # rounds lost because others needed their memory for the next one
        self.n_loaded = 0  # vectors that trainers got from others, or had held here
        self.n_fetched = 0  # those that came over links
        self.n_in_vain = 0  # loads that got none
        self.n_kept = 0  # steps that kept the old values
        self.last: dict[int, Stepped] = {}  # what each machine's trainer was given last, of the mean
        self.last_kept: dict[int, Stepped] = {}  # and of its own old values
        self._live: dict[Daemon, list[Live]] = {}
        self._weights: dict[tuple[int, int], float] = {}  # (peer, step) -> weight of its trainer
        world.network.watch_record = self._on_record
        world.network.blame = self._on_blame

    def violated(self, what: str) -> None:
        raise Violation(f"at {self.world.scheduler.now:.3f} s: {what}")

    def check(self, condition: object, what: str) -> None:
        if not condition:
            self.violated(what)

    # what happens

    def listen(self, daemon: Daemon) -> None:
        """A new life: hear of its rounds."""
        begin_round = daemon.sessions.begin

        def begin(begin: Begin, me: int, vault: Any, *limits: Any, **named_limits: Any) -> RoundSession:
            book = self.books.setdefault(begin.round_id, Book(begin))
            self.check(book.begin == begin, "I2: two BEGINs have one round id")
            close = vault.close

            def watched(chunk: int, contributors: int) -> None:
                close(chunk, contributors)
                self._on_closed(book, daemon, me, vault, chunk, contributors)

            vault.close = watched

            def watched_cancel(reason: str) -> None:
                if not live.session.gone.is_set():
                    book.has_leaver = True  # whoever needs the memory for its next round serves nobody any more
                    self._check_result(live)
                    live.is_served = False  # the next round may write over its result, before we look again
                RoundSession.cancel(live.session, reason)

            book.lives.setdefault(me, [])
            live = Live(daemon, None, bytes(vault._inputs), self.world.scheduler.now)  # type: ignore[arg-type]
            book.lives[me].append(live)
            self.check(len(book.lives[me]) == 1, f"member {me} enters round {begin.round_id.hex()} a second time")
            live.session = begin_round(begin, me, vault, *limits, **named_limits)
            live.session.cancel = watched_cancel  # type: ignore[method-assign]
            live.time_s = live.deadline - daemon.machine.clock()
            self._live.setdefault(daemon, []).append(live)
            self.world.has_begun(daemon.index)
            return live.session

        daemon.sessions.begin = begin  # type: ignore[method-assign, assignment]

    def look(self, daemon: Daemon) -> None:
        """Something has happened on this machine."""
        rounds = self._live.get(daemon)
        if not rounds:
            return
        for live in list(rounds):
            if not live.ended_s:
                if live.session.exchange.ended is not None:
                    self._on_ended(live)
                else:
                    late_s = daemon.machine.clock() - max(live.deadline, daemon.thawed_at)
                    self.check(late_s < SLACK_S, f"I4: {daemon.index} is {late_s:.1f} s over the deadline of its round")
            if live.ended_s and live.session.gone.is_set():
                self._check_result(live)
                rounds.remove(live)

    def _check_result(self, live: Live) -> None:
        if live.result and live.is_served:
            self.check(live.result == live.session.vault.slots, "I3: a published result was written again")

    def has_died(self, daemon: Daemon) -> None:
        """Count what the survivors of its rounds lack of what it was to write."""
        for live in self._live.pop(daemon, []):
            book = self.books[live.session.begin.round_id]
            book.has_death = True
            rest = [other for lives in book.lives.values() for other in lives if other.daemon is not daemon]
            for chunk, (version, writer) in enumerate(live.session.exchange._chunks.plan.table):
                lacking = any(other.session.exchange._chunks.versions[chunk] != version for other in rest)
                book.n_lacked += writer == live.session.me and (lacking or len(rest) < len(book.begin.members) - 1)

    def _on_closed(self, book: Book, daemon: Daemon, me: int, vault: Any, chunk: int, contributors: int) -> None:
        live = next(live for live in book.lives[me] if live.daemon is daemon)
        machine = live.session.exchange if live.session is not None else None
        version = machine._chunks.plan.table[chunk][0] if machine is not None else 0
        self.check((chunk, version) not in book.closed, f"I1: version {version} of chunk {chunk} is closed twice")
        book.closed[chunk, version] = me
        self._check_mean(book, vault, chunk, contributors, bytes(vault.slot_view(chunk)))

    def _check_mean(self, book: Book, vault: Any, chunk: int, contributors: int, content: bytes) -> None:
        self.check(contributors, f"I1: chunk {chunk} has no contributors")
        places = members_of(contributors)
        self.check(all(place in book.lives for place in places), "I1: a contributor has never begun")
        weights = [book.begin.members[place].weight for place in places]
        piece = slice(vault.chunks[chunk].offset // 8, vault.chunks[chunk].end // 8)
        total = sum(w * book.inputs(place)[piece] for w, place in zip(weights, places, strict=True))
        is_mean = np.allclose(np.frombuffer(content, np.float64), total / sum(weights), rtol=1e-12, atol=0)
        self.check(is_mean, f"I1: chunk {chunk} is not the mean of {contributors:#b}")

    def _on_ended(self, live: Live) -> None:
        session = live.session
        machine, vault, book = session.exchange, session.vault, self.books[session.begin.round_id]
        live.ended_s = self.world.scheduler.now
        self.check(live.inputs == vault._inputs, "I3: inputs changed while their round was on")
        if machine.ended is not Ended.SUCCESS:
            self.check(machine.reason, "I5: a round fails without a reason")
            return
        masks, live.result = list(machine.chunk_contributors), bytes(vault.slots)
        if book.first is None:
            book.first = masks, live.result
            for chunk, mask in enumerate(masks):
                place = vault.chunks[chunk]
                self._check_mean(book, vault, chunk, mask, live.result[place.offset : place.end])
        self.check(book.first == (masks, live.result), f"I2: {live.daemon.index} succeeds with other bytes or sets")
        everyone = (1 << len(book.begin.members)) - 1
        self.check(
            sorted(machine.missing) == list(members_of(everyone & ~machine.contributors)),
            "I5: the missing are not those who are no contributors",
        )

    def _on_record(self, link: "Link", header: Header) -> None:
        book = self.books.get(header.round_id)
        if book is None:
            return
        for live in self._live.get(self.world.daemons[link.owner.index], []):
            if live.session.round_id == header.round_id:
                machine = live.session.exchange
                if header.kind is Kind.CHUNK:
                    book.n_early += header.version > machine._agreement.plan.epoch
                    book.n_again += machine.holds(header.chunk, header.version)
                    sender = live.session.place_of(link.peer)
                    written_by = book.closed.get((header.chunk, header.version))
                    book.n_repairs += header.version > 0 or sender != written_by
                else:
                    book.n_repairs += header.version > 0

    def _on_blame(self, link: "Link", error: Exception) -> None:
        self.violated(f"{link.owner.index} blames {link.far.owner.index}, which is honest: {error}")

    # steps

    def will_step(self, daemon: Daemon, step: int, weight: float) -> None:
        self._weights[daemon.index, step] = weight

    def check_published(self, daemon: Daemon, region: Any) -> None:
        """The trainer is about to ask again: what it was given last is what it was given then."""
        memory: Memory = region
        if memory.published:
            self.check(memory.published == memory.view, "I3: what the trainer was given was written again")
        memory.published = b""  # by asking it lets go of that

    def judge_step(self, daemon: Daemon, stepped: Stepped, region: Any, began: float, timeout_s: float) -> None:
        """A trainer has its answer."""
        late_s = daemon.machine.clock() - max(began + timeout_s, daemon.thawed_at)
        self.check(late_s < 1.0, f"I4: a step of {timeout_s:g} s took {late_s:.1f} s more: {stepped.reason}")
        self.check(stepped.reason, "I5: an outcome without a reason")
        self.check(not set(stepped.missing) & set(stepped.contributors), "I5: a contributor is missing")
        memory: Memory = region
        if not stepped.averaged:
            self.n_kept += 1
            self.last_kept[daemon.index] = stepped
            memory.published = (
                b""  # the trainer has let go of the last result: a round that failed may have begun on it
            )
            self.check(
                not stepped.contributors and not stepped.exact, "I5: nothing was averaged, and somebody is named"
            )
            return
        self.n_averaged += 1
        self.last[daemon.index] = stepped
        self.check(memory.published == memory.view, "I3: the result is not what was published")
        rows = self._rows(memory)
        names = {show_peer(peer_of(index)): index for index in range(self.world.n)}
        in_all = {index for index in names.values() if (rows[:, index] > 0).all()}
        if self.world.rounds == 1:
            named = {names[name] for name in stepped.contributors}
            self.check(named == in_all, f"I5: {named} are named as contributors, {in_all} are")
        if stepped.exact:
            self.n_certified += 1
            self._check_certified(rows, stepped)

    def judge_load(
        self, daemon: Daemon, seat: Any, answer: StateLoaded, region: Any, began: float, timeout_s: float
    ) -> bytes:
        """A trainer has what it asked to load, if anything: return it. It is the result of the round that it says."""
        late_s = daemon.machine.clock() - max(began + timeout_s, daemon.thawed_at)
        self.check(late_s < 1.0, f"I4: a load of {timeout_s:g} s took {late_s:.1f} s more: {answer.reason}")
        self.check(answer.reason, "I5: an outcome without a reason")
        self.check(answer.loaded == (region is not None), "I5: loaded, and nothing is there")
        if region is None:
            self.n_in_vain += 1
            return b""
        self.n_loaded += 1
        self.n_fetched += bool(answer.sources)
        state = next((state for state in seat._run.shelf.held if state.region is region), None)
        if state is None:
            self.violated("I3: a region is given to a trainer that nobody holds for it")
        else:
            book = self.books[state.manifest.round_id]
            self.check(book.begin.age == answer.number, "I5: the vector is of another age than was said")
            self.check(book.first and book.first[1] == region.view, f"I1: {daemon.index} loads what no round left")
        return bytes(region.view)

    def _rows(self, memory: Memory) -> npt.NDArray[np.float64]:
        values = np.frombuffer(memory.view, np.float64)
        return values[: len(values) // CODE * CODE].reshape(-1, CODE)

    def _check_certified(self, rows: npt.NDArray[np.float64], stepped: Stepped) -> None:
        self.check(np.allclose(rows, rows[0], rtol=1e-9, atol=0), "I5: certified, and chunks differ in their peers")
        row = rows[0]
        peers = [int(index) for index in np.flatnonzero(row[:MAX_PEERS])]
        self.check(len(peers) == stepped.heads, f"I5: certified for {stepped.heads} peers, {peers} are in it")
        steps = [round(row[MAX_PEERS + peer] / row[peer]) for peer in peers]
        weights = np.array([self._weights.get((peer, step), np.nan) for peer, step in zip(peers, steps, strict=True)])
        self.check(np.allclose(row[peers], weights / weights.sum(), rtol=1e-6), "I5: certified, and not the exact mean")

    # in the end

    def judge_rounds(self, faults: list[Fault]) -> None:
        """All rounds are over: who was let alone must have succeeded, and repair must have been cheap."""
        for book in self.books.values():
            lives = [live for each in book.lives.values() for live in each]
            began_s = min(live.began_s for live in lives)
            ended_s = max(live.ended_s for live in lives)
            near = [f for f in faults if f.at_s <= ended_s and f.end_s >= began_s - AFTERMATH_S and f.kind != "clock"]
            self._judge_liveness(book, near)
            if len(near) == 1 and near[0].kind == "kill" and book.has_death and self.world.network.is_quick:
                self._judge_repair(book)

    def _judge_liveness(self, book: Book, near: list[Fault]) -> None:
        hurt = {index for fault in near for index in fault.who}
        members = range(len(book.begin.members))
        index_of = {peer_of(index): index for index in range(self.world.n)}
        calm = [place for place in members if index_of[book.begin.members[place].peer] not in hurt]
        calm = [place for place in calm if all(live.time_s >= AMPLE_S for live in book.lives.get(place, []))]
        quorum = len(members) // 2 + 1
        reducers = [place for place in calm if book.begin.members[place].inbound]
        if len(calm) < quorum or not reducers or not all(place in book.lives for place in calm):
            return
        for place in calm:
            live = book.lives[place][0]
            self.n_left_behind += book.has_leaver and bool(live.ended_s) and not live.result
            self.check(
                live.result or not live.ended_s or book.has_leaver,
                f"I4b: {live.daemon.index} was let alone with a majority, and fails: {live.session.exchange.reason}",
            )

    def _judge_repair(self, book: Book) -> None:
        n = len(book.begin.members)
        self.check(not book.n_again, f"I8: {book.n_again} results came to members that had them")
        bound = 2 * (n - 2) * book.n_lacked + book.n_early
        self.check(book.n_repairs <= bound, f"I8: {book.n_repairs} records of repair where {bound} are enough")
