"""The door of a daemon under pressure: many sockets, slow ones, plain ones, and what each of them costs.

Strategy: one real `Peers` behind a real listener. Those who press against it are raw sockets; time is moved by hand, so
nothing expires unless a test says so. Only CPU time is measured for real, generously.
"""

import contextlib
import errno
import os
import socket
import time

import pytest
import trio
import trio.testing
from daemon_helpers import Node, Recorder, start_node, swarm
from identities import lab

from mpd.daemon.budgets import raise_descriptor_limit
from mpd.daemon.door import is_loopback
from mpd.daemon.handshake import HANDSHAKE_S, Talk
from mpd.daemon.tls import wrap_client
from mpd.errors import PeerError
from mpd.messages import Hello

N_IDLE = 500
MAX_HANDSHAKES = 64
MAX_PER_ADDRESS = 8
CLIENT_HELLO = bytes.fromhex("1603010200010001fc0303")  # how TLS begins


@pytest.fixture
def still_clock() -> trio.testing.MockClock:
    """A clock that stands still until it is moved."""
    return trio.testing.MockClock()


async def open_to(node: Node, from_host: str | None = None) -> trio.SocketStream:
    return await trio.open_tcp_stream(node.endpoint.host, node.endpoint.port, local_address=from_host)


async def is_closed(stream: trio.SocketStream) -> bool:
    """Wait until the other side has closed; it must not have said anything."""
    with contextlib.suppress(trio.BrokenResourceError):
        assert await stream.receive_some(1) == b""
    return True


def is_open(stream: trio.SocketStream) -> bool:
    sock = stream.socket
    with socket.socket(fileno=os.dup(sock.fileno())) as copy:
        copy.setblocking(False)
        try:
            return copy.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False


def n_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def until_used(node: Node, n: int) -> None:
    """Wait until `n` connections stand at the door of `node`."""
    while node.budgets.handshakes.used != n:
        await trio.testing.wait_all_tasks_blocked(0.001)


async def test_idle_sockets_keep_nobody_out_and_go_in_time(still_clock: trio.testing.MockClock) -> None:
    raise_descriptor_limit()
    async with swarm(2) as (a, b), contextlib.AsyncExitStack() as ours:
        await trio.testing.wait_all_tasks_blocked()
        base = n_descriptors()
        idle = [await ours.enter_async_context(await open_to(a)) for _ in range(N_IDLE)]
        await until_used(a, MAX_HANDSHAKES)
        await trio.testing.wait_all_tasks_blocked(0.005)
        assert n_descriptors() == base + N_IDLE + MAX_HANDSHAKES  # those that gave way are closed
        began = time.perf_counter()
        await b.peers.link(a.own, a.endpoint)
        assert time.perf_counter() - began < 1
        await a.events.until(lambda: a.events.log)
        still_clock.jump(HANDSHAKE_S)
        for stream in idle:
            assert await is_closed(stream)
        await until_used(a, 0)
        await ours.aclose()
        assert n_descriptors() == base + 4  # one link: control and data, both ends
        assert a.budgets.handshakes.peak == MAX_HANDSHAKES


async def test_only_so_many_that_have_begun_are_waited_for(still_clock: trio.testing.MockClock) -> None:
    async with swarm(1) as (a,), contextlib.AsyncExitStack() as ours:
        begun = [await ours.enter_async_context(await open_to(a)) for _ in range(MAX_HANDSHAKES)]
        for stream in begun:
            await stream.send_all(CLIENT_HELLO)
        await until_used(a, MAX_HANDSHAKES)
        await trio.testing.wait_all_tasks_blocked(0.005)
        assert await is_closed(await ours.enter_async_context(await open_to(a)))
        assert all(is_open(stream) for stream in begun)
        still_clock.jump(HANDSHAKE_S)
        for stream in begun:
            assert await is_closed(stream)
        await until_used(a, 0)


async def test_the_ninth_from_one_address_is_refused_and_other_addresses_are_not() -> None:
    async with swarm(1) as (a,), contextlib.AsyncExitStack() as ours:
        a.peers.door.is_exempt = lambda host: False
        first = [await ours.enter_async_context(await open_to(a, "127.0.0.2")) for _ in range(MAX_PER_ADDRESS)]
        await until_used(a, MAX_PER_ADDRESS)
        assert await is_closed(await ours.enter_async_context(await open_to(a, "127.0.0.2")))
        assert all(is_open(stream) for stream in first)
        assert (a.budgets.handshakes_per_address.used, a.budgets.handshakes_per_address.refused) == (MAX_PER_ADDRESS, 1)
        elsewhere = await ours.enter_async_context(await open_to(a, "127.0.0.3"))
        connection, _ = await wrap_client(elsewhere, lab().card(1), a.own)
        assert isinstance(await Talk(connection).receive(), Hello)
        await first[0].aclose()
        await until_used(a, MAX_PER_ADDRESS)
        again = await ours.enter_async_context(await open_to(a, "127.0.0.2"))
        await wrap_client(again, lab().card(2), a.own)
    assert a.budgets.handshakes_per_address.used == 0


async def test_who_finds_no_place_leaves_nothing_behind(still_clock: trio.testing.MockClock) -> None:
    async with swarm(1) as (a,), await open_to(a) as stream:
        await stream.send_all(CLIENT_HELLO)
        await until_used(a, 1)
        await trio.testing.wait_all_tasks_blocked(0.005)
        a.budgets.handshakes.limit = 1
        a.peers.door.is_exempt = lambda host: False
        async with await open_to(a) as late:
            assert await is_closed(late)
        assert (a.budgets.handshakes.used, a.budgets.handshakes_per_address.used) == (1, 0)


async def test_without_descriptors_to_spare_nobody_comes_in(
    still_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarm(1) as (a,):
        monkeypatch.setattr(a.budgets.descriptors, "has_room", lambda: False)
        async with await open_to(a) as late:
            assert await is_closed(late)


async def test_descriptors_that_cannot_be_counted_cost_no_place(
    still_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> bool:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with swarm(1) as (a,):
        a.peers.door.is_exempt = lambda host: False
        monkeypatch.setattr(a.budgets.descriptors, "has_room", fail)
        async with await open_to(a) as late:
            assert await is_closed(late)
        assert (a.budgets.handshakes.used, a.budgets.handshakes_per_address.used) == (0, 0)


@pytest.mark.parametrize("greeting", [CLIENT_HELLO + bytes(500), b"mpdD\x01\0\0\0" + bytes(16), b"mpdA\x01\0\0\0"])
async def test_who_drips_is_dropped(greeting: bytes, still_clock: trio.testing.MockClock) -> None:
    """A byte every now and then is no progress: the time for all of it is one."""
    async with swarm(1) as (a,), await open_to(a) as stream:
        for i in range(len(greeting)):
            await stream.send_all(greeting[i : i + 1])
            await trio.testing.wait_all_tasks_blocked(0.001)
            assert a.budgets.handshakes.used == 1
            still_clock.jump(HANDSHAKE_S / 6)
            await trio.testing.wait_all_tasks_blocked(0.001)
            if not is_open(stream):
                break
        assert i == 5
        assert a.budgets.handshakes.used == 0
        assert a.events.log == []


async def test_who_stops_after_tls_is_dropped(still_clock: trio.testing.MockClock) -> None:
    async with swarm(1) as (a,), await open_to(a) as stream:
        connection, _ = await wrap_client(stream, lab().card(1), a.own)
        talk = Talk(connection)
        await talk.receive()
        await connection.send_all(b"\x30")  # the first byte of a frame
        still_clock.jump(HANDSHAKE_S)
        with pytest.raises(PeerError, match="closed the connection"):
            await talk.receive()
        assert (a.budgets.handshakes.used, a.events.log) == (0, [])


async def test_a_plain_attempt_costs_less_than_a_millisecond_of_processor_time() -> None:
    """The attempts are made in another thread, so what this thread spends is what the daemon spends."""
    attempts = 200

    def attack(port: int) -> None:
        for _ in range(attempts):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                with contextlib.suppress(ConnectionResetError):
                    assert sock.recv(1) == b""

    async with swarm(1) as (a,):
        began = time.thread_time()
        await trio.to_thread.run_sync(attack, a.endpoint.port)
        cost_ms = (time.thread_time() - began) / attempts * 1000
        assert cost_ms < 1
        assert a.events.log == []


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("192.0.2.1", False),
        ("::ffff:192.0.2.1", False),
        ("2001:db8::1", False),
        ("fe80::1%eth0", False),
    ],
)
def test_this_machine_is_known_in_every_notation(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


async def test_addresses_of_one_customer_share_a_limit() -> None:
    """Whoever has one IPv6 address has 2^64 of them."""
    async with swarm(0), trio.open_nursery() as nursery:
        a = await start_node(nursery, 0, Recorder())
        with contextlib.ExitStack() as places:
            door = a.peers.door
            taken = [places.enter_context(door._place(f"2001:db8::{i}")) for i in range(MAX_PER_ADDRESS + 1)]
            assert [visitor is not None for visitor in taken] == [True] * MAX_PER_ADDRESS + [False]
            assert places.enter_context(door._place("2001:db8:0:1::1")) is not None
            assert places.enter_context(door._place("::ffff:192.0.2.1")) is not None
        nursery.cancel_scope.cancel()
