"""Mass inside an exact cycle: what each contribution weighs, and when the result is certainly the exact mean.

A cycle of d rounds is exact only if weights move with the values. After a round all peers of one new cell hold the same
bytes, so *the cell* carries the mass, W / C of a line of weight W that uses C coordinates, and every peer in it holds a
full claim to it, named by the round it comes from (`origin`). The next group divides each claim by the number of those
who turn up with it: each cell counts once, and a peer that is absent but has a cell-mate costs nothing. Peers that
missed the round before weigh nothing until the next cycle; they still receive.

The same arithmetic on heads, with one head for each peer of the first round, counts the peers without a roster. And one
bit, `full`, follows the two ways in which a cycle can stop being exact: a cell whose mass was lost, or one counted
twice. If it survives the last round, the result is the exact mean of all peers that took part in the first one.

An oversize line may be cut into several groups (`cuts`), except in the last round of a cycle. As long as each of them
uses all coordinates nothing is lost: a cell then has as many origins as there were groups, and all of them must be
there in the next round.

Where rounds are not exact cycles (one round per step, as in Moshpit SGD) no mass moves: every step brings the plain
weight of its trainers, which keeps the weighted mean of the swarm whoever is absent. Heads move all the same, so that
such a swarm is counted too.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mpd.errors import PeerError
from mpd.grid import MAX_PEERS, Cell, Shape, axis_of, line_of, next_cell, on_grid
from mpd.ids import ROUND_ID_BYTES
from mpd.layout import MAX_WEIGHT

MAX_MASS = MAX_WEIGHT * MAX_PEERS  # of a cell in the middle of a cycle
MAX_PARTS = 1024  # groups of one line


@dataclass(frozen=True, slots=True)
class Standing:
    """What a peer brings into a round. It travels between peers; nonsense raises ValueError.

    `mass` and `heads` are those of the peer's whole cell. `origin` is the id of the round they come from (empty before
    the first round of a cycle, when the mass is a plain weight), `seen` its number (or -1), and `full` says that
    nothing was lost up to there. `parts` is how many groups the line of that round was cut into, so the cell's mass has
    as many origins.
    """

    mass: float
    heads: float
    origin: bytes
    seen: int
    full: bool
    cell: Cell
    parts: int = 1

    def __post_init__(self) -> None:
        limit = MAX_MASS if self.origin else MAX_WEIGHT
        if not 0 <= self.mass <= limit:
            raise ValueError(f"{'a mass' if self.origin else 'a weight'} of {self.mass}: 0 to {limit:g} expected")
        if not 0 <= self.heads <= MAX_PEERS:
            raise ValueError(f"{self.heads} heads: 0 to {MAX_PEERS} expected")
        if len(self.origin) not in (0, ROUND_ID_BYTES):
            raise ValueError(f"an origin of {len(self.origin)} bytes: 0 or {ROUND_ID_BYTES} expected")
        if self.seen < -1:
            raise ValueError(f"round {self.seen} was seen: -1 or more expected")
        if not 1 <= self.parts <= MAX_PARTS:
            raise ValueError(f"a line in {self.parts} parts: 1 to {MAX_PARTS} expected")


@dataclass(frozen=True, slots=True)
class Shares:
    """What the members of round `number` weigh, by place. Every member computes the same from the same standings.

    `whole`: the group is all that its line should be, so the result stays certified if everybody's piece arrives. A
    leader that leaves out a member it knows of in the first round of a cycle must have it replaced by False. `parts` is
    how many groups the line was cut into; this is one of them.
    """

    number: int
    shape: Shape
    weights: tuple[float, ...]
    heads: tuple[float, ...]
    whole: bool
    parts: int = 1


def enter(weight: float, cell: Cell) -> Standing:
    """Return the standing of a peer at the start of a cycle, or of a step where rounds are not exact.

    `weight` is that of all trainers of the peer together, which count as `MAX_WEIGHT` at most. A peer that comes in the
    middle of a cycle is welcome with the same standing: it has not seen the round before, so it weighs nothing and ends
    exact like everybody else.
    """
    return Standing(mass=min(weight, MAX_WEIGHT), heads=1.0, origin=b"", seen=-1, full=False, cell=cell)


def shares(standings: Sequence[Standing], number: int, shape: Shape, exact: bool) -> Shares:
    """Return what the members of round `number` weigh; `standings` are those of a whole line, by place.

    Raises PeerError if they do not share a line: whoever put them together broke the rules.
    """
    axis = axis_of(number, shape)
    if not all(on_grid(s.cell, shape) for s in standings) or len({line_of(s.cell, axis) for s in standings}) > 1:
        raise PeerError(f"the group of round {number} is not one line along axis {axis} of the grid {shape}")
    if axis == 0:
        return Shares(number, shape, tuple(s.mass for s in standings), (1.0,) * len(standings), whole=True)
    standing = [s for s in standings if s.seen == number - 1]
    mates = Counter(s.origin for s in standing)
    claims = [1 / mates[s.origin] if s.seen == number - 1 else 0.0 for s in standings]
    return Shares(
        number,
        shape,
        weights=tuple(s.mass * claim if exact else s.mass for s, claim in zip(standings, claims, strict=True)),
        heads=tuple(s.heads * claim for s, claim in zip(standings, claims, strict=True)),
        whole=_is_whole(standing, axis, shape[axis]),
    )


def _is_whole(standing: Sequence[Standing], axis: int, m: int) -> bool:
    """Return True if each of the `m` cells of a line is there with all its origins, no other cell's, and is full."""
    cells = {s.cell[axis] for s in standing}
    pairs = {(s.cell[axis], s.origin) for s in standing}
    n_origins = Counter(cell for cell, _ in pairs)
    return (
        len(cells) == m
        and len(pairs) == len({origin for _, origin in pairs})
        and all(s.full and s.parts == n_origins[s.cell[axis]] for s in standing)
    )


def cuts(n_members: int, number: int, shape: Shape, cap: int, most: int) -> int:
    """Return how many groups a line of `n_members` is cut into: 1, unless they would be more than `cap`.

    Each group must have a member for every coordinate, and in the last round of a cycle, after which nothing makes up
    for it, a cut costs the exactness: there, only what no group can hold (`most` members) is cut.
    """
    axis = axis_of(number, shape)
    is_last = axis == len(shape) - 1
    wanted = 1 if is_last else min(math.ceil(n_members / cap), n_members // shape[axis])
    return min(max(1, wanted, math.ceil(n_members / most)), MAX_PARTS)


def after(me: Standing, place: int, shares: Shares, contributors: int, round_id: bytes, record_n: int) -> Standing:
    """Return the standing of the member at `place` after a round that it completed.

    Bit i of `contributors` says that the piece of place i is in every chunk of the result; places of weight 0 need not
    send one. Where nothing is lost, the masses of all cells of the swarm keep their sum.
    """
    number, shape = shares.number, shares.shape
    axis = axis_of(number, shape)
    counted = _counted(shares, contributors)
    cells = {next_cell(me.cell, number, i, record_n, shape)[axis] for i in counted}
    return Standing(
        # A hostile mass or head count must not push an honest peer out of the legal range.
        mass=min(math.fsum(shares.weights[i] for i in counted) / max(1, len(cells)), MAX_MASS),
        heads=min(math.fsum(shares.heads[i] for i in counted) / max(1, len(cells)), MAX_PEERS),
        origin=round_id,
        seen=number,
        full=shares.whole and len(counted) == len(shares.weights) and len(cells) == shape[axis],
        cell=next_cell(me.cell, number, place, record_n, shape),
        parts=shares.parts,
    )


def certificate(shares: Shares, contributors: int) -> tuple[bool, int]:
    """Return (exact, heads) for a round that ended with these contributors.

    `exact`: nothing was lost in the whole cycle, of which only the last round can say so. Then `heads` is the number of
    all peers that took part in its first round, and if mass has moved with them, the result is their exact weighted
    mean. Where it is False, `heads` is an estimate.
    """
    axis = axis_of(shares.number, shares.shape)
    counted = _counted(shares, contributors)
    n_lines = math.prod(line_of(shares.shape, axis))
    is_last = axis == len(shares.shape) - 1 and shares.parts == 1
    exact = shares.whole and len(counted) == len(shares.weights) and is_last
    return exact, round(math.fsum(shares.heads[i] for i in counted) * n_lines * shares.parts)


def _counted(shares: Shares, contributors: int) -> list[int]:
    """Return the places whose mass is in the result; nothing is lost with a place that weighs nothing."""
    return [i for i, weight in enumerate(shares.weights) if contributors >> i & 1 or weight == 0]
