"""One question by UDP: a node of the swarm answers it, nobody else does, and nobody remembers who asked."""

import socket

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from dht_swarm import endpoint_of, open_swarm

from mpd.daemon.dht_gate import OpenTrust
from mpd.daemon.dht_node import wall_ms
from mpd.daemon.dht_probe import ANSWER_S, answers_by_udp
from mpd.ids import Endpoint

STRANGER = OpenTrust(Ed25519PrivateKey.generate())


async def test_a_node_of_the_swarm_answers_and_forgets() -> None:
    async with open_swarm(1) as (node,):
        there = endpoint_of(node._node._config.sock)
        assert await answers_by_udp(there, node._node._config.trust, wall_ms)
        assert node.snapshot().peers == 0
        assert node.snapshot().bootstrap[0][0] == str(there)


async def test_who_has_another_clock_hears_nothing() -> None:
    async with open_swarm(1) as (node,):
        there = endpoint_of(node._node._config.sock)
        assert not await answers_by_udp(there, node._node._config.trust, lambda: wall_ms() + 120_000)


async def test_nobody_and_nonsense_are_no_answer() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        began = trio.current_time()
        assert not await answers_by_udp(Endpoint(*silent.getsockname()), STRANGER, wall_ms)
        assert trio.current_time() - began <= 2 * ANSWER_S
    assert not await answers_by_udp(Endpoint("127.0.0.1", 1), STRANGER, wall_ms)
