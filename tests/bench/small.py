"""The small figures of a daemon: how fast a warm group forms, and what it costs while nothing happens."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import facts
from swarm import Peers, children, start_daemon, start_daemons, start_mpd

FORMATION_ELEMS = 256  # 1 KiB of float32: nothing but finding each other takes time
WARM_UP_ROUNDS = 5
STARTS = 5
SETTLE_S = 3.0
IDLE_S = 5.0


def formation(n_peers: int, group_size: int, n_rounds: int) -> dict[str, Any]:
    """Measure steps of a 1 KiB vector, from the common beginning to each peer's result."""
    with tempfile.TemporaryDirectory(prefix="mpd-") as folder, children() as started:
        peers = start_mpd(Path(folder), n_peers, started)
        peers.ask("open", run="formation", variant="numpy", n_elems=FORMATION_ELEMS, group_size=group_size)
        for _ in range(WARM_UP_ROUNDS):
            form(peers)
        cpu_s = facts.cpu_s(peers.daemon_sessions)
        steps = [step for _ in range(n_rounds) for step in form(peers)]
        cpu_s = (facts.cpu_s(peers.daemon_sessions) - cpu_s) / len(steps)
    worked = [step["seconds"] for step in steps if "error" not in step]
    return {
        "peers": n_peers,
        "group_size": group_size,
        "rounds": n_rounds,
        "cpu_s": cpu_s,
        "steps": len(steps),
        "failed": len(steps) - len(worked),
        "first_error": next((step["error"] for step in steps if "error" in step), ""),
        "contributors": statistics.mean(step["contributors"] for step in steps),
        "median_s": statistics.median(worked) if worked else None,
        "p95_s": statistics.quantiles(worked, n=20)[-1] if len(worked) > 1 else None,
    }


def form(peers: Peers) -> list[dict[str, Any]]:
    """Let every peer average once and return their answers."""
    return peers.ask("step", run="formation", at=time.monotonic() + 0.05)


def footprint() -> dict[str, Any]:
    """Measure start-up of one daemon, then memory and CPU time of four that know each other and have no run."""
    starts: list[float] = []
    for _ in range(STARTS):
        with tempfile.TemporaryDirectory(prefix="mpd-") as folder, children() as started:
            starts.append(start_daemon(Path(folder), 0, started).started_s)
    with tempfile.TemporaryDirectory(prefix="mpd-") as folder, children() as started:
        pids = [daemon.child.pid for daemon in start_daemons(Path(folder), 4, started)]
        time.sleep(SETTLE_S)
        before = facts.cpu_s(set(pids))
        time.sleep(IDLE_S)
        idle_cpu_s = facts.cpu_s(set(pids)) - before
        resident = [facts.resident_mib(pid) for pid in pids]
    return {
        "start_median_s": statistics.median(starts),
        "start_max_s": max(starts),
        "resident_mib": statistics.median(resident),
        "idle_cpu_percent": 100 * idle_cpu_s / IDLE_S / len(pids),
    }
