"""All runs of this daemon, and the switchboard between links, rounds and runs.

`Runs` is what the local socket talks to: it attaches trainers and answers questions. `Switchboard` is what links talk
to: it looks at each message just far enough to know whose it is.
"""

import functools
import json
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakValueDictionary

import trio

from mpd.control import Attach, Examine, Query
from mpd.doctor import Rounds
from mpd.errors import LocalError, PeerError
from mpd.findings import Finding
from mpd.ids import Endpoint, PeerId, RoundId, show_peer
from mpd.layout import Layout, Terms
from mpd.matchmaking import MAX_DETAIL_CHARS
from mpd.messages import (
    Begin,
    Declined,
    DialBack,
    DialledBack,
    Disbanded,
    Goodbye,
    Here,
    Join,
    Joined,
    News,
    Quit,
    RunTerms,
    Scoped,
    UnknownRound,
)
from mpd.wire import Header, Kind

from .containment import confine, supervise
from .dial_back import DialBacks
from .history import HISTORY_ROUNDS
from .links import Landing, Link
from .loading import Loading, Surroundings
from .lobby import Lobby, LobbyServices
from .memory import OutRegion, Region
from .news import NewsDesk
from .pace import describe
from .peers import Peers
from .run import Run, TrainerSeat
from .sessions import Sessions
from .shelf import Shelf
from .state_desk import MESSAGES, StateDesk

MAX_RUN_NAME_CHARS = 256
_FEW_TENSORS = 5000  # 10 ms: what other runs may have to wait
OBSERVER = "observer"
_RECENT_ROUNDS = 20  # what a doctor looks at
_FOR_MEMBERS = (Here, Join, Joined, Begin, Scoped, *MESSAGES)


class Runs:
    """The runs that trainers on this machine take part in. `status` adds what the rest of the daemon knows."""

    def __init__(self, services: LobbyServices, sessions: Sessions) -> None:
        self.peer = services.own
        self.status: Callable[[], dict[str, Any]] = dict
        self.role: Callable[[], str] = str  # what this machine may do in its swarm
        self.look_into: Callable[[tuple[str, ...]], Awaitable[list[Finding]]]  # what `mpd doctor` asks; set by `app`
        self.leaving = trio.Event()
        self.desk = StateDesk(sessions.wait_quiet)
        self._services = services
        self._sessions = sessions
        self._runs: dict[str, Run] = {}
        self._past: deque[dict[str, Any]] = deque(maxlen=HISTORY_ROUNDS)  # rounds of runs whose trainers have gone
        self._turns: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()
        self._attaching = trio.Lock()  # one at a time: a run begins once, and memory is promised once
        self._nursery: trio.Nursery | None = None

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry the runs until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(supervise, "states for others", self.desk.serve)
            task_status.started()
            await trio.sleep_forever()

    async def attach(self, request: Attach, label: str) -> TrainerSeat:
        """Give a trainer its place in a run. Raises LocalError with what it should change. Cancelled: it has none."""
        if not 0 < len(request.run) <= MAX_RUN_NAME_CHARS or not request.run.isprintable():
            raise LocalError(f"a run's name has 1 to {MAX_RUN_NAME_CHARS} printable characters")
        terms = await _terms_of(request)
        async with self._attaching:
            self._ensure_welcome(request.run, terms)
            in_region = await Region.make(terms.layout.n_bytes)
            try:
                if request.run not in self._runs:
                    out = await OutRegion.make(terms.layout.n_bytes)
                    self._begin(request.run, terms, out)
                return self._runs[request.run].sit(label, in_region)
            except BaseException:
                in_region.close()
                raise

    def _ensure_welcome(self, name: str, terms: Terms) -> None:
        if self.leaving.is_set() or self._nursery is None:
            raise LocalError("this daemon is leaving: attach to another one")
        if self.role() == OBSERVER:
            raise LocalError("this machine is an observer in its swarm and takes part in no round: get another invite")
        run = self._runs.get(name)
        difference = terms.first_difference(run.terms) if run is not None else None
        if difference is not None:
            raise LocalError(f"run {name!r} is in use on this daemon with other terms: {difference}")

    def _begin(self, name: str, terms: Terms, out: OutRegion) -> None:
        assert self._nursery is not None
        services, lobby = self._services, Lobby(name, terms, self._services)
        shelf = Shelf(terms, out, self.desk.budgets.states)
        run = Run(name, terms, lobby, self._sessions, services.limits, shelf)
        around = Surroundings(services.own, lobby, services.peers, self.desk, services.limits.window_s)
        run.loading = functools.partial(Loading, name, shelf, around)
        self.desk.open(name, shelf)
        self._runs[name] = run
        scope = trio.CancelScope()
        run.vanished = functools.partial(self._end, run, scope)
        self._nursery.start_soon(self._carry, run, scope)

    async def _carry(self, run: Run, scope: trio.CancelScope) -> None:
        # A run that ends takes its announcements back before one of the same name makes them anew.
        turn = self._turns.setdefault(run.name, trio.Lock())
        try:
            with scope:
                async with turn, trio.open_nursery() as nursery:
                    if self.desk.keeper is not None:
                        nursery.start_soon(supervise, "state file", self.desk.keeper.keep, run.name, run.shelf)
                    await supervise("run", run.serve)
        finally:
            run.shelf.close()

    def _end(self, run: Run, scope: trio.CancelScope) -> None:
        """The last trainer of `run` has gone: whoever attaches from now on begins afresh."""
        del self._runs[run.name]
        self.desk.close(run.name, run.shelf)
        self._past.extend(run.history.records)
        scope.cancel()

    def query(self, query: Query) -> str:
        """Answer "status", "rounds" or "peers" with a JSON text."""
        if query.what == "status":
            return json.dumps({**self.status(), "runs": [self._describe(run) for run in self._runs.values()]})
        if query.what == "rounds":
            known = [*self._past, *(record for run in self._runs.values() for record in run.history.records)]
            wanted = [record for record in known if query.run in ("", record["run"])]
            return json.dumps(sorted(wanted, key=lambda record: record["at"])[-query.last :] if query.last > 0 else [])
        if query.what == "peers":
            return json.dumps([vars_of(status) for status in self._services.peers.snapshot()])
        raise LocalError(f"{query.what!r} is nothing to ask for: status, rounds or peers expected")

    async def examine(self, request: Examine) -> str:
        """Return what `mpd doctor` finds, as a JSON text. Raises LocalError if somebody else asks just now."""
        return json.dumps([vars_of(finding) for finding in await self.look_into(request.bootstrap)])

    def leave(self) -> None:
        """Begin to shut down: the round in progress is finished first."""
        self.leaving.set()

    async def wait_idle(self) -> None:
        """Wait until no run is in the middle of a step."""
        for run in list(self._runs.values()):
            await run.idle.wait()

    def of_name(self, name: str) -> Lobby | None:
        """Return the lobby of a run, if this daemon takes part in it."""
        run = self._runs.get(name)
        return run.lobby if run is not None else None

    def of_slot(self, slot: bytes) -> Lobby | None:
        """Return the lobby that stands in a slot."""
        return next((run.lobby for run in self._runs.values() if run.lobby.stands_in(slot)), None)

    def forget(self, peer: PeerId, slot: bytes) -> None:
        """A peer has left a slot in which nobody here stands."""
        for run in self._runs.values():
            run.lobby.forget(peer, slot)

    def on_gone(self, peer: PeerId, reason: str) -> None:
        """A peer is gone for every run."""
        for run in list(self._runs.values()):
            run.lobby.on_gone(peer, reason)

    def rounds_facts(self) -> list[Rounds]:
        """Return how the last rounds of each run went, for `mpd doctor`."""
        facts = []
        for run in self._runs.values():
            last = list(run.history.records)[-_RECENT_ROUNDS:]
            imperfect = run.history.last_imperfect
            cause = "" if imperfect is None else "; ".join([imperfect["reason"], *imperfect["missing"].values()])
            n_averaged, n_perfect = (sum(record[key] for record in last) for key in ("averaged", "perfect"))
            facts.append(Rounds(run.name, len(last), n_averaged, n_perfect, cause.strip("; ")))
        return facts

    @property
    def held_bytes(self) -> int:
        """The vectors of all runs here, each counted once."""
        return sum(run.terms.layout.n_bytes for run in self._runs.values())

    def _describe(self, run: Run) -> dict[str, Any]:
        lobby = run.lobby
        return {
            "name": run.name,
            "shape": list(lobby.shape),
            "key": list(lobby.cell),
            "phase": lobby.number % max(1, len(lobby.shape)),
            "elastic": lobby.shaping.describe(),
            "peers": len(lobby.company) + 1,
            "trainers": len(run.seats),
            "rounds": run.rounds,
            "bytes": run.terms.layout.payload_bytes,
            "tensors": len(run.terms.layout.specs),
            "age": run.shelf.age,
            "state": run.state,
            "absent": {show_peer(peer): why for peer, why in lobby.absences.items()},
            "last_imperfect": run.history.last_imperfect,
            "pace": describe(lobby.pace, lobby.company),
            "other_terms": {show_peer(peer): why for peer, why in lobby.differences.items()},
        }


async def _terms_of(request: Attach) -> Terms:
    """Return the terms of a run, their layout worked out. Raises LocalError. A million tensors take seconds."""

    def make() -> Terms:
        terms = Terms(Layout(request.tensors), request.group_size, request.rounds, request.codec, request.aggregate)
        assert terms.layout.digest  # which is kept, as all that leads to it
        return terms

    return make() if len(request.tensors) <= _FEW_TENSORS else await trio.to_thread.run_sync(make)


def vars_of(record: Any) -> dict[str, Any]:
    """Return the fields of a slotted dataclass."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


class Switchboard:
    """Hears from all links; made before them, so the composition root sets whom it tells."""

    runs: Runs
    sessions: Sessions
    peers: Peers
    news: NewsDesk

    def __init__(self, nursery: trio.Nursery, say: Callable[[str], None]) -> None:
        self.dial_backs = DialBacks()
        self._nursery = nursery
        self._say = say

    def on_link_up(self, link: Link) -> None:
        """A new link: if we do not know yet whether we can be dialled, ask."""
        self._say(f"linked to {show_peer(link.peer)}")
        self.news.on_link_up(link, link.news)
        if self.peers.endpoint.port and not self.peers.is_reachable:
            self.dial_backs.ask(link, self.peers.endpoint.port)

    def on_link_down(self, link: Link, reason: str) -> None:
        """A link has ended: rounds and runs lose the peer, unless it has called again already."""
        self._say(f"link to {show_peer(link.peer)} ended: {reason}")
        self.dial_backs.forget(link)
        self.sessions.on_link_down(link, reason)
        self.runs.desk.on_link_down(link, reason)
        if self.peers.get(link.peer) in (None, link):
            self.runs.on_gone(link.peer, reason)

    def expects(self, link: Link, header: Header) -> bool:
        """Return whether a record's round is known."""
        return header.kind is Kind.STATE or self.sessions.expects(link, header)

    async def landing(self, link: Link, header: Header) -> Landing | None:
        """A record is on its way."""
        if header.kind is Kind.STATE:
            return self.runs.desk.landing(link, header)
        return await self.sessions.landing(link, header)

    def on_message(self, link: Link, message: Any) -> None:
        """A message has come. Raises PeerError if this peer may not say that."""
        match message:
            case _ if isinstance(message, _FOR_MEMBERS) and link.member.role == OBSERVER:
                raise PeerError(
                    f"it is an observer, which may take part in no round, and said {type(message).__name__}"
                )
            case Scoped():
                self.sessions.on_scoped(link, message)
            case UnknownRound():
                self.sessions.on_unknown_round(link, message)
            case _ if isinstance(message, MESSAGES):
                self.runs.desk.on_message(link, message)
            case Here() | Join() | Begin() | RunTerms():
                self._to_run(link, message, self.runs.of_name(message.run))
            case Joined() | Declined() | Disbanded() | Quit():
                self._to_run(link, message, self.runs.of_slot(message.slot))
            case Goodbye():
                reason = message.reason[:MAX_DETAIL_CHARS]
                self.runs.on_gone(link.peer, f"left: {reason}" if reason else "left")
            case DialBack():
                self._nursery.start_soon(confine, "dial-back", self._dial_back, link, message)
            case DialledBack():
                self.dial_backs.on_answer(link, message)
                self._on_dialled_back(message)
            case News():
                self.news.on_news(link, message)
            case _:
                raise PeerError(f"it said {type(message).__name__} on a link that is already made")

    def _to_run(self, link: Link, message: Any, lobby: Lobby | None) -> None:
        if lobby is not None:
            lobby.on_message(link, message)
        elif isinstance(message, Join):
            link.send(Declined(message.slot, "busy", "no trainer here takes part in that run"))
        elif isinstance(message, Here):
            link.send(Quit(message.slot))
        elif isinstance(message, Begin):
            self.sessions.refuse(RoundId(message.round_id))
        elif isinstance(message, Quit):
            self.runs.forget(link.peer, message.slot)

    async def _dial_back(self, link: Link, request: DialBack) -> None:
        reached = await self.peers.can_dial(Endpoint(link.remote_host, request.port))
        link.send(DialledBack(reached, link.remote_host))

    def _on_dialled_back(self, answer: DialledBack) -> None:
        if answer.reached and not self.peers.is_reachable:
            self.peers.is_reachable = True
            self._say(f"reachable from outside at {self.peers.endpoint}")
        elif not answer.reached:
            self._say("not reachable from outside: this daemon dials others and reduces nothing")
