"""What one member holds, writes and lacks, under one plan after another."""

import pytest
from sim.exchange_net import Bytes, make_plans

from mpd.ballot import Plan
from mpd.chunks import Chunks
from mpd.errors import PeerError
from mpd.group import Group
from mpd.messages import Ask, Want
from mpd.rounds import Send, SendPiece, SendResult


def chunks(me: int = 0, owners: tuple[int, ...] = (0, 1, 2)) -> tuple[Chunks, Group, Bytes]:
    plan = make_plans(3, owners)[me]
    vault, group = Bytes(plan), Group(plan, 0.0)
    mine = Chunks(plan, vault, group)
    mine.start()
    return mine, group, vault


def taken(group: Group) -> list[object]:
    actions, group.actions = group.actions, []
    return list(actions)


def test_a_round_starts_with_pieces_for_the_owners() -> None:
    mine, group, _ = chunks()
    assert taken(group) == [SendPiece(1, 1, 0), SendPiece(2, 2, 0)]
    assert mine.n_lacking == 3
    assert (mine.held(), mine.opened(), mine.suppliers()) == (b"\x00", b"\x01", 0b111)


def test_the_last_piece_closes_a_chunk_and_the_result_goes_to_everyone() -> None:
    mine, group, vault = chunks()
    taken(group)
    mine.add_piece(1, 0, 4)
    assert taken(group) == []
    mine.add_piece(2, 0, 16)
    assert taken(group) == [SendResult(1, 0, 0, 0b111), SendResult(2, 0, 0, 0b111)]
    assert vault.slots == {0: 21}
    assert (mine.n_lacking, mine.held(), mine.opened()) == (2, b"\x01", b"\x00")


def test_a_loss_closes_what_waited_for_nobody_else() -> None:
    mine, group, _ = chunks()
    mine.add_piece(1, 0, 4)
    taken(group)
    group.lose(2, "dead")
    mine.close_what_is_ready()
    assert taken(group) == [SendResult(1, 0, 0, 0b011)]


def test_a_plan_replaces_open_versions_and_pulls_the_pieces_of_new_ones() -> None:
    mine, group, vault = chunks()
    mine.add_piece(1, 0, 4)
    taken(group)
    mine.follow(Plan(3, ((3, 1), (3, 0), (0, 2)), 0b111, {}), may_open=True)
    assert not vault.accumulators
    assert taken(group) == [Send(1, Ask(((1, 3),))), Send(2, Ask(((1, 3),)))]
    assert not mine.wants_piece(2, 0, 0)
    assert mine.wants_piece(2, 1, 3)
    assert mine.wants_result(1, 0, 3)


def test_members_that_come_to_a_redo_later_are_asked_too() -> None:
    mine, group, _ = chunks()
    mine.follow(Plan(3, ((0, 0), (3, 0), (0, 2)), 0b011, {}), may_open=True)
    taken(group)
    mine.follow(Plan(4, ((0, 0), (3, 0), (4, 0)), 0b111, {}), may_open=True)
    assert taken(group) == [Send(2, Ask(((1, 3),))), Send(1, Ask(((2, 4),))), Send(2, Ask(((2, 4),)))]


def test_whoever_wanted_a_chunk_before_it_was_closed_gets_it_once() -> None:
    mine, group, _ = chunks()
    mine.add_piece(1, 0, 4)
    mine.answer_want(2, ((0, 0),), keep=True)
    taken(group)
    mine.add_piece(2, 0, 16)
    assert taken(group) == [SendResult(1, 0, 0, 0b111), SendResult(2, 0, 0, 0b111)]


def test_nothing_is_opened_under_a_final_plan() -> None:
    mine, group, _ = chunks()
    taken(group)
    mine.follow(Plan(3, ((0, 0), (3, 0), (0, 2)), 0b111, {}), may_open=False)
    assert taken(group) == []
    assert not mine.wants_piece(2, 1, 3)


def test_an_overwritten_slot_gives_notice_and_counts_anew() -> None:
    mine, _, vault = chunks()
    mine.store_result(1, 0, 0b111, 21)
    mine.follow(Plan(5, ((0, 0), (5, 2), (0, 2)), 0b111, {}), may_open=True)
    assert mine.n_lacking == 3
    assert mine.versions[1] == 0  # others may still want the old one
    mine.store_result(1, 5, 0b110, 20)
    assert (mine.n_lacking, mine.versions[1], vault.slots[1]) == (2, 5, 20)


def test_an_unusable_result_leaves_an_empty_slot() -> None:
    mine, _, _ = chunks()
    mine.store_result(1, 0, 0b111, 21)
    mine.follow(Plan(5, ((0, 0), (5, 2), (0, 2)), 0b111, {}), may_open=True)
    with pytest.raises(PeerError):
        mine.store_result(1, 5, 0b110, -1)
    assert mine.versions[1] == -1
    assert mine.wants_result(2, 1, 5)


def test_wants_are_answered_now_or_when_the_chunk_comes() -> None:
    mine, group, _ = chunks()
    mine.store_result(1, 0, 0b111, 21)
    taken(group)
    mine.answer_want(2, ((1, 0), (2, 0)), keep=True)
    assert taken(group) == [SendResult(2, 1, 0, 0b111)]
    mine.store_result(2, 0, 0b111, 21)
    assert taken(group) == [SendResult(2, 2, 0, 0b111)]


def test_what_the_lost_want_is_not_sent() -> None:
    mine, group, _ = chunks()
    mine.answer_want(2, ((1, 0),), keep=True)
    group.lose(2, "dead")
    taken(group)
    mine.store_result(1, 0, 0b011, 5)
    assert taken(group) == []


def test_what_a_lost_writer_owes_is_sought_elsewhere() -> None:
    mine, group, _ = chunks()
    group.lose(2, "dead")
    taken(group)
    mine.seek(holders=0b010)
    assert taken(group) == [Send(1, Want(0, ((2, 0),)))]
    assert mine.suppliers() == 0b011


def test_the_digest_covers_versions_and_contributors() -> None:
    def digest(version: int, contributors: int) -> bytes:
        mine, _, _ = chunks(owners=(1,))
        mine.versions[0], mine.contributors[0] = version, contributors
        return mine.digest()

    digests = {digest(0, 0b111), digest(0, 0b011), digest(1, 0b111)}
    assert len(digests) == 3
    assert digest(0, 0b111) in digests
    assert all(len(each) == 8 for each in digests)
