"""Many daemons on one machine: steady rounds in groups, and a DHT with hundreds of nodes.

All of it shares this machine's cores, so seconds say little about machines of their own; what a daemon costs does:
CPU seconds per daemon and step, resident memory, messages and bytes. docs/performance.md extrapolates from these.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import facts
from swarm import Peers, children, start_daemons, trainers

SCALE_DAEMONS = 64
GROUP_SIZE = 8
N_ELEMS = 1 << 18  # 1 MiB of float32
WARM_UP_ROUNDS = 24  # nearly everybody has met everybody: the first time costs a handshake
IDLE_S = 10.0


def many(n: int, group_size: int, n_rounds: int) -> dict[str, Any]:
    """Let `n` daemons average in groups for `n_rounds`; return what failed and what each daemon costs."""
    with tempfile.TemporaryDirectory(prefix="mpd-") as folder, children() as started:
        daemons = start_daemons(Path(folder), n, started)
        pids = [daemon.child.pid for daemon in daemons]
        resident_idle = [facts.resident_mib(pid) for pid in pids]
        before, began = facts.cpu_s(set(pids)), time.monotonic()
        time.sleep(IDLE_S)
        idle_cpu = (facts.cpu_s(set(pids)) - before) / (time.monotonic() - began) / n
        peers = trainers(Path(folder), daemons, started)
        peers.ask("open", run="scale", variant="numpy", n_elems=N_ELEMS, group_size=group_size)
        steps = [_step(peers) for _ in range(WARM_UP_ROUNDS)]
        before = facts.cpu_s(set(pids))
        steady = [_step(peers) for _ in range(n_rounds)]
        cpu = (facts.cpu_s(set(pids)) - before) / n / n_rounds
        resident = [facts.resident_mib(pid) for pid in pids]
        dht_peers = [daemon.status()["dht"]["peers"] for daemon in daemons]
    answers = [answer for step in steady for answer in step]
    errors = [answer["error"] for answer in answers if "error" in answer]
    worked = [answer for answer in answers if "error" not in answer]
    return {
        "daemons": n,
        "group_size": group_size,
        "rounds": n_rounds,
        "steps": len(answers),
        "failed": len(errors),
        "first_error": errors[0] if errors else "",
        "failed_warming_up": sum("error" in answer for step in steps for answer in step),
        "contributors": statistics.mean(answer["contributors"] for answer in answers),
        "median_s": statistics.median(answer["seconds"] for answer in worked) if worked else None,
        "bytes_sent": statistics.mean(answer["bytes_sent"] for answer in answers),
        "cpu_s_per_step": cpu,
        "idle_cpu_percent": 100 * idle_cpu,
        "resident_mib": statistics.median(resident),
        "resident_idle_mib": statistics.median(resident_idle),
        "dht_peers": statistics.median(dht_peers),
    }


def _step(peers: Peers) -> list[dict[str, Any]]:
    return peers.ask("step", run="scale", at=time.monotonic() + 0.2)
