"""Whole swarms under seeded faults: no promise is ever broken, and a failure says in one line how to see it again.

MPD_SIM_SEEDS=N plays N swarms instead, MPD_SIM_SEEDS=A:B the seeds from A to B - 1; MPD_SIM_FAULTS replaces the faults
that these seeds would draw (`sim.faults` reads and writes them).
"""

import os
import random
import re
from collections import Counter
from collections.abc import Callable

import pytest
from sim.faults import KINDS, Fault, draw, parse, shorten, show
from sim.world import Violation, World, play, replay

from mpd.agreement import Agreement
from mpd.daemon.shelf import Shelf

N_BLOCKS = 20
first, _, last = os.environ.get("MPD_SIM_SEEDS", "0:1000").rpartition(":")
SEEDS = range(int(first or 0), int(last))
BLOCKS = [SEEDS[block::N_BLOCKS] for block in range(min(N_BLOCKS, len(SEEDS)))]
FAULTS = parse(os.environ["MPD_SIM_FAULTS"]) if "MPD_SIM_FAULTS" in os.environ else None
seen: Counter[str] = Counter()


@pytest.mark.timeout(0 if "MPD_SIM_SEEDS" in os.environ else 120)
@pytest.mark.parametrize("seeds", BLOCKS, ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_swarms_keep_every_promise(seeds: range, score: Callable[..., None]) -> None:
    before = seen.copy()
    for seed in seeds:
        world = replay(seed, FAULTS)
        seen["seeds"] += 1
        seen["rounds"] += len(world.oracle.books)
        seen["averaged"] += world.oracle.n_averaged
        seen["certified"] += world.oracle.n_certified
        seen["kept"] += world.oracle.n_kept
        seen["loaded"] += world.oracle.n_loaded
        seen["fetched"] += world.oracle.n_fetched
        seen["loaded_nothing"] += world.oracle.n_in_vain
        seen["left_behind"] += world.oracle.n_left_behind
        seen["redone"] += sum(any(version for _, version in book.closed) for book in world.oracle.books.values())
        seen.update(f"fault {fault.kind}" for fault in world.faults)
    # A world in which nobody averages, or nothing goes wrong, would find nothing.
    assert seen["averaged"] - before["averaged"] > len(seeds) or len(seeds) < 10
    if seeds is BLOCKS[-1]:
        wanted = ("loaded", "fetched", *(f"fault {kind}" for kind in KINDS))
        assert all(seen[what] for what in wanted) or len(SEEDS) < 200
        score(21, "1,000 seeds in less than 3 minutes, no promise broken, a failure is one line", **seen)


def test_a_seed_is_always_the_same_swarm() -> None:
    one, other = play(7), play(7)
    assert one.scheduler.n_events == other.scheduler.n_events > 500
    assert list(one.oracle.books) == list(other.oracle.books)


def test_faults_are_data() -> None:
    faults = [fault for seed in range(50) for fault in draw(random.Random(seed), 5, 1.0, 9.0)]
    assert parse(show(faults)) == faults
    assert {fault.kind for fault in faults} == set(KINDS)
    assert all(0 <= who < 5 for fault in faults for who in fault.who)


def test_a_list_of_faults_is_shortened_to_those_that_matter() -> None:
    faults = [Fault(float(i), "kill", (i,)) for i in range(6)]

    def fails(fewer: list[Fault]) -> bool:
        return {2, 5} <= {fault.who[0] for fault in fewer}

    assert [fault.who for fault in shorten(faults, fails)] == [(2,), (5,)]


def test_a_broken_rule_is_one_line_that_brings_it_about_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agreement, "_is_quorum_done", lambda self: True)  # succeed as soon as everything is held
    with pytest.raises(Violation) as noticed:
        all(replay(seed) for seed in range(120, 1000))
    (line,) = noticed.value.__notes__
    told = re.fullmatch(r"again: MPD_SIM_SEEDS=(\d+):\d+ MPD_SIM_FAULTS='(.*)' pytest tests/sim/test_world.py", line)
    assert told is not None
    seed, few = int(told[1]), parse(told[2])
    assert few
    assert len(few) <= len(World(seed).faults)
    with pytest.raises(Violation):
        play(seed, few)


def test_a_state_that_is_written_again_while_it_is_held_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shelf, "turn", lambda self: False)  # the next result goes where the state lies
    with pytest.raises(Violation):
        all(play(seed) for seed in range(50))
