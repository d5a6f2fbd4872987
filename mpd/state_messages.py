"""What two peers say to each other about states: who holds which, what it consists of, and which chunk comes next.

A joiner asks, is offered, and from then on names the state by its manifest; chunks travel as records of the data
connection. Sizes are nobody's word: they follow from the terms of the run, whose digest both sides compare first.
"""

from dataclasses import dataclass, field

from mpd.ids import ROUND_ID_BYTES
from mpd.manifest import HASH_BYTES, HASHES_PER_PAGE, MANIFEST_BYTES, MAX_METADATA_BYTES, MAX_NUMBER

MAX_WANTED = 16  # chunks that a joiner may have asked one peer for and not got yet
_MAX_CHUNK = 1 << 20  # of the largest layout there is


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _require_manifest(manifest: bytes) -> None:
    _require(len(manifest) == MANIFEST_BYTES, "a manifest is named by 32 bytes")


@dataclass(frozen=True, slots=True)
class StateAsk:
    """Which state of `run` do you hold? With `round_id`, rather the one of that round, which others have offered."""

    run: str
    digest: bytes
    round_id: bytes = b""

    def __post_init__(self) -> None:
        _require(len(self.digest) == 32, "a digest has 32 bytes")
        _require(len(self.round_id) in (0, ROUND_ID_BYTES), "a round id has 16 bytes")


@dataclass(frozen=True, slots=True)
class StateOffer:
    """I hold this state of `run` and shall for a while. `number` counts the rounds behind it."""

    run: str
    manifest: bytes
    round_id: bytes
    number: int
    metadata: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        _require_manifest(self.manifest)
        _require(len(self.round_id) == ROUND_ID_BYTES, "a round id has 16 bytes")
        _require(0 <= self.number <= MAX_NUMBER, "a number is not negative")
        _require(len(self.metadata) <= MAX_METADATA_BYTES, f"metadata has at most {MAX_METADATA_BYTES} bytes")


@dataclass(frozen=True, slots=True)
class NoState:
    """I have no state of `run` to offer, and why. `soon`: a round is under way, I answer again when it has ended."""

    run: str
    reason: str
    soon: bool = False


@dataclass(frozen=True, slots=True)
class StateList:
    """Send me the hashes of this state, from chunk `first` on."""

    manifest: bytes
    first: int

    def __post_init__(self) -> None:
        _require_manifest(self.manifest)
        _require(0 <= self.first < _MAX_CHUNK, "there is no such chunk")


@dataclass(frozen=True, slots=True)
class StateHashes:
    """Answer to `StateList`: the hashes of up to 8192 chunks, 32 bytes each, from chunk `first` on."""

    manifest: bytes
    first: int
    hashes: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _require_manifest(self.manifest)
        _require(0 <= self.first < _MAX_CHUNK, "there is no such chunk")
        _require(0 < len(self.hashes) <= HASH_BYTES * HASHES_PER_PAGE, "a page has 1 to 8192 hashes")


@dataclass(frozen=True, slots=True)
class StateWant:
    """Send me these chunks of this state, in this order."""

    manifest: bytes
    chunks: tuple[int, ...]

    def __post_init__(self) -> None:
        _require_manifest(self.manifest)
        _require(1 <= len(self.chunks) <= MAX_WANTED, f"1 to {MAX_WANTED} chunks are wanted at once")
        _require(all(0 <= chunk < _MAX_CHUNK for chunk in self.chunks), "there is no such chunk")


@dataclass(frozen=True, slots=True)
class StateGone:
    """I do not serve this state, or not any more, and why."""

    manifest: bytes
    reason: str

    def __post_init__(self) -> None:
        _require_manifest(self.manifest)
