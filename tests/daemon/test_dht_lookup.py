"""Finding records among real nodes on one loop: pages, places, liars and publishers that nobody has met."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from dht_swarm import (
    Actor,
    PrivateSwarm,
    configs_of,
    nodes_of,
    on_one_loop,
    open_trust,
    peer,
    until,
)

from mpd.daemon import dht_lookup
from mpd.daemon import dht_messages as m
from mpd.daemon.dht_node import DhtNode, wall_ms
from mpd.daemon.dht_records import RecordStore, WireRecord, digest_of

KEY = b"k" * 20


def swarm_of(n: int) -> Any:
    return nodes_of(configs_of([open_trust(i) for i in range(n)]))


def actor(number: int) -> Actor:
    return Actor(open_trust(number), wall_ms)


async def values(node: DhtNode, key: bytes = KEY) -> list[bytes]:
    return sorted(record.value for record in await node.seek(key))


def says(node: DhtNode, reply: Callable[[m.FindRecords], object]) -> None:
    """Make `node` answer questions for records with `reply(request)`."""
    protocol = node.protocol
    honest = protocol._answer

    def answer(request: Any, message_id: bytes, address: Any) -> object:
        return reply(request) if isinstance(request, m.FindRecords) else honest(request, message_id, address)

    protocol._answer = answer


def test_a_few_records_cost_one_request_per_replica() -> None:
    async def test() -> None:
        async with swarm_of(4) as nodes:
            for i, node in enumerate(nodes):
                await node.announce(KEY, bytes([i]) * 88, 60)
            asked: list[Any] = []
            calls = nodes[0].protocol.calls
            ask = calls.ask
            calls.ask = lambda *args: asked.append(args) or ask(*args)
            assert len(await values(nodes[0])) == 4
            assert len(asked) == 3
            await nodes[0].announce(KEY, b"again", 60)
            assert len(asked) == 6

    on_one_loop(test)


def test_more_than_the_replicas_are_sought_at_two_places() -> None:
    async def test() -> None:
        async with swarm_of(8) as nodes:
            await until(lambda: len(nodes[0].protocol.router.contacts) == 7)
            asked: list[tuple[bytes, int]] = []
            call = nodes[0].protocol.call_find_records
            nodes[0].protocol.call_find_records = lambda node, *args: (
                asked.append((node.id, args[1])) or call(node, *args)
            )
            await values(nodes[0])
            for salt in (0, 1):
                near = sorted(
                    (peer(i) for i in range(1, 8)),
                    key=lambda each: int.from_bytes(each, "big") ^ int.from_bytes(m.location(KEY, salt), "big"),
                )
                assert {node_id for node_id, at in asked if at == salt} == set(near[:5])

    on_one_loop(test)


def test_sixty_four_publishers_are_read_page_by_page_and_each_set_once() -> None:
    async def test() -> None:
        async with swarm_of(6) as nodes:
            records = [actor(100 + i).record(KEY, value=bytes([i]) * 88) for i in range(64)]
            for node in nodes[1:]:
                for record in records:
                    assert node.storage.put(KEY, record)
            pages: list[Any] = []
            call = nodes[0].protocol.call_find_records
            nodes[0].protocol.call_find_records = lambda *args: pages.append(args) or call(*args)
            assert await values(nodes[0]) == sorted(record.value for record in records)
            assert len(pages) < 22, "five first pages, and the rest of one set"

    on_one_loop(test)


def test_different_sets_are_united() -> None:
    async def test() -> None:
        async with swarm_of(4) as nodes:
            records = [actor(100 + i).record(KEY, value=bytes([i]) * 88) for i in range(40)]
            for i, record in enumerate(records):
                nodes[1 + i % 3].storage.put(KEY, record)
            assert await values(nodes[0]) == sorted(record.value for record in records)

    on_one_loop(test)


def test_the_newest_record_of_a_publisher_wins() -> None:
    async def test() -> None:
        async with swarm_of(3) as nodes:
            publisher = actor(9)
            nodes[1].storage.put(KEY, publisher.record(KEY, 7, b"old"))
            nodes[2].storage.put(KEY, publisher.record(KEY, 8, b"new"))
            assert await values(nodes[0]) == [b"new"]
            nodes[1].storage.put(KEY, publisher.record(KEY, 9, b"", life_s=90))
            assert await values(nodes[0]) == [], "a tombstone beats what others still hold"

    on_one_loop(test)


def test_nobody_tells_us_what_we_say() -> None:
    async def test() -> None:
        async with swarm_of(2) as nodes:
            nodes[1].storage.put(KEY, actor(0).record(KEY, 2**62, b"of an earlier life"))
            assert await values(nodes[0]) == []
            await nodes[0].announce(KEY, b"true", 60)
            assert await values(nodes[0]) == [b"true"]

    on_one_loop(test)


def test_a_liar_with_the_names_of_an_honest_set_hides_nothing() -> None:
    async def test() -> None:
        async with swarm_of(3) as nodes:
            records = sorted(
                (actor(100 + i).record(KEY, value=bytes([i]) * 88) for i in range(30)),
                key=lambda record: record.public_key,
            )
            for record in records:
                nodes[1].storage.put(KEY, record)
            forged = [msgspec.structs.replace(record, value=b"forged") for record in records]

            def lie(request: m.FindRecords) -> m.Page:
                page = m.page_of(peer(2), forged, request.after, [])
                return msgspec.structs.replace(page, digest=digest_of(records) if not request.after else b"")

            says(nodes[2], lie)
            assert await values(nodes[0]) == sorted(record.value for record in records)
            assert nodes[0].refused["forged record"] == 1, "the liar is not listened to any further"

    on_one_loop(test)


GOOD = actor(9).record(KEY, life_s=3600)  # outlives the whole test run


@pytest.mark.parametrize(
    "lie",
    [
        7,
        [b"short"],
        [peer(0), [], [[*msgspec.structs.astuple(GOOD)[:3], bytes(1001), bytes(64)]], 0, b""],
        [peer(0), [], [[b"short", 1, 1000, b"v", bytes(64)]], 0, b""],
        [peer(0), [], [[GOOD.public_key, 1, 2**63, b"v", GOOD.signature]], 0, b""],
        [peer(0), [], [[GOOD.public_key, 1, wall_ms() + 60_000, b"v", bytes(64)]], 0, b""],
        [peer(0), [], [], 1_000_000, b"more?"],
        [peer(0), [], [[GOOD.public_key, 1, 1, b"v", bytes(64)]], 7, b""],
        [peer(0), [[peer(i), "127.0.0.1", 9] for i in range(10, 26)], [], 0, b""],
    ],
    ids=range(9),
)
def test_a_lying_holder_adds_nothing_and_hides_nothing(lie: object) -> None:
    async def test() -> None:
        async with swarm_of(3) as nodes:
            await nodes[1].announce(KEY, b"honest", 60)
            says(nodes[0], lambda request: lie)
            assert await values(nodes[2]) == [b"honest"]

    on_one_loop(test)


def test_a_holder_that_turns_pages_for_ever_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_lookup, "MAX_PAGES", 20)
    asked: list[bytes] = []

    def endless(request: m.FindRecords) -> m.Page:
        asked.append(request.after)
        public_key = (int.from_bytes(request.after or bytes(32), "big") + 1).to_bytes(32, "big")
        return m.Page(peer(0), [], [WireRecord(public_key, 1, wall_ms() + 1000, b"v", bytes(64))], 5, b"x" * 16)

    async def test() -> None:
        async with swarm_of(2) as nodes:
            says(nodes[0], endless)
            assert await values(nodes[1]) == []
            assert len(asked) == 21
            says(nodes[0], lambda request: m.Page(peer(0), [], [GOOD], 5, b"x" * 16))
            assert await values(nodes[1]) == [b"v"], "the same page again is the last one"

    on_one_loop(test)


def private_nodes(n: int) -> Any:
    swarm = PrivateSwarm(now_s=wall_ms() / 1000)
    return swarm, nodes_of(configs_of([swarm.member(i) for i in range(n)]))


def test_a_publisher_that_we_have_never_met_is_introduced() -> None:
    async def test() -> None:
        swarm, opened = private_nodes(3)
        async with opened as nodes:
            member, stranger = Actor(swarm.member(9), wall_ms), Actor(swarm.stranger(8), wall_ms)
            nodes[1]._proofs.admit(member.trust.public_key, member.trust.chain())
            for holder in nodes[1:]:
                for publisher in (member, stranger):
                    holder.storage.put(KEY, publisher.record(KEY, value=publisher.id))
            assert await values(nodes[0]) == [member.id]
            assert nodes[0].refused["publisher is no member"] == 1
            n_asked = len(nodes[0].protocol.calls.waiting)
            assert await values(nodes[0]) == [member.id]
            assert n_asked == 0
            swarm.revoked.add(member.id)
            assert await values(nodes[0]) == []

    on_one_loop(test)


def test_a_private_swarm_finds_everything() -> None:
    async def test() -> None:
        _, opened = private_nodes(10)
        async with opened as nodes:
            await asyncio.gather(*(node.announce(KEY, b"%d" % i, 60) for i, node in enumerate(nodes)))
            for node in nodes:
                assert await values(node) == [b"%d" % i for i in range(10)]

    on_one_loop(test)


def test_what_expired_at_a_holder_with_a_slow_clock_is_not_believed() -> None:
    async def test() -> None:
        async with swarm_of(2) as nodes:
            slow = RecordStore(lambda: wall_ms() - 20_000, nodes[1]._config.budgets, nodes[1]._proofs.is_genuine)
            nodes[1].protocol.storage = slow
            assert slow.put(KEY, actor(9).record(KEY, life_s=-5))
            assert slow.put(KEY, actor(8).record(KEY, value=b"lives", life_s=5))
            assert await values(nodes[0]) == [b"lives"]

    on_one_loop(test)
