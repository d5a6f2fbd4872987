"""The DHT as the daemon uses it: from trio, in its thread, over real loopback sockets."""

import random
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from dht_swarm import (
    config,
    endpoint_of,
    eventually,
    eventually_async,
    everyone_knows_everyone,
    open_swarm,
    udp_socket,
)

from mpd.daemon.dht import Dht, open_dht
from mpd.errors import LocalError
from mpd.ids import Endpoint

KEY = b"k" * 20


async def values(dht: Dht, key: bytes = KEY) -> list[bytes]:
    return sorted(record.value for record in await dht.seek(key))


def free_port() -> int:
    """Return a port that nobody has at the moment."""
    with udp_socket() as sock:
        return endpoint_of(sock).port


async def test_a_node_alone_serves_itself() -> None:
    async with open_dht(config(0, udp_socket())) as dht:
        await dht.announce(KEY, b"v", 60)
        assert await values(dht) == [b"v"]
        await dht.withdraw(KEY)
        assert await values(dht) == []
        assert dht.snapshot().peers == 0


async def test_eight_join_and_announce_at_once_and_everything_is_found() -> None:
    async with open_swarm(2) as first:
        await everyone_knows_everyone(first)
        bootstrap = endpoint_of(first[0]._node._config.sock)
        async with trio.open_nursery() as nursery:
            late: list[Dht] = []
            enough = trio.Event()

            async def join(i: int) -> None:
                async with open_dht(config(i, udp_socket(), bootstrap)) as dht:
                    late.append(dht)
                    await dht.announce(KEY, b"%d" % i, 60)
                    await enough.wait()

            for i, dht in enumerate(first):
                nursery.start_soon(dht.announce, KEY, b"%d" % i, 60)
            for i in range(2, 8):
                nursery.start_soon(join, i)
            await eventually(lambda: len(late) == 6)
            swarm = first + late
            await everyone_knows_everyone(swarm)
            expected = [b"%d" % i for i in range(8)]
            with trio.fail_after(1.5):

                async def all_found() -> bool:
                    return all([await values(dht) == expected for dht in swarm])

                await eventually_async(all_found)
            enough.set()


async def test_junk_datagrams_leave_a_node_alive() -> None:
    rng = random.Random(3)
    async with open_swarm(2) as (first, second):
        await everyone_knows_everyone([first, second])
        to = first._node._config.sock.getsockname()
        with udp_socket() as stranger:
            for datagram in (bytes(22), bytes(24), b"\x00" + bytes(20) + b"\xc1\xc1\xc1"):
                stranger.sendto(datagram, to)
            for _ in range(300):
                stranger.sendto(rng.randbytes(rng.randint(0, 60)), to)
            await first.announce(KEY, b"v", 60)
            await eventually(lambda: sum(first.refused().values()) >= 100)
        assert await values(second) == [b"v"]
        assert first.refused().get("own error", 0) == 0


async def test_a_dead_bootstrap_is_said_and_found_when_it_appears() -> None:
    port = free_port()
    async with open_dht(config(1, udp_socket(), Endpoint("127.0.0.1", port), Endpoint("no.such.invalid", 1))) as dht:
        await dht.announce(KEY, b"early", 60)
        await eventually(lambda: dht.snapshot().calls > 0)
        await eventually(lambda: dht.snapshot().calls == 0)
        await eventually(lambda: "not asked yet" not in dict(dht.snapshot().bootstrap).values())
        states = dict(dht.snapshot().bootstrap)
        assert states[f"127.0.0.1:{port}"] == "unreachable: no answer"
        assert states["no.such.invalid:1"].startswith("cannot resolve name: ")
        async with open_dht(config(2, udp_socket(port))) as bootstrap:

            async def found() -> bool:
                return await values(bootstrap) == [b"early"]

            await eventually_async(found)
            await eventually(lambda: dict(dht.snapshot().bootstrap)[f"127.0.0.1:{port}"].startswith("connected"))


async def test_a_host_name_will_do() -> None:
    sock = udp_socket()
    async with open_dht(config(0, sock)):
        named = Endpoint("localhost", endpoint_of(sock).port)
        async with open_dht(config(1, udp_socket(), named)) as dht:
            await eventually(lambda: dht.snapshot().peers == 1)


async def test_our_own_address_and_a_duplicate_are_harmless() -> None:
    own, other = udp_socket(), udp_socket()
    async with open_dht(config(0, other)):
        entries = (
            endpoint_of(own),
            endpoint_of(other),
            endpoint_of(other),
            Endpoint("localhost", other.getsockname()[1]),
        )
        async with open_dht(config(1, own, *entries)) as dht:
            await eventually(lambda: dht.snapshot().peers == 1)
            await eventually(lambda: dict(dht.snapshot().bootstrap)[str(endpoint_of(own))] == "this is our own address")
            assert len(dht.snapshot().bootstrap) == 3


async def test_a_restart_needs_no_bootstrap(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    sock = udp_socket()
    async with open_dht(config(0, sock)) as stays:
        async with open_dht(replace(config(1, udp_socket(), endpoint_of(sock)), known_peers_file=path)) as dht:
            await eventually(lambda: dht.snapshot().peers == 1)
        async with open_dht(replace(config(1, udp_socket()), known_peers_file=path)) as dht:
            await eventually(lambda: dht.snapshot().peers == 1 == stays.snapshot().peers)
            assert dht.snapshot().problem == ""


async def test_a_junk_file_of_known_peers_is_a_problem_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    path.write_text("junk")
    async with open_dht(replace(config(1, udp_socket()), known_peers_file=path)) as dht:
        assert "known peers not read" in dht.snapshot().problem
        await dht.announce(KEY, b"v", 60)
        assert await values(dht) == [b"v"]


async def test_a_seek_that_is_cancelled_midway_harms_nothing() -> None:
    async with open_swarm(3) as swarm:
        await everyone_knows_everyone(swarm)
        await swarm[0].announce(KEY, b"v", 60)
        for i in range(50):
            with trio.move_on_after(i * 2e-5):
                await swarm[1].seek(KEY)
                await swarm[2].announce(KEY, b"w", 60)
        assert b"v" in await values(swarm[1])
        await swarm[2].withdraw(KEY)
        assert await values(swarm[1]) == [b"v"]
        assert all("own error" not in dht.refused() for dht in swarm)


async def test_closing_leaves_no_thread_and_no_socket() -> None:
    sock = udp_socket()
    async with open_dht(config(0, sock)) as dht:
        assert "mpd-dht" in {thread.name for thread in threading.enumerate()}
        await dht.announce(KEY, b"v", 60)
    assert "mpd-dht" not in {thread.name for thread in threading.enumerate()}
    assert sock.fileno() == -1
    with pytest.raises(LocalError, match="closed"):
        await dht.seek(KEY)
    assert dht.snapshot().peers == 0


async def test_it_closes_when_the_block_is_cancelled_or_raises() -> None:
    with trio.CancelScope() as scope:
        async with open_dht(config(0, udp_socket())):
            scope.cancel()
            await trio.sleep_forever()
    with pytest.raises(ZeroDivisionError):
        async with open_dht(config(0, udp_socket())):
            raise ZeroDivisionError
    assert "mpd-dht" not in {thread.name for thread in threading.enumerate()}


async def test_ipv6_works_too() -> None:
    def v6_socket() -> socket.socket:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.bind(("::1", 0))
        return sock

    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    first, second = v6_socket(), v6_socket()
    async with open_dht(config(0, first)) as one, open_dht(config(1, second, endpoint_of(first))) as other:
        await eventually(lambda: one.snapshot().peers == other.snapshot().peers == 1)
        await one.announce(KEY, b"v", 60)
        assert await values(other) == [b"v"]
