"""A grid for any number of peers, and another one when they come or go: real daemons, nobody's help.

Strategy: one swarm grows through the whole module. First every number of peers gets a run of its own and must end with
the exact mean, certified and counted. Then sixteen trainers step together while one daemon is killed in each cycle.
Last, trainers step on their own while the swarm becomes four times as large and then a third. Outcomes say what they
are; the rounds that daemons remember (`mpd rounds`) say in which record and with whom. Without MPD_SOAK all of it is
done with fewer peers.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e_swarm import STEP_S, Array, DaemonProcess, Swarm, averagers, eventually, new_run, step_all

from mpd.client import Averager, Outcome
from mpd.grid import fit

SOAK = os.environ.get("MPD_SOAK") == "1"
GROUP_SIZE = 4
FLOAT32_ROUNDING = 8 * 2.0**-24  # of values up to 1
N_ELEMS = 1009
SIZES = [*range(3, 18), 24, 31, 33] if SOAK else [3, 8, 11]
KILLED_OF, N_KILLS = (16, 24) if SOAK else (9, 3)
GROWTH = (8, 32, 12) if SOAK else (4, 11, 5)
PATIENCE_S = 180.0 if SOAK else 60.0
GROWN_AT_ONCE = 4  # a machine with two cores starts no more at the same time


pytestmark = pytest.mark.timeout(3600 if SOAK else 120)  # it starts more than ten daemons


def grown(swarm: Swarm, n: int) -> list[DaemonProcess]:
    """Return the first `n` daemons of a swarm that has at least as many. Each reads its faults from a file."""
    swarm.revive()
    while len(swarm.daemons) < n:
        first = len(swarm.daemons)
        fresh = range(first, min(n, first + GROWN_AT_ONCE) if first else 1)
        for i in fresh:
            orders(swarm, i).touch()
            bootstrap = ("--bootstrap", swarm[0].listen) if i else ()
            swarm.new("--fault", f"@{orders(swarm, i)}", *bootstrap).start()
        for i in fresh:
            swarm[i].wait_ready(PATIENCE_S)
    return swarm.daemons[:n]


def orders(swarm: Swarm, i: int) -> Path:
    return swarm.home / f"d{i}.faults"


def values(n: int, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng((n, seed))
    return [rng.uniform(-1, 1, N_ELEMS).astype(np.float32) for _ in range(n)]


def mean_of(vectors: Sequence[Array], weights: Sequence[float] | None = None) -> Array:
    return np.average([vector.astype(np.float64) for vector in vectors], axis=0, weights=weights)


def note(record_property: Callable[[str, object], None], what: str, **figures: object) -> None:
    """Have figures printed at the end of the run."""
    form = "full" if SOAK else "short"
    record_property(what, ", ".join(f"{name} {value}" for name, value in {**figures, "form": form}.items()))


def has_record(daemons: Sequence[DaemonProcess], run: str, n_peers: int) -> bool:
    told = [daemon.run_status(run) for daemon in daemons]
    return all(each is not None and each["elastic"]["n_peers"] == n_peers for each in told)


# ------------------------------------------------------------------------------------------------------- how many peers


def test_every_number_of_peers_ends_exact_certified_and_counted(
    swarm: Swarm, record_property: Callable[[str, object], None]
) -> None:
    worst, n_steps = 0.0, 0
    for n in SIZES:
        daemons, run, vectors = grown(swarm, n), new_run(), values(n)
        with averagers(daemons, run, vectors, group_size=GROUP_SIZE, rounds="exact") as attached:
            eventually(lambda d=daemons, r=run, n=n: has_record(d, r, n), f"{n} peers have a shape", swarm.log)  # type: ignore[misc]
            for step, weights in enumerate([[1.0] * n, [1.0 + i for i in range(n)]]):
                for vector, fresh in zip(vectors, values(n, step), strict=True):
                    vector[:] = fresh
                expected = mean_of(vectors, weights)
                outcomes = step_all(attached, weights)
                assert [(o.averaged, o.exact, o.heads) for o in outcomes] == [(True, True, n)] * n, (n, outcomes)
                assert {o.rounds for o in outcomes} == {len(fit(n, GROUP_SIZE))}
                worst = max(worst, *(float(np.abs(vector - expected).max()) for vector in vectors))
                n_steps += 1
    note(record_property, "any number", sizes=SIZES, steps=n_steps, exact=n_steps, worst_error=worst)
    assert worst <= FLOAT32_ROUNDING


# ------------------------------------------------------------------------------------------ one is killed in each cycle


def has_mates(daemons: Sequence[DaemonProcess], victim: int, run: str, first: int, m: int) -> bool:
    """Return whether all the victim brought to round `first` is with somebody else who went to the same cell after it.

    Who dies in the very moment in which it sends the last sums may take one of them along; then its share is lost in
    part, and nobody's mean can be exact. A coordinate is the place in the group plus something that is the same for
    all, modulo `m`.
    """
    for i, daemon in enumerate(daemons):
        if i == victim:
            continue
        for record in daemon.connect().rounds(run, 8):
            if record["number"] == first and daemons[victim].peer in record["contributors"]:
                place = record["group"].index(daemons[victim].peer)
                return any(other % m == place % m for other in range(len(record["group"])) if other != place)
    return False


def test_a_peer_that_is_killed_costs_no_cycle_if_it_has_a_cell_mate(
    swarm: Swarm, record_property: Callable[[str, object], None]
) -> None:
    """It dies at the end of the first round of a cycle, when it has brought its share, and never comes to the second.

    Its owner starts it again, so that there are as many for the next one.
    """
    daemons, run, vectors = grown(swarm, KILLED_OF), new_run(), values(KILLED_OF)
    n_exact = n_mated = n_all = 0
    others: list[tuple[int, Outcome]] = []  # that were not exact
    with averagers(daemons, run, vectors, group_size=GROUP_SIZE, rounds="exact") as attached:
        eventually(lambda: has_record(daemons, run, KILLED_OF), "all have a shape", swarm.log)
        step_all(attached)
        for kill in range(N_KILLS):
            victim = kill % (KILLED_OF - 1) + 1
            status = daemons[0].run_status(run)
            assert status is not None
            m, first = status["shape"][0], daemons[0].connect().rounds(run, 1)[-1]["number"] + 1
            orders(swarm, victim).write_text("commit:1:kill")
            outcomes = step_all(attached, timeout=STEP_S)
            assert not daemons[victim].is_running()
            orders(swarm, victim).write_text("")
            is_exact = all(outcome.exact for i, outcome in enumerate(outcomes) if i != victim)
            n_all += is_exact
            if has_mates(daemons, victim, run, first, m):
                n_mated += 1
                n_exact += is_exact
                others += [(kill, o) for i, o in enumerate(outcomes) if i != victim and not o.exact]
            swarm.revive()
            eventually(  # its trainer finds it again
                lambda: all(outcome.exact and outcome.heads == KILLED_OF for outcome in step_all(attached)),
                "all are there again",
                swarm.log,
                PATIENCE_S,
            )
    note(
        record_property, "killed", peers=KILLED_OF, kills=N_KILLS, with_mates=n_mated, exact=n_exact, exact_of_all=n_all
    )
    assert n_mated
    assert n_exact >= 0.9 * n_mated, others


# ------------------------------------------------------------------------------------------------ swarms come and go


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a trainer, and when it ended (seconds since 1970, as daemons date their rounds)."""

    outcome: Outcome
    ended: float

    def is_exact(self, n: int) -> bool:
        return (self.outcome.exact, self.outcome.heads) == (True, n)


def work(averager: Averager, vector: Array, own: Array, is_over: threading.Event, steps: list[Step]) -> None:
    """Step until told to stop."""
    while not is_over.is_set():
        vector[:] = own
        steps.append(Step(averager.step(timeout=STEP_S), time.time()))
        time.sleep(0.2)  # a trainer trains


def exact_rounds(steps: Sequence[Step], records: Sequence[dict[str, Any]], n: int) -> set[int]:
    """Return the numbers of those of a peer's rounds in `records` that ended an exact mean of `n` peers."""
    found, before = set(), 0.0
    for step in steps:
        numbers = [record["number"] for record in records if before < record["at"] <= step.ended]
        before = step.ended
        if numbers and step.is_exact(n):
            found.add(max(numbers))
    return found


def test_a_swarm_that_grows_and_shrinks_is_exact_again_by_itself(
    swarm: Swarm, record_property: Callable[[str, object], None]
) -> None:
    """Rounds count from the first of anybody in the last shape to the end of the first exact mean of all in it.

    After deaths they are held to the goal. After growth they are printed beside it: where 24 daemons start at once on
    two cores, most runs reach it and some do not (docs/adr/0020-elastic-shape.md).
    """
    few, most, left = GROWTH
    daemons, run, own = grown(swarm, most), new_run(), values(most)
    vectors = [vector.copy() for vector in own]
    is_over = [threading.Event() for _ in range(most)]
    steps: list[list[Step]] = [[] for _ in range(most)]
    threads: list[threading.Thread] = []
    figures: dict[str, Any] = {}

    def come(stack: contextlib.ExitStack, new: range) -> None:
        chosen = [daemons[i] for i in new], run, [vectors[i] for i in new]
        attached = stack.enter_context(averagers(*chosen, group_size=GROUP_SIZE, rounds="exact"))
        for i, averager in zip(new, attached, strict=True):
            threads.append(threading.Thread(target=work, args=(averager, vectors[i], own[i], is_over[i], steps[i])))
            threads[-1].start()

    def rounds_until_exact(n: int, epoch: int) -> int:
        """Return how many rounds it took in the shape of this epoch until one ended the exact mean of all; 0: none."""
        last = [steps[i][-1] for i in range(n) if steps[i]]
        if len(last) < n or not all(step.is_exact(n) for step in last):
            return 0
        told = [daemons[i].connect().rounds(run, 1000) for i in range(n)]
        records = [[record for record in each if record["epoch"] == epoch] for each in told]
        exact = set.intersection(*(exact_rounds(steps[i], records[i], n) for i in range(n)))
        return min(exact) + 1 - min(each[0]["number"] for each in records) if exact else 0

    def change(n: int, what: str, how: Callable[[], None]) -> None:
        """Change how many peers there are to `n`; wait for the exact mean of all in a new shape, and note its round."""
        before, began = max(epochs(few)), time.monotonic()
        how()

        def is_exact_again() -> bool:
            now = epochs(n)
            if len(now) == 1 and min(now) > before:
                found.append(rounds_until_exact(n, min(now)))
            return bool(found and found[-1])

        found: list[int] = []
        eventually(is_exact_again, f"{n} peers are exact again", swarm.log, PATIENCE_S)
        figures[f"{what}_s"] = round(time.monotonic() - began, 1)
        figures[f"{what}_rounds"], figures[f"{what}_goal"] = found[-1], 2 * len(shape(0))

    def shape(i: int) -> list[int]:
        status = daemons[i].run_status(run)
        assert status is not None
        return list(status["shape"])

    def epochs(n: int) -> set[int]:
        return {(daemons[i].run_status(run) or {"elastic": {"epoch": 0}})["elastic"]["epoch"] for i in range(n)}

    def go() -> None:
        for i in range(left, most):
            is_over[i].set()
            daemons[i].kill()

    with contextlib.ExitStack() as stack:
        try:
            come(stack, range(few))
            eventually(
                lambda: all(steps[i] and steps[i][-1].is_exact(few) for i in range(few)),
                f"{few} peers are exact",
                swarm.log,
                PATIENCE_S,
            )
            change(most, "grown", lambda: come(stack, range(few, most)))
            change(left, "shrunk", go)
        finally:
            for event in is_over:
                event.set()
            for thread in threads:
                thread.join()
    note(record_property, "grows and shrinks", sizes=GROWTH, **figures)
    assert figures["shrunk_rounds"] <= figures["shrunk_goal"], figures
