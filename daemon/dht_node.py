"""The asyncio side of the DHT: one node, from its socket to its status.

The pieces are elsewhere: `dht_protocol.py` talks, `dht_publish.py` keeps our records published, `dht_lookup.py` finds
those of others, `dht_bootstrap.py` looks for the swarm. Here they are put together, started and ended, and told of
each other: when the contacts change, we look around and publish again; when somebody is revoked, he is forgotten.
"""

import asyncio
import functools
import itertools
import logging
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kademlia.network import Server

from mpd.ids import Endpoint, peer_id_of

from . import faults
from .budgets import Budgets
from .containment import report
from .dht_bootstrap import Bootstrap, KnownPeers
from .dht_gate import DhtTrust, Gate
from .dht_limits import Neighbourhood, own_hosts
from .dht_lookup import PARALLEL, Seeker
from .dht_lost import Lost
from .dht_messages import MAX_NODES
from .dht_proof import Proofs
from .dht_protocol import GuardedProtocol
from .dht_publish import Publisher
from .dht_records import RecordStore
from .dht_routing import Crawl
from .dht_socket import DatagramSocket
from .rendezvous import Record, RendezvousStatus

log = logging.getLogger(__name__)

# After a change of the routing table we look around and republish, and then again: who joined together with us may
# have been unknown to everybody whom we asked the first time. The first contact of all is not kept waiting.
SETTLE_PAUSES_S = (0.3, 2.0)
REFRESH_S = 60.0
FIRST_SAVES_S = (1.0, 2.0, 4.0, 8.0)  # whoever is killed soon after it has joined shall find back too
SAVE_S = 30.0
WATCH_S = 2.0  # between two looks at revocations, clocks and bootstraps
GOODBYE_S = 0.5
BUCKET_SIZE = 20
PINGS_PER_REFRESH = 20


def wall_ms() -> int:
    """Return milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class DhtConfig:
    """What a node needs. `trust` is who we are.

    `sock` is bound, UDP and non-blocking, and belongs to the node from here on. `wall_ms` returns milliseconds since
    1970; the clocks of a swarm have to agree within half a minute.
    """

    trust: DhtTrust
    sock: socket.socket
    bootstrap: tuple[Endpoint, ...] = ()
    known_peers_file: Path | None = None
    replicas: int = 5
    budgets: Budgets = field(default_factory=Budgets)
    wall_ms: Callable[[], int] = wall_ms
    rng: random.Random = field(default_factory=random.Random)


class DhtNode(Server):  # type: ignore[misc]  # kademlia has no annotations
    """Made by `start_node` on a running loop. `status` is replaced whole, so any thread may read it."""

    def __init__(self, config: DhtConfig) -> None:
        self._loop = asyncio.get_running_loop()
        self._config = config
        self.refused: Counter[str] = Counter()
        self._proofs = Proofs(config.trust, self._loop.time)
        self._gate = Gate(config.trust, config.wall_ms, self._loop.time, config.budgets, self.refused)
        storage = RecordStore(config.wall_ms, config.budgets, self._proofs.is_genuine)
        super().__init__(BUCKET_SIZE, PARALLEL, self._proofs.own_id, storage)
        self.status = RendezvousStatus(peers=0)
        self._is_open = True
        self._tasks: set[asyncio.Task[None]] = set()
        self._settling: asyncio.TimerHandle | None = None
        self._settle_pauses_s: list[float] = []
        self._known_peers = KnownPeers(config.known_peers_file, self._set_problem)
        self._problem = ""

    # life

    def _create_protocol(self) -> GuardedProtocol:
        config = self._config
        neighbourhood = Neighbourhood(config.trust.is_open, own_hosts(config.sock))
        return GuardedProtocol(
            config.trust,
            self._gate,
            self._proofs,
            self.storage,
            neighbourhood,
            self.refused,
            self._on_contacts_changed,
        )

    async def start(self) -> None:
        """Open the socket and begin to look for the swarm. Does not wait for anybody."""
        config = self._config
        self._loop.set_exception_handler(self._on_loop_error)
        self.protocol = self._create_protocol()
        self.transport = DatagramSocket(self._loop, config.sock, self.protocol, config.budgets, self.protocol.unwanted)
        self._publisher = Publisher(
            self.protocol, self._proofs, config.wall_ms, config.replicas, config.rng, self._spawn
        )
        self._seeker = Seeker(self.protocol, self._proofs, config.wall_ms, config.replicas, self.refused)
        self._bootstrap = Bootstrap(self.node.id, self.protocol.ping, self._publish_status, config.rng)
        known = self._known_peers.load()
        self._lost = Lost(self.protocol.ping, self._loop.time, config.rng)
        for host, port, node_id in known:
            self._lost.add(node_id, (host, port))
        self.protocol.contacts.on_lost = lambda node: self._lost.add(node.id, (node.ip, node.port))
        self._spawn(self._bootstrap.ask_known(known, lambda: len(self.protocol.router.contacts)))
        self._spawn(self._lost.keep_asking())
        for entry in dict.fromkeys(config.bootstrap):
            self._spawn(self._bootstrap.keep_asking(entry, config.sock.family))
        self._spawn(self._refresh_for_ever())
        self._spawn(self._watch_for_ever())
        self._spawn(self._save_for_ever())

    async def close(self) -> None:
        """Withdraw our records, as far as half a second reaches, and leave nothing running."""
        self._is_open = False
        if self._settling is not None:
            self._settling.cancel()
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._publisher.withdraw_all()
        except TimeoutError:
            log.debug("dht: closed before everybody had heard the goodbye")
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.protocol.close(self._config.wall_ms())
        await self._save()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        if not self._is_open:
            work.close()
            return
        self._tasks.add(task := self._loop.create_task(work))
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler({"message": "a DHT task failed", "exception": error})

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.refused["own error"] += 1
        if (error := context.get("exception")) is not None:
            report("DHT task", error)
        else:
            log.error("dht: %s", context["message"])

    # records

    async def announce(self, key: bytes, value: bytes, ttl_s: float) -> None:
        """Publish our record under `key`, and keep it published from now on."""
        if faults.armed:
            faults.strike("announce")
        await self._publisher.announce(key, value, ttl_s)

    async def withdraw(self, key: bytes) -> None:
        """Take our record under `key` back."""
        await self._publisher.withdraw(key)

    async def seek(self, key: bytes) -> tuple[Record, ...]:
        """Return the newest record of each publisher that anybody who should hold records under `key` has."""
        if faults.armed:
            faults.strike("seek")
        found = await self._seeker.seek(key)
        found.pop(self._config.trust.public_key, None)  # nobody knows better than we do what we say
        if (own := self._publisher.record(key)) is not None:
            found[own.public_key] = own
        now_ms = self._config.wall_ms()
        live = (
            Record(peer_id_of(each), record.value, record.seq, (record.expires_at_ms - now_ms) / 1000)
            for each, record in found.items()
            if record.value
        )
        return tuple(sorted(live, key=lambda record: record.publisher))

    # neighbours

    def _on_contacts_changed(self) -> None:
        contacts = self.protocol.router.contacts
        if not contacts:
            self._bootstrap.wake()
        for node_id in contacts:
            self._lost.found(node_id)
        self._publisher.contacts_changed()
        self._settle_pauses_s = [0.0, *SETTLE_PAUSES_S] if len(contacts) == 1 else [*SETTLE_PAUSES_S]
        self._settle_later()
        self._publish_status()

    def _settle_later(self) -> None:
        if self._settling is None and self._settle_pauses_s and self._is_open:
            self._settling = self._loop.call_later(self._settle_pauses_s.pop(0), self._settle)

    def _settle(self) -> None:
        self._settling = None
        self._settle_later()
        if self.protocol.router.contacts:
            self._spawn(self._find_neighbourhood())
        self._publisher.settle()

    async def _find_neighbourhood(self) -> None:
        """Meet the nodes around us; the crawl puts whoever answers into the table."""
        ask = functools.partial(self.protocol.call_find_node, target=self.node)
        await Crawl(self.protocol, self.node, MAX_NODES, PARALLEL, ask).find()

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S * self._config.rng.uniform(0.8, 1.2))
            contacts = self.protocol.router.contacts.values()
            silent = [node for node in contacts if self.protocol.contacts.silent_for(node) >= REFRESH_S]
            silent.sort(key=self.protocol.contacts.silent_for, reverse=True)
            await asyncio.gather(*(self.protocol.call_ping(node) for node in silent[:PINGS_PER_REFRESH]))
            await self._find_neighbourhood()

    async def _watch_for_ever(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            if not self._config.trust.is_open:
                self.protocol.drop_revoked()
            self._publish_status()

    # status

    async def _save_for_ever(self) -> None:
        for pause_s in itertools.chain(FIRST_SAVES_S, itertools.repeat(SAVE_S)):
            await asyncio.sleep(pause_s)
            await self._save()

    async def _save(self) -> None:
        contacts = self.protocol.router.contacts.values()
        await self._known_peers.save([*((node.ip, node.port, node.id) for node in contacts), *self._lost.nodes])

    def _set_problem(self, problem: str) -> None:
        self._problem = problem
        self._publish_status()

    def _publish_status(self) -> None:
        problems = [self._problem, self._gate.problem]
        if not self.protocol.router.contacts:
            problems.append(self._bootstrap.problem)
        self.status = RendezvousStatus(
            peers=len(self.protocol.router.contacts),
            bootstrap=tuple(self._bootstrap.states.items()),
            problem="; ".join(filter(None, problems)),
            unasked=self.protocol.n_unasked,
            clock=self._gate.problem,
        )


async def start_node(config: DhtConfig) -> DhtNode:
    """Return a running node."""
    node = DhtNode(config)
    await node.start()
    return node
