"""The gate of the DHT: whatever arrives, the node lives, says nothing to strangers, and believes only whom it asked.

The transport is a list of what was sent, so a test plays the network: it takes a datagram from that list and hands a
reply, true or crafted, to `datagram_received`.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from kademlia.node import Node

from mpd.daemon import dht_protocol
from mpd.daemon.dht_messages import (
    MAX_DATAGRAM_BYTES,
    FindNode,
    FindRecords,
    Leave,
    Named,
    Page,
    Ping,
    Store,
    Stored,
    encode,
    reply_decoders,
    request_decoder,
)
from mpd.daemon.dht_protocol import GuardedProtocol
from mpd.daemon.dht_records import RecordStore, WireRecord

ME, YOU, THEM, KEY = b"m" * 20, b"y" * 20, b"t" * 20, b"k" * 20
HERE, ELSEWHERE = ("192.0.2.1", 4747), ("192.0.2.2", 4747)
MESSAGE_ID = b"i" * 20


class Wire:
    """A transport that only writes down: (datagram, address) of everything sent."""

    def __init__(self, sockname: tuple[Any, ...] = ("0.0.0.0", 1)) -> None:
        self.sent: list[tuple[bytes, Any]] = []
        self.sockname = sockname
        self.closed = False

    def get_extra_info(self, name: str) -> Any:
        return self.sockname

    def sendto(self, datagram: bytes, address: Any) -> None:
        self.sent.append((datagram, address))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def requests(self) -> list[Any]:
        return [request_decoder.decode(datagram[21:]) for datagram, _ in self.sent if datagram[:1] == b"\x00"]


Scene = Callable[[GuardedProtocol, Wire], Awaitable[None]]


def play(scene: Scene, sockname: tuple[Any, ...] = ("0.0.0.0", 1)) -> GuardedProtocol:
    """Run `scene` with a fresh protocol; afterwards nothing may be left of it in the loop."""

    async def run() -> GuardedProtocol:
        loop = asyncio.get_running_loop()
        errors: list[Any] = []
        loop.set_exception_handler(lambda _, context: errors.append(context))
        changes: list[int] = []
        protocol = GuardedProtocol(Node(ME), RecordStore(loop.time), 20, Counter(), lambda: changes.append(1))
        wire = Wire(sockname)
        protocol.connection_made(wire)
        await asyncio.wait_for(scene(protocol, wire), 5)
        await protocol.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not protocol._outstanding
        assert not errors
        return protocol

    return asyncio.run(run())


async def turn() -> None:
    """Let everything that is ready run."""
    loop = asyncio.get_running_loop()
    for _ in range(5):
        turned = loop.create_future()
        loop.call_soon(turned.set_result, None)
        await turned


def reply_to(wire: Wire, reply: Any, index: int = -1) -> bytes:
    return b"\x01" + wire.sent[index][0][1:21] + encode(reply)


def meet(protocol: GuardedProtocol, wire: Wire, node_id: bytes = YOU, address: tuple[str, int] = HERE) -> Any:
    """Make `node_id` at `address` a contact: ask who lives there, and let it answer."""
    protocol.ping(address)
    protocol.datagram_received(reply_to(wire, Named(node_id, [])), address)
    return protocol.router.contacts[node_id]


def ask(protocol: GuardedProtocol, request: Any, address: tuple[str, int] = HERE) -> None:
    protocol.datagram_received(b"\x00" + MESSAGE_ID + encode(request), address)


# what arrives


def junk() -> list[bytes]:
    good = b"\x00" + MESSAGE_ID + encode(Store(YOU, KEY, WireRecord(YOU, 1, 1000, b"v")))
    deep = b"\x91" * 1300 + b"\x90"
    return [
        b"",
        b"\x00",
        bytes(21),
        bytes(22),
        bytes(24),
        b"\x00" + MESSAGE_ID + b"\xc1",
        b"\x00" + MESSAGE_ID + b"\xc1\xc1\xc1",
        b"\x01" + MESSAGE_ID + b"\xc1",
        b"\x02" + MESSAGE_ID + encode(Ping(YOU)),
        b"\x00" + MESSAGE_ID + deep,
        b"\x00" + MESSAGE_ID + encode(["ping", YOU]) + b"tail",
        b"\x00" + MESSAGE_ID + encode(["ping", [YOU]]),
        b"\x00" + MESSAGE_ID + encode(["stun", []]),
        b"\x00" + MESSAGE_ID + encode(["_timeout", MESSAGE_ID]),
        b"\x00" + MESSAGE_ID + encode(["find_node", b"short", KEY]),
        good + bytes(MAX_DATAGRAM_BYTES),
        good[:-1],
    ]


def test_junk_is_counted_and_gets_no_answer() -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        for datagram in junk():
            protocol.datagram_received(datagram, HERE)
        await turn()
        assert wire.sent == []
        assert protocol.refused.total() == len(junk())
        ask(protocol, Ping(YOU))
        await turn()
        assert len(wire.sent) == 2, "an honest ping is answered, and its sender checked"

    play(scene)


def test_random_mutations_never_raise_and_never_store_anything_invalid() -> None:
    rng = random.Random(5)
    originals = [
        b"\x00" + MESSAGE_ID + encode(request)
        for request in (
            Ping(YOU),
            FindNode(YOU, KEY),
            FindRecords(YOU, KEY, b""),
            Store(YOU, KEY, WireRecord(YOU, 1, 1000, b"value")),
            Leave(YOU),
        )
    ]

    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        for _ in range(5000):
            datagram = bytearray(rng.choice(originals))
            for _ in range(rng.randint(1, 4)):
                datagram[rng.randrange(len(datagram))] = rng.randrange(256)
            protocol.datagram_received(bytes(datagram[: rng.randint(1, len(datagram))]), HERE)
        await turn()
        assert protocol.refused.total() > 1000
        assert not protocol.router.contacts
        assert all(len(datagram) <= MAX_DATAGRAM_BYTES for datagram, _ in wire.sent)

    play(scene)


def test_every_request_has_its_reply() -> None:
    record = WireRecord(YOU, 1, 60_000, b"v")

    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        meet(protocol, wire, THEM, ELSEWHERE)
        meet(protocol, wire)
        expected = {
            Ping(YOU): Named(ME, []),
            FindNode(YOU, KEY): Named(ME, [(THEM, *ELSEWHERE)]),
            Store(YOU, KEY, record): Stored(ME, [(THEM, *ELSEWHERE)], True),
            Store(YOU, KEY, WireRecord(YOU, 0, 60_000, b"v")): Stored(ME, [(THEM, *ELSEWHERE)], False),
        }
        for request, reply in expected.items():
            ask(protocol, request)
            assert wire.sent[-1] == (b"\x01" + MESSAGE_ID + encode(reply), HERE)
        ask(protocol, FindRecords(YOU, KEY, b""))
        page = reply_decoders[FindRecords].decode(wire.sent[-1][0][21:])
        assert isinstance(page, Page)
        assert [(held.publisher, held.value) for held in page.records] == [(YOU, b"v")]

    play(scene)


# whom it believes


HOSTILE: list[object] = [
    7,
    None,
    {},
    {"value": b"v"},
    [],
    [YOU],
    [b"short", []],
    [YOU, [[THEM]]],
    [YOU, [[THEM, "192.0.2.9", 0]]],
    [YOU, [[THEM + b"long", "192.0.2.9", 1]]],
    [YOU, [[{"un": "hashable"}, [], {}]]],
    [YOU, [[THEM, "192.0.2.9", 1]] * 1000],
]


@pytest.mark.parametrize("reply", HOSTILE)
def test_a_hostile_reply_is_no_reply(reply: object) -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        contact = meet(protocol, wire)
        answer = protocol.call_find_node(contact, Node(KEY))
        datagram = reply_to(wire, reply)
        protocol.datagram_received(datagram[:MAX_DATAGRAM_BYTES], HERE)
        assert await answer is None
        assert protocol.refused["reply"] == 1

    play(scene)


def test_a_reply_counts_only_from_the_address_that_was_asked() -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        answer = protocol.ping(HERE)
        reply = reply_to(wire, Named(YOU, []))
        protocol.datagram_received(reply, ELSEWHERE)
        assert not answer.done()
        protocol.datagram_received(reply, HERE)
        assert await answer == Named(YOU, [])
        protocol.datagram_received(reply, HERE)
        assert protocol.refused == {"reply from elsewhere": 1, "reply to no question": 1}

    play(scene)


def test_a_contact_whose_address_another_node_took_over_is_forgotten() -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        answer = protocol.call_ping(meet(protocol, wire))
        protocol.datagram_received(reply_to(wire, Named(THEM, [])), HERE)
        assert await answer is None
        assert not protocol.router.contacts

    play(scene)


def test_a_stranger_is_a_contact_once_it_has_answered() -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        for _ in range(3):
            ask(protocol, FindNode(YOU, KEY))
            await turn()
        assert not protocol.router.contacts
        assert [request for request in wire.requests() if isinstance(request, Ping)] == [Ping(ME)]
        index = next(i for i, (datagram, _) in enumerate(wire.sent) if datagram[:1] == b"\x00")
        protocol.datagram_received(reply_to(wire, Named(YOU, []), index), HERE)
        assert set(protocol.router.contacts) == {YOU}

    play(scene)


def test_many_strangers_are_not_all_checked_at_once() -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        for i in range(1000):
            ask(protocol, Ping(i.to_bytes(20, "big")))
        await turn()
        assert len(wire.requests()) == dht_protocol.MAX_CHECKS

    play(scene)


def test_we_are_not_our_own_contact() -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        answer = protocol.ping(HERE)
        protocol.datagram_received(reply_to(wire, Named(ME, [])), HERE)
        ask(protocol, Ping(ME))
        await turn()
        assert (await answer).sender == ME
        assert not protocol.router.contacts

    play(scene)


# who lives


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_protocol, "REQUEST_TIMEOUT_S", 0.06)
    monkeypatch.setattr(dht_protocol, "MIN_PATIENCE_S", 0.02)


@pytest.mark.usefixtures("quick")
def test_a_lost_request_is_sent_again_and_then_given_up() -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        assert await protocol.ping(HERE) is None
        assert len(wire.sent) == 2
        assert wire.sent[0] == wire.sent[1]

    play(scene)


@pytest.mark.usefixtures("quick")
def test_a_contact_leaves_after_two_failures_in_a_row() -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        contact = meet(protocol, wire)
        burst = [protocol.call_ping(contact) for _ in range(3)]
        await asyncio.wait(burst)
        assert set(protocol.router.contacts) == {YOU}, "requests of one burst are one failure"
        await turn()
        ask(protocol, Ping(YOU))
        protocol.datagram_received(reply_to(wire, Named(YOU, []), -2), HERE)
        assert await protocol.call_ping(contact) is None
        assert set(protocol.router.contacts) == {YOU}, "it had answered in between"
        assert not protocol.shuns(YOU)
        while protocol.router.contacts:
            await protocol.ping(ELSEWHERE)
        assert protocol.shuns(YOU)

    play(scene)


@pytest.mark.usefixtures("quick")
def test_cancelled_questions_disturb_nobody() -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        answered, unanswered = protocol.ping(HERE), protocol.ping(HERE)
        answered.cancel()
        unanswered.cancel()
        protocol.datagram_received(reply_to(wire, Named(YOU, []), 0), HERE)
        await protocol.ping(ELSEWHERE)
        assert not protocol._outstanding
        assert set(protocol.router.contacts) == {YOU}

    play(scene)


@pytest.mark.usefixtures("quick")
def test_a_known_id_moves_when_its_old_address_is_silent() -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        meet(protocol, wire)
        ask(protocol, Ping(YOU), ELSEWHERE)
        while (to := wire.sent[-1])[1] != ELSEWHERE or to[0][:1] != b"\x00":
            await protocol.ping(("192.0.2.3", 1))
            await turn()
        protocol.datagram_received(reply_to(wire, Named(YOU, [])), ELSEWHERE)
        assert protocol.router.contacts[YOU].ip == ELSEWHERE[0]

    play(scene)


def test_a_known_id_stays_while_its_old_address_answers() -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        meet(protocol, wire)
        ask(protocol, Ping(YOU), ELSEWHERE)
        await turn()
        protocol.datagram_received(reply_to(wire, Named(YOU, [])), HERE)
        await turn()
        assert protocol.router.contacts[YOU].ip == HERE[0]

    play(scene)


def test_a_goodbye_counts_only_from_the_contact_itself() -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        meet(protocol, wire)
        ask(protocol, Leave(YOU), ELSEWHERE)
        assert set(protocol.router.contacts) == {YOU}
        ask(protocol, Leave(YOU))
        assert not protocol.router.contacts
        assert len(wire.sent) == 1, "a goodbye has no reply"

    play(scene)


def test_closing_says_goodbye_and_frees_who_waits() -> None:
    waiting: list[asyncio.Future[Any]] = []
    wires: list[Wire] = []

    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        meet(protocol, wire)
        waiting.append(protocol.ping(ELSEWHERE))
        wires.append(wire)

    play(scene)
    assert wires[0].requests()[-1] == Leave(ME)
    assert waiting[0].cancelled()


def test_a_v6_socket_reaches_v4_nodes_and_names_them_as_such() -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        protocol.ping(HERE)
        assert wire.sent[-1][1] == ("::ffff:192.0.2.1", 4747)
        protocol.datagram_received(reply_to(wire, Named(YOU, [])), ("::ffff:192.0.2.1", 4747, 0, 0))
        assert protocol.router.contacts[YOU].ip == "192.0.2.1"

    play(scene, sockname=("::", 4747, 0, 0))


def test_a_misspelt_method_is_no_remote_call() -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        with pytest.raises(AttributeError):
            protocol.pnig(HERE)

    play(scene)


def test_a_socket_error_is_counted() -> None:
    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        protocol.error_received(OSError("network is unreachable"))
        assert protocol.refused == {"not sent": 1}

    play(scene)


def test_the_stock_wire_format_is_refused_not_misread() -> None:
    stock_ping = b"\x00" + MESSAGE_ID + msgspec.msgpack.encode(["ping", [YOU]])

    async def scene(protocol: GuardedProtocol, wire: Wire) -> None:
        protocol.datagram_received(stock_ping, HERE)
        assert protocol.refused == {"request": 1}

    play(scene)
