"""Asking for a plan: at once, then ever more rarely, each time another member, and not without hope."""

import pytest
from sim.exchange_net import Bytes, make_plans

from mpd.agreement import Agreement
from mpd.chunks import Chunks
from mpd.errors import RoundFailed
from mpd.group import Group
from mpd.messages import Few, Need, NewPlan, Prepare
from mpd.replan import GRACE, RETRY, Replanner
from mpd.rounds import Send


class Member:
    """One member of 5, whose only chunk belongs to member 4."""

    def __init__(self, me: int = 1) -> None:
        plan = make_plans(5, [4])[me]
        self.group = Group(plan, 0.0)
        self.chunks = Chunks(plan, Bytes(plan), self.group)
        self.agreement = Agreement(plan, self.group, self.chunks)
        self.replanner = Replanner(plan, self.group, self.chunks, self.agreement)
        self.chunks.start()
        self.said()

    def lose(self, *peers: int) -> None:
        for peer in peers:
            self.group.lose(peer, "dead")
            self.chunks.seeker.lost(peer)
            self.replanner.lost(peer)

    def said(self) -> list[tuple[int, object]]:
        actions, self.group.actions = self.group.actions, []
        return [(action.to, action.message) for action in actions if isinstance(action, Send)]


def test_nothing_is_asked_while_all_is_well() -> None:
    member = Member()
    member.replanner.review(0.0)
    member.replanner.arm(0.0)
    assert member.said() == []
    assert member.replanner.retry_at is None
    assert member.replanner.waiting_for() == "1 of 1 chunks"


def test_a_loss_is_followed_by_one_request_and_then_by_others_at_doubling_intervals() -> None:
    member = Member()
    member.lose(4)
    member.replanner.review(0.0)
    assert member.said() == [(0, Need(0, 0))]
    assert member.replanner.waiting_for() == "a decision who redoes 1 of 1 chunks, which nobody in reach can send"
    member.replanner.review(0.0)
    assert member.said() == []
    now, waits = 0.0, []
    for _ in range(3):
        member.replanner.arm(now)
        assert member.replanner.retry_at is not None
        waits.append(member.replanner.retry_at - now)
        now = member.replanner.retry_at
        member.replanner.retry(now)
    assert waits == pytest.approx([RETRY * 1.2, RETRY * 2.4, RETRY * 4.8])  # a fifth more than member 0 waits
    assert member.said() == [(to, Prepare(1)) for to in (0, 2, 3)] + [(2, Need(0, 0)), (3, Need(0, 0))]


def test_who_is_asked_to_coordinate_does_so_unless_a_plan_is_under_way() -> None:
    member = Member(me=0)
    member.replanner.on_need(2.0, 3, Need(0, 0b10000))
    assert member.said() == [(to, Prepare(5)) for to in (1, 2, 3, 4)]
    attempt = member.agreement.attempt
    assert attempt is not None
    assert (attempt.slow, attempt.grace_ends) == (0b10000, 2.0 + GRACE)
    member.replanner.on_need(2.0, 2, Need(0, 0b01000))
    assert member.said() == []
    assert attempt.slow == 0b11000


def test_who_has_promised_another_coordinator_waits_for_it() -> None:
    member = Member(me=0)
    member.agreement.on_prepare(2, Prepare(2))
    member.said()
    member.replanner.on_need(0.0, 3, Need(0, 0))
    assert member.said() == []
    member.lose(2)
    member.replanner.on_need(0.0, 3, Need(0, 0))
    assert (1, Prepare(5)) in member.said()


def test_who_asks_behind_the_time_is_told_the_plan() -> None:
    member = Member(me=0)
    plan = NewPlan(1, 0b01111, ((0, 1, 2),), ())
    member.agreement.on_new_plan(0.0, 1, plan)
    member.said()
    member.replanner.on_need(0.0, 3, Need(0, 0))
    assert member.said() == [(3, plan)]


def test_a_lost_coordinator_of_a_promised_plan_is_replaced_at_once() -> None:
    member = Member()
    member.agreement.on_prepare(2, Prepare(2))
    member.said()
    member.replanner.review(0.0)
    assert member.said() == []
    member.lose(2)
    member.replanner.review(0.0)
    assert member.said() == [(0, Need(0, 0))]


def test_a_member_that_reaches_too_few_says_so_once_and_is_not_asked() -> None:
    member = Member()
    member.lose(4, 3)
    assert member.said() == []
    member.lose(2)
    assert member.said() == [(0, Few())]
    member.replanner.review(0.0)
    assert member.said() == [(0, Need(0, 0))]
    member.replanner.on_few(0)
    with pytest.raises(RoundFailed, match="too few"):
        member.replanner.review(0.0)


def test_few_makes_me_ask_somebody_else_at_once() -> None:
    member = Member()
    member.lose(4)
    member.replanner.review(0.0)
    member.replanner.on_few(0)
    member.said()
    member.replanner.review(0.0)
    assert member.said() == [(to, Prepare(1)) for to in (0, 2, 3)]


def test_alone_there_is_no_hope() -> None:
    member = Member()
    member.lose(0, 2, 3, 4)
    with pytest.raises(RoundFailed, match="no link"):
        member.replanner.review(0.0)


def test_a_new_promise_and_a_new_plan_get_their_time() -> None:
    member = Member()
    member.lose(4)
    member.replanner.review(0.0)
    member.replanner.arm(0.0)
    assert not member.replanner.observe()
    assert member.replanner.retry_at is not None
    member.agreement.on_prepare(2, Prepare(2))
    assert not member.replanner.observe()
    assert member.replanner.retry_at is None
    member.agreement.on_new_plan(0.0, 2, NewPlan(2, 0b01111, ((0, 2, 3),), ()))
    assert member.replanner.observe()
