"""What mpd costs one peer in swarms that no machine can hold: on paper, from what was measured in smaller ones.

    python tests/bench/costs.py build/bench/FILE.json

Nothing is fitted that could be computed. The grid, its axes and groups are those of `mpd.grid.fit`. A round moves
2 (1 - 1/M) vectors each way, whatever the swarm's size. What a node of the DHT pays is what it paid in the largest one
measured, and for each doubling beyond that one more hop: `ALPHA` requests, their answers, and one round trip. That is
more than Kademlia needs, which gains several bits a hop. A step of d rounds announces and seeks d times.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from mpd.grid import fit

ALPHA = 3
ROUND_TRIP_S = 0.06  # mean of tests/dht_virtual.py: 10 to 50 ms each way
SWARMS = (1_000, 10_000, 100_000, 1_000_000)
GROUP_SIZE = 16


def cost(n: int, dht: dict[str, Any], group_size: int = GROUP_SIZE) -> dict[str, float | str]:
    """Return what one peer of `n` pays for an exact mean; `dht` is a measurement of `dht_scale.dht_of`."""
    shape = fit(n, group_size)
    lines = [n * m / math.prod(shape) for m in shape]  # peers in a group, on each axis
    vectors = sum(2 * (1 - 1 / line) for line in lines)
    hops = max(0.0, math.log2(n / dht["nodes"]))
    one = {what: dht[what]["datagrams"] + 2 * ALPHA * hops for what in ("announce", "seek")}
    size = (dht["announce"]["bytes"] + dht["seek"]["bytes"]) / (dht["announce"]["datagrams"] + dht["seek"]["datagrams"])
    return {
        "peers": n,
        "shape": "x".join(map(str, shape)),
        "group": max(lines),
        "rounds": len(shape),
        "vectors_each_way": vectors,
        "datagrams": len(shape) * sum(one.values()),
        "dht_bytes": len(shape) * sum(one.values()) * size,
        "seek_s": dht["seek"]["median_s"] + hops * ROUND_TRIP_S,
        "idle_bytes_per_s": dht["idle"]["bytes_per_s"] * max(1.0, math.log2(n) / math.log2(dht["nodes"])),
    }


def table(dht: dict[str, Any]) -> str:
    """Return the costs as a table for docs/performance.md."""
    lines = [
        "| peers | grid | rounds | vectors each way | DHT datagrams | DHT KiB | a lookup, s | idle, bytes/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in (cost(n, dht) for n in SWARMS):
        lines.append(
            f"| {one['peers']:,} | {one['shape']} | {one['rounds']} | {one['vectors_each_way']:.2f} | "
            f"{one['datagrams']:.0f} | {one['dht_bytes'] / 1024:.0f} | {one['seek_s']:.2f} | "
            f"{one['idle_bytes_per_s']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    measured = json.loads(Path(sys.argv[1]).read_text())["dht"]
    print(table(max(measured, key=lambda one: one["nodes"])))
