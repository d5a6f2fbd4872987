"""One UDP socket of the DHT: kademlia's protocol behind a gate.

Everything that arrives is decoded by type before anything looks at it; the rest is counted by reason and dropped
without a reply. A reply counts only if it comes from the address that was asked, and only if the node that was asked
is still the one that lives there. A request is sent a second time after `patience_s`, for lost packets, and given up
after a second.

A node enters the routing table once it has answered us, never because a datagram claims to be from it: an unknown
sender is pinged first. It leaves after two failures in a row. A known id at a new address moves there only when the
old address no longer answers.
"""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
from kademlia.node import Node
from kademlia.protocol import KademliaProtocol

from . import dht_messages as m
from .dht_records import RecordStore, WireRecord
from .dht_routing import ContactTable

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 1.0
MIN_PATIENCE_S = 0.25
SHUN_S = 10.0  # how long a node that did not answer is not asked again just because others still name it
MAX_SHUNNED = 1000
MAX_CHECKS = 64  # unknown senders being pinged at one time

Address = tuple[str, int]
Answer = asyncio.Future[Any]  # of a reply, or of None where none came


@dataclass(slots=True)
class _Pending:
    """A request on its way. `node_id` is who should answer, None for whoever lives at that address."""

    answer: Answer
    timer: asyncio.TimerHandle
    address: Address
    node_id: bytes | None
    decoder: msgspec.msgpack.Decoder[Any]
    datagram: bytes
    sent_at: float


class GuardedProtocol(KademliaProtocol):  # type: ignore[misc]  # kademlia has no annotations
    """Requests and replies of one node.

    `refused` counts what was dropped, by reason; `on_change` is called after the table gained or lost a contact.
    """

    def __init__(
        self, source_node: Any, storage: RecordStore, ksize: int, refused: Counter[str], on_change: Callable[[], None]
    ) -> None:
        super().__init__(source_node, storage, ksize)
        self.router = ContactTable(self, ksize, source_node)
        self.refused = refused
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._heard_at: dict[bytes, float] = {}
        self._failed_at: dict[bytes, float] = {}
        self._shunned_until: dict[bytes, float] = {}
        self._checks: dict[bytes, asyncio.Task[None]] = {}
        self._rtt_s = 0.0
        self._maps_v4 = False

    def __getattr__(self, name: str) -> Any:
        """Undo rpcudp's rule that every unknown attribute is a remote call."""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def patience_s(self) -> float:
        """How long to wait for a node before going on without it: twice the slowest recent round trip, bounded."""
        return min(max(2 * self._rtt_s, MIN_PATIENCE_S), REQUEST_TIMEOUT_S)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._maps_v4 = len(transport.get_extra_info("sockname")) == 4

    async def close(self) -> None:
        """Tell the contacts, close the socket, and end everything that waits for an answer."""
        goodbye = m.REQUEST + os.urandom(m.MESSAGE_ID_BYTES) + m.encode(m.Leave(self.source_node.id))
        for node in self.router.contacts.values():
            self._send(goodbye, (node.ip, node.port))
        self.transport.close()
        checks = list(self._checks.values())
        for check in checks:
            check.cancel()
        await asyncio.gather(*checks, return_exceptions=True)
        for pending in self._outstanding.values():
            pending.timer.cancel()
            pending.answer.cancel()
        self._outstanding.clear()

    def silent_for(self, node: Any) -> float:
        """Return for how many seconds nothing was heard from a contact."""
        return self._loop.time() - self._heard_at.get(node.id, 0.0)

    def shuns(self, node_id: bytes) -> bool:
        """True if this node has just failed to answer us and has not been heard of since."""
        return self._shunned_until.get(node_id, 0.0) > self._loop.time()

    # asking

    def ping(self, address: Address) -> Answer:
        """Ask who lives at `address`."""
        return self._ask(address, None, m.Ping(self.source_node.id))

    def call_ping(self, node: Any) -> Answer:
        return self._ask((node.ip, node.port), node.id, m.Ping(self.source_node.id))

    def call_find_node(self, node: Any, target: Any) -> Answer:
        return self._ask((node.ip, node.port), node.id, m.FindNode(self.source_node.id, target.id))

    def call_find_records(self, node: Any, key: bytes, after: bytes) -> Answer:
        return self._ask((node.ip, node.port), node.id, m.FindRecords(self.source_node.id, key, after))

    def call_store(self, node: Any, key: bytes, record: WireRecord) -> Answer:
        return self._ask((node.ip, node.port), node.id, m.Store(self.source_node.id, key, record))

    def _ask(self, address: Address, node_id: bytes | None, request: m.Request) -> Answer:
        message_id = os.urandom(m.MESSAGE_ID_BYTES)
        datagram = m.REQUEST + message_id + m.encode(request)
        answer: Answer = self._loop.create_future()
        timer = self._loop.call_later(self.patience_s, self._send_again, message_id)
        self._outstanding[message_id] = _Pending(
            answer, timer, address, node_id, m.reply_decoders[type(request)], datagram, self._loop.time()
        )
        self._send(datagram, address)
        return answer

    def _send(self, datagram: bytes, address: Address) -> None:
        if self.transport.is_closing():
            return
        host, port = address
        self.transport.sendto(datagram, (f"::ffff:{host}" if self._maps_v4 and ":" not in host else host, port))

    def _send_again(self, message_id: bytes) -> None:
        pending = self._outstanding[message_id]
        left_s = max(0.0, pending.sent_at + REQUEST_TIMEOUT_S - self._loop.time())
        pending.timer = self._loop.call_later(left_s, self._timeout, message_id)
        self._send(pending.datagram, pending.address)

    def _timeout(self, message_id: bytes) -> None:
        pending = self._outstanding.pop(message_id)
        self._conclude(pending, None)

    def _conclude(self, pending: _Pending, reply: m.AnyReply | None) -> None:
        if reply is not None:
            self._heard(Node(reply.sender, *pending.address))
        elif pending.node_id is not None:
            self._failed(pending.node_id, pending.sent_at)
        if not pending.answer.done():
            pending.answer.set_result(reply)

    # the gate

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        address = (addr[0].removeprefix("::ffff:") if self._maps_v4 else addr[0], addr[1])
        if not m.HEADER_BYTES < len(data) <= m.MAX_DATAGRAM_BYTES:
            self._refuse("size", address)
            return
        kind, message_id, body = data[:1], data[1 : m.HEADER_BYTES], memoryview(data)[m.HEADER_BYTES :]
        if kind == m.REQUEST:
            self._accept_request(message_id, body, address)
        elif kind == m.REPLY:
            self._accept_response(message_id, body, address)
        else:
            self._refuse("kind", address)

    def error_received(self, exc: Exception) -> None:
        self.refused["not sent"] += 1
        log.debug("dht: a datagram was not sent: %s", exc)

    def _refuse(self, reason: str, address: Address) -> None:
        self.refused[reason] += 1
        log.debug("dht: refused a datagram from %s port %d: %s", *address, reason)

    def _accept_request(self, message_id: bytes, body: memoryview, address: Address) -> None:
        try:
            request: m.Request = m.request_decoder.decode(body)
        except (msgspec.DecodeError, ValueError, RecursionError):
            self._refuse("request", address)
            return
        sender = Node(request.sender, *address)
        if isinstance(request, m.Leave):
            self._say_goodbye(sender)
        else:
            self._send(m.REPLY + message_id + m.encode(self._answer(request)), address)
            self.welcome_if_new(sender)

    def _accept_response(self, message_id: bytes, body: memoryview, address: Address) -> None:
        pending: _Pending | None = self._outstanding.get(message_id)
        if pending is None:
            self._refuse("reply to no question", address)
            return
        if pending.address != address:
            self._refuse("reply from elsewhere", address)
            return
        del self._outstanding[message_id]
        pending.timer.cancel()
        reply: m.AnyReply | None = None
        try:
            reply = pending.decoder.decode(body)
        except (msgspec.DecodeError, ValueError, RecursionError):
            self._refuse("reply", address)
        if reply is not None:
            self._rtt_s = max(self._loop.time() - pending.sent_at, 0.9 * self._rtt_s)
            if pending.node_id not in (None, reply.sender):
                self._refuse("reply by another node", address)
                self._forget(pending.node_id)
                reply = None
        self._conclude(pending, reply)

    # answering

    def _answer(self, request: m.Ping | m.FindNode | m.FindRecords | m.Store) -> m.AnyReply:
        own_id = self.source_node.id
        match request:
            case m.Ping():
                return m.Named(own_id, [])
            case m.FindNode(sender, target):
                return m.Named(own_id, self._near(target, sender, m.MAX_NODES))
            case m.Store(sender, key, record):
                held = self.storage.put(key, record)
                return m.Stored(own_id, self._near(key, sender, m.NODES_WITH_RECORDS), held)
            case m.FindRecords(sender, key, after):
                near = self._near(key, sender, m.NODES_WITH_RECORDS) if not after else []
                return m.page_of(own_id, self.storage.records(key), after, near)

    def _near(self, target: bytes, asker: bytes, k: int) -> list[tuple[bytes, str, int]]:
        near = self.router.find_neighbors(Node(target), k, exclude=Node(asker))
        return [(node.id, node.ip, node.port) for node in near]

    # who lives

    def welcome_if_new(self, node: Any) -> None:
        """Take note of the sender of a request. Unlike the stock method this hands no records over: publishers do."""
        known = self.router.contacts.get(node.id)
        if known is not None and known.same_home_as(node):
            self._heard_at[node.id] = self._loop.time()
        elif known is not None or not self.router.knows(node.id):
            self._start_check(node.id, self._meet(node))

    def _say_goodbye(self, node: Any) -> None:
        known = self.router.contacts.get(node.id)
        if known is not None and known.same_home_as(node):
            self._forget(node.id)

    async def _meet(self, node: Any) -> None:
        known = self.router.contacts.get(node.id)
        if known is not None and not known.same_home_as(node):
            if await self.call_ping(known) is not None:
                return  # the one we know still lives where we know it
            self._forget(node.id)
        await self.call_ping(node)

    def _start_check(self, node_id: bytes, check: Coroutine[Any, Any, None]) -> None:
        if node_id in self._checks or node_id == self.source_node.id or len(self._checks) >= MAX_CHECKS:
            check.close()
            return
        self._checks[node_id] = task = self._loop.create_task(check)
        task.add_done_callback(lambda _: self._checks.pop(node_id))

    def _heard(self, node: Any) -> None:
        self._shunned_until.pop(node.id, None)
        known = self.router.contacts.get(node.id)
        if known is not None and not known.same_home_as(node):
            self._start_check(node.id, self._meet(node))
        elif known is not None:
            self._failed_at.pop(node.id, None)
            self._heard_at[node.id] = self._loop.time()
        elif node.id != self.source_node.id and not self.router.knows(node.id):
            self.router.add_contact(node)
            self._heard_at[node.id] = self._loop.time()
            self._on_change()

    def _failed(self, node_id: bytes, sent_at: float) -> None:
        known = self.router.contacts.get(node_id)
        if known is None:
            self._shun(node_id)
        elif node_id not in self._failed_at:
            self._failed_at[node_id] = self._loop.time()
            self._start_check(node_id, self._meet(known))
        elif sent_at >= self._failed_at[node_id]:  # requests of one burst are one failure
            self._shun(node_id)
            self._forget(node_id)

    def _shun(self, node_id: bytes) -> None:
        if len(self._shunned_until) >= MAX_SHUNNED:
            self._shunned_until.clear()
        self._shunned_until[node_id] = self._loop.time() + SHUN_S

    def _forget(self, node_id: bytes) -> None:
        self._failed_at.pop(node_id, None)
        self._heard_at.pop(node_id, None)
        if (known := self.router.contacts.get(node_id)) is not None:
            self.router.remove_contact(known)
            self._on_change()
