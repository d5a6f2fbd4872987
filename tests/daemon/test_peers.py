"""Dialling, accepting, and at most one link per peer, between real `Peers` on the loopback.

Strategy: whoever behaves is a `Peers` of its own, in the same trio run; whoever does not is a few bytes on a socket, or
a member that says what the test tells it to. Certificates are real, and every wrong one is shown at a real door. Tests
that wait for a timeout run on a clock that jumps once all sockets are quiet.
"""

import contextlib
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
import trio
import trio.testing
from daemon_helpers import Node, Parcel, Recorder, checkpoints, node_id, start_node, swarm
from identities import DAY_S, Card, TestSwarm, der, keys, lab, open_card

from mpd.daemon import peers as peers_module
from mpd.daemon.budgets import ByteGate
from mpd.daemon.channels import DataKeys, Sealing, Stages, dial_data, own_suites
from mpd.daemon.handshake import HANDSHAKE_S, Talk
from mpd.daemon.links import Link
from mpd.daemon.peers import Unreachable
from mpd.daemon.tls import ALPN, wrap_client, wrap_server
from mpd.errors import PeerError
from mpd.identity import new_root
from mpd.ids import Endpoint, PeerId, show_peer
from mpd.messages import PEER_VERSION, PEERS, DataAccept, DataOffer, Goodbye, Hello, Ping
from mpd.wire import ControlBuffer, control_frame, data_greeting

MAX_HANDSHAKES = 64


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


def hello(**fields: object) -> Hello:
    known = {"version": PEER_VERSION, "instance": bytes(16), "host": "127.0.0.1", "port": 0, **fields}
    return Hello(**known)


class Caller:
    """A peer made by hand: it says what the test tells it to."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._buffer = ControlBuffer()

    async def say(self, message: object) -> None:
        await self.stream.send_all(control_frame(PEERS.encode(message)))

    async def hear(self) -> object:
        """Return the next message, None if the connection ends first."""
        while (body := self._buffer.next_frame()) is None:
            try:
                received = await self.stream.receive_some(4096)
            except trio.BrokenResourceError:
                return None
            if not received:
                return None
            self._buffer.feed(received)
        return PEERS.decode(body)


@contextlib.asynccontextmanager
async def calling(node: Node, card: Card) -> AsyncIterator[Caller]:
    """Call `node` as the holder of `card`: the way is open, and `node` has said Hello."""
    async with await open_to(node) as stream:
        connection, _ = await wrap_client(stream, card, node.own)
        caller = Caller(connection)
        assert isinstance(await caller.hear(), Hello)
        yield caller


async def agree_on_keys(caller: Caller, node: Node, card: Card) -> DataKeys:
    """Say Hello and offer a data connection; return the keys that `node` has agreed to."""
    await caller.say(hello())
    sealing = Sealing(card.swarm_id, card.own, node.own, True, own_suites(), random.Random(0).randbytes)
    offer = sealing.offer(0)
    await caller.say(offer)
    accepted = await caller.hear()
    assert isinstance(accepted, DataAccept)
    return sealing.agreed(offer, accepted)


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


@pytest.mark.parametrize(("here", "there"), [(1, 9), (9, 1)])
async def test_of_two_calls_that_cross_the_one_of_the_smaller_id_goes_through(here: int, there: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with swarm(0), trio.open_nursery() as nursery:
            a = await start_node(nursery, here, Recorder())
            nursery.start_soon(a.peers.link, node_id(there), Endpoint("127.0.0.1", server.getsockname()[1]))
            await trio.testing.wait_all_tasks_blocked(0.005)
            async with await open_to(a) as stream:
                connection, _ = await wrap_client(stream, lab().card(there), a.own)
                answer = await Caller(connection).hear()
                if here < there:
                    assert isinstance(answer, Goodbye)
                else:
                    assert isinstance(answer, Hello)
            nursery.cancel_scope.cancel()


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


async def test_somebody_else_at_the_address_is_noticed() -> None:
    async with swarm(2) as (a, b):
        reason = await expect_unreachable(a, node_id(7), b.endpoint)
        assert "another daemon answers there than the one that was called" in reason
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


async def answer_nonsense(caller: Caller) -> None:
    await caller.stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100))


async def answer_nothing(caller: Caller) -> None:
    await caller.stream.aclose()


async def answer_other_version(caller: Caller) -> None:
    await caller.say(hello(version=PEER_VERSION + 1))


async def answer_older_version(caller: Caller) -> None:
    await caller.say(hello(version=PEER_VERSION - 1))


async def answer_beside_the_point(caller: Caller) -> None:
    await caller.say(Ping())


async def answer_with_a_refusal(caller: Caller) -> None:
    await caller.say(Goodbye("we do not like\x1b[31m you"))


async def answer_other_handle(caller: Caller) -> None:
    await caller.say(hello())
    await caller.say(DataAccept(bytes(16), bytes(32), own_suites()[0]))
    await caller.hear()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (answer_nonsense, "at most 4096 are allowed"),
        (answer_nothing, "closed the connection"),
        (answer_other_version, f"speaks version {PEER_VERSION + 1}, this one {PEER_VERSION}: upgrade this machine"),
        (answer_older_version, f"speaks version {PEER_VERSION - 1}, this one {PEER_VERSION}: upgrade the other"),
        (answer_beside_the_point, "answered a call with Ping"),
        (answer_with_a_refusal, "it refused this machine: we do not like?[31m you"),
        (answer_other_handle, ""),
    ],
)
async def test_whatever_answers_a_call_can_only_fail_it(answer: Answer, reason: str) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        connection, _ = await wrap_server(stream, lab().card(1))
        await answer(Caller(connection))
        with contextlib.suppress(OSError, trio.ClosedResourceError):
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
        assert a.budgets.links.used == 0
        nursery.cancel_scope.cancel()


# --------------------------------------------------------------------------------------------------- who is no member


class Bare(Card):
    """Shows no certificate."""

    def client_context(self, pinned: bool = True) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = pinned
        context.set_alpn_protocols([ALPN])
        context.load_verify_locations(cadata=der(self.root))
        return context


def showing(chain: Sequence[bytes]) -> Card:
    """Return a card that trusts the usual swarm and shows something else."""
    return Card(keys()[0], chain, lab().root)


def bare() -> Card:
    return Bare(keys()[0], (), lab().root)


def of_another_swarm() -> Card:
    return showing(TestSwarm("elsewhere").card(0).chain)


def self_signed() -> Card:
    return showing([der(new_root(keys()[0], "myself", time.time(), serial=1))])


def expired() -> Card:
    return showing(TestSwarm("lab", age_s=8 * DAY_S).card(0).chain)


def not_yet_valid() -> Card:
    return lab().card(0, now_s=time.time() + 2 * DAY_S)


def revoked() -> Card:
    return lab().card(0)


UNAUTHORISED = [
    (bare, "it talks to members of its swarm only"),
    (of_another_swarm, "get an invite for its swarm"),
    (self_signed, "it refused this machine's certificate"),
    (expired, "it refused this machine's certificate: expired"),
    (not_yet_valid, "it refused this machine's certificate: not valid yet"),
    (revoked, "it refused this machine: this peer was revoked"),
]
NAMES = [make.__name__ for make, _ in UNAUTHORISED]


@pytest.mark.parametrize(("make", "reason"), UNAUTHORISED, ids=NAMES)
async def test_whoever_is_no_member_is_told_why_and_gets_nothing(
    make: Callable[[], Card], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []
    receive = Talk.receive

    async def listen(self: Talk) -> object:
        message = await receive(self)
        heard.append(type(message))
        return message

    monkeypatch.setattr(Talk, "receive", listen)
    async with swarm(2) as (_, here), trio.open_nursery() as nursery:
        here.card.revoked.add(node_id(0))
        outsider = await start_node(nursery, 0, Recorder(), card=make())
        assert reason in await expect_unreachable(outsider, here.own, here.endpoint)
        assert reason in await outsider.peers.probe(here.endpoint)
        assert Hello not in heard  # neither side got as far as that
        assert (here.peers.links(), here.events.log, outsider.events.log) == ([], [], [])
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("make", "reason"), UNAUTHORISED, ids=NAMES)
async def test_whoever_is_no_member_is_not_listened_to(
    make: Callable[[], Card], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not wait for its verdict: what it sends behind its certificate is not looked at."""
    heard = []

    async def listen(self: Talk) -> object:
        heard.append(self)
        raise PeerError("somebody listened")

    async with swarm(2) as (_, here), await open_to(here) as stream:
        monkeypatch.setattr(Talk, "receive", listen)
        here.card.revoked.add(node_id(0))
        connection, _ = await wrap_client(stream, make(), here.own)
        caller = Caller(connection)
        with contextlib.suppress(trio.BrokenResourceError):
            await caller.say(hello())
            await caller.say(DataOffer(bytes(16), bytes(32), own_suites()))
        assert await caller.hear() in (None, Goodbye("this peer was revoked"))
        assert await caller.hear() is None
        assert heard == []
        assert (here.peers.links(), here.events.log) == ([], [])


async def test_a_member_of_another_swarm_reads_that_it_needs_an_invite() -> None:
    async with swarm(1) as (a,), trio.open_nursery() as nursery:
        stranger = await start_node(nursery, 1, Recorder(), card=open_card(1))
        reason = await expect_unreachable(stranger, a.own, a.endpoint)
        assert "that daemon belongs to another swarm: get an invite for it" in reason
        assert "belongs to another swarm" in await stranger.peers.probe(a.endpoint)
        nursery.cancel_scope.cancel()


async def test_an_observer_is_linked_and_known_as_one() -> None:
    async with swarm(1) as (a,), trio.open_nursery() as nursery:
        observer = await start_node(nursery, 1, Recorder(), card=lab().card(1, role="observer"))
        await observer.peers.link(a.own, a.endpoint)
        await a.events.until(lambda: a.peers.links())
        assert a.peers.get(observer.own).member.role == "observer"
        assert observer.peers.get(a.own).member.role == "member"
        assert [status.role for status in a.peers.snapshot()] == ["observer"]
        nursery.cancel_scope.cancel()


async def test_both_ends_know_which_news_the_other_goes_by() -> None:
    async with swarm(2) as (a, b):
        a.card.news_seq = 7
        assert (await a.peers.link(b.own, b.endpoint)).news == 0
        await b.events.until(lambda: b.peers.links())
        assert b.peers.get(a.own).news == 7


# ------------------------------------------------------------------------------------------------- who is one no more


async def linked(here: Node, there: Node) -> None:
    await here.peers.link(there.own, there.endpoint)
    await there.events.until(lambda: there.peers.get(here.own))


async def test_the_link_to_a_revoked_member_is_cut_and_the_others_stay() -> None:
    async with swarm(3) as (a, b, c):
        await linked(a, b)
        await linked(c, a)
        a.card.revoked.add(b.own)
        a.peers.recheck()
        await a.events.until(lambda: a.events.reasons)
        await b.events.until(lambda: b.events.reasons)
        assert a.events.reasons == ["this peer was revoked"]
        assert Goodbye("this peer was revoked") in b.events.messages
        assert [link.peer for link in a.peers.links()] == [c.own]
        assert "revoked" in await expect_unreachable(b, a.own, a.endpoint)


@pytest.fixture
def recheck_s(monkeypatch: pytest.MonkeyPatch) -> float:
    """Let memberships be looked at again more often than a daemon does: nothing here lasts for half a minute."""
    monkeypatch.setattr(peers_module, "RECHECK_S", 4.0)
    return 4.0


async def test_a_member_that_is_revoked_while_it_calls_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    establish = Link.establish

    async with swarm(2) as (a, b):

        async def establish_too_late(self: Link) -> None:
            await establish(self)
            b.card.revoked.add(a.own)

        monkeypatch.setattr(Link, "establish", establish_too_late)
        await a.peers.link(b.own, b.endpoint)
        await b.events.until(lambda: b.events.reasons)
        assert b.events.log == [("down", "this peer was revoked")]
        assert b.peers.links() == []


async def test_links_end_with_the_certificate_within_a_recheck(
    jumping_clock: trio.testing.MockClock, recheck_s: float
) -> None:
    ahead_ms = 0

    def clock() -> int:
        return int((lab().now_s + trio.current_time()) * 1000) + ahead_ms

    async with swarm(1) as (b,), trio.open_nursery() as nursery:
        a = await start_node(nursery, 1, Recorder(), clock=clock)
        await linked(a, b)
        await trio.sleep(2 * recheck_s)
        assert a.events.reasons == []
        ahead_ms = int(7 * DAY_S * 1000)
        began = trio.current_time()
        await a.events.until(lambda: a.events.reasons)
        assert trio.current_time() - began <= recheck_s + 1
        assert a.events.reasons == ["the certificate with which this link was made has expired"]
        nursery.cancel_scope.cancel()


async def test_cutting_takes_whom_it_is_told_to() -> None:
    async with swarm(3) as (a, b, c):
        await linked(a, b)
        await linked(a, c)
        a.peers.cut(lambda link: link.peer == c.own, "out with you")
        await a.events.until(lambda: a.events.reasons)
        await c.events.until(lambda: c.events.reasons)
        assert Goodbye("out with you") in c.events.messages
        assert a.events.reasons == ["out with you"]
        assert [link.peer for link in a.peers.links()] == [b.own]


async def test_an_old_link_is_made_anew_before_it_is_given_up(
    jumping_clock: trio.testing.MockClock, recheck_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "MAX_LINK_AGE_S", 2 * recheck_s)
    async with swarm(2) as (a, b):
        await linked(a, b)
        first = a.peers.get(b.own)
        first.busy += 1
        await trio.sleep(3.5 * recheck_s)
        assert a.peers.get(b.own) is first  # a round depends on it
        first.busy -= 1
        await a.events.until(lambda: a.events.reasons)
        assert [kind for kind, _ in a.events.log if kind != "message"] == ["up", "up", "down"]
        await b.events.until(lambda: b.events.reasons)
        await expect_usable(a, b)
        assert (a.budgets.links.used, b.budgets.links.used) == (1, 1)


# -------------------------------------------------------------------------------------------------------------- budgets


async def test_links_are_bounded_and_both_sides_say_so() -> None:
    async with swarm(3) as (a, b, c):
        a.budgets.links.limit = 1
        await linked(a, b)
        assert "as many links as it may have: 1" in await refused(a, c)
        assert "it refused this machine: it has as many links as it may have: 1" in await refused(c, a)
        await expect_usable(a, b)
        a.peers.get(b.own).close("enough")
        await linked(c, a)
        assert a.budgets.links.peak == 1


async def refused(here: Node, there: Node) -> str:
    with pytest.raises(Unreachable) as caught:
        await here.peers.link(there.own, there.endpoint)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- strangers that call


GARBAGE = [
    b"",
    b"\0",
    b"mpd",
    b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
    bytes.fromhex("16030100f5010000f10303") + bytes(200),
    b"\x16" * 5000,
    b"\xff" * 5000,
    b"mpdC\x01\0\0\0" + bytes(4),
    b"mpdC\x01\0\0\0" + control_frame(PEERS.encode(hello())),
    b"mpdC\x07\0\0\0" + control_frame(PEERS.encode(hello())),
    b"mpdA\x01\0\0\0" + bytes(100),
    b"mpdX\x01\0\0\0" + bytes(100),
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


@pytest.mark.parametrize(
    "nonsense",
    [
        control_frame(b"junk"),
        b"\xff\xff\xff\xff",
        control_frame(PEERS.encode(Ping())),
        control_frame(PEERS.encode(hello())) + control_frame(PEERS.encode(Ping())),
        control_frame(PEERS.encode(hello(version=PEER_VERSION + 1))),
    ],
)
async def test_a_member_that_does_not_keep_to_the_rules_is_closed(nonsense: bytes) -> None:
    async with swarm(2) as (a, b):
        async with calling(a, lab().card(9)) as caller:
            await caller.stream.send_all(nonsense)
            with contextlib.suppress(PeerError):
                while await caller.hear() is not None:
                    pass
        assert a.peers.links() == []
        assert a.events.log == []
        await b.peers.link(a.own, a.endpoint)


async def test_a_caller_that_shows_our_own_certificate_is_closed() -> None:
    async with swarm(1) as (a,), await open_to(a) as stream:
        connection, _ = await wrap_client(stream, a.card, a.own)
        assert await Caller(connection).hear() is None
        assert a.events.log == []


async def test_a_caller_that_stops_half_way_is_closed_in_time(jumping_clock: trio.testing.MockClock) -> None:
    async with swarm(1) as (a,):
        began = trio.current_time()
        async with calling(a, lab().card(1)) as caller:
            keys = await agree_on_keys(caller, a, lab().card(1))
            assert await caller.hear() is None
        assert trio.current_time() - began == pytest.approx(HANDSHAKE_S)
        with pytest.raises((OSError, PeerError)):  # the handle has gone with the call
            await dial_data(a.endpoint.host, a.endpoint.port, keys, Stages(ByteGate(1 << 20)))
        assert a.events.log == []
        assert (a.budgets.links.used, a.budgets.handshakes.used) == (0, 0)


async def test_a_call_under_way_is_preferred_to_dialling_and_dialling_follows_if_it_fails() -> None:
    """Otherwise both calls could be made, each side could drop the other's, and no link would be left."""
    async with swarm(2) as (a, b):
        links = []

        async def call() -> None:
            links.append(await a.peers.link(b.own, b.endpoint))

        async with trio.open_nursery() as nursery, calling(a, b.card):
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            assert b.events.log == []
        assert links[0].up
        await b.events.until(lambda: b.peers.links())
        await expect_usable(a, b)


async def test_a_data_connection_goes_to_the_call_that_agreed_on_its_keys() -> None:
    async with swarm(1) as (a,), calling(a, lab().card(1)) as caller:
        keys = await agree_on_keys(caller, a, lab().card(1))
        async with await open_to(a) as stray:
            await stray.send_all(data_greeting(b"x" * 16))
            assert await is_closed(stray)
        channel = await dial_data(a.endpoint.host, a.endpoint.port, keys, Stages(ByteGate(1 << 20)))
        await a.events.until(lambda: a.events.log)
        assert [link.peer for link in a.peers.links()] == [node_id(1)]
        assert a.events.reasons == []
        channel.close()


async def test_those_who_want_to_join_have_a_door_of_their_own() -> None:
    async with swarm(1) as (a,), await open_to(a) as stream:
        came = trio.Event()

        async def admit(stream: trio.SocketStream) -> None:
            assert await stream.receive_some(100) == b"please"
            came.set()

        a.peers.door.admission = admit
        await stream.send_all(b"mpdA\x01\0\0\0please")
        await came.wait()
        assert await is_closed(stream)


# ---------------------------------------------------------------------------------------------------- who is out there


async def test_a_probe_says_what_is_there() -> None:
    async with swarm(2) as (a, b):
        nowhere = Endpoint("127.0.0.1", closed_port())
        assert await a.peers.probe(nowhere) == "Connection refused"
        there = await a.peers.probe(b.endpoint)
        assert show_peer(b.own) in there
        assert f"by TCP but not by UDP: open UDP port {b.endpoint.port}" in there
        assert await a.peers.probe(a.endpoint) == "this daemon itself answers there"
        await trio.testing.wait_all_tasks_blocked()
        assert (a.events.log, b.events.log) == ([], [])


@pytest.mark.parametrize(("ahead_s", "which"), [(45, "45 s ahead of"), (-45, "45 s behind")])
async def test_a_probe_finds_a_clock_that_is_wrong(ahead_s: int, which: str) -> None:
    now_ms = int(lab().now_s * 1000)
    async with swarm(0), trio.open_nursery() as nursery:
        a = await start_node(nursery, 0, Recorder(), clock=lambda: now_ms)
        b = await start_node(nursery, 1, Recorder(), clock=lambda: now_ms + ahead_s * 1000)
        assert f"its clock is {which} this machine's" in await a.peers.probe(b.endpoint)
        nursery.cancel_scope.cancel()


async def test_a_probe_finds_what_is_no_daemon(jumping_clock: trio.testing.MockClock) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 mail.example.org ESMTP\r\n")
        await is_closed(stream)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with swarm(1) as (a,), trio.open_nursery() as nursery:
            listeners = await nursery.start(trio.serve_tcp, serve, 0)
            mail = Endpoint("127.0.0.1", listeners[0].socket.getsockname()[1])
            assert "not an mpd daemon" in await a.peers.probe(mail)
            nobody = Endpoint("127.0.0.1", silent.getsockname()[1])
            assert await a.peers.probe(nobody) == f"nothing answered within {HANDSHAKE_S:g} s"
            nursery.cancel_scope.cancel()


async def test_can_dial_says_whether_something_listens() -> None:
    async with swarm(2) as (a, b):
        assert not await a.peers.can_dial(b.endpoint)  # nobody from that host may ask
        await linked(a, b)
        assert await a.peers.can_dial(b.endpoint)
        assert not await a.peers.can_dial(Endpoint("127.0.0.1", closed_port()))
        assert not await a.peers.can_dial(Endpoint("127.0.0.2", b.endpoint.port))  # somebody else's address
        assert a.budgets.dial_backs.used == 0


async def test_dialling_back_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with swarm(2) as (a, b):
        await linked(a, b)
        a.budgets.dial_backs.limit = 0
        assert not await a.peers.can_dial(b.endpoint)
        assert a.budgets.dial_backs.refused == 1
