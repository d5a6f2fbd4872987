"""Who reduces what: fractions of the vector per member, the chunks that travel, and the order in which they are sent.

Strategy: the leader turns measured bandwidths into fractions once and sends those; everything else is computed alike by
every member from the same numbers, so no table of chunks ever travels. Borders lie on multiples of 64 bytes within a
segment, so that a chunk is always an aligned vector of a single dtype. Butterfly all-reduce with fractions by
bandwidth: Ryabinin et al., NeurIPS 2021, and hivemind, which solves the same linear programme numerically.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from mpd.errors import LocalError
from mpd.layout import ITEM_BYTES, Segment

MIN_CHUNK_BYTES = 64 * 1024
MAX_CHUNK_BYTES = 2 * 1024 * 1024  # a record costs as much Python whatever its length
FIRST_CHUNK_BYTES = 256 * 1024
CHUNK_S = 0.02
BORDER_BYTES = 64
ALIKE = 4.0  # bandwidths that differ by less from the median count as the median: measurements are no better
MAX_SHARE = 2.0  # times an equal share: nobody reduces more, however fast it is or says that it is
MAX_STACKED_VECTORS = 4  # what a reducer may have to keep for a robust rule, in vectors of the run


@dataclass(frozen=True, slots=True)
class Chunk:
    """The unit that travels: `n_elems` elements at byte `offset` of the region, reduced by member `owner`."""

    index: int
    owner: int
    dtype: str
    offset: int
    n_elems: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the elements."""
        return self.n_elems * ITEM_BYTES[self.dtype]

    @property
    def end(self) -> int:
        """Offset of the first byte after the chunk."""
        return self.offset + self.n_bytes


def fractions(bandwidths: Sequence[float]) -> tuple[float, ...]:
    """Return the fraction of the vector that each member should reduce, so that the slowest link is done soonest.

    Args:
        bandwidths: one per member, any common unit; 0 for a member that cannot reduce.

    A member moves (1 + (n - 2) * fraction) vectors each way. The optimum equalises the time of all members that are
    fast enough to reduce anything; whoever would be late even as a plain sender gets 0. Sums to 1. Raises LocalError if
    nobody can reduce or a bandwidth is negative or not finite.
    """
    if not all(math.isfinite(bandwidth) and bandwidth >= 0 for bandwidth in bandwidths):
        raise LocalError(f"bandwidths are {list(bandwidths)}: finite numbers from 0 on expected")
    fastest = max(bandwidths, default=0.0)
    if fastest == 0:
        raise LocalError("no member of the group can reduce: at least one must accept connections")
    speeds = [bandwidth / fastest for bandwidth in bandwidths]  # no sum of these overflows
    n = len(speeds)
    reducers = {member for member, speed in enumerate(speeds) if speed > 0}
    if n <= 2 or len(reducers) == 1:  # every split takes equally long
        total = sum(speeds)
        return tuple(speed / total for speed in speeds)
    while True:
        seconds = (len(reducers) + n - 2) / sum(speeds[member] for member in sorted(reducers))
        too_slow = {member for member in reducers if seconds * speeds[member] < 1}
        if not too_slow:
            break
        reducers -= too_slow
    return tuple((seconds * speeds[m] - 1) / (n - 2) if m in reducers else 0.0 for m in range(n))


def tempered_fractions(bandwidths: Sequence[float], inbound: Sequence[bool]) -> tuple[float, ...]:
    """Return the fraction of the vector that each member should reduce, from measurements that may be lies.

    Args:
        bandwidths: one per member, in bytes per second; 0 for a member of which nothing is known.
        inbound: whether a member accepts connections; the others reduce nothing.

    Who is about as fast as the median of those that can reduce, or unknown, counts like it; so shards differ only
    where bandwidths certainly do. A member that is much slower reduces nothing, which is the optimum (it would come
    last even so), and stays in the group. One that is much faster gets at most `MAX_SHARE` times an equal share, and
    nobody more than a robust rule may have to stack. Sums to 1. Raises LocalError if nobody can reduce.
    """
    n, n_reducers = len(inbound), sum(inbound)
    known = sorted(b for b, can in zip(bandwidths, inbound, strict=True) if can and 0 < b < math.inf)
    if not known or n <= 2:
        return fractions([float(can) for can in inbound])
    median = known[(len(known) - 1) // 2]

    def tempered(bandwidth: float) -> float:
        if not 0 < bandwidth < math.inf or median / ALIKE <= bandwidth <= median * ALIKE:
            return 1.0
        return min(bandwidth / median, MAX_SHARE)

    shares = fractions([tempered(b) if can else 0.0 for b, can in zip(bandwidths, inbound, strict=True)])
    most = min(MAX_SHARE / n_reducers, MAX_STACKED_VECTORS / (n - 1))
    for able in ([share > 0 for share in shares], inbound):
        rooms = [max(0.0, most - share) if can else 0.0 for share, can in zip(shares, able, strict=True)]
        excess = sum(max(0.0, share - most) for share in shares)
        if sum(rooms) > 0 and excess <= sum(rooms):
            return tuple(
                min(share, most) + excess * room / sum(rooms) for share, room in zip(shares, rooms, strict=True)
            )
    return fractions([float(can) for can in inbound])


def chunk_bytes_for(vector_bytes: int, n_members: int, bandwidth: float) -> int:
    """Return the chunk size for a vector: about four chunks per mean shard, in steps of 64 KiB, 64 KiB to 2 MiB.

    A receiver can tell progress from silence only once a whole record has arrived and been opened, so a chunk takes no
    more than about 20 ms of `bandwidth`, that of the slowest member in bytes per second. 0 means that nobody has
    measured anything yet: then 256 KiB are the most.
    """
    wanted = round(vector_bytes / n_members / 4 / MIN_CHUNK_BYTES) * MIN_CHUNK_BYTES
    limit = min(bandwidth * CHUNK_S, MAX_CHUNK_BYTES) if bandwidth > 0 else FIRST_CHUNK_BYTES
    return max(min(wanted, int(limit) // MIN_CHUNK_BYTES * MIN_CHUNK_BYTES), MIN_CHUNK_BYTES)


def chunks(segments: Sequence[Segment], shares: Sequence[float], chunk_bytes: int) -> tuple[Chunk, ...]:
    """Cut the vector into one contiguous shard per member and each shard into chunks; every element is covered once.

    Args:
        segments: the vector, in the order of its offsets.
        shares: relative shard sizes by member, in any unit; 0 owns nothing.
        chunk_bytes: largest chunk, a multiple of 64.

    Chunks of a shard differ by at most 128 bytes within a segment. Raises LocalError on other arguments.
    """
    if chunk_bytes < BORDER_BYTES or chunk_bytes % BORDER_BYTES:
        raise LocalError(f"chunk_bytes is {chunk_bytes}: a multiple of {BORDER_BYTES} expected")
    cut: list[Chunk] = []
    for owner, segment, start, stop in _shards(segments, shares):
        item_bytes = ITEM_BYTES[segment.dtype]
        for first, last in _even_cuts(start, stop, chunk_bytes):
            n_elems = (last - first) // item_bytes
            cut.append(Chunk(len(cut), owner, segment.dtype, segment.offset + first, n_elems))
    return tuple(cut)


def sending_order(chunks: Sequence[Chunk], me: int, n_members: int) -> tuple[int, ...]:
    """Return the indices of the chunks that member `me` sends to their owners, its right neighbour's shard first.

    Everyone starts at another owner, so nobody is flooded.
    """
    by_owner: list[list[int]] = [[] for _ in range(n_members)]
    for chunk in chunks:
        by_owner[chunk.owner].append(chunk.index)
    return tuple(index for step in range(1, n_members) for index in by_owner[(me + step) % n_members])


def _shards(segments: Sequence[Segment], shares: Sequence[float]) -> Iterator[tuple[int, Segment, int, int]]:
    """Yield (owner, segment, start, stop) for each part of a shard; start and stop are bytes within the segment."""
    if not all(math.isfinite(share) and share >= 0 for share in shares) or not any(shares):
        raise LocalError(f"shares are {list(shares)}: finite numbers from 0 on, not all 0, expected")
    share_ends = list(accumulate(shares))
    n_bytes = sum(segment.n_bytes for segment in segments)
    # In bytes of payload, gaps between segments left out. The last share that is not 0 ends at exactly n_bytes.
    ideal_ends = [round(n_bytes * (end / share_ends[-1])) for end in share_ends]
    before = 0
    for segment in segments:
        start = 0
        for owner, ideal_end in enumerate(ideal_ends):
            stop = _border(ideal_end - before, segment.n_bytes)
            if stop > start:
                yield owner, segment, start, stop
                start = stop
        before += segment.n_bytes


def _border(ideal: int, n_bytes: int) -> int:
    """Return the border nearest to `ideal` in a segment of `n_bytes`: a multiple of 64 bytes, or the end."""
    if ideal >= n_bytes:
        return n_bytes
    return min(max((ideal + BORDER_BYTES // 2) // BORDER_BYTES * BORDER_BYTES, 0), n_bytes)


def _even_cuts(start: int, stop: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of pieces of at most `chunk_bytes` that differ by one border step, the odd end apart."""
    n_blocks = -(-(stop - start) // BORDER_BYTES)
    n_pieces = -(-(stop - start) // chunk_bytes)
    smaller, n_larger = divmod(n_blocks, n_pieces)
    for piece in range(n_pieces):
        end = min(start + (smaller + (piece < n_larger)) * BORDER_BYTES, stop)
        yield start, end
        start = end
