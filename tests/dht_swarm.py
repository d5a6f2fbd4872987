"""What the DHT tests share: swarms of real nodes on the loopback interface, and single nodes on a stage.

Swarms talk to real sockets, in a thread or on a loop of the test, which no mock clock reaches; so `eventually` and
`until` look again every few milliseconds and give up after seconds. On a stage the transport is a list of what was
sent, and the test plays the network: actors hold keys of the swarm, and say with them whatever the test wants.
"""

import asyncio
import os
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from mpd.daemon import dht_messages as m
from mpd.daemon.budgets import Budgets
from mpd.daemon.dht import Dht, DhtConfig, open_dht
from mpd.daemon.dht_gate import HEADER_BYTES, REPLY, REQUEST, Address, DhtTrust, Gate, OpenTrust
from mpd.daemon.dht_limits import Neighbourhood
from mpd.daemon.dht_node import DhtNode, start_node, wall_ms
from mpd.daemon.dht_proof import Proofs
from mpd.daemon.dht_protocol import GuardedProtocol
from mpd.daemon.dht_records import RecordStore, WireRecord
from mpd.errors import PeerError
from mpd.identity import issue_leaf, new_root, swarm_id_of, verify_member
from mpd.ids import Endpoint, PeerId, peer_id_of

PATIENCE_S = 30.0
LOOK_AGAIN_S = 0.01
NOW_MS = 1_800_000_000_000  # on a stage
SOAK = os.environ.get("MPD_SOAK") == "1"
HERE, ELSEWHERE = ("192.0.2.1", 4747), ("198.51.100.2", 4747)


def size(short: int, full: int) -> int:
    """Return how often to try: `full` with MPD_SOAK=1 in the environment."""
    return full if SOAK else short


# ----------------------------------------------------------------------------------------------------------------- keys


def key(number: int) -> Ed25519PrivateKey:
    """Return the key of peer `number`, the same in every run."""
    return Ed25519PrivateKey.from_private_bytes(random.Random(number).randbytes(32))


def public(number: int) -> bytes:
    return key(number).public_key().public_bytes_raw()


def peer(number: int) -> PeerId:
    """Return the id of peer `number`."""
    return peer_id_of(public(number))


def open_trust(number: int) -> OpenTrust:
    return OpenTrust(key(number))


class PrivateSwarm:
    """A swarm with a root; `keys` are those for datagrams, the first one for sending. Both sets may change any time."""

    def __init__(self, now_s: float = NOW_MS / 1000) -> None:
        self.root_key = key(-1)
        self.root = new_root(self.root_key, "test", now_s, 1)
        self.now_s = now_s
        self.keys: tuple[bytes, ...] = (b"s" * 32,)
        self.revoked: set[bytes] = set()

    def member(self, number: int) -> "PrivateTrust":
        leaf = issue_leaf(
            self.root_key, self.root, swarm_id_of(self.root), public(number), "member", self.now_s, 1000 + number
        )
        return PrivateTrust(self, number, (leaf.public_bytes(Encoding.DER),))

    def stranger(self, number: int) -> "PrivateTrust":
        """Return somebody who knows the datagram key and has no certificate."""
        return PrivateTrust(self, number, ())


class PrivateTrust:
    """A peer in a private swarm."""

    is_open = False

    def __init__(self, swarm: PrivateSwarm, number: int, chain: tuple[bytes, ...]) -> None:
        self.swarm = swarm
        self.swarm_id = bytes(swarm_id_of(swarm.root))
        self.public_key = public(number)
        self.sign = key(number).sign
        self._chain = chain

    def chain(self) -> tuple[bytes, ...]:
        return self._chain

    def datagram_keys(self) -> tuple[bytes, ...]:
        return self.swarm.keys

    def admits(self, public_key: bytes, chain: Sequence[bytes]) -> bool:
        try:
            member = verify_member(chain, self.swarm.root, self.swarm.now_s)
        except PeerError:
            return False
        return member.peer == peer_id_of(public_key) and not self.is_revoked(member.peer)

    def is_revoked(self, peer: bytes) -> bool:
        return peer in self.swarm.revoked


# --------------------------------------------------------------------------------------------------------------- swarms


def udp_socket(port: int = 0) -> socket.socket:
    """Return a non-blocking UDP socket, bound on the loopback interface."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind(("127.0.0.1", port))
    return sock


def endpoint_of(sock: socket.socket) -> Endpoint:
    return Endpoint(*sock.getsockname()[:2])


def config(number: int, sock: socket.socket, *bootstrap: Endpoint) -> DhtConfig:
    return DhtConfig(open_trust(number), sock, bootstrap, rng=random.Random(number))


@asynccontextmanager
async def open_swarm(n: int) -> AsyncIterator[list[Dht]]:
    """Run nodes `peer(0)` .. `peer(n - 1)`, bootstrapped by the first and started at once; nobody waits for them."""
    socks = [udp_socket() for _ in range(n)]
    first = endpoint_of(socks[0])
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_dht(config(i, sock, first))) for i, sock in enumerate(socks)]


async def eventually(holds: Callable[[], bool]) -> None:
    """Return as soon as `holds()` is true."""

    async def holds_now() -> bool:
        return holds()

    await eventually_async(holds_now)


async def eventually_async(holds: Callable[[], Awaitable[bool]]) -> None:
    """Return as soon as `await holds()` is true."""
    with trio.fail_after(PATIENCE_S):
        while not await holds():  # noqa: ASYNC110  # nobody sets an event when a stranger's state changes
            await trio.sleep_until(trio.current_time() + LOOK_AGAIN_S)


async def everyone_knows_everyone(swarm: list[Dht]) -> None:
    await eventually(lambda: all(dht.snapshot().peers == len(swarm) - 1 for dht in swarm))


# ----------------------------------------------------------------------------------------------------- one asyncio loop


def on_one_loop(test: Callable[[], Coroutine[Any, Any, None]], patience_s: float = 45.0) -> None:
    async def run() -> None:
        async with asyncio.timeout(None if SOAK else patience_s):
            await test()

    asyncio.run(run())


@asynccontextmanager
async def nodes_of(configs: Sequence[DhtConfig], enough: int | None = None) -> AsyncIterator[list[DhtNode]]:
    """Run these nodes until each knows `enough` others (all, at most 10); afterwards nothing of them may be left."""
    nodes = [await start_node(each) for each in configs]
    wanted = min(len(nodes) - 1, 10) if enough is None else enough
    try:
        await until(lambda: all(node.status.peers >= wanted for node in nodes))
        yield nodes
    finally:
        await asyncio.gather(*(node.close() for node in nodes))
    assert asyncio.all_tasks() == {asyncio.current_task()}, asyncio.all_tasks()
    assert not any(node.protocol.calls.waiting for node in nodes)
    assert not any(node.refused["own error"] for node in nodes)


def configs_of(trusts: Sequence[DhtTrust], clock: Callable[[], int] = wall_ms) -> list[DhtConfig]:
    """Return the configurations of nodes that the first of them bootstraps."""
    socks = [udp_socket() for _ in trusts]
    first = endpoint_of(socks[0])
    return [
        DhtConfig(trust, sock, (first,), wall_ms=clock, rng=random.Random(i))
        for i, (trust, sock) in enumerate(zip(trusts, socks, strict=True))
    ]


async def until(holds: Callable[[], bool]) -> None:
    loop = asyncio.get_running_loop()
    while not holds():
        later = loop.create_future()
        loop.call_later(0.005, later.set_result, None)
        await later


async def turn() -> None:
    """Let everything that is ready run."""
    loop = asyncio.get_running_loop()
    for _ in range(5):
        turned = loop.create_future()
        loop.call_soon(turned.set_result, None)
        await turned


# ------------------------------------------------------------------------------------------------------------ one stage


class Clock:
    """A clock that the test turns."""

    def __init__(self, now: Any) -> None:
        self.now = now

    def __call__(self) -> Any:
        return self.now


class Actor:
    """Somebody who holds a key of the swarm and says whatever a test wants."""

    def __init__(self, trust: DhtTrust, clock: Callable[[], int]) -> None:
        self.trust = trust
        self.id = peer_id_of(trust.public_key)
        self.proofs = Proofs(trust, lambda: 0.0)
        self._clock = clock
        self._gate = Gate(trust, clock, lambda: 0.0, Budgets(), Counter())

    def ask(self, request: Any, message_id: bytes | None = None) -> bytes:
        """Return the datagram with this request."""
        body = m.encode_request(request) if isinstance(request, m.Request) else m.encode(request)
        return self._gate.seal(REQUEST, os.urandom(20) if message_id is None else message_id, body)

    def ping(self, to: bytes = b"") -> bytes:
        return self.ask(m.Ping(self.id, to, self.trust.public_key, list(self.trust.chain())))

    def leave(self) -> bytes:
        at_ms = self._clock()
        return self.ask(m.Leave(self.id, b"", at_ms, self.trust.public_key, self.proofs.sign_goodbye(at_ms)))

    def reply(self, asked: bytes, reply: Any) -> bytes:
        """Return the datagram that answers the datagram `asked`."""
        return self._gate.seal(REPLY, message_id_of(asked), m.encode(reply))

    def home(self, asked: bytes, seen: Address) -> m.Home:
        """Return the proof that this actor was asked, from `seen`."""
        signature = self.proofs.sign_home(request_in(asked).sender, message_id_of(asked), seen)
        return m.Home(self.id, self.trust.public_key, list(self.trust.chain()), *seen, signature)

    def record(self, key: bytes, seq: int = 1, value: bytes = b"v", life_s: float = 60) -> WireRecord:
        return self.proofs.sign_record(key, seq, self._clock() + int(life_s * 1000), value)


def message_id_of(datagram: bytes) -> bytes:
    return datagram[HEADER_BYTES - 20 : HEADER_BYTES]


def is_request(datagram: bytes) -> bool:
    return datagram[HEADER_BYTES - 21] == REQUEST


def request_in(datagram: bytes) -> Any:
    return m.request_decoder.decode(datagram[HEADER_BYTES:])


class Wire:
    """A transport that only writes down: (datagram, address) of everything sent."""

    def __init__(self, sockname: tuple[Any, ...]) -> None:
        self.sent: list[tuple[bytes, Any]] = []
        self.sockname = sockname
        self.closed = False

    def get_extra_info(self, name: str) -> Any:
        return self.sockname

    def sendto(self, datagram: bytes, address: Any) -> None:
        self.sent.append((datagram, address))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def requests(self) -> list[Any]:
        return [request_in(datagram) for datagram, _ in self.sent if is_request(datagram)]


class Stage:
    """A protocol, the wire it sends on, and its clock. `me` is its own voice."""

    OURS = ("203.0.113.9", 4747)  # where others see us

    def __init__(self, trust: DhtTrust, sockname: tuple[Any, ...], budgets: Budgets) -> None:
        self.wall = Clock(NOW_MS)
        self.steady = Clock(100.0)
        self.me = Actor(trust, self.wall)
        self.refused: Counter[str] = Counter()
        self.budgets = budgets
        self.proofs = Proofs(trust, self.steady)
        self.gate = Gate(trust, self.wall, self.steady, budgets, self.refused)
        self.store = RecordStore(self.wall, budgets, self.proofs.is_genuine)
        self.changes: list[int] = []
        neighbourhood = Neighbourhood(trust.is_open)
        self.protocol = GuardedProtocol(
            trust, self.gate, self.proofs, self.store, neighbourhood, self.refused, lambda: self.changes.append(1)
        )
        self.wire = Wire(sockname)
        self.protocol.connection_made(self.wire)

    @property
    def contacts(self) -> set[bytes]:
        return set(self.protocol.router.contacts)

    def actor(self, number: int) -> Actor:
        """Return peer `number` of the open swarm."""
        return Actor(open_trust(number), self.wall)

    def hear(self, datagram: bytes, address: Address = HERE) -> None:
        self.protocol.datagram_received(datagram, address)

    def last(self) -> bytes:
        """Return the datagram that was sent last."""
        return self.wire.sent[-1][0]

    def last_reply(self, asked: type[Any]) -> Any:
        return m.reply_decoders[asked].decode(self.last()[HEADER_BYTES:])

    def last_ping(self) -> bytes:
        """Return the last of our questions who somebody is."""
        pings = [each for each, _ in self.wire.sent if is_request(each) and isinstance(request_in(each), m.Ping)]
        return pings[-1]

    def prove(self, actor: Actor, address: Address = HERE) -> None:
        """Let `actor` answer our last ping, from `address`."""
        asked = self.last_ping()
        self.hear(actor.reply(asked, actor.home(asked, self.OURS)), address)

    def meet(self, actor: Actor, address: Address = HERE) -> Any:
        """Make `actor` at `address` a contact: ask who lives there, and let it answer."""
        self.protocol.ping(address)
        self.prove(actor, address)
        return self.protocol.router.contacts.get(actor.id)


Scene = Callable[[Stage], Awaitable[None]]


def play(
    scene: Scene,
    trust: DhtTrust | None = None,
    sockname: tuple[Any, ...] = ("0.0.0.0", 1),
    budgets: Budgets | None = None,
) -> Stage:
    """Run `scene` on a fresh stage; afterwards nothing may be left of it in the loop."""

    async def run() -> Stage:
        loop = asyncio.get_running_loop()
        errors: list[Any] = []
        loop.set_exception_handler(lambda _, context: errors.append(context))
        stage = Stage(open_trust(0) if trust is None else trust, sockname, Budgets() if budgets is None else budgets)
        async with asyncio.timeout(None if SOAK else 30):
            await scene(stage)
        await stage.protocol.close(stage.wall())
        assert asyncio.all_tasks() == {asyncio.current_task()}, asyncio.all_tasks()
        assert not stage.protocol.calls.waiting
        assert not errors
        return stage

    return asyncio.run(run())
