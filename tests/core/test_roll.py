"""The policy by arithmetic: every outcome of `decide` with its sentence, and the books behind it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim.slot_sim import peer, ticket

from mpd.messages import MAX_COLLECTED
from mpd.roll import (
    MAX_HEARSAY,
    MOVES,
    SILENT,
    MatchLimits,
    Move,
    Register,
    Roll,
    State,
    Verdict,
    decide,
    name,
    next_change,
    rank,
)

LIMITS = MatchLimits(window_s=5, settle_s=1, answer_s=2)
A, B, C = peer(1), peer(2), peer(3)
ALONE = Roll(
    members=1,
    awaited=(),
    lost=(),
    line_size=0,
    line_low=0,
    to_ask=None,
    leader=None,
    accepted=False,
    to_point=False,
    asked_s=0.0,
    news_s=0.0,
    window_ends_s=5.0,
    alone_ends_s=5.0,
    time_ends_s=60.0,
)

CASES = [
    (0.0, {}, Verdict.WAIT, "nobody else has announced this run yet"),
    (4.9, {"awaited": (A, B)}, Verdict.WAIT, f"waiting for 2 of 3 announced peers: {name(A)}, {name(B)}"),
    (5.0, {}, Verdict.GIVE_UP, "nobody else has announced this run"),
    (5.0, {"lost": (A,)}, Verdict.GIVE_UP, f"window ended and nobody had joined; missing: {name(A)}"),
    (0.0, {"members": 4}, Verdict.BEGIN, "full: 4 of 4 announced peers are ready"),
    (0.0, {"members": 3, "lost": (A,)}, Verdict.BEGIN, f"full: 3 of 4 announced peers are ready; left out: {name(A)}"),
    (
        0.9,
        {"members": 3, "line_size": 5, "line_low": 5},
        Verdict.WAIT,
        "3 of 5 expected peers are here: waiting for newcomers",
    ),
    (1.0, {"members": 3, "line_size": 5, "line_low": 5}, Verdict.BEGIN, "full: 3 of 3 announced peers are ready"),
    (0.2, {"members": 4, "line_size": 5, "line_low": 4}, Verdict.WAIT, "4 of 5 expected peers are here"),
    (0.3, {"members": 4, "line_size": 5, "line_low": 4}, Verdict.BEGIN, "full: 4 of 4 announced peers are ready"),
    (1.5, {"members": 3, "line_size": 5, "line_low": 5, "news_s": 1.0}, Verdict.WAIT, "3 of 5 expected peers are here"),
    (0.0, {"members": 5, "line_size": 5, "line_low": 5}, Verdict.BEGIN, "full: 5 of 5 announced peers are ready"),
    (4.9, {"members": 3, "awaited": (A,)}, Verdict.WAIT, f"waiting for 1 of 4 announced peers: {name(A)}"),
    (5.0, {"members": 3, "awaited": (A,)}, Verdict.BEGIN, f"window ended with 3 members; left out: {name(A)}"),
    (0.0, {"members": MAX_COLLECTED, "awaited": (A,)}, Verdict.BEGIN, "full: no leader takes in more than 256 members"),
    (0.0, {"to_ask": A}, Verdict.ASK, f"{name(A)} leads"),
    (9.0, {"to_ask": A, "members": 4}, Verdict.ASK, f"{name(A)} leads"),
    (1.9, {"leader": A}, Verdict.WAIT, f"asking {name(A)} for a place in its group"),
    (2.0, {"leader": A}, Verdict.DROP, "did not answer within 2 s"),
    (6.9, {"leader": A, "accepted": True}, Verdict.WAIT, f"waiting for {name(A)} to begin"),
    (7.0, {"leader": A, "accepted": True}, Verdict.DROP, "took us in and did not begin within 7 s"),
    (1.9, {"leader": A, "accepted": True, "to_point": True}, Verdict.WAIT, f"waiting for {name(A)} to begin"),
    (2.0, {"leader": A, "accepted": True, "to_point": True}, Verdict.POINT, f"telling others to ask {name(A)}"),
    (3.0, {"window_ends_s": 3.0, "awaited": (A,)}, Verdict.WAIT, "waiting for 1 of 2 announced peers"),
    (3.0, {"window_ends_s": 3.0, "awaited": (A,), "members": 2}, Verdict.BEGIN, "window ended with 2 members"),
    (60.0, {"leader": A, "accepted": True}, Verdict.GIVE_UP, "the step's time was up before a group began"),
    (60.0, {"members": 4}, Verdict.GIVE_UP, "the step's time was up before a group began"),
]


@pytest.mark.parametrize(("now", "facts", "verdict", "sentence"), CASES)
def test_every_outcome_has_its_sentence(now: float, facts: dict[str, object], verdict: Verdict, sentence: str) -> None:
    decided, reason = decide(now, replace(ALONE, **facts), LIMITS)  # type: ignore[arg-type]
    assert decided is verdict
    assert reason.startswith(sentence)


def test_a_leader_that_took_us_in_gets_its_own_window_and_not_ours() -> None:
    roll = replace(ALONE, leader=A, accepted=True, window_ends_s=1.0)
    limits = replace(LIMITS, window_s=1.0, leader_s=10.0)
    assert decide(11.9, roll, limits)[0] is Verdict.WAIT
    assert decide(12.0, roll, limits)[0] is Verdict.DROP


def test_the_cases_cover_every_verdict() -> None:
    assert {verdict for _, _, verdict, _ in CASES} == set(Verdict)


def test_a_long_list_of_peers_is_cut() -> None:
    _, reason = decide(0.0, replace(ALONE, awaited=tuple(peer(i) for i in range(1, 10))), LIMITS)
    assert reason.endswith(f"{name(peer(4))} and 5 more")


TIMES = st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.9, 5.0, 6.0, 30.0])


@given(
    now=TIMES,
    members=st.integers(1, 3),
    awaited=st.sampled_from([(), (A,), (A, B)]),
    line_size=st.integers(0, 4),
    leader=st.sampled_from([None, C]),
    accepted=st.booleans(),
    to_point=st.booleans(),
    asked_s=TIMES,
    news_s=TIMES,
)
def test_nothing_changes_before_the_next_change(now: float, **facts: object) -> None:
    roll = replace(ALONE, **facts)  # type: ignore[arg-type]
    change = next_change(now, roll, LIMITS)
    assert change > now
    for earlier in (0.5, 1.0, 2.0, 4.9, 5.0, 6.0, 7.0, 30.0, 32.0, 59.9):
        if now < earlier < change:
            assert decide(earlier, roll, LIMITS) == decide(now, roll, LIMITS)


def test_the_last_change_is_the_end_of_the_step() -> None:
    assert next_change(10.0, ALONE, LIMITS) == 60.0
    assert next_change(60.0, ALONE, LIMITS) == float("inf")


def test_every_state_but_the_last_two_can_be_left_at_will() -> None:
    assert set(MOVES) == set(State)
    assert {state for state, moves in MOVES.items() if not moves} == {State.BEGUN, State.ALONE}
    assert all(moves[Move.GIVE_UP] is State.ALONE for moves in MOVES.values() if moves)
    assert {move for moves in MOVES.values() for move in moves} == set(Move)


def test_leaders_are_ordered_by_reach_then_stamp_then_id() -> None:
    order = [rank(B, True, 3), rank(A, True, 4), rank(C, True, 4), rank(A, False, 1)]
    assert order == sorted(order)


def test_who_is_gone_comes_back_only_if_it_may() -> None:
    register = Register()
    register.meet(1.0, A, in_person=True, revive=True).asked = True
    register.lose(A, "its link broke")
    assert register.lost == (A,)
    register.meet(2.0, A, in_person=False, revive=False)
    assert (register.lost, register.news_s) == ((A,), 1.0)
    assert not register.meet(3.0, A, in_person=True, revive=True).asked
    assert (register.awaited, register.news_s) == ((A,), 3.0)


def test_who_was_waited_for_in_vain_counts_again_when_it_speaks() -> None:
    register = Register()
    register.meet(1.0, A, in_person=False, revive=False).silent = True
    register.meet(2.0, A, in_person=False, revive=True)
    assert (register.awaited, register.lost) == ((), (A,))
    assert register.missing(until="in time") == {A: SILENT}
    register.meet(3.0, A, in_person=True, revive=True)
    assert (register.awaited, register.lost) == ((A,), ())


def test_losing_a_stranger_is_no_news() -> None:
    register = Register()
    register.lose(A, "its link broke")
    assert register.peers == {}


def test_hearsay_is_bounded_but_a_speaker_is_always_heard() -> None:
    register = Register()
    for i in range(MAX_HEARSAY + 10):
        register.meet(0.0, peer(0)[:18] + i.to_bytes(2, "big"), in_person=False, revive=False)  # type: ignore[arg-type]
    assert len(register.peers) == MAX_HEARSAY
    register.meet(0.0, A, in_person=True, revive=True)
    assert A in register.peers


def test_only_smaller_peers_with_an_unused_invitation_are_asked() -> None:
    register = Register()
    for who, stamp in ((A, 5), (B, 3), (C, 9)):
        register.meet(0.0, who, in_person=True, revive=True).stamp = stamp
    mine = rank(peer(4), True, 7)
    assert register.to_ask(mine) is None
    for known in register.peers.values():
        known.inviting = True
    assert register.to_ask(mine) == B
    register.peers[B].asked = True
    assert register.to_ask(mine) == A
    register.lose(A, "withdrew")
    assert register.to_ask(mine) is None
    assert register.to_point(B) == [C]
    register.peers[C].pointed_to = B
    assert register.to_point(B) == []


def test_followers_are_not_missing() -> None:
    register = Register()
    for who in (A, B, C):
        register.meet(0.0, who, in_person=True, revive=True)
    register.peers[A].ticket = ticket(1)
    register.lose(B, "its link broke")
    assert list(register.followers) == [A]
    assert register.missing(until="in time") == {
        B: "its link broke",
        C: "its trainer had not asked for a step in time",
    }
    register.peers[C].stamp = 5  # it has said that it is ready
    assert register.missing(until="in time")[C] == "was ready in time, and had not joined this group"
