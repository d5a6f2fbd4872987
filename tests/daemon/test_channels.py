"""How two ends come to a data connection, and what somebody in between or outside can make of it: nothing.

Strategy: both ends of the agreement are real and in one process; connections are real ones over the loopback, and each
incoming one is handed to the door, as the daemon's listener does it. Strangers speak to the door byte by byte.
"""

import contextlib
import logging
import random
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing
from daemon_helpers import HANG_S, node_id, stream_of, tcp_pair

from mpd.daemon import channels
from mpd.daemon.budgets import ByteGate
from mpd.daemon.channels import (
    HELLO_S,
    MAX_BAD_HELLOS,
    MAX_KEY_AGE_S,
    MAX_PENDING,
    OFFER_S,
    DataChannel,
    DataDoor,
    DataKeys,
    Sealing,
    Stages,
    dial_data,
    own_suites,
    suites_for,
    tune,
)
from mpd.errors import PeerError
from mpd.ids import RoundId
from mpd.messages import DataAccept, DataOffer
from mpd.seal import AES_GCM, CHACHA, NO_SEAL, SUITES, TAG_BYTES
from mpd.wire import DATA_GREETING_BYTES, HEADER_BYTES, Header, Kind, data_greeting, pack_header

INITIATOR, ACCEPTOR = node_id(1), node_id(2)
PLAIN = (NO_SEAL,)
HELLO_BYTES = HEADER_BYTES + TAG_BYTES


def ends(
    near: tuple[str, ...] = SUITES, far: tuple[str, ...] = SUITES, swarm: bytes = bytes(20)
) -> tuple[Sealing, Sealing]:
    """Return the sealing of the initiator and of the acceptor of one control connection."""
    return (
        Sealing(swarm, INITIATOR, ACCEPTOR, True, near, random.Random(1).randbytes),
        Sealing(swarm, INITIATOR, ACCEPTOR, False, far, random.Random(2).randbytes),
    )


def agree(near: Sealing, far: Sealing) -> tuple[DataKeys, DataKeys]:
    """Return the keys that both ends have after an offer and its answer."""
    offer = near.offer(0)
    answer, far_keys = far.accept(offer, 0)
    return near.agreed(offer, answer), far_keys


def stages(limit: int = 1 << 20) -> Stages:
    return Stages(ByteGate(limit))


def fit(one: DataKeys, other: DataKeys) -> bool:
    """True if a record that one end seals opens at the other."""
    return other.is_hello(one.hello()) and one.is_hello(other.hello())


# ------------------------------------------------------------------------------------------------------------- agreeing


@pytest.mark.parametrize(
    ("near", "far", "chosen"),
    [
        (SUITES, SUITES, AES_GCM),
        ((CHACHA, AES_GCM), SUITES, CHACHA),
        (SUITES, (CHACHA, AES_GCM), AES_GCM),
        (SUITES, (CHACHA,), CHACHA),
        ((AES_GCM,), SUITES, AES_GCM),
        (PLAIN, PLAIN, NO_SEAL),
    ],
)
def test_both_ends_choose_alike(near: tuple[str, ...], far: tuple[str, ...], chosen: str) -> None:
    initiator, acceptor = ends(near, far)
    offer = initiator.offer(7)
    answer, keys = acceptor.accept(offer, 9)
    assert (offer.received, answer.received, answer.suite) == (7, 9, chosen)
    assert fit(initiator.agreed(offer, answer), keys)
    assert (keys.tx is None) == (chosen == NO_SEAL) == (not initiator.is_sealed)


@pytest.mark.parametrize(
    ("offered", "own"),
    [
        (PLAIN, SUITES),  # the peer wants it in the clear
        (SUITES, PLAIN),  # and here the other way round
        ((AES_GCM,), (CHACHA,)),
        ((NO_SEAL, AES_GCM), PLAIN),  # only whoever lists nothing else was told so
        ((AES_GCM, NO_SEAL), PLAIN),
        ((NO_SEAL, AES_GCM), (CHACHA,)),
        (("rot13",), SUITES),
    ],
)
def test_data_in_the_clear_is_nothing_that_a_peer_can_ask_for(offered: tuple[str, ...], own: tuple[str, ...]) -> None:
    """Only the command line of both machines decides it."""
    with pytest.raises(PeerError, match="start both with the same options"):
        ends(far=own)[1].accept(DataOffer(bytes(16), bytes(32), offered), 0)


@pytest.mark.parametrize("suite", [NO_SEAL, "rot13", CHACHA])
def test_a_peer_cannot_choose_what_was_not_offered(suite: str) -> None:
    initiator, _ = ends(near=(AES_GCM,))
    offer = initiator.offer(0)
    with pytest.raises(PeerError, match="aes-256-gcm were offered"):
        initiator.agreed(offer, DataAccept(offer.conn_id, bytes(32), suite))


@pytest.mark.parametrize("suites", [(), (NO_SEAL, AES_GCM), (AES_GCM, NO_SEAL), ("rot13",)])
def test_this_machine_seals_everything_or_nothing(suites: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="only 'none' expected"):
        ends(near=suites)


def test_an_answer_belongs_to_its_offer() -> None:
    initiator, acceptor = ends()
    offer = initiator.offer(0)
    answer, _ = acceptor.accept(offer, 0)
    with pytest.raises(PeerError, match="was not offered"):
        initiator.agreed(offer, DataAccept(bytes(16), answer.random, answer.suite))


def test_every_attempt_has_keys_of_its_own() -> None:
    """Also on a machine that was cloned, or whose random numbers repeat: the count of offers differs."""
    constant = [
        Sealing(bytes(20), INITIATOR, ACCEPTOR, is_initiator, SUITES, lambda n: bytes(n))
        for is_initiator in (True, False)
    ]
    hellos = [keys.hello() for _ in range(3) for keys in agree(*constant)]
    assert len(set(hellos)) == 6


def test_whoever_misses_an_offer_does_not_fall_out_of_step() -> None:
    """An offer that is refused, or never answered, counts at both ends."""
    initiator, acceptor = ends()
    acceptor.accept(initiator.offer(0), 0)  # nobody dials
    refused = initiator.offer(0)
    with pytest.raises(PeerError):
        acceptor.accept(DataOffer(refused.conn_id, refused.random, ("rot13",)), 0)
    assert fit(*agree(initiator, acceptor))


def test_keys_are_bound_to_whose_control_connection_they_came_over() -> None:
    """Who the two ends are is known before anything is offered, and goes into the keys."""
    initiator, _ = ends()
    offer = initiator.offer(0)
    for swarm, one, other in ((b"x" * 20, 1, 2), (bytes(20), 3, 2), (bytes(20), 1, 3), (bytes(20), 2, 1)):
        acceptor = Sealing(swarm, node_id(one), node_id(other), False, SUITES, random.Random(2).randbytes)
        answer, keys = acceptor.accept(offer, 0)
        assert not keys.is_hello(initiator.agreed(offer, answer).hello())


def test_directions_are_those_of_the_control_connection_so_nothing_can_be_reflected() -> None:
    """Whoever dials TCP, and even if both ends do, a record never opens where it was sealed."""
    near, far = agree(*ends())
    hello = near.hello()
    assert not near.is_hello(hello)
    assert far.is_hello(hello)


@pytest.mark.parametrize(
    ("cpuinfo", "best"),
    [
        ("processor\t: 0\nflags\t\t: fpu aes avx2\n", AES_GCM),
        ("processor\t: 0\nflags\t\t: fpu avx2\n", CHACHA),
        ("Features\t: fp asimd aes pmull\n", AES_GCM),
        ("Features\t: fp asimd\n", CHACHA),
        ("model name\t: aes flags\n", AES_GCM),
        ("", AES_GCM),
    ],
)
def test_chacha_is_preferred_only_where_the_processor_cannot_do_aes(cpuinfo: str, best: str) -> None:
    assert suites_for(cpuinfo)[0] == best
    assert set(suites_for(cpuinfo)) == set(SUITES)
    assert set(own_suites()) == set(SUITES)


def test_offers_and_keys_are_never_logged_and_keys_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        keys, _ = agree(*ends())
    assert caplog.text == ""
    assert repr(keys).startswith("<mpd.daemon.channels.DataKeys object at")


# ------------------------------------------------------------------------------------------------------------- the door


@contextlib.asynccontextmanager
async def listening(door: DataDoor) -> AsyncIterator[int]:
    """Hand all that connects to `door`; yield the port."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def handle(stream: trio.SocketStream) -> None:
        await door.serve(stream, await stream.receive_some(4))

    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, handle, listeners)
            yield listeners[0].socket.getsockname()[1]
            nursery.cancel_scope.cancel()


@pytest.fixture
def door() -> Iterator[DataDoor]:
    door = DataDoor()
    yield door
    assert not door._pending


async def knock(port: int, said: bytes) -> bytes:
    """Say something to whoever listens there; return all that comes back until the connection is closed."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(said)
        back = b""
        with contextlib.suppress(trio.BrokenResourceError):
            while more := await stream.receive_some(1000):
                back += more
        return back


@pytest.mark.parametrize("suites", [SUITES, (CHACHA,), PLAIN])
async def test_both_ends_prove_their_keys_and_then_talk(door: DataDoor, suites: tuple[str, ...]) -> None:
    near_keys, far_keys = agree(*ends(suites, suites))
    async with listening(door) as port:
        with door.expect(far_keys) as pending:
            near = await dial_data("127.0.0.1", port, near_keys, stages())
            far = await pending.channel()
        assert near.conn_id == far.conn_id
        assert near.is_sealed == far.is_sealed == (suites != PLAIN)
        for sender, receiver in ((near, far), (far, near)):
            await sender.send(header_of(5), memoryview(b"hello"))
            assert (await receiver.receive_header()).length == 5
            assert bytes(await receiver.receive_payload(5, None)) == b"hello"
            assert (
                sender.bytes_sent == receiver.bytes_received == HEADER_BYTES + 5 + (TAG_BYTES if near.is_sealed else 0)
            )
        near.close()
        far.close()


def header_of(n_bytes: int) -> bytes:
    return b"\1" + bytes(7) + n_bytes.to_bytes(4, "little") + bytes(28)


async def test_an_unknown_handle_gets_no_answer_and_costs_no_crypto(
    door: DataDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handle is a name, known to anybody on the path; it opens nothing."""
    _, far_keys = agree(*ends())
    monkeypatch.setattr(far_keys, "is_hello", lambda record: pytest.fail("crypto for a stranger"))
    async with listening(door) as port:
        with door.expect(far_keys):
            assert await knock(port, data_greeting(b"x" * 16)) == b""
            assert await knock(port, data_greeting(b"x" * 16) + bytes(HELLO_BYTES)) == b""


@pytest.mark.parametrize("greeting", [b"mpdD\2" + bytes(19), b"mpdD\1\0\0\1" + bytes(16), b"mpdX" + bytes(20)])
async def test_a_greeting_that_is_none_gets_no_answer(door: DataDoor, greeting: bytes) -> None:
    async with listening(door) as port:
        assert await knock(port, greeting) == b""


async def test_the_handle_alone_proves_nothing_and_does_not_burn_the_offer(door: DataDoor) -> None:
    """An observer who has seen the handle pass is quicker than the dialler, and wrong in every way it can be."""
    near_keys, far_keys = agree(*ends())
    other_keys, _ = agree(*ends(swarm=b"x" * 20))
    greeting, answer = data_greeting(near_keys.conn_id), far_keys.hello
    far_keys.hello = lambda: pytest.fail("an answer for a stranger")  # type: ignore[method-assign]
    async with listening(door) as port:
        with door.expect(far_keys) as pending:
            for hello in (bytes(HELLO_BYTES), other_keys.hello(), b"\1" + bytes(HELLO_BYTES - 1), b""):
                async with trio.open_nursery() as nursery:
                    if not hello:  # nothing at all: holds its place, and nobody else's
                        held = await trio.open_tcp_stream("127.0.0.1", port)
                        await held.send_all(greeting)
                    else:
                        nursery.start_soon(check_silence, port, greeting + hello)
            assert pending.n_bad == 3
            far_keys.hello = answer  # type: ignore[method-assign]
            near = await dial_data("127.0.0.1", port, near_keys, stages())
            far = await pending.channel()
        near.close()
        far.close()
        await held.aclose()


async def check_silence(port: int, said: bytes) -> None:
    assert await knock(port, said) == b""


async def test_an_offer_serves_once(door: DataDoor) -> None:
    near_keys, far_keys = agree(*ends())
    hello = near_keys.hello()
    async with listening(door) as port:
        with door.expect(far_keys) as pending:
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(data_greeting(near_keys.conn_id) + hello)
                far = await pending.channel()
                assert await knock(port, data_greeting(near_keys.conn_id) + hello) == b""
        far.close()


async def test_an_offer_that_is_attacked_too_often_is_withdrawn(door: DataDoor) -> None:
    near_keys, far_keys = agree(*ends())
    async with listening(door) as port:
        with door.expect(far_keys) as pending:
            for _ in range(MAX_BAD_HELLOS):
                assert await knock(port, data_greeting(near_keys.conn_id) + bytes(HELLO_BYTES)) == b""
            with pytest.raises(PeerError, match="did not open"):
                await pending.channel()
            with pytest.raises((PeerError, OSError)):
                await dial_data("127.0.0.1", port, near_keys, stages())


async def test_an_offer_does_not_wait_for_ever(door: DataDoor, autojump_clock: trio.testing.MockClock) -> None:
    _, far_keys = agree(*ends())
    with door.expect(far_keys) as pending, pytest.raises(PeerError, match="did not open the data connection"):
        await pending.channel()
    assert trio.current_time() == OFFER_S


@pytest.mark.parametrize("said", [b"m", b"mpdD\1", "greeting", "most"])
async def test_whoever_says_too_little_is_sent_away(
    door: DataDoor, autojump_clock: trio.testing.MockClock, said: bytes | str
) -> None:
    _, far_keys = agree(*ends())
    greeting = data_greeting(far_keys.conn_id)
    near, far = tcp_pair()
    with contextlib.closing(near), door.expect(far_keys):
        near.send({"greeting": greeting, "most": greeting + bytes(HELLO_BYTES - 1)}.get(str(said), said))  # type: ignore[arg-type]
        async with stream_of(far) as stream:
            await door.serve(stream, b"")
    assert trio.current_time() == HELLO_S


def test_only_so_many_offers_are_open_at_a_time(door: DataDoor) -> None:
    initiator, acceptor = ends()
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_PENDING):
            stack.enter_context(door.expect(agree(initiator, acceptor)[1]))
        with pytest.raises(PeerError, match="too many"), door.expect(agree(initiator, acceptor)[1]):
            pass


def test_a_handle_stands_for_one_offer(door: DataDoor) -> None:
    _, keys = agree(*ends())
    with door.expect(keys), pytest.raises(PeerError, match="too many"), door.expect(keys):
        pass


async def test_a_connection_that_nobody_takes_is_closed(door: DataDoor) -> None:
    near_keys, far_keys = agree(*ends())
    async with listening(door) as port:
        with door.expect(far_keys):
            near = await dial_data("127.0.0.1", port, near_keys, stages())
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionResetError):
            await near.receive_header()
        near.close()


async def test_a_dialler_that_is_answered_by_somebody_else_says_nothing(door: DataDoor) -> None:
    near_keys, _ = agree(*ends())
    heard: list[bytes] = []

    async def impostor(stream: trio.SocketStream) -> None:
        heard.append(await stream.receive_some(1000))
        await stream.send_all(heard[0][DATA_GREETING_BYTES:])  # reflects the HELLO
        heard.append(await stream.receive_some(1000))

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, impostor, listeners)
            with pytest.raises(PeerError, match="does not hold its keys"):
                await dial_data("127.0.0.1", listeners[0].socket.getsockname()[1], near_keys, stages())
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert [len(said) for said in heard] == [DATA_GREETING_BYTES + HELLO_BYTES, 0]


async def test_a_failed_attempt_leaves_no_keys_behind(door: DataDoor) -> None:
    near_keys, _ = agree(*ends())
    async with listening(door) as port:
        with pytest.raises(ConnectionResetError):
            await dial_data("127.0.0.1", port, near_keys, stages())  # nobody expects it
    with pytest.raises(Exception, match="these keys are closed"):
        near_keys.hello()


# ------------------------------------------------------------------------------------------------------------------ use


def channel_pair(suites: tuple[str, ...] = SUITES) -> tuple[DataChannel, DataChannel]:
    """Return both ends of a data connection."""
    near_keys, far_keys = agree(*ends(suites, suites))
    near, far = tcp_pair()
    return DataChannel(near, near_keys, stages()), DataChannel(far, far_keys, stages())


@pytest.mark.parametrize("suites", [SUITES, PLAIN])
async def test_a_new_connection_is_not_worn_and_an_old_one_is(
    suites: tuple[str, ...], autojump_clock: trio.testing.MockClock
) -> None:
    near, far = channel_pair(suites)
    assert near.wear == 0
    await trio.sleep(MAX_KEY_AGE_S / 4)
    assert near.wear == (0.25 if near.is_sealed else 0.0)
    near.close()
    far.close()


async def test_a_hard_close_resets_the_connection() -> None:
    near, far = channel_pair()
    near.close(hard=True)
    with pytest.raises(ConnectionResetError) as reset:
        await far.receive_header()
    assert reset.value.errno
    far.close()


async def test_a_closed_connection_has_no_keys() -> None:
    near, far = channel_pair()
    near.close()
    with pytest.raises(Exception, match="these keys are closed"):
        await near.send(header_of(1), memoryview(b"x"))
    far.close()


async def test_the_stage_is_wiped_when_a_record_does_not_open() -> None:
    near, far = channel_pair()
    await near.send(header_of(4096), memoryview(b"\5" * 4096))
    relayed = bytearray(far._sock.recv(10_000))
    relayed[-1] ^= 1
    one, other = tcp_pair()
    one.send(relayed)
    far._sock.close()
    far._sock = other
    await far.receive_header()
    with pytest.raises(PeerError, match="does not open"):
        await far.receive_payload(4096, None)
    assert bytes(far._rx_stage[:4096]) == bytes(4096)
    for thing in (near, far, one):
        thing.close()


async def test_a_slow_link_does_not_wake_the_daemon_for_every_packet(monkeypatch: pytest.MonkeyPatch) -> None:
    n_bytes, packet_bytes = 1 << 20, 4096
    near, far = channel_pair(PLAIN)
    waits: list[int] = []
    wait_readable = trio.lowlevel.wait_readable

    async def counted(sock: socket.socket) -> None:
        waits.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT))
        await wait_readable(sock)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", counted)

    async def drip() -> None:
        record = header_of(n_bytes) + random.Random(1).randbytes(n_bytes)
        packets = memoryview(record + record + header_of(0))
        for begin in range(0, len(packets), packet_bytes):
            near._sock.sendall(packets[begin : begin + packet_bytes])
            await trio.testing.wait_all_tasks_blocked()

    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            for slowest in (1, 64 * 1024):  # of the first record nobody knows yet how fast it comes
                waits.clear()
                assert (await far.receive_header()).length == n_bytes
                assert len(await far.receive_payload(n_bytes, None)) == n_bytes
                far.release()
                assert max(waits[1:]) == slowest
            assert (await far.receive_header()).length == 0  # however little comes last, it is not waited for in vain
    assert len(waits) <= 20 < n_bytes // packet_bytes
    near.close()
    far.close()


def test_connections_on_one_host_do_not_pace_themselves() -> None:
    near, far = tcp_pair()
    with contextlib.closing(near), contextlib.closing(far):
        tune(near)
        assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
        congestion = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
        assert congestion == b"reno"


def test_what_the_wire_calls_a_greeting_is_what_the_door_reads() -> None:
    assert len(agree(*ends())[0].hello()) == HELLO_BYTES
    assert bytes(HEADER_BYTES) == channels._HELLO


# --------------------------------------------------------------------------------------------------------------- memory


async def test_records_wait_for_memory_instead_of_taking_more(autojump_clock: trio.testing.MockClock) -> None:
    gate = ByteGate(2 * (8192 + TAG_BYTES))
    shared = Stages(gate)
    first, second = await shared.take(5000), await shared.take(8192)
    assert (len(first), len(second), gate.used) == (5000, 8192, gate.limit)
    arrived: list[memoryview] = []

    async def wait() -> None:
        arrived.append(await shared.take(100))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert arrived == []
        shared.give(first)
        await trio.testing.wait_all_tasks_blocked()
        assert [len(view) for view in arrived] == [100]
    shared.give(second)
    shared.give(arrived[0])
    assert gate.used == 0
    again = await shared.take(6000)
    assert any(again.obj is view.obj for view in (first, second)), "memory that was touched before is used again"


async def test_a_record_gives_its_memory_back(autojump_clock: trio.testing.MockClock) -> None:
    near_keys, far_keys = agree(*ends())
    (near, far), gate = tcp_pair(), ByteGate(1 << 20)
    sender, receiver = DataChannel(near, near_keys, stages()), DataChannel(far, far_keys, Stages(gate))
    header = pack_header(Header(Kind.PIECE, 0, 0, 0, 5, 0, RoundId(bytes(16)), 0))
    for channel in (near, far):
        channel.setblocking(False)
    await sender.send(header, memoryview(b"hello"))
    await receiver.receive_header()
    assert bytes(await receiver.receive_payload(5, None)) == b"hello"
    assert gate.used > 0
    receiver.release()
    receiver.release()
    assert gate.used == 0
    sender.close()
    receiver.close()
