"""What `mpd chaos` saw, judged: a pure function from records to findings.

Strategy: every trainer tells what its own tensors held. Two results are of one round if they share a step of some peer,
because a peer gives one step to one round; so rounds are found without believing anybody's account of them. Then each
promise is looked at from outside, as a user can: I1 results are exact and of this round, I2 all results of a round are
the same bytes, I3 tensors are old or new, I4 steps end by their deadline, I5 an outcome names who is in its result.
"""

import itertools
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .averager import GRACE_S
from .chaos_plan import Fault, Settings

Record = dict[str, Any]

PROMISES = {
    "I1": "exact: every element is the mean of a known set of peers, from steps of this round",
    "I2": "agreement: all who succeed in a round hold the same bytes",
    "I3": "atomic: tensors are the old ones or the new ones",
    "I4": "bounded: every step ends by its deadline",
    "I5": "honest: an outcome names exactly those who are in all of its result",
    "up": "no daemon or trainer ends unless it is told or made to",
}
_SLACK_S = 1.5  # beyond a deadline, for a busy machine and for a trainer that has to notice
_MAX_SHOWN = 5  # breaches in full, per promise


@dataclass(frozen=True, slots=True)
class Happened:
    """A fault as it was carried out, on the clock of the records; `ended` is when the machine might come back."""

    fault: Fault
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Seen:
    """All that was seen. `quiet` are the phases without faults, as (begin, end); `names` map peer ids to machines."""

    settings: Settings
    records: Sequence[Record]
    names: dict[str, int]
    happened: Sequence[Happened]
    quiet: Sequence[tuple[float, float]]
    chaos: tuple[float, float]
    ends: Sequence[str] = ()  # of processes that nobody ended


@dataclass
class Findings:
    """`breaches` has sentences for each promise; `recoveries` what each fault cost; rates are per minute."""

    breaches: dict[str, list[str]] = field(default_factory=lambda: {promise: [] for promise in PROMISES})
    n_results: int = 0
    n_failed: int = 0
    good_rounds: int = 0
    rate: float = 0.0
    quiet_rate: float = 0.0
    longest_gap_s: float = 0.0
    recoveries: list["Recovery"] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Whether no promise was broken."""
        return not any(self.breaches.values())

    @property
    def kept(self) -> float | None:
        """The rate with faults as a part of that without; None if there is nothing to compare with."""
        return self.rate / self.quiet_rate if self.quiet_rate else None

    def blame(self, promise: str, sentence: str) -> None:
        """Note a breach."""
        self.breaches[promise].append(sentence)


@dataclass(frozen=True, slots=True)
class Recovery:
    """What one fault cost.

    `stall_s`: the longest time between good rounds from the fault to the next fault. `back_s`: from the fault's end to
    the first result of that machine, None if there was none; the guest of a `join` counts from its start.
    """

    happened: Happened
    stall_s: float
    back_s: float | None


def judge(seen: Seen) -> Findings:
    """Return what there is to say about `seen`."""
    findings = Findings()
    for sentence in seen.ends:
        findings.blame("up", sentence)
    results = [record for record in seen.records if record["averaged"] and not record["wrong"]]
    findings.n_results = len(results)
    findings.n_failed = len(seen.records) - len(results)
    for record in seen.records:
        _judge_alone(findings, seen, record)
    rounds = _rounds(results)
    for members in rounds:
        if len({member["digest"] for member in members}) > 1:
            findings.blame("I2", " but ".join(f"{_who(m)} holds {m['sets']}" for m in members))
    _judge_inputs(findings, seen.records, results)
    n_enough = seen.settings.peers // 2 + 1  # so that there is one good round at a time
    ends = sorted(min(m["ended"] for m in members) for members in rounds if _size(members) >= n_enough)
    findings.good_rounds = bisect_right(ends, seen.chaos[1]) - bisect_left(ends, seen.chaos[0])
    findings.rate = _rate(ends, [seen.chaos])
    findings.quiet_rate = _rate(ends, seen.quiet)
    findings.longest_gap_s = _longest_gap(ends, *seen.chaos)
    for i, happened in enumerate(seen.happened):
        until = seen.happened[i + 1].began if i + 1 < len(seen.happened) else seen.chaos[1]
        since = happened.began if happened.fault.kind == "join" else happened.ended
        own = (r["ended"] for r in results if r["machine"] == happened.fault.target and r["ended"] > since)
        back = min(own, default=None)
        stall_s = _longest_gap(ends, happened.began, until, is_next_told=True)
        findings.recoveries.append(Recovery(happened, stall_s, None if back is None else back - since))
    return findings


def _judge_alone(findings: Findings, seen: Seen, record: Record) -> None:
    """What one result says by itself."""
    if record["wrong"]:
        findings.blame("I1" if record["averaged"] else "I3", f"{_who(record)}: {record['wrong']}")
    took_s = record["ended"] - record["began"]
    limit_s = seen.settings.timeout_s + _SLACK_S
    if _is_hit(seen, record):
        limit_s += GRACE_S  # the trainer gives its daemon that long to speak up, then gives up by itself
    if took_s > limit_s:
        findings.blame("I4", f"{_who(record)} took {took_s:.1f} s, {limit_s:.1f} s allowed: {record['reason']}")
    if not record["reason"]:
        findings.blame("I5", f"{_who(record)} gives no reason")
    if record["averaged"] and not record["wrong"]:
        in_all = ~0
        for mask, _ in record["sets"]:
            in_all &= mask
        named = sorted({seen.names.get(peer, -1) for peer in record["contributors"]})
        if named != [i for i in range(seen.settings.guest + 1) if in_all >> i & 1]:
            findings.blame("I5", f"{_who(record)} names {named} as contributors, its elements say {in_all:b}")


def _judge_inputs(findings: Findings, records: Sequence[Record], results: Sequence[Record]) -> None:
    """Each step that a result is made of was under way when the result was."""
    spans = {(record["machine"], record["step"]): (record["began"], record["ended"]) for record in records}
    for record in results:
        for machine, step in record["steps"]:
            began, ended = spans.get((machine, step), (record["ended"], record["ended"]))  # its trainer was killed
            if machine == record["machine"] and step != record["step"]:
                findings.blame("I1", f"{_who(record)} has values of our own step {step}")
            elif began > record["ended"] or ended < record["began"]:
                findings.blame("I1", f"{_who(record)} has values of step {step} of machine {machine}: another time")


def _rounds(results: Iterable[Record]) -> list[list[Record]]:
    """Return the results of each round, in the order of their first one."""
    round_of: dict[tuple[int, int], list[Record]] = {}
    rounds: dict[int, list[Record]] = {}
    for record in sorted(results, key=lambda record: float(record["ended"])):
        shared = [tuple(pair) for pair in record["steps"]]
        members: list[Record] = [record]
        for other in {id(round_of[pair]): round_of[pair] for pair in shared if pair in round_of}.values():
            members = other + members
            rounds.pop(id(other), None)
        rounds[id(members)] = members
        for pair in [tuple(pair) for member in members for pair in member["steps"]]:
            round_of[pair] = members
    return list(rounds.values())


def _size(members: Sequence[Record]) -> int:
    """Return how many peers are in all of the round's result."""
    in_all = ~0
    for mask, _ in members[0]["sets"]:
        in_all &= mask
    return in_all.bit_count()


def _is_hit(seen: Seen, record: Record) -> bool:
    """Return whether a fault befell the record's own machine during the step."""
    return any(
        happened.fault.target == record["machine"]
        and happened.began <= record["ended"]
        and happened.ended + _SLACK_S >= record["began"]
        for happened in seen.happened
    )


def _rate(ends: Sequence[float], phases: Iterable[tuple[float, float]]) -> float:
    """Return the rounds per minute of these phases."""
    phases = list(phases)
    seconds = sum(end - begin for begin, end in phases)
    n = sum(bisect_right(ends, end) - bisect_left(ends, begin) for begin, end in phases)
    return 60 * n / seconds if seconds > 0 else 0.0


def _longest_gap(ends: Sequence[float], begin: float, end: float, is_next_told: bool = False) -> float:
    """Return the longest time without a good round that overlaps the given one, from round to round.

    With `is_next_told`, a gap at the end counts only if there was no round before it: else it is of the next fault.
    """
    first, last = bisect_left(ends, begin), bisect_right(ends, end)
    marks = [ends[first - 1] if first else begin, *ends[first:last]]
    if first == last or not is_next_told:
        marks.append(ends[last] if last < len(ends) else end)
    return max(after - before for before, after in itertools.pairwise(marks))


def _who(record: Record) -> str:
    return f"step {record['step']} of machine {record['machine']}"


def middle(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def shown(breaches: Sequence[str]) -> list[str]:
    """Return the first breaches, and how many more there are."""
    more = len(breaches) - _MAX_SHOWN
    return [*breaches[:_MAX_SHOWN], *([f"and {more} more"] if more > 0 else [])]
