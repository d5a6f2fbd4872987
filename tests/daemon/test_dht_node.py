"""Nodes on one asyncio loop and real loopback sockets: joining, leaving, dying, and what the status says of it."""

import asyncio
import random
from typing import Any

import pytest
from dht_swarm import (
    NOW_MS,
    Clock,
    PrivateSwarm,
    config,
    configs_of,
    endpoint_of,
    nodes_of,
    on_one_loop,
    open_trust,
    udp_socket,
    until,
)

from mpd.daemon import dht_node
from mpd.daemon.dht_node import DhtNode, start_node
from mpd.ids import Endpoint

KEY = b"k" * 20
TTL_S = 60.0


def swarm_of(n: int) -> Any:
    return nodes_of(configs_of([open_trust(i) for i in range(n)]))


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


def test_bootstraps_that_lead_nowhere_are_a_problem_until_somebody_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_node, "WATCH_S", 0.01)

    async def test() -> None:
        with udp_socket() as sock:
            dead = endpoint_of(sock)
        entries = (dead, Endpoint("no.such.invalid", 1))
        node = await start_node(config(1, udp_socket(), *entries))
        await until(lambda: bool(node.status.problem))
        assert node.status.problem.startswith("no bootstrap address answers: check that")
        friend = await start_node(config(2, udp_socket(), endpoint_of(node._config.sock)))
        await until(lambda: node.status.peers == 1 and not node.status.problem)
        await friend.close()
        await until(lambda: node.status.peers == 0 and bool(node.status.problem))
        await node.close()

    on_one_loop(test)


def test_a_node_without_bootstraps_or_with_its_own_has_no_problem() -> None:
    async def test() -> None:
        for has_bootstrap in (False, True):
            sock = udp_socket()
            node = await start_node(config(1, sock, *([endpoint_of(sock)] * has_bootstrap)))
            states = ["this is our own address"] * has_bootstrap
            while list(dict(node.status.bootstrap).values()) != states:
                await node.protocol.ping(endpoint_address(node))
            assert node.status.problem == ""
            await node.close()

    on_one_loop(test)


def test_a_wrong_clock_is_said_where_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_node, "WATCH_S", 0.01)

    async def test() -> None:
        one = await start_node(config(1, udp_socket()))
        configs = configs_of([open_trust(2)], lambda: dht_node.wall_ms() - 120_000)
        other = await start_node(configs[0])
        other.protocol.ping(endpoint_address(one))
        await until(lambda: bool(one.status.problem))
        assert one.status.problem in {
            f"the clock of {endpoint_of(other._config.sock)} and this machine's differ by {apart} s: set the wrong one"
            for apart in (120, 121)
        }
        assert one.status.peers == 0
        await other.close()
        await one.close()

    on_one_loop(test)


def endpoint_address(node: DhtNode) -> tuple[str, int]:
    address: tuple[str, int] = node._config.sock.getsockname()
    return address


def test_a_revoked_member_is_dropped_while_everything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_node, "WATCH_S", 0.01)

    async def test() -> None:
        swarm = PrivateSwarm(now_s=dht_node.wall_ms() / 1000)
        async with nodes_of(configs_of([swarm.member(i) for i in range(4)])) as nodes:
            await nodes[3].announce(KEY, b"v", TTL_S)
            assert await values(nodes[0]) == [b"v"]
            swarm.revoked.add(nodes[3].node.id)
            await until(lambda: all(node.status.peers == 2 for node in nodes[:3]))
            assert await values(nodes[0]) == []
            swarm.keys = (b"new" + bytes(29),)  # everybody but the revoked would have it
            await nodes[0].announce(KEY, b"w", TTL_S)
            assert await values(nodes[1]) == [b"w"]

    on_one_loop(test)


def test_a_member_of_another_swarm_finds_nobody() -> None:
    async def test() -> None:
        swarm, other = PrivateSwarm(now_s=dht_node.wall_ms() / 1000), PrivateSwarm(now_s=dht_node.wall_ms() / 1000)
        other.keys = (b"o" * 32,)
        async with nodes_of(configs_of([swarm.member(0), swarm.member(1)])) as nodes:
            stranger = await start_node(configs_of([other.member(2)])[0])
            assert await stranger.protocol.ping(endpoint_address(nodes[0])) is None
            assert nodes[0].refused["mac"] >= 1
            await stranger.close()

    on_one_loop(test)


def test_time_is_the_clock_that_was_given() -> None:
    async def test() -> None:
        clock = Clock(NOW_MS)
        async with nodes_of(configs_of([open_trust(i) for i in range(2)], clock)) as nodes:
            await nodes[0].announce(KEY, b"v", TTL_S)
            clock.now += 40_000
            (record,) = await nodes[1].seek(KEY)
            assert record.expires_in_s == 20
            assert nodes[1].refused["time"] == 0

    on_one_loop(test)
