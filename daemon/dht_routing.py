"""Which nodes are near a key: kademlia's routing table and crawler, with their rough edges replaced by subclassing.

The table sorts all its contacts instead of the first few buckets it happens to visit, files every id into the bucket
that covers it, and splits only the bucket that covers our own id, so hostile ids cannot make it grow without bound.

The crawl is a small event-driven machine with no task per request. It asks the nearest nodes it knows, adds the nodes
they name, and ends when the `ksize` nearest have answered. Who keeps it waiting too long no longer holds it up, as
long as somebody else has answered; the next nearest is asked instead. Nor does that node hold up later crawls until it
has answered one: where a machine has died, one lookup is late, and not all of the next seconds. What is named has
proved nothing, so a lookup asks only so many strangers, and where it matters only a few of one network.
"""

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from kademlia.crawling import SpiderCrawl
from kademlia.node import Node
from kademlia.routing import KBucket, RoutingTable

from mpd.ids import PEER_ID_BYTES

from .dht_gate import Address
from .dht_limits import MAX_PER_PREFIX, Neighbourhood

MAX_ASKED = 20  # nodes that one crawl sends to, whatever the replies name
MAX_STRANGERS = 20  # nodes that have proved nothing yet and that one lookup, of one or more crawls, sends to


class ContactTable(RoutingTable):  # type: ignore[misc]  # kademlia has no annotations
    """The nodes that have proved who they are, in buckets.

    `contacts` maps the ids of those in use to their nodes, `homes` their addresses to their ids.
    """

    def flush(self) -> None:
        self.buckets = [KBucket(0, 2 ** (8 * PEER_ID_BYTES) - 1, self.ksize)]
        self.contacts: dict[bytes, Any] = {}
        self.homes: dict[Address, bytes] = {}

    def everyone(self) -> Iterator[Any]:
        """Return the nodes in use and those that wait behind a full bucket."""
        for bucket in self.buckets:
            yield from (*bucket.nodes.values(), *bucket.replacement_nodes.values())

    def get_bucket_for(self, node: Any) -> int:
        return next(index for index, bucket in enumerate(self.buckets) if bucket.has_in_range(node))

    def knows(self, node_id: bytes) -> bool:
        """True if the node is in use or waits behind a full bucket."""
        bucket = self.buckets[self.get_bucket_for(Node(node_id))]
        return node_id in bucket.nodes or node_id in bucket.replacement_nodes

    def add_contact(self, node: Any) -> None:
        while not self.buckets[index := self.get_bucket_for(node)].add_node(node):
            if not self.buckets[index].has_in_range(self.node):
                break  # the bucket is full; the newcomer waits in its replacement cache
            self.split_bucket(index)
        self._index()

    def remove_contact(self, node: Any) -> None:
        super().remove_contact(node)
        self._index()

    def find_neighbors(self, node: Any, k: int | None = None, exclude: Any = None) -> list[Any]:
        skip = None if exclude is None else exclude.id
        others = [other for other in self.contacts.values() if other.id != skip]
        others.sort(key=node.distance_to)
        return others[: k or self.ksize]

    def _index(self) -> None:
        self.contacts = {node.id: node for bucket in self.buckets for node in bucket.get_nodes()}
        self.homes = {(node.ip, node.port): node.id for node in self.contacts.values()}


class Reply(Protocol):
    """What a crawl needs of an answer: the nodes it names, as (id, host, port)."""

    @property
    def nodes(self) -> list[tuple[bytes, str, int]]: ...


class Strangers:
    """How many nodes that have proved nothing yet one lookup may still ask."""

    def __init__(self, neighbourhood: Neighbourhood) -> None:
        self._neighbourhood = neighbourhood
        self._n_asked = 0
        self._n_of_crowd: Counter[str] = Counter()

    def take(self, host: str) -> bool:
        """Return whether one more may be asked, at `host`."""
        crowd = self._neighbourhood.crowd_of(host)
        if self._n_asked >= MAX_STRANGERS or (crowd is not None and self._n_of_crowd[crowd] >= MAX_PER_PREFIX):
            return False
        self._n_asked += 1
        if crowd is not None:
            self._n_of_crowd[crowd] += 1
        return True


class Crawl(SpiderCrawl):  # type: ignore[misc]  # kademlia has no annotations
    """Ask the `ksize` nodes nearest to `node`, at most `alpha` at a time. Use once: `answers = await crawl.find()`.

    `ask(node)` sends the question and returns a future of the reply, None for none. Crawls of one lookup share their
    `strangers`. `find` returns {node: reply} of everyone who answered.
    """

    def __init__(
        self,
        protocol: Any,
        node: Any,
        ksize: int,
        alpha: int,
        ask: Callable[[Any], "asyncio.Future[Any]"],
        strangers: Strangers | None = None,
    ) -> None:
        super().__init__(protocol, node, protocol.router.find_neighbors(node), ksize, alpha)
        self.answers: dict[Any, Any] = {}
        self._ask = ask
        self._strangers = strangers or Strangers(protocol.neighbourhood)
        self._seen = {near.id for _, near in self.nearest.heap} | {protocol.source_node.id}
        self._top = list(self.nearest)
        self._asked: set[bytes] = set()
        self._answered: set[bytes] = set()
        self._waiting: set[bytes] = set()  # asked, and holding the crawl up
        self._slow: set[bytes] = set()  # asked, and no longer waited for
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None

    async def find(self) -> dict[Any, Any]:
        self._step()
        try:
            await self._ended
        finally:
            self._ended.cancel()  # late replies of a cancelled crawl change nothing
            if self._timer is not None:
                self._timer.cancel()
        return self.answers

    def _step(self) -> None:
        if self._ended.done():
            return
        while (node := self._next()) is not None:
            if self.protocol.has_proved(node) or self._strangers.take(node.ip):
                self._asked.add(node.id)
                if self.protocol.is_silent(node.id):
                    self._give_way(node.id)
                else:
                    self._waiting.add(node.id)
                self._ask(node).add_done_callback(functools.partial(self._on_reply, node))
            else:
                self.nearest.remove([node.id])
                self._top = list(self.nearest)
        if self._is_complete():
            self._ended.set_result(None)
        elif self._waiting and self._timer is None:
            self._timer = self._loop.call_later(self.protocol.patience_s, self._on_patience_lost)

    def _next(self) -> Any:
        """Return the node to ask now, None if there is none."""
        if len(self._waiting) >= self.alpha or len(self._asked) >= MAX_ASKED:
            return None
        return next((node for node in self._top if node.id not in self._asked), None)

    def _is_complete(self) -> bool:
        if any(node.id in self._waiting for node in self._top):
            return False
        if any(node.id not in self._asked for node in self._top) and len(self._asked) < MAX_ASKED:
            return False
        return bool(self._answered) or not (self._waiting or self._slow)

    def _on_reply(self, node: Any, future: "asyncio.Future[Any]") -> None:
        self._waiting.discard(node.id)
        self._slow.discard(node.id)
        reply = None if future.cancelled() else future.result()
        if reply is None:
            self.nearest.remove([node.id])
            self._top = list(self.nearest)
        else:
            self.answers[node] = reply
            self._answered.add(node.id)
            self._add(reply)
        self._step()

    def _add(self, reply: Reply) -> None:
        contacts = self.protocol.router.contacts
        new = [contacts.get(named[0]) or Node(*named) for named in reply.nodes if self._is_worth_asking(*named)]
        if new:
            self.nearest.push(new)
            self._top = list(self.nearest)

    def _is_worth_asking(self, node_id: bytes, host: str, port: int) -> bool:
        if node_id in self._seen:
            return False
        self._seen.add(node_id)
        return self.protocol.neighbourhood.may_follow(host) and not self.protocol.shuns(node_id)

    def _on_patience_lost(self) -> None:
        self._timer = None
        for node_id in list(self._waiting):
            self.protocol.keeps_waiting(node_id)
            self._give_way(node_id)
        self._step()

    def _give_way(self, node_id: bytes) -> None:
        """Wait for the next nearest instead of this node. Its answer counts if it still comes."""
        self._waiting.discard(node_id)
        self._slow.add(node_id)
        self.nearest.remove([node_id])
        self._top = list(self.nearest)
