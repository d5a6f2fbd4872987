"""The running daemon looks what is wrong with itself: what it sees, what peers say when asked, how bootstraps answer.

Everything is asked at once and every question has an end, so an examination takes less than ten seconds. It changes
nothing; only where no link is there and a bootstrap answers, it makes a link to it, as a run would, to have somebody
to ask.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from mpd.config import DaemonConfig
from mpd.doctor import Bootstrap, Clocks, Datagrams, DialBackAnswer, Membership, Pressure, Reach, judge
from mpd.errors import LocalError
from mpd.findings import Disk, Finding
from mpd.ids import Endpoint, parse_endpoint, parse_peer, show_peer
from mpd.roll import name

from . import facts
from .budgets import Budgets
from .dial_back import DialBacks
from .links import Link
from .outlook import MAX_ADDRESSES, Clock, look_out
from .peers import Peers, Unreachable
from .rendezvous import Rendezvous
from .swarm import Swarm

LOOK_S = 6.0  # for the bootstraps
ANSWER_S = 7.0  # for peers that dial back: they take five seconds to be sure that nobody answers
MAX_ASKED = 3  # peers that are asked to dial back
DISK_S = 3.0  # a disk that takes longer to write a page is in trouble

_CONNECTED = "connected: "  # how a bootstrap fares whose id is known


@dataclass(frozen=True, slots=True)
class Patient:
    """What a doctor looks at: the services of one daemon."""

    config: DaemonConfig
    swarm: Swarm
    budgets: Budgets
    rendezvous: Rendezvous
    peers: Peers
    dial_backs: DialBacks
    wall_ms: Callable[[], int]
    run_facts: Callable[[], Sequence[object]]
    held_bytes: Callable[[], int]
    problem: Callable[[], str]


class Doctor:
    """Examines one daemon, one examination at a time."""

    def __init__(self, patient: Patient) -> None:
        self._patient = patient
        self._is_busy = False

    async def examine(self, bootstrap: Sequence[str] = ()) -> list[Finding]:
        """Return what is found, looking at the addresses in `bootstrap` too. Raises LocalError if one is under way."""
        addresses = [parse_endpoint(text) for text in bootstrap[:MAX_ADDRESSES]]
        if self._is_busy:
            raise LocalError("this daemon is being examined already: try again in ten seconds")
        self._is_busy = True
        try:
            found: list[object] = [*self._own_facts()]
            clocks: list[Clock] = []
            answers: list[DialBackAnswer] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._look_out, addresses, found, clocks)
                nursery.start_soon(self._ask_to_dial_back, answers)
                nursery.start_soon(self._look_at_disk, found)
            found += [self._reach(answers), self._clocks(clocks)]
            return judge(found)
        finally:
            self._is_busy = False

    def _own_facts(self) -> list[object]:
        """Return what is known without asking anybody."""
        patient = self._patient
        status, swarm = patient.rendezvous.snapshot(), patient.swarm.status()
        pressed = [
            (budget, each["used"], each["limit"], each["refused"])
            for budget, each in patient.budgets.snapshot().items()
            if each["refused"] or each["used"] >= each["limit"]
        ]
        return [
            facts.platform(),
            facts.kernel(),
            facts.memory(patient.held_bytes()),
            facts.descriptors(patient.budgets, patient.budgets.descriptors.used),
            Membership(
                is_open=swarm["open"],
                name=swarm["name"],
                role=swarm["role"],
                expires_in_s=swarm["expires_in_s"] or 0.0,
                trouble=patient.problem(),
            ),
            Datagrams(
                port=patient.peers.endpoint.port,
                n_peers=status.peers,
                n_unasked=status.unasked,
                accepts=patient.peers.endpoint.port != 0,
                problem="" if status.clock else status.problem,
            ),
            Pressure(tuple(pressed)),
            *patient.run_facts(),
        ]

    async def _look_at_disk(self, found: list[object]) -> None:
        with trio.move_on_after(DISK_S) as patience:
            path = self._patient.config.state_dir
            found.append(await trio.to_thread.run_sync(facts.disk, path, abandon_on_cancel=True))
        if patience.cancelled_caught:
            found.append(Disk(str(path), True, f"to write a page takes more than {DISK_S:g} s", 0, True))

    async def _look_out(self, addresses: list[Endpoint], found: list[object], clocks: list[Clock]) -> None:
        patient = self._patient
        wanted = [*addresses, *patient.config.net.bootstrap, *patient.swarm.bootstrap()]
        seen: list[Bootstrap] = []
        with trio.move_on_after(LOOK_S):
            seen, ahead = await look_out(wanted, patient.swarm, patient.swarm, patient.wall_ms)
            clocks += ahead
        found += seen

    async def _ask_to_dial_back(self, answers: list[DialBackAnswer]) -> None:
        patient = self._patient
        port = patient.peers.endpoint.port
        if not port:
            return
        with trio.move_on_after(ANSWER_S):
            if not patient.peers.links():
                await self._call_a_bootstrap()
            async with trio.open_nursery() as nursery:
                for link in _apart(patient.peers.links())[:MAX_ASKED]:
                    place = len(answers)
                    answers.append(DialBackAnswer(name(link.peer), link.remote_host, None))
                    nursery.start_soon(self._ask, link, port, answers, place)

    async def _ask(self, link: Link, port: int, answers: list[DialBackAnswer], place: int) -> None:
        answer = await self._patient.dial_backs.ask_and_wait(link, port)
        if answer is not None:
            answers[place] = DialBackAnswer(name(link.peer), answer.host or link.remote_host, answer.reached)

    async def _call_a_bootstrap(self) -> None:
        for address, state in self._patient.rendezvous.snapshot().bootstrap:
            if state.startswith(_CONNECTED):
                with contextlib.suppress(Unreachable, LocalError):
                    peer = parse_peer(state.removeprefix(_CONNECTED))
                    await self._patient.peers.link(peer, parse_endpoint(address))
                    return

    def _reach(self, answers: list[DialBackAnswer]) -> Reach:
        endpoint = self._patient.peers.endpoint
        announced = str(endpoint) if endpoint.port else ""
        return Reach(announced, tuple(answers), self._patient.peers.n_called, endpoint.is_loopback)

    def _clocks(self, looked: list[Clock]) -> Clocks:
        """Of peers that were looked at just now, that counts; of others what they said when the link was made."""
        links = {show_peer(link.peer): link.clock_ahead_s for link in self._patient.peers.links()}
        ahead_s = tuple((f"{peer[:8]}..", ahead) for peer, ahead in {**links, **dict(looked)}.items())
        return Clocks(ahead_s, self._patient.rendezvous.snapshot().clock)


def _apart(links: list[Link]) -> list[Link]:
    """Return `links`, one of each host first: whoever is elsewhere sees more."""
    seen: set[str] = set()
    first = [link for link in links if link.remote_host not in seen and not seen.add(link.remote_host)]  # type: ignore[func-returns-value]
    return first + [link for link in links if link not in first]
