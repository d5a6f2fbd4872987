"""Data connections: agreed on over control, opened and proved with a sealed greeting, then records both ways.

The dialler of the control connection offers, the other side accepts; each gives half of the secret (`Sealing`). Then
the dialler opens a TCP connection with a handle in clear, which is a name and no secret, and both ends prove with one
sealed HELLO each that they hold the keys. One set of keys is one connection attempt: whatever fails, a new set is
agreed on. An unknown handle costs us nothing and gets no answer; a wrong HELLO does not use up the offer, or anybody
who sees the handle pass could burn it.

A `DataChannel` is such a connection in use. It works on the raw non-blocking socket: try the call, wait only when the
kernel says so. Others get their turn at least once for each record received; after those sent, its user sees to that.
"""

import contextlib
import functools
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from mpd.errors import PeerError
from mpd.ids import PeerId, RoundId
from mpd.messages import DataAccept, DataOffer
from mpd.seal import CHACHA, NO_SEAL, RANDOM_BYTES, SUITES, TAG_BYTES, BadRecord, Half, context, derive
from mpd.wire import (
    CONN_ID_BYTES,
    DATA_GREETING_BYTES,
    HEADER_BYTES,
    Header,
    Kind,
    data_greeting,
    pack_header,
    parse_data_greeting,
    unpack_header,
)

from . import congestion, faults
from .budgets import Budgets, ByteGate

if TYPE_CHECKING:
    from .links import Landing

OFFER_S = 10.0  # how long a handle is waited for
HELLO_S = 5.0  # a connection that has not proved itself by then is closed
MAX_PENDING = 64  # handles that are waited for
MAX_BAD_HELLOS = 8  # then the offer is withdrawn
MAX_KEY_AGE_S = 24 * 3600.0
_MIN_STAGE_BYTES = 4096
_MAX_WAKING_BYTES = 64 * 1024  # half of the first buffer of a socket
_WAKING_S = 0.005  # packets come one by one on a slow link; who waits for progress waits for no more than this
_MAX_FREE_STAGES = 16  # kept of each size

_HELLO = pack_header(Header(Kind.HELLO, 0, 0, 0, 0, 0, RoundId(bytes(16)), 0))
_UNPROVED = "the data connection was closed before it was proved"
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing discards what is queued and resets the connection


def suites_for(cpuinfo: str) -> tuple[str, ...]:
    """Return what to seal with, best first, on a machine that describes itself like this."""
    for line in cpuinfo.splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features") and "aes" not in flags.split():
            return (CHACHA, *(suite for suite in SUITES if suite != CHACHA))
    return SUITES


@functools.cache
def own_suites() -> tuple[str, ...]:
    """Return `suites_for` this machine."""
    try:
        return suites_for(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"))
    except OSError:
        return SUITES


# ----------------------------------------------------------------------------------------------------- agreeing on keys


class DataKeys:
    """What one data connection is sealed with. `tx` and `rx` are None where both ends were told not to seal."""

    def __init__(self, conn_id: bytes, ctx: bytes, tx: Half | None, rx: Half | None) -> None:
        self.conn_id = conn_id
        self.tx = tx
        self.rx = rx
        self._hello = _HELLO + ctx
        self.n_hello_bytes = HEADER_BYTES + (TAG_BYTES if rx is not None else 0)

    def hello(self) -> bytes:
        """Return the record that proves these keys to the other end."""
        tag = bytearray(TAG_BYTES if self.tx is not None else 0)
        if self.tx is not None:
            self.tx.seal_into(self._hello, b"", tag)
        return _HELLO + tag

    def is_hello(self, record: bytes) -> bool:
        """True if `record` proves that the other end has these keys."""
        head, tag = record[:HEADER_BYTES], record[HEADER_BYTES:]
        return head == _HELLO and (self.rx is None or self.rx.knows(self._hello, tag))

    def close(self) -> None:
        """Give the keys up."""
        for half in (self.tx, self.rx):
            if half is not None:
                half.close()


class Sealing:
    """How the two ends of one control connection agree on the keys of its data connections.

    Args:
        initiator, acceptor: who dialled the control connection, and who was dialled; proved by their certificates.
        suites: what this end seals with, best first; exactly `("none",)` for data in the clear.
        random_bytes: returns as many unpredictable bytes as it is told.
    """

    def __init__(
        self,
        swarm_id: bytes,
        initiator: PeerId,
        acceptor: PeerId,
        is_initiator: bool,
        suites: tuple[str, ...],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        if suites != (NO_SEAL,) and (not suites or not set(suites) <= set(SUITES)):
            raise ValueError(f"suites {suites}: some of {SUITES}, or only {NO_SEAL!r} expected")
        self.is_initiator = is_initiator
        self._parties = (swarm_id, initiator, acceptor)
        self._suites = suites
        self._random_bytes = random_bytes
        self._n_offers = 0  # made or answered: control is in order, so both ends count alike

    @property
    def is_sealed(self) -> bool:
        """False if this end was told to send data in the clear."""
        return self._suites != (NO_SEAL,)

    def offer(self, received: int) -> DataOffer:
        """Offer a new data connection; `received` data records have come so far."""
        self._n_offers += 1
        return DataOffer(self._random_bytes(CONN_ID_BYTES), self._random_bytes(RANDOM_BYTES), self._suites, received)

    def accept(self, offer: DataOffer, received: int) -> tuple[DataAccept, DataKeys]:
        """Answer an offer. Raises PeerError if the two ends cannot seal alike."""
        self._n_offers += 1
        suite = next((suite for suite in offer.suites if suite in self._suites), None)
        if suite is None or (suite == NO_SEAL and offer.suites != (NO_SEAL,)):
            raise PeerError(
                f"it seals data with {', '.join(offer.suites)[:100]}, this daemon with {', '.join(self._suites)}: "
                "start both with the same options"
            )
        answer = DataAccept(offer.conn_id, self._random_bytes(RANDOM_BYTES), suite, received)
        return answer, self._keys(offer, answer)

    def agreed(self, offer: DataOffer, answer: DataAccept) -> DataKeys:
        """Return the keys once the newest offer is accepted. Raises PeerError if the answer does not fit it."""
        if answer.conn_id != offer.conn_id:
            raise PeerError("it accepted a data connection that was not offered")
        if answer.suite not in self._suites:
            raise PeerError(f"it chose to seal with {answer.suite[:40]!r}: {', '.join(self._suites)} were offered")
        return self._keys(offer, answer)

    def _keys(self, offer: DataOffer, answer: DataAccept) -> DataKeys:
        ctx = context(*self._parties, offer.conn_id, self._n_offers - 1, answer.suite)
        if answer.suite == NO_SEAL:
            return DataKeys(offer.conn_id, ctx, None, None)
        i2a, a2i = derive(offer.random, answer.random, ctx, answer.suite)
        return DataKeys(offer.conn_id, ctx, *((i2a, a2i) if self.is_initiator else (a2i, i2a)))


# ------------------------------------------------------------------------------------------------------- making contact


class Pending:
    """A handle that somebody was told to dial."""

    def __init__(self, keys: DataKeys) -> None:
        self.keys = keys
        self.n_bad = 0
        self._channel: DataChannel | None = None
        self._settled = trio.Event()
        self._is_over = False

    async def channel(self) -> "DataChannel":
        """Wait until the data connection is there. Raises PeerError if it does not come, or nobody can prove it."""
        with trio.move_on_after(OFFER_S):
            await self._settled.wait()
        channel, self._channel = self._channel, None
        if channel is None:
            raise PeerError("it did not open the data connection that it offered")
        return channel

    def settle(self, channel: "DataChannel | None") -> None:
        """The connection is there, or will not come."""
        self._channel = channel
        self._settled.set()
        if self._is_over:
            self.close()

    def close(self) -> None:
        """Nobody waits any more: a connection that nobody took is closed."""
        self._is_over = True
        if self._channel is not None:
            self._channel.close()
            self._channel = None


class DataDoor:
    """Where the data connections that this daemon has accepted come in."""

    def __init__(self, stages: "Stages | None" = None) -> None:
        self.stages = stages if stages is not None else Stages(Budgets().in_flight)
        self._pending: dict[bytes, Pending] = {}

    @contextlib.contextmanager
    def expect(self, keys: DataKeys) -> Iterator[Pending]:
        """Let whoever proves `keys` in, while inside. Raises PeerError if that handle, or too many, are waited for."""
        if keys.conn_id in self._pending or len(self._pending) >= MAX_PENDING:
            raise PeerError("too many data connections are being opened: try again later")
        pending = self._pending[keys.conn_id] = Pending(keys)
        try:
            yield pending
        finally:
            self._pending.pop(keys.conn_id, None)
            pending.close()

    async def serve(self, stream: trio.SocketStream, begun: bytes) -> None:
        """Serve an incoming connection of which `begun` was read: 1 to 24 bytes, the first of them `mpdD`.

        Returns when the connection has been handed over or failed; the caller closes `stream` in either case.
        """
        with trio.move_on_after(HELLO_S), contextlib.suppress(PeerError, OSError, trio.BrokenResourceError):
            conn_id = parse_data_greeting(await _receive_exactly(stream, DATA_GREETING_BYTES, begun))
            pending = self._pending.get(conn_id)
            if pending is not None:
                await self._admit(conn_id, pending, stream)

    async def _admit(self, conn_id: bytes, pending: Pending, stream: trio.SocketStream) -> None:
        keys = pending.keys
        hello = await _receive_exactly(stream, keys.n_hello_bytes)
        if self._pending.get(conn_id) is not pending:  # somebody else was quicker
            return
        if not keys.is_hello(hello):
            pending.n_bad += 1
            if pending.n_bad >= MAX_BAD_HELLOS:
                del self._pending[conn_id]
                pending.settle(None)
            return
        del self._pending[conn_id]
        channel = None
        try:
            await stream.send_all(keys.hello())
            channel = DataChannel(_socket_of(stream), keys, self.stages)
        finally:
            pending.settle(channel)


async def dial_data(host: str, port: int, keys: DataKeys, stages: "Stages") -> "DataChannel":
    """Open the data connection of `keys`; both ends have proved them when this returns. Raises OSError, PeerError."""
    if faults.armed:
        await faults.outlast()
    stream = await trio.open_tcp_stream(host, port)
    try:
        await stream.send_all(data_greeting(keys.conn_id) + keys.hello())
        if not keys.is_hello(await _receive_exactly(stream, keys.n_hello_bytes)):
            raise PeerError("the data connection was answered by somebody who does not hold its keys")
        return DataChannel(_socket_of(stream), keys, stages)
    except BaseException as error:
        keys.close()
        await trio.aclose_forcefully(stream)
        if isinstance(error, trio.BrokenResourceError):
            raise ConnectionResetError(_UNPROVED) from error
        raise


async def _receive_exactly(stream: trio.SocketStream, n_bytes: int, begun: bytes = b"") -> bytes:
    received = begun
    while len(received) < n_bytes:
        more = await stream.receive_some(n_bytes - len(received))
        if not more:
            raise ConnectionResetError(_UNPROVED)
        received += more
    return received


def _socket_of(stream: trio.SocketStream) -> socket.socket:
    """Take the socket out of a stream: records are carried without trio's methods."""
    sock = socket.socket(fileno=stream.socket.detach())
    sock.setblocking(False)
    tune(sock)
    return sock


def tune(sock: Any) -> None:
    """Set the options of a connection between peers: no delay, bounded silence of the kernel, who sends how fast."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)
    congestion.choose(sock)


# --------------------------------------------------------------------------------------------------------------- in use


class Stages:
    """Memory for records on their way in, which peers make us hold: what is out at once goes through `gate`.

    It is used again, because touching fresh pages costs more than reading into them.
    """

    def __init__(self, gate: ByteGate) -> None:
        self._gate = gate
        self._free: dict[int, list[memoryview]] = {}

    async def take(self, n_bytes: int) -> memoryview:
        """Return a view of `n_bytes`: at once if there is room, else as soon as there is. Cancelled: took nothing."""
        # A power of two and a tag: a chunk of just that size, sealed, would otherwise occupy twice its length.
        capacity = max(_MIN_STAGE_BYTES, 1 << (n_bytes - TAG_BYTES - 1).bit_length()) + TAG_BYTES
        if not self._gate.take_nowait(capacity):
            await self._gate.take(capacity)
        free = self._free.get(capacity)
        return (free.pop() if free else memoryview(bytearray(capacity)))[:n_bytes]

    def give(self, view: memoryview) -> None:
        """Take back what `take` has returned."""
        whole = memoryview(view.obj)
        self._gate.give(len(whole))
        free = self._free.setdefault(len(whole), [])
        if len(free) < _MAX_FREE_STAGES:
            free.append(whole)


class DataChannel:
    """A data connection that both ends have proved. At most one task sends and one receives."""

    def __init__(self, sock: socket.socket, keys: DataKeys, stages: Stages) -> None:
        self.conn_id = keys.conn_id
        self.is_sealed = keys.rx is not None
        self.bytes_sent = 0
        self.bytes_received = 0
        self.n_received = 1  # records, the HELLO included
        self._began = trio.current_time()
        self._sock = sock
        self._keys = keys
        self._rest = memoryview(b"")  # what is left of the payload being sent from where it lies
        self._head = memoryview(bytearray(HEADER_BYTES))
        self._n_head = 0  # how much of the next header has come with the last body
        self._low_water = 1  # bytes that make the kernel wake us up
        self._worth_waking = 1  # bytes that are worth it, at the rate of the last record
        self._aad = bytearray(HEADER_BYTES)  # the header of the record being received
        self._tx_stage = memoryview(bytearray(0))
        self._stages = stages
        self._rx_stage: memoryview | None = None
        self._congestion = congestion.Congestion(sock)
        self._has_waited = False  # for bytes of this record: others had their turn meanwhile

    @property
    def wear(self) -> float:
        """How much of what its keys may do is used, from 0 to 1: blocks, records and time."""
        halves = (half.wear for half in (self._keys.tx, self._keys.rx) if half is not None)
        return max((trio.current_time() - self._began) / MAX_KEY_AGE_S, *halves) if self.is_sealed else 0.0

    def close(self, *, hard: bool = False) -> None:
        """Close it and drop its keys. `hard` resets the connection: nothing that is queued goes out."""
        self._keys.close()
        if hard:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._sock.close()

    # ---------------------------------------------------------------------------------------------------------- sending

    async def send(self, header: bytes, payload: memoryview) -> None:
        """Send a record, waiting only for the kernel. If this fails or is cancelled, close the connection.

        Raises OSError, and LocalError if the keys are worn out.
        """
        if self._keys.tx is not None:
            head = self._sealed(self._keys.tx, header, payload)
        else:
            head, self._rest = memoryview(header), payload
        try:
            while head or self._rest:
                if faults.armed:
                    await faults.outlast()
                try:
                    n = self._sock.sendmsg((head, self._rest))
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._sock)
                    continue
                self.bytes_sent += n
                from_head = min(n, len(head))
                head, self._rest = head[from_head:], self._rest[n - from_head :]
        finally:
            self._rest = memoryview(b"")
        self._congestion.note_sent(self.bytes_sent)

    def detach(self) -> None:
        """Make the record being sent independent of its memory. A sealed one is a copy already."""
        self._rest = memoryview(bytes(self._rest))

    def _sealed(self, tx: Half, header: bytes, payload: memoryview) -> memoryview:
        """Return the record in one piece: header, ciphertext, tag."""
        n_bytes = HEADER_BYTES + len(payload) + TAG_BYTES
        if len(self._tx_stage) < n_bytes:
            self._tx_stage = memoryview(bytearray(n_bytes))
        stage = self._tx_stage[:n_bytes]
        stage[:HEADER_BYTES] = header
        tx.seal_into(header, payload, stage[HEADER_BYTES:])
        return stage

    # -------------------------------------------------------------------------------------------------------- receiving

    async def receive_header(self) -> Header:
        """Return the next header; of a sealed record it is anybody's word until the payload has opened.

        Raises PeerError if it makes no sense, OSError at the end of the connection.
        """
        while self._n_head < HEADER_BYTES:
            n = self._receive([self._head[self._n_head :]], is_inside=self._n_head > 0)
            if not n:
                await self._wait_for(HEADER_BYTES - self._n_head)
            self._n_head += n
        self._n_head = 0
        self._aad[:] = self._head
        return unpack_header(self._aad)

    async def receive_payload(self, n_bytes: int, landing: "Landing | None") -> memoryview:
        """Return the payload behind the last header, at `landing.view` or, without one, valid until `release`.

        Sealed bytes are read into a private stage and touch nothing else before they open. Raises BadRecord if they do
        not, OSError if the connection ends.
        """
        n_wire = n_bytes + (TAG_BYTES if self.is_sealed else 0)
        if not self._has_waited:
            await trio.lowlevel.checkpoint()
        self._has_waited = False
        stage = view = self._rx_stage = await self._stages.take(n_wire)
        got, began = 0, trio.current_time()
        while got < n_wire:
            if not self.is_sealed and landing is not None:
                view = landing.view if landing.view is not None else stage
            n = self._receive([view[got:], self._head], is_inside=True)
            if not n:
                await self._wait_for(n_wire - got)  # meanwhile, `view` may be exchanged
                continue
            self._n_head = max(0, got + n - n_wire)
            got = min(got + n, n_wire)
            if not self.is_sealed and landing is not None:
                landing.progress()
        took_s = max(trio.current_time() - began, 1e-9)
        self._worth_waking = max(1, min(int(_WAKING_S * n_wire / took_s), _MAX_WAKING_BYTES))
        if self._keys.rx is not None:
            view = self._open(self._keys.rx, stage, landing)
        self.n_received += 1
        return view

    def release(self) -> None:
        """Give the memory of the last record back."""
        if self._rx_stage is not None:
            self._stages.give(self._rx_stage)
            self._rx_stage = None

    def _open(self, rx: Half, sealed: memoryview, landing: "Landing | None") -> memoryview:
        slot = landing.view if landing is not None else None
        out = sealed[:-TAG_BYTES] if slot is None else slot
        try:
            rx.open_into(self._aad, sealed, out)
        except BadRecord:  # what was deciphered is the choice of whoever altered it
            out[:] = bytes(len(out))
            raise
        return out

    async def _wait_for(self, n_bytes: int) -> None:
        """Wait until all `n_bytes`, or as many as are worth waking up for, or the end of the connection have come."""
        low_water = min(n_bytes, self._worth_waking)
        if low_water != self._low_water:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water)
            self._low_water = low_water
        await trio.lowlevel.wait_readable(self._sock)
        self._has_waited = True

    def _receive(self, buffers: list[memoryview], *, is_inside: bool) -> int:
        """Return how many bytes have come; 0: none at the moment. Raises OSError at the end of the connection."""
        try:
            n = self._sock.recvmsg_into(buffers)[0]
        except BlockingIOError:
            return 0
        if n == 0:
            raise ConnectionResetError("its data connection ended" + " inside a record" * is_inside)
        self.bytes_received += n
        return n
