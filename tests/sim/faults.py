"""What goes wrong in a simulated swarm, as data: a list that is drawn from a seed, printed, read back and shortened."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

KINDS = {
    "kill": "the process dies: what the kernel has may arrive, then the links end",
    "power": "the machine loses power: its links fall silent",
    "start": "a new life begins where the last one ended",
    "freeze": "the process stops, and goes on after a while",
    "reset": "the link between two breaks",
    "deaf": "nothing gets from the first to the second for a while",
    "split": "those named are cut off from all others for a while",
    "bridge": "those named are split in two halves that reach only the first of them, for a while",
    "slow": "everything takes longer to and from one for a while",
    "clock": "a wall clock jumps",
    "quit": "the trainer goes, politely",
    "cancel": "the trainer takes its step back",
}
MIXES = (
    ("kill",),
    ("kill", "start"),
    ("power", "start"),
    ("freeze",),
    ("reset",),
    ("split", "deaf", "bridge"),
    ("slow", "kill"),
    ("reset", "reset", "kill", "freeze", "deaf"),
    ("clock",),
    ("quit", "start", "cancel"),
    tuple(KINDS),
    tuple(KINDS),
)


@dataclass(frozen=True, order=True)
class Fault:
    """At `at_s` something of `kind` happens to the machines `who`; `value` is seconds.

    With `aimed` it waits for the next round of the first of them, and strikes in the midst of it.
    """

    at_s: float
    kind: str
    who: tuple[int, ...]
    value: float = 0.0
    aimed: bool = False

    @property
    def end_s(self) -> float:
        """When it is over."""
        return self.at_s + (self.value if self.kind in ("freeze", "deaf", "split", "bridge", "slow") else 0.0)

    def __str__(self) -> str:
        return f"{self.at_s:g}{'!' * self.aimed} {self.kind} {','.join(map(str, self.who))} {self.value:g}"

    @classmethod
    def parse(cls, text: str) -> "Fault":
        at_s, kind, who, value = text.split()
        return cls(float(at_s.rstrip("!")), kind, tuple(map(int, who.split(","))), float(value), at_s.endswith("!"))


def show(faults: Sequence[Fault]) -> str:
    return "; ".join(map(str, faults))


def parse(text: str) -> list[Fault]:
    return [Fault.parse(each) for each in text.split(";") if each.strip()]


def draw(rng: random.Random, n: int, first_s: float, last_s: float) -> list[Fault]:
    """Return up to six faults of one mix between these times, in a swarm of `n`."""
    kinds = rng.choice(MIXES)
    burst_s = rng.uniform(first_s, last_s) if rng.random() < 0.4 else 0.0  # all in one round, about
    faults = []
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 6))):
        kind = rng.choice(kinds)
        who = rng.sample(range(n), n)
        at_s = round(burst_s or rng.uniform(first_s, last_s), 3)
        aimed = burst_s > 0 or rng.random() < 0.5
        if kind in ("kill", "power", "quit"):
            faults.append(Fault(at_s, kind, (who[0],), aimed=aimed))
            if "start" in kinds and rng.random() < 0.8:
                faults.append(Fault(round(at_s + rng.choice((0.2, 1.0, 4.0)), 3), "start", (who[0],)))
        elif kind == "start":
            continue  # they come with ends
        elif kind == "freeze":
            faults.append(Fault(at_s, kind, (who[0],), rng.choice((0.5, 2.0, 6.0)), aimed))
        elif kind in ("reset", "deaf"):
            faults.append(Fault(at_s, kind, (who[0], who[1]), rng.choice((1.0, 4.0)), aimed))
        elif kind == "split":
            n_inside = rng.randint(1, max(1, n // 2))
            faults.append(Fault(at_s, kind, tuple(who[:n_inside]), rng.choice((1.0, 3.0, 8.0)), aimed))
        elif kind == "bridge" and n > 2:
            faults.append(Fault(at_s, kind, tuple(who), rng.choice((2.0, 6.0)), aimed))
        elif kind == "slow":
            faults.append(Fault(at_s, kind, (who[0],), rng.choice((2.0, 8.0))))
        elif kind == "clock":
            jump_s = rng.choice((-7200.0, -10.0, -1.0, 1.0, 10.0, 7200.0))
            faults.append(Fault(at_s, kind, (who[0],), jump_s))
        elif kind == "cancel":
            faults.append(Fault(at_s, kind, (who[0],), aimed=aimed))
    return sorted(faults)


def shorten(faults: Sequence[Fault], fails: Callable[[list[Fault]], bool], tries: int = 40) -> list[Fault]:
    """Return a list from which no single fault can be left out without the failure going away, as far as `tries` go."""
    kept = list(faults)
    index = 0
    while index < len(kept) and tries:
        tries -= 1
        shorter = kept[:index] + kept[index + 1 :]
        if fails(shorter):
            kept = shorter
        else:
            index += 1
    return kept
