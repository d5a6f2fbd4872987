"""Daemons without sockets: many of them in one trio process, joined by a hub that carries messages and records.

Strategy: only what touches the kernel is replaced. `FakePeers` and `FakeLink` stand in for `Peers` and `Link` (same
promises: order, at most one link per pair, `on_link_down` last and once); switchboard, sessions, lobbies and runs are
the real ones, and they find each other through `MemoryRendezvous`. Messages pass through the codec, so whatever a real
link would refuse is refused here. All time is that of the test's clock, all chance comes from seeds.
"""

import functools
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import trio

from mpd.config import RoundLimits
from mpd.daemon.budgets import Budgets
from mpd.daemon.links import LinkEvents
from mpd.daemon.lobby import LobbyServices
from mpd.daemon.peers import HANDSHAKE_S, Unreachable
from mpd.daemon.rendezvous import MemoryBoard, MemoryRendezvous
from mpd.daemon.runs import Runs, Switchboard
from mpd.daemon.sessions import Sessions
from mpd.errors import PeerError
from mpd.identity import OPEN_SWARM, Member
from mpd.ids import Endpoint, PeerId
from mpd.layout import Layout, TensorSpec, Terms
from mpd.messages import PEERS
from mpd.wire import unpack_header

Delay = Callable[[], float]


def peer(number: int) -> PeerId:
    """Return the id of peer `number`; ids sort like numbers."""
    return PeerId(number.to_bytes(2, "big") + random.Random(number).randbytes(18))


def specs(n_elems: int = 4, name: str = "w") -> tuple[TensorSpec, ...]:
    """Return the tensors of a small run."""
    return (TensorSpec(name, "float32", (n_elems,)),)


def terms(group_size: int = 16, rounds: int | str = 1, tensors: tuple[TensorSpec, ...] = specs()) -> Terms:
    """Return the terms of a small run."""
    return Terms(Layout(tensors), group_size, rounds, "raw", "mean")


class FakeLink:
    """One end of a link; `far` is the other."""

    far: "FakeLink"

    def __init__(self, hub: "Hub", owner: "FakePeers", peer: PeerId, endpoint: Endpoint | None) -> None:
        self.peer = peer
        self.endpoint = endpoint
        self.remote_host = "192.0.2.1"
        self.instance = b"i" * 16
        self.up = True
        self.reason = ""
        self.busy = 0
        self.awaited = 0
        self.patience_s = 2.0
        self.repairs_left = 3
        self.repair_cause = ""
        self.member = Member(peer, OPEN_SWARM, "member", None, 0.0, math.inf)
        self.news = 0
        self.bytes_sent = self.bytes_received = 0
        self.goodput = 0.0
        self.said: list[Any] = []  # every message sent from this end
        self.scope = trio.CancelScope()
        self._hub = hub
        self._owner = owner
        self._messages: deque[tuple[float, bytes]] = deque()
        self._shipments: deque[Any] = deque()
        self._news = trio.Event()

    def send(self, message: Any) -> None:
        if self.up:
            self.said.append(message)
            self._messages.append((trio.current_time() + self._hub.delay_s(), PEERS.encode(message)))
            self._wake()

    def ship(self, shipment: Any) -> None:
        if self.up:
            self._shipments.append(shipment)
            self._wake()

    def drop_shipments(self, owner: object) -> None:
        self._shipments = deque(s for s in self._shipments if s.owner is not owner)

    def unsent(self, owner: object) -> list[Any]:
        return [s for s in self._shipments if s.owner is owner]

    def detach(self, owner: object, chunk: int | None = None) -> None:
        """Records are copied when they are loaded, so there is nothing to make independent."""

    def close(self, reason: str) -> None:
        for end in (self, self.far):
            end.up = False
            end.reason = end.reason or reason
        self.scope.cancel()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def carry_messages(self) -> None:
        """Deliver what this end says, in order."""
        while True:
            while self._messages:
                arrives_at, body = self._messages.popleft()
                await trio.sleep_until(max(arrives_at, trio.current_time()))
                self._deliver(body)
            await self._news.wait()

    async def carry_records(self) -> None:
        """Deliver the records that this end ships, in order."""
        while True:
            while self._shipments:
                shipment = self._shipments.popleft()
                loaded = shipment.load()
                if loaded is not None:
                    header, payload = loaded[0], bytes(loaded[1])
                    shipment.sent(len(header) + len(payload))
                    await trio.sleep_until(trio.current_time() + self._hub.delay_s())
                    await self._land(header, payload)
            await self._news.wait()

    def _deliver(self, body: bytes) -> None:
        try:
            self.far._owner.events.on_message(self.far, PEERS.decode(body))
        except PeerError as error:
            self.close(str(error))

    async def _land(self, header: bytes, payload: bytes) -> None:
        try:
            landing = await self.far._owner.events.landing(self.far, unpack_header(header))
            if landing is not None:
                if landing.view is not None:
                    landing.view[: len(payload)] = payload
                landing.complete(memoryview(bytearray(payload)))
        except PeerError as error:
            self.close(str(error))


class FakePeers:
    """The links of one daemon."""

    def __init__(self, hub: "Hub", own_id: PeerId, events: LinkEvents, *, inbound: bool = True) -> None:
        self.own_id = own_id
        self.events = events
        self.endpoint = Endpoint("192.0.2.1", 1 + len(hub.members) if inbound else 0)
        self.is_reachable = inbound
        self.made: dict[PeerId, FakeLink] = {}
        self.arrived: dict[PeerId, trio.Event] = {}
        self.dials = 0
        self._hub = hub
        hub.members[own_id] = self

    def get(self, peer: PeerId) -> FakeLink | None:
        return self.made.get(peer)

    def links(self) -> list[FakeLink]:
        return list(self.made.values())

    def snapshot(self) -> tuple[Any, ...]:
        return ()

    async def link(self, peer: PeerId, endpoint: Endpoint | None) -> FakeLink:
        if peer not in self.made:
            if endpoint is None:
                with trio.move_on_after(HANDSHAKE_S):
                    await self.arrived.setdefault(peer, trio.Event()).wait()
            else:
                self.dials += 1
                await self._hub.dial(self, peer, endpoint)
        if peer not in self.made:
            raise Unreachable(f"did not answer at {endpoint}" if endpoint else "did not call")
        return self.made[peer]

    async def can_dial(self, endpoint: Endpoint) -> bool:
        await trio.lowlevel.checkpoint()
        return any(other.endpoint == endpoint and other.endpoint.port for other in self._hub.members.values())


class Hub:
    """Carries everything between the members. `delay_s` is asked for each message, record and dial."""

    def __init__(self, nursery: trio.Nursery, delay_s: Delay = lambda: 0.0) -> None:
        self.members: dict[PeerId, FakePeers] = {}
        self.delay_s = delay_s
        self.dead: set[PeerId] = set()  # refuse to be dialled
        self.silent: set[PeerId] = set()  # do not answer at all
        self._sides: list[set[PeerId]] = []  # the network has parted between these
        self._nursery = nursery

    async def dial(self, caller: FakePeers, peer: PeerId, endpoint: Endpoint) -> None:
        """Link `caller` to `peer`, unless it is gone. Raises Unreachable."""
        await trio.sleep_until(trio.current_time() + self.delay_s())
        if self.silent & {peer, caller.own_id} or self._is_parted(peer, caller.own_id):
            await trio.sleep_until(trio.current_time() + HANDSHAKE_S)
            raise Unreachable(f"did not answer at {endpoint} within {HANDSHAKE_S:g} s")
        there = self.members.get(peer)
        if there is None or there.endpoint != endpoint or self.dead & {peer, caller.own_id}:
            raise Unreachable(f"cannot be reached at {endpoint}: connection refused")
        if peer not in caller.made and caller.own_id not in there.made:
            here_end = FakeLink(self, caller, peer, there.endpoint if there.endpoint.port else None)
            there_end = FakeLink(self, there, caller.own_id, caller.endpoint if caller.endpoint.port else None)
            here_end.far, there_end.far, there_end.scope = there_end, here_end, here_end.scope
            caller.made[peer], there.made[caller.own_id] = here_end, there_end
            self._nursery.start_soon(self._carry, here_end, there_end)

    def cut(self, a: PeerId, b: PeerId, reason: str = "it closed the connection") -> None:
        """End the link between two members, if there is one."""
        link = self.members[a].made.get(b)
        if link is not None:
            link.close(reason)

    def kill(self, member: PeerId, *, silently: bool = False) -> None:
        """Let a member drop off the network: its links end, and it can be dialled no more."""
        (self.silent if silently else self.dead).add(member)
        for other in list(self.members[member].made):
            self.cut(member, other)

    def part(self, *sides: Iterable[PeerId]) -> None:
        """Let nothing pass between the `sides` any more. Links are given up at once, as if they had been watched."""
        self._sides = list(map(set, sides))
        for a, b in itertools.permutations(self.members, 2):
            if self._is_parted(a, b):
                self.cut(a, b, "nothing was heard from it for 2.0 s")

    def heal(self) -> None:
        """Let everything pass again."""
        self._sides = []

    def _is_parted(self, a: PeerId, b: PeerId) -> bool:
        return any(a in side and b in other for side in self._sides for other in self._sides if other is not side)

    async def _carry(self, *ends: FakeLink) -> None:
        with ends[0].scope:
            async with trio.open_nursery() as nursery:
                for end in ends:
                    arrived = end._owner.arrived.pop(end.peer, None)
                    if arrived is not None:
                        arrived.set()
                    end._owner.events.on_link_up(end)  # type: ignore[arg-type]
                for end in ends:
                    nursery.start_soon(end.carry_messages)
                    nursery.start_soon(end.carry_records)
        for end in ends:
            end._owner.events.on_link_down(end, end.reason)  # type: ignore[arg-type]
            if end._owner.made.get(end.peer) is end:
                del end._owner.made[end.peer]


class NoNews:
    """A news desk in a swarm in which nobody is ever revoked."""

    def on_link_up(self, link: Any, their_seq: int) -> None:
        pass

    def on_news(self, link: Any, message: Any) -> None:
        pass


class FakeDaemon:
    """Everything of a daemon above its sockets. `calls` counts what it asks of the rendezvous."""

    def __init__(self, swarm: "Swarm", number: int, *, inbound: bool = True) -> None:
        self.own = peer(number)
        self.calls = 0
        self.heard: list[str] = []  # what would be logged
        self.refused: list[bytes] = []
        self.switchboard = Switchboard(swarm.nursery, self.heard.append)
        self.peers: Any = FakePeers(swarm.hub, self.own, self.switchboard, inbound=inbound)
        self.sessions = Sessions(self.peers)
        self.rendezvous = MemoryRendezvous(swarm.board, self.own, self._count)
        self.services = LobbyServices(
            own=self.own,
            peers=self.peers,
            rendezvous=self.rendezvous,
            limits=swarm.limits,
            rng=random.Random(number),
            wall_ms=functools.partial(next, swarm.stamps),
            dials=Budgets().dials,
            refuse=self._refuse,
            warn=self.heard.append,
        )
        self.runs = Runs(self.services, self.sessions)
        self.switchboard.runs, self.switchboard.sessions = self.runs, self.sessions
        self.switchboard.peers = self.peers
        self.switchboard.news = NoNews()  # type: ignore[assignment]
        self._look_up_s = swarm.look_up_s

    def _refuse(self, round_id: Any) -> None:
        self.refused.append(round_id)
        self.sessions.refuse(round_id)

    async def _count(self) -> None:
        self.calls += 1
        await trio.sleep_until(trio.current_time() + self._look_up_s())


class Swarm:
    """Daemons that share a hub and a rendezvous, made by `daemon`. `look_up_s` is how long the rendezvous takes."""

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        delay_s: Delay = lambda: 0.0,
        look_up_s: Delay = lambda: 0.0,
        limits: RoundLimits | None = None,
    ) -> None:
        self.nursery = nursery
        self.hub = Hub(nursery, delay_s)
        self.board = MemoryBoard(trio.current_time)
        self.look_up_s = look_up_s
        self.limits = limits or RoundLimits()
        self.stamps: Iterator[int] = itertools.count(1_000)
        self._numbers = itertools.count()

    def daemon(self, *, inbound: bool = True) -> FakeDaemon:
        """Return a new daemon; ids rise from one to the next."""
        return FakeDaemon(self, next(self._numbers), inbound=inbound)
