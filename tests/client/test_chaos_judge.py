"""Judging records: each promise is broken once, by a record made by hand, and only that one is blamed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from client.test_chaos_plan import SETTINGS

from mpd.client.averager import GRACE_S
from mpd.client.chaos_judge import PROMISES, Findings, Happened, Seen, judge, middle, shown
from mpd.client.chaos_plan import Fault

N = 3
CHAOS = replace(SETTINGS, peers=N, timeout_s=20.0)
NAMES = {"a": 0, "b": 1, "c": 2, "guest": 3}
ID_OF = {index: peer for peer, index in NAMES.items()}


def result(machine: int, ended: float, peers: dict[int, int], **changes: Any) -> dict[str, Any]:
    """Return what `machine` tells of a step in a round of `peers` with the numbers of their steps."""
    mask = sum(1 << peer for peer in peers)
    record = {
        "machine": machine,
        "step": peers.get(machine, 1),
        "began": ended - 0.2,
        "ended": ended,
        "averaged": True,
        "wrong": "",
        "reason": "averaged",
        "missing": {},
        "contributors": [ID_OF[peer] for peer in peers],
        "sets": [[mask, 100]],
        "steps": [list(pair) for pair in peers.items()],
        "digest": f"digest of {sorted(peers.items())}",
    }
    return record | changes


def failure(machine: int, ended: float, step: int, **changes: Any) -> dict[str, Any]:
    record = {"machine": machine, "step": step, "began": ended - 0.2, "ended": ended, "averaged": False, "wrong": ""}
    return record | {"reason": "nobody came"} | changes


def rounds(*ends: float, peers: Sequence[int] = range(N)) -> list[dict[str, Any]]:
    """Return what all `peers` tell of good rounds that end at these times."""
    return [result(peer, end + 0.01 * peer, dict.fromkeys(peers, round(10 * end))) for end in ends for peer in peers]


def see(records: list[dict[str, Any]], **changes: Any) -> Seen:
    seen = Seen(CHAOS, records, NAMES, happened=[], quiet=[(0.0, 10.0), (70.0, 80.0)], chaos=(10.0, 70.0))
    return replace(seen, **changes)


def blamed(findings: Findings) -> dict[str, int]:
    return {promise: len(sentences) for promise, sentences in findings.breaches.items() if sentences}


EVERY_SECOND = [float(t) for t in range(1, 80)]


def test_a_swarm_without_trouble() -> None:
    findings = judge(see(rounds(*EVERY_SECOND)))
    assert findings.held
    assert blamed(findings) == {}
    assert findings.n_results == 3 * len(EVERY_SECOND)
    assert findings.n_failed == 0
    assert findings.good_rounds == 61
    assert findings.rate == pytest.approx(61)
    assert findings.quiet_rate == pytest.approx(60)
    assert findings.kept == pytest.approx(61 / 60)
    assert findings.longest_gap_s == pytest.approx(1.0)


def test_a_gap_is_as_long_as_between_two_rounds() -> None:
    ends = [t for t in EVERY_SECOND if not 20 < t < 27]
    findings = judge(see(rounds(*ends)))
    assert findings.longest_gap_s == pytest.approx(7.0)
    assert findings.kept is not None
    assert findings.kept < 0.92


def test_without_quiet_phases_there_is_nothing_to_compare_with() -> None:
    assert judge(see(rounds(*EVERY_SECOND), quiet=[])).kept is None


def test_a_swarm_that_never_averaged_has_one_long_gap() -> None:
    findings = judge(see([failure(0, 20.0, 1)]))
    assert findings.longest_gap_s == 60.0
    assert (findings.good_rounds, findings.n_failed) == (0, 1)


def test_a_round_of_a_minority_is_not_a_good_one() -> None:
    findings = judge(see([*rounds(20.0, peers=[2]), *rounds(30.0, peers=[0, 1])]))
    assert findings.good_rounds == 1
    assert findings.held


def test_rounds_are_found_by_the_steps_that_they_share() -> None:
    """In the first round machine 2 came too late for most, and in what machine 1 tells it is in nothing at all."""
    one = result(0, 20.0, {0: 1, 1: 1, 2: 1})
    two = result(1, 20.1, {0: 1, 1: 1, 2: 1})
    other = result(2, 20.3, {2: 2, 0: 2})
    findings = judge(see([one, two, other]))
    assert findings.good_rounds == 2
    assert findings.held


BREACHES: list[tuple[str, list[dict[str, Any]]]] = [
    ("I1", [result(0, 20.0, {0: 1, 1: 1}, wrong="2.5 is the mean of nobody")]),
    ("I1", [result(0, 20.0, {0: 1, 1: 7}), failure(1, 12.0, 7)]),
    ("I1", [result(0, 20.0, {0: 1, 1: 7}), failure(1, 30.0, 7)]),
    ("I1", [result(0, 20.0, {0: 4, 1: 1}, step=5)]),
    ("I2", [result(0, 20.0, {0: 1, 1: 1}), result(1, 20.0, {0: 1, 1: 1}, digest="other")]),
    ("I3", [failure(0, 20.0, 1, wrong="the step did not average, and the tensors have changed")]),
    ("I4", [failure(0, 50.0, 1, began=28.0)]),
    ("I4", [result(0, 50.0, {0: 1, 1: 1}, began=28.0)]),
    ("I5", [result(0, 20.0, {0: 1, 1: 1}, contributors=["a", "b", "c"])]),
    ("I5", [result(0, 20.0, {0: 1, 1: 1}, contributors=["a"])]),
    ("I5", [result(0, 20.0, {0: 1, 1: 1}, contributors=["a", "stranger"])]),
    ("I5", [result(0, 20.0, {0: 1, 1: 1}, sets=[[0b11, 50], [0b1, 50]])]),
    ("I5", [failure(0, 20.0, 1, reason="")]),
]


@pytest.mark.parametrize(("promise", "records"), BREACHES)
def test_what_breaks_a_promise_is_blamed_for_it(promise: str, records: list[dict[str, Any]]) -> None:
    findings = judge(see(records))
    assert blamed(findings) == {promise: 1}
    assert not findings.held


def test_processes_that_end_by_themselves_are_blamed() -> None:
    assert blamed(judge(see(rounds(20.0), ends=["the daemon of machine 1 ended by itself"]))) == {"up": 1}


@pytest.mark.parametrize(
    ("seconds", "is_late"), [(SETTINGS.timeout_s + GRACE_S + 1, False), (SETTINGS.timeout_s + GRACE_S + 2, True)]
)
def test_a_trainer_whose_daemon_is_hit_gets_the_grace_that_it_gives(seconds: float, is_late: bool) -> None:
    frozen = Happened(Fault(12.0, "freeze", 0, 9.0), 22.0, 31.0)
    findings = judge(see([failure(0, 20.0 + seconds, 1, began=20.0)], happened=[frozen]))
    assert blamed(findings) == ({"I4": 1} if is_late else {})


def test_what_each_fault_cost() -> None:
    killed = Happened(Fault(10.0, "kill", 2, 3.0), 20.5, 23.5)
    came = Happened(Fault(30.0, "join", 3, 5.0), 40.0, 45.0)
    lost = Happened(Fault(40.0, "kill", 1, 3.0), 50.0, 53.0)
    with_all = [t for t in EVERY_SECOND if t < 20.5 or 26 < t < 50]
    with_two = [24.0, 25.0, 26.0]
    records = [*rounds(*with_all), *rounds(*with_two, peers=[0, 1]), *rounds(55.0, 60.0, 65.0, 70.5, peers=[0, 2])]
    records.append(result(3, 42.5, {3: 1, 0: 425}))
    records.append(failure(0, 42.5, 425))
    findings = judge(see(records, happened=[killed, came, lost]))
    assert blamed(findings) == {}
    stalls = [round(recovery.stall_s, 2) for recovery in findings.recoveries]
    assert stalls == [4.0, 1.0, 6.0]
    backs = [None if recovery.back_s is None else round(recovery.back_s, 2) for recovery in findings.recoveries]
    assert backs == [3.52, 2.5, None]


def test_long_lists_are_cut() -> None:
    assert shown(["one"]) == ["one"]
    assert shown([str(i) for i in range(9)]) == ["0", "1", "2", "3", "4", "and 4 more"]
    assert middle([3.0, 1.0, 2.0]) == 2.0
    assert set(PROMISES) == {"I1", "I2", "I3", "I4", "I5", "up"}
