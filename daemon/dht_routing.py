"""Which nodes are near a key: kademlia's routing table and crawler, with their rough edges replaced by subclassing.

The table sorts all its contacts instead of the first few buckets it happens to visit, files every id into the bucket
that covers it, and splits only the bucket that covers our own id, so hostile ids cannot make it grow without bound.

The crawl is a small event-driven machine with no task per request. It asks the nearest nodes it knows, adds the nodes
they name, and ends when the `ksize` nearest have answered. Who keeps it waiting too long no longer holds it up, as
long as somebody else has answered; the next nearest is asked instead.
"""

import asyncio
import functools
import ipaddress
from collections.abc import Callable
from typing import Any, Protocol

from kademlia.crawling import SpiderCrawl
from kademlia.node import Node
from kademlia.routing import KBucket, RoutingTable

from mpd.ids import PEER_ID_BYTES

MAX_ASKED = 20  # nodes that one crawl sends to, whatever the replies name


class ContactTable(RoutingTable):  # type: ignore[misc]  # kademlia has no annotations
    """The nodes that have answered us, in buckets. `contacts` maps the ids of those in use to their nodes."""

    def flush(self) -> None:
        self.buckets = [KBucket(0, 2 ** (8 * PEER_ID_BYTES) - 1, self.ksize)]
        self.contacts: dict[bytes, Any] = {}

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


class Reply(Protocol):
    """What a crawl needs of an answer: the nodes it names, as (id, host, port)."""

    @property
    def nodes(self) -> list[tuple[bytes, str, int]]: ...


class Crawl(SpiderCrawl):  # type: ignore[misc]  # kademlia has no annotations
    """Ask the `ksize` nodes nearest to `node`, at most `alpha` at a time. Use once: `answers = await crawl.find()`.

    `ask(node)` sends the question and returns a future of the reply, None for none. `patience_s` is how long a node
    may keep the others waiting. `find` returns {node: reply} of everyone who answered.
    """

    def __init__(
        self, protocol: Any, node: Any, ksize: int, alpha: int, ask: Callable[[Any], "asyncio.Future[Any]"]
    ) -> None:
        super().__init__(protocol, node, protocol.router.find_neighbors(node), ksize, alpha)
        self.answers: dict[Any, Any] = {}
        self._ask = ask
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
        for node in self._top:
            if len(self._waiting) >= self.alpha or len(self._asked) >= MAX_ASKED:
                break
            if node.id not in self._asked:
                self._asked.add(node.id)
                self._waiting.add(node.id)
                self._ask(node).add_done_callback(functools.partial(self._on_reply, node))
        if self._is_complete():
            self._ended.set_result(None)
        elif self._waiting and self._timer is None:
            self._timer = self._loop.call_later(self.protocol.patience_s, self._on_patience_lost)

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
        new = [Node(*named) for named in reply.nodes if self._is_worth_asking(*named)]
        if new:
            self.nearest.push(new)
            self._top = list(self.nearest)

    def _is_worth_asking(self, node_id: bytes, host: str, port: int) -> bool:
        if node_id in self._seen:
            return False
        self._seen.add(node_id)
        return is_address(host) and not self.protocol.shuns(node_id)

    def _on_patience_lost(self) -> None:
        self._timer = None
        self._slow |= self._waiting
        self._waiting.clear()
        self.nearest.remove(self._slow)
        self._top = list(self.nearest)
        self._step()


@functools.lru_cache(maxsize=4096)
def is_address(host: str) -> bool:
    """True if `host` is a numeric address of one machine. Names, groups and wildcards are not."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return not (address.is_multicast or address.is_unspecified or "%" in host)
