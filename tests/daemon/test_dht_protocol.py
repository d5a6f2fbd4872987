"""A node on a stage: what it answers, whom it believes, and that whatever arrives leaves it alive and silent."""

import asyncio
import random
from typing import Any

import msgspec
import pytest
from dht_swarm import (
    ELSEWHERE,
    HERE,
    NOW_MS,
    Actor,
    PrivateSwarm,
    Stage,
    is_request,
    message_id_of,
    peer,
    play,
    public,
    turn,
)

from mpd.daemon.dht_gate import HEADER_BYTES, MAX_DATAGRAM_BYTES
from mpd.daemon.dht_messages import (
    MIN_REQUEST_BYTES,
    FindNode,
    FindRecords,
    Home,
    Introduce,
    Introduction,
    Leave,
    Named,
    Ping,
    Store,
    Stored,
)

KEY = b"k" * 20
YOU, THEM = 1, 2


# what arrives


def sealed_junk(you: Actor, me: bytes) -> list[bytes]:
    deep = b"\x91" * 1100 + b"\x90"
    bodies = [
        b"\xc1",
        b"\xc1\xc1\xc1",
        deep,
        msgspec.msgpack.encode(["ping", you.id]) + b"tail",
        msgspec.msgpack.encode(["ping", [you.id]]),
        msgspec.msgpack.encode(["stun", []]),
        msgspec.msgpack.encode(["_timeout", bytes(20)]),
        msgspec.msgpack.encode(["find_node", b"short", me, KEY]),
        msgspec.msgpack.encode(["store", you.id, me, KEY, 0, {}]),
    ]
    return [you._gate.seal(kind, bytes(20), body) for body in bodies for kind in (0, 1)]


def test_junk_is_counted_and_gets_no_answer() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(YOU)
        junk = sealed_junk(you, stage.me.id)
        for datagram in (*junk, b"", b"\x00", bytes(21), bytes(45), bytes(60), bytes(2000)):
            stage.hear(datagram)
        await turn()
        assert stage.wire.sent == []
        assert stage.refused["request"] == stage.refused["reply to no question"] == len(junk) / 2
        assert stage.refused.total() == len(junk) + 6
        stage.hear(you.ping())
        await turn()
        assert len(stage.wire.sent) == 2, "an honest ping is answered, and its sender asked"

    play(scene)


def test_every_request_has_its_reply() -> None:
    async def scene(stage: Stage) -> None:
        you, them = stage.actor(YOU), stage.actor(THEM)
        stage.meet(them, ELSEWHERE)
        stage.meet(you)
        me, near = stage.me.id, [(them.id, *ELSEWHERE)]
        record = you.record(KEY)
        expected: list[tuple[Any, Any]] = [
            (FindNode(you.id, me, KEY), Named(me, near)),
            (Store(you.id, me, KEY, 0, record), Stored(me, near, True, True)),
            (Store(you.id, me, KEY, 0, you.record(KEY, seq=0)), Stored(me, near, False, True)),
            (Store(you.id, me, b"x" * 20, 1, record), Stored(me, near, False, True)),
            (Introduce(you.id, me, public(7)), Introduction(me, [])),
        ]
        for request, reply in expected:
            asked = you.ask(request)
            stage.hear(asked)
            assert stage.last_reply(type(request)) == reply
            assert message_id_of(stage.last()) == message_id_of(asked)
            assert stage.wire.sent[-1][1] == HERE
        stage.hear(you.ask(FindRecords(you.id, me, KEY, 1, b"")))
        page = stage.last_reply(FindRecords)
        assert (page.nodes, page.records, page.more) == (near, [record], 0)
        stage.hear(you.ask(FindRecords(you.id, me, KEY, 0, record.public_key)))
        assert (stage.last_reply(FindRecords).records, stage.last_reply(FindRecords).nodes) == ([], [])
        asked = you.ping(me)
        stage.hear(asked)
        home = stage.last_reply(Ping)
        assert (home.sender, home.public_key, home.seen_host, home.seen_port) == (me, public(0), *HERE)
        assert you.proofs.is_home(public(0), message_id_of(asked), HERE, home.signature)

    play(scene)


def test_what_is_meant_for_another_node_is_not_answered() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(YOU)
        stage.hear(you.ask(FindNode(you.id, peer(9), KEY)))
        stage.hear(you.ping(to=peer(9)))
        await turn()
        assert stage.wire.sent == []
        assert stage.refused == {"for another node": 2}

    play(scene)


def test_a_short_request_is_not_answered() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(YOU)
        body = msgspec.msgpack.encode(FindNode(you.id, stage.me.id, KEY, bytes(450)))
        assert HEADER_BYTES + len(body) < MIN_REQUEST_BYTES
        stage.hear(you._gate.seal(0, bytes(20), body))
        await turn()
        assert stage.wire.sent == []
        assert stage.refused == {"short request": 1}

    play(scene)


# whom it believes


HOSTILE: list[object] = [
    7,
    None,
    {},
    {"value": b"v"},
    [],
    [peer(YOU)],
    [b"short", []],
    [peer(YOU), [[peer(THEM)]]],
    [peer(YOU), [[peer(THEM), "192.0.2.9", 0]]],
    [peer(YOU), [[peer(THEM) + b"long", "192.0.2.9", 1]]],
    [peer(YOU), [[{"un": "hashable"}, [], {}]]],
    [peer(YOU), [[peer(THEM), "192.0.2.9", 1]] * 20],
]


@pytest.mark.parametrize("reply", HOSTILE)
def test_a_hostile_reply_is_no_reply(reply: object) -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(YOU)
        contact = stage.meet(you)
        answer = stage.protocol.call_find_node(contact, contact)
        stage.hear(you.reply(stage.last(), reply))
        assert await answer is None
        assert stage.refused["reply"] == 1

    play(scene)


def test_a_contact_whose_address_another_node_took_over_is_forgotten() -> None:
    async def scene(stage: Stage) -> None:
        contact = stage.meet(stage.actor(YOU))
        answer = stage.protocol.call_find_node(contact, contact)
        stage.hear(stage.actor(THEM).reply(stage.last(), Named(peer(THEM), [])))
        assert await answer is None
        assert not stage.contacts
        assert not stage.protocol.has_proved(contact)

    play(scene)


def forgeries(stage: Stage, asked: bytes) -> dict[str, Home]:
    """Return answers to `asked` with which somebody says he is peer `YOU`, and is not."""
    you, them = stage.actor(YOU), stage.actor(THEM)
    true, theirs = you.home(asked, stage.OURS), them.home(asked, stage.OURS)
    replace = msgspec.structs.replace
    earlier = Actor(you.trust, stage.wall).ping(stage.me.id)
    return {
        "their key": replace(theirs, sender=you.id),
        "their signature": replace(true, signature=theirs.signature),
        "no signature": replace(true, signature=bytes(64)),
        "another question": you.home(earlier, stage.OURS),
        "another address": replace(true, seen_port=1),
        "passed on": you.home(asked, HERE),
        "no text for a host": replace(true, seen_host="☃" * 40),
    }


@pytest.mark.parametrize(
    "forgery",
    [
        "their key",
        "their signature",
        "no signature",
        "another question",
        "another address",
        "passed on",
        "no text for a host",
    ],
)
def test_nobody_passes_for_somebody_else(forgery: str) -> None:
    async def scene(stage: Stage) -> None:
        answer = stage.protocol.ping(HERE)
        asked = stage.last()
        stage.hear(stage.actor(THEM).reply(asked, forgeries(stage, asked)[forgery]))
        assert await answer is None
        assert stage.refused == {"proof": 1}
        assert not stage.contacts

    play(scene)


def test_on_loopback_we_know_where_our_questions_come_from() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(YOU)
        for seen in (("127.0.0.1", 5), ("127.0.0.1", 4)):
            answer = stage.protocol.ping(("127.0.0.1", 9))
            asked = stage.last()
            stage.hear(you.reply(asked, you.home(asked, seen)), ("127.0.0.1", 9))
            assert (await answer is not None) == (seen[1] == 4)

    play(scene, sockname=("127.0.0.1", 4))


def test_only_a_node_that_has_proved_its_key_is_asked_for_anything() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(YOU)
        node = type(stage.protocol.source_node)(you.id, *HERE)
        answers = [stage.protocol.call_find_node(node, node) for _ in range(3)]
        assert [type(each) for each in stage.wire.requests()] == [Ping], "one question for three"
        stage.prove(you)
        await turn()
        assert [type(each) for each in stage.wire.requests()] == [Ping, FindNode, FindNode, FindNode]
        for datagram, _ in list(stage.wire.sent[1:]):
            stage.hear(you.reply(datagram, Named(you.id, [])))
        assert await asyncio.gather(*answers) == [Named(you.id, [])] * 3

    play(scene)


def test_a_liar_that_is_asked_for_its_proof_is_asked_for_nothing_else() -> None:
    async def scene(stage: Stage) -> None:
        node = type(stage.protocol.source_node)(peer(YOU), *HERE)
        answer = stage.protocol.call_find_node(node, node)
        stage.prove(stage.actor(THEM))
        assert await answer is None
        assert stage.refused == {"reply by another node": 1}
        assert len(stage.wire.sent) == 1

    play(scene)


# a private swarm


def private(number: int, stage: Stage, swarm: PrivateSwarm) -> Actor:
    return Actor(swarm.member(number), stage.wall)


def test_who_is_no_member_is_no_contact_and_gets_no_answer() -> None:
    swarm = PrivateSwarm()

    async def scene(stage: Stage) -> None:
        stranger = Actor(swarm.stranger(YOU), stage.wall)
        stage.hear(stranger.ping())
        stage.hear(stage.actor(YOU).ping())
        await turn()
        assert stage.wire.sent == []
        assert stage.refused == {"no member": 1, "mac": 1}
        assert stage.meet(stranger) is None
        assert stage.refused["proof"] == 1
        assert stage.meet(private(THEM, stage, swarm), ELSEWHERE) is not None

    play(scene, trust=swarm.member(0))


def test_a_publisher_introduces_itself_before_anything_is_held_for_it() -> None:
    swarm = PrivateSwarm()

    async def scene(stage: Stage) -> None:
        you = private(YOU, stage, swarm)
        store = Store(you.id, stage.me.id, KEY, 0, you.record(KEY))
        stage.hear(you.ask(store))
        assert stage.last_reply(Store) == Stored(stage.me.id, [], False, False)
        stage.hear(you.ping(stage.me.id))
        stage.hear(you.ask(store))
        answers = [each for each, _ in stage.wire.sent if not is_request(each)]
        assert msgspec.msgpack.decode(answers[-1][HEADER_BYTES:])[2:] == [True, True]
        stage.hear(you.ask(Introduce(you.id, stage.me.id, you.trust.public_key)))
        assert stage.last_reply(Introduce) == Introduction(stage.me.id, list(you.trust.chain()))

    play(scene, trust=swarm.member(0))


def test_we_introduce_ourselves_to_a_holder_that_does_not_know_us() -> None:
    swarm = PrivateSwarm()

    async def scene(stage: Stage) -> None:
        you = private(YOU, stage, swarm)
        contact = stage.meet(you)
        answer = stage.protocol.call_store(contact, KEY, 0, stage.me.record(KEY))
        stage.hear(you.reply(stage.last(), Stored(you.id, [], False, False)))
        await turn()
        assert [type(each) for each in stage.wire.requests()] == [Ping, Store, Ping]
        stage.prove(you)
        await turn()
        stage.hear(you.reply(stage.last(), Stored(you.id, [], True, True)))
        assert (await answer).held

    play(scene, trust=swarm.member(0))


def test_the_revoked_are_forgotten_and_not_answered() -> None:
    swarm = PrivateSwarm()

    async def scene(stage: Stage) -> None:
        you, them = private(YOU, stage, swarm), private(THEM, stage, swarm)
        stage.meet(you)
        stage.meet(them, ELSEWHERE)
        stage.hear(you.ask(Store(you.id, stage.me.id, KEY, 0, you.record(KEY))))
        assert stage.store.records(KEY)
        swarm.revoked.add(you.id)
        stage.protocol.drop_revoked()
        assert stage.contacts == {them.id}
        assert stage.store.records(KEY) == []
        n_sent = len(stage.wire.sent)
        stage.hear(you.ping())
        stage.hear(you.ask(FindNode(you.id, stage.me.id, KEY)))
        await turn()
        assert len(stage.wire.sent) == n_sent
        assert stage.refused["revoked"] == 2
        stage.hear(them.ask(Store(them.id, stage.me.id, KEY, 0, you.record(KEY, seq=2, life_s=90))), ELSEWHERE)
        assert not stage.last_reply(Store).held
        assert stage.meet(you) is None

    play(scene, trust=swarm.member(0))


# the socket


def test_closing_says_a_signed_goodbye_and_frees_who_waits() -> None:
    waiting: list[asyncio.Future[Any]] = []

    async def scene(stage: Stage) -> None:
        stage.meet(stage.actor(YOU))
        waiting.append(stage.protocol.ping(ELSEWHERE))

    stage = play(scene)
    goodbye = stage.wire.requests()[-1]
    assert isinstance(goodbye, Leave)
    assert (goodbye.sender, goodbye.at_ms) == (stage.me.id, NOW_MS)
    assert stage.actor(YOU).proofs.is_goodbye(public(0), NOW_MS, goodbye.signature)
    assert waiting[0].cancelled()
    stage.protocol._send(b"late", HERE)
    assert stage.wire.sent[-1][0] != b"late"


def test_an_old_goodbye_says_nothing() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(YOU)
        stage.meet(you)
        old = msgspec.msgpack.decode(you.leave()[HEADER_BYTES:])
        stage.wall.now += 40_000
        stage.hear(you.ask(old))
        assert stage.contacts == {you.id}
        assert stage.refused == {"proof": 1}

    play(scene)


def test_a_v6_socket_reaches_v4_nodes_and_names_them_as_such() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(YOU)
        stage.protocol.ping(HERE)
        assert stage.wire.sent[-1][1] == ("::ffff:192.0.2.1", 4747)
        asked = stage.last()
        stage.protocol.datagram_received(
            you.reply(asked, you.home(asked, stage.OURS)), ("::ffff:192.0.2.1", 4747, 0, 0)
        )
        assert stage.protocol.router.contacts[you.id].ip == "192.0.2.1"
        stage.protocol.datagram_received(you.ping(), ("fe80::1%eth0", 4747, 0, 2))
        assert stage.last_reply(Ping).seen_host == "fe80::1%eth0"

    play(scene, sockname=("::", 4747, 0, 0))


def test_a_misspelt_method_is_no_remote_call() -> None:
    async def scene(stage: Stage) -> None:
        with pytest.raises(AttributeError):
            stage.protocol.pnig(HERE)

    play(scene)


def test_a_socket_error_is_counted() -> None:
    async def scene(stage: Stage) -> None:
        stage.protocol.error_received(OSError("network is unreachable"))
        assert stage.refused == {"not sent": 1}

    play(scene)


def test_what_would_be_too_long_is_not_sent() -> None:
    async def scene(stage: Stage) -> None:
        stage.protocol._send(bytes(MAX_DATAGRAM_BYTES + 1), HERE)
        assert stage.wire.sent == []
        assert stage.refused == {"too long to send": 1}

    play(scene)


def test_mutated_requests_never_raise_and_never_store_anything_forged() -> None:
    rng = random.Random(5)

    async def scene(stage: Stage) -> None:
        you, me = stage.actor(YOU), stage.me.id
        requests = [
            Ping(you.id, b"", public(YOU), []),
            FindNode(you.id, me, KEY),
            FindRecords(you.id, me, KEY, 0, b""),
            Store(you.id, me, KEY, 0, you.record(KEY, value=b"value")),
            Introduce(you.id, me, public(YOU)),
        ]
        originals = [you.ask(request)[HEADER_BYTES:] for request in requests]
        for _ in range(3000):
            body = bytearray(rng.choice(originals))
            for _ in range(rng.randint(1, 4)):
                body[rng.randrange(min(len(body), 200))] = rng.randrange(256)
            stage.hear(you._gate.seal(0, rng.randbytes(20), bytes(body)))
            stage.steady.now += 0.01
        await turn()
        assert stage.refused.total() > 1000
        assert not stage.contacts
        assert all(record == you.record(KEY, value=b"value") for record in stage.store.records(KEY))
        assert all(len(datagram) <= MAX_DATAGRAM_BYTES for datagram, _ in stage.wire.sent)

    play(scene)
