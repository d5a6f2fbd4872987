"""One link: everything that passes between this daemon and one peer.

A link is two TCP connections. Control carries small messages and never waits behind tensors; data carries records, a
40-byte header and a payload that is read from and written to the memory where it lives. The data path uses the raw
non-blocking socket: try the call, wait only when the kernel says so, give way to other tasks once per record.

What is promised upwards: messages arrive in order; records arrive in order; after `on_link_down` nothing arrives. When
control is gone, what the peer had already sent on the data connection still counts, so it is read to its end first.
Sealing slips in here: TLS around the control stream, and records opened and sealed in `_receive_data`, `_send_data`.
"""

import collections
import contextlib
import socket
from typing import Any, Protocol

import trio

from mpd.errors import LocalError, PeerError
from mpd.ids import Endpoint, PeerId
from mpd.messages import PEERS, Ping
from mpd.wire import HEADER_BYTES, ControlBuffer, Header, control_frame, unpack_header

DRAIN_S = 2.0  # how long the rest of the data may take to arrive after control has ended
IDLE_PING_S = 20.0  # an idle link is asked for a sign of life this often
MAX_QUEUED_CONTROL_BYTES = 16 << 20  # a peer that does not read its messages is dropped at this point
MAX_RECORD_BYTES = 5 << 20  # the largest chunk, and room for a codec that makes it longer
_RECEIVE_BYTES = 65536


class Landing(Protocol):
    """Where the payload of one incoming record goes. `view` may be exchanged while the record is under way."""

    view: memoryview

    def progress(self) -> None:
        """More bytes have arrived."""

    def complete(self) -> None:
        """All bytes have arrived."""


class Shipment(Protocol):
    """A record that waits for its turn on a link; its bytes are looked up when it is sent, not when it is queued."""

    owner: object
    chunk: int

    def load(self) -> tuple[bytes, memoryview] | None:
        """Return header and payload, or None if nobody wants this any more."""

    def n_bytes(self) -> int:
        """Return how long the record is, header included."""

    def sent(self, n_bytes: int) -> None:
        """All `n_bytes` have been handed to the kernel."""


class LinkEvents(Protocol):
    """Whoever owns the links hears from them here. PeerError from any of these ends the link."""

    def on_link_up(self, link: "Link") -> None:
        """The link may be used."""

    def on_message(self, link: "Link", message: Any) -> None:
        """The peer said `message`."""

    async def landing(self, link: "Link", header: Header) -> Landing | None:
        """Say where the payload behind `header` goes; None: read it and throw it away."""

    def on_link_down(self, link: "Link", reason: str) -> None:
        """The link is over, and why."""


class Link:
    """A live link to `peer`. Made by `Peers`; everything here may be called from any task of the daemon."""

    def __init__(
        self, peer: PeerId, instance: bytes, endpoint: Endpoint | None, control: trio.SocketStream, data: socket.socket
    ) -> None:
        self.peer = peer
        self.instance = instance
        self.endpoint = endpoint  # where the peer can be dialled; None: nowhere
        self.busy = 0  # how many rounds depend on this link now: then its silence is watched
        self.patience_s = 2.0  # how long it may be silent while busy
        self.bytes_sent = 0
        self.bytes_received = 0
        self.goodput = 0.0  # bytes per second while records arrive, smoothed
        self.reason = ""
        self.up = True
        self.remote_host: str = control.socket.getpeername()[0]
        self._control = control
        self._data = data
        self._frames: collections.deque[bytes] = collections.deque()
        self._queued_control_bytes = 0
        self._frames_waiting = trio.Event()
        self._flushed = trio.Event()
        self._shipments: collections.deque[Shipment] = collections.deque()
        self._shipments_waiting = trio.Event()
        self._shipping: Shipment | None = None
        self._rest = memoryview(b"")  # what is left of the payload being sent
        self._heard_at = trio.current_time()
        self._data_ended = trio.Event()
        self._scope: trio.CancelScope | None = None

    # ------------------------------------------------------------------------------------------------- for the daemon

    def send(self, message: Any) -> None:
        """Queue `message`; it is sent in order, and lost if the link ends first."""
        if not self.up:
            return
        try:
            frame = control_frame(PEERS.encode(message))
        except LocalError as error:  # the plan of an absurdly long round: that may cost a link, but not the daemon
            self.close(str(error))
            return
        self._queued_control_bytes += len(frame)
        if self._queued_control_bytes > MAX_QUEUED_CONTROL_BYTES:
            self.close("it does not read its messages")
            return
        self._frames.append(frame)
        self._frames_waiting.set()

    def ship(self, shipment: Shipment) -> None:
        """Queue a data record."""
        if self.up:
            self._shipments.append(shipment)
            self._shipments_waiting.set()

    def drop_shipments(self, owner: object) -> None:
        """Forget the queued records of `owner`."""
        self._shipments = collections.deque(s for s in self._shipments if s.owner is not owner)

    def unsent(self, owner: object) -> list[Shipment]:
        """Return the records of `owner` that have not left yet, or not completely."""
        return [s for s in (self._shipping, *self._shipments) if s is not None and s.owner is owner]

    def detach(self, owner: object, chunk: int | None = None) -> None:
        """Make the record of `owner` that is being sent now independent of its memory, which is about to change."""
        shipping = self._shipping
        if shipping is not None and shipping.owner is owner and chunk in (None, shipping.chunk):
            self._rest = memoryview(bytes(self._rest))

    def close(self, reason: str) -> None:
        """End the link at once."""
        if self.up:
            self.up = False
            self.reason = self.reason or reason
            if self._scope is not None:
                self._scope.cancel()

    # ------------------------------------------------------------------------------------------------------- lifetime

    async def run(self, events: LinkEvents) -> None:
        """Carry messages and records until either side ends the link; `on_link_down` comes last and exactly once."""
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                if not self.up:  # closed before it ran
                    return
                sending = await nursery.start(self._send)
                nursery.start_soon(self._receive_data, events)
                nursery.start_soon(self._watch)
                events.on_link_up(self)
                await self._receive_control(events)
                sending.cancel()
                with trio.move_on_after(DRAIN_S):
                    await self._data_ended.wait()
                nursery.cancel_scope.cancel()
        except* (PeerError, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as group:
            self.reason = self.reason or _first_sentence(group)
        finally:
            self.up = False
            self._data.close()
            with trio.CancelScope(shield=True, deadline=trio.current_time()):
                await self._control.aclose()
            events.on_link_down(self, self.reason or "the connection was closed")

    async def flush(self, within_s: float) -> None:
        """Wait until the queued messages have been handed to the kernel, but not for long."""
        with trio.move_on_after(within_s):
            while self._queued_control_bytes and self.up:
                await self._flushed.wait()

    async def _send(self, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        """Run both senders. A failing one stops quietly: what the peer sent before is still to be read."""
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_control)
                nursery.start_soon(self._send_data)
                task_status.started(scope)

    async def _watch(self) -> None:
        """Ask for a sign of life while nothing is heard; end the link when none comes."""
        was_busy = False
        while True:
            if self.busy and not was_busy:  # that an idle link was silent is not held against the peer
                self._heard_at = trio.current_time()
            was_busy = self.busy > 0
            patience = self.patience_s if self.busy else IDLE_PING_S
            silent = trio.current_time() - self._heard_at
            if silent > patience and (self.busy or silent > IDLE_PING_S + 10):
                self.close(f"nothing was heard from it for {silent:.1f} s")
                return
            if silent > patience / 4:
                self.send(Ping(answer=True))
            await trio.sleep(self.patience_s / 4 if self.busy else min(IDLE_PING_S / 4, self.patience_s))

    # -------------------------------------------------------------------------------------------------------- control

    async def _send_control(self) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                while self._frames:
                    frames = b"".join(self._frames)
                    self._frames.clear()
                    await self._control.send_all(frames)
                    self._queued_control_bytes -= len(frames)
                    self._flushed.set()
                    self._flushed = trio.Event()
                self._frames_waiting = trio.Event()
                await self._frames_waiting.wait()

    async def _receive_control(self, events: LinkEvents) -> None:
        buffer = ControlBuffer()
        while True:
            try:
                received = await self._control.receive_some(_RECEIVE_BYTES)
            except trio.BrokenResourceError:
                received = b""
            if not received:
                self.reason = self.reason or "it closed the connection"
                return
            self._heard_at = trio.current_time()
            buffer.feed(received)
            while (body := buffer.next_frame()) is not None:
                message = PEERS.decode(body)
                if isinstance(message, Ping):
                    if message.answer:
                        self.send(Ping())
                else:
                    events.on_message(self, message)

    # ----------------------------------------------------------------------------------------------------------- data

    async def _send_data(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                if not self._shipments:
                    self._shipments_waiting = trio.Event()
                    await self._shipments_waiting.wait()
                if self._shipments:
                    await self._ship(self._shipments.popleft())  # no variable here keeps it alive while we wait

    async def _ship(self, shipment: Shipment) -> None:
        loaded = shipment.load()
        if loaded is None:
            return
        head, payload = memoryview(loaded[0]), loaded[1]
        n_bytes = len(head) + len(payload)
        self._shipping, self._rest = shipment, payload
        try:
            while head or self._rest:
                try:
                    n = self._data.sendmsg((head, self._rest))
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._data)
                    continue
                self.bytes_sent += n
                from_head = min(n, len(head))
                head = head[from_head:]
                self._rest = self._rest[n - from_head :]
        finally:
            self._shipping, self._rest = None, memoryview(b"")
        shipment.sent(n_bytes)
        await trio.lowlevel.checkpoint()

    async def _receive_data(self, events: LinkEvents) -> None:
        # A peer killed with unread bytes resets the connection: that is an end like any other.
        with contextlib.suppress(OSError):
            await self._receive_records(events)
        self._data_ended.set()
        await trio.sleep(DRAIN_S / 4)  # the last messages may still be on their way
        self.close("its data connection ended")

    async def _receive_records(self, events: LinkEvents) -> None:
        head = memoryview(bytearray(HEADER_BYTES))
        n_head = 0
        while True:
            while n_head < HEADER_BYTES:
                n = await self._receive_into(head[n_head:])
                if n == 0:
                    return
                n_head += n
            n_head = await self._receive_body(events, unpack_header(head), head)

    async def _receive_body(self, events: LinkEvents, header: Header, head: memoryview) -> int:
        """Read the payload behind `header`, and with the same calls the start of the next header into `head`."""
        if header.length > MAX_RECORD_BYTES:
            raise PeerError(f"it announced a record of {header.length} bytes: at most {MAX_RECORD_BYTES} are allowed")
        landing = await events.landing(self, header)
        if landing is None:
            landing = _Nowhere(header.length)
        began = trio.current_time()
        got, n_head = 0, 0
        while got < header.length:
            try:
                n = self._data.recvmsg_into((landing.view[got:], head))[0]
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._data)
                continue
            if n == 0:
                raise ConnectionResetError("its data connection ended inside a record")
            self._heard_at = trio.current_time()
            self.bytes_received += n
            n_head = max(0, got + n - header.length)
            got = min(got + n, header.length)
            landing.progress()
        landing.complete()
        if header.length >= 65536:
            speed = header.length / max(trio.current_time() - began, 1e-6)
            self.goodput = speed if not self.goodput else 0.9 * self.goodput + 0.1 * speed
        await trio.lowlevel.checkpoint()
        return n_head

    async def _receive_into(self, view: memoryview) -> int:
        while True:
            try:
                n = self._data.recv_into(view)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._data)
            else:
                self._heard_at = trio.current_time()
                self.bytes_received += n
                return n


class _Nowhere:
    """Takes a payload that nobody wants."""

    def __init__(self, n_bytes: int) -> None:
        self.view = memoryview(bytearray(n_bytes))

    def progress(self) -> None:
        pass

    def complete(self) -> None:
        pass


def tune(sock: Any, same_host: bool) -> None:
    """Set the options of a connection between peers: no delay, bounded silence of the kernel, reno on one host.

    Pacing congestion controls such as bbr slow down even the loopback; between hosts the machine's choice stands.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)
    if same_host:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def _first_sentence(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
