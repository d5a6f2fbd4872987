"""How a state lies in a file: a header that proves itself, the hashes of all chunks, and the vector.

    magic         8 bytes, `mpdstat1`
    lengths       of what follows, u32 and u64: the header, the hashes
    header        msgpack
    hashes        32 bytes for each chunk
    checksum      SHA-256 of everything above
    vector        as it lies in memory

A file is its run's if name and terms say so, whole if it is as long as the header says, and each chunk is what it was
if its hash is right. Anything else is refused in one sentence, and never read any further.
"""

import hashlib
import struct
from dataclasses import dataclass, field

from mpd.errors import LocalError
from mpd.ids import ROUND_ID_BYTES
from mpd.manifest import HASH_BYTES, MAX_METADATA_BYTES, MAX_NUMBER, Manifest, n_chunks
from mpd.vocabulary import Vocabulary

MAGIC = b"mpdstat1"
_LENGTHS = struct.Struct("<IQ")
PREFIX_BYTES = len(MAGIC) + _LENGTHS.size
_MAX_HEADER_BYTES = MAX_METADATA_BYTES + 8192
_CHECKSUM_BYTES = 32


@dataclass(frozen=True, slots=True)
class Kept:
    """What a state file says of itself. `saved_at_s` is for people: seconds since 1970."""

    run: str
    terms: bytes
    round_id: bytes
    number: int
    n_bytes: int
    saved_at_s: float
    metadata: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        if len(self.terms) != 32 or len(self.round_id) != ROUND_ID_BYTES or not 0 <= self.number <= MAX_NUMBER:
            raise ValueError("terms have a digest of 32 bytes, a round has an id of 16 and a number")
        if self.n_bytes <= 0 or len(self.metadata) > MAX_METADATA_BYTES or not 0 <= self.saved_at_s < 1e12:
            raise ValueError("a state has a size and a date, and little metadata")


_FILE = Vocabulary(LocalError, Kept)


@dataclass(frozen=True, slots=True)
class StateHead:
    """Everything in front of the vector, which begins at `vector_at`."""

    kept: Kept
    manifest: Manifest
    vector_at: int


def pack_head(kept: Kept, manifest: Manifest) -> bytes:
    """Return everything in front of the vector."""
    header = _FILE.encode(kept)
    head = MAGIC + _LENGTHS.pack(len(header), len(manifest.hashes)) + header + manifest.hashes
    return head + hashlib.sha256(head).digest()


def head_bytes(prefix: bytes) -> int:
    """Return how long everything in front of the vector is. Raises LocalError if this is no state file."""
    if len(prefix) < PREFIX_BYTES or not prefix.startswith(MAGIC):
        raise LocalError("it does not begin like a state file")
    header, hashes = _LENGTHS.unpack_from(prefix, len(MAGIC))
    if not 0 < header <= _MAX_HEADER_BYTES or not 0 < hashes <= HASH_BYTES << 20 or hashes % HASH_BYTES:
        raise LocalError("its header announces lengths that cannot be")
    return PREFIX_BYTES + int(header) + int(hashes) + _CHECKSUM_BYTES


def parse_head(head: bytes, file_bytes: int) -> StateHead:
    """Return what `head`, all in front of the vector in a file of `file_bytes`, says. Raises LocalError."""
    expected = head_bytes(head)
    if len(head) != expected:
        raise LocalError("it is cut off in its header")
    if hashlib.sha256(head[:-_CHECKSUM_BYTES]).digest() != head[-_CHECKSUM_BYTES:]:
        raise LocalError("its header is damaged")
    (header, _) = _LENGTHS.unpack_from(head, len(MAGIC))
    kept = _FILE.decode(head[PREFIX_BYTES : PREFIX_BYTES + header])
    hashes = head[PREFIX_BYTES + header : -_CHECKSUM_BYTES]
    if len(hashes) != HASH_BYTES * n_chunks(kept.n_bytes):
        raise LocalError("its hashes are not those of a vector of its size")
    if file_bytes != expected + kept.n_bytes:
        raise LocalError(f"it has {file_bytes} bytes, its header speaks of {expected + kept.n_bytes}")
    return StateHead(kept, Manifest(kept.terms, kept.round_id, kept.number, kept.n_bytes, hashes), expected)
