"""A link over real loopback sockets: order, memory, what an attacker gains, and every way in which it can end.

Strategy: where both ends behave there are two `Link`s, with a man in the middle of their data connection where one is
needed; where one end does not behave, the test holds the far sockets itself, and the keys. What is said of records is
tried sealed and in the clear. Tests about time run on a clock that jumps once nothing has happened for a moment, so
nobody waits for real.
"""

import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing
from daemon_helpers import HANG_S, Parcel, Recorder, node_id, record, stream_of, tcp_pair

from mpd.daemon.channels import DataDoor, DataKeys, Sealing
from mpd.daemon.links import (
    BACK_OFF_S,
    DRAIN_S,
    IDLE_PING_S,
    MAX_CONTROL_AGE_S,
    MAX_QUEUED_CONTROL_BYTES,
    MAX_RECORD_BYTES,
    MAX_REPAIRS,
    REPAIR_S,
    Landing,
    Link,
)
from mpd.errors import PeerError
from mpd.messages import PEERS, DataAccept, DataBad, DataOffer, DataRefused, Goodbye, Ping, Scoped
from mpd.seal import MAX_BLOCKS, NO_SEAL, SUITES, TAG_BYTES
from mpd.wire import DATA_GREETING_BYTES, HEADER_BYTES, ControlBuffer, Header, Kind, control_frame, data_greeting

ROUND = b"r" * 16
MIB = 1 << 20
PLAIN = (NO_SEAL,)
INITIATOR, ACCEPTOR = node_id(1), node_id(2)


def said(text: str) -> Goodbye:
    return Goodbye(text)


def framed(message: object) -> bytes:
    return control_frame(PEERS.encode(message))


def sealing(is_initiator: bool, suites: tuple[str, ...]) -> Sealing:
    return Sealing(bytes(20), INITIATOR, ACCEPTOR, is_initiator, suites, random.Random(is_initiator).randbytes)


class Taking:
    """Takes in one record where the link has put it."""

    view: memoryview | None = None

    def __init__(self, events: "Listener", header: Header) -> None:
        self.events = events
        self.header = header

    def progress(self) -> None:
        self.events.note("progress", self.header)

    def complete(self, payload: memoryview) -> None:
        self.events.note("record", (self.header, bytes(payload)))

    def abandon(self) -> None:
        self.events.note("abandoned", self.header)


class Listener(Recorder):
    """Hears from links, and takes every record."""

    def all_of(self, kind: str) -> list[Any]:
        return self._of(kind)

    def expects(self, link: Link, header: Header) -> bool:
        return True

    async def landing(self, link: Link, header: Header) -> Landing | None:
        self.note("header", header)
        return Taking(self, header)


# ----------------------------------------------------------------------------------------------------- one end, or both


@dataclass
class Wire:
    """A running link that was called, and the far ends of its two connections, held by the test."""

    link: Link
    events: Recorder
    control: trio.SocketStream
    door: DataDoor
    sealing: Sealing
    buffer: ControlBuffer = field(default_factory=ControlBuffer)
    ended: trio.Event = field(default_factory=trio.Event)
    data_connections: list[trio.SocketStream] = field(default_factory=list)
    keys: DataKeys = field(init=False)

    @property
    def data(self) -> trio.SocketStream:
        return self.data_connections[-1]

    async def heard(self) -> object:
        """Return the next message that the link sends."""
        while (body := self.buffer.next_frame()) is None:
            self.buffer.feed(
                await self.control.receive_some(4) or pytest.fail("the link closed its control connection")
            )
        return PEERS.decode(body)

    async def offer(self, received: int = 0) -> DataAccept:
        """Offer a data connection and take up what is answered; return the answer."""
        offer = self.sealing.offer(received)
        await self.control.send_all(framed(offer))
        answer = await self.heard()
        while not isinstance(answer, DataAccept):
            answer = await self.heard()
        self.keys = self.sealing.agreed(offer, answer)
        near, far = tcp_pair()
        self.data_connections.append(stream_of(far))
        await self.data.send_all(data_greeting(offer.conn_id) + self.keys.hello())
        async with stream_of(near) as stream:
            await self.door.serve(stream, b"")
        assert self.keys.is_hello(await receive_exactly(self.data, self.keys.n_hello_bytes))
        return answer

    def sealed(self, header: bytes, payload: bytes = b"") -> bytes:
        """Return a record as it travels."""
        if self.keys.tx is None:
            return header + payload
        out = bytearray(len(payload) + TAG_BYTES)
        self.keys.tx.seal_into(header, payload, out)
        return header + out

    async def opened(self) -> tuple[bytes, bytes]:
        """Receive a record; return header and payload."""
        header = await receive_exactly(self.data, HEADER_BYTES)
        n_bytes = int.from_bytes(header[8:12], "little")
        if self.keys.rx is None:
            return header, await receive_exactly(self.data, n_bytes)
        out = bytearray(n_bytes)
        self.keys.rx.open_into(header, await receive_exactly(self.data, n_bytes + TAG_BYTES), out)
        return header, bytes(out)


@contextlib.asynccontextmanager
async def one_end(events: Recorder | None = None, suites: tuple[str, ...] = PLAIN) -> AsyncIterator[Wire]:
    """Run one link, the acceptor of both connections; the test plays the peer."""
    (control, far_control), door = tcp_pair(), DataDoor()
    link = Link(INITIATOR, bytes(16), None, stream_of(control), sealing(False, suites), door, ("192.0.2.1", 9))
    wire = Wire(link, events or Listener(), stream_of(far_control), door, sealing(True, suites))

    async def run() -> None:
        await link.establish()
        await link.run(wire.events)
        wire.ended.set()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await wire.offer()
            await wire.events.until(lambda: wire.events.log)
            yield wire
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            for stream in (wire.control, *wire.data_connections):
                await stream.aclose()


@dataclass
class Pair:
    """Both ends of a running link: `near` has dialled `far`."""

    near: Link
    far: Link
    near_events: Listener = field(default_factory=Listener)
    far_events: Listener = field(default_factory=Listener)

    async def until_both_ended(self) -> tuple[str, str]:
        """Return the reasons."""
        await self.near_events.until(lambda: self.near_events.reasons)
        await self.far_events.until(lambda: self.far_events.reasons)
        return self.near_events.reasons[0], self.far_events.reasons[0]


@contextlib.asynccontextmanager
async def both_ends(suites: tuple[str, ...] = SUITES, attacker: "Attacker | None" = None) -> AsyncIterator[Pair]:
    """Run both ends of a link; with an `attacker`, all that the dialler sends on data connections passes there."""
    (control, far_control), door = tcp_pair(), DataDoor()
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    near = Link(ACCEPTOR, bytes(16), None, stream_of(control), sealing(True, suites), DataDoor(), ("127.0.0.1", port))
    far = Link(INITIATOR, bytes(16), None, stream_of(far_control), sealing(False, suites), door, ("127.0.0.1", 9))
    pair = Pair(near, far)

    async def serve(stream: trio.SocketStream) -> None:
        if attacker is None:
            await door.serve(stream, b"")
        else:
            near_end, far_end = tcp_pair()
            async with stream_of(far_end) as onwards, trio.open_nursery() as nursery:
                nursery.start_soon(attacker.relay, stream, onwards)
                await door.serve(stream_of(near_end), b"")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        async with trio.open_nursery() as meeting:
            meeting.start_soon(near.establish)
            meeting.start_soon(far.establish)
        nursery.start_soon(near.run, pair.near_events)
        nursery.start_soon(far.run, pair.far_events)
        yield pair
        nursery.cancel_scope.cancel()


@pytest.fixture
def jumping_clock() -> trio.testing.MockClock:
    """Time passes only while all sockets are quiet: what one task writes to the loopback, another can read at once."""
    return trio.testing.MockClock(autojump_threshold=0.005)


EITHER_WAY = pytest.mark.parametrize("suites", [SUITES, PLAIN])


# ------------------------------------------------------------------------------------------------ what arrives, and how


async def test_messages_arrive_in_order_both_ways() -> None:
    async with both_ends() as pair:
        for i in range(500):
            pair.near.send(said(f"near {i}"))
            pair.far.send(said(f"far {i}"))
        await pair.near_events.until(lambda: len(pair.near_events.messages) == 500)
        await pair.far_events.until(lambda: len(pair.far_events.messages) == 500)
    assert pair.far_events.messages == [said(f"near {i}") for i in range(500)]
    assert pair.near_events.messages == [said(f"far {i}") for i in range(500)]


async def test_a_message_as_long_as_allowed_arrives_whole() -> None:
    message = Scoped(ROUND, bytes(range(256)) * 4000)
    async with both_ends() as pair:
        pair.near.send(message)
        await pair.far_events.until(lambda: pair.far_events.messages)
    assert pair.far_events.messages == [message]


@EITHER_WAY
async def test_records_of_all_sizes_arrive_in_order_both_ways(suites: tuple[str, ...]) -> None:
    sizes = [1, 0, 40, 39, 41, 0, 4096, 65536, 65537, MIB, 3 * MIB + 1, 0, MAX_RECORD_BYTES, 7]
    payloads = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
    parcels = {end: [Parcel(payload, chunk=i) for i, payload in enumerate(payloads)] for end in ("near", "far")}
    async with both_ends(suites) as pair:
        near_events, far_events = pair.near_events, pair.far_events
        for i in range(len(sizes)):
            pair.near.ship(parcels["near"][i])
            pair.far.ship(parcels["far"][i])
        await near_events.until(lambda: len(near_events.records) == len(sizes))
        await far_events.until(lambda: len(far_events.records) == len(sizes))
        overhead = HEADER_BYTES + (TAG_BYTES if pair.near.is_sealed else 0)
        for link in (pair.near, pair.far):
            assert link.bytes_sent == link.bytes_received == sum(sizes) + overhead * len(sizes)
            assert link.goodput > 0
    for events, sent in ((near_events, parcels["far"]), (far_events, parcels["near"])):
        assert [header.chunk for header, _ in events.records] == list(range(len(sizes)))
        assert all(body == payload for (_, body), payload in zip(events.records, payloads, strict=True))
        assert [parcel.n_sent for parcel in sent] == [size + HEADER_BYTES for size in sizes]


async def test_messages_do_not_wait_behind_records() -> None:
    async with one_end() as wire:
        with trio.fail_after(HANG_S):
            wire.link.ship(Parcel(bytes(MAX_RECORD_BYTES)))  # nobody reads it
            await trio.testing.wait_all_tasks_blocked()
            wire.link.send(said("past it"))
            assert await wire.heard() == said("past it")


async def test_a_header_may_come_byte_by_byte_and_its_last_byte_with_a_tail() -> None:
    async with one_end() as wire:
        with trio.fail_after(HANG_S):
            first = record(3, chunk=1)
            for byte in first[:-1]:
                await wire.data.send_all(bytes([byte]))
                await trio.testing.wait_all_tasks_blocked()
            assert wire.events.records == []
            await wire.data.send_all(first[-1:] + b"abc" + record(2, chunk=2) + b"de")
            await wire.events.until(lambda: len(wire.events.records) == 2)
    assert [(header.chunk, body) for header, body in wire.events.records] == [(1, b"abc"), (2, b"de")]


@EITHER_WAY
@pytest.mark.parametrize("first_length", [0, 1, 40, 100])
async def test_the_stream_may_be_cut_anywhere(first_length: int, suites: tuple[str, ...]) -> None:
    """In particular just after a body, and after any part of the header that follows it."""
    first, third = bytes(range(first_length)), b"third"
    async with one_end(suites=suites) as wire:
        with trio.fail_after(HANG_S):
            n_bytes = first_length + 3 * HEADER_BYTES + 5 + (3 * TAG_BYTES if suites != PLAIN else 0)
            for n, cut in enumerate(range(0, n_bytes + 1, 3), start=1):
                stream = wire.sealed(record(len(first), 1), first) + wire.sealed(record(0, 2, Kind.BYE))
                stream += wire.sealed(record(len(third), 3), third)
                await wire.data.send_all(stream[:cut])
                await trio.testing.wait_all_tasks_blocked()
                await wire.data.send_all(stream[cut:])
                await wire.events.until(lambda n=n: len(wire.events.records) == 3 * n)
                assert [body for _, body in wire.events.records[-3:]] == [first, b"", third], cut


@pytest.mark.parametrize("is_taken", [False, True])
async def test_a_payload_in_the_clear_goes_on_where_its_landing_says_meanwhile(is_taken: bool) -> None:
    first, second = memoryview(bytearray(MIB)), None if is_taken else memoryview(bytearray(MIB))
    under_way: list[Taking] = []

    class Events(Listener):
        def expects(self, link: Link, header: Header) -> bool:
            return True

        async def landing(self, link: Link, header: Header) -> Landing | None:
            under_way.append(Taking(self, header))
            under_way[-1].view = first
            return under_way[-1]

    events = Events()
    async with one_end(events) as wire:
        with trio.fail_after(HANG_S):
            await wire.data.send_all(record(MIB) + b"\1")
            await trio.testing.wait_all_tasks_blocked()
            under_way[0].view = second
            await wire.data.send_all(b"\2" * (MIB - 1))
            await events.until(lambda: events.records)
    assert bytes(first[:2]) == b"\1\0"
    assert events.records[0][1] == b"\0" + b"\2" * (MIB - 1)
    assert second is None or bytes(second[:2]) == b"\0\2"


async def test_a_sealed_payload_touches_its_place_only_when_it_has_opened() -> None:
    slot = memoryview(bytearray(1000))
    asked: list[Taking] = []

    class Events(Listener):
        def expects(self, link: Link, header: Header) -> bool:
            return True

        async def landing(self, link: Link, header: Header) -> Landing | None:
            asked.append(Taking(self, header))
            asked[-1].view = slot
            return asked[-1]

    async with one_end(Events(), SUITES) as wire:
        with trio.fail_after(HANG_S):
            for value, is_taken in ((1, False), (2, True)):
                sent = wire.sealed(record(1000), bytes([value]) * 1000)
                await wire.data.send_all(sent[:-1])
                await trio.testing.wait_all_tasks_blocked()
                assert bytes(slot) == bytes([value - 1]) * 1000
                if is_taken:
                    asked[-1].view = None  # somebody else writes there now
                await wire.data.send_all(sent[-1:])
                await wire.events.until(lambda value=value: len(wire.events.records) == value)
    assert bytes(slot) == b"\1" * 1000
    assert [payload[0] for _, payload in wire.events.records] == [1, 2]
    assert all(kind != "progress" for kind, _ in wire.events.log)


async def test_a_record_that_nobody_wants_is_read_and_forgotten() -> None:
    class Choosy(Listener):
        def expects(self, link: Link, header: Header) -> bool:
            return True

        async def landing(self, link: Link, header: Header) -> Landing | None:
            return None if header.chunk == 0 else await super().landing(link, header)

    events = Choosy()
    async with one_end(events) as wire:
        with trio.fail_after(HANG_S):
            await wire.data.send_all(record(100_000, chunk=0) + bytes(100_000) + record(1, chunk=1) + b"x")
            await events.until(lambda: events.records)
    assert [(header.chunk, body) for header, body in events.records] == [(1, b"x")]


# --------------------------------------------------------------------------------------------------------- what is sent


@EITHER_WAY
@pytest.mark.parametrize("chunk", [None, 7])
async def test_a_detached_record_keeps_its_bytes_while_the_memory_changes(
    chunk: int | None, suites: tuple[str, ...]
) -> None:
    memory, owner = bytearray(b"\1" * (4 * MIB)), object()
    async with one_end(suites=suites) as wire:
        with trio.fail_after(HANG_S):
            wire.link.ship(Parcel(memoryview(memory), chunk=7, owner=owner))
            await trio.testing.wait_all_tasks_blocked()  # the peer does not read: most of it is still here
            wire.link.detach(owner, chunk)
            memory[:] = b"\2" * len(memory)
            assert (await wire.opened())[1] == b"\1" * len(memory)


@pytest.mark.parametrize(("of_owner", "chunk"), [(True, 8), (False, None)])
async def test_only_the_record_that_is_meant_is_detached(of_owner: bool, chunk: int | None) -> None:
    """A copy of every record that is under way would cost a round more than it saves."""
    memory, owner = bytearray(b"\1" * (4 * MIB)), object()
    async with one_end() as wire:
        with trio.fail_after(HANG_S):
            wire.link.ship(Parcel(memoryview(memory), chunk=7, owner=owner))
            await trio.testing.wait_all_tasks_blocked()
            wire.link.detach(owner if of_owner else object(), chunk)
            memory[:] = b"\2" * len(memory)
            received = await receive_exactly(wire.data, HEADER_BYTES + len(memory))
    assert received[-1:] == b"\2"


async def test_dropped_records_are_not_sent_but_the_one_under_way_is_finished() -> None:
    mine, other = object(), object()
    async with one_end() as wire:
        with trio.fail_after(HANG_S):
            for chunk, owner in enumerate([mine, mine, other, mine, None]):
                wire.link.ship(Parcel(bytes([chunk]) * MIB, chunk, owner))
            await trio.testing.wait_all_tasks_blocked()
            wire.link.drop_shipments(mine)
            received = await receive_exactly(wire.data, 3 * (HEADER_BYTES + MIB))
            await trio.testing.wait_all_tasks_blocked()
            assert wire.link.bytes_sent == len(received)
            assert wire.link.unsent(mine) == []
    assert [received[i * (HEADER_BYTES + MIB) + HEADER_BYTES] for i in range(3)] == [0, 2, 4]


async def test_a_record_that_is_not_wanted_any_more_when_its_turn_comes_is_left_out() -> None:
    class Cancelled(Parcel):
        def load(self) -> None:
            return None

    async with both_ends() as pair:
        withdrawn = Cancelled(b"never", chunk=1)
        for parcel in (Parcel(b"a"), withdrawn, Parcel(b"b")):
            pair.near.ship(parcel)
        await pair.far_events.until(lambda: len(pair.far_events.records) == 2)
    assert [body for _, body in pair.far_events.records] == [b"a", b"b"]
    assert withdrawn.n_sent == 0


async def test_flush_waits_until_messages_are_out_and_no_longer_than_told(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with one_end() as wire:
        await wire.link.flush(5.0)  # nothing is queued
        wire.link.send(said("a"))
        await wire.link.flush(5.0)
        began = trio.current_time()
        assert await wire.heard() == said("a")
        for _ in range(10):  # the peer has stopped reading
            wire.link.send(Scoped(ROUND, bytes(500_000)))
        await wire.link.flush(5.0)
        assert trio.current_time() - began == pytest.approx(5.0)


async def test_a_peer_that_reads_no_messages_is_dropped_before_it_costs_much_memory() -> None:
    async with one_end() as wire:
        with trio.fail_after(HANG_S):
            n_messages = 0
            while wire.link.up:
                wire.link.send(Scoped(ROUND, bytes(500_000)))
                n_messages += 1
            await wire.ended.wait()
    assert n_messages <= MAX_QUEUED_CONTROL_BYTES / 500_000 + 1
    assert wire.events.reasons == ["it does not read its messages"]


async def test_a_message_that_is_too_long_to_send_costs_the_link_and_nothing_else() -> None:
    async with one_end() as wire:
        with trio.fail_after(HANG_S):
            wire.link.send(Scoped(ROUND, bytes(2 * MIB)))
            await wire.ended.wait()
    assert "a control message has" in wire.events.reasons[0]


# ---------------------------------------------------------------------------------------------------- misbehaving peers


async def expect_end(wire: Wire) -> str:
    """Wait for the link to end; return why. Nothing may follow."""
    with trio.fail_after(HANG_S):
        await wire.ended.wait()
    assert not wire.link.up
    assert wire.events.log[-1][0] == "down"
    assert len(wire.events.reasons) == 1
    return wire.events.reasons[0]


async def test_an_oversize_record_ends_the_link_before_anybody_makes_room_for_it() -> None:
    async with one_end() as wire:
        await wire.data.send_all(record(MAX_RECORD_BYTES + 1))
        assert f"announced a record of {MAX_RECORD_BYTES + 1} bytes" in await expect_end(wire)
    assert all(kind != "header" for kind, _ in wire.events.log)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"\x09" + record(0)[1:], "no record of kind 9"),
        (b"\x03" + record(5)[1:], "BYE record announces 5 bytes"),
        (b"\xff" * HEADER_BYTES, "no record of kind 255"),
    ],
)
async def test_a_header_that_makes_no_sense_ends_the_link(header: bytes, reason: str) -> None:
    async with one_end() as wire:
        await wire.data.send_all(header)
        assert reason in await expect_end(wire)


@pytest.mark.parametrize(
    ("junk", "reason"),
    [
        (bytes(4), "announces 0 bytes"),
        (b"\xff\xff\xff\xff", "announces 4294967295 bytes"),
        (b"GET / HTTP/1.1\r\n\r\n", "bytes: 1 to"),
        (control_frame(b"junk"), "malformed message"),
        (control_frame(b"\x92\xa7unknown\x80"), "'unknown'"),
        (control_frame(b"\x92\xa4ping\x81\xa6answer\x07"), "malformed message"),
    ],
)
async def test_junk_on_control_ends_the_link(junk: bytes, reason: str) -> None:
    async with one_end() as wire:
        await wire.control.send_all(framed(said("before")) + junk)
        assert reason in await expect_end(wire)
    assert wire.events.messages == [said("before")]


@pytest.mark.parametrize("where", ["message", "landing"])
async def test_whoever_listens_may_refuse_what_it_hears(where: str) -> None:
    class Strict(Listener):
        def on_message(self, link: Link, message: object) -> None:
            raise PeerError("that is no message for us")

        def expects(self, link: Link, header: Header) -> bool:
            return True

        async def landing(self, link: Link, header: Header) -> Landing | None:
            raise PeerError("that is no landing for us")

    async with one_end(Strict()) as wire:
        await (wire.control.send_all(framed(said("x"))) if where == "message" else wire.data.send_all(record(3)))
        assert await expect_end(wire) == f"that is no {where} for us"


async def test_a_reset_with_bytes_unread_is_an_end_like_any_other() -> None:
    async with one_end() as wire:
        wire.link.ship(Parcel(bytes(MIB)))
        wire.link.send(said("unread"))
        await wire.data.send_all(record(MIB) + bytes(1000))
        await trio.testing.wait_all_tasks_blocked()
        for stream in (wire.data, wire.control):
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await stream.aclose()
        assert await expect_end(wire)
    assert wire.events.records == []


@EITHER_WAY
async def test_a_data_connection_that_ends_inside_a_record_delivers_nothing_of_it(suites: tuple[str, ...]) -> None:
    async with one_end(suites=suites) as wire:
        with trio.fail_after(HANG_S):
            sent = wire.sealed(record(3, 1), b"abc") + wire.sealed(record(1000, 2), bytes(1000))[:-1]
            await wire.data.send_all(sent)
            await wire.data.aclose()
            assert await wire.heard() == DataBad(wire.keys.conn_id, 2)  # the HELLO, and the first
    assert [header.chunk for header, _ in wire.events.records] == [1]
    assert [header.chunk for header in wire.events.all_of("abandoned")] == [2]


# ----------------------------------------------------------------------------------------------------------------- ends


async def test_what_was_sent_before_control_ended_still_arrives(jumping_clock: trio.testing.MockClock) -> None:
    payload = bytes(range(256)) * 4096
    async with one_end() as wire:
        with trio.fail_after(HANG_S):
            await wire.control.send_all(framed(said("last")))
            await wire.control.aclose()
            for chunk in range(3):
                await wire.data.send_all(record(len(payload), chunk) + payload)
            await wire.data.aclose()
        assert await expect_end(wire) == "it closed the connection"
    assert [(header.chunk, body == payload) for header, body in wire.events.records] == [(i, True) for i in range(3)]
    assert wire.events.messages == [said("last")]


async def test_data_that_does_not_end_after_control_has_is_given_up(jumping_clock: trio.testing.MockClock) -> None:
    async with one_end() as wire:
        began = trio.current_time()
        await wire.control.aclose()
        assert await expect_end(wire) == "it closed the connection"
        assert trio.current_time() - began == pytest.approx(DRAIN_S)


async def test_the_last_messages_arrive_although_data_has_ended(jumping_clock: trio.testing.MockClock) -> None:
    async with one_end() as wire:
        with trio.fail_after(HANG_S):
            await wire.data.aclose()
            await trio.testing.wait_all_tasks_blocked()
            await wire.control.send_all(framed(said("I am leaving")))
            await wire.control.send_eof()
        assert await expect_end(wire) == "it closed the connection"
    assert wire.events.messages == [said("I am leaving")]


async def test_close_ends_both_sides_at_once() -> None:
    async with both_ends() as pair:
        await pair.far_events.until(lambda: pair.far_events.log)
        pair.near.close("enough")
        pair.near.close("this is not the reason")
        near_reason, far_reason = await pair.until_both_ended()
    assert near_reason == pair.near.reason == "enough"
    assert far_reason == "it closed the connection"
    assert len(pair.near_events.reasons) == len(pair.far_events.reasons) == 1


async def test_a_link_that_is_closed_before_it_runs_ends_at_once(jumping_clock: trio.testing.MockClock) -> None:
    control, far_control = tcp_pair()
    with contextlib.closing(far_control):
        link = Link(
            INITIATOR, bytes(16), None, stream_of(control), sealing(False, SUITES), DataDoor(), ("192.0.2.1", 9)
        )
        events = Listener()
        link.close("it called again")
        await link.run(events)
        assert trio.current_time() == 0
        assert far_control.recv(1) == b""
    assert events.log == [("down", "it called again")]


async def test_what_is_queued_on_a_link_that_has_ended_is_lost_in_silence() -> None:
    async with one_end() as wire:
        wire.link.close("enough")
        await expect_end(wire)
        parcel = Parcel(b"x")
        wire.link.send(said("x"))
        wire.link.ship(parcel)
        with trio.fail_after(HANG_S):
            await wire.link.flush(1.0)
    assert parcel.n_sent == 0


async def test_a_cancelled_link_says_goodbye_to_its_listeners_and_closes_its_sockets() -> None:
    async with one_end() as wire:
        with trio.fail_after(HANG_S):
            wire.link._scope.cancel()
            await wire.ended.wait()
            assert await wire.control.receive_some(1) == b""
            assert await wire.data.receive_some(1) == b""
    assert [kind for kind, _ in wire.events.log] == ["up", "down"]


# ----------------------------------------------------------------------------------------------------------------- time


async def test_a_question_for_a_sign_of_life_is_answered() -> None:
    async with one_end() as wire:
        with trio.fail_after(HANG_S):
            await wire.control.send_all(framed(Ping(answer=True)))
            assert await wire.heard() == Ping(answer=False)
    assert wire.events.messages == []


@pytest.mark.parametrize("need", ["busy", "awaited"])
async def test_a_peer_that_falls_silent_while_it_is_needed_is_given_up(
    need: str, jumping_clock: trio.testing.MockClock
) -> None:
    async with one_end() as wire:
        wire.link.patience_s = 3.0
        setattr(wire.link, need, 1)
        began = trio.current_time()
        assert "nothing was heard from it for" in await expect_end(wire)
        assert 3.0 <= trio.current_time() - began <= 1.5 * 3.0


@pytest.mark.parametrize("need", ["busy", "awaited"])
@pytest.mark.parametrize("idle_s", [0.0, 1.0, 7.0])
async def test_an_idle_link_is_watched_from_the_moment_on_at_which_it_is_needed(
    idle_s: float, need: str, jumping_clock: trio.testing.MockClock
) -> None:
    async with one_end() as wire:
        await trio.sleep(idle_s)
        wire.link.patience_s = 0.5
        setattr(wire.link, need, 1)
        began = trio.current_time()
        await expect_end(wire)
        assert 0.5 <= trio.current_time() - began <= 0.5 * 1.5


async def test_a_peer_that_is_needed_and_alive_is_kept_however_little_it_has_to_say(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with both_ends() as pair:
        pair.near.patience_s = 1.0
        pair.near.busy = 1
        await trio.sleep(20)
        assert pair.near.up
        assert pair.near_events.reasons == []


@pytest.mark.parametrize("quiet_s", [0.5, 1.9, 3.9, 5.9, 19.9, 33.3])
async def test_the_silence_of_an_idle_link_is_not_held_against_the_peer(
    quiet_s: float, jumping_clock: trio.testing.MockClock
) -> None:
    """A round may begin on it at any moment, just before the peer would be found silent."""
    async with both_ends() as pair:
        await trio.sleep(quiet_s)
        pair.near.patience_s = 1.0
        pair.near.busy = 1
        await trio.sleep(4)
        assert pair.near.up
        assert pair.near_events.reasons == []


async def test_an_idle_link_lives_on_signs_of_life_and_ends_without_them(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with both_ends() as pair:
        await trio.sleep(3 * IDLE_PING_S)
        assert pair.near.up
    async with one_end() as wire:
        began = trio.current_time()
        await wire.ended.wait()
        assert "nothing was heard from it for" in wire.events.reasons[0]
        assert IDLE_PING_S < trio.current_time() - began < 2 * IDLE_PING_S


async def receive_exactly(stream: trio.SocketStream, n_bytes: int) -> bytes:
    received = bytearray()
    while len(received) < n_bytes:
        more = await stream.receive_some(n_bytes - len(received))
        if not more:
            raise EOFError("the connection ended early")
        received += more
    return bytes(received)


# -------------------------------------------------------------------------------------------- the first data connection


@contextlib.asynccontextmanager
async def calling(is_initiator: bool = False, suites: tuple[str, ...] = SUITES) -> AsyncIterator[tuple[Link, Any]]:
    """Yield a link that is not established, and the far end of its control connection."""
    control, far = tcp_pair()
    remote = ("127.0.0.1", 1)  # nobody listens there
    link = Link(INITIATOR, bytes(16), None, stream_of(control), sealing(is_initiator, suites), DataDoor(), remote)
    async with stream_of(far) as stream:
        with trio.fail_after(HANG_S):
            yield link, stream
        await link._control.aclose()


async def test_daemons_that_seal_differently_find_no_way_round_it() -> None:
    """And both are told so in words."""
    async with calling() as (link, far):
        offer = sealing(True, PLAIN).offer(0)
        await far.send_all(framed(offer))
        with pytest.raises(PeerError, match="it seals data with none, this daemon with aes-256-gcm"):
            await link.establish()
        buffer = ControlBuffer()
        buffer.feed(await far.receive_some(10_000))
        refused = PEERS.decode(buffer.next_frame() or b"")
        assert isinstance(refused, DataRefused)
        assert refused.conn_id == offer.conn_id


@pytest.mark.parametrize(
    ("is_initiator", "said_instead", "reason"),
    [
        (False, Goodbye("enough"), "it said Goodbye instead of offering"),
        (False, DataAccept(bytes(16), bytes(32), "none"), "it said DataAccept instead of offering"),
        (False, DataOffer(bytes(16), bytes(32), SUITES, received=1), "it says that it has received 1 records"),
        (True, Goodbye("enough"), "with Goodbye"),
        (True, "refused", "it refused the data connection: because"),
        (True, "accepted", "nobody listens|refused|failed"),
        (True, "worse", "it chose to seal with 'none'"),
        (True, None, "it closed the connection"),
        (False, None, "it closed the connection"),
    ],
)
async def test_a_link_that_cannot_be_established_says_why(is_initiator: bool, said_instead: Any, reason: str) -> None:
    async with calling(is_initiator) as (link, far):

        async def answer() -> None:
            conn_id = bytes(16)
            if is_initiator:
                buffer = ControlBuffer()
                buffer.feed(await far.receive_some(10_000))
                conn_id = PEERS.decode(buffer.next_frame() or b"").conn_id
            message = {
                "refused": DataRefused(conn_id, "because"),
                "accepted": DataAccept(conn_id, bytes(32), SUITES[0]),
                "worse": DataAccept(conn_id, bytes(32), NO_SEAL),
            }.get(said_instead, said_instead)
            await (far.send_eof() if message is None else far.send_all(framed(message)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            with pytest.raises(PeerError, match=reason):
                await link.establish()


# -------------------------------------------------------------------------------------------------- a man in the middle

Plan = Callable[[list[bytes]], Iterable[bytes]]
Change = Callable[[bytes], Iterable[bytes]]
N_RECORDS = 20
STRUCK = 4  # the record on which the attack is tried; 0 is the HELLO


class Attacker:
    """Sits on the path of data connections, and tampers with record `STRUCK` of each, and so on, `n_times` in all.

    What the plan returns is sent instead; then, if it has asked for that, the connection is ended or reset.
    """

    def __init__(self, plan: Plan, n_times: int = MAX_REPAIRS) -> None:
        self.n_struck = 0
        self.other_way: list[bytes] = []
        self.passed: list[list[bytes]] = []  # by connection
        self._plan = plan
        self.n_times = n_times

    async def relay(self, dialler: trio.SocketStream, onwards: trio.SocketStream) -> None:
        self.passed.append([])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._carry, dialler, onwards, self._strike, DATA_GREETING_BYTES)
            nursery.start_soon(self._carry, onwards, dialler, self._listen, 0)
        for stream in (dialler, onwards):
            await trio.aclose_forcefully(stream)

    async def _carry(self, source: trio.SocketStream, sink: trio.SocketStream, change: Change, n_greeting: int) -> None:
        try:
            await sink.send_all(await receive_exactly(source, n_greeting))
            while True:
                header = await receive_exactly(source, HEADER_BYTES)
                body = await receive_exactly(source, int.from_bytes(header[8:12], "little") + TAG_BYTES)
                for piece in change(header + body):
                    await sink.send_all(piece)
        except (EOFError, trio.BrokenResourceError, trio.ClosedResourceError):
            for stream in (source, sink):
                with contextlib.suppress(OSError):
                    stream.socket.shutdown(socket.SHUT_RDWR)
        except ConnectionResetError:
            for stream in (source, sink):
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                await trio.aclose_forcefully(stream)

    def _listen(self, sent: bytes) -> Iterable[bytes]:
        self.other_way.append(sent)
        return (sent,)

    def _strike(self, sent: bytes) -> Iterable[bytes]:
        passed = self.passed[-1]
        passed.append(sent)
        if len(passed) % (STRUCK + 1) or self.n_struck >= self.n_times:
            return (sent,)
        self.n_struck += 1
        return self._plan(passed)


def flipped(sent: bytes, at: int) -> bytes:
    return sent[:at] + bytes([sent[at] ^ 1]) + sent[at + 1 :]


def end(*pieces: bytes) -> Iterator[bytes]:
    """Send these, then end the connection as if it were over."""
    yield from pieces
    raise EOFError


def reset() -> Iterator[bytes]:
    """End the connection as no orderly peer does."""
    yield b""
    raise ConnectionResetError


PLANS: dict[str, Plan] = {
    "flipped body": lambda passed: (flipped(passed[-1], HEADER_BYTES + 5),),
    "flipped tag": lambda passed: (flipped(passed[-1], len(passed[-1]) - 1),),
    "flipped version": lambda passed: (flipped(passed[-1], 12),),
    "flipped round": lambda passed: (flipped(passed[-1], 20),),
    "flipped contributors": lambda passed: (flipped(passed[-1], 33),),
    "flipped kind": lambda passed: (bytes([Kind.CHUNK]) + passed[-1][1:],),
    "a kind that is none": lambda passed: (b"\x77" + passed[-1][1:],),
    "longer than any plan": lambda passed: (passed[-1][:8] + b"\xff" * 4 + passed[-1][12:],),
    "shorter than it is": lambda passed: (flipped(passed[-1], 8),),
    "replayed": lambda passed: (passed[-1], passed[-1]),
    "an older one replayed": lambda passed: (passed[1], passed[-1]),
    "dropped": lambda passed: (),
    "reordered": lambda passed: (passed[-1], passed[-2]),
    "injected": lambda passed: (record(5) + bytes(5 + TAG_BYTES), passed[-1]),
    "the greeting again": lambda passed: (passed[0], passed[-1]),
    "truncated": lambda passed: end(passed[-1][:100]),
    "truncated in its header": lambda passed: end(passed[-1][:20]),
    "cut at a border": lambda passed: end(passed[-1]),
    "cut at a border before it": lambda passed: end(),
    "reset": lambda passed: reset(),
}


QUIET = {"truncated", "truncated in its header", "cut at a border", "cut at a border before it", "reset"}


def parcels() -> list[Parcel]:
    """Return records of which each can be told from the others, long enough to overtake each other."""
    owner = object()
    return [Parcel(bytes([i]) * (1000 + i), chunk=i, owner=owner) for i in range(N_RECORDS)]


def expect_everything(events: Listener) -> None:
    """Nothing is missing, altered, repeated or out of order."""
    assert [header.chunk for header, _ in events.records] == list(range(N_RECORDS))
    assert [body for _, body in events.records] == [bytes([i]) * (1000 + i) for i in range(N_RECORDS)]
    assert {header.version for header, _ in events.records} == {0}


@pytest.mark.parametrize("name", PLANS)
async def test_whatever_is_done_to_records_all_of_them_arrive_and_nothing_else(
    name: str, jumping_clock: trio.testing.MockClock
) -> None:
    attacker = Attacker(PLANS[name])
    async with both_ends(attacker=attacker) as pair:
        for parcel in parcels():
            pair.near.ship(parcel)
            pair.far.ship(Parcel(b"the other way", owner=parcel.owner))
        await pair.far_events.until(lambda: len(pair.far_events.records) >= N_RECORDS)
        await pair.near_events.until(lambda: len(pair.near_events.records) >= N_RECORDS)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert pair.near_events.reasons == pair.far_events.reasons == []
        assert attacker.n_struck > 0
        assert pair.far.bad_records == (0 if name in QUIET else attacker.n_struck)
        assert len(attacker.passed) == attacker.n_struck + 1
    expect_everything(pair.far_events)
    assert [body for _, body in pair.near_events.records] == [b"the other way"] * N_RECORDS


class Waiting(Listener):
    """Knows of no round, and waits for news of each that a header names."""

    def __init__(self) -> None:
        super().__init__()
        self.news = trio.Event()

    def expects(self, link: Link, header: Header) -> bool:
        return False

    async def landing(self, link: Link, header: Header) -> Landing | None:
        self.note("asked", header)
        await self.news.wait()
        return Taking(self, header)


async def test_nobody_is_made_to_wait_for_a_round_that_no_member_has_named(
    jumping_clock: trio.testing.MockClock,
) -> None:
    events = Waiting()
    async with one_end(events, SUITES) as wire:
        wire.link.repairs_left = MAX_REPAIRS
        await wire.data.send_all(record(5) + bytes(5 + TAG_BYTES))
        assert isinstance(await wire.heard(), DataBad)
        assert events.all_of("asked") == []
        await wire.offer()
        await wire.data.send_all(wire.sealed(record(5), b"right"))
        await events.until(lambda: events.all_of("asked"))
        assert events.records == []
        events.news.set()
        await events.until(lambda: events.records)
        assert [body for _, body in events.records] == [b"right"]


@pytest.mark.parametrize("where", ["another connection", "the other direction"])
async def test_a_record_opens_nowhere_but_where_it_was_sealed_for(
    where: str, jumping_clock: trio.testing.MockClock
) -> None:
    def plan(passed: list[bytes]) -> Iterable[bytes]:
        if where == "the other direction":
            return (attacker.other_way[STRUCK],)
        return (attacker.passed[0][STRUCK],) if attacker.n_struck > 1 else end()

    attacker = Attacker(plan)
    async with both_ends(attacker=attacker) as pair:
        for parcel in parcels():
            pair.far.ship(parcel)
        await pair.near_events.until(lambda: len(pair.near_events.records) == N_RECORDS)
        for parcel in parcels():
            pair.near.ship(parcel)
        await pair.far_events.until(lambda: len(pair.far_events.records) == N_RECORDS)
        assert attacker.n_struck > 1
        assert pair.far.bad_records == attacker.n_struck - (where == "another connection")
    expect_everything(pair.far_events)
    expect_everything(pair.near_events)


async def test_whoever_cuts_again_and_again_ends_the_link_and_is_blamed_in_its_place(
    jumping_clock: trio.testing.MockClock,
) -> None:
    attacker = Attacker(PLANS["flipped body"], n_times=1000)
    async with both_ends(attacker=attacker) as pair:
        began = trio.current_time()
        for parcel in [Parcel(bytes(100), owner=pair) for _ in range(100)]:
            pair.near.ship(parcel)
        reasons = await pair.until_both_ended()
        assert attacker.n_struck == MAX_REPAIRS + 1
        assert trio.current_time() - began == pytest.approx(sum(BACK_OFF_S), abs=0.01)
    assert len(pair.far_events.records) == (MAX_REPAIRS + 1) * (STRUCK - 1)
    assert any("failed 4 times, at last because its record 4 does not open" in reason for reason in reasons)


async def test_a_new_round_brings_new_patience(jumping_clock: trio.testing.MockClock) -> None:
    attacker = Attacker(PLANS["reset"], n_times=0)
    async with both_ends(attacker=attacker) as pair:
        for n in range(1, 4):
            pair.near.repairs_left = pair.far.repairs_left = MAX_REPAIRS
            attacker.n_times += MAX_REPAIRS
            for _ in range(N_RECORDS):
                pair.near.ship(Parcel(bytes(100), owner=pair))
            await pair.far_events.until(lambda n=n: len(pair.far_events.records) == n * N_RECORDS)
        assert attacker.n_struck == 3 * MAX_REPAIRS
        assert pair.near.up
        assert pair.far.up


@pytest.mark.parametrize("suites", [SUITES, PLAIN])
async def test_what_is_dropped_before_a_loss_does_not_come_back_and_nothing_else_shifts(
    suites: tuple[str, ...], jumping_clock: trio.testing.MockClock
) -> None:
    """The receiver counts records; whoever forgets some of them must go on from the same count."""
    mine, other = object(), object()
    async with one_end(suites=suites) as wire:
        parcels = [Parcel(b"%d" % i, chunk=i, owner=mine if i % 2 else other) for i in range(6)]
        for parcel in parcels:
            wire.link.ship(parcel)
        assert [(await wire.opened())[1] for _ in range(2)] == [b"0", b"1"]
        await trio.testing.wait_all_tasks_blocked()
        wire.link.drop_shipments(mine)  # two of these have been sent, and are lost now
        await wire.data.aclose()
        answer = await wire.offer(received=2)
        assert answer.received == 0
        assert [(await wire.opened())[1] for _ in range(2)] == [b"2", b"4"]
        await wire.data.aclose()
        await wire.offer(received=3)
        wire.link.ship(Parcel(b"6", owner=other))
        assert [(await wire.opened())[1] for _ in range(2)] == [b"4", b"6"]
        assert wire.link.up


async def test_both_ends_say_what_they_have(jumping_clock: trio.testing.MockClock) -> None:
    async with one_end(suites=SUITES) as wire:
        for n in range(1, 4):
            await wire.data.send_all(wire.sealed(record(5), b"whole") + wire.sealed(record(5), b"parts")[:-1])
            await trio.testing.wait_all_tasks_blocked()
            assert (await wire.offer()).received == n
            assert len(wire.events.records) == n


@pytest.mark.parametrize("received", [1, 3, 1 << 40])
async def test_a_count_that_cannot_be_is_refused(received: int) -> None:
    async with one_end() as wire:
        with trio.fail_after(HANG_S):
            wire.link.ship(Parcel(b"a"))
            wire.link.ship(Parcel(b"b"))
            for _ in range(2):
                await wire.opened()
            await wire.offer(received=2)
            await wire.control.send_all(framed(wire.sealing.offer(received)))
            refused = await wire.heard()
            assert isinstance(refused, DataRefused)
            assert f"it has received {received} records: 2 to 2 are possible" in refused.reason


# ------------------------------------------------------------------------------------------ what opens, and what counts


async def test_a_record_outside_the_plan_costs_the_connection_before_its_body_is_read() -> None:
    """And before any room is made for it. Whoever is on the path may have written that header: the link goes on."""

    class Strict(Listener):
        def expects(self, link: Link, header: Header) -> bool:
            return True

        async def landing(self, link: Link, header: Header) -> Landing | None:
            self.note("header", header)
            raise PeerError("that is not in the plan")

    async with one_end(Strict(), SUITES) as wire:
        with trio.fail_after(HANG_S):
            await wire.data.send_all(record(MAX_RECORD_BYTES))  # the body never comes
            assert await wire.heard() == DataBad(wire.keys.conn_id, 1)
            assert wire.link._channel is None or wire.link._channel._rx_stage is None
            assert (wire.link.up, wire.link.bad_records) == (True, 1)
            with pytest.raises(trio.BrokenResourceError, match="reset"):
                await wire.data.receive_some(1)


async def test_bytes_that_nobody_has_vouched_for_keep_no_peer_alive(jumping_clock: trio.testing.MockClock) -> None:
    """Whoever injects bytes must not make a dead peer look busy, to its link or to its round."""
    async with one_end(suites=SUITES) as wire:
        wire.link.patience_s, wire.link.busy = 3.0, 1
        await wire.data.send_all(record(MAX_RECORD_BYTES))
        began = trio.current_time()
        with contextlib.suppress(trio.BrokenResourceError):
            while not wire.ended.is_set():
                await wire.data.send_all(bytes(1000))
                await trio.sleep(0.25)
        assert "nothing was heard from it" in await expect_end(wire)
        assert trio.current_time() - began <= 2 * 3.0 + 2.0
    assert all(kind not in ("progress", "record") for kind, _ in wire.events.log)


async def test_the_peer_is_told_which_record_did_not_open_and_the_connection_is_reset() -> None:
    async with one_end(suites=SUITES) as wire:
        with trio.fail_after(HANG_S):
            await wire.data.send_all(wire.sealed(record(3), b"abc") + flipped(wire.sealed(record(3), b"def"), 41))
            assert await wire.heard() == DataBad(wire.keys.conn_id, 2)
            with pytest.raises(trio.BrokenResourceError, match="reset"):
                await wire.data.receive_some(1)
        assert [body for _, body in wire.events.records] == [b"abc"]
        assert [header.length for header in wire.events.all_of("abandoned")] == [3]
        assert wire.link.bad_records == 1


async def test_a_complaint_about_another_connection_changes_nothing() -> None:
    async with one_end(suites=SUITES) as wire:
        with trio.fail_after(HANG_S):
            await wire.control.send_all(framed(DataBad(b"x" * 16, 1)) + framed(Ping(answer=True)))
            assert await wire.heard() == Ping()
            await wire.data.send_all(wire.sealed(record(3), b"abc"))
            await wire.events.until(lambda: wire.events.records)
        assert wire.link.repairs_left == MAX_REPAIRS


@pytest.mark.parametrize("is_initiator", [True, False])
async def test_each_side_says_what_is_its_to_say(is_initiator: bool) -> None:
    async with both_ends() as pair:
        link, events = (pair.far, pair.near_events) if is_initiator else (pair.near, pair.far_events)
        link.send(DataOffer(bytes(16), bytes(32), SUITES) if is_initiator else DataAccept(bytes(16), bytes(32), "none"))
        await events.until(lambda: events.reasons)
    assert "which is for the other side to say" in events.reasons[0]


async def test_an_answer_to_an_offer_that_was_given_up_is_ignored(jumping_clock: trio.testing.MockClock) -> None:
    """The peer is too slow once, and in time with the next offer."""
    attacker = Attacker(PLANS["reset"], n_times=1)
    async with both_ends(attacker=attacker) as pair:
        accept, slow = pair.far._sealing.accept, []

        def too_slow(offer: DataOffer, received: int) -> Any:
            if not slow:
                slow.append(DataRefused(offer.conn_id, "too late"))
                pair.far._turn.cancel()
            elif len(slow) == 1:
                slow.append(None)
                pair.far.send(slow[0])
            return accept(offer, received)

        pair.far._sealing.accept = too_slow  # type: ignore[method-assign]
        for parcel in parcels():
            pair.near.ship(parcel)
        await pair.far_events.until(lambda: len(pair.far_events.records) == N_RECORDS)
    expect_everything(pair.far_events)


async def test_a_peer_that_opens_no_other_data_connection_is_given_up(jumping_clock: trio.testing.MockClock) -> None:
    async with one_end() as wire:
        began = trio.current_time()
        await wire.data.aclose()
        while not wire.ended.is_set():  # it answers everything else
            with trio.move_on_after(1.0):
                await wire.control.send_all(framed(Ping()))
                await wire.ended.wait()
        assert trio.current_time() - began <= MAX_REPAIRS * REPAIR_S + 1.0
    assert wire.events.reasons == [
        f"its data connection failed 4 times, at last because no other one was open within {REPAIR_S:g} s"
    ]


# ------------------------------------------------------------------------------------------------------------------ age


@pytest.mark.parametrize("worn", ["blocks", "time"])
async def test_worn_keys_are_replaced_for_nothing_when_the_link_is_idle(
    worn: str, jumping_clock: trio.testing.MockClock
) -> None:
    async with both_ends() as pair:
        channel = pair.near._channel
        assert channel is not None
        if worn == "time":
            for link in (pair.near, pair.far):
                link._channel._began -= 13 * 3600
        else:
            wear_out(pair, 0.6)
        await trio.sleep(IDLE_PING_S)
        assert pair.near._channel is not None
        assert pair.near._channel is not channel
        assert pair.near._channel.wear < 0.3
        assert (pair.near.repairs_left, pair.far.repairs_left) == (MAX_REPAIRS, MAX_REPAIRS)
        pair.near.ship(Parcel(b"still here"))
        await pair.far_events.until(lambda: pair.far_events.records)


async def test_a_busy_link_waits_with_it_until_it_must(jumping_clock: trio.testing.MockClock) -> None:
    async with both_ends() as pair:
        channel = pair.near._channel
        pair.near.busy = 1
        wear_out(pair, 0.6)
        await trio.sleep(IDLE_PING_S)
        assert pair.near._channel is channel
        wear_out(pair, 0.95)
        await trio.sleep(IDLE_PING_S)
        assert pair.near._channel is not channel
        assert pair.near.up


async def test_keys_that_may_seal_nothing_more_are_replaced_in_any_case(jumping_clock: trio.testing.MockClock) -> None:
    async with both_ends() as pair:
        wear_out(pair, 1.0)
        for parcel in parcels():
            pair.near.ship(parcel)
        await pair.far_events.until(lambda: len(pair.far_events.records) == N_RECORDS)
    expect_everything(pair.far_events)


def wear_out(pair: Pair, wear: float) -> None:
    """Let the keys from the dialler to the other end be as if they had sealed so much."""
    assert pair.near._channel is not None
    assert pair.far._channel is not None
    for half in (pair.near._channel._keys.tx, pair.far._channel._keys.rx):
        assert half is not None
        half._n_blocks = int(wear * MAX_BLOCKS)


async def test_a_control_connection_that_is_too_old_is_closed_with_a_word_once_it_is_idle(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with one_end() as wire:
        wire.link.busy = 1
        wire.link._born -= MAX_CONTROL_AGE_S
        await trio.sleep(wire.link.patience_s / 2)
        assert wire.link.up
        wire.link.busy = 0
        while not isinstance(message := await wire.heard(), Goodbye):
            assert message == Ping(answer=True)
        assert "a day old" in message.reason
        assert await expect_end(wire) == "the connection was a day old"
