"""What will go wrong, when, and for how long: faults as data, from a seed.

Strategy: the whole plan is drawn before anything starts, so it can be printed, and the same seed and options give the
same plan. A fault begins every so often; it lasts a tenth to a third of the pause to the next one, so that a machine
is back in time to be hit again. At any moment a majority of the machines is left alone, because nothing else can go
on averaging by the rules.
"""

import random
from dataclasses import dataclass

from mpd.errors import LocalError

KINDS = {
    "kill": "the daemon is killed (SIGKILL) and started again",
    "term": "the daemon is told to leave (SIGTERM) and started again",
    "leave": "`mpd leave`, and the daemon is started again",
    "freeze": "the daemon is stopped (SIGSTOP) and goes on later",
    "slow": "the daemon gets a fifth of its time (SIGSTOP and SIGCONT in turns)",
    "trainer": "the training process is killed (SIGKILL) and started again",
    "join": "one more machine comes, takes part, and leaves",
}
MIN_PEERS, MAX_PEERS = 2, 16
RECOVER_S = 3.0  # a machine that is back is left alone for so long, at most half a pause
_SHORTEST_S, _LONGEST_S = 0.5, 10.0
_SHARE = (0.1, 0.33)  # of the pause to the next fault


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` happens to machine `target` at `at_s` of the fault phase, and is over `lasts_s` later."""

    at_s: float
    kind: str
    target: int
    lasts_s: float

    @property
    def ends_s(self) -> float:
        """When the fault is over and the machine may come back."""
        return self.at_s + self.lasts_s


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user chooses. `every_s` are the shortest and the longest pause between the beginnings of two faults.

    `train_s` is how long each trainer trains between two steps, 0 for not at all; `timeout_s` the longest a step may
    take; `quiet_s` how long the phases without faults last, before and after. Raises LocalError where that is no plan.
    """

    peers: int
    kinds: tuple[str, ...]
    chaos_s: float
    every_s: tuple[float, float]
    seed: int
    size_bytes: int
    train_s: float
    timeout_s: float
    quiet_s: float

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise LocalError(f"{', '.join(unknown) or 'nothing'} is no fault: choose among {', '.join(KINDS)}")
        if not MIN_PEERS <= self.peers <= MAX_PEERS:
            raise LocalError(f"{self.peers} peers: {MIN_PEERS} to {MAX_PEERS} expected, they all average in one group")
        if not 0 < self.every_s[0] <= self.every_s[1]:
            raise LocalError(f"a fault every {self.every_s[0]:g} to {self.every_s[1]:g} s: two rising numbers expected")

    @property
    def guest(self) -> int:
        """The number of the machine that comes and goes."""
        return self.peers


def make_plan(settings: Settings) -> tuple[Fault, ...]:
    """Return the faults of a run with these settings, in order; all of them are over by its end."""
    rng = random.Random(settings.seed)
    shortest, longest = settings.every_s
    recover_s = min(RECOVER_S, shortest / 2)
    at_most = max(1, (settings.peers - 1) // 2)
    free_from = dict.fromkeys(range(settings.peers + 1), 0.0)
    faults: list[Fault] = []
    at_s = rng.uniform(shortest, longest) / 2
    while True:
        free = [i for i in range(settings.peers) if free_from[i] <= at_s]
        may_hit = settings.peers - len(free) < at_most
        kinds = [kind for kind in settings.kinds if (free_from[settings.guest] <= at_s if kind == "join" else may_hit)]
        if not kinds:
            at_s = min(until for until in free_from.values() if until > at_s)
            continue
        pause_s = rng.uniform(shortest, longest)
        lasts_s = min(max(rng.uniform(*_SHARE) * pause_s, _SHORTEST_S), _LONGEST_S)
        if at_s + lasts_s > settings.chaos_s:
            return tuple(faults)
        kind = rng.choice(kinds)
        target = settings.guest if kind == "join" else rng.choice(free)
        faults.append(Fault(round(at_s, 3), kind, target, round(lasts_s, 3)))
        free_from[target] = at_s + lasts_s + recover_s
        at_s += pause_s
