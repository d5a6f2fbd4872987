"""Nodes on one asyncio loop and real loopback sockets: publishing, finding, paging, repeating, leaving."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from dht_swarm import config, endpoint_of, peer, udp_socket

from mpd.daemon.dht_messages import FindRecords, Page, encode, reply_decoders
from mpd.daemon.dht_node import DhtNode, start_node
from mpd.daemon.dht_records import WireRecord

KEY = b"k" * 20
TTL_S = 60.0


def on_one_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(45):
            await test()

    asyncio.run(run())


@asynccontextmanager
async def swarm_of(n: int) -> AsyncIterator[list[DhtNode]]:
    """Run nodes 0 .. n - 1 until each knows enough others; afterwards nothing of them may be left on the loop."""
    socks = [udp_socket() for _ in range(n)]
    nodes = [await start_node(config(i, sock, endpoint_of(socks[0]))) for i, sock in enumerate(socks)]
    try:
        await until(lambda: all(node.status.peers >= min(n - 1, 10) for node in nodes))
        yield nodes
    finally:
        await asyncio.gather(*(node.close() for node in nodes))
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert not any(node.protocol._outstanding for node in nodes)
    assert not any(node.refused["own error"] for node in nodes)


async def until(holds: Callable[[], bool]) -> None:
    loop = asyncio.get_running_loop()
    while not holds():
        later = loop.create_future()
        loop.call_later(0.005, later.set_result, None)
        await later


async def values(node: DhtNode, key: bytes = KEY) -> list[bytes]:
    return sorted(record.value for record in await node.seek(key))


@pytest.mark.parametrize("n", [1, 2, 8])
def test_everyone_finds_everything(n: int) -> None:
    async def test() -> None:
        async with swarm_of(n) as nodes:
            await asyncio.gather(*(node.announce(KEY, b"%d" % i, TTL_S) for i, node in enumerate(nodes)))
            expected = sorted(b"%d" % i for i in range(n))
            assert [await values(node) for node in nodes] == [expected] * n

    on_one_loop(test)


def test_a_few_records_cost_one_request_per_replica() -> None:
    async def test() -> None:
        async with swarm_of(4) as nodes:
            for i, node in enumerate(nodes):
                await node.announce(KEY, bytes([i]) * 120, TTL_S)
            asked: list[Any] = []
            protocol = nodes[0].protocol
            send = protocol._ask
            protocol._ask = lambda *args: asked.append(args) or send(*args)
            assert len(await values(nodes[0])) == 4
            assert len(asked) == 3
            await nodes[0].announce(KEY, b"again", TTL_S)
            assert len(asked) == 6

    on_one_loop(test)


def test_sixty_four_publishers_are_read_page_by_page_and_each_set_once() -> None:
    async def test() -> None:
        async with swarm_of(8) as nodes:
            records = [WireRecord(peer(100 + i), 1, 60_000, bytes([i]) * 120) for i in range(64)]
            for node in nodes:
                for record in records:
                    node.storage.put(KEY, record)
            pages: list[Any] = []
            call = nodes[0].protocol.call_find_records
            nodes[0].protocol.call_find_records = lambda *args: pages.append(args) or call(*args)
            nodes[0].storage = type(nodes[0].storage)(asyncio.get_running_loop().time)
            assert await values(nodes[0]) == sorted(record.value for record in records)
            assert len(pages) < 15, "five first pages, and the rest of one set"

    on_one_loop(test)


def test_different_sets_are_united() -> None:
    async def test() -> None:
        async with swarm_of(4) as nodes:
            records = [WireRecord(peer(100 + i), 1, 60_000, bytes([i]) * 120) for i in range(40)]
            for i, record in enumerate(records):
                nodes[1 + i % 3].storage.put(KEY, record)
            assert await values(nodes[0]) == sorted(record.value for record in records)

    on_one_loop(test)


def test_the_newest_record_of_a_publisher_wins() -> None:
    async def test() -> None:
        async with swarm_of(3) as nodes:
            nodes[1].storage.put(KEY, WireRecord(peer(9), 7, 60_000, b"old"))
            nodes[2].storage.put(KEY, WireRecord(peer(9), 8, 60_000, b"new"))
            assert await values(nodes[0]) == [b"new"]
            nodes[1].storage.put(KEY, WireRecord(peer(9), 9, 60_000, b""))
            assert await values(nodes[0]) == [], "a tombstone beats what others still hold"

    on_one_loop(test)


def test_nobody_tells_us_what_we_say() -> None:
    async def test() -> None:
        async with swarm_of(2) as nodes:
            nodes[1].storage.put(KEY, WireRecord(peer(0), 2**62, 60_000, b"forged"))
            assert await values(nodes[0]) == []
            await nodes[0].announce(KEY, b"true", TTL_S)
            assert await values(nodes[0]) == [b"true"]

    on_one_loop(test)


@pytest.mark.parametrize(
    "lie",
    [
        7,
        [b"short"],
        [peer(0), [], [[peer(9), 1, 1000, bytes(1001)]], 0, b""],
        [peer(0), [], [[b"short", 1, 1000, b"v"]], 0, b""],
        [peer(0), [], [], 1_000_000, b"more?"],
        [peer(0), [], [[peer(9), 1, 0, b"v"]], 7, b""],
        [peer(0), [[peer(i), "127.0.0.1", 9] for i in range(10, 26)], [], 0, b""],
    ],
)
def test_a_lying_holder_adds_nothing_and_hides_nothing(lie: object) -> None:
    async def test() -> None:
        async with swarm_of(3) as nodes:
            await nodes[1].announce(KEY, b"honest", TTL_S)
            liar = nodes[0].protocol
            true_answer = liar._accept_request

            def accept_request(message_id: bytes, body: memoryview, address: Any) -> None:
                if bytes(body[1:14]) == encode("find_records"):
                    liar._send(b"\x01" + message_id + encode(lie), address)
                else:
                    true_answer(message_id, body, address)

            liar._accept_request = accept_request
            assert await values(nodes[2]) == [b"honest"]

    on_one_loop(test)


def test_a_holder_that_repeats_its_page_for_ever_is_left() -> None:
    page = Page(peer(0), [], [WireRecord(peer(9), 1, 1000, b"v")], 5, b"12345678")
    assert reply_decoders[FindRecords].decode(encode(page)) == page

    async def test() -> None:
        async with swarm_of(2) as nodes:
            nodes[0].protocol._answer = lambda request: page
            assert await values(nodes[1]) == [b"v"]

    on_one_loop(test)


def test_a_live_publisher_outlives_its_ttl_and_a_dead_one_does_not() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with swarm_of(3) as nodes:
            await nodes[0].announce(KEY, b"lives", 1.0)
            nodes[1].storage.put(KEY, WireRecord(peer(9), 1, 1000, b"dead"))
            assert await values(nodes[2]) == [b"dead", b"lives"]
            begun = loop.time()
            await until(lambda: loop.time() > begun + 1.2)
            assert await values(nodes[2]) == [b"lives"]

    on_one_loop(test)


def test_an_old_life_is_beaten_by_a_new_one() -> None:
    async def test() -> None:
        async with swarm_of(2) as nodes:
            sock = udp_socket()
            first = await start_node(config(7, sock, *nodes[0]._config.bootstrap))
            await until(lambda: first.status.peers == 2)
            await first.announce(KEY, b"first life", TTL_S)
            first._own.clear()  # it dies without a goodbye
            await first.close()
            second = await start_node(config(7, udp_socket(), *nodes[0]._config.bootstrap))
            await until(lambda: second.status.peers == 2)
            await second.announce(KEY, b"second life", TTL_S)
            assert await values(nodes[1]) == [b"second life"]
            await second.close()

    on_one_loop(test)


def test_who_joins_between_us_and_the_key_is_given_the_record() -> None:
    async def test() -> None:
        async with swarm_of(2) as nodes:
            await nodes[0].announce(KEY, b"v", TTL_S)
            late = await start_node(config(5, udp_socket(), *nodes[0]._config.bootstrap))
            await until(lambda: bool(late.storage.records(KEY)))
            await late.close()

    on_one_loop(test)


def test_a_withdrawn_record_is_not_published_again() -> None:
    async def test() -> None:
        async with swarm_of(3) as nodes:
            await asyncio.gather(
                nodes[0].announce(KEY, b"v", TTL_S), nodes[0].announce(KEY, b"w", TTL_S), nodes[0].withdraw(KEY)
            )
            nodes[0]._settle()
            assert await values(nodes[1]) == []
            assert not nodes[0]._own

    on_one_loop(test)


def test_goodbye_takes_records_and_contacts_away_at_once() -> None:
    async def test() -> None:
        async with swarm_of(3) as nodes:
            leaver = await start_node(config(7, udp_socket(), *nodes[0]._config.bootstrap))
            await until(lambda: all(node.status.peers == 3 for node in (*nodes, leaver)))
            await leaver.announce(KEY, b"v", TTL_S)
            await leaver.close()
            await until(lambda: all(node.status.peers == 2 for node in nodes))
            assert await values(nodes[0]) == []

    on_one_loop(test)


def test_the_dead_delay_nobody_for_long() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with swarm_of(4) as nodes:
            await nodes[0].announce(KEY, b"v", TTL_S)
            nodes[3].transport.close()  # as good as dead
            begun = loop.time()
            assert await values(nodes[1]) == [b"v"]
            assert loop.time() - begun < 0.8
            await until(lambda: nodes[1].status.peers == 2)

    on_one_loop(test)


def test_a_large_swarm_finds_from_anywhere() -> None:
    async def test() -> None:
        rng = random.Random(4)
        async with swarm_of(32) as nodes:
            keys = [rng.randbytes(20) for _ in range(30)]
            for i, key in enumerate(keys):
                await nodes[i % 32].announce(key, b"%d" % i, TTL_S)
            for i, key in enumerate(keys):
                assert await values(nodes[(7 * i + 3) % 32], key) == [b"%d" % i]

    on_one_loop(test)
