"""What averaging costs beside what is averaged: training that goes on meanwhile, and the daemon's memory."""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import facts
from rounds import measure_round
from swarm import Peers, children, start_daemon, start_daemons, start_mpd, trainers

OVERLAP_PEERS = 2  # a core each
OVERLAP_ELEMS = 1 << 19  # 2 MiB: such a round takes less than 2% of the window's processor time
WINDOW_S = 3.0
PAIRS = 8
MEMORY_PEERS, MEMORY_MIB, MEMORY_ROUNDS = 4, 256, 4


def overlap() -> dict[str, Any]:
    """Let trainers train for a while, in turns with and without one round behind it; compare what they got done."""
    with tempfile.TemporaryDirectory(prefix="mpd-") as folder, children() as started:
        peers = start_mpd(Path(folder), OVERLAP_PEERS, started)
        peers.ask("open", run="train", variant="copies", n_elems=OVERLAP_ELEMS, group_size=OVERLAP_PEERS)
        for average in (True, False, True):
            _train(peers, average)
        pairs = []
        for number in range(PAIRS):
            order = (False, True) if number % 2 == 0 else (True, False)
            pair = {average: _train(peers, average) for average in order}
            pairs.append(pair)
    slowdowns = [1 - pair[True]["iterations"] / pair[False]["iterations"] for pair in pairs]
    return {
        "slowdown": statistics.median(slowdowns),
        "slowdown_min": min(slowdowns),
        "slowdown_max": max(slowdowns),
        "round_cpu_part": statistics.median(pair[True]["cpu_s"] for pair in pairs) / (WINDOW_S * _cores()),
        "failed": sum(pair[True]["failed"] for pair in pairs),
        "window_s": WINDOW_S,
    }


def _train(peers: Peers, average: bool) -> dict[str, Any]:
    """Train for one window; return the iterations of all, and the CPU seconds of the daemons."""
    before = facts.cpu_s(peers.daemon_sessions)
    answers = peers.ask("train", run="train", at=time.monotonic() + 0.05, seconds=WINDOW_S, average=average)
    return {
        "iterations": sum(answer["iterations"] for answer in answers),
        "failed": sum(not answer["averaged"] for answer in answers) if average else 0,
        "cpu_s": facts.cpu_s(peers.daemon_sessions) - before,
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def memory() -> dict[str, Any]:
    """Return the daemon's peak memory in rounds of large vectors, beyond two regions and what it holds without runs."""
    with tempfile.TemporaryDirectory(prefix="mpd-") as folder, children() as started:
        alone = start_daemon(Path(folder), MEMORY_PEERS, started)
        idle = facts.resident_mib(alone.child.pid)
        daemons = start_daemons(Path(folder), MEMORY_PEERS, started)
        peers = trainers(Path(folder), daemons, started)
        n_elems = MEMORY_MIB * facts.MIB // 4
        peers.ask("open", run="memory", variant="adopt", n_elems=n_elems, group_size=MEMORY_PEERS)
        rounds = [measure_round(peers, "memory") for _ in range(MEMORY_ROUNDS)]
        peaks = [facts.peak_mib(daemon.child.pid) for daemon in daemons]
    return {
        "beyond_mib": max(peaks) - 2 * MEMORY_MIB - idle,
        "peak_mib": max(peaks),
        "idle_mib": idle,
        "failed": sum(bool(one["errors"]) for one in rounds),
    }
