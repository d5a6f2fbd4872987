"""Dialling, accepting, and at most one link per peer, between real `Peers` on the loopback.

Strategy: whoever behaves is a `Peers` of its own, in the same trio run; whoever does not is a few bytes on a socket.
Tests that wait for a timeout run on a clock that jumps once all sockets are quiet.
"""

import contextlib
import random
import socket
from collections.abc import Callable

import pytest
import trio
import trio.testing
from daemon_helpers import Node, Parcel, Recorder, checkpoints, node_id, start_node, swarm

from mpd.daemon.peers import HANDSHAKE_S, MAX_HANDSHAKES, Unreachable
from mpd.ids import Endpoint, PeerId, show_peer
from mpd.messages import PEER_VERSION, PEERS, DataAccept, DataOffer, Goodbye, Hello, Ping
from mpd.wire import ControlBuffer, control_frame, control_greeting, data_greeting


@pytest.fixture
def jumping_clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0.005)


async def open_to(node: Node) -> trio.SocketStream:
    return await trio.open_tcp_stream(node.endpoint.host, node.endpoint.port)


async def throw(stream: trio.SocketStream, garbage: bytes) -> None:
    """Send `garbage` and nothing more; the other side may have had enough before its end."""
    with contextlib.suppress(OSError, trio.BrokenResourceError):
        await stream.send_all(garbage)
        stream.socket.shutdown(socket.SHUT_WR)


async def is_closed(stream: trio.SocketStream) -> bool:
    """Read until the other side has closed; whatever it said is of no interest."""
    try:
        while await stream.receive_some(4096):
            pass
    except trio.BrokenResourceError:
        pass
    return True


async def expect_usable(here: Node, there: Node) -> None:
    """Both have exactly one link to each other, and messages and records pass both ways."""
    for one, other in ((here, there), (there, here)):
        link = one.peers.get(other.own)
        assert link is not None
        assert link.up
        assert [link.peer for link in one.peers.links()] == [other.own]
        n_messages, n_records = len(other.events.messages), len(other.events.records)
        link.send(Goodbye("hello"))
        link.ship(Parcel(b"hello"))
        await other.events.until(lambda other=other, n=n_messages: len(other.events.messages) > n)
        await other.events.until(lambda other=other, n=n_records: len(other.events.records) > n)


def hello(peer: PeerId, **fields: object) -> Hello:
    known = {"version": PEER_VERSION, "instance": bytes(16), "host": "127.0.0.1", "port": 0, **fields}
    return Hello(peer=peer, **known)


class Caller:
    """A peer made by hand: it says what the test tells it to."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = ControlBuffer()

    async def say(self, message: object) -> None:
        await self.stream.send_all(control_frame(PEERS.encode(message)))

    async def hear(self) -> object:
        """Return the next message, None if the connection ends first."""
        while (body := self._buffer.next_frame()) is None:
            received = await self.stream.receive_some(4096)
            if not received:
                return None
            self._buffer.feed(received)
        return PEERS.decode(body)


# --------------------------------------------------------------------------------------------------------- it works


async def test_a_call_makes_one_link_on_both_sides() -> None:
    async with swarm(2) as (a, b):
        link = await a.peers.link(b.own, b.endpoint)
        await b.events.until(lambda: b.peers.links())
        await expect_usable(a, b)
        assert await a.peers.link(b.own, b.endpoint) is link
        assert link.endpoint == b.endpoint
        assert b.peers.get(a.own).endpoint == a.endpoint
        assert [status.address for status in a.peers.snapshot()] == [str(b.endpoint)]
        assert (a.events.log[0], b.events.log[0]) == (("up", b.own), ("up", a.own))


async def test_being_called_shows_that_this_daemon_can_be_reached() -> None:
    async with swarm(2) as (a, b):
        await a.peers.link(b.own, b.endpoint)
        await b.events.until(lambda: b.peers.links())
        assert b.peers.is_reachable
        assert not a.peers.is_reachable


async def test_many_tasks_that_want_the_same_link_get_the_same_link() -> None:
    links = []
    async with swarm(2) as (a, b):

        async def call() -> None:
            links.append(await a.peers.link(b.own, b.endpoint))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(call)
        await b.events.until(lambda: b.peers.links())
        await expect_usable(a, b)
        assert len(links) == 10
        assert set(links) == {a.peers.get(b.own)}


async def test_whoever_cannot_be_called_is_waited_for() -> None:
    async with swarm(2, outbound_only=[1]) as (a, b):
        links = []

        async def wait() -> None:
            links.append(await a.peers.link(b.own, None))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await b.peers.link(a.own, a.endpoint)
        assert links[0].endpoint is None
        assert a.peers.snapshot()[0].address == "outbound only"
        await expect_usable(a, b)


@pytest.mark.parametrize("seed", range(20))
async def test_calls_that_cross_end_in_one_link(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is slow, and whoever calls first: one link on each side, the same, and nobody ever lost one."""
    rng = random.Random(seed)
    read = trio.SocketStream.receive_some

    async def read_late(self: trio.SocketStream, max_bytes: int | None = None) -> bytes:
        await checkpoints(rng.randrange(12))
        return await read(self, max_bytes)

    async def call(here: Node, there: Node) -> None:
        await checkpoints(rng.randrange(40))
        assert (await here.peers.link(there.own, there.endpoint)).peer == there.own

    async with swarm(2) as (a, b):
        with monkeypatch.context() as patch:
            patch.setattr(trio.SocketStream, "receive_some", read_late)
            async with trio.open_nursery() as nursery:
                for here, there in [(a, b), (b, a)] * 2:
                    nursery.start_soon(call, here, there)
            await a.events.until(lambda: a.events.log)
            await b.events.until(lambda: b.events.log)
        await trio.testing.wait_all_tasks_blocked()
        await expect_usable(a, b)
        assert (a.events.reasons, b.events.reasons) == ([], [])


async def test_everybody_calls_everybody_at_once() -> None:
    async with swarm(6) as nodes:
        async with trio.open_nursery() as nursery:
            for here in nodes:
                for there in nodes:
                    if here is not there:
                        nursery.start_soon(here.peers.link, there.own, there.endpoint)
        await trio.testing.wait_all_tasks_blocked()
        for here in nodes:
            others = {node.own for node in nodes if node is not here}
            assert {link.peer for link in here.peers.links() if link.up} == others
            assert here.events.reasons == []


async def test_a_call_that_got_nowhere_gives_way_to_the_call_of_the_peer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The smaller id's call would have precedence, but its address for the other leads nowhere and never answers."""
    connect = trio.open_tcp_stream

    async def connect_or_hang(host: str, port: int) -> trio.SocketStream:
        if host == "192.0.2.1":
            await trio.sleep_forever()
        return await connect(host, port)

    monkeypatch.setattr(trio, "open_tcp_stream", connect_or_hang)
    async with swarm(2) as (a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.peers.link, b.own, Endpoint("192.0.2.1", 9))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(b.peers.link, a.own, a.endpoint)
        await expect_usable(a, b)


async def test_a_daemon_that_restarts_replaces_its_link() -> None:
    async with swarm(1) as (a,), trio.open_nursery() as first_life:
        first = await start_node(first_life, 1, Recorder())
        old = await a.peers.link(first.own, first.endpoint)
        async with trio.open_nursery() as second_life:
            second = await start_node(second_life, 1, Recorder(), instance=1)
            await second.peers.link(a.own, a.endpoint)
            await a.events.until(lambda: a.events.reasons)
            assert a.events.reasons == ["it called again"]
            assert not old.up
            assert a.peers.get(second.own).instance != old.instance
            await expect_usable(a, second)
            second_life.cancel_scope.cancel()
        await first.events.until(lambda: first.events.reasons)
        first_life.cancel_scope.cancel()


async def test_a_link_that_ended_is_made_anew() -> None:
    async with swarm(2) as (a, b):
        first = await a.peers.link(b.own, b.endpoint)
        first.close("enough")
        second = await a.peers.link(b.own, b.endpoint)  # at once: the old one has hardly noticed
        assert second is not first
        assert second.up
        await b.events.until(lambda: len([kind for kind, _ in b.events.log if kind == "up"]) == 2)
        await trio.testing.wait_all_tasks_blocked()
        await expect_usable(a, b)


async def test_everybody_is_told_before_a_daemon_leaves() -> None:
    async with swarm(3) as (a, b, c):
        for node in (b, c):
            await a.peers.link(node.own, node.endpoint)
        await a.peers.say_goodbye("told to leave", 1.0)
        for node in (b, c):
            await node.events.until(lambda node=node: node.events.messages)
            assert node.events.messages == [Goodbye("told to leave")]


# ------------------------------------------------------------------------------------------- it does not, and says why


async def expect_unreachable(node: Node, peer: PeerId, endpoint: Endpoint | None) -> str:
    with pytest.raises(Unreachable) as caught:
        await node.peers.link(peer, endpoint)
    assert node.peers.links() == []
    return str(caught.value)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def test_a_refused_call_says_so() -> None:
    async with swarm(1) as (a,):
        endpoint = Endpoint("127.0.0.1", closed_port())
        reason = await expect_unreachable(a, node_id(1), endpoint)
        assert reason == f"cannot be reached at {endpoint}: Connection refused"


async def test_a_host_that_cannot_be_looked_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async with swarm(1) as (a,):
        monkeypatch.setattr(trio.socket, "getaddrinfo", fail)
        reason = await expect_unreachable(a, node_id(1), Endpoint("no-such-host.invalid", 9))
        assert reason == "cannot be reached at no-such-host.invalid:9: Name or service not known"


async def test_somebody_else_at_the_address_is_named() -> None:
    async with swarm(2) as (a, b):
        reason = await expect_unreachable(a, node_id(7), b.endpoint)
        assert f"the daemon there is {show_peer(b.own)}, expected {show_peer(node_id(7))}" in reason
        await trio.testing.wait_all_tasks_blocked()
        assert b.peers.links() == []


async def test_our_own_key_at_another_address_is_a_mistake_of_the_operator() -> None:
    async with swarm(2) as (a, b):
        assert "must not share a state directory" in await expect_unreachable(a, a.own, b.endpoint)


async def test_nobody_calls_while_the_daemon_is_not_running() -> None:
    async with swarm(1) as (a,):
        async with trio.open_nursery() as life:
            b = await start_node(life, 1, Recorder())
            life.cancel_scope.cancel()
        assert "not running" in await expect_unreachable(b, a.own, a.endpoint)


async def test_a_peer_that_never_answers_costs_one_timeout(jumping_clock: trio.testing.MockClock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = Endpoint("127.0.0.1", silent.getsockname()[1])
        async with swarm(1) as (a,):
            assert f"did not answer at {endpoint}" in await expect_unreachable(a, node_id(1), endpoint)
            assert trio.current_time() == pytest.approx(HANDSHAKE_S)


async def test_a_peer_that_cannot_be_called_and_does_not_call_costs_one_timeout(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with swarm(1) as (a,):
        assert "accepts no connections and did not call" in await expect_unreachable(a, node_id(1), None)
        assert trio.current_time() == pytest.approx(HANDSHAKE_S)


async def test_all_who_wait_for_one_call_hear_of_its_failure_at_once() -> None:
    async with swarm(1) as (a,):
        with trio.fail_after(HANDSHAKE_S / 2):
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(expect_unreachable, a, node_id(1), Endpoint("127.0.0.1", closed_port()))


async def test_a_caller_that_gives_up_leaves_the_way_free_for_the_next() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with swarm(2) as (a, b):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.peers.link, b.own, Endpoint("127.0.0.1", silent.getsockname()[1]))
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            assert (await a.peers.link(b.own, b.endpoint)).up


Answer = Callable[[Caller], object]


async def answer_http(caller: Caller) -> None:
    await caller.stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100))


async def answer_nothing(caller: Caller) -> None:
    await caller.stream.receive_some(1)


async def answer_other_version(caller: Caller) -> None:
    await caller.say(hello(node_id(1), version=PEER_VERSION + 1))


async def answer_beside_the_point(caller: Caller) -> None:
    await caller.say(Ping())


async def answer_other_handle(caller: Caller) -> None:
    await caller.say(hello(node_id(1)))
    await caller.say(DataAccept(bytes(16)))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (answer_http, "at most 4096 are allowed"),
        (answer_nothing, ""),
        (answer_other_version, f"speaks version {PEER_VERSION + 1}, this one {PEER_VERSION}: upgrade one"),
        (answer_beside_the_point, "answered a call with Ping"),
        (answer_other_handle, "refused the data connection"),
    ],
)
async def test_whatever_answers_a_call_can_only_fail_it(answer: Answer, reason: str) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await answer(Caller(stream))
        stream.socket.shutdown(socket.SHUT_WR)
        await is_closed(stream)

    async with swarm(1) as (a,), trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        endpoint = Endpoint("127.0.0.1", listeners[0].socket.getsockname()[1])
        failure = await expect_unreachable(a, node_id(1), endpoint)
        assert failure.startswith(f"cannot be reached at {endpoint}: ")
        assert reason in failure
        assert len(failure) > len(f"cannot be reached at {endpoint}: ")
        assert a.events.log == []
        nursery.cancel_scope.cancel()


# ------------------------------------------------------------------------------------------------- strangers that call


GARBAGE = [
    b"",
    b"\0",
    b"mpd",
    b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
    bytes.fromhex("16030100f5010000f10303") + bytes(200),
    b"\xff" * 5000,
    control_greeting() + bytes(4),
    control_greeting() + b"\xff\xff\xff\xff",
    control_greeting() + control_frame(b"junk"),
    control_greeting() + control_frame(PEERS.encode(Ping())),
    control_greeting() + control_frame(PEERS.encode(hello(node_id(0)))),
    control_greeting() + control_frame(PEERS.encode(hello(node_id(9)))) + control_frame(PEERS.encode(Ping())),
    b"mpdC\x07\0\0\0" + control_frame(PEERS.encode(hello(node_id(9)))),
    data_greeting(bytes(16)),
    data_greeting(bytes(16)) + bytes(5000),
]


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_is_closed_and_has_no_effect(garbage: bytes) -> None:
    async with swarm(2) as (a, b):
        stream = await open_to(a)
        async with stream:
            await throw(stream, garbage)
            assert await is_closed(stream)
        assert a.peers.links() == []
        assert a.events.log == []
        await b.peers.link(a.own, a.endpoint)  # it still serves


async def test_a_scan_of_ports_uses_nothing_up() -> None:
    """Connections that have come and gone must not count towards those that have not said what they are."""
    async with swarm(2) as (a, b):
        for i in range(MAX_HANDSHAKES + 10):
            stream = await open_to(a)
            async with stream:
                await throw(stream, GARBAGE[i % len(GARBAGE)])
                await is_closed(stream)
        await b.peers.link(a.own, a.endpoint)
        await a.events.until(lambda: a.events.log)
        assert a.events.log == [("up", b.own)]


async def test_connections_that_say_nothing_are_bounded_and_closed_in_time(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with swarm(2) as (a, b):
        silent = [await open_to(a) for _ in range(MAX_HANDSHAKES)]
        began = trio.current_time()
        async with await open_to(a) as one_too_many:
            assert await is_closed(one_too_many)
        assert trio.current_time() - began < HANDSHAKE_S / 2
        for stream in silent:
            assert await is_closed(stream)
            await stream.aclose()
        assert trio.current_time() - began == pytest.approx(HANDSHAKE_S)
        await b.peers.link(a.own, a.endpoint)


async def test_a_caller_of_another_version_is_told_ours_and_closed() -> None:
    async with swarm(1) as (a,), await open_to(a) as stream:
        caller = Caller(stream)
        await stream.send_all(control_greeting())
        await caller.say(hello(node_id(1), version=PEER_VERSION + 1))
        answer = await caller.hear()
        assert isinstance(answer, Hello)
        assert answer.version == PEER_VERSION
        assert await caller.hear() is None
        assert a.peers.links() == []


async def test_a_caller_that_stops_half_way_is_closed_in_time(jumping_clock: trio.testing.MockClock) -> None:
    async with swarm(2) as (a, b), await open_to(a) as stream:
        caller = Caller(stream)
        await stream.send_all(control_greeting())
        await caller.say(hello(b.own))
        assert isinstance(await caller.hear(), Hello)
        await caller.say(DataOffer(b"c" * 16))
        assert await caller.hear() == DataAccept(b"c" * 16)
        assert await caller.hear() is None
        assert trio.current_time() == pytest.approx(HANDSHAKE_S)
        async with await open_to(a) as late:  # the handle has gone with the call
            await late.send_all(data_greeting(b"c" * 16))
            assert await is_closed(late)
        assert a.events.log == []


async def test_a_call_under_way_is_preferred_to_dialling_and_dialling_follows_if_it_fails() -> None:
    """Otherwise both calls could be made, each side could drop the other's, and no link would be left."""
    async with swarm(2) as (a, b):
        stream = await open_to(a)
        caller = Caller(stream)
        await stream.send_all(control_greeting())
        await caller.say(hello(b.own))
        assert isinstance(await caller.hear(), Hello)
        links = []

        async def call() -> None:
            links.append(await a.peers.link(b.own, b.endpoint))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            assert b.events.log == []
            await stream.aclose()
        assert links[0].up
        await b.events.until(lambda: b.peers.links())
        await expect_usable(a, b)


async def test_a_data_connection_goes_to_the_call_that_offered_its_handle_and_only_once() -> None:
    async with swarm(1) as (a,), await open_to(a) as stream:
        caller, conn_id = Caller(stream), b"c" * 16
        await stream.send_all(control_greeting())
        await caller.say(hello(node_id(1)))
        assert isinstance(await caller.hear(), Hello)
        await caller.say(DataOffer(conn_id))
        assert await caller.hear() == DataAccept(conn_id)
        async with await open_to(a) as stray, await open_to(a) as data, await open_to(a) as again:
            await stray.send_all(data_greeting(b"x" * 16))
            assert await is_closed(stray)
            await data.send_all(data_greeting(conn_id))
            assert await caller.hear() == DataAccept(conn_id)
            await again.send_all(data_greeting(conn_id))
            assert await is_closed(again)
            assert [link.peer for link in a.peers.links()] == [node_id(1)]
            assert a.events.reasons == []


async def test_can_dial_says_whether_something_listens() -> None:
    async with swarm(2) as (a, b):
        assert await a.peers.can_dial(b.endpoint)
        assert not await a.peers.can_dial(Endpoint("127.0.0.1", closed_port()))
        await trio.testing.wait_all_tasks_blocked()
        assert b.events.log == []
