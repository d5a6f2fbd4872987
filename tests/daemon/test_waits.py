"""How many peers a line waits for, and how long."""

from types import SimpleNamespace
from typing import Any

import pytest

from mpd.daemon.waits import MAX_LATE_S, RESYNC_S, Waits
from mpd.deadlines import WINDOW, Pace
from mpd.grid import MAX_ROSTER, ShapeRecord, axis_of, line_of, table
from mpd.messages import MAX_COLLECTED

DIGEST = b"d" * 32
NINE = ShapeRecord(1, 9, (2, 2), DIGEST)


def waits(*, others: int = 8, counted: int = 0, settled: bool = True, rounds: int | str = "exact") -> Waits:
    terms: Any = SimpleNamespace(rounds=rounds)
    roster: Any = SimpleNamespace(others=dict.fromkeys(range(others)))
    shaping: Any = SimpleNamespace(is_settled=settled, counted=counted)
    return Waits(terms, Pace(), roster, shaping)


def of_table(record: ShapeRecord, number: int, cell: tuple[int, int]) -> int:
    axis = axis_of(number, record.shape)
    return table(record.n_peers, record.shape).expected(axis, line_of(cell, axis))


@pytest.mark.parametrize("cell", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("number", [0, 1])
def test_a_grid_says_how_many_its_lines_should_have(cell: tuple[int, int], number: int) -> None:
    sizes = of_table(NINE, number, cell)
    assert waits().expected(NINE, number, cell) == (sizes, sizes)
    assert waits(others=17).expected(NINE, number, cell) == (2 * sizes, 2 * sizes)  # while it grows
    assert waits(counted=9).expected(NINE, number, cell) == (4, sizes)
    assert waits(others=6, counted=7).expected(NINE, number, cell)[0] == 3
    assert waits(others=MAX_ROSTER + 1).expected(ShapeRecord(1, 400, (20, 20), DIGEST), number, cell) == (20, 20)
    assert waits(others=99).expected(ShapeRecord(1, 1, (1,), DIGEST), number, (0,)) == (0, 0)


def test_what_a_line_knows_of_itself_counts_at_least() -> None:
    number, cell = 0, (0, 0)
    sizes = of_table(NINE, number, cell)
    assert waits().line(NINE, number, cell, 2) == (2, sizes)  # one that has moved may be on its way
    assert waits().line(NINE, number, cell, 9) == (9, 9)
    assert waits(settled=False).line(NINE, number, cell, 2) == (2, MAX_COLLECTED)
    assert waits(settled=False, rounds=1).line(NINE, number, cell, 2) == (2, sizes)


def test_each_round_of_a_cycle_waits_for_those_that_earlier_ones_have_delayed() -> None:
    first, second = (waits().limits(number, 3, ()) for number in (0, 1))
    assert second.quick_s == 2 * first.quick_s
    assert second.settle_s == 2 * first.settle_s
    assert second.window_s == first.window_s + first.settle_s
    assert waits(rounds=1).limits(1, 3, ()) == waits(rounds=1).limits(0, 3, ()) == first
    assert waits().limits(1, 1, ()) == first
    assert first.leader_s == WINDOW.cap_s + MAX_LATE_S


def test_the_lines_of_a_swarm_that_has_come_apart_take_the_same_time_whatever_their_size() -> None:
    begins, later = (waits(settled=False).limits(number, 3, ()) for number in (3, 4))
    assert (begins.quick_s, later.quick_s) == (2 * RESYNC_S, RESYNC_S)
    assert begins.settle_s == later.settle_s == 2 * RESYNC_S
    assert begins.alone_s == 2 * begins.quick_s
    assert waits(settled=False, rounds=1).limits(3, 3, ()) == waits(rounds=1).limits(3, 3, ())
