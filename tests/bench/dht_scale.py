"""What a DHT of many nodes costs each of them: the nodes are real, network and clock are not (tests/dht_virtual.py).

No sockets and no waiting, so hundreds of nodes fit into one process: datagrams and bytes are those of the protocol, and
CPU seconds those of its Python and cryptography.
"""

import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from dht_swarm import open_trust, peer
from dht_virtual import FakeSocket, VirtualLoop, run_virtual

from mpd.daemon.dht_gate import Address
from mpd.daemon.dht_node import DhtConfig, DhtNode, start_node
from mpd.ids import Endpoint

FIRST_PORT = 1000
DHT_SIZES = (16, 64, 256)
TTL_S = 60.0  # of what daemons announce
SETTLE_S = 10.0
IDLE_S = 30.0
LOOKUPS = 32
UDP_IP_BYTES = 28  # IPv4 and UDP headers of a datagram


class CountingLoop(VirtualLoop):
    """Counts what passes."""

    datagrams = 0
    n_bytes = 0

    def deliver(self, datagram: bytes, sender: Address, receiver: Address) -> None:
        self.datagrams += 1
        self.n_bytes += len(datagram) + UDP_IP_BYTES
        super().deliver(datagram, sender, receiver)


def dht_of(n: int, seed: int = 1) -> dict[str, Any]:
    """Return what `n` nodes pay for being there, and for announcing and seeking."""
    found: dict[str, Any] = {"nodes": n}

    async def measure(loop: VirtualLoop) -> None:
        assert isinstance(loop, CountingLoop)
        rng = random.Random(seed)
        nodes: list[DhtNode] = []
        for number in range(n):
            known = rng.sample(range(number), min(3, number))
            boots = tuple(Endpoint("127.0.0.1", FIRST_PORT + i) for i in known)
            sock: Any = FakeSocket(loop, FIRST_PORT + number)
            config = DhtConfig(open_trust(number), sock, boots, wall_ms=loop.wall_ms, rng=random.Random(number))
            nodes.append(await start_node(config))
        await loop.pass_time(SETTLE_S)
        found["join"] = {"datagrams": loop.datagrams / n, "bytes": loop.n_bytes / n}
        asking = rng.sample(range(n), min(n, LOOKUPS))
        askers = [rng.choice(nodes) for _ in asking]
        for how in ("first ", ""):  # to meet many strangers at once is dear; from then on they are known
            announcing = [nodes[i].announce(_key(i), b"%d" % i, TTL_S) for i in asking]
            found[how + "announce"], _ = await _each(loop, announcing)
            seeking = [asker.seek(_key(i)) for asker, i in zip(askers, asking, strict=True)]
            found[how + "seek"], results = await _each(loop, seeking)
            await loop.pass_time(SETTLE_S)
        published = zip(asking, results, strict=True)
        found["found"] = sum(any(record.publisher == peer(i) for record in records) for i, records in published)
        found["sought"] = len(asking)
        await loop.pass_time(TTL_S)  # what was announced has expired
        before, began = (loop.datagrams, loop.n_bytes), time.process_time()
        await loop.pass_time(IDLE_S)
        found["idle"] = {
            "datagrams_per_s": (loop.datagrams - before[0]) / n / IDLE_S,
            "bytes_per_s": (loop.n_bytes - before[1]) / n / IDLE_S,
            "cpu_percent": 100 * (time.process_time() - began) / n / IDLE_S,
        }
        found["contacts"] = statistics.median(node.status.peers for node in nodes)
        for node in nodes:
            await node.close()

    run_virtual(measure, seed, CountingLoop)
    return found


async def _each(loop: CountingLoop, works: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """Do each of the `works` alone; return what one takes, of all nodes together and in seconds, and their results."""
    results, seconds = [], []
    before, began = (loop.datagrams, loop.n_bytes), time.process_time()
    for work in works:
        at = loop.time()
        results.append(await work)
        seconds.append(loop.time() - at)
    costs = {
        "datagrams": (loop.datagrams - before[0]) / len(works),
        "bytes": (loop.n_bytes - before[1]) / len(works),
        "cpu_s": (time.process_time() - began) / len(works),
        "median_s": statistics.median(seconds),
    }
    return costs, results


def _key(number: int) -> bytes:
    return peer(10_000 + number)
