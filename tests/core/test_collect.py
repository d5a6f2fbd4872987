"""The versions that one member writes."""

import pytest
from sim.exchange_net import Bytes, make_plans

from mpd.collect import ASK_WINDOW, Collector
from mpd.errors import PeerError


def collector(senders: int = 0b1111) -> tuple[Collector, Bytes]:
    plan = make_plans(4, [0] * 30, senders=senders)[0]
    vault = Bytes(plan)
    collecting = Collector(plan, vault)
    collecting.expect(0b1110)
    return collecting, vault


def test_a_version_is_ready_when_nobody_is_waited_for() -> None:
    collecting, vault = collector()
    collecting.open(5)
    for sender in (1, 3):
        collecting.add(5, sender, 4**sender)
        assert not collecting.is_ready(5)
    assert collecting.lacks(5, 2)
    assert not collecting.lacks(5, 3)
    collecting.expect(0b1010)
    assert collecting.is_ready(5)
    assert collecting.close(5) == 0b1011
    assert vault.slots == {5: 1 + 4 + 64}
    assert 5 not in collecting
    assert not collecting.lacks(5, 2)


def test_accumulators_exist_from_the_first_piece_to_the_end() -> None:
    collecting, vault = collector()
    collecting.open(0)
    collecting.open(1)
    assert not vault.accumulators
    collecting.add(1, 2, 16)
    assert set(vault.accumulators) == {1}
    collecting.abandon_all()
    assert not vault.accumulators
    assert collecting.chunks() == []


def test_a_member_without_weight_adds_nothing_of_its_own_and_closes_nothing_empty() -> None:
    collecting, vault = collector(senders=0b0110)
    collecting.open(0)
    assert collecting.expected == 0b0110
    collecting.expect(0b1000)
    assert not collecting.is_ready(0)
    assert collecting.is_barren(0)
    collecting.add(0, 1, 4)
    assert collecting.is_ready(0)
    assert not collecting.is_barren(0)
    assert collecting.close(0) == 0b0010
    assert vault.slots == {0: 4}


def test_an_unusable_piece_is_not_counted() -> None:
    collecting, vault = collector()
    vault.distrusted = 0b0010
    collecting.open(0)
    with pytest.raises(PeerError):
        collecting.add(0, 1, 4)
    assert collecting.lacks(0, 1)


def test_who_is_dropped_is_neither_waited_for_nor_added() -> None:
    collecting, _ = collector()
    collecting.open(0)
    collecting.drop(0b0100)
    collecting.expect(0b1110)
    assert collecting.expected == 0b1010
    assert not collecting.lacks(0, 2)


def test_only_who_alone_holds_up_a_chunk_is_overdue() -> None:
    collecting, _ = collector()
    collecting.open(0)
    collecting.open(1)
    assert collecting.overdue(silent=0b1110) == 0  # nothing came from anybody
    collecting.add(0, 1, 4)
    assert collecting.overdue(silent=0b0100) == 0
    assert collecting.overdue(silent=0b1100) == 0b1100
    collecting.add(0, 3, 64)
    assert collecting.overdue(silent=0b0100) == 0b0100
    assert collecting.overdue(silent=0b1000) == 0


def test_redone_chunks_are_asked_for_in_a_window() -> None:
    collecting, _ = collector()
    for chunk in range(30):
        collecting.open_to_ask(chunk)
    assert collecting.next_to_ask() == list(range(ASK_WINDOW))
    assert collecting.next_to_ask() == []
    collecting.expect(0)
    collecting.close(2)
    collecting.abandon(3)
    collecting.abandon(ASK_WINDOW)
    assert collecting.next_to_ask() == [ASK_WINDOW + 1, ASK_WINDOW + 2]
