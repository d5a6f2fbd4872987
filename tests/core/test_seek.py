"""Where lacking chunks are sought, in which order, and when there is no source."""

from sim.exchange_net import make_plans

from mpd.ballot import Plan
from mpd.seek import Seeker

EVERYONE = 0b11111
OWNER = 4


def seeker() -> Seeker:
    return Seeker(make_plans(5, [OWNER] * 4)[0])


def plan(epoch: int = 0, alive: int = EVERYONE, holders: dict[int, int] | None = None) -> Plan:
    return Plan(epoch, ((0, OWNER),) * 4, alive, holders or {})


def test_what_its_writer_will_send_is_not_asked_for() -> None:
    seeking = seeker()
    assert seeking.seek([0, 1], plan(), holders=0, prompt=0b11110, silent=0) == {}
    assert not seeking.stuck


def test_without_its_writer_holders_share_the_work() -> None:
    seeking = seeker()
    listed = plan(epoch=6, alive=0b01111, holders={0: 0b00110, 1: 0b00110, 2: 0b01000})
    wants = seeking.seek([0, 1, 2, 3], listed, holders=0, prompt=0b01110, silent=0)
    assert wants == {1: [(0, 0)], 2: [(1, 0)], 3: [(2, 0)]}
    assert seeking.orphans == {3}
    assert seeking.seek([0, 1, 2, 3], listed, holders=0, prompt=0b01110, silent=0) == {}


def test_members_that_hold_everything_are_holders() -> None:
    seeking = seeker()
    assert seeking.seek([2], plan(), holders=0b01000, prompt=0b01110, silent=0) == {3: [(2, 0)]}


def test_who_sent_it_too_early_is_asked_first_and_only_for_that_version() -> None:
    seeking = seeker()
    seeking.note_early(0, 5, 2)
    seeking.note_early(1, 7, 2)
    named = Plan(5, ((5, 3), (5, 3), (0, 4), (0, 4)), EVERYONE, {0: 0b00010})
    assert seeking.seek([0, 1], named, holders=0, prompt=0b11110, silent=0) == {2: [(0, 5)]}


def test_a_version_of_the_past_is_asked_for_at_its_writer_at_last() -> None:
    seeking = seeker()
    seeking.replanned(0, is_new=False)
    assert seeking.seek([0], plan(epoch=6), holders=0, prompt=0b11110, silent=0) == {OWNER: [(0, 0)]}
    seeking.replanned(0, is_new=True)
    assert seeking.seek([0], plan(epoch=6), holders=0, prompt=0b11110, silent=0) == {}


def test_the_coordinator_knows_what_a_live_writer_has_written() -> None:
    assert seeker().seek([0], plan(epoch=6), holders=0, prompt=0b01110, silent=0) == {1: [(0, 0)]}
    seeking = seeker()
    assert seeking.seek([0], plan(epoch=6, alive=0b01111), holders=0, prompt=0b01110, silent=0) == {}
    assert seeking.orphans == {0}


def test_a_lost_source_is_replaced() -> None:
    seeking = seeker()
    assert seeking.seek([0], plan(), holders=0b00110, prompt=0b01110, silent=0) == {1: [(0, 0)]}
    seeking.lost(1)
    assert seeking.supplier(0, OWNER) == OWNER
    assert seeking.seek([0], plan(), holders=0b00110, prompt=0b01100, silent=0) == {2: [(0, 0)]}
    assert seeking.supplier(0, OWNER) == 2


def test_silent_sources_are_the_last_resort_and_make_a_chunk_late() -> None:
    seeking = seeker()
    assert seeking.seek([0, 1], plan(), holders=0b00100, prompt=0b01010, silent=0b10100) == {}
    assert seeking.late == {0, 1}
    assert seeking.stuck
    assert seeking.seek([0], plan(), holders=0b01100, prompt=0b01010, silent=0b10100) == {3: [(0, 0)]}
    assert not seeking.stuck


def test_wants_of_others_stand_until_the_chunk_comes() -> None:
    seeking = seeker()
    seeking.owe(0, 5, 1)
    seeking.owe(0, 5, 2)
    seeking.owe(0, 6, 2)
    assert seeking.arrived(0, 5) == [1]
    assert seeking.arrived(0, 5) == []
    assert seeking.arrived(0, 6) == [2]
