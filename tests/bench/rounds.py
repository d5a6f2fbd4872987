"""Time rounds of several systems side by side.

Absolute seconds move with the machine's mood, so systems take turns in small batches, in reversed order every other
time, and only ratios within one run count. A round lasts from the moment at which all its peers begin until the last
one has its result, which is then checked: a fast wrong answer is an error, not a figure.
"""

import itertools
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import facts
from swarm import Peers

WARM_UP_ROUNDS = 2  # per batch: caches, TCP windows and what a system learns about its links
BATCH_ROUNDS = 3
HEAD_START_S = 0.05  # for the command to reach every peer before the common beginning


@dataclass
class Column:
    """One system in one variant, with what was measured so far: one dict per round."""

    name: str
    peers: Peers
    variant: str
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def seconds(self) -> list[float]:
        """Return the times of the rounds that worked."""
        return [one["seconds"] for one in self.rounds if not one["errors"]]

    def summary(self) -> dict[str, Any]:
        """Return median and extremes in seconds; all None where no round worked."""
        seconds = self.seconds()
        failed = [error for one in self.rounds for error in one["errors"]]
        return {
            "median_s": statistics.median(seconds) if seconds else None,
            "min_s": min(seconds, default=None),
            "max_s": max(seconds, default=None),
            "cpu_s": statistics.median(one["cpu_s"] for one in self.rounds),
            "others_cores": statistics.median(one["others_cores"] for one in self.rounds),
            "rounds": len(self.rounds),
            "failed": sum(bool(one["errors"]) for one in self.rounds),
            "first_error": failed[0] if failed else "",
        }


def measure(columns: list[Column], run: str, n_elems: int, n_rounds: int) -> None:
    """Average vectors of `n_elems` float32 in turns until every column has at least `n_rounds` rounds."""
    for column in columns:
        name = f"{run} {column.variant}"
        column.peers.ask("open", run=name, variant=column.variant, n_elems=n_elems, group_size=len(column.peers))
    for batch in itertools.count():
        for column in columns if batch % 2 == 0 else reversed(columns):
            name = f"{run} {column.variant}"
            for number in range(WARM_UP_ROUNDS + BATCH_ROUNDS):
                one = measure_round(column.peers, name)
                if number >= WARM_UP_ROUNDS:
                    column.rounds.append(one)
        if (batch + 1) * BATCH_ROUNDS >= n_rounds:
            break
    for column in columns:
        column.peers.ask("close", run=f"{run} {column.variant}")


def measure_round(peers: Peers, run: str, *, last_may_lack: bool = False) -> dict[str, Any]:
    """Let all peers average once and return time, CPU time, and what went wrong if something did.

    If `last_may_lack`, parts of a mean may be that of all peers but the last one.
    """
    values = [float(index + 1) for index in range(len(peers))]
    mean = statistics.mean(values)
    bounds = (statistics.mean(values[:-1]) if last_may_lack else mean, mean)
    peers.ask("fill", run=run, value=values)
    ours, everyone = facts.cpu_s(peers.sessions), facts.machine_cpu_s()
    answers = peers.ask("step", run=run, at=time.monotonic() + HEAD_START_S)
    ours, everyone = facts.cpu_s(peers.sessions) - ours, facts.machine_cpu_s() - everyone
    seconds = max(answer["seconds"] for answer in answers)
    return {
        "seconds": seconds,
        "first_s": min(answer["seconds"] for answer in answers),
        "contributors": [answer.get("contributors") for answer in answers],
        "cpu_s": ours,
        "others_cores": max(0.0, everyone - ours) / (seconds + HEAD_START_S),
        "bytes_sent": sum(answer.get("bytes_sent", 0) for answer in answers),
        "errors": sorted({error for answer in answers if (error := complaint(answer, *bounds))}),
    }


def complaint(answer: dict[str, Any], least: float, most: float) -> str:
    """Return what is wrong with a peer's answer, or nothing."""
    if "error" in answer:
        return str(answer["error"])
    slack = 1e-3 * most  # float16 on the wire is allowed to round
    if not all(least - slack <= end <= most + slack for end in answer["ends"]):
        return f"wrong result: {answer['ends']} where {most} was expected"
    return ""
