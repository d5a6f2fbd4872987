"""A link over real loopback sockets: order, memory, and every way in which it can end.

Strategy: where both ends behave there are two `Link`s; where one does not, the test holds the far sockets itself. Tests
about time run on a clock that jumps once nothing has happened for a moment, so nobody waits for real.
"""

import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from daemon_helpers import HANG_S, Parcel, Recorder, node_id, record, stream_of, tcp_pair

from mpd.daemon.links import (
    DRAIN_S,
    IDLE_PING_S,
    MAX_QUEUED_CONTROL_BYTES,
    MAX_RECORD_BYTES,
    Landing,
    Link,
)
from mpd.errors import PeerError
from mpd.messages import PEERS, Goodbye, Ping, Scoped
from mpd.wire import HEADER_BYTES, ControlBuffer, Header, Kind, control_frame

ROUND = b"r" * 16
MIB = 1 << 20


def said(text: str) -> Goodbye:
    return Goodbye(text)


def framed(message: object) -> bytes:
    return control_frame(PEERS.encode(message))


def make_link(control: socket.socket, data: socket.socket) -> Link:
    return Link(node_id(1), bytes(16), None, stream_of(control), data)


@dataclass
class Wire:
    """A running link and the far ends of its two connections, held by the test."""

    link: Link
    events: Recorder
    control: trio.SocketStream
    data: trio.SocketStream
    ended: trio.Event = field(default_factory=trio.Event)

    async def close(self) -> None:
        await self.control.aclose()
        await self.data.aclose()

    async def heard(self) -> object:
        """Return the next message that the link sends."""
        buffer = ControlBuffer()
        while (body := buffer.next_frame()) is None:
            buffer.feed(await self.control.receive_some(4) or pytest.fail("the link closed its control connection"))
        return PEERS.decode(body)


@contextlib.asynccontextmanager
async def one_end(events: Recorder | None = None) -> AsyncIterator[Wire]:
    """Run one link; the test plays the peer."""
    (control, far_control), (data, far_data) = tcp_pair(), tcp_pair()
    link = make_link(control, data)
    wire = Wire(link, events or Recorder(), stream_of(far_control), stream_of(far_data))

    async def run() -> None:
        await link.run(wire.events)
        wire.ended.set()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await wire.events.until(lambda: wire.events.log)
            yield wire
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await wire.close()


@contextlib.asynccontextmanager
async def both_ends() -> AsyncIterator[tuple[Link, Recorder, Link, Recorder]]:
    """Run both ends of a link."""
    (control, far_control), (data, far_data) = tcp_pair(), tcp_pair()
    near, far = make_link(control, data), make_link(far_control, far_data)
    near_events, far_events = Recorder(), Recorder()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.run, near_events)
        nursery.start_soon(far.run, far_events)
        yield near, near_events, far, far_events
        nursery.cancel_scope.cancel()


@pytest.fixture
def jumping_clock() -> trio.testing.MockClock:
    """Time passes only while all sockets are quiet: what one task writes to the loopback, another can read at once."""
    return trio.testing.MockClock(autojump_threshold=0.005)


# ------------------------------------------------------------------------------------------------ what arrives, and how


async def test_messages_arrive_in_order_both_ways() -> None:
    async with both_ends() as (near, near_events, far, far_events):
        with trio.fail_after(HANG_S):
            for i in range(500):
                near.send(said(f"near {i}"))
                far.send(said(f"far {i}"))
            await near_events.until(lambda: len(near_events.messages) == 500)
            await far_events.until(lambda: len(far_events.messages) == 500)
    assert far_events.messages == [said(f"near {i}") for i in range(500)]
    assert near_events.messages == [said(f"far {i}") for i in range(500)]


async def test_a_message_as_long_as_allowed_arrives_whole() -> None:
    message = Scoped(ROUND, bytes(range(256)) * 4000)
    async with both_ends() as (near, _, _, far_events):
        with trio.fail_after(HANG_S):
            near.send(message)
            await far_events.until(lambda: far_events.messages)
    assert far_events.messages == [message]


async def test_records_of_all_sizes_arrive_in_order_both_ways() -> None:
    sizes = [1, 0, 40, 39, 41, 0, 4096, 65536, 65537, MIB, 3 * MIB + 1, 0, MAX_RECORD_BYTES, 7]
    payloads = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
    parcels = {end: [Parcel(payload, chunk=i) for i, payload in enumerate(payloads)] for end in ("near", "far")}
    async with both_ends() as (near, near_events, far, far_events):
        with trio.fail_after(HANG_S):
            for i in range(len(sizes)):
                near.ship(parcels["near"][i])
                far.ship(parcels["far"][i])
            await near_events.until(lambda: len(near_events.records) == len(sizes))
            await far_events.until(lambda: len(far_events.records) == len(sizes))
        assert near.bytes_sent == near.bytes_received == sum(sizes) + HEADER_BYTES * len(sizes)
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


@pytest.mark.parametrize("first_length", [0, 1, 40, 100])
async def test_the_stream_may_be_cut_anywhere(first_length: int) -> None:
    """In particular just after a body, and after any part of the header that follows it."""
    first, second, third = bytes(range(first_length)), b"", b"third"
    stream = record(len(first), 1) + first + record(0, 2, Kind.BYE) + second + record(len(third), 3) + third
    async with one_end() as wire:
        with trio.fail_after(HANG_S):
            for n, cut in enumerate(range(0, len(stream) + 1, 3), start=1):
                await wire.data.send_all(stream[:cut])
                await trio.testing.wait_all_tasks_blocked()
                await wire.data.send_all(stream[cut:])
                await wire.events.until(lambda n=n: len(wire.events.records) == 3 * n)
                assert [body for _, body in wire.events.records[-3:]] == [first, second, third], cut


async def test_a_payload_goes_on_into_the_view_that_its_landing_was_given_meanwhile() -> None:
    first, second = memoryview(bytearray(MIB)), memoryview(bytearray(MIB))

    class Moving:
        view = first

        def progress(self) -> None:
            self.view = second

        def complete(self) -> None:
            events.note("record", None)

    class Events(Recorder):
        async def landing(self, link: Link, header: Header) -> Landing | None:
            return Moving()

    events = Events()
    async with one_end(events) as wire:
        with trio.fail_after(HANG_S):
            await wire.data.send_all(record(MIB) + b"\1")
            await trio.testing.wait_all_tasks_blocked()
            await wire.data.send_all(b"\2" * (MIB - 1))
            await events.until(lambda: events.records)
    assert bytes(first[:2]) == b"\1\0"
    assert bytes(second) == b"\0" + b"\2" * (MIB - 1)


async def test_a_record_that_nobody_wants_is_read_and_forgotten() -> None:
    class Choosy(Recorder):
        async def landing(self, link: Link, header: Header) -> Landing | None:
            return None if header.chunk == 0 else await super().landing(link, header)

    events = Choosy()
    async with one_end(events) as wire:
        with trio.fail_after(HANG_S):
            await wire.data.send_all(record(100_000, chunk=0) + bytes(100_000) + record(1, chunk=1) + b"x")
            await events.until(lambda: events.records)
    assert [(header.chunk, body) for header, body in events.records] == [(1, b"x")]


# ----------------------------------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize("chunk", [None, 7])
async def test_a_detached_record_keeps_its_bytes_while_the_memory_changes(chunk: int | None) -> None:
    memory, owner = bytearray(b"\1" * (4 * MIB)), object()
    async with one_end() as wire:
        with trio.fail_after(HANG_S):
            wire.link.ship(Parcel(memoryview(memory), chunk=7, owner=owner))
            await trio.testing.wait_all_tasks_blocked()  # the peer does not read: most of it is still here
            wire.link.detach(owner, chunk)
            memory[:] = b"\2" * len(memory)
            received = await receive_exactly(wire.data, HEADER_BYTES + len(memory))
    assert received[HEADER_BYTES:] == b"\1" * len(memory)


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
    assert [received[i * (HEADER_BYTES + MIB) + HEADER_BYTES] for i in range(3)] == [0, 2, 4]


async def test_a_record_that_is_not_wanted_any_more_when_its_turn_comes_is_left_out() -> None:
    class Cancelled(Parcel):
        def load(self) -> None:
            return None

    async with both_ends() as (near, _, _, far_events):
        with trio.fail_after(HANG_S):
            withdrawn = Cancelled(b"never", chunk=1)
            for parcel in (Parcel(b"a"), withdrawn, Parcel(b"b")):
                near.ship(parcel)
            await far_events.until(lambda: len(far_events.records) == 2)
    assert [body for _, body in far_events.records] == [b"a", b"b"]
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


# -------------------------------------------------------------------------------------------------- misbehaving peers


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
    class Strict(Recorder):
        def on_message(self, link: Link, message: object) -> None:
            raise PeerError("that is no message for us")

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


async def test_a_data_connection_that_ends_inside_a_record_delivers_nothing_of_it(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with one_end() as wire:
        await wire.data.send_all(record(3, 1) + b"abc" + record(1000, 2) + bytes(999))
        await wire.data.aclose()
        await expect_end(wire)
    assert [header.chunk for header, _ in wire.events.records] == [1]


# -------------------------------------------------------------------------------------------------------------- ends


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
            await wire.events.until(lambda: wire.events.messages)
        assert await expect_end(wire) == "its data connection ended"
    assert wire.events.messages == [said("I am leaving")]


async def test_close_ends_both_sides_at_once() -> None:
    async with both_ends() as (near, near_events, _, far_events):
        with trio.fail_after(HANG_S):
            await far_events.until(lambda: far_events.log)
            near.close("enough")
            near.close("this is not the reason")
            await near_events.until(lambda: near_events.reasons)
            await far_events.until(lambda: far_events.reasons)
    assert near_events.reasons == ["enough"]
    assert near.reason == "enough"
    assert len(far_events.reasons) == 1


async def test_a_link_that_is_closed_before_it_runs_ends_at_once(jumping_clock: trio.testing.MockClock) -> None:
    (control, far_control), (data, far_data) = tcp_pair(), tcp_pair()
    with contextlib.closing(far_control), contextlib.closing(far_data):
        link, events = make_link(control, data), Recorder()
        link.close("it called again")
        await link.run(events)
        assert trio.current_time() == 0
        assert far_data.recv(1) == b""
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
    (control, far_control), (data, far_data) = tcp_pair(), tcp_pair()
    with contextlib.closing(far_control), contextlib.closing(far_data), trio.fail_after(HANG_S):
        events = Recorder()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(make_link(control, data).run, events)
            await events.until(lambda: events.log)
            nursery.cancel_scope.cancel()
        assert (far_control.recv(1), far_data.recv(1)) == (b"", b"")
    assert [kind for kind, _ in events.log] == ["up", "down"]


# -------------------------------------------------------------------------------------------------------------- time


async def test_a_question_for_a_sign_of_life_is_answered() -> None:
    async with one_end() as wire:
        with trio.fail_after(HANG_S):
            await wire.control.send_all(framed(Ping(answer=True)))
            assert await wire.heard() == Ping(answer=False)
    assert wire.events.messages == []


async def test_a_peer_that_falls_silent_while_it_is_needed_is_given_up(jumping_clock: trio.testing.MockClock) -> None:
    async with one_end() as wire:
        wire.link.patience_s = 3.0
        wire.link.busy = 1
        began = trio.current_time()
        assert "nothing was heard from it for" in await expect_end(wire)
        assert 3.0 <= trio.current_time() - began <= 2 * 3.0 + 2.0


async def test_a_peer_that_is_needed_and_alive_is_kept_however_little_it_has_to_say(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with both_ends() as (near, near_events, _, _):
        near.patience_s = 1.0
        near.busy = 1
        await trio.sleep(20)
        assert near.up
        assert near_events.reasons == []


@pytest.mark.parametrize("quiet_s", [0.5, 1.9, 3.9, 5.9, 19.9, 33.3])
async def test_the_silence_of_an_idle_link_is_not_held_against_the_peer(
    quiet_s: float, jumping_clock: trio.testing.MockClock
) -> None:
    """A round may begin on it at any moment, just before the peer would be found silent."""
    async with both_ends() as (near, near_events, _, _):
        await trio.sleep(quiet_s)
        near.patience_s = 1.0
        near.busy = 1
        await trio.sleep(4)
        assert near.up
        assert near_events.reasons == []


async def test_an_idle_link_lives_on_signs_of_life_and_ends_without_them(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with both_ends() as (near, _, _, _):
        await trio.sleep(3 * IDLE_PING_S)
        assert near.up
    async with one_end() as wire:
        began = trio.current_time()
        await wire.ended.wait()
        assert "nothing was heard from it for" in wire.events.reasons[0]
        assert IDLE_PING_S < trio.current_time() - began < 2 * IDLE_PING_S


async def receive_exactly(stream: trio.SocketStream, n_bytes: int) -> bytes:
    received = bytearray()
    while len(received) < n_bytes:
        more = await stream.receive_some(n_bytes - len(received))
        assert more, "the connection ended early"
        received += more
    return bytes(received)
