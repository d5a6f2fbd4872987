"""What `mpd chaos` prints about a run, for people and as JSON."""

import json
from dataclasses import replace

from client.test_chaos_judge import CHAOS, EVERY_SECOND, failure, rounds, see

from mpd.client.chaos_judge import Happened, judge
from mpd.client.chaos_plan import Fault
from mpd.client.chaos_report import as_json, as_text, show_fault, show_plan

KILLED = Happened(Fault(10.5, "kill", 2, 3.0), 20.5, 23.5)
FROZEN = Happened(Fault(60.0, "freeze", 1, 9.0), 69.5, 78.9)
SEEN = see(rounds(*[t for t in EVERY_SECOND if t < 79]), happened=[KILLED, FROZEN])


def test_the_text_says_what_was_kept_and_what_each_kind_of_fault_cost() -> None:
    lines = as_text(SEEN, judge(SEEN)).splitlines()
    assert lines[0] == "61 good rounds in 1.0 min with 2 faults, 61.0 a minute; without faults 57.0: 107.0% kept"
    assert lines[1] == "longest time between two good rounds: 1.00 s"
    assert lines[2] == "234 results in all, 0 steps that did not average"
    assert "I2  held    agreement: all who succeed in a round hold the same bytes" in lines
    assert lines[-2].split() == [
        "kill",
        "1",
        *["1.00", "s,", "worst", "1.00", "s"],
        *["0.52", "s,", "worst", "0.52", "s"],
    ]
    assert lines[-1].split() == [
        "freeze",
        "1",
        *["1.00", "s,", "worst", "1.00", "s"],
        *["-,", "1", "x", "not", "at", "all"],
    ]


def test_the_text_shows_what_was_broken() -> None:
    seen = see([failure(0, 20.0, 1, wrong="the tensors have changed")], quiet=[])
    text = as_text(seen, judge(seen))
    assert "without faults 0.0\n" in text
    assert "I3  BROKEN  atomic" in text
    assert "            step 1 of machine 0: the tensors have changed" in text


def test_the_json_has_the_same_and_every_fault() -> None:
    report = json.loads(json.dumps(as_json(SEEN, judge(SEEN))))
    assert report["held"] is True
    assert report["kept"] == 1.0702
    assert report["longest_gap_s"] == 1.0
    assert (report["peers"], report["seed"], report["minutes"]) == (3, 7, 1.0)
    assert report["breaches"] == {"I1": [], "I2": [], "I3": [], "I4": [], "I5": [], "up": []}
    assert [fault["back_s"] for fault in report["faults"]] == [0.52, None]
    assert report["faults"][0] | {"stall_s": 0, "back_s": 0} == {
        "at_s": 10.5, "kind": "kill", "machine": 2, "lasts_s": 3.0, "stall_s": 0, "back_s": 0,
    }  # fmt: skip


def test_nothing_to_compare_with_is_null() -> None:
    seen = replace(SEEN, quiet=[])
    assert as_json(seen, judge(seen))["kept"] is None


def test_the_plan_and_its_faults_have_a_line_each() -> None:
    plan = (KILLED.fault, FROZEN.fault)
    assert show_plan(CHAOS, plan) == (
        "3 machines, 1 MiB each, training 0.5 s between steps; 30 min with a fault every 30 s (2 in all, seed 7), "
        "and 60 s without before and after"
    )
    assert "a fault every 0.5 to 2 s" in show_plan(replace(CHAOS, every_s=(0.5, 2.0)), plan)
    assert show_fault(FROZEN.fault) == "  1:00.0  machine 1: freeze for 9.0 s"
