"""The virtual grid: its shape, the way a peer moves on it, and the names of its places in the DHT.

Peers sit in the cells of a d-dimensional grid (Moshpit All-Reduce, Ryabinin et al., NeurIPS 2021). In each round the
peers that agree on all axes but one, a *line*, average, and each then takes a new coordinate on that axis. The paper
fixes M**d cells; here the shape is fitted to the number of peers, so that d rounds give the exact mean of any number.

The whole file rests on one fact: a line of n >= M members that hands its mean to all M coordinates passes the same
share to each of the M lines that cross it, whatever n is. So a cycle is exact if and only if every line has at least M
members in all its rounds but the last. `fit` therefore takes *few* cells: the second peer of a cell costs a little
bandwidth and makes up for absence, for a stale count of peers and for badly chosen first cells.

Where members go is balance. Number the peers of a round line after line, with the axis averaged next as the fastest
digit, and let a peer's new coordinate be its number modulo M. Then the peers of any block of later lines carry a run of
consecutive numbers, each coordinate gets the floor or the ceiling of run / M of them, and since floors and ceilings
nest, every later line has the floor or the ceiling of N * M / cells members: no rule can have a smaller largest group.
`table` holds the number at which each line starts; it depends on N and the shape only, so peers agree on it without a
message.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Shape = tuple[int, ...]
"""Cells per axis; its length is d, the number of rounds in a cycle."""
Cell = tuple[int, ...]
"""A coordinate for each axis."""
Line = tuple[int, ...]
"""The coordinates that the members of a line share, in ascending order of their axes: a cell without one axis."""

MAX_PEERS = 2**20  # a table for that many takes a second, so that no record can stall whoever reads it
MAX_AXES = 20  # an axis shorter than 2 separates nobody, so more axes than this need more cells than peers
MAX_ROSTER = 150  # beyond it a roster no longer fits into one DHT record
PREFIX_BYTES = 4
KEY_BYTES = 20
DIGEST_BYTES = 32


@lru_cache(maxsize=1024)
def fit(n_peers: int, group_size: int, slack: int = 2, headroom: float = 1.1) -> Shape:
    """Return the grid for `n_peers`: the fewest axes, then the smallest largest line, then the fewest cells.

    Lines have at most `group_size + slack` members and there are at least `headroom` peers per cell. Where no integers
    satisfy both (17 peers in groups of 2), the lines are what gives way, by as little as possible.
    """
    if n_peers < 1 or group_size < 2:
        raise ValueError(f"no grid for {n_peers} peers in groups of {group_size}: at least 1 and 2 expected")
    if n_peers <= group_size + slack:
        return (1,)
    max_cells = int(n_peers / headroom)
    for largest in itertools.count(group_size + slack):
        for n_axes in range(2, max_cells.bit_length()):
            for cap in range(group_size, largest + 1):
                shape = _fewest_cells(n_axes, math.ceil(n_peers / cap), max_cells, shortest=2)
                if shape is not None:
                    return shape
    raise AssertionError("unreachable: lines of half the peers always fit")


def _fewest_cells(n_axes: int, n_lines: int, max_cells: int, shortest: int) -> Shape | None:
    """Return the non-decreasing shape with the fewest cells that has `n_lines` lines on every axis, or None.

    The last axis, the longest, has the fewest lines, and its own length adds none to them: so it is as short as the
    order allows, equal to the one before.
    """
    if n_axes == 2:
        side = max(shortest, n_lines)
        return (side, side) if side * side <= max_cells else None
    best: Shape | None = None
    longest = max_cells // n_lines  # a longer first axis forces a longer last one, and so too many cells
    for side in range(shortest, longest + 1):
        rest = _fewest_cells(n_axes - 1, math.ceil(n_lines / side), max_cells // side, side)
        if rest is not None and (best is None or side * math.prod(rest) < math.prod(best)):
            best = (side, *rest)
    return best


def axis_of(number: int, shape: Shape) -> int:
    """Return the axis that round `number` averages; it is also the phase of the cycle."""
    return number % len(shape)


def line_of(cell: Cell, axis: int) -> Line:
    """Return the line along `axis` that `cell` lies on."""
    return cell[:axis] + cell[axis + 1 :]


def on_grid(cell: Cell, shape: Shape) -> bool:
    """Return True if `cell` is one of the cells of `shape`."""
    return len(cell) == len(shape) and all(0 <= c < m for c, m in zip(cell, shape, strict=True))


class Table:
    """How many members each line of a grid is expected to have, and the number at which it starts; per phase.

    Computed once by following N peers for two cycles: from the second one on the counts repeat, so that the phase alone
    selects them. Costs O(d * cells) time and keeps 16 * d * cells / M bytes.
    """

    def __init__(self, n_peers: int, shape: Shape) -> None:
        self._counts: dict[int, npt.NDArray[Any]] = {}
        self._firsts: dict[int, npt.NDArray[Any]] = {}
        # The lines along axis a are an array over the other axes in the order a - 1, a - 2, .., a + 1 (modulo d), so
        # that its memory order is the order of the numbers: the axis averaged next is the fastest.
        n_lines = math.prod(shape[:-1])
        starts = np.arange(n_lines + 1, dtype=np.int64) * n_peers // n_lines
        counts = np.diff(starts).reshape(shape[:-1][::-1])
        for number in range(-1, 2 * len(shape) - 1):
            axis = axis_of(number, shape)
            firsts = (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)
            self._counts[axis], self._firsts[axis] = counts, firsts
            if len(shape) > 1:
                counts = _moved(counts, firsts, shape[axis])

    def expected(self, phase: int, line: Line) -> int:
        """Return how many members `line` has in rounds of this phase if all N peers are there."""
        return int(self._counts[phase][_index(phase, line)])

    def offset(self, phase: int, line: Line) -> int:
        """Return the number of the first member of `line`: what to add to a place to get a coordinate (modulo M)."""
        return int(self._firsts[phase][_index(phase, line)])

    def firsts(self, phase: int) -> npt.NDArray[Any]:
        """Return the offsets of all lines, int64, in the order of their numbers: for who moves many peers at once.

        The coordinates of a line count in the order of the axes phase - 1, .., 0, d - 1, .., phase + 1, the last one
        fastest. Not to be written to.
        """
        return self._firsts[phase].ravel()

    def line_at(self, phase: int, number: int) -> Line:
        """Return the line that holds the peer of this number, 0 <= `number` < N."""
        firsts = self._firsts[phase]
        flat = int(np.searchsorted(firsts.ravel(), number, side="right")) - 1
        return _index(phase, tuple(int(i) for i in np.unravel_index(flat, firsts.shape)))


def _moved(counts: npt.NDArray[Any], firsts: npt.NDArray[Any], m: int) -> npt.NDArray[Any]:
    """Return the counts of the lines along the next axis, after all members moved along this one of `m` cells."""
    below = np.stack([firsts, firsts + counts])[..., np.newaxis] - 1 - np.arange(m)
    cells = np.diff(below // m, axis=0)[0]  # how many numbers in first..first + count - 1 are c modulo m
    return np.moveaxis(cells.sum(axis=-2), -1, 0)


def _index(phase: int, line: Line) -> tuple[int, ...]:
    """Return where `line` (axes 0, 1, ..) stands in an array over the axes phase - 1, .., 0, d - 1, .., phase + 1.

    Called again on its result it gives the line back.
    """
    return line[:phase][::-1] + line[phase:][::-1]


@lru_cache(maxsize=8)
def table(n_peers: int, shape: Shape) -> Table:
    """Return the `Table` of a grid. Cached, since every round of a run asks for the same one."""
    return Table(n_peers, shape)


def next_cell(cell: Cell, number: int, place: int, record_n: int, shape: Shape) -> Cell:
    """Return the cell of the member that sat at `place` (0-based, see `seating`) in the group of round `number`.

    `record_n` is the N of the shape record, not the number of peers that happen to be alive: all must use the same one.
    """
    axis = axis_of(number, shape)
    coordinate = (place + table(record_n, shape).offset(axis, line_of(cell, axis))) % shape[axis]
    return (*cell[:axis], coordinate, *cell[axis + 1 :])


def seating(
    cells: Mapping[bytes, Cell], number: int, record_n: int, shape: Shape, round_id: bytes
) -> tuple[bytes, ...]:
    """Return the members of a group of round `number` by place: who can stay in its cell stays.

    `cells` are those of the members, on one line; which place leads where is `next_cell`'s business. Of the peers of
    one cell the smallest ids stay, so that those who have to move are always the same few. So most lines meet again as
    they were, with their links and without a lookup, and a swarm mixes as fast as if its members were shuffled (ADR
    21). Which of the places that lead to one cell a member has is drawn by the round id: on a single line, all of them.
    """
    axis = axis_of(number, shape)
    line = min(cells.values())
    free: dict[int, list[int]] = {coordinate: [] for coordinate in range(shape[axis])}
    for place in range(len(cells)):
        free[next_cell(line, number, place, record_n, shape)[axis]].append(place)
    seats: dict[int, list[bytes]] = {coordinate: [] for coordinate in free}
    movers = []
    for peer in sorted(cells):
        there = cells[peer][axis]
        if len(seats[there]) < len(free[there]):
            seats[there].append(peer)
        else:
            movers.append(peer)
    for coordinate, peers in seats.items():
        n_free = len(free[coordinate]) - len(peers)
        peers += movers[:n_free]
        del movers[:n_free]
        peers.sort(key=lambda peer: hashlib.sha256(round_id + peer).digest())
    by_place = {place: peer for c in free for place, peer in zip(free[c], seats[c], strict=True)}
    return tuple(by_place[place] for place in range(len(cells)))


def rank_cell(rank: int, shape: Shape, n_peers: int) -> Cell:
    """Return the first cell of the peer that is `rank`-th (from 0) in a roster of `n_peers` that all have read.

    It is where a round along the last axis would have sent it, so the very first cycle is balanced, hence exact.
    """
    if not 0 <= rank < n_peers:
        raise ValueError(f"rank {rank} in a roster of {n_peers} peers: 0 to {n_peers - 1} expected")
    last = len(shape) - 1
    return (*table(n_peers, shape).line_at(last, rank), rank % shape[last])


def sample_cells(rng: random.Random, shape: Shape, k: int = 4) -> list[Cell]:
    """Return `k` different cells drawn at random, or all of them if there are fewer: where a newcomer looks.

    More than 4 would not help: newcomers that cannot see each other yet would herd to the same empty place.
    """
    n_cells = math.prod(shape)
    return [_cell_at(index, shape) for index in rng.sample(range(n_cells), min(k, n_cells))]


def _cell_at(index: int, shape: Shape) -> Cell:
    cell: list[int] = []
    for m in shape:
        index, coordinate = divmod(index, m)
        cell.append(coordinate)
    return tuple(cell)


def emptiest(counts: Mapping[Line, int], candidates: Sequence[Cell], axis: int, rng: random.Random) -> Cell:
    """Return the candidate whose line along `axis` has the fewest peers, ties at random.

    `axis` is that of the newcomer's first round, and a line that `counts` does not name is empty. Lines are counted,
    not cells, since a cycle is exact if its shortest line is long enough: at 16 peers a group this makes nearly every
    first cycle exact, counting cells only six in seven.
    """
    sizes = [counts.get(line_of(cell, axis), 0) for cell in candidates]
    return rng.choice([cell for cell, size in zip(candidates, sizes, strict=True) if size == min(sizes)])


def roster_key(run: str) -> bytes:
    """Return the 20-byte DHT key where the peers of a run announce themselves until it has a shape."""
    return _hash(b"mpd roster 1", run.encode())[:KEY_BYTES]


def shape_key(run: str, digest: bytes) -> bytes:
    """Return the 20-byte DHT key of the shape record of a run with these terms (`digest`)."""
    return _hash(b"mpd shape 1", run.encode(), digest)[:KEY_BYTES]


def _hash(*fields: bytes) -> bytes:
    """SHA-256 over length-prefixed fields, so that no two lists of fields read the same."""
    return hashlib.sha256(b"".join(_number(len(field)) + field for field in fields)).digest()


def _number(value: int) -> bytes:
    return value.to_bytes(8, "big")


@dataclass(frozen=True, slots=True)
class ShapeRecord:
    """What all peers of a run must agree on: the grid, and how many peers it was fitted to.

    `epoch` counts the records of a run from 1, and `digest` is that of the run's terms. `roster` is a hint where to
    begin: the first 4 bytes of the ids, in ascending order, of the peers that its writer saw (or nothing, see
    `roster_of`); it is no part of what must be agreed on. Raises ValueError on fields that make no sense.
    """

    epoch: int
    n_peers: int
    shape: Shape
    digest: bytes
    roster: bytes = b""

    def __post_init__(self) -> None:
        if not 1 <= self.epoch < 2**63:
            raise ValueError(f"epoch {self.epoch}: a number from 1 expected")
        if not 1 <= self.n_peers <= MAX_PEERS:
            raise ValueError(f"a grid for {self.n_peers} peers: 1 to {MAX_PEERS} expected")
        if not 1 <= len(self.shape) <= MAX_AXES or min(self.shape) < 1:
            raise ValueError(f"shape {self.shape}: 1 to {MAX_AXES} axes of at least one cell expected")
        if math.prod(self.shape) > self.n_peers:
            raise ValueError(f"shape {self.shape} has more cells than the {self.n_peers} peers can fill")
        if len(self.digest) != DIGEST_BYTES:
            raise ValueError(f"a digest of {len(self.digest)} bytes: {DIGEST_BYTES} expected")
        if len(self.roster) % PREFIX_BYTES:
            raise ValueError(f"a roster of {len(self.roster)} bytes: {PREFIX_BYTES} for each peer expected")
        if len(self.roster) > PREFIX_BYTES * MAX_ROSTER:
            raise ValueError(f"a roster of {len(self.roster) // PREFIX_BYTES} peers: at most {MAX_ROSTER} expected")
        if self._prefixes() != sorted(self._prefixes()):
            raise ValueError("the roster is not in ascending order")

    def rank_of(self, peer_id: bytes) -> int | None:
        """Return the place of `peer_id` in the roster; None if it is not there or shares its prefix with another."""
        prefixes = self._prefixes()
        prefix = peer_id[:PREFIX_BYTES]
        return prefixes.index(prefix) if prefixes.count(prefix) == 1 else None

    def first_cell(self, peer_id: bytes) -> Cell | None:
        """Return where `peer_id` begins by its rank in the roster; None if that is not known."""
        rank = self.rank_of(peer_id)
        return rank_cell(rank, self.shape, len(self._prefixes())) if rank is not None else None

    def is_same_grid(self, other: "ShapeRecord") -> bool:
        """Return True if whoever goes by `other` meets whoever goes by this one."""
        return (self.epoch, self.n_peers, self.shape) == (other.epoch, other.n_peers, other.shape)

    def content_digest(self) -> bytes:
        """Return 32 bytes that two records have in common only if they are equal."""
        sides = b"".join(_number(m) for m in self.shape)
        return _hash(b"mpd shape record 1", _number(self.epoch), _number(self.n_peers), sides, self.digest, self.roster)

    def _prefixes(self) -> list[bytes]:
        return [self.roster[i : i + PREFIX_BYTES] for i in range(0, len(self.roster), PREFIX_BYTES)]


def slot(run: str, record: ShapeRecord, phase: int, line: Line) -> bytes:
    """Return the 20-byte DHT key where the members of `line` find each other in rounds of this phase.

    Peers that go by different grids never meet in one: each would expect the others to move elsewhere. On a grid of a
    single line nobody moves, so there it does not matter for how many peers it was made.
    """
    grid = (record.n_peers, *record.shape) if len(record.shape) > 1 else ()
    numbers = [b"".join(map(_number, each)) for each in ((record.epoch, phase), line, grid)]
    return _hash(b"mpd slot 2", run.encode(), record.digest, *numbers)[:KEY_BYTES]


def roster_of(peers: Iterable[bytes]) -> bytes:
    """Return the roster of a shape record for these peer ids: empty where they are too many for one record."""
    prefixes = sorted(peer[:PREFIX_BYTES] for peer in peers)
    return b"".join(prefixes) if len(prefixes) <= MAX_ROSTER else b""


def newer(a: ShapeRecord, b: ShapeRecord) -> bool:
    """Return True if `a` replaces `b`: a larger epoch; or more peers; or, to have an order at all, by content.

    Two records of one epoch come from writers that could not see each other, and the fewer peers have to move the
    better.
    """
    return (a.epoch, a.n_peers, a.content_digest()) > (b.epoch, b.n_peers, b.content_digest())
