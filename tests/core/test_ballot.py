"""Plans: what a coordinator decides, and how tables travel."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim.exchange_net import make_plans

from mpd.ballot import (
    Attempt,
    Plan,
    Report,
    Tally,
    changes_of,
    decide,
    first_plan,
    has_bit,
    make_bitmap,
    read_plan,
    read_report,
    read_table,
    write_plan,
    write_promise,
)
from mpd.errors import PeerError

ROUND = make_plans(5, [3, 3, 4, 4])[0]
FIRST = first_plan(ROUND).table
EVERYONE = ROUND.everyone


def report(held: tuple[int, ...] = (), opened: tuple[int, ...] = (), accepted: int = -1, **changes: object) -> Report:
    table = list(FIRST)
    for chunk, entry in changes.items():
        table[int(chunk[1:])] = entry  # type: ignore[call-overload]
    return Report(accepted, tuple(table), make_bitmap(held, 4), make_bitmap(opened, 4))


# ---------------------------------------------------------------------------------------------------------- deciding


def test_what_is_held_is_kept_and_what_is_not_is_redone_in_turns() -> None:
    plan = decide(ROUND, 5, {0: report(held=(1,)), 1: report(), 2: report()}, slow=0, in_reach=EVERYONE)
    assert plan.table == ((5, 0), (0, 3), (5, 1), (5, 2))
    assert plan.alive == 0b00111
    assert plan.cut == 0
    assert plan.holders == {1: 0b00001}


def test_whoever_the_coordinator_has_no_link_to_is_called_cut_off() -> None:
    plan = decide(ROUND, 5, {0: report(), 1: report(), 2: report()}, slow=0, in_reach=0b01011)
    assert (plan.alive, plan.cut) == (0b00111, 0b10000)  # 3 is linked and silent; 2 has promised before it was lost
    assert plan.awaited == 0b10111


def test_a_version_that_its_own_writer_still_writes_is_waited_for_unless_it_is_slow() -> None:
    reports = {0: report(), 1: report(), 3: report(opened=(0, 1))}
    assert decide(ROUND, 5, reports, slow=0, in_reach=EVERYONE).table == ((0, 3), (0, 3), (5, 0), (5, 1))
    assert decide(ROUND, 5, reports, slow=0b01000, in_reach=EVERYONE).table == ((5, 0), (5, 1), (5, 0), (5, 1))


def test_what_slow_members_hold_or_accepted_binds_only_if_no_quorum_can_be_had_without_them() -> None:
    slow = report(held=(0, 1, 2, 3), accepted=2, c0=(2, 4))
    plan = decide(ROUND, 5, {0: report(held=(1,)), 1: report(), 2: report(), 4: slow}, slow=0b10000, in_reach=EVERYONE)
    assert plan.table == ((5, 0), (0, 3), (5, 1), (5, 2))
    assert plan.alive == 0b10111
    assert decide(ROUND, 5, {0: report(), 1: report(), 4: slow}, slow=0b10000, in_reach=EVERYONE).table == slow.table
    two_prompt = {0: report(accepted=0, held=(0, 1, 2, 3)), 1: report(), 2: report(), 4: slow}
    assert decide(ROUND, 5, two_prompt, slow=0b10000, in_reach=EVERYONE).table == FIRST  # it may have been published


def test_slow_members_write_if_nobody_else_can() -> None:
    reports = {0: report(), 1: report(), 2: report()}
    assert decide(ROUND, 5, reports, slow=0b00111, in_reach=EVERYONE).table[0] == (5, 0)


def test_members_that_cannot_be_dialled_redo_nothing() -> None:
    round_plan = make_plans(5, [3, 3, 4, 4], inbound=0b11001)[0]
    reports = {0: report(), 1: report(), 2: report()}
    assert decide(round_plan, 5, reports, slow=0, in_reach=EVERYONE).table == ((5, 0),) * 4


def test_most_holders_win_then_the_newest_version() -> None:
    old, new = report(held=(0,)), report(held=(0,), c0=(2, 1))
    assert decide(ROUND, 5, {0: old, 1: new, 2: old}, slow=0, in_reach=EVERYONE).table[0] == (0, 3)
    assert decide(ROUND, 5, {0: old, 1: new, 2: report()}, slow=0, in_reach=EVERYONE).table[0] == (2, 1)


def test_the_highest_accepted_table_is_kept_unchanged_against_any_majority() -> None:
    newer = report(held=(0, 1, 2, 3), c0=(4, 1))
    accepted = report(accepted=3, held=(0, 1, 2, 3), c0=(3, 2))
    plan = decide(
        ROUND, 5, {0: newer, 1: newer, 2: accepted, 3: report(accepted=2, held=(0,))}, slow=0, in_reach=EVERYONE
    )
    assert plan.table == accepted.table
    assert plan.holders[0] == 0b00100


def test_an_attempt_decides_with_everybody_or_with_a_quorum_after_the_grace_time() -> None:
    attempt = Attempt(5, 0, report(), slow=0, grace_ends=1.0)
    attempt.reports[1] = report()
    assert not attempt.may_decide(linked=0b00010, quorum=3)
    attempt.reports[2] = report()
    assert attempt.may_decide(linked=0b00110, quorum=3)
    assert not attempt.may_decide(linked=0b01110, quorum=3)
    attempt.grace_over = True
    assert attempt.may_decide(linked=0b01110, quorum=3)


def test_the_tally_keeps_the_latest_word_of_each_member() -> None:
    tally = Tally()
    tally.say(0, 0, b"a")
    tally.say(1, 0, b"a")
    tally.say(1, 5, b"b")
    tally.say(1, 3, b"c")
    assert (tally.at(0), tally.at(3), tally.at(5), tally.at_least(0)) == (0b01, 0, 0b10, 0b11)
    assert tally.dissenter(5, b"b") is None
    assert tally.dissenter(5, b"x") == 1


# ------------------------------------------------------------------------------------------------- tables on the wire

ENTRIES = st.one_of(st.none(), st.tuples(st.integers(1, 9), st.integers(0, 4)))


@given(st.lists(ENTRIES, min_size=4, max_size=4))
def test_a_table_survives_the_wire(entries: list[tuple[int, int] | None]) -> None:
    table = tuple(entry or FIRST[chunk] for chunk, entry in enumerate(entries))
    assert read_table(ROUND, changes_of(ROUND, table), newest=9) == table


def test_a_plan_and_a_report_survive_the_wire() -> None:
    plan = Plan(7, ((7, 2), (0, 3), (2, 1), (0, 4)), 0b00111, {1: 0b00010}, 0b01000)
    assert read_plan(ROUND, write_plan(ROUND, plan)) == plan
    said = report(held=(0, 3), opened=(2,), accepted=2, c2=(2, 1))
    assert read_report(ROUND, 1, write_promise(ROUND, 6, said)) == said


@pytest.mark.parametrize(
    "changes",
    [((4, 1, 0),), ((-1, 1, 0),), ((1, 1, 0), (1, 1, 0)), ((0, 0, 3),), ((0, 10, 0),), ((0, 1, 5),), ((0, 1, -1),)],
)
def test_impossible_tables_are_their_senders_fault(changes: tuple[tuple[int, int, int], ...]) -> None:
    with pytest.raises(PeerError):
        read_table(ROUND, changes, newest=9)


@given(st.sets(st.integers(0, 18)), st.integers(19, 24))
def test_a_bitmap_holds_exactly_its_chunks(chunks: set[int], n_chunks: int) -> None:
    bitmap = make_bitmap(chunks, n_chunks)
    assert len(bitmap) == 3
    assert {chunk for chunk in range(n_chunks) if has_bit(bitmap, chunk)} == chunks
