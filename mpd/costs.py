"""What a round costs a daemon beside the bytes on its link: messages, processor time, and waiting for the absent.

Three sources, and no guesses. *Counted*: how many one-way delays a step takes, in the daemon itself above simulated
links (tests/sim/test_hops.py holds the numbers to it). *Imported*: every wait and limit is the daemon's own constant.
*Measured*: processor time, fitted by tests/bench/validate.py to groups of two, four and seven daemons; `Costs` holds
what that printed on the machine of docs/advise.md, and another machine prints its own.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mpd.errors import LocalError

STEP_HOPS = {2: 5, 3: 8}
"""One-way delays from the question of all trainers to their answers, by members: group, pieces, means, confirmation."""
LARGE_GROUP_HOPS = 9  # of four members and more
NEW_SLOT_HOPS = 2  # on a grid of several axes: a round later, a peer stands in a slot that it has to look up
LOOKUP_BITS = 4  # of the distance to a key that one more step of a lookup wins, with buckets of 20
BUCKET = 20
DIAL_HOPS = 10  # to a stranger: TCP, TLS, the agreement on keys, the data connection and its proof (docs/wire.md)
MAX_LINKS = 256  # a daemon keeps no more, so in larger swarms the members of a group are strangers
INITIAL_WINDOW_BYTES = 10 * 1448  # TCP sends so much before the first acknowledgement, and twice as much after each
WIRE_OVERHEAD = 1.045  # frames, TCP and IP headers of full segments
REDO_HOPS = 6  # need, prepare, promise, plan, pieces, means (mpd/replan.py, mpd/agreement.py)


def hops(n_members: int) -> int:
    """Return how many one-way delays a step of a warm group takes."""
    return STEP_HOPS.get(n_members, LARGE_GROUP_HOPS)


def lookup_hops(n_peers: int) -> int:
    """Return how many one-way delays a look into a DHT of `n_peers` takes: there and back per step of the lookup."""
    return 2 * max(1, 1 + math.ceil((math.log2(n_peers / BUCKET)) / LOOKUP_BITS)) if n_peers > BUCKET else 2


@dataclass(frozen=True, slots=True)
class Costs:
    """Processor seconds of all that takes part in a round, trainers included.

    `member_s` per member and round; `pair_s` per ordered pair of members, for the messages that form and confirm a
    group; `byte_s` per byte that moves, both ends together (sealing, kernel, adding up, opening); `record_s` per record
    that moves; `copy_s` per byte of vector that a trainer copies in and out; `line_byte_s` more per byte that trickles
    in over a line, a few packets at a time; `slot_s` per ordered pair on a grid of several axes, for the announcements
    in the DHT that members read of each other.

    On a machine that several peers share, work W of n members takes W / (cores * busy) + serial * W / n seconds: the
    cores are shared, and beside that each daemon does its own part one thing after the other (Graham's bound on list
    scheduling). `busy` is less than 1 where somebody else uses the machine.
    """

    member_s: float = 7.0e-3
    pair_s: float = 1.35e-3
    byte_s: float = 1.42e-9
    record_s: float = 1.77e-4
    copy_s: float = 0.0
    slot_s: float = 5.5e-3
    line_byte_s: float = 1.75e-8
    busy: float = 0.83
    serial: float = 0.36

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < math.inf:
                raise LocalError(f"cost {name} is {value!r}: a finite number from 0 on expected")
        if not 0 < self.busy <= 1:
            raise LocalError(f"busy is {self.busy:g}: a share of 1 expected")

    def work_s(self, sample: "Sample") -> float:
        """Return the processor seconds of a round like that of `sample`."""
        prices = (self.member_s, self.pair_s, self.byte_s, self.record_s, self.copy_s)
        return sum(price * count for price, count in zip(prices, sample.terms(), strict=True))

    def wall_s(self, work_s: float, n_members: int, cores: float) -> float:
        """Return how long `work_s` processor seconds of `n_members` take on one machine."""
        return work_s / (cores * self.busy) + self.serial * work_s / n_members

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Costs":
        """Return costs as `tests/bench/validate.py` writes them; what is not named stays as it is."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise LocalError(f"{unknown[0]!r} is no cost: {', '.join(sorted(known))} expected")
        if wrong := [name for name, value in values.items() if not isinstance(value, int | float)]:
            raise LocalError(f"cost {wrong[0]} is {values[wrong[0]]!r}: a number expected")
        return cls(**{name: float(value) for name, value in values.items()})


@dataclass(frozen=True, slots=True)
class Sample:
    """What a small swarm was seen to take for one round on one machine.

    `n_members` peers in one group, `vector_bytes` each, `n_records` that moved; `processor_s` of all processes,
    `seconds` on the clock, `cores` of the machine.
    """

    n_members: int
    vector_bytes: int
    n_records: int
    processor_s: float
    seconds: float
    cores: int

    @property
    def moved_bytes(self) -> int:
        """Bytes that moved between the members, each counted once."""
        return 2 * (self.n_members - 1) * self.vector_bytes

    def terms(self) -> tuple[float, ...]:
        """Return how often each of member_s, pair_s, byte_s, record_s and copy_s is paid."""
        n = self.n_members
        return n, n * (n - 1), self.moved_bytes, self.n_records, n * self.vector_bytes


FITTED = ("member_s", "pair_s", "byte_s", "record_s", "copy_s")


def fit_costs(samples: Sequence[Sample], known: Costs) -> Costs:
    """Return the costs that explain `samples` best, by non-negative least squares of relative errors.

    What the samples cannot tell (`slot_s` needs a grid, `line_byte_s` lines) is taken from `known`. Raises LocalError
    for fewer samples than unknowns, or if nothing took any time.
    """
    if len(samples) < len(FITTED) or not all(s.processor_s > 0 and s.seconds > 0 for s in samples):
        raise LocalError(f"{len(samples)} samples: {len(FITTED)} or more that took some time expected")
    rows = np.array([s.terms() for s in samples])
    weights = 1 / np.array([s.processor_s for s in samples])
    fitted = dict(zip(FITTED, _non_negative(rows * weights[:, None], np.ones(len(samples))), strict=True))
    costs = replace(known, **fitted)
    return replace(costs, **_on_the_clock(samples))


def _on_the_clock(samples: Sequence[Sample]) -> dict[str, float]:
    """Return `busy` and `serial`: how the clock's time of the samples follows from their processor time."""
    rows = np.array([(s.processor_s / s.cores, s.processor_s / s.n_members) for s in samples])
    seconds = np.array([s.seconds for s in samples])
    shared, serial = _non_negative(rows / seconds[:, None], np.ones(len(samples)))
    if shared < 1:  # no machine does more than all of its cores
        shared = 1.0
        rest = np.maximum(seconds - rows[:, 0], 0.0)
        serial = float((rest / seconds) @ (rows[:, 1] / seconds) / np.sum((rows[:, 1] / seconds) ** 2))
    return {"busy": 1 / shared, "serial": serial}


def _non_negative(rows: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]) -> list[float]:
    """Return x >= 0 that brings `rows` @ x nearest to `wanted`: all subsets of few unknowns are tried."""
    n = rows.shape[1]
    best, best_error = np.zeros(n), math.inf
    for subset in range(1, 1 << n):
        columns = [i for i in range(n) if subset >> i & 1]
        scale = np.linalg.norm(rows[:, columns], axis=0)
        if not scale.all():
            continue
        found = np.linalg.lstsq(rows[:, columns] / scale, wanted, rcond=None)[0] / scale
        error = float(np.sum((rows[:, columns] @ found - wanted) ** 2))
        if (found >= 0).all() and error < best_error * (1 - 1e-9):
            best, best_error = np.zeros(n), error
            best[columns] = found
    return [float(each) for each in best]
