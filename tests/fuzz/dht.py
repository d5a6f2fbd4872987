"""Datagrams of the DHT, with and without a valid MAC, and what a node makes of the records in them.

A MAC or a signature would end every search at the gate. So the first byte of an input says whether the swarm is open
and whether the rest is a datagram as it is, or the inside of one: a request of a member, or a reply, as a rule to the
question that the node has just asked. What a hostile member would sign is signed. The node runs on a loop whose time
stands still, behind a transport that only looks at what is sent.
"""

import asyncio
import atexit
import functools
from collections import Counter
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from fuzz.local import state, swarm_files
from fuzz.swarm import ADMITTER, ADMITTER_KEY, BY_ADMITTER, PEER_KEY, SWARM
from fuzz.target import Choices, Target, frame
from kademlia.node import Node

from mpd.daemon import dht_messages as m
from mpd.daemon.budgets import Budgets
from mpd.daemon.dht_gate import MAX_DATAGRAM_BYTES, REPLY, REQUEST, DhtTrust, Gate, OpenTrust
from mpd.daemon.dht_limits import Neighbourhood
from mpd.daemon.dht_lookup import Seeker
from mpd.daemon.dht_proof import Proofs
from mpd.daemon.dht_protocol import GuardedProtocol
from mpd.daemon.dht_records import RecordStore, WireRecord, digest_of, valid
from mpd.daemon.swarm import Swarm
from mpd.daemon.swarm_store import SwarmStore
from mpd.identity import issue_leaf

NOW_S, WALL_MS = 1000.0, 1_800_000_000_000
HERE, THERE, ELSEWHERE, AT = ("192.0.2.1", 4747), ("198.51.100.2", 4747), ("198.51.100.3", 4747), b"k" * 20
MESSAGE_ID = b"i" * 20
THEIR_KEY = Ed25519PrivateKey.from_private_bytes(bytes([8]) * 32)

# What the first byte of a datagram's input is made of.
PRIVATE = 128
AS_IT_IS, REQUESTED, REPLIED = range(3)
PING, FIND_NODE, FIND_RECORDS, INTRODUCE, STORE, UNASKED, FROM_ELSEWHERE = range(7)


class Outsider(OpenTrust):
    """Whoever writes the datagrams: a member of the very swarm that `own` is in."""

    def __init__(self, own: DhtTrust) -> None:
        super().__init__(THEIR_KEY)
        self.swarm_id, self.is_open = own.swarm_id, own.is_open
        self.datagram_keys = own.datagram_keys
        leaf = issue_leaf(ADMITTER_KEY, ADMITTER, SWARM, self.public_key, "member", WALL_MS / 1000, 9)
        self.shown = [] if own.is_open else [leaf.public_bytes(Encoding.DER), BY_ADMITTER[1]]


@functools.cache
def own_trust(is_open: bool) -> DhtTrust:
    """Return what our node goes by."""
    if is_open:
        return OpenTrust(PEER_KEY)
    swarm_files()
    return Swarm(PEER_KEY, lambda: WALL_MS / 1000, bytes, SwarmStore(state().path))


@functools.cache
def their_trust(is_open: bool) -> Outsider:
    """Return what the hostile member goes by."""
    return Outsider(own_trust(is_open))


class StillLoop(asyncio.SelectorEventLoop):
    """A loop in which no time passes, so that nothing is sent twice or given up; it keeps what went wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[Any] = []
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        return NOW_S


@functools.cache
def still_loop() -> StillLoop:
    """Return the loop on which all inputs are tried."""
    loop = StillLoop()
    atexit.register(loop.close)
    return loop


class Wire:
    """A transport that checks what a node sends, and forgets it."""

    def get_extra_info(self, name: str) -> tuple[str, int]:
        return HERE

    def sendto(self, datagram: bytes, address: tuple[str, int]) -> None:
        assert len(datagram) <= MAX_DATAGRAM_BYTES

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass


class Scene:
    """Our node, and the hostile member that writes to it."""

    def __init__(self, is_open: bool) -> None:
        self.refused: Counter[str] = Counter()
        own, self.them = own_trust(is_open), their_trust(is_open)
        budgets = Budgets()
        gate = Gate(own, lambda: WALL_MS, lambda: NOW_S, budgets, self.refused)
        self.proofs, self.theirs = (Proofs(trust, lambda: NOW_S) for trust in (own, self.them))
        store = RecordStore(lambda: WALL_MS, budgets, self.proofs.is_genuine)
        near = Neighbourhood(is_open)
        self.node = GuardedProtocol(own, gate, self.proofs, store, near, self.refused, lambda: None)
        self.node.connection_made(Wire())
        self.sender = Gate(self.them, lambda: WALL_MS, lambda: NOW_S, budgets, Counter())

    def ask(self, which: int) -> bytes:
        """Ask the member a question; return the message id that a reply should have."""
        peer = Node(self.theirs.own_id, *THERE)
        if which == UNASKED:
            return MESSAGE_ID
        if which == PING:
            self.node.call_ping(peer)
        else:
            self.node.contacts.proved(peer)
            record = self.proofs.sign_record(AT, 1, WALL_MS + 60_000, b"value")
            questions = {
                FIND_NODE: lambda: self.node.call_find_node(peer, Node(AT)),
                FIND_RECORDS: lambda: self.node.call_find_records(peer, AT, 0, b""),
                INTRODUCE: lambda: self.node.call_introduce(peer, self.them.public_key),
            }
            questions.get(which, lambda: self.node.call_store(peer, AT, 0, record))()
        return next(iter(self.node.calls.waiting))


# ------------------------------------------------------------------------------------------------------------ datagrams


def parse_datagram(data: bytes) -> Counter[str]:
    """Whatever arrives, the node lives on, owes nobody a reply, and counts what it refused."""
    refused = still_loop().run_until_complete(_receive(data[0] if data else 0, data[1:]))
    assert not still_loop().errors, still_loop().errors
    return refused


async def _receive(how: int, body: bytes) -> Counter[str]:
    scene = Scene(is_open=how < PRIVATE)
    which, inside = divmod(how % PRIVATE, 3)
    if inside == REPLIED:
        which %= 7
        message_id = scene.ask(which)
        body = _signed_home(scene, message_id, body) if which == PING else body
        datagram = scene.sender.seal(REPLY, message_id, body)
    elif inside == REQUESTED:
        datagram = scene.sender.seal(REQUEST, MESSAGE_ID, _signed_request(scene, body))
    else:
        datagram = body
    scene.node.datagram_received(datagram, ELSEWHERE if which == FROM_ELSEWHERE else THERE)
    await asyncio.sleep(0)
    await scene.node.close(WALL_MS)
    return scene.refused


def _signed_home(scene: Scene, message_id: bytes, body: bytes) -> bytes:
    """Return the reply with the signature that it should have, if it is one."""
    try:
        home = msgspec.msgpack.decode(body, type=m.Home)
        signature = scene.theirs.sign_home(scene.proofs.own_id, message_id, (home.seen_host, home.seen_port))
    except (msgspec.MsgspecError, ValueError):
        return body
    return m.encode(msgspec.structs.replace(home, signature=signature))


def _signed_request(scene: Scene, body: bytes) -> bytes:
    """Return the request with the signature that it should have, if it has one."""
    try:
        request = m.request_decoder.decode(body)
    except (msgspec.MsgspecError, ValueError):
        return body
    if isinstance(request, m.Store):
        request = msgspec.structs.replace(request, record=_signed(scene, request.key, request.record))
    elif isinstance(request, m.Leave) and request.signature == bytes(64):
        request = msgspec.structs.replace(request, signature=scene.theirs.sign_goodbye(request.at_ms))
    return m.encode_request(request)


def datagram_seeds() -> list[bytes]:
    return [seed for is_open in (True, False) for seed in still_loop().run_until_complete(_datagrams(is_open))]


async def _datagrams(is_open: bool) -> list[bytes]:
    scene = Scene(is_open)
    me, you, public, chain = scene.theirs.own_id, scene.proofs.own_id, scene.them.public_key, scene.them.shown
    record = scene.theirs.sign_record(AT, 3, WALL_MS + 60_000, b"value")
    requests = [
        m.Ping(me, you, public, chain),
        m.FindNode(me, you, AT),
        m.FindNode(me, AT, AT),
        m.FindNode(b"p" * 20, you, AT),  # who is revoked in the private swarm
        m.FindRecords(me, you, AT, 1, b""),
        m.Store(me, you, AT, 0, record),
        m.Introduce(me, you, public),
        m.Leave(me, you, WALL_MS, public, bytes(64)),
    ]
    nodes = [(bytes([i]) * 20, f"203.0.113.{i}", 4747) for i in range(1, 4)]
    replies = {
        PING: m.Home(me, public, chain, *HERE, bytes(64)),
        FIND_NODE: m.Named(me, nodes),
        FIND_RECORDS: m.Page(me, nodes, [record], 1, bytes(16)),
        INTRODUCE: m.Introduction(me, chain),
        STORE: m.Stored(me, nodes, False, False),
        UNASKED: m.Named(me, []),
        FROM_ELSEWHERE: m.Named(me, []),
    }
    swarm = 0 if is_open else PRIVATE
    return [
        *(bytes([swarm + REQUESTED]) + m.encode(request) for request in requests),
        *(bytes([swarm + AS_IT_IS]) + scene.sender.seal(REQUEST, bytes(20), m.encode_request(r)) for r in requests),
        *(bytes([swarm + 3 * which + REPLIED]) + m.encode(reply) for which, reply in replies.items()),
    ]


# -------------------------------------------------------------------------------------------------------------- lookups


def parse_lookup(data: bytes) -> dict[bytes, WireRecord]:
    """Whatever a contact hands out page by page, a lookup ends, and returns genuine records of members only."""
    return still_loop().run_until_complete(_look_up(Choices(data)))


async def _look_up(choices: Choices) -> dict[bytes, WireRecord]:
    scene = Scene(is_open=choices.number(2) == 0)
    scene.node.contacts.proved(Node(scene.theirs.own_id, *THERE))

    def answer(kind: type[Any]) -> asyncio.Future[Any]:
        future = still_loop().create_future()
        future.set_result(_reply(scene, kind, choices.frame()) if choices else None)
        return future

    scene.node.call_find_records = lambda *_: answer(m.Page)
    scene.node.call_introduce = lambda *_: answer(m.Introduction)
    found = await Seeker(scene.node, scene.proofs, lambda: WALL_MS, 8, scene.refused).seek(AT)
    await scene.node.close(WALL_MS)
    assert all(scene.proofs.is_genuine(AT, record) and scene.proofs.is_member(key) for key, record in found.items())
    return found


def _reply(scene: Scene, kind: type[Any], body: bytes) -> Any:
    """Return the reply in `body`, None if there is none; what they could have signed of a page is signed."""
    try:
        reply = msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, ValueError):
        return None
    if kind is m.Page:
        return msgspec.structs.replace(reply, records=[_signed(scene, AT, record) for record in reply.records])
    return reply


def _signed(scene: Scene, key: bytes, record: WireRecord) -> WireRecord:
    if record.public_key != scene.them.public_key or not valid(record, WALL_MS):
        return record
    return scene.theirs.sign_record(key, record.seq, record.expires_at_ms, record.value)


def lookup_seeds() -> list[bytes]:
    return [seed for is_open in (True, False) for seed in still_loop().run_until_complete(_lookups(is_open))]


async def _lookups(is_open: bool) -> list[bytes]:
    scene = Scene(is_open)
    me, nodes = scene.theirs.own_id, [(bytes(20), "203.0.113.7", 1)]
    theirs = [scene.theirs.sign_record(AT, seq, WALL_MS + 60_000, bytes(seq)) for seq in range(3)]
    forged = WireRecord(b"z" * 32, 5, WALL_MS + 1, b"forged", bytes(64))
    rest = [m.Page(me, [], [forged], 0, b""), m.Introduction(me, scene.them.shown)]
    seeds = []
    for records, more in (([], 0), (theirs[:1], 0), (theirs, 1), ([theirs[2], forged], 2)):
        named = [] if records else nodes  # who is named is asked next
        said = [m.Page(me, named, records, more, digest_of(records)), *(rest if more else rest[1:])]
        seeds.append(bytes([not is_open]) + b"".join(frame(m.encode(each)) for each in said))
    return seeds


TARGETS = {
    "datagram": Target(parse_datagram, (), datagram_seeds, max_bytes=1600),
    "lookup": Target(parse_lookup, (), lookup_seeds, max_bytes=4096),
}
