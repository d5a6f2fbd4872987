"""Promises, acceptance, commitment: what one member says to what it hears."""

import pytest
from sim.exchange_net import Bytes, make_plans

from mpd.agreement import Agreement
from mpd.chunks import Chunks
from mpd.errors import PeerError, RoundFailed
from mpd.group import Group
from mpd.messages import Commit, Done, NewPlan, Prepare, Promise
from mpd.rounds import Send

DIGEST = b"8 bytes."


class Member:
    """Member 0 of 5, whose chunks all belong to member 4."""

    def __init__(self, n_chunks: int = 2) -> None:
        plan = make_plans(5, [4] * n_chunks)[0]
        self.group = Group(plan, 0.0)
        self.chunks = Chunks(plan, Bytes(plan), self.group)
        self.agreement = Agreement(plan, self.group, self.chunks)
        self.chunks.start()
        self.said()

    def hold_everything(self) -> None:
        for chunk in range(len(self.chunks.plan.table)):
            self.chunks.store_result(chunk, 0, 0b11111, 341)

    def said(self) -> list[tuple[int, object]]:
        actions, self.group.actions = self.group.actions, []
        return [(action.to, action.message) for action in actions if isinstance(action, Send)]


def test_a_promise_reports_what_is_held_and_fences_lower_epochs() -> None:
    member = Member()
    member.chunks.store_result(1, 0, 0b11111, 341)
    member.agreement.on_prepare(2, Prepare(7))
    assert member.said() == [(2, Promise(7, True, 7, -1, (), b"\x02", b"\x00"))]
    assert member.agreement.awaits_plan
    member.agreement.on_prepare(1, Prepare(6))
    assert member.said() == [(1, Promise(6, False, 7))]
    member.agreement.on_new_plan(0.0, 1, NewPlan(6, 0b00111, (), ()))
    assert member.agreement.plan.epoch == 0
    member.agreement.on_new_plan(0.0, 2, NewPlan(7, 0b11111, (), ()))
    assert member.agreement.plan.epoch == 7
    assert not member.agreement.awaits_plan


def test_done_waits_for_the_promised_plan() -> None:
    member = Member()
    member.agreement.on_prepare(2, Prepare(7))
    member.hold_everything()
    member.said()
    member.agreement.conclude()
    assert member.said() == []
    member.agreement.on_new_plan(0.0, 2, NewPlan(7, 0b11111, (), ()))
    member.agreement.conclude()
    assert [message for _, message in member.said()] == [Done(7, member.chunks.digest())] * 4
    member.agreement.on_prepare(3, Prepare(8))
    [(_, promise)] = member.said()
    assert isinstance(promise, Promise)
    assert promise.accepted == 7


def test_acceptance_survives_a_plan_with_the_same_table_only() -> None:
    member = Member()
    member.hold_everything()
    member.agreement.conclude()
    member.agreement.on_new_plan(0.0, 1, NewPlan(1, 0b11111, (), ()))
    assert member.agreement.accepted == 0
    member.agreement.on_new_plan(0.0, 2, NewPlan(2, 0b11111, ((0, 2, 1),), ()))
    assert member.agreement.accepted == -1


def test_a_quorum_of_done_commits_and_the_last_of_it_says_no_done() -> None:
    member = Member()
    member.hold_everything()
    member.said()
    digest = member.chunks.digest()
    member.agreement.on_done(1, Done(0, digest))
    member.agreement.on_done(2, Done(3, digest))
    member.agreement.conclude()
    assert member.agreement.committed is None
    assert {type(message) for _, message in member.said()} == {Done}
    member.agreement.on_done(4, Done(0, digest))
    member.agreement.conclude()
    assert member.agreement.committed == 0
    assert member.agreement.confirmed == 0b10111
    assert member.said() == []
    assert member.agreement.commit() == Commit(0, ())


def test_two_contents_of_one_plan_fail_the_round() -> None:
    member = Member()
    member.agreement.on_done(1, Done(0, DIGEST))
    member.hold_everything()
    with pytest.raises(RoundFailed, match="another result"):
        member.agreement.conclude()
    assert member.group.reasons == {1: "it says that it holds another result than this machine"}


def test_a_commit_is_installed_whatever_was_promised() -> None:
    member = Member()
    member.agreement.on_prepare(4, Prepare(9))
    member.agreement.on_commit(0.0, 3, Commit(6, ((0, 6, 1),)))
    assert member.agreement.plan.table == ((6, 1), (0, 4))
    assert (member.agreement.committed, member.agreement.holders) == (6, 0b01000)
    with pytest.raises(PeerError):
        member.agreement.on_commit(0.0, 2, Commit(7, ()))
    with pytest.raises(PeerError):
        member.agreement.on_new_plan(0.0, 2, NewPlan(12, 0b00111, (), ()))
    member.agreement.on_new_plan(0.0, 2, NewPlan(12, 0b00111, ((0, 6, 1),), ()))
    assert member.agreement.plan.epoch == 12


def test_a_coordinator_prepares_its_own_next_epoch_and_decides_with_everyone() -> None:
    member = Member()
    member.group.lose(4, "dead")
    member.agreement.prepare(0.0, slow=0, grace_s=1.0)
    assert member.said() == [(to, Prepare(5)) for to in (1, 2, 3)]
    for sender in (1, 2):
        member.agreement.on_promise(sender, Promise(5, True, 5, -1, (), b"\x00", b"\x00"))
        member.agreement.decide_if_possible(0.0)
        assert member.said() == []
    member.agreement.on_promise(3, Promise(5, True, 5, -1, (), b"\x01", b"\x00"))
    member.agreement.decide_if_possible(0.0)
    plan = NewPlan(5, 0b01111, ((1, 5, 0),), ((0, 0b01000),), 0b10000)
    assert member.said()[:3] == [(to, plan) for to in (1, 2, 3)]
    assert member.agreement.plan.epoch == 5
    assert member.agreement.attempt is None


def test_a_refusal_ends_an_attempt_and_the_next_one_is_higher() -> None:
    member = Member()
    member.agreement.prepare(0.0, slow=0, grace_s=1.0)
    member.agreement.on_promise(2, Promise(5, False, 12))
    assert member.agreement.attempt is None
    assert member.agreement.n_refused == 1
    member.said()
    member.agreement.prepare(0.0, slow=0, grace_s=1.0)
    assert member.said()[0] == (1, Prepare(15))


def test_a_higher_prepare_ends_my_own_attempt() -> None:
    member = Member()
    member.agreement.prepare(0.0, slow=0, grace_s=1.0)
    member.agreement.on_prepare(1, Prepare(6))
    assert member.agreement.attempt is None


def test_a_plan_is_passed_on_to_members_that_did_not_promise_it() -> None:
    member = Member()
    plan = NewPlan(1, 0b00111, ((0, 1, 2), (1, 1, 1)), ())
    member.agreement.on_new_plan(0.0, 1, plan)
    assert member.said() == [(3, plan), (4, plan)]
    member.agreement.on_new_plan(0.0, 2, plan)
    assert member.said() == []


def test_hope_ends_when_a_success_quorum_is_out_of_reach() -> None:
    member = Member()
    for peer in (3, 4):
        member.group.lose(peer, "dead")
    assert not member.agreement.is_hopeless
    member.group.lose(2, "dead")
    assert member.agreement.is_hopeless
    member.agreement.on_done(2, Done(0, DIGEST))
    assert not member.agreement.is_hopeless
