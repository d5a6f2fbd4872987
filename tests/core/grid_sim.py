"""A swarm on a grid without network: scalars instead of tensors, the moves and masses of production.

`Swarm` runs the rules of `mpd.grid` and `mpd.mass` as a daemon would, faults included. `CarrySwarm` moves in the same
way but carries a mass per peer from round to round, without end: the rule to compare with. The last two functions are
schemes without a grid.
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mpd.grid import Cell, Line, Shape, axis_of, emptiest, line_of, next_cell, rank_cell, sample_cells, seating
from mpd.mass import Shares, Standing, after, certificate, cuts, enter, shares
from mpd.messages import MAX_MEMBERS

EVERYBODY = -1  # as a bit mask of contributors
AGREED = 1e-9  # the variance below which a swarm is said to agree
GIVE_UP = 40


def rank_cells(n_peers: int, shape: Shape) -> list[Cell]:
    return [rank_cell(rank, shape, n_peers) for rank in range(n_peers)]


def random_cells(rng: random.Random, n_peers: int, shape: Shape) -> list[Cell]:
    return [sample_cells(rng, shape, 1)[0] for _ in range(n_peers)]


def emptiest_cells(rng: random.Random, n_peers: int, shape: Shape) -> list[Cell]:
    """The cells of peers that come one after the other and see each other."""
    counts: Counter[Line] = Counter()
    cells = []
    for _ in range(n_peers):
        cells.append(emptiest(counts, sample_cells(rng, shape), 0, rng))
        counts[line_of(cells[-1], 0)] += 1
    return cells


def line_sizes(cells: Iterable[Cell], axis: int) -> Counter[Line]:
    return Counter(line_of(cell, axis) for cell in cells)


def moved(cells: Sequence[Cell], number: int, shape: Shape, record_n: int, rng: random.Random) -> list[Cell]:
    """The cells of peers after round `number`, if all take part and sit down in any order."""
    axis = axis_of(number, shape)
    places: Counter[Line] = Counter()
    result = []
    for cell in rng.sample(cells, len(cells)):
        line = line_of(cell, axis)
        result.append(next_cell(cell, number, places[line], record_n, shape))
        places[line] += 1
    return result


@dataclass(frozen=True)
class Faults:
    """What goes wrong in a round, with the probability of each."""

    absent: float = 0.0  # a peer misses the round
    replaced: float = 0.0  # a peer leaves for good after it, and another one comes
    split: float = 0.0  # two leaders close two groups, half of a line each
    piece_lost: float = 0.0  # a member's piece is missing from the result of its group


@dataclass
class Peer:
    name: bytes
    weight: float
    standing: Standing
    value: float = 0.0
    certificate: tuple[bool, int] = (False, 0)


@dataclass(frozen=True)
class CycleResult:
    """How a cycle ended: who started it, and the (error, certificate) of each member of its last round."""

    n_first: int
    ends: list[tuple[float, tuple[bool, int]]]

    @property
    def is_exact(self) -> bool:
        return max(error for error, _ in self.ends) < 1e-12


class Swarm:
    """Peers in the given first cells, in a run whose steps are exact cycles. `weighs`: with unequal weights.

    Lines of more than `cap` are cut; `last_too`: also in the last round of a cycle, which is the wrong thing to do.
    """

    def __init__(
        self,
        rng: random.Random,
        shape: Shape,
        cells: Sequence[Cell],
        *,
        weighs: bool = False,
        cap: int = 1 << 20,
        last_too: bool = False,
    ) -> None:
        self.rng = rng
        self.cap = cap
        self.last_too = last_too
        self.largest = 0  # group of the last cycle
        self.shape = shape
        self.record_n = len(cells)
        self.weighs = weighs
        self.number = 0
        self.peers = [self.newcomer(cell) for cell in cells]

    def newcomer(self, cell: Cell) -> Peer:
        weight = self.rng.uniform(0.1, 10) if self.weighs else 1.0
        return Peer(self.rng.randbytes(20), weight, enter(weight, cell))

    def cycle(self, *faults: Faults) -> CycleResult:
        """Give everybody a new N(0, 1) value and average d rounds; the last of `faults` is that of all later rounds."""
        for peer in self.peers:
            peer.value = self.rng.gauss(0, 1)
        starters: list[Peer] = []
        self.largest = 0
        for axis in range(len(self.shape)):
            now = faults[min(axis, len(faults) - 1)] if faults else Faults()
            members = [peer for peer in self.peers if self.rng.random() >= now.absent]
            if axis == 0:
                starters = members
                mean = math.fsum(p.weight * p.value for p in starters) / math.fsum(p.weight for p in starters)
            self.round(members, now)
            self.churn(now.replaced)
        return CycleResult(len(starters), [(abs(p.value - mean), p.certificate) for p in members])

    def round(self, members: Iterable[Peer], faults: Faults) -> None:
        axis = axis_of(self.number, self.shape)
        lines: dict[Line, list[Peer]] = defaultdict(list)
        for peer in members:
            if axis == 0:
                peer.standing = enter(peer.weight, peer.standing.cell)
            lines[line_of(peer.standing.cell, axis)].append(peer)
        for line in lines.values():
            half = len(line) // 2
            if half and self.rng.random() < faults.split:
                self.average(line[:half], faults, is_known_split=axis == 0)
                self.average(line[half:], faults, is_known_split=axis == 0)
            else:
                n_groups = cuts(
                    len(line), self.number, self.shape, self.cap, MAX_MEMBERS if self.cap < 1 << 20 else 1 << 20
                )
                if self.last_too and axis == len(self.shape) - 1:
                    n_groups = max(1, min(len(line) // self.shape[axis], math.ceil(len(line) / self.cap)))
                self.average(line, faults, n_groups=n_groups)
        self.number += 1

    def average(self, line: Iterable[Peer], faults: Faults, *, is_known_split: bool = False, n_groups: int = 1) -> None:
        by_name = {peer.name: peer for peer in line}
        cells = {name: peer.standing.cell for name, peer in by_name.items()}
        order = seating(cells, self.number, self.record_n, self.shape, self.rng.randbytes(16))
        seats = [by_name[name] for name in order]
        weighed = shares([peer.standing for peer in seats], self.number, self.shape, exact=True)
        weighed = replace(weighed, whole=weighed.whole and not is_known_split, parts=n_groups)
        for first in range(n_groups):
            places = range(first, len(seats), n_groups)
            part = replace(
                weighed,
                weights=tuple(weighed.weights[place] for place in places),
                heads=tuple(weighed.heads[place] for place in places),
            )
            self.exchange([seats[place] for place in places], part, faults)

    def exchange(self, seats: Sequence[Peer], weighed: Shares, faults: Faults) -> None:
        round_id = self.rng.randbytes(16)
        self.largest = max(self.largest, len(seats))
        contributors = EVERYBODY
        if self.rng.random() < faults.piece_lost:
            contributors = ~(1 << self.rng.randrange(len(seats)))
        weights = [w if contributors >> place & 1 else 0.0 for place, w in enumerate(weighed.weights)]
        total = math.fsum(weights)
        mean = math.fsum(w * p.value for w, p in zip(weights, seats, strict=True)) / total if total else None
        for place, peer in enumerate(seats):
            peer.value = peer.value if mean is None else mean
            peer.certificate = certificate(weighed, contributors)
            peer.standing = after(peer.standing, place, weighed, contributors, round_id, self.record_n)

    def churn(self, probability: float) -> None:
        for i in range(len(self.peers)):
            if self.rng.random() < probability:
                self.peers[i] = self.newcomer(sample_cells(self.rng, self.shape, 1)[0])


class CarrySwarm:
    """The same moves with a mass per peer: an absent one keeps its mass and value, and comes back with them."""

    def __init__(self, rng: random.Random, shape: Shape, cells: Sequence[Cell], *, number: int = 0) -> None:
        self.rng = rng
        self.shape = shape
        self.number = number
        self.cells = list(cells)
        self.masses = [1.0 for _ in cells]
        self.values = [rng.gauss(0, 1) for _ in cells]

    def round(self, absent: float = 0.0) -> list[int]:
        """Average one round and return who was there."""
        members = [i for i in range(len(self.cells)) if self.rng.random() >= absent]
        axis = axis_of(self.number, self.shape)
        lines: dict[Line, list[int]] = defaultdict(list)
        for i in self.rng.sample(members, len(members)):
            lines[line_of(self.cells[i], axis)].append(i)
        for group in lines.values():
            self.average(group, axis)
        self.number += 1
        return members

    def average(self, group: Sequence[int], axis: int) -> None:
        total = math.fsum(self.masses[i] for i in group)
        mean = math.fsum(self.masses[i] * self.values[i] for i in group) / total
        for place, i in enumerate(group):
            self.cells[i] = next_cell(self.cells[i], self.number, place, len(self.cells), self.shape)
        mates = Counter(self.cells[i][axis] for i in group)
        for i in group:
            self.values[i] = mean
            self.masses[i] = total / len(mates) / mates[self.cells[i][axis]]

    def cycle_is_exact(self, absent: float) -> bool:
        """Run a cycle from new values and equal masses; True if all members of its last round got the mean exactly."""
        self.masses = [1.0 for _ in self.cells]
        self.values = [self.rng.gauss(0, 1) for _ in self.cells]
        before = list(self.values)
        first, *_, last = [self.round(absent) for _ in self.shape]
        mean = math.fsum(before[i] for i in first) / len(first)
        return all(abs(self.values[i] - mean) < 1e-12 for i in last)

    def rounds_to_agree(self, absent: float = 0.0) -> int:
        n_rounds = 0
        while variance(self.values) > AGREED and n_rounds < GIVE_UP:
            self.round(absent)
            n_rounds += 1
        return n_rounds


def rounds_of_random_groups(rng: random.Random, n_peers: int, group_size: int) -> int:
    """Rounds to agreement if groups are drawn anew each time."""
    values = [rng.gauss(0, 1) for _ in range(n_peers)]
    n_groups = math.ceil(n_peers / group_size)
    n_rounds = 0
    while variance(values) > AGREED and n_rounds < GIVE_UP:
        rng.shuffle(values)
        for start in range(n_groups):
            values[start::n_groups] = _averaged(values[start::n_groups])
        n_rounds += 1
    return n_rounds


def rounds_of_bits(rng: random.Random, n_peers: int, group_size: int) -> int:
    """Rounds to agreement if peers with equal keys meet, and the place in a group is shifted into the key."""
    n_bits = round(math.log2(n_peers / group_size))
    n_new = math.ceil(math.log2(group_size))
    peers = [(rng.getrandbits(n_bits), rng.gauss(0, 1)) for _ in range(n_peers)]
    n_rounds = 0
    while variance([value for _, value in peers]) > AGREED and n_rounds < GIVE_UP:
        groups: dict[int, list[float]] = defaultdict(list)
        for key, value in rng.sample(peers, n_peers):
            groups[key].append(value)
        peers = [
            ((key << n_new | (place << n_new) // len(group)) % (1 << n_bits), value)
            for key, group in groups.items()
            for place, value in enumerate(_averaged(group))
        ]
        n_rounds += 1
    return n_rounds


def variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values) / len(values)


def _averaged(values: Sequence[float]) -> list[float]:
    return [math.fsum(values) / len(values)] * len(values)
