"""The asyncio side of the DHT: one node that keeps its own records published and finds those of others.

Publishing and finding are one movement: crawl towards the key and ask the nearest nodes to hold a record, or for the
records they hold. Their answers name nodes nearer to the key, so no separate lookup goes first, and in a small swarm
either costs one request to each of the `replicas` nearest nodes.

Holders never pass records on. The publisher repeats its own after a third of their life, and soon after its routing
table has changed if somebody who should hold one does not. So a record is found shortly after any number of nodes
joined at once, and is gone one life after its publisher.
"""

import asyncio
import functools
import logging
import random
import socket
import time
from collections import Counter
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kademlia.network import Server
from kademlia.node import Node

from mpd.ids import Endpoint, PeerId

from .dht_bootstrap import Bootstrap, KnownPeers
from .dht_messages import MAX_NODES, Page
from .dht_protocol import GuardedProtocol
from .dht_records import RecordStore, WireRecord, digest_of, valid
from .dht_routing import Crawl
from .rendezvous import Record, RendezvousStatus

log = logging.getLogger(__name__)

# After a change of the routing table we look around and republish, and then again: who joined together with us may
# have been unknown to everybody whom we asked the first time. The first contact of all is not kept waiting.
SETTLE_PAUSES_S = (0.3, 2.0)
REFRESH_S = 60.0
SAVE_S = 30.0
GOODBYE_S = 0.5
BUCKET_SIZE = 20
PARALLEL = 5  # questions of one crawl in flight
PINGS_PER_REFRESH = 20


@dataclass(frozen=True)
class DhtConfig:
    """What a node needs. `sock` is bound, UDP and non-blocking, and belongs to the node from here on."""

    node_id: PeerId
    sock: socket.socket
    bootstrap: tuple[Endpoint, ...] = ()
    known_peers_file: Path | None = None
    replicas: int = 5
    rng: random.Random = field(default_factory=random.Random)


@dataclass
class _Own:
    """One of our records, who holds it as it is now, and when it is due again."""

    record: WireRecord
    holders: set[bytes] = field(default_factory=set)
    timer: asyncio.TimerHandle | None = None


class DhtNode(Server):  # type: ignore[misc]  # kademlia has no annotations
    """Made by `start_node` on a running loop. `status` is replaced whole, so any thread may read it."""

    def __init__(self, config: DhtConfig) -> None:
        self._loop = asyncio.get_running_loop()
        super().__init__(BUCKET_SIZE, PARALLEL, bytes(config.node_id), RecordStore(self._loop.time))
        self.status = RendezvousStatus(peers=0)
        self.refused: Counter[str] = Counter()
        self._config = config
        self._is_open = True
        self._own: dict[bytes, _Own] = {}
        # A restarted publisher has to beat what it published in its last life: the one use of the wall clock.
        self._seq = time.time_ns() // 1_000_000
        self._tasks: set[asyncio.Task[None]] = set()
        self._settling: asyncio.TimerHandle | None = None
        self._settle_pauses_s: list[float] = []
        self._known_peers = KnownPeers(config.known_peers_file, self._set_problem)
        self._problem = ""

    # life

    def _create_protocol(self) -> GuardedProtocol:
        return GuardedProtocol(self.node, self.storage, self.ksize, self.refused, self._on_contacts_changed)

    async def start(self) -> None:
        """Open the socket and begin to look for the swarm. Does not wait for anybody."""
        config = self._config
        self._loop.set_exception_handler(self._on_loop_error)
        self.transport, self.protocol = await self._loop.create_datagram_endpoint(
            self._create_protocol, sock=config.sock
        )
        self._bootstrap = Bootstrap(self.node.id, self.protocol.ping, self._publish_status, config.rng)
        self._spawn(self._bootstrap.ask_known(self._known_peers.load(), lambda: len(self.protocol.router.contacts)))
        for entry in dict.fromkeys(config.bootstrap):
            self._spawn(self._bootstrap.keep_asking(entry, config.sock.family))
        self._spawn(self._refresh_for_ever())
        self._spawn(self._save_for_ever())

    async def close(self) -> None:
        """Withdraw our records, as far as half a second reaches, and leave nothing running."""
        self._is_open = False
        try:
            async with asyncio.timeout(GOODBYE_S):
                await asyncio.gather(*(self.withdraw(key) for key in list(self._own)))
        except TimeoutError:
            log.debug("dht: closed before everybody had heard the goodbye")
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._settling is not None:
                self._settling.cancel()
            await self.protocol.close()
        await self._save()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(task := self._loop.create_task(work))
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler({"message": "a DHT task failed", "exception": error})

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.refused["own error"] += 1
        log.error("dht: %s", context["message"], exc_info=context.get("exception"))

    # records

    async def announce(self, key: bytes, value: bytes, ttl_s: float) -> None:
        """Publish our record under `key`, and keep it published from now on."""
        self._forget(key)
        own = self._own[key] = _Own(WireRecord(self.node.id, self._next_seq(), int(ttl_s * 1000), value))
        await self._publish(key, own)

    async def withdraw(self, key: bytes) -> None:
        """Replace our record under `key` by a tombstone that outlives it."""
        own = self._forget(key)
        if own is None:
            return
        tombstone = WireRecord(self.node.id, self._next_seq(), own.record.ttl_ms, b"")
        self.storage.put(key, tombstone)
        told = await self._store(key, tombstone)
        contacts = self.protocol.router.contacts
        others = [contacts[holder] for holder in own.holders - told if holder in contacts]
        await asyncio.gather(*(self.protocol.call_store(node, key, tombstone) for node in others))

    async def seek(self, key: bytes) -> tuple[Record, ...]:
        """Return the union of what the nearest nodes hold under `key`, newest record of each publisher."""
        crawl = self._crawl(key, lambda node: self.protocol.call_find_records(node, key, b""))
        pages: dict[Any, Page] = await crawl.find()
        rest = await self._turn_pages(key, pages)
        found: dict[bytes, WireRecord] = {}
        for record in (
            *self.storage.records(key),
            *rest,
            *(record for page in pages.values() for record in page.records),
        ):
            best = found.get(record.publisher)
            if valid(record) and (best is None or (record.seq, record.ttl_ms) > (best.seq, best.ttl_ms)):
                found[record.publisher] = record
        found.pop(self.node.id, None)  # nobody knows better than we do what we say
        if (own := self._own.get(key)) is not None:
            found[self.node.id] = own.record
        return tuple(
            Record(PeerId(record.publisher), record.value, record.seq, record.ttl_ms / 1000)
            for _, record in sorted(found.items())
            if record.value
        )

    async def _turn_pages(self, key: bytes, first: dict[Any, Page]) -> list[WireRecord]:
        """Read what did not fit on the first pages. Nodes whose sets have the same digest are read once."""
        by_digest: dict[bytes, list[Any]] = {}
        for node, page in first.items():
            if page.more:
                by_digest.setdefault(page.digest, []).append(node)
        read = await asyncio.gather(*(self._read_one(key, digest, nodes, first) for digest, nodes in by_digest.items()))
        return [record for records in read for record in records]

    async def _read_one(
        self, key: bytes, digest: bytes, nodes: Iterable[Any], first: dict[Any, Page]
    ) -> list[WireRecord]:
        everything: list[WireRecord] = []
        for node in nodes:
            records, page = list(first[node].records), first[node]
            while page.more and page.records:
                after = page.records[-1].publisher
                page = await self.protocol.call_find_records(node, key, after)
                if page is None or not page.records or page.records[0].publisher <= after:
                    break
                records += page.records
            everything += records
            if digest_of(records) == digest:
                break  # this node really holds the set it named, so the others have nothing to add
        return everything

    async def _publish(self, key: bytes, own: _Own) -> None:
        if self._own.get(key) is not own:
            return  # withdrawn or replaced since this was decided
        if own.timer is not None:
            own.timer.cancel()
        due_s = own.record.ttl_ms / 3000 * self._config.rng.uniform(0.9, 1.0)
        own.timer = self._loop.call_later(due_s, lambda: self._spawn(self._publish(key, own)))
        self.storage.put(key, own.record)
        own.holders |= await self._store(key, own.record)

    async def _store(self, key: bytes, record: WireRecord) -> set[bytes]:
        """Have the nearest nodes hold `record`. Return the ids of those that do."""
        crawl = self._crawl(key, lambda node: self.protocol.call_store(node, key, record))
        return {node.id for node, reply in (await crawl.find()).items() if reply.held}

    def _crawl(self, key: bytes, ask: Any) -> Crawl:
        return Crawl(self.protocol, Node(key), self._config.replicas, PARALLEL, ask)

    def _forget(self, key: bytes) -> _Own | None:
        own = self._own.pop(key, None)
        if own is not None and own.timer is not None:
            own.timer.cancel()
        return own

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq

    # neighbours

    def _on_contacts_changed(self) -> None:
        contacts = self.protocol.router.contacts
        if not contacts:
            self._bootstrap.wake()
        for own in self._own.values():
            own.holders &= contacts.keys()
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
        for key, own in self._own.items():
            nearest = self.protocol.router.find_neighbors(Node(key), self._config.replicas)
            if any(node.id not in own.holders for node in nearest):
                self._spawn(self._publish(key, own))

    async def _find_neighbourhood(self) -> None:
        """Meet the nodes around us; the crawl puts whoever answers into the table."""
        ask = functools.partial(self.protocol.call_find_node, target=self.node)
        await Crawl(self.protocol, self.node, MAX_NODES, PARALLEL, ask).find()

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S * self._config.rng.uniform(0.8, 1.2))
            contacts = self.protocol.router.contacts.values()
            silent = [node for node in contacts if self.protocol.silent_for(node) >= REFRESH_S]
            silent.sort(key=self.protocol.silent_for, reverse=True)
            await asyncio.gather(*(self.protocol.call_ping(node) for node in silent[:PINGS_PER_REFRESH]))
            await self._find_neighbourhood()

    # status

    async def _save_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SAVE_S)
            await self._save()

    async def _save(self) -> None:
        contacts = self.protocol.router.contacts.values()
        await self._known_peers.save([(node.ip, node.port, node.id) for node in contacts])

    def _set_problem(self, problem: str) -> None:
        self._problem = problem
        self._publish_status()

    def _publish_status(self) -> None:
        self.status = RendezvousStatus(
            peers=len(self.protocol.router.contacts),
            bootstrap=tuple(self._bootstrap.states.items()),
            problem=self._problem,
        )


async def start_node(config: DhtConfig) -> DhtNode:
    """Return a running node."""
    node = DhtNode(config)
    await node.start()
    return node
