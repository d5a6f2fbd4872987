"""Thousands of small rounds: whatever a daemon holds at the end, it held at the beginning.

Strategy: four daemons average 64 KiB again and again. What they hold (descriptors, threads, tasks, memory regions, DHT
questions) is counted before and after, at rest; the resident memory is sampled on the way, and the line through the
samples must be as good as flat once caches and pools have filled. `make test` runs long enough for a leak of one
descriptor, thread or task in a hundred rounds to show; memory needs the full form.
"""

import os
from collections.abc import Callable

import numpy as np
import pytest
from e2e_swarm import (
    STEP_S,
    Background,
    DaemonProcess,
    Swarm,
    averagers,
    contributors_of,
    eventually,
    new_run,
    wait_for_company,
)

from mpd.client import Averager

SOAK = os.environ.get("MPD_SOAK") == "1"
N_ROUNDS = 10_000 if SOAK else 300
WARM_ROUNDS = 500 if SOAK else 60
SAMPLE_ROUNDS = 100 if SOAK else 60
N_PEERS = 4
N_ELEMS = 65536 // 4
MAX_SLOPE_BYTES = 512.0  # per round
# The DHT starts one thread for good when it saves its known peers for the first time, half a minute after the start.
MAY_COME = {"descriptors": 0, "regions": 0, "threads": 1, "tasks": 0, "calls": 0}


def held(daemons: list[DaemonProcess]) -> list[dict[str, int]]:
    return [daemon.status()["held"] for daemon in daemons]


def lasting(daemons: list[DaemonProcess]) -> list[dict[str, int]]:
    return [{name: each[name] for name in MAY_COME} for each in held(daemons)]


def do_rounds(averager: Averager, vector: np.ndarray, own: float, n: int) -> int:
    """Do `n` steps with `own` in every element; return how many of them were of all peers.

    On a busy machine a peer may be given up for a round; what a step returns is exact all the same.
    """
    n_whole = 0
    for _ in range(n):
        vector[:] = own
        outcome = averager.step(timeout=STEP_S)
        if outcome.averaged:
            n_whole += contributors_of(vector, N_PEERS) == [frozenset(range(N_PEERS))]
        else:
            assert (vector == own).all()
    return n_whole


@pytest.mark.timeout(0 if SOAK else 60)
def test_nothing_leaks_in_many_rounds(swarm: Swarm, score: Callable[..., None]) -> None:
    daemons = swarm.grow(N_PEERS)
    shm = set(os.listdir("/dev/shm"))
    vectors = [np.zeros(N_ELEMS, np.float32) for _ in daemons]
    run = new_run()
    samples: list[tuple[int, list[int]]] = []
    n_done = n_whole = 0
    with averagers(daemons, run, vectors) as attached:
        wait_for_company(daemons, run)

        def do(n: int) -> None:
            nonlocal n_done, n_whole
            steps = [
                Background(lambda a=a, v=v, i=i: do_rounds(a, v, 2.0**i, n))  # type: ignore[misc]
                for i, (a, v) in enumerate(zip(attached, vectors, strict=True))
            ]
            n_whole += min(step.join(None) for step in steps)
            n_done += n
            samples.append((n_done, [each["resident_bytes"] for each in held(daemons)]))

        do(WARM_ROUNDS)
        before: list[dict[str, int]] = []

        def is_at_rest() -> bool:
            """Worker threads end after a while without work, and the DHT is mostly silent."""
            last, before[:] = before[:], lasting(daemons)
            return before == last and not any(each["calls"] for each in before)

        eventually(is_at_rest, "the daemons come to rest")
        base = list(before)
        while n_done < N_ROUNDS:
            do(min(SAMPLE_ROUNDS, N_ROUNDS - n_done))
        eventually(
            lambda: all(
                now[name] <= then[name] + more
                for then, now in zip(base, lasting(daemons), strict=True)
                for name, more in MAY_COME.items()
            ),
            "they hold what they held after the first rounds",
            lambda: f"then {base}, now {lasting(daemons)}",
        )
        final = lasting(daemons)
    assert set(os.listdir("/dev/shm")) <= shm
    assert n_whole >= n_done / 2, "these were other rounds than the ones to be looked at"
    late = [(n, sizes) for n, sizes in samples if n >= WARM_ROUNDS]
    slopes = np.polyfit([n for n, _ in late], [sizes for _, sizes in late], 1)[0]
    more = {
        f"more_{name}": max(now[name] - then[name] for then, now in zip(base, final, strict=True)) for name in MAY_COME
    }
    score(
        27,
        "10,000 rounds: nothing held grows, resident memory by less than 512 bytes per round",
        rounds=n_done,
        whole=n_whole,
        **more,
        **({"slope_bytes": round(float(max(slopes)), 1)} if SOAK else {}),
    )
    if SOAK:
        assert max(slopes) < MAX_SLOPE_BYTES, samples
