"""The others, as one member sees them."""

import pytest
from sim.exchange_net import make_plans

from mpd.errors import PeerError
from mpd.group import MAX_SERVINGS, Group
from mpd.messages import Few
from mpd.rounds import Send


def group(n: int = 5, **fixed: int) -> Group:
    return Group(make_plans(n, [0, 0], **fixed)[0], 0.0)


def test_losses_shrink_the_reach_and_the_first_reason_counts() -> None:
    seen = group()
    assert (seen.linked, seen.in_reach) == (0b11110, 0b11111)
    seen.blame(2, "slow")
    seen.lose(2, "dead")
    seen.lose(4, "dead")
    assert seen.linked == 0b01010
    assert seen.can_redo
    seen.lose(1, "dead")
    assert not seen.can_redo
    assert seen.reasons == {2: "slow", 4: "dead", 1: "dead"}


def test_messages_go_to_who_is_linked() -> None:
    seen = group(3)
    seen.lose(1, "dead")
    seen.broadcast(Few())
    seen.send(2, Few())
    assert seen.actions == [Send(2, Few())] * 2


def test_coordinators_are_sought_among_the_able_and_first_among_the_prompt() -> None:
    seen = group()
    seen.few, seen.silent = 0b00001, 0b00010
    assert seen.possible_coordinators == 0b11100
    seen.few = 0b11101
    assert seen.possible_coordinators == 0b00010


def test_members_that_meet_too_few_from_the_start_cannot_coordinate() -> None:
    assert group(5, inbound=0b00001).few == 0b11110
    assert group(5, inbound=0b00011).few == 0


def test_silence_is_measured_per_member_and_ends_with_a_delivery() -> None:
    seen = group(4)
    seen.note_delivery(5.0, 2)
    assert seen.unheard_since(4.0) == 0b1010
    seen.silent = 0b1010
    assert seen.note_delivery(6.0, 3)
    assert not seen.note_delivery(6.0, 2)
    seen.lose(1, "dead")
    assert seen.silent == 0
    seen.restart_clocks(7.0)
    assert seen.unheard_since(6.9) == 0


def test_nobody_is_served_without_end() -> None:
    seen = group()
    seen.count_servings(1, MAX_SERVINGS * (2 + 5))
    seen.count_servings(2, 1)
    with pytest.raises(PeerError):
        seen.count_servings(1, 1)
