"""What a swarm should do, and why: seconds to a target variance for each group size and each policy.

    from mpd.advise import Question, advise

    advice = advise(Question(n_peers=5000, vector_bytes=400 << 20))
    print(advice.best.group_size, advice.best.target_s)

Every alternative is played by the simulator of mpd/simulate.py, which says who meets whom and what that does to the
values, and timed by the clocks of mpd/timeline.py: the same peers, with the same lines, for all of them. What is
recommended is the group size with which the daemon's own policy reaches the target soonest.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from mpd.costs import Costs
from mpd.deadlines import WINDOW
from mpd.errors import LocalError
from mpd.grid import Shape, fit
from mpd.meetings import Groups
from mpd.messages import MAX_MEMBERS
from mpd.pricing import LIMITS, Peers, Work
from mpd.quantities import BYTES_PER_S, Distribution
from mpd.simulate import Settings, Swarm, generator
from mpd.timeline import Timeline

GROUP_SIZES = (4, 6, 8, 12, 16, 24, 32, 48)  # a run may have 2 to 48
COMPARED = ("moshpit", "random", "pairs", "allreduce")
OWN = "moshpit"
MIN_PEERS, MAX_PEERS = 2, 100_000
MOST = 0.95  # of the peers: when they have it counts, not when the one on the slowest line of all has
MAX_ROUNDS = 60  # then an alternative counts as one that does not get there


@dataclass(frozen=True)
class Question:
    """A swarm, and what it wants. Raises LocalError, in one sentence, on what makes no sense.

    Attributes:
        n_peers: 2 to 100,000.
        vector_bytes: what each of them averages.
        upload, download: of the peers' lines, in Mbit/s.
        latency: a peer's round trip to the others, in milliseconds.
        same_line: upload and download of a peer are the same draw, as on symmetrical lines.
        target: the variance to reach; it is 1 at the start.
        absent, mid_round: probability that a peer misses a round, and that it is lost in the middle of one.
        seed: of the draws.
    """

    n_peers: int
    vector_bytes: int
    upload: Distribution = field(default_factory=lambda: Distribution("constant", (100.0,)))
    download: Distribution = field(default_factory=lambda: Distribution("constant", (100.0,)))
    latency: Distribution = field(default_factory=lambda: Distribution("constant", (40.0,)))
    same_line: bool = True
    target: float = 1e-4
    absent: float = 0.0
    mid_round: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not MIN_PEERS <= self.n_peers <= MAX_PEERS:
            raise LocalError(f"{self.n_peers} peers: {MIN_PEERS} to {MAX_PEERS} expected")
        if not 0 < self.target < 1:
            raise LocalError(f"a target variance of {self.target:g}: between 0 and 1 (as it is at the start) expected")
        if self.vector_bytes < 4:
            raise LocalError(f"a vector of {self.vector_bytes} bytes: 4 or more expected")
        for name, value in (("missing a round", self.absent), ("being lost in one", self.mid_round)):
            if not 0 <= value < 1:
                raise LocalError(f"a probability of {name} of {value:g}: from 0 to less than 1 expected")

    def peers(self) -> Peers:
        """Return the machines of this swarm, drawn by its seed."""
        rng = np.random.default_rng(self.seed)
        down = self.download.draw(rng, self.n_peers) * BYTES_PER_S
        up = down if self.same_line else self.upload.draw(rng, self.n_peers) * BYTES_PER_S
        return Peers(up, down, self.latency.draw(rng, self.n_peers) / 1000)


@dataclass(frozen=True)
class Alternative:
    """One way to average. Seconds until 95 % of the peers have their result, bytes sent by a peer on average.

    Attributes:
        rounds_per_step: of an exact step; 1 where there is none.
        round_s: seconds per round, over all that were played.
        step_s: `rounds_per_step` of them.
        target_rounds, target_s, target_bytes: to the target variance; `target_rounds` is 0, and the others infinite, if
            that was not reached.
        last_s: when the very last peer has its result; the one with the worst line of all decides that.
        variance: what was reached.
        missed: share of the peers that miss a round, because they are absent or still busy with the one before.
        waiting: share of its time that the median peer waits for its group.
        limits: the share of group rounds, by peers, that each of `mpd.pricing.LIMITS` had most of.
        largest: members of the largest group.
    """

    policy: str
    group_size: int
    shape: Shape
    rounds_per_step: int
    round_s: float
    step_s: float
    target_rounds: int
    target_s: float
    last_s: float
    target_bytes: float
    variance: float
    missed: float
    waiting: float
    limits: dict[str, float]
    largest: int

    @property
    def limit(self) -> str:
        """What had most of the time of most rounds."""
        return max(self.limits, key=lambda name: self.limits[name], default="nothing")


@dataclass(frozen=True)
class Advice:
    """The answer: `best` of `alternatives`, with `reasons` in sentences."""

    question: Question
    best: Alternative
    alternatives: tuple[Alternative, ...]
    reasons: tuple[str, ...]


def candidates(n_peers: int) -> Iterator[tuple[str, int]]:
    """Yield (policy, group size) of everything worth a look; grids that come out alike are named once."""
    seen = set()
    for size in GROUP_SIZES:
        shape = fit(n_peers, size)
        if shape not in seen and size <= max(n_peers, GROUP_SIZES[0]):
            seen.add(shape)
            yield OWN, size
    for policy in COMPARED[1:]:
        yield policy, {"pairs": 2, "allreduce": n_peers}.get(policy, 16)


def play(question: Question, peers: Peers, policy: str, group_size: int, costs: Costs) -> Alternative:
    """Return how one policy does: round after round until the target, or `MAX_ROUNDS` of them."""
    n = question.n_peers
    settings = Settings(
        n_peers=n,
        policy=policy,
        group_size=group_size,
        absent=question.absent,
        mid_round=question.mid_round,
        seed=question.seed,
    )
    swarm = Swarm(settings, generator(settings, 0))
    shape = settings.grid if policy == OWN else ()
    work = Work(question.vector_bytes, is_grid=policy != "allreduce" and shape != (1,))
    clock = Timeline(peers, work, costs)
    sent, waited, limits, largest = np.zeros(n), np.zeros(n), Counter[int](), 0
    n_rounds, missed, least = 0, 0, max(1, len(shape))
    while n_rounds < MAX_ROUNDS:
        # Who is still busy when the window of the others ends misses the round, and keeps its cell and its values.
        present = swarm.draw_present() & (clock.ready <= np.median(clock.ready) + WINDOW.first_s)
        seen = swarm.round(present, swarm.draw_lost(present))
        assert isinstance(seen.meeting, Groups)
        timed = clock.play(seen.meeting.group_of(n), seen.lost_at)
        missed += int((~present).sum())
        n_rounds += 1
        sent += timed.sent
        waited += timed.begun - timed.ready
        limits.update(timed.limit[timed.limit >= 0].tolist())
        largest = max(largest, int(timed.size.max()))
        if swarm.variance < question.target and n_rounds >= least:
            break
    ended, last = float(np.quantile(clock.ready, MOST)), float(clock.ready.max())
    reached = swarm.variance < question.target
    total = sum(limits.values()) or 1
    return Alternative(
        policy=policy,
        group_size=group_size,
        shape=shape,
        rounds_per_step=least,
        round_s=ended / n_rounds,
        step_s=ended / n_rounds * least,
        target_rounds=n_rounds if reached else 0,
        target_s=ended if reached else math.inf,
        last_s=last if reached else math.inf,
        target_bytes=float(sent.mean()) if reached else math.inf,
        variance=swarm.variance,
        missed=missed / n_rounds / n,
        waiting=float(np.median(waited / np.maximum(clock.ready, 1e-9))),
        limits={LIMITS[index]: count / total for index, count in sorted(limits.items())},
        largest=largest,
    )


def advise(question: Question, costs: Costs | None = None, on_played: Callable[[], None] = lambda: None) -> Advice:
    """Answer a question.

    Args:
        costs: of a machine, as `tests/bench/validate.py --calibrate` prints them; those of docs/advise.md if None.
        on_played: is called after each alternative, for a progress bar.

    Raises LocalError if no group size of the daemon's reaches the target within `MAX_ROUNDS` rounds.
    """
    peers = question.peers()
    found = []
    for policy, size in candidates(question.n_peers):
        found.append(play(question, peers, policy, size, costs or Costs()))
        on_played()
    own = [each for each in found if each.policy == OWN]
    best = min(own, key=lambda each: (each.target_s, each.target_bytes))
    if not math.isfinite(best.target_s):
        raise LocalError(
            f"no group size reaches a variance of {question.target:g} within {MAX_ROUNDS} rounds: "
            "a larger --target or fewer absent peers expected"
        )
    return Advice(question, best, tuple(found), tuple(_reasons(best, own, found)))


def _reasons(best: Alternative, own: list[Alternative], found: list[Alternative]) -> Iterator[str]:
    if best.shape == (1,):
        yield "all peers fit into one group, which has the exact mean after one round"
    else:
        yield (
            f"a fitted grid of {'x'.join(map(str, best.shape))} cells has the exact mean after {best.rounds_per_step} "
            f"rounds, and groups of {best.largest} at most"
        )
    share = best.limits.get(best.limit, 0.0)
    yield f"{best.limit} takes most of the time in {share:.0%} of the peers' rounds"
    if best.last_s > 1.2 * best.target_s:
        yield f"the slowest lines need until {best.last_s:.1f} s; the others leave them behind"
    if best.missed > 0.005:
        yield f"{best.missed:.1%} of the peers miss a round: they are absent, or still busy with the one before"
    if best.waiting > 0.05:
        yield f"the median peer waits for its group during {best.waiting:.0%} of the time"
    rivals = [each for each in own if each is not best and math.isfinite(each.target_s)]
    for each in sorted(rivals, key=lambda each: each.target_s)[:2]:
        yield (
            f"groups of {each.group_size} take {each.target_s / best.target_s:.2f} times as long: "
            f"{each.target_rounds} rounds of {each.round_s:.1f} s"
        )
    others = [each for each in found if each.policy != OWN]
    for each in others:
        if math.isfinite(each.target_s):
            beyond = each.largest > MAX_MEMBERS
            note = f", in one group of {each.largest}, where mpd allows {MAX_MEMBERS}" if beyond else ""
            yield f"{each.policy} takes {each.target_s / best.target_s:.2f} times as long{note}"
        else:
            yield f"{each.policy} does not get there in {MAX_ROUNDS} rounds"
