"""Publishing among real nodes on one loop: renewing, replacing, withdrawing, and never going backwards."""

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest
from dht_swarm import (
    NOW_MS,
    Clock,
    Stage,
    config,
    configs_of,
    nodes_of,
    on_one_loop,
    open_trust,
    play,
    udp_socket,
    until,
)

from mpd.daemon import dht_calls
from mpd.daemon.dht_node import DhtNode, start_node
from mpd.daemon.dht_publish import Publisher
from mpd.daemon.dht_records import WireRecord

KEY = b"k" * 20
TTL_S = 60.0


def swarm_of(n: int) -> Any:
    return nodes_of(configs_of([open_trust(i) for i in range(n)]))


async def values(node: DhtNode, key: bytes = KEY) -> list[bytes]:
    return sorted(record.value for record in await node.seek(key))


def held(node: DhtNode) -> WireRecord:
    (record,) = node.storage.records(KEY)
    return record


def test_a_live_publisher_outlives_its_ttl() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with swarm_of(3) as nodes:
            await nodes[0].announce(KEY, b"lives", 1.0)
            first = held(nodes[1])
            begun = loop.time()
            await until(lambda: loop.time() > begun + 1.2)
            assert await values(nodes[2]) == [b"lives"]
            assert held(nodes[1]).seq > first.seq
            assert held(nodes[1]).expires_at_ms > first.expires_at_ms

    on_one_loop(test)


def test_a_dead_one_does_not() -> None:
    async def test() -> None:
        clock = Clock(NOW_MS)
        async with nodes_of(configs_of([open_trust(i) for i in range(3)], clock)) as nodes:
            await nodes[0].announce(KEY, b"dies", 60)
            await nodes[0].protocol.contacts.close()
            nodes[0].transport.close()
            assert await values(nodes[2]) == [b"dies"]
            clock.now += 60_000
            assert await values(nodes[2]) == []

    on_one_loop(test)


def test_an_old_life_is_beaten_by_a_new_one() -> None:
    async def test() -> None:
        async with swarm_of(2) as nodes:
            bootstrap = nodes[0]._config.bootstrap
            first = await start_node(config(7, udp_socket(), *bootstrap))
            await until(lambda: first.status.peers == 2)
            await first.announce(KEY, b"first life", TTL_S)
            first._publisher._own.clear()  # it dies without a goodbye
            await first.close()
            second = await start_node(config(7, udp_socket(), *bootstrap))
            await until(lambda: second.status.peers == 2)
            await second.announce(KEY, b"second life", TTL_S)
            assert await values(nodes[1]) == [b"second life"]
            await second.close()

    on_one_loop(test)


def test_a_shorter_life_is_announced_and_withdrawn_all_the_same() -> None:
    async def test() -> None:
        async with swarm_of(3) as nodes:
            for value, ttl_s in ((b"long", 600), (b"short", 1), (b"again", 60)):
                await nodes[0].announce(KEY, value, ttl_s)
                assert await values(nodes[1]) == [value]
            await nodes[0].withdraw(KEY)
            assert await values(nodes[1]) == []
            await nodes[0].announce(KEY, b"back", 5)
            assert await values(nodes[1]) == [b"back"]

    on_one_loop(test)


def test_a_withdrawn_record_is_not_published_again() -> None:
    async def test() -> None:
        async with swarm_of(3) as nodes:
            await asyncio.gather(
                nodes[0].announce(KEY, b"v", TTL_S), nodes[0].announce(KEY, b"w", TTL_S), nodes[0].withdraw(KEY)
            )
            nodes[0]._settle()
            assert await values(nodes[1]) == []
            assert nodes[0]._publisher.record(KEY) is None

    on_one_loop(test)


def test_a_holder_that_has_died_does_not_hold_up_a_withdrawal(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with swarm_of(3) as nodes:
            await nodes[0].announce(KEY, b"v", TTL_S)
            nodes[2].protocol.transport.abort()
            monkeypatch.setattr(dht_calls, "REQUEST_TIMEOUT_S", 3600.0)
            await nodes[0].withdraw(KEY)
            assert await values(nodes[1]) == []

    on_one_loop(test)


def test_who_joins_between_us_and_the_key_is_given_the_record() -> None:
    async def test() -> None:
        async with swarm_of(2) as nodes:
            await nodes[0].announce(KEY, b"v", TTL_S)
            late = await start_node(config(5, udp_socket(), *nodes[0]._config.bootstrap))
            await until(lambda: bool(late.storage.records(KEY)))
            await late.close()

    on_one_loop(test)


def test_numbers_and_expiries_rise_whatever_the_clock_does() -> None:
    async def scene(stage: Stage) -> None:
        works: list[Coroutine[Any, Any, None]] = []
        publisher = Publisher(stage.protocol, stage.proofs, stage.wall, 5, random.Random(1), works.append)
        seen = []
        for step_ms in (0, 5000, -90_000, 0, 1):
            stage.wall.now += step_ms
            await publisher.announce(KEY, b"v", 60)
            record = publisher.record(KEY)
            assert record is not None
            seen.append((record.seq, record.expires_at_ms))
        assert seen == sorted(set(seen))
        assert len({expiry for _, expiry in seen}) == len(seen)
        for i in range(100):
            stage.wall.now += 10_000
            await publisher.announce(bytes([i]) * 20, b"v", 60)
            await publisher.withdraw(bytes([i]) * 20)
        assert len(publisher._expiries) <= 13, "what has expired is not remembered"
        await publisher.withdraw_all()
        assert publisher.record(KEY) is None

    play(scene)
