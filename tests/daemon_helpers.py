"""Daemons without a DHT or trainers, in one process: real `Peers` and `Link`s over the loopback, and what they say."""

import contextlib
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import Any

import trio
from identities import Card, lab
from identities import node_id as node_id

from mpd.daemon.budgets import Budgets
from mpd.daemon.links import Landing, Link
from mpd.daemon.peers import Peers
from mpd.ids import Endpoint, PeerId, RoundId
from mpd.wire import Header, Kind, pack_header

HANG_S = 30  # no test of these waits this long: whoever does hangs
ROUND = RoundId(b"a round, a round")


def record(n_bytes: int, chunk: int = 0, kind: Kind = Kind.PIECE, round_id: RoundId = ROUND, **fields: int) -> bytes:
    """Return the header of a record with a payload of `n_bytes`."""
    known = {"codec": 0, "member": 0, "version": 0, "contributors": 0, **fields}
    return pack_header(Header(kind=kind, chunk=chunk, length=n_bytes, round_id=round_id, **known))


class Stage:
    """Takes in one record."""

    def __init__(self, header: Header, done: Callable[["Stage"], None]) -> None:
        self.header = header
        self.view = memoryview(bytearray(header.length))
        self._done = done

    def progress(self) -> None:
        pass

    def complete(self, payload: memoryview) -> None:
        self._done(self)

    def abandon(self) -> None:
        pass


class Parcel:
    """A record to be sent."""

    def __init__(
        self, payload: bytes | memoryview, chunk: int = 0, owner: object = None, kind: Kind = Kind.PIECE
    ) -> None:
        self.owner = owner
        self.chunk = chunk
        self.n_sent = 0
        self._payload = memoryview(payload)
        self._kind = kind

    def load(self) -> tuple[bytes, memoryview] | None:
        return record(len(self._payload), self.chunk, self._kind), self._payload

    def sent(self, n_bytes: int) -> None:
        self.n_sent += n_bytes


class Recorder:
    """Hears from links and remembers everything, in `log` and by kind."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self._news = trio.Event()

    @property
    def messages(self) -> list[Any]:
        return self._of("message")

    @property
    def records(self) -> list[tuple[Header, bytes]]:
        return self._of("record")

    @property
    def reasons(self) -> list[str]:
        """Why links ended, one entry for each."""
        return self._of("down")

    async def until(self, holds: Callable[[], object]) -> None:
        """Wait until `holds`; it is asked whenever something is heard."""
        while not holds():
            await self._news.wait()

    def on_link_up(self, link: Link) -> None:
        self.note("up", link.peer)

    def on_message(self, link: Link, message: Any) -> None:
        self.note("message", message)

    def expects(self, link: Link, header: Header) -> bool:
        return True

    async def landing(self, link: Link, header: Header) -> Landing | None:
        self.note("header", header)
        return Stage(header, lambda stage: self.note("record", (stage.header, bytes(stage.view))))

    def on_link_down(self, link: Link, reason: str) -> None:
        self.note("down", reason)

    def note(self, kind: str, what: Any) -> None:
        self.log.append((kind, what))
        self._news.set()
        self._news = trio.Event()

    def _of(self, kind: str) -> list[Any]:
        return [what for its_kind, what in self.log if its_kind == kind]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection over the loopback, with small buffers, so that nobody sends far ahead."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        near = socket.socket()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        near.connect(server.getsockname())
        far, _ = server.accept()
    near.setblocking(False)
    far.setblocking(False)
    return near, far


def stream_of(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


@dataclass
class Node:
    """One daemon of a swarm."""

    own: PeerId
    peers: Peers
    events: Any
    endpoint: Endpoint
    card: Card
    budgets: Budgets


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


async def start_node(
    nursery: trio.Nursery,
    i: int,
    events: Any,
    *,
    outbound_only: bool = False,
    instance: int = 0,
    port: int = 0,
    card: Card | None = None,
    clock: Callable[[], int] = wall_ms,
) -> Node:
    """Start the links of daemon `i`, which is a member of the usual swarm unless it has another `card`."""
    rng = random.Random(1000 * instance + i)
    card, budgets = card or lab().card(i), Budgets()
    peers = Peers(card, rng.randbytes(16), events, rng.randbytes, clock, budgets)
    listeners = [] if outbound_only else await trio.open_tcp_listeners(port, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1] if listeners else 0
    peers.endpoint = Endpoint("127.0.0.1", port)
    await nursery.start(peers.serve, listeners)
    return Node(card.own, peers, events, peers.endpoint, card, budgets)


@contextlib.asynccontextmanager
async def swarm(n: int, outbound_only: Collection[int] = ()) -> AsyncIterator[list[Node]]:
    """Run the links of `n` daemons; those in `outbound_only` cannot be called. Everything must happen within HANG_S."""
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            yield [await start_node(nursery, i, Recorder(), outbound_only=i in outbound_only) for i in range(n)]
            nursery.cancel_scope.cancel()


async def checkpoints(n: int) -> None:
    """Give way `n` times."""
    for _ in range(n):
        await trio.lowlevel.checkpoint()
