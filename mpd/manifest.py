"""What a state is called: the vector of a run as a round left it, cut into chunks that are checked one by one.

Strategy: whoever holds the same bytes after the same round computes the same manifest, so peers that never spoke about
it can serve one joiner together, each chunk from another of them. Where chunks lie follows from the run's layout; a
joiner learns from others nothing but hashes, and these are bound to the name that it has chosen before.
"""

import hashlib
import struct
from dataclasses import dataclass, field
from functools import cached_property

from mpd.errors import PeerError
from mpd.ids import ROUND_ID_BYTES

STATE_CHUNK_BYTES = 1 << 20
HASH_BYTES = 32
MANIFEST_BYTES = 32
HASHES_PER_PAGE = 8192  # 256 KiB: one page is enough for 8 GiB
MAX_METADATA_BYTES = 64 * 1024
MAX_NUMBER = (1 << 62) - 1

_NUMBERS = struct.Struct("<QQQ")


def chunk_hash(payload: bytes | bytearray | memoryview) -> bytes:
    """Return the SHA-256 (32 bytes) of a chunk."""
    return hashlib.sha256(payload).digest()


def n_chunks(n_bytes: int) -> int:
    """Return how many chunks a vector of `n_bytes` has."""
    return -(-n_bytes // STATE_CHUNK_BYTES)


def chunk_span(chunk: int, n_bytes: int) -> tuple[int, int]:
    """Return where a chunk of a vector of `n_bytes` begins and ends."""
    begin = chunk * STATE_CHUNK_BYTES
    return begin, min(begin + STATE_CHUNK_BYTES, n_bytes)


def page_bytes(first: int, n_bytes: int) -> int:
    """Return how long the page of hashes is that begins with chunk `first`."""
    return HASH_BYTES * min(HASHES_PER_PAGE, n_chunks(n_bytes) - first)


@dataclass(frozen=True)
class Manifest:
    """The state of the run with these `terms` (their digest) after the round `round_id`; `n_bytes` is its size.

    `number` counts the rounds that lie behind it, `hashes` are those of its chunks, one behind the other. Raises
    PeerError if there are more or fewer of them than chunks.
    """

    terms: bytes
    round_id: bytes
    number: int
    n_bytes: int
    hashes: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.round_id) != ROUND_ID_BYTES or not 0 <= self.number <= MAX_NUMBER:
            raise PeerError("a state has the id of a round (16 bytes) and a number that is not negative")
        if len(self.hashes) != HASH_BYTES * self.n_chunks:
            raise PeerError(
                f"a state of {self.n_bytes} bytes has {self.n_chunks} chunks: {len(self.hashes)} bytes are not the "
                "hashes of so many"
            )

    @property
    def n_chunks(self) -> int:
        """Number of chunks."""
        return n_chunks(self.n_bytes)

    @cached_property
    def digest(self) -> bytes:
        """The name of this state: SHA-256 (32 bytes) over everything above."""
        sha = hashlib.sha256(b"mpd state 1" + self.terms + self.round_id)
        sha.update(_NUMBERS.pack(self.number, self.n_bytes, STATE_CHUNK_BYTES) + self.hashes)
        return sha.digest()

    def matches(self, chunk: int, payload: bytes | bytearray | memoryview) -> bool:
        """Return whether `payload` is this chunk, to the bit."""
        return chunk_hash(payload) == self.hashes[HASH_BYTES * chunk : HASH_BYTES * (chunk + 1)]

    def page(self, first: int) -> bytes:
        """Return the hashes of up to HASHES_PER_PAGE chunks from `first` on."""
        return self.hashes[HASH_BYTES * first : HASH_BYTES * (first + HASHES_PER_PAGE)]
