"""One machine, event by event: which event moves which state, and what a peer hears in return."""

import contextlib
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim.slot_sim import DIGEST, NUMBER, RUN, SLOT, SlotSim, peer, ticket

from mpd.errors import PeerError, RoundFailed
from mpd.grouping import compose_begins
from mpd.ids import PeerId
from mpd.mass import enter
from mpd.matchmaking import MAX_LEAP, Alone, Begun, MatchLimits, Matchmaker, Message, Send, Sighting, State
from mpd.messages import MAX_COLLECTED, MAX_MEMBERS, Begin, Declined, Disbanded, Here, Join, Joined, Member, Quit

LIMITS = MatchLimits(window_s=5, settle_s=1, answer_s=1)
SMALLER, LEADER, ME, FOLLOWER, IDLE = peer(0), peer(1), peer(5), peer(8), peer(9)
STAMPS = {SMALLER: 0, LEADER: 10, ME: 50, FOLLOWER: 80, IDLE: 90}

compose = partial(
    compose_begins, shape=(1,), n_peers=8, exact=True, rng=random.Random(0), progress_s=2.0, payload_bytes=1 << 20
)


def fresh(line_size: int = 0) -> Matchmaker:
    return Matchmaker(ME, SLOT, RUN, NUMBER, compose, LIMITS, line_size)


def here(who: PeerId, ready: bool = True) -> Here:
    return Here(RUN, SLOT, NUMBER, ready, STAMPS[who] if ready else 0)


def join(who: PeerId, **changes: object) -> Join:
    return ticket(STAMPS[who], **changes)  # type: ignore[arg-type]


def begin(*members: PeerId, **changes: object) -> Begin:
    places = tuple(Member(who, "192.0.2.1", 4747, True, 1.0, 1.0, 1 / len(members), STAMPS[who]) for who in members)
    plan = Begin(b"r" * 16, RUN, SLOT, DIGEST, 1, NUMBER, places, True, 65536, 10.0, 2.0, {})
    return replace(plan, **changes)  # type: ignore[arg-type]


def sighted(machine: Matchmaker, now: float, *peers: PeerId) -> None:
    for who in peers:
        machine.on_sighted(now, Sighting(who, inbound=True, ready=False, stamp=0))


def in_state(state: State) -> Matchmaker:
    """A machine at time 1 that knows a peer which will not be ready, so that no group is full."""
    machine = fresh()
    sighted(machine, 0.0, IDLE)
    if state is not State.EXPECTED:
        machine.on_ready(0.5, join(ME))
    if state is State.LEADING:
        machine.on_message(0.6, FOLLOWER, join(FOLLOWER))
    if state in (State.JOINING, State.FOLLOWING, State.BEGUN):
        machine.on_message(0.6, LEADER, here(LEADER))
    if state in (State.FOLLOWING, State.BEGUN):
        machine.on_message(0.7, LEADER, Joined(SLOT, STAMPS[ME]))
    if state is State.BEGUN:
        machine.on_message(0.8, LEADER, begin(LEADER, ME))
    if state is State.ALONE:
        machine.cancel(0.8, "no wish for a group")
    assert machine.state is state
    machine.take_actions()
    return machine


def said(machine: Matchmaker) -> list[tuple[PeerId, Message]]:
    return [(send.peer, send.message) for send in machine.take_actions()]


# ---------------------------------------------------------------------------------------- every event in every state

EXPECTED, SEEKING, LEADING, JOINING, FOLLOWING, BEGUN, ALONE = State
EVENTS: dict[str, Callable[[Matchmaker], None]] = {
    "a newcomer is sighted": lambda m: sighted(m, 1.0, peer(7)),
    "a smaller peer is ready": lambda m: m.on_message(1.0, SMALLER, here(SMALLER)),
    "a larger peer is ready": lambda m: m.on_message(1.0, FOLLOWER, here(FOLLOWER)),
    "a larger peer joins": lambda m: m.on_message(1.0, FOLLOWER, join(FOLLOWER)),
    "a smaller peer joins": lambda m: m.on_message(1.0, SMALLER, join(SMALLER)),
    "joined by the leader": lambda m: m.on_message(1.0, LEADER, Joined(SLOT, STAMPS[ME])),
    "joined by another": lambda m: m.on_message(1.0, FOLLOWER, Joined(SLOT, STAMPS[ME])),
    "declined, not leading": lambda m: m.on_message(1.0, LEADER, Declined(SLOT, "not_leading", leader=ME)),
    "declined, ask a smaller one": lambda m: m.on_message(1.0, LEADER, Declined(SLOT, "not_leading", leader=SMALLER)),
    "declined, other terms": lambda m: m.on_message(1.0, LEADER, Declined(SLOT, "other_terms")),
    "disbanded for a smaller one": lambda m: m.on_message(1.0, LEADER, Disbanded(SLOT, leader=SMALLER)),
    "disbanded": lambda m: m.on_message(1.0, LEADER, Disbanded(SLOT)),
    "the leader quits": lambda m: m.on_message(1.0, LEADER, Quit(SLOT)),
    "the follower quits": lambda m: m.on_message(1.0, FOLLOWER, Quit(SLOT)),
    "the leader is gone": lambda m: m.on_gone(1.0, LEADER, "its link broke"),
    "the follower is gone": lambda m: m.on_gone(1.0, FOLLOWER, "its link broke"),
    "the idle peer is gone": lambda m: m.on_gone(1.0, IDLE, "its link broke"),
    "the leader begins": lambda m: m.on_message(1.0, LEADER, begin(LEADER, ME)),
    "a member passes Begin on": lambda m: m.on_message(1.0, FOLLOWER, begin(LEADER, FOLLOWER, ME)),
    "the leader begins without us": lambda m: m.on_message(1.0, LEADER, begin(LEADER, FOLLOWER)),
    "another group begins": lambda m: m.on_message(1.0, FOLLOWER, begin(SMALLER, FOLLOWER, ME)),
    "no answer in time": lambda m: m.on_tick(1.6),
    "the window ends": lambda m: m.on_tick(5.5),
    "the step ends": lambda m: m.on_tick(60.5),
    "cancel": lambda m: m.cancel(1.0, "the trainer is gone"),
}
# What is not listed leaves the state as it is.
EFFECTS: dict[str, dict[State, State]] = {
    "a smaller peer is ready": {SEEKING: JOINING, LEADING: JOINING},
    "a larger peer joins": {SEEKING: LEADING},
    "a smaller peer joins": {SEEKING: JOINING, LEADING: JOINING},
    "joined by the leader": {JOINING: FOLLOWING},
    "declined, not leading": {JOINING: SEEKING, FOLLOWING: SEEKING},
    "declined, ask a smaller one": {SEEKING: JOINING, LEADING: JOINING, FOLLOWING: JOINING},
    "declined, other terms": {JOINING: SEEKING, FOLLOWING: SEEKING},
    "disbanded for a smaller one": {SEEKING: JOINING, LEADING: JOINING, FOLLOWING: JOINING},
    "disbanded": {JOINING: SEEKING, FOLLOWING: SEEKING},
    "the leader quits": {FOLLOWING: SEEKING},  # who was asked answers that; a Quit was said before
    "the follower quits": {LEADING: SEEKING},
    "the leader is gone": {JOINING: SEEKING, FOLLOWING: SEEKING},
    "the follower is gone": {LEADING: SEEKING},
    "the idle peer is gone": {LEADING: BEGUN},
    "the leader begins": {JOINING: BEGUN, FOLLOWING: BEGUN},
    "a member passes Begin on": {JOINING: BEGUN, FOLLOWING: BEGUN},
    "the leader begins without us": {JOINING: SEEKING, FOLLOWING: SEEKING},
    "no answer in time": {JOINING: SEEKING},
    "the window ends": {SEEKING: ALONE, LEADING: BEGUN, JOINING: SEEKING},
    "the step ends": {SEEKING: ALONE, LEADING: ALONE, JOINING: ALONE, FOLLOWING: ALONE},
    "cancel": {EXPECTED: ALONE, SEEKING: ALONE, LEADING: ALONE, JOINING: ALONE, FOLLOWING: ALONE},
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", State)
def test_every_event_in_every_state(state: State, event: str) -> None:
    machine = in_state(state)
    EVENTS[event](machine)
    assert machine.state is EFFECTS.get(event, {}).get(state, state)
    assert machine.reason
    assert (machine.verdict is not None) == (machine.state in (BEGUN, ALONE))
    assert (machine.leader is not None) or machine.state not in (JOINING, FOLLOWING)
    assert machine.wakeup is None or machine.state in (SEEKING, LEADING, JOINING, FOLLOWING)


@pytest.mark.parametrize("state", [state for state in State if state is not State.EXPECTED])
def test_a_trainer_asks_once(state: State) -> None:
    machine = in_state(state)
    with pytest.raises(KeyError):
        machine.on_ready(1.0, join(ME))


@given(st.lists(st.sampled_from([*EVENTS, "ready"]), max_size=30))
def test_no_order_of_events_breaks_a_machine(events: list[str]) -> None:
    machine = fresh()
    for event in events:
        if event != "ready":
            EVENTS[event](machine)
        elif machine.state is EXPECTED:
            machine.on_ready(1.0, join(ME))
    machine.on_tick(1e9)
    assert machine.state in (EXPECTED, BEGUN, ALONE)


# ------------------------------------------------------------------------------------------------ who hears what


def test_a_sighted_peer_hears_of_us_once_and_again_when_we_are_ready() -> None:
    machine = fresh()
    sighted(machine, 0.0, FOLLOWER)
    sighted(machine, 0.1, FOLLOWER, ME)
    assert said(machine) == [(FOLLOWER, here(ME, ready=False))]
    machine.on_ready(0.5, join(ME))
    sighted(machine, 0.6, FOLLOWER)
    assert said(machine) == [(FOLLOWER, here(ME))]


def test_who_tells_us_of_itself_need_not_be_told() -> None:
    machine = fresh()
    machine.on_message(0.0, FOLLOWER, here(FOLLOWER, ready=False))
    assert said(machine) == []
    machine.on_ready(0.5, join(ME))
    machine.on_message(0.6, FOLLOWER, here(FOLLOWER))
    assert said(machine) == [(FOLLOWER, here(ME))]


def test_who_asks_for_an_answer_is_told_that_we_are_here() -> None:
    machine = fresh()
    machine.on_message(0.0, FOLLOWER, replace(here(FOLLOWER, ready=False), answer=True))
    assert said(machine) == [(FOLLOWER, here(ME, ready=False))]
    machine.on_message(0.1, FOLLOWER, here(FOLLOWER, ready=False))
    assert said(machine) == []


def test_a_greeting_says_that_we_lead_only_if_we_may() -> None:
    machine = fresh()
    assert machine.greeting() == replace(here(ME, ready=False), answer=True)
    machine.on_ready(0.5, join(ME))
    assert machine.greeting() == replace(here(ME), answer=True)
    machine.on_message(0.6, LEADER, here(LEADER))
    assert machine.leader == LEADER
    assert machine.greeting() == replace(here(ME, ready=False), answer=True)


def test_until_it_is_ready_a_quiet_peer_tells_nobody_for_a_while() -> None:
    def quiet() -> Matchmaker:
        machine = Matchmaker(ME, SLOT, RUN, NUMBER, compose, LIMITS, n_phases=2, quiet_until=1.0)
        sighted(machine, 0.0, FOLLOWER)
        assert said(machine) == []
        return machine

    machine = quiet()
    machine.on_tick(1.0)
    assert said(machine) == [(FOLLOWER, here(ME, ready=False))]
    machine = quiet()
    machine.on_ready(0.5, join(ME))
    assert said(machine) == [(FOLLOWER, here(ME))]
    machine = quiet()
    machine.on_message(0.4, LEADER, here(LEADER))
    machine.on_ready(0.5, join(ME))
    assert said(machine) == [(LEADER, join(ME))]  # whom it follows counts it


def test_a_leader_goes_by_what_is_known_of_its_line_by_now() -> None:
    machine = fresh(line_size=3)
    machine.on_ready(0.0, join(ME))
    machine.on_message(0.1, FOLLOWER, join(FOLLOWER))
    assert machine.state is LEADING
    machine.on_line(0.2, 2, 2)
    assert machine.state is BEGUN


def test_who_has_a_leader_invites_nobody() -> None:
    machine = fresh()
    sighted(machine, 0.0, FOLLOWER, IDLE)
    machine.on_message(0.1, LEADER, here(LEADER))
    machine.take_actions()
    machine.on_ready(0.5, join(ME))
    assert said(machine) == [(LEADER, join(ME))]


def test_two_machines_form_a_group_in_three_messages() -> None:
    sim = SlotSim(2, delay_s=lambda rng: 0.1)
    sim.announce_all(sighting_s=0.0)
    sim.ready(1.0, 0, stamp=1)
    sim.ready(2.0, 1, stamp=2)
    sim.run()
    assert sim.frames == {"Here": 2, "Join": 1, "Begin": 1}  # one Here ahead of time
    leader, follower = (machine.verdict for machine in sim.machines)
    assert isinstance(leader, Begun)
    assert isinstance(follower, Begun)
    assert (leader.leader, follower.leader) == (True, False)
    assert leader.begin == follower.begin
    assert sim.machines[0].reason == "full: 2 of 2 announced peers are ready"


def test_a_learnt_window_closes_a_group_and_leaves_a_lone_peer_its_time() -> None:
    machine = fresh()
    sighted(machine, 0.0, IDLE)
    machine.on_ready(0.5, join(ME), replace(LIMITS, window_s=1.5))
    machine.on_tick(2.5)
    assert machine.state is SEEKING  # nobody else waits for it
    machine.on_message(2.6, FOLLOWER, join(FOLLOWER))
    assert isinstance(machine.verdict, Begun)
    assert machine.verdict.begin.left_out == {IDLE: "its trainer had not asked for a step when the window ended"}
    alone = fresh()
    sighted(alone, 0.0, IDLE)
    alone.on_ready(0.5, join(ME), replace(LIMITS, window_s=1.5))
    alone.on_tick(5.5)
    assert isinstance(alone.verdict, Alone)


def test_lateness_counts_from_our_own_readiness() -> None:
    machine = fresh()
    sighted(machine, 0.0, IDLE, SMALLER)
    machine.on_message(0.2, SMALLER, here(SMALLER))
    machine.on_ready(0.5, join(ME))
    machine.on_message(0.9, FOLLOWER, here(FOLLOWER))
    assert machine.lateness(1.0) == {}
    machine.on_message(1.5, SMALLER, begin(SMALLER, FOLLOWER, IDLE, ME))
    assert machine.lateness(1.5) == {SMALLER: 0.0, FOLLOWER: pytest.approx(0.4), IDLE: 1.0}
    assert in_state(ALONE).lateness(1.0) == {}


def test_the_ticket_and_the_begin_carry_the_time_that_is_left() -> None:
    machine = in_state(LEADING)  # ready at 0.5, followed at 0.6, 60 s each
    machine.on_tick(5.5)
    assert isinstance(machine.verdict, Begun)
    assert machine.verdict.begin.timeout_s == pytest.approx(55.1)
    assert machine.verdict.begin.left_out == {IDLE: "its trainer had not asked for a step when the window ended"}
    asking = in_state(SEEKING)
    asking.on_message(2.5, LEADER, here(LEADER))
    assert said(asking) == [(LEADER, join(ME, time_left_s=58.0))]


def test_what_is_known_of_the_line_by_the_time_the_trainer_asks_counts() -> None:
    machine = fresh(line_size=2)
    machine.on_ready(0.5, join(ME), LIMITS, (0, 9))
    machine.on_message(0.6, FOLLOWER, join(FOLLOWER))
    assert machine.state is LEADING
    machine.on_tick(0.6 + LIMITS.quick_s)
    assert isinstance(machine.verdict, Begun)


def test_a_short_step_keeps_half_of_its_time_for_the_exchange() -> None:
    machine = fresh()
    machine.on_ready(0.0, join(ME, time_left_s=4.0))
    assert machine.wakeup == 0.3  # settled, were there anybody
    machine.on_tick(0.3)
    assert machine.wakeup == 2.0


def test_a_leader_that_finds_a_smaller_one_takes_its_followers_along() -> None:
    machine = in_state(LEADING)
    machine.on_message(1.0, SMALLER, here(SMALLER))
    assert said(machine) == [(FOLLOWER, Disbanded(SLOT, leader=SMALLER)), (SMALLER, join(ME, time_left_s=59.5))]
    machine.on_message(1.1, FOLLOWER, join(FOLLOWER))
    assert said(machine) == [(FOLLOWER, Declined(SLOT, "not_leading", leader=SMALLER))]


def test_a_second_ticket_replaces_the_first() -> None:
    machine = in_state(LEADING)
    machine.on_message(1.0, FOLLOWER, join(FOLLOWER, time_left_s=30.0))
    assert said(machine) == [(FOLLOWER, Joined(SLOT, STAMPS[FOLLOWER]))]
    machine.on_message(2.0, FOLLOWER, ticket(stamp=1))
    assert (machine.state, machine.leader) == (JOINING, FOLLOWER)


def test_who_was_taken_along_is_not_told_twice() -> None:
    machine = in_state(SEEKING)
    machine.on_message(0.8, FOLLOWER, here(FOLLOWER))
    machine.on_message(0.9, FOLLOWER, join(FOLLOWER))
    machine.on_message(1.0, SMALLER, here(SMALLER))
    machine.on_message(1.1, SMALLER, Joined(SLOT, STAMPS[ME]))
    machine.take_actions()
    machine.on_message(1.2, SMALLER, here(SMALLER))
    machine.on_tick(2.0)
    assert said(machine) == []


def test_a_leader_that_was_turned_down_invites_again() -> None:
    machine = in_state(LEADING)
    machine.on_message(1.0, SMALLER, here(SMALLER))
    machine.take_actions()
    machine.on_message(1.1, SMALLER, Declined(SLOT, "full"))
    assert said(machine) == [(FOLLOWER, here(ME))]


def test_silence_is_taken_back_and_named() -> None:
    machine = in_state(JOINING)
    assert machine.wakeup == 1.6
    machine.on_tick(1.6)
    assert (LEADER, Quit(SLOT)) in said(machine)
    machine.cancel(2.0, "enough")
    assert isinstance(machine.verdict, Alone)
    assert machine.verdict.missing[LEADER] == "did not answer within 1 s"


def test_a_yes_to_an_earlier_attempt_in_this_slot_is_ignored() -> None:
    for state in (State.EXPECTED, SEEKING, JOINING):
        machine = in_state(state)
        machine.take_actions()
        machine.on_message(1.0, LEADER, Joined(SLOT, STAMPS[ME] - 1))
        assert (machine.state, said(machine)) == (state, [])


def test_a_late_yes_is_answered_with_quit() -> None:
    machine = in_state(SEEKING)
    machine.on_message(1.0, LEADER, Joined(SLOT, STAMPS[ME]))
    assert said(machine) == [(LEADER, Quit(SLOT))]


def test_a_made_up_leader_is_asked_once() -> None:
    machine, ghost = in_state(SEEKING), peer(3)
    for _ in range(3):
        machine.on_message(1.0, FOLLOWER, Declined(SLOT, "not_leading", leader=ghost))
    assert [message for to, message in said(machine) if to == ghost] == [join(ME, time_left_s=59.5)]
    machine.on_tick(2.0)
    assert machine.state is SEEKING
    machine.take_actions()
    machine.on_message(2.1, FOLLOWER, Declined(SLOT, "not_leading", leader=ghost))
    assert said(machine) == []


def test_a_larger_peer_is_not_asked_whoever_names_it() -> None:
    machine = in_state(SEEKING)
    machine.on_message(1.0, FOLLOWER, here(FOLLOWER))
    machine.on_message(1.1, LEADER, Disbanded(SLOT, leader=FOLLOWER))
    assert machine.state is SEEKING


def test_two_that_ask_each_other_agree_on_the_smaller_one() -> None:
    machine = in_state(SEEKING)
    machine.on_sighted(1.0, Sighting(FOLLOWER, inbound=True, ready=True, stamp=1))  # wrong: it is outbound-only
    assert (machine.state, machine.leader) == (JOINING, FOLLOWER)
    machine.take_actions()
    machine.on_message(1.1, FOLLOWER, join(FOLLOWER, inbound=False))
    assert machine.state is LEADING
    assert said(machine) == [(FOLLOWER, Joined(SLOT, STAMPS[FOLLOWER]))]
    machine.on_message(1.2, FOLLOWER, Declined(SLOT, "not_leading", leader=ME))  # what it makes of our Join
    assert machine.state is LEADING


def test_a_smaller_peer_that_asks_is_told_that_it_leads() -> None:
    machine = in_state(LEADING)
    machine.on_message(1.0, SMALLER, join(SMALLER))
    assert said(machine) == [
        (SMALLER, Declined(SLOT, "not_leading", leader=SMALLER)),
        (FOLLOWER, Disbanded(SLOT, leader=SMALLER)),
        (SMALLER, join(ME, time_left_s=59.5)),
    ]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"digest": b"x" * 32}, "other_terms"),
        ({"epoch": 2}, "other_epoch"),
        ({"epoch": 0}, "older_record"),
        ({"number": NUMBER + MAX_LEAP + 1}, "other_number"),
    ],
)
def test_a_ticket_that_does_not_fit_is_declined_and_not_awaited(changes: dict[str, object], why: str) -> None:
    machine = in_state(SEEKING)
    machine.on_message(1.0, FOLLOWER, join(FOLLOWER, **changes))
    [(to, declined)] = said(machine)
    assert to == FOLLOWER
    assert isinstance(declined, Declined)
    assert declined.why == why
    assert declined.detail
    machine.on_tick(5.5)
    assert isinstance(machine.verdict, Alone)
    assert machine.verdict.missing[FOLLOWER] == declined.detail


def test_who_stands_at_another_round_is_told_so_instead_of_being_awaited() -> None:
    machine = in_state(SEEKING)
    machine.on_message(1.0, FOLLOWER, replace(here(FOLLOWER), number=NUMBER + MAX_LEAP + 1))
    detail = f"the next round is {NUMBER} here, {NUMBER + MAX_LEAP + 1} there"
    assert said(machine) == [(FOLLOWER, Declined(SLOT, "other_number", detail=detail))]


def test_whoever_is_behind_in_its_rounds_goes_on_with_the_group() -> None:
    machine = Matchmaker(ME, SLOT, RUN, NUMBER, compose, LIMITS, n_phases=2)
    machine.on_ready(0.5, join(ME))
    machine.on_message(0.6, FOLLOWER, join(FOLLOWER, number=NUMBER + 6))
    assert isinstance(machine.verdict, Begun)
    assert machine.verdict.begin.number == NUMBER + 6
    follower = Matchmaker(ME, SLOT, RUN, NUMBER, compose, LIMITS, n_phases=2)
    follower.on_ready(0.5, join(ME))
    follower.on_message(0.6, LEADER, replace(here(LEADER), number=NUMBER + 2))
    follower.on_message(0.7, LEADER, Joined(SLOT, STAMPS[ME]))
    follower.on_message(0.8, LEADER, begin(LEADER, ME, number=NUMBER + 2))
    assert follower.state is BEGUN


@pytest.mark.parametrize(("number", "follows"), [(NUMBER + 1, True), (NUMBER, False)])
def test_whoever_is_ahead_goes_back_to_the_group_only_in_the_midst_of_a_cycle(number: int, follows: bool) -> None:
    ahead = Matchmaker(ME, SLOT, RUN, number + 2, compose, LIMITS, n_phases=2)
    ahead.on_ready(0.5, join(ME, number=number + 2))
    ahead.on_message(0.6, LEADER, replace(here(LEADER), number=number))
    ahead.on_message(0.7, LEADER, Joined(SLOT, STAMPS[ME]))
    with contextlib.nullcontext() if follows else pytest.raises(PeerError, match="another number"):
        ahead.on_message(0.8, LEADER, begin(LEADER, ME, number=number))
    assert (ahead.state is BEGUN) == follows


def test_nobody_is_taken_along_into_another_phase() -> None:
    machine = Matchmaker(ME, SLOT, RUN, NUMBER, compose, LIMITS, n_phases=2)
    machine.on_ready(0.5, join(ME))
    machine.on_message(0.6, FOLLOWER, join(FOLLOWER, number=NUMBER + 5))
    assert [m.why for _, m in said(machine) if isinstance(m, Declined)] == ["other_number"]


def test_who_is_not_ready_says_so_and_asks_back_later() -> None:
    machine = in_state(EXPECTED)
    machine.on_message(1.0, LEADER, join(LEADER))
    assert said(machine) == [(LEADER, Declined(SLOT, "not_ready"))]
    machine.on_ready(2.0, join(ME))
    assert said(machine) == [(LEADER, join(ME))]


@pytest.mark.parametrize("state", [BEGUN, ALONE])
def test_who_is_done_is_busy(state: State) -> None:
    machine = in_state(state)
    machine.on_message(1.0, FOLLOWER, join(FOLLOWER))
    assert said(machine) == [(FOLLOWER, Declined(SLOT, "busy", detail=machine.reason))]


def test_a_group_is_closed_before_it_has_too_many_members() -> None:
    machine = in_state(SEEKING)
    for i in range(MAX_COLLECTED):
        machine.on_message(1.0, PeerId(b"f" * 18 + i.to_bytes(2, "big")), join(FOLLOWER))
    assert isinstance(machine.verdict, Begun)
    told = said(machine)
    begun = [(who, message) for who, message in told if isinstance(message, Begin)]
    assert len(begun) == MAX_COLLECTED - 1
    for who, its in begun:  # each has that of its own group
        assert who in {member.peer for member in its.members}
        assert (len(its.members), its.parts) == (MAX_MEMBERS, MAX_COLLECTED // MAX_MEMBERS)
    assert isinstance(told[-1][1], Declined)


def test_the_leader_of_a_line_that_is_cut_begins_groups_without_itself() -> None:
    machine = in_state(FOLLOWING)
    machine.on_message(1.0, LEADER, begin(FOLLOWER, ME, parts=2))
    assert machine.state is BEGUN


def test_a_begin_of_a_cut_line_may_come_from_a_member_before_the_leader_s() -> None:
    """To refuse it, and to follow the leader's a moment later, would be to leave the round and to wait for it."""
    machine = in_state(FOLLOWING)
    machine.on_message(1.0, FOLLOWER, begin(FOLLOWER, ME, parts=2))
    assert machine.state is BEGUN


@pytest.mark.parametrize("sender", [SMALLER, FOLLOWER])
def test_nobody_else_may_begin_a_group_without_itself(sender: PeerId) -> None:
    machine = in_state(FOLLOWING)
    with pytest.raises(PeerError, match="not in it"):
        machine.on_message(1.0, sender, begin(LEADER, ME, parts=2))


def test_an_older_record_is_declined_with_the_newer_epoch() -> None:
    machine = Matchmaker(ME, SLOT, RUN, NUMBER, compose, LIMITS, epoch=4)
    machine.on_ready(0.5, join(ME, epoch=4))
    machine.on_message(1.0, FOLLOWER, join(FOLLOWER, epoch=3))
    machine.on_message(1.0, SMALLER, join(SMALLER, epoch=5))
    declined = [(who, m.why, m.epoch) for who, m in said(machine) if isinstance(m, Declined)]
    assert declined == [(FOLLOWER, "older_record", 4), (SMALLER, "other_epoch", 0)]


def test_who_gets_another_answer_than_begin_is_told_to_stop_waiting() -> None:
    machine = in_state(LEADING)
    machine.cancel(1.0, "the trainer is gone")
    assert dict(said(machine)) == {FOLLOWER: Disbanded(SLOT), IDLE: Quit(SLOT)}
    follower = in_state(FOLLOWING)
    follower.on_message(1.0, LEADER, begin(LEADER, ME))
    assert dict(said(follower)) == {IDLE: Quit(SLOT)}


def test_a_follower_that_does_not_fit_into_the_plan_is_let_go() -> None:
    machine = in_state(SEEKING)
    machine.on_message(1.0, FOLLOWER, join(FOLLOWER, standing=enter(1.0, (3,))))
    machine.on_message(1.0, peer(7), join(IDLE))
    machine.take_actions()
    machine.on_tick(5.5)
    assert isinstance(machine.verdict, Begun)
    plan = machine.verdict.begin
    assert said(machine) == [(peer(7), plan), (IDLE, Quit(SLOT)), (FOLLOWER, Disbanded(SLOT))]


def test_what_a_peer_gives_as_its_reason_is_cut() -> None:
    machine = in_state(JOINING)
    machine.on_message(1.0, LEADER, Declined(SLOT, "busy", detail="x" * 10_000))
    machine.cancel(1.1, "enough")
    assert isinstance(machine.verdict, Alone)
    assert len(machine.verdict.missing[LEADER]) < 300


def test_a_follower_whose_time_is_up_is_not_taken_along() -> None:
    machine = fresh()
    sighted(machine, 0.0, IDLE)
    machine.on_ready(0.0, join(ME))
    machine.on_message(0.1, FOLLOWER, join(FOLLOWER, time_left_s=2.0))
    machine.on_tick(5.0)
    assert isinstance(machine.verdict, Alone)
    assert machine.verdict.missing[FOLLOWER] == "its step's time was up"


def test_a_follower_outlasts_its_window_and_then_has_time_for_a_new_leader() -> None:
    machine = in_state(FOLLOWING)
    machine.on_tick(5.5)
    assert machine.state is FOLLOWING
    machine.on_gone(5.5, LEADER, "its link broke")
    machine.on_tick(6.4)
    assert machine.state is SEEKING
    machine.on_tick(6.5)
    assert machine.state is ALONE


def test_a_leader_that_never_begins_does_not_hold_its_followers_for_ever() -> None:
    machine = in_state(FOLLOWING)
    machine.on_tick(30.0)
    assert machine.state is SEEKING
    assert (LEADER, Quit(SLOT)) in said(machine)
    machine.on_tick(31.0)
    assert isinstance(machine.verdict, Alone)
    assert "did not begin within 6 s" in machine.verdict.missing[LEADER]


def test_others_are_pointed_to_our_leader_once_it_takes_its_time() -> None:
    machine = in_state(FOLLOWING)  # asked at 0.6
    machine.on_message(1.0, FOLLOWER, here(FOLLOWER))
    assert said(machine) == []
    assert machine.wakeup == 1.6
    machine.on_tick(1.6)
    machine.on_tick(1.7)
    assert said(machine) == [(FOLLOWER, Declined(SLOT, "not_leading", leader=LEADER))]


def test_who_was_gone_counts_again_when_it_speaks_and_while_nobody_waits_when_it_is_seen() -> None:
    machine = in_state(EXPECTED)
    machine.on_gone(1.0, IDLE, "its link broke")
    sighted(machine, 1.1, IDLE)
    assert said(machine) == [(IDLE, here(ME, ready=False))]
    machine.on_ready(1.2, join(ME))
    machine.on_gone(1.3, IDLE, "its link broke")
    machine.take_actions()
    sighted(machine, 1.4, IDLE)
    assert said(machine) == []
    machine.on_message(1.5, IDLE, here(IDLE))
    assert said(machine) == [(IDLE, here(ME))]


def test_a_begin_that_answers_an_earlier_join_is_none_of_ours() -> None:
    machine = fresh()
    machine.on_message(0.1, LEADER, here(LEADER))
    machine.on_ready(0.2, ticket(STAMPS[ME] + 1))  # asked before as STAMPS[ME], in another life or for another step
    assert machine.state is JOINING
    machine.on_message(0.3, LEADER, begin(LEADER, ME))
    assert (machine.state, machine.verdict) == (JOINING, None)
    answer = begin(LEADER, ME)
    renewed = tuple(replace(m, stamp=m.stamp + (m.peer == ME)) for m in answer.members)
    machine.on_message(0.4, LEADER, replace(answer, members=renewed))
    assert machine.state is BEGUN


def test_a_round_without_sense_leaves_everybody_alone_with_the_reason() -> None:
    def refuse(members: object, left_out: object) -> Begin:
        raise RoundFailed("nobody brings any weight")

    machine = Matchmaker(ME, SLOT, RUN, NUMBER, refuse, LIMITS)
    machine.on_ready(0.0, join(ME))
    machine.on_message(0.1, FOLLOWER, join(FOLLOWER))
    assert machine.verdict == Alone("nobody brings any weight", {})
    assert said(machine) == [(FOLLOWER, Disbanded(SLOT))]


# ------------------------------------------------------------------------------------------------------------- blame


@pytest.mark.parametrize(
    ("sender", "message"),
    [
        (FOLLOWER, Quit(b"x" * 20)),
        (FOLLOWER, replace(here(FOLLOWER), run="other")),
        (FOLLOWER, replace(join(FOLLOWER), run="other")),
        (LEADER, begin(LEADER, ME, run="other")),
        (FOLLOWER, begin(LEADER, ME)),
        (LEADER, begin(LEADER, ME, digest=b"x" * 32)),
        (LEADER, begin(LEADER, ME, epoch=7)),
        (LEADER, begin(LEADER, ME, number=NUMBER - 1)),
    ],
)
def test_what_no_correct_peer_says_is_blamed_and_changes_nothing(sender: PeerId, message: Message) -> None:
    machine = in_state(FOLLOWING)
    with pytest.raises(PeerError):
        machine.on_message(1.0, sender, message)
    assert (machine.state, machine.take_actions()) == (FOLLOWING, [])


def test_actions_are_handed_out_once() -> None:
    machine = fresh()
    sighted(machine, 0.0, IDLE)
    assert machine.take_actions() == [Send(IDLE, here(ME, ready=False))]
    assert machine.take_actions() == []
