"""Every point of the protocol x role of the victim x action, on real daemons: survivors finish, agree, and are exact.

Strategy: `make soak` plays all 240 cells and writes build/fault_matrix.json, of which `python tests/fault_table.py`
makes the table in docs/reliability.md; `make test` plays a fixed sample in which every point, every action and every
role appears. Cells are played beforehand, several at a time, because most of each is waiting; then each is one test.
"""

import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fault_matrix import (
    ACTIONS,
    DEADLINE_S,
    LATE_S,
    N_PEERS,
    OUTBOUND,
    ROLES,
    VECTOR_BYTES,
    Arena,
    Cell,
    Result,
    all_cells,
    arena,
    play_all,
)

from mpd.daemon.faults import POINTS
from mpd.layout import Segment
from mpd.schedule import chunks
from mpd.wire import HEADER_BYTES

SOAK = bool(os.environ.get("MPD_SOAK"))
N_ARENAS = 3
SAMPLE = [
    Cell("announce", "member", "kill"),
    Cell("announce", "outbound-only", "error"),
    Cell("seek", "leader", "freeze"),
    Cell("seek", "outbound-only", "kill"),
    Cell("handshake", "leader", "error"),
    Cell("handshake", "reducer", "hole"),
    Cell("propose", "outbound-only", "error"),
    Cell("propose", "member", "kill"),
    Cell("begin", "leader", "kill"),
    Cell("begin", "member", "error"),
    Cell("send", "member", "freeze"),
    Cell("send", "outbound-only", "hole"),
    Cell("receive", "leader", "error"),
    Cell("receive", "reducer", "kill"),
    Cell("reduce", "reducer", "error"),
    Cell("reduce", "leader", "hole"),
    Cell("return", "reducer", "kill"),
    Cell("return", "outbound-only", "kill"),
    Cell("repair", "member", "error"),
    Cell("repair", "leader", "kill"),
    Cell("commit", "member", "freeze"),
    Cell("commit", "leader", "error"),
    Cell("write-back", "reducer", "kill"),
    Cell("write-back", "member", "reset"),
]
CELLS = all_cells() if SOAK else SAMPLE
PARTS = {0.1: 3, 0.5: 12, 0.9: 22}  # of a shard that is returned: which of its 24 results is not sent any more


@pytest.fixture(scope="module")
def results() -> dict[Cell, Result]:
    played = play_all(CELLS, N_ARENAS)
    if SOAK:
        file = Path(__file__).parents[2] / "build" / "fault_matrix.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps([played[cell].as_json() for cell in CELLS], indent=0))
    return played


def test_the_sample_has_everything() -> None:
    assert len(set(SAMPLE)) == 24
    assert {cell.point for cell in SAMPLE} == set(POINTS)
    assert {cell.action for cell in SAMPLE} == set(ACTIONS)
    assert all(sum(cell.role == role for cell in SAMPLE) >= 2 for role in ROLES)
    assert sum(bool(cell.is_impossible) for cell in SAMPLE) == 1
    assert len(all_cells()) == len(POINTS) * len(ROLES) * len(ACTIONS) == 240


@pytest.mark.timeout(0)  # the first one plays them all
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_survivors_finish_and_agree(cell: Cell, results: dict[Cell, Result]) -> None:
    result = results[cell]
    assert not result.objections, f"{result.objections}\n{result.account}"


@pytest.mark.timeout(0)
def test_the_matrix_as_a_whole(results: dict[Cell, Result], score: Callable[..., None]) -> None:
    possible = [result for cell, result in results.items() if not cell.is_impossible]
    passed = [result for result in results.values() if not result.objections]
    score(
        1,
        f"all cells pass; survivors done within {DEADLINE_S + LATE_S:g} s; 0 torn buffers",
        passed=f"{len(passed)}/{len(CELLS)}",
        struck=sum(result.struck for result in possible),
        slowest_s=max(result.slowest_s for result in possible),
        slowest_to_be_whole_again_s=max(result.whole_again_s for result in possible),
        survivors_that_averaged=f"{sum(r.averaged for r in possible)}/{sum(r.survivors for r in possible)}",
    )
    assert len(passed) == len(CELLS)


# ------------------------------------------------------------------------------------------- a reducer dies half-way


@pytest.fixture(scope="module")
def own_arena() -> Iterator[Arena]:
    with arena() as own:
        yield own


def shard_of(own: Arena, victim: int) -> tuple[int, int]:
    """Return how many chunks the shard of `victim` had in the last round, and how many were redone without it."""
    survivor = (victim + 1) % OUTBOUND
    group = own.daemons[survivor].connect().rounds(own.run)[-1]["group"]
    places = {peer: place for place, peer in enumerate(group)}
    shares = [0.0 if peer == own.daemons[OUTBOUND].peer else 1.0 for peer in group]
    plan = chunks((Segment("float32", 0, VECTOR_BYTES // 4),), shares, 192 * 1024)
    shard = [chunk for chunk in plan if chunk.owner == places[own.daemons[victim].peer]]
    everybody = np.float32(sum(2.0**i for i in range(N_PEERS)) / N_PEERS)
    values = own.vectors[survivor]
    return len(shard), sum(values[chunk.offset // 4] != everybody for chunk in shard)


@pytest.mark.parametrize("part", PARTS)
def test_a_dead_reducer_costs_what_was_lost_with_it(own_arena: Arena, part: float, score: Callable[..., None]) -> None:
    """What was lost: the results that it had not sent, and the pieces of those chunks that nobody had got from it."""
    turn = PARTS[part]
    calm = [own_arena.calm_round() for _ in range(3)]
    victim = 1
    calm_bytes = sum(outcome.bytes_received for i, outcome in enumerate(calm[-1]) if i != victim)
    calm_s = statistics.median(max(outcome.seconds for outcome in outcomes) for outcomes in calm)
    result, outcomes = own_arena.kill_at_return(victim, turn)
    n_chunks, n_redone = shard_of(own_arena, victim)
    own_arena.mend(victim)
    assert not result.objections, f"{result.objections}\n{result.account}"
    assert n_chunks == 6
    record_bytes = VECTOR_BYTES // 24 + HEADER_BYTES
    others = N_PEERS - 1
    unsent = n_chunks * others - (turn - 1)
    lost_bytes = (unsent + n_redone * others) * record_bytes
    more_bytes = sum(outcome.bytes_received for outcome in outcomes) - calm_bytes
    extra_bytes = unsent * record_bytes + more_bytes
    seconds = max(outcome.seconds for outcome in outcomes)
    score(
        1,
        f"reducer killed at {part:.0%} of its shard: extra bytes <= 1.2 x lost; <= 1.5 x fault-free time + detection",
        extra_over_lost=round(extra_bytes / lost_bytes, 2),
        redone_chunks=f"{n_redone} of {n_chunks}",
        fault_free_s=round(calm_s, 3),
        seconds=round(seconds, 3),
    )
    assert extra_bytes <= 1.2 * lost_bytes
    assert seconds <= 1.5 * calm_s + 2.0  # the longest that silence goes unnoticed; a kill is noticed at once
