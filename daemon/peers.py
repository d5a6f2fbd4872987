"""Who we are linked to: dialling, accepting, and at most one link per peer.

A connection proves what it is with its first bytes: a control greeting and a `Hello`, or a data greeting with a handle
that was agreed on a control connection moments before. Two peers that dial each other at once would end with two links,
or, each giving way to the other, with none; so whoever is being called does not dial, and of two calls that cross the
smaller id's goes through once it has got as far as a connection. A peer that calls although we believe to be linked has
lost that link, so the new one replaces it, but only once it is complete.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import trio

from mpd.errors import PeerError
from mpd.ids import Endpoint, PeerId, peer_id, show_peer
from mpd.messages import PEER_VERSION, PEERS, DataAccept, DataOffer, Goodbye, Hello
from mpd.wire import (
    CONTROL_GREETING_BYTES,
    CONTROL_MAGIC,
    DATA_GREETING_BYTES,
    ControlBuffer,
    control_frame,
    control_greeting,
    data_greeting,
    parse_control_greeting,
    parse_data_greeting,
)

from .links import Link, LinkEvents, tune

HANDSHAKE_S = 5.0  # a connection that has not said what it is by then is closed
MAX_HANDSHAKES = 64  # connections that have not said yet
MAX_LINKS = 256
MAX_HANDSHAKE_BYTES = 4096
FRAME_PREFIX_BYTES = 4
_CROSSED = "you are being called; wait for it"
_CROSSED_S = 1.0  # a crossing call that has not made the link by then has failed


class Unreachable(PeerError):
    """The peer could not be dialled, or somebody else answered."""


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One live link, for `mpd peers`."""

    peer: str
    address: str
    goodput: float
    bytes_sent: int
    bytes_received: int
    rounds: int


@dataclass
class _Calls:
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


class Peers:
    """All links of this daemon."""

    def __init__(
        self, own_id: PeerId, instance: bytes, events: LinkEvents, random_bytes: Callable[[int], bytes]
    ) -> None:
        self.own_id = own_id
        self.endpoint = Endpoint("127.0.0.1", 0)  # where others are told to dial us; port 0: nowhere
        self.is_reachable = False  # whether that has been seen to work, or need not be doubted
        self._instance = instance
        self._events = events
        self._random_bytes = random_bytes
        self._links: dict[PeerId, Link] = {}
        self._calls: dict[PeerId, _Calls] = {}
        self._offers: dict[bytes, trio.MemorySendChannel[socket.socket]] = {}
        self._handshakes = 0
        self._nursery: trio.Nursery | None = None

    def get(self, peer: PeerId) -> Link | None:
        """Return the live link to `peer`, if there is one."""
        return self._links.get(peer)

    def links(self) -> list[Link]:
        """Return all live links."""
        return list(self._links.values())

    def snapshot(self) -> tuple[PeerStatus, ...]:
        """Return what `mpd peers` shows."""
        return tuple(
            PeerStatus(
                peer=show_peer(link.peer),
                address=str(link.endpoint) if link.endpoint else "outbound only",
                goodput=link.goodput,
                bytes_sent=link.bytes_sent,
                bytes_received=link.bytes_received,
                rounds=link.busy,
            )
            for link in sorted(self._links.values(), key=lambda link: link.peer)
        )

    # ------------------------------------------------------------------------------------------------------- lifetime

    async def serve(
        self, listeners: list[trio.SocketListener], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept connections and carry links until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                if listeners:
                    await nursery.start(trio.serve_listeners, self._accept, listeners)
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def say_goodbye(self, reason: str, within_s: float) -> None:
        """Tell every peer that we leave, and give the messages a moment to get out."""
        async with trio.open_nursery() as nursery:
            for link in self.links():
                link.send(Goodbye(reason))
                nursery.start_soon(link.flush, within_s)

    # ------------------------------------------------------------------------------------------------------- dialling

    async def link(self, peer: PeerId, endpoint: Endpoint | None) -> Link:
        """Return a live link to `peer`, dialling `endpoint` if there is none. Raises Unreachable with the cause."""
        if peer == self.own_id:
            raise Unreachable("it has our own key: two daemons must not share a state directory")
        with self._calls_with(peer) as calls, trio.move_on_after(HANDSHAKE_S):
            while not self._is_linked(peer):
                if endpoint is None or calls.dialling is not None or calls.answering:
                    await calls.news.wait()
                else:
                    await self._dial(peer, endpoint, calls)
        if self._is_linked(peer):
            return self._links[peer]
        if endpoint is None:
            raise Unreachable(f"accepts no connections and did not call within {HANDSHAKE_S:g} s")
        raise Unreachable(f"did not answer at {endpoint} within {HANDSHAKE_S:g} s")

    def _is_linked(self, peer: PeerId) -> bool:
        link = self._links.get(peer)
        return link is not None and link.up

    @contextlib.contextmanager
    def _calls_with(self, peer: PeerId) -> Iterator[_Calls]:
        calls = self._calls.setdefault(peer, _Calls())
        calls.users += 1
        try:
            yield calls
        finally:
            calls.users -= 1
            if not calls.users:
                del self._calls[peer]

    async def _dial(self, peer: PeerId, endpoint: Endpoint, calls: _Calls) -> None:
        """Call the peer, or return early because it calls us. Raises Unreachable."""
        if self._nursery is None:
            raise Unreachable("this daemon is not running")
        try:
            with trio.CancelScope() as calls.dialling:
                if not await self._call(peer, endpoint, calls):
                    with trio.move_on_after(_CROSSED_S):
                        await calls.news.wait()
        except (OSError, PeerError, trio.BrokenResourceError) as error:
            raise Unreachable(f"cannot be reached at {endpoint}: {_why(error)}") from error
        finally:
            calls.dialling, calls.connected = None, False
            calls.tell()

    async def _call(self, peer: PeerId, endpoint: Endpoint, calls: _Calls) -> bool:
        """Make a link. Returns False if the peer says that its own call is on its way."""
        stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
        calls.connected = True
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(trio.aclose_forcefully, stream)
            talk = _Talk(stream)
            await stream.send_all(control_greeting())
            await talk.send(self._hello(stream))
            hello = await talk.receive()
            if hello == Goodbye(_CROSSED):
                return False
            self._check_answer(peer, hello)
            conn_id = self._random_bytes(16)
            await talk.send(DataOffer(conn_id))
            if await talk.receive() != DataAccept(conn_id):
                raise PeerError("it refused the data connection")
            data = await _open_data(stream, conn_id)
            undo.callback(data.close)
            if await talk.receive() != DataAccept(conn_id):
                raise PeerError("it refused the data connection")
            if self._nursery is None:
                raise PeerError("this daemon is leaving")
            self._nursery.start_soon(self._carry, self._register(hello, stream, data))
            undo.pop_all()
        return True

    def _check_answer(self, peer: PeerId, hello: Any) -> None:
        if not isinstance(hello, Hello):
            raise PeerError(f"it answered a call with {type(hello).__name__}")
        if hello.version != PEER_VERSION:
            raise PeerError(f"the daemon there speaks version {hello.version}, this one {PEER_VERSION}: upgrade one")
        if hello.peer != peer:
            raise PeerError(f"the daemon there is {show_peer(hello.peer)}, expected {show_peer(peer)}")

    async def can_dial(self, endpoint: Endpoint) -> bool:
        """Return True if something accepts connections there."""
        with trio.move_on_after(HANDSHAKE_S), contextlib.suppress(OSError):
            stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
            await trio.aclose_forcefully(stream)
            return True
        return False

    # ------------------------------------------------------------------------------------------------------ accepting

    async def _accept(self, stream: trio.SocketStream) -> None:
        """Serve one incoming connection. trio closes `stream` when this returns."""
        if self._handshakes >= MAX_HANDSHAKES or len(self._links) >= MAX_LINKS:
            return
        link: Link | None = None
        self._handshakes += 1
        try:
            with trio.move_on_after(HANDSHAKE_S), contextlib.suppress(PeerError, OSError, trio.BrokenResourceError):
                link = await self._greet(stream)
        finally:
            self._handshakes -= 1
        if link is not None:
            await self._carry(link)

    async def _greet(self, stream: trio.SocketStream) -> Link | None:
        """Find out what just connected; return the link if that made one."""
        start = await _receive_exactly(stream, CONTROL_GREETING_BYTES)
        if start[:4] == CONTROL_MAGIC:
            parse_control_greeting(start)
            return await self._answer_call(stream)
        rest = await _receive_exactly(stream, DATA_GREETING_BYTES - len(start))
        offer = self._offers.get(parse_data_greeting(start + rest))
        if offer is not None:
            data = _plain(stream)
            try:
                offer.send_nowait(data)
            except (trio.WouldBlock, trio.BrokenResourceError):
                data.close()
        return None

    async def _answer_call(self, stream: trio.SocketStream) -> Link | None:
        talk = _Talk(stream)
        hello = await talk.receive()
        if not isinstance(hello, Hello) or hello.peer == self.own_id:
            return None
        if hello.version != PEER_VERSION:
            await talk.send(self._hello(stream))  # so that the caller can tell why
            return None
        with self._calls_with(peer_id(hello.peer)) as calls:
            if calls.dialling is not None:
                if calls.connected and self.own_id < hello.peer:
                    await talk.send(Goodbye(_CROSSED))
                    return None
                calls.dialling.cancel()
            calls.answering += 1
            try:
                return await self._complete(talk, stream, hello)
            finally:
                calls.answering -= 1
                calls.tell()

    async def _complete(self, talk: "_Talk", stream: trio.SocketStream, hello: Hello) -> Link | None:
        """Answer a call to its end: greet back, and wait for the data connection."""
        await talk.send(self._hello(stream))
        offer = await talk.receive()
        if not isinstance(offer, DataOffer) or offer.conn_id in self._offers:
            return None
        give, take = trio.open_memory_channel[socket.socket](1)
        with contextlib.ExitStack() as undo:
            self._offers[offer.conn_id] = give
            try:
                await talk.send(DataAccept(offer.conn_id))
                data = await take.receive()
                undo.callback(data.close)
            finally:
                del self._offers[offer.conn_id]
                with contextlib.suppress(trio.WouldBlock):
                    take.receive_nowait().close()
            await talk.send(DataAccept(offer.conn_id))
            link = self._register(hello, stream, data)
            undo.pop_all()
        self.is_reachable = self.endpoint.port != 0
        return link

    # ------------------------------------------------------------------------------------------------------- together

    def _hello(self, stream: trio.SocketStream) -> Hello:
        return Hello(
            version=PEER_VERSION,
            peer=self.own_id,
            instance=self._instance,
            host=self.endpoint.host,
            port=self.endpoint.port,
            seen_host=stream.socket.getpeername()[0],
        )

    def _register(self, hello: Hello, stream: trio.SocketStream, data: socket.socket) -> Link:
        """Make the link; the caller carries it. OSError, if it has ended already, leaves the sockets alone."""
        peer = peer_id(hello.peer)
        for sock in (stream.socket, data):
            tune(sock, _same_host(stream))
        endpoint = Endpoint(hello.host, hello.port) if hello.port else None
        link = Link(peer, hello.instance, endpoint, stream, data)
        old = self._links.get(peer)
        self._links[peer] = link
        if old is not None:
            old.close("it called again")
        return link

    async def _carry(self, link: Link) -> None:
        try:
            await link.run(self._events)
        finally:
            if self._links.get(link.peer) is link:
                del self._links[link.peer]


class _Talk:
    """Messages on a stream that is not a link yet: one at a time, and never a byte beyond the current one."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def send(self, message: Any) -> None:
        await self._stream.send_all(control_frame(PEERS.encode(message)))

    async def receive(self) -> Any:
        buffer = ControlBuffer()
        prefix = await _receive_exactly(self._stream, FRAME_PREFIX_BYTES)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HANDSHAKE_BYTES:
            raise PeerError(f"it opened with a message of {length} bytes: at most {MAX_HANDSHAKE_BYTES} are allowed")
        buffer.feed(prefix + await _receive_exactly(self._stream, length))
        body = buffer.next_frame()
        return PEERS.decode(body if body is not None else b"")


async def _receive_exactly(stream: trio.SocketStream, n_bytes: int) -> bytes:
    received = b""
    while len(received) < n_bytes:
        more = await stream.receive_some(n_bytes - len(received))
        if not more:
            raise OSError("it closed the connection during the handshake")
        received += more
    return received


async def _open_data(control: trio.SocketStream, conn_id: bytes) -> socket.socket:
    """Open the data connection to where `control` leads; return it as a plain non-blocking socket."""
    stream = await trio.open_tcp_stream(*control.socket.getpeername()[:2])
    try:
        await stream.send_all(data_greeting(conn_id))
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return _plain(stream)


def _plain(stream: trio.SocketStream) -> socket.socket:
    """Take the socket out of a stream: the data path works on it without trio's methods."""
    data = socket.socket(fileno=stream.socket.detach())
    data.setblocking(False)
    return data


def _same_host(stream: trio.SocketStream) -> bool:
    return bool(stream.socket.getpeername()[0] == stream.socket.getsockname()[0])


def _why(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return _why(error.exceptions[0])
    if error.__cause__ is not None and isinstance(error, OSError):  # trio reports every address that it tried
        return _why(error.__cause__)
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)  # trio adds the address, which is said already
    return getattr(error, "strerror", None) or str(error) or "it closed the connection"
