"""One UDP socket of the DHT: kademlia's protocol behind a gate.

Everything that arrives passes the gate (`dht_gate.py`), is decoded by type, and is counted by reason and dropped
without a reply where it does not fit. What this node asks is in `dht_calls.py`, whom it counts on in `dht_contacts.py`;
here is what it answers, and what it makes of the answers of others.

Only a node that has proved its key is asked for anything; one that others named is asked for its proof first.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
from kademlia.node import Node
from kademlia.protocol import KademliaProtocol

from mpd.ids import peer_id_of

from . import dht_messages as m
from . import faults
from .dht_calls import Answer, Call, Calls, then
from .dht_contacts import Contacts
from .dht_filter import Sieve
from .dht_gate import MAX_DATAGRAM_BYTES, MESSAGE_ID_BYTES, REPLY, REQUEST, Address, DhtTrust, Gate, Muted
from .dht_limits import LOOPBACK, Neighbourhood, kind_of
from .dht_proof import Proofs
from .dht_records import RecordStore, WireRecord
from .dht_routing import ContactTable

log = logging.getLogger(__name__)


class GuardedProtocol(KademliaProtocol):  # type: ignore[misc]  # kademlia has no annotations
    """Requests and replies of one node.

    `refused` counts what was dropped, by reason; `on_change` is called after the table gained or lost a contact.
    """

    def __init__(
        self,
        trust: DhtTrust,
        gate: Gate,
        proofs: Proofs,
        storage: RecordStore,
        neighbourhood: Neighbourhood,
        refused: Counter[str],
        on_change: Callable[[], None],
        ksize: int = 20,
    ) -> None:
        super().__init__(Node(proofs.own_id), storage, ksize)
        self.router = ContactTable(self, ksize, self.source_node)
        self.refused = refused
        self.neighbourhood = neighbourhood
        self.contacts = Contacts(self.router, neighbourhood, self._ping_node, refused, on_change)
        self.calls = Calls(gate, self._send, self._judge, refused)
        self._trust = trust
        self._gate = gate
        self._proofs = proofs
        self._pings: dict[tuple[bytes, Address], Answer] = {}
        self._own_address: Address = ("", 0)
        self._maps_v4 = False
        self._muted: Muted | None = None
        self._unwanted: Sieve | None = None
        self.n_unasked = 0  # requests from addresses that we had not asked anything

    def __getattr__(self, name: str) -> Any:
        """Undo rpcudp's rule that every unknown attribute is a remote call."""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def patience_s(self) -> float:
        return self.calls.patience_s

    def has_proved(self, node: Any) -> bool:
        return self.contacts.has_proved(node)

    def shuns(self, node_id: bytes) -> bool:
        return self.contacts.shuns(node_id)

    def is_silent(self, node_id: bytes) -> bool:
        return self.contacts.is_silent(node_id)

    def keeps_waiting(self, node_id: bytes) -> None:
        self.contacts.keeps_waiting(node_id)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        sockname = transport.get_extra_info("sockname")
        self._own_address = (sockname[0], sockname[1])
        self._maps_v4 = len(sockname) == 4

    async def close(self, at_ms: int) -> None:
        """Tell the contacts that we leave at `at_ms`, close the socket, and end everything that waits."""
        if self.router.contacts:
            own_id, public_key = self.source_node.id, self._trust.public_key
            goodbye = m.encode_request(m.Leave(own_id, b"", at_ms, public_key, self._proofs.sign_goodbye(at_ms)))
            datagram = self._gate.seal(REQUEST, bytes(MESSAGE_ID_BYTES), goodbye)
            for node in self.router.contacts.values():
                self._send(datagram, (node.ip, node.port))
        self.transport.close()
        await self.contacts.close()
        self.calls.close()

    def drop_revoked(self) -> None:
        """Forget everybody who is no longer a member."""
        for node in list(self.router.everyone()):
            if self._trust.is_revoked(node.id):
                self.contacts.forget(node.id)
        self.storage.drop_publishers(self._proofs.is_revoked)

    # asking

    def ping(self, address: Address) -> Answer:
        """Ask who lives at `address`, which we were told to ask."""
        self.neighbourhood.learn(address[0])
        return self._ping(address, None, repeat=True)

    def call_ping(self, node: Any) -> Answer:
        return self._ping_node(node, repeat=True)

    def call_find_node(self, node: Any, target: Any) -> Answer:
        return self._ask(node, m.FindNode(self.source_node.id, node.id, target.id))

    def call_find_records(self, node: Any, key: bytes, salt: int, after: bytes) -> Answer:
        return self._ask(node, m.FindRecords(self.source_node.id, node.id, key, salt, after))

    def call_introduce(self, node: Any, public_key: bytes) -> Answer:
        return self._ask(node, m.Introduce(self.source_node.id, node.id, public_key))

    def call_store(self, node: Any, key: bytes, salt: int, record: WireRecord) -> Answer:
        """Ask `node` to hold our record. To one that does not know us we introduce ourselves, and ask again."""
        store = m.Store(self.source_node.id, node.id, key, salt, record)

        def once_more(reply: m.Stored | None) -> Any:
            if reply is None or reply.held or reply.knows:
                return reply
            return then(self.call_ping(node), lambda home: None if home is None else self._ask(node, store))

        return then(self._ask(node, store), once_more)

    def _ask(self, node: Any, request: m.Request) -> Answer:
        if self.has_proved(node):
            return self.calls.ask((node.ip, node.port), node.id, request)
        home = self._ping_node(node, repeat=False)
        return then(home, lambda it: None if it is None else self.calls.ask((node.ip, node.port), node.id, request))

    def _ping_node(self, node: Any, repeat: bool) -> Answer:
        """Ask `node` for its proof, once at a time."""
        where = (node.id, (node.ip, node.port))
        if (answer := self._pings.get(where)) is None or answer.done():
            answer = self._pings[where] = self._ping((node.ip, node.port), node.id, repeat)
            answer.add_done_callback(lambda _: self._pings.pop(where, None))
        return answer

    def _ping(self, address: Address, node_id: bytes | None, repeat: bool) -> Answer:
        ping = m.Ping(self.source_node.id, node_id or b"", self._trust.public_key, list(self._trust.chain()))
        return self.calls.ask(address, node_id, ping, repeat)

    def _send(self, datagram: bytes, address: Address) -> None:
        if self.transport.is_closing() or (faults.armed and faults.is_cut_off()):
            return
        if len(datagram) > MAX_DATAGRAM_BYTES:
            self.refused["too long to send"] += 1
            return
        host, port = address
        self.transport.sendto(datagram, (f"::ffff:{host}" if self._maps_v4 and ":" not in host else host, port))

    def _judge(self, call: Call, reply: m.AnyReply | None) -> m.AnyReply | None:
        if reply is None:
            if call.node_id is not None:
                self.contacts.failed(Node(call.node_id, *call.address), call.sent_at)
            return None
        if call.node_id not in (None, reply.sender):
            self.refused["reply by another node"] += 1
            self.contacts.left(Node(call.node_id, *call.address))
            return None
        sender = Node(reply.sender, *call.address)
        if not isinstance(reply, m.Home):
            self.contacts.heard(sender)
        elif self._is_proof(call, reply):
            self.contacts.proved(sender)
        else:
            self.refused["proof"] += 1
            return None
        return reply

    def _is_proof(self, call: Call, home: m.Home) -> bool:
        if home.sender != peer_id_of(home.public_key):
            return False
        seen = (home.seen_host, home.seen_port)
        return (
            (home.sender == self.source_node.id or self._is_ours(seen, call.address))
            and self._proofs.is_home(home.public_key, call.message_id, seen, home.signature)
            and self._proofs.admit(home.public_key, home.chain)
        )

    def _is_ours(self, seen: Address, asked: Address) -> bool:
        """Return whether our question can have come from `seen`: if not, somebody between us passed it on."""
        if kind_of(self._own_address[0]) == LOOPBACK:
            return seen == self._own_address
        return seen != asked

    # the gate

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        address = (addr[0].removeprefix("::ffff:") if self._maps_v4 else addr[0], addr[1])
        opened = self._gate.open(data, address, self.contacts.at(address), self.calls.expects(address))
        if opened is None:
            return
        if opened.is_request:
            self._accept_request(opened.message_id, opened.body, address, len(data))
        else:
            self.calls.accept(opened.message_id, opened.body, address)

    def unwanted(self) -> Sieve | None:
        """Return what the gate would refuse whatever it says; the same object while that is unchanged."""
        muted = self._gate.muted()
        if muted is not self._muted:
            self._muted = muted
            contacts = frozenset(self.router.homes)
            self._unwanted = None if muted is None else Sieve(contacts, self.calls.addresses(), muted.sources)
        return self._unwanted

    def error_received(self, exc: Exception) -> None:
        self.refused["not sent"] += 1
        log.debug("dht: a datagram was not sent: %s", exc)

    def _accept_request(self, message_id: bytes, body: memoryview, address: Address, n_bytes: int) -> None:
        try:
            request: m.Request = m.request_decoder.decode(body)
        except (msgspec.DecodeError, ValueError, RecursionError):
            self.refused["request"] += 1
            return
        reason = self._reason_against(request, n_bytes)
        if reason:
            self.refused[reason] += 1
            return
        sender = Node(request.sender, *address)
        self.n_unasked += self.contacts.at(address) is None and not self.calls.expects(address)
        if isinstance(request, m.Leave):
            self.contacts.left(sender)
        else:
            answer = m.encode(self._answer(request, message_id, address))
            self._send(self._gate.seal(REPLY, message_id, answer), address)
            self.contacts.welcome(sender)

    def _reason_against(self, request: m.Request, n_bytes: int) -> str:
        if request.to not in (b"", self.source_node.id):
            return "for another node"
        if self._trust.is_revoked(request.sender):
            return "revoked"
        if n_bytes < m.MIN_REQUEST_BYTES and not isinstance(request, m.Leave):
            return "short request"
        if isinstance(request, m.Ping | m.Leave) and request.sender != peer_id_of(request.public_key):
            return "proof"
        if isinstance(request, m.Ping) and not self._proofs.admit(request.public_key, request.chain):
            return "no member"
        if isinstance(request, m.Leave) and not self._is_goodbye(request):
            return "proof"
        return ""

    def _is_goodbye(self, leave: m.Leave) -> bool:
        return self._gate.is_now(leave.at_ms) and self._proofs.is_goodbye(
            leave.public_key, leave.at_ms, leave.signature
        )

    # answering

    def _answer(
        self, request: m.Ping | m.FindNode | m.FindRecords | m.Store | m.Introduce, message_id: bytes, address: Address
    ) -> m.AnyReply:
        own_id = self.source_node.id
        match request:
            case m.Ping():
                signature = self._proofs.sign_home(request.sender, message_id, address)
                return m.Home(own_id, self._trust.public_key, list(self._trust.chain()), *address, signature)
            case m.FindNode():
                return m.Named(own_id, self._near(request.target, request.sender, m.MAX_NODES))
            case m.Store():
                near = self._near(m.location(request.key, request.salt), request.sender, m.NODES_WITH_RECORDS)
                crowd = self.neighbourhood.crowd_of(address[0])
                knows = self._proofs.is_member(request.record.public_key) and (
                    crowd is None or self.has_proved(Node(peer_id_of(request.record.public_key), *address))
                )  # where addresses count, anybody can write another one on a datagram
                held = knows and self.storage.put(request.key, request.record, crowd)
                return m.Stored(own_id, near, held, knows)
            case m.FindRecords():
                where = m.location(request.key, request.salt)
                near = [] if request.after else self._near(where, request.sender, m.NODES_WITH_RECORDS)
                return m.page_of(own_id, self.storage.records(request.key), request.after, near)
            case m.Introduce():
                return m.Introduction(own_id, list(self._proofs.chain_of(request.public_key)))

    def _near(self, target: bytes, asker: bytes, k: int) -> list[tuple[bytes, str, int]]:
        near = self.router.find_neighbors(Node(target), k, exclude=Node(asker))
        return [(node.id, node.ip, node.port) for node in near]
