"""Simulate how a swarm averages: many peers, a policy, rounds in which some are absent or lost.

    from mpd.simulate import Settings, simulate

    result = simulate(Settings(n_peers=512, policy="moshpit", group_size=32, absent=0.01))
    print(result.rounds_to(1e-9))

Each peer holds a value, N(0, 1) at the start; what is measured is the variance of the values over all peers after each
round. Grid, moves and masses are those of the daemon (`mpd.grid`, `mpd.mass`), on arrays. `Swarm` is one swarm, to be
driven round by round: it tells who met whom, so that a round can be priced in seconds or bytes.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mpd import theory
from mpd.errors import LocalError
from mpd.grid import MAX_AXES, MAX_PEERS, Shape, fit
from mpd.meetings import Bools, Floats, Groups, Ints, Meeting, Random
from mpd.overlays import Chebyshev, Gossip, PaperPushSum, PushSum
from mpd.policies import AllReduce, Mixed, Moshpit, Pairs, PaperGrid, Policy, RandomGroups

POLICIES = {
    "moshpit": "the daemon's: fitted grid, exact cycles with the mass in the cells",
    "moshpit-single": "the same grid, every round for itself (`rounds=1`, Moshpit SGD)",
    "paper-grid": "the paper's simulation: M cells per axis, as many axes as the peers need, random cells, no moves",
    "random": "groups drawn anew in each round",
    "pairs": "random pairs",
    "allreduce": "everybody at once, all or nothing",
    "gossip": "a ring: the mean of a peer and its two neighbours",
    "chebyshev": "the same ring, accelerated",
    "pushsum": "push-sum, two messages a round on an exponential graph",
    "paper-pushsum": "the same as the paper's figures have it: rows renormalised instead of weights",
}
"""Name and one line about each policy."""

COMPARED = ("moshpit", "paper-grid", "random", "allreduce", "gossip", "chebyshev", "pushsum", "pairs")
N_CHUNKS = 32
MAX_MODES = 2**24  # modes times rounds of a spectrum that is worth its memory


@dataclass(frozen=True, slots=True)
class Settings:
    """What to simulate. Raises LocalError, in one sentence, if it makes no sense.

    Attributes:
        n_peers: how many peers there are all the time, 1 to 2**20.
        policy: a name in `POLICIES`.
        group_size: how many average together: what grids are fitted to, and the size of random groups.
        shape: a grid to use instead of the one that `group_size` gives; `None` to let it.
        absent: probability that a peer misses a round; it keeps its value and is back in the next one.
        mid_round: probability that a peer which takes part in a round is lost in the middle of it (`mpd.mixing`).
        churn: probability that a peer leaves for good after a round; a newcomer with a new value comes in its place.
        rounds: how many rounds to simulate.
        target: the variance to reach.
        repeat: how many swarms to simulate.
        seed: of the first one; the same seed gives the same swarm.
        legacy_random: draw as `numpy.random.RandomState` does, in the order of the paper's own simulation.
    """

    n_peers: int
    policy: str = "moshpit"
    group_size: int = 16
    shape: Shape | None = None
    absent: float = 0.0
    mid_round: float = 0.0
    churn: float = 0.0
    rounds: int = 50
    target: float = 1e-9
    repeat: int = 10
    seed: int = 0
    legacy_random: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.n_peers <= MAX_PEERS:
            raise LocalError(f"{self.n_peers} peers: 1 to {MAX_PEERS} expected")
        if self.policy not in POLICIES:
            raise LocalError(f"{self.policy!r} is no policy: one of {', '.join(POLICIES)} expected")
        if self.group_size < 2:
            raise LocalError(f"groups of {self.group_size}: at least 2 expected")
        for name, value in (("absence", self.absent), ("loss", self.mid_round), ("churn", self.churn)):
            if not 0 <= value <= 1:
                raise LocalError(f"a probability of {name} of {value}: 0 to 1 expected")
        if self.rounds < 1 or self.repeat < 1 or self.seed < 0:
            raise LocalError("rounds and repeat must be at least 1, and seed at least 0")
        if not 0 < self.target < math.inf:
            raise LocalError(f"a target variance of {self.target}: a positive number expected")
        self._check_shape()

    def _check_shape(self) -> None:
        if self.shape is None:
            return
        if not 1 <= len(self.shape) <= MAX_AXES or min(self.shape) < 1:
            raise LocalError(f"shape {self.shape}: 1 to {MAX_AXES} axes of at least one cell expected")
        n_cells = math.prod(self.shape)
        if self.policy == "paper-grid" and n_cells < self.n_peers:
            raise LocalError(f"a grid of {n_cells} cells has no cell of its own for each of {self.n_peers} peers")
        if n_cells > 4 * MAX_PEERS:
            raise LocalError(f"a grid of {n_cells} cells: at most {4 * MAX_PEERS} expected")

    @property
    def has_grid(self) -> bool:
        """True if the policy is one on a grid."""
        return self.policy in ("moshpit", "moshpit-single", "paper-grid")

    @property
    def grid(self) -> Shape:
        """The grid of a policy that has one: as given, fitted, or the smallest M**d that holds all peers."""
        if self.shape is not None:
            return self.shape
        if self.policy != "paper-grid":
            return fit(self.n_peers, self.group_size)
        n_axes = 1
        while self.group_size**n_axes < self.n_peers:
            n_axes += 1
        return (self.group_size,) * n_axes


def make_policy(settings: Settings, rng: Random) -> Policy:
    """Return the policy that `settings` name, for one swarm."""
    n_peers = settings.n_peers
    group_size = max(settings.shape) if settings.shape else settings.group_size
    match settings.policy:
        case "moshpit" | "moshpit-single":
            return Moshpit(np.ones(n_peers), settings.grid, exact=settings.policy == "moshpit")
        case "paper-grid":
            return PaperGrid(n_peers, settings.grid, rng)
        case "random":
            return RandomGroups(n_peers, group_size)
        case "pairs":
            return Pairs(n_peers)
        case "allreduce":
            return AllReduce(n_peers)
        case "gossip":
            return Gossip(n_peers)
        case "chebyshev":
            return Chebyshev(n_peers)
        case "pushsum":
            return PushSum(n_peers)
        case _:
            return PaperPushSum(n_peers)


@dataclass(frozen=True)
class Round:
    """One simulated round: who was there, who met whom, who was lost, how it ended, and who left after it.

    `present` (n,); `lost_at` (n,) or None, the part of the round, 0 to 1, after which a peer was lost, infinite for the
    others; `left` (m,), the peers whose places newcomers have taken.
    """

    number: int
    present: Bools
    meeting: Meeting
    lost_at: Floats | None
    mixed: Mixed
    left: Ints

    @property
    def vectors_sent(self) -> float:
        """Vectors that all peers together send, losses not deducted: what a round costs in bytes."""
        if isinstance(self.meeting, Groups):
            return 2.0 * float((self.meeting.sizes - 1).sum())
        return float(len(self.meeting.senders))


class Swarm:
    """A swarm that averages: its values, (n, W), and one call of `round` after the other.

    W, the number of sampled chunks, is 1 unless peers are lost in the middle of rounds.
    """

    def __init__(self, settings: Settings, rng: Random, policy: Policy | None = None, n_chunks: int = 0) -> None:
        self.settings = settings
        self.rng = rng
        self.number = 0
        width = n_chunks or (N_CHUNKS if settings.mid_round else 1)
        self.values: Floats = rng.normal(0, 1, (settings.n_peers, width))
        self.policy = policy or make_policy(settings, rng)

    def draw_present(self) -> Bools:
        """Draw who takes part in the next round: (n,)."""
        return np.asarray(self.rng.uniform(0, 1, self.settings.n_peers) >= self.settings.absent)

    def draw_lost(self, present: Bools) -> Floats | None:
        """Draw who of those `present` will be lost in the middle of the round, and when: (n,); None for nobody."""
        if not self.settings.mid_round:
            return None
        is_lost = present & (self.rng.uniform(0, 1, self.settings.n_peers) < self.settings.mid_round)
        return np.where(is_lost, self.rng.uniform(0, 1, self.settings.n_peers), np.inf)

    def round(self, present: Bools | None = None, lost_at: Floats | None = None) -> Round:
        """Average one round and return what happened; who is there and who is lost is drawn if it is not given."""
        drawn = present is None
        if present is None:
            present = self.draw_present()
        meeting = self.policy.meet(present, self.rng)
        if lost_at is None and drawn:
            lost_at = self.draw_lost(present)
        mixed = self.policy.mix(self.values, meeting, lost_at)
        left = self._churn()
        self.number += 1
        return Round(self.number - 1, present, meeting, lost_at, mixed, left)

    def _churn(self) -> Ints:
        if not self.settings.churn:
            return np.zeros(0, dtype=np.int64)
        left = np.flatnonzero(self.rng.uniform(0, 1, self.settings.n_peers) < self.settings.churn)
        self.values[left] = self.rng.normal(0, 1, (len(left), self.values.shape[1]))
        self.policy.replace(left, self.rng)
        return left

    @property
    def variance(self) -> float:
        """Variance over the peers, the mean of all chunks."""
        return float(self.values.var(axis=0).mean())


@dataclass(frozen=True)
class Run:
    """What became of one swarm. `variance` (rounds + 1,) begins before the first round, the others (rounds,) do not.

    `error`: mean square distance to the mean at the start. `vectors`: sent by a peer on average. `exact`: share of the
    peers with a certified exact mean. `largest`: members of the largest group, 0 where there are none.
    """

    seed: int
    variance: Floats
    error: Floats
    vectors: Floats
    exact: Floats
    largest: Ints

    def rounds_to(self, target: float) -> int | None:
        """Return the first round after which the variance was below `target`, None if there was none."""
        below = np.flatnonzero(self.variance[1:] < target)
        return int(below[0]) + 1 if len(below) else None


@dataclass(frozen=True)
class Result:
    """All runs of one setting, with what theory expects."""

    settings: Settings
    runs: tuple[Run, ...]
    theory: Floats | None = field(default=None)

    def rounds_to(self, target: float) -> float:
        """Return the mean number of rounds to `target`; a run that never got there counts with all its rounds."""
        reached = [run.rounds_to(target) for run in self.runs]
        return math.fsum(self.settings.rounds if r is None else r for r in reached) / len(reached)

    def n_reached(self, target: float) -> int:
        """Return how many runs reached `target`."""
        return sum(run.rounds_to(target) is not None for run in self.runs)

    @property
    def variance(self) -> Floats:
        """Mean variance over the runs, before and after each round: (rounds + 1,)."""
        return np.asarray(np.mean([run.variance for run in self.runs], axis=0))


def generator(settings: Settings, repeat: int) -> Random:
    """Return the generator of swarm `repeat`, counted from 0."""
    seed = settings.seed + repeat
    return np.random.RandomState(seed) if settings.legacy_random else np.random.default_rng(seed)


def simulate(settings: Settings, on_round: Callable[[], None] = lambda: None) -> Result:
    """Simulate `settings.repeat` swarms one after the other; `on_round` is called after each round."""
    runs = tuple(_run(settings, repeat, on_round) for repeat in range(settings.repeat))
    return Result(settings, runs, expected_variance(settings))


def compare(
    settings: Settings, policies: Iterable[str], on_round: Callable[[], None] = lambda: None
) -> Iterator[Result]:
    """Yield the result of each of `policies` under otherwise the same settings, seeds included."""
    for policy in policies:
        yield simulate(replace(settings, policy=policy), on_round)


def _run(settings: Settings, repeat: int, on_round: Callable[[], None]) -> Run:
    swarm = Swarm(settings, generator(settings, repeat))
    mean = swarm.values.mean(axis=0)
    variance = np.empty(settings.rounds + 1)
    error, vectors, exact = (np.empty(settings.rounds) for _ in range(3))
    largest = np.zeros(settings.rounds, dtype=np.int64)
    variance[0] = swarm.variance
    for number in range(settings.rounds):
        seen = swarm.round()
        variance[number + 1] = swarm.variance
        error[number] = np.square(swarm.values - mean).mean()
        vectors[number] = seen.vectors_sent / settings.n_peers
        exact[number] = seen.mixed.exact.mean()
        if isinstance(seen.meeting, Groups):
            largest[number] = seen.meeting.sizes.max(initial=0)
        on_round()
    return Run(settings.seed + repeat, variance, error, vectors, exact, largest)


def expected_variance(settings: Settings) -> Floats | None:
    """Return the expected variance after 0 to `rounds` rounds, (rounds + 1,), or None where no formula is known."""
    n_peers, rounds, p = settings.n_peers, settings.rounds, settings.absent
    if settings.mid_round or settings.churn:
        return None
    match settings.policy:
        case "random":
            return theory.random_groups(n_peers, max(settings.shape or (settings.group_size,)), p, rounds)
        case "pairs":
            return theory.random_groups(n_peers, 2, p, rounds)
        case "allreduce":
            return theory.all_or_nothing(n_peers, p, rounds)
    if p:
        return None
    n_cells = math.prod(settings.grid)
    fills = {"moshpit": n_cells <= n_peers, "paper-grid": n_cells == n_peers}
    if fills.get(settings.policy):
        return theory.grid(n_peers, settings.grid, rounds)
    if n_peers * rounds > MAX_MODES:
        return None
    match settings.policy:
        case "gossip":
            return theory.ring_gossip(n_peers, rounds)
        case "chebyshev":
            return theory.chebyshev_gossip(n_peers, rounds)
        case "pushsum":
            return theory.push_sum(n_peers, rounds)
    return None


def summary(result: Result) -> dict[str, Any]:
    """Return the result as what JSON can say; the keys stay as they are."""
    settings = result.settings
    return {
        "policy": settings.policy,
        "peers": settings.n_peers,
        "shape": list(settings.grid) if settings.has_grid else None,
        "group_size": settings.group_size,
        "absent": settings.absent,
        "mid_round": settings.mid_round,
        "churn": settings.churn,
        "rounds": settings.rounds,
        "target": settings.target,
        "seed": settings.seed,
        "rounds_to_target": result.rounds_to(settings.target),
        "reached": result.n_reached(settings.target),
        "repeat": settings.repeat,
        "variance": result.variance.tolist(),
        "expected_variance": None if result.theory is None else result.theory.tolist(),
    }
