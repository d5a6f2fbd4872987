"""How two daemons meet: what is said on a connection before there is a link, and who waits for whom.

Behind TLS the one who was called speaks first. So the dialler's first read is its verdict, and a refusal never crosses
with something that the dialler has sent already.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import trio

from mpd.errors import PeerError
from mpd.identity import Member
from mpd.ids import Endpoint, PeerId, show_peer
from mpd.matchmaking import MAX_DETAIL_CHARS
from mpd.messages import PEER_VERSION, PEERS, Goodbye, Hello
from mpd.wire import ControlBuffer, control_frame

from . import faults
from .tls import ALPN, Membership, Tls, explain, leaf_of, shake_hands, wrap_client

HANDSHAKE_S = 5.0  # a connection that has not become a link by then is closed
MAX_HANDSHAKE_BYTES = 4096
FRAME_PREFIX_BYTES = 4
ADMISSION_GREETING = b"mpdA\x01\0\0\0"  # in clear, before TLS with those who are not members yet
CROSSED = "you are being called; wait for it"
MAX_CLOCK_ERROR_S = 30.0  # beyond this, datagrams of the DHT are refused

Introduce = Callable[[Tls], Hello]


# ------------------------------------------------------------------------------------------------------- conversations


class Talk:
    """Messages on a connection that is not a link yet: one at a time, and never a byte beyond the current one."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def send(self, message: Any) -> None:
        """Send one message."""
        if faults.armed:
            await faults.outlast()
        await self._stream.send_all(control_frame(PEERS.encode(message)))

    async def receive(self) -> Any:
        """Return the next message. Raises PeerError, also when the connection ends instead."""
        buffer = ControlBuffer()
        prefix = await receive_exactly(self._stream, FRAME_PREFIX_BYTES)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HANDSHAKE_BYTES:
            raise PeerError(f"it opened with a message of {length} bytes: at most {MAX_HANDSHAKE_BYTES} are allowed")
        buffer.feed(prefix + await receive_exactly(self._stream, length))
        body = buffer.next_frame()
        return PEERS.decode(body if body is not None else b"")


async def receive_exactly(stream: trio.abc.ReceiveStream, n_bytes: int) -> bytes:
    """Return the next `n_bytes`. Raises PeerError if the connection ends before."""
    received = b""
    while len(received) < n_bytes:
        try:
            more = await stream.receive_some(n_bytes - len(received))
        except trio.BrokenResourceError as error:  # with TLS, this may be the verdict on our certificate
            raise PeerError(explain(error)) from error
        if not more:
            raise PeerError("it closed the connection during the handshake")
        received += more
    return received


@dataclass(frozen=True, slots=True)
class Met:
    """A peer that has shown its certificate and introduced itself."""

    tls: Tls
    member: Member
    hello: Hello


async def call(stream: trio.SocketStream, membership: Membership, peer: PeerId, introduce: Introduce) -> Met | None:
    """Meet `peer`, whom we dialled. Returns None if it says that its own call is on its way. Raises PeerError."""
    connection, member = await wrap_client(stream, membership, peer)
    talk = Talk(connection)
    said = await talk.receive()
    if said == Goodbye(CROSSED):
        return None
    hello = _checked(said)
    await talk.send(introduce(connection))
    return Met(connection, member, hello)


async def answer(connection: Tls, member: Member, introduce: Introduce) -> Met:
    """Meet `member`, which dialled us and is welcome. Raises PeerError."""
    talk = Talk(connection)
    await talk.send(introduce(connection))
    return Met(connection, member, _checked(await talk.receive()))


async def refuse(connection: Tls, reason: str) -> None:
    """Tell a member that dialled us why it is not let in."""
    await Talk(connection).send(Goodbye(reason))


def _checked(message: Any) -> Hello:
    if isinstance(message, Goodbye):
        raise PeerError(f"it refused this machine: {printable(message.reason)}")
    if not isinstance(message, Hello):
        raise PeerError(f"it answered a call with {type(message).__name__}")
    if message.version != PEER_VERSION:
        older = "this machine" if message.version > PEER_VERSION else "the other machine"
        raise PeerError(f"the daemon there speaks version {message.version}, this one {PEER_VERSION}: upgrade {older}")
    return message


# ------------------------------------------------------------------------------------------------- who is out there


@dataclass(frozen=True, slots=True)
class Sight:
    """Who answers at an address by TCP: a member of this swarm, or `trouble` says why there is none.

    `ahead_s`: how far its clock is ahead of ours, unless it did not say.
    """

    trouble: str
    peer: PeerId | None = None
    ahead_s: float | None = None
    is_own: bool = False


async def look_at(endpoint: Endpoint, membership: Membership, wall_ms: Callable[[], int]) -> Sight:
    """Dial `endpoint` and see who answers there, if anybody does. Takes `HANDSHAKE_S` at most."""
    with trio.move_on_after(HANDSHAKE_S):
        try:
            stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
            try:
                return await _look(stream, membership, wall_ms)
            finally:
                await trio.aclose_forcefully(stream)
        except (OSError, PeerError, trio.BrokenResourceError) as error:
            return Sight(why(error))
    return Sight(f"nothing answered within {HANDSHAKE_S:g} s")


async def probe(endpoint: Endpoint, membership: Membership, wall_ms: Callable[[], int]) -> str:
    """Return in a sentence who, if anybody, answers at `endpoint`, for whoever wonders why there is no contact."""
    sight = await look_at(endpoint, membership, wall_ms)
    if sight.peer is None:
        return sight.trouble
    if sight.is_own:
        return "this daemon itself answers there"
    if sight.ahead_s is not None and abs(sight.ahead_s) > MAX_CLOCK_ERROR_S:
        which = "ahead of" if sight.ahead_s > 0 else "behind"
        return f"its clock is {abs(sight.ahead_s):.0f} s {which} this machine's: set both clocks"
    name, port = show_peer(sight.peer), endpoint.port
    return f"a daemon of this swarm ({name}) answers there by TCP but not by UDP: open UDP port {port}"


async def _look(stream: trio.SocketStream, membership: Membership, wall_ms: Callable[[], int]) -> Sight:
    connection = await shake_hands(stream, membership.client_context(pinned=False), alpn=ALPN)
    member = membership.check(leaf_of(connection))
    if member.peer == membership.own:
        return Sight("", member.peer, is_own=True)
    said = await Talk(connection).receive()
    if said == Goodbye(CROSSED):
        return Sight("", member.peer)
    return Sight("", member.peer, (_checked(said).wall_ms - wall_ms()) / 1000)


# -------------------------------------------------------------------------------------------------- who calls whom


@dataclass
class Calls:
    """What is under way with one peer: there while anybody calls it, waits for its call, or answers one."""

    users: int = 0
    answering: int = 0
    dialling: trio.CancelScope | None = None
    connected: bool = False  # our call has got as far as a connection
    news: trio.Event = field(default_factory=trio.Event)

    def tell(self) -> None:
        """A call has ended, one way or another."""
        self.news.set()
        self.news = trio.Event()


class CallBook:
    """The calls under way with all peers."""

    def __init__(self) -> None:
        self._calls: dict[PeerId, Calls] = {}

    @contextlib.contextmanager
    def calls_with(self, peer: PeerId) -> Iterator[Calls]:
        """Share what is under way with `peer` with all who have to do with it."""
        calls = self._calls.setdefault(peer, Calls())
        calls.users += 1
        try:
            yield calls
        finally:
            calls.users -= 1
            if not calls.users:
                del self._calls[peer]


# --------------------------------------------------------------------------------------------------------------- words


def printable(text: str) -> str:
    """Return what a peer wrote, made fit for a log and a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_DETAIL_CHARS])


def why(error: BaseException) -> str:
    """Return in words why a peer could not be reached."""
    if isinstance(error, BaseExceptionGroup):
        return why(error.exceptions[0])
    if isinstance(error, trio.BrokenResourceError):
        return explain(error)
    if error.__cause__ is not None and isinstance(error, OSError):  # trio reports every address that it tried
        return why(error.__cause__)
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)  # trio adds the address, which is said already
    return getattr(error, "strerror", None) or str(error) or "it closed the connection"
