"""What a trainer and its daemon say to each other over the local socket.

One connection is one attachment: whoever closes it has detached, so nothing needs a session id and nothing can leak.
Tensors never travel here; they lie in shared memory whose descriptors ride beside `Attached`, `SnapshotOpened` and
`Stepped`. Frames are a 32-bit little-endian length and a body of the `LOCAL` vocabulary.
"""

import struct
from dataclasses import dataclass, field

from mpd.errors import LocalError
from mpd.layout import MAX_WEIGHT, TensorSpec
from mpd.manifest import MAX_METADATA_BYTES
from mpd.vocabulary import Vocabulary

CONTROL_VERSION = 1
MAX_FRAME_BYTES = 64 << 20  # an Attach of a million tensors fits; anything longer is a mistake
OUT_HEADER_BYTES = 4096  # the first page of the out region: see `Attached`

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Hello:
    """Trainer, first. `label` is for people, for example `python train.py (pid 4242)`."""

    version: int
    label: str = ""


@dataclass(frozen=True, slots=True)
class Welcome:
    """Daemon's answer to `Hello`."""

    version: int
    peer: str
    daemon_version: str


@dataclass(frozen=True, slots=True)
class Attach:
    """Trainer: take part in `run` with these terms. `rounds` is 1 or "exact"."""

    run: str
    tensors: tuple[TensorSpec, ...]
    group_size: int
    rounds: int | str
    codec: str
    aggregate: str


@dataclass(frozen=True, slots=True)
class Attached:
    """Daemon's answer to `Attach`; carries two descriptors: the in region and the out region.

    The in region is `in_bytes` long and writable: tensors lie at the layout's offsets. The out region is read-only and
    starts with a page of which the first 8 bytes are the generation (unsigned, little endian): it is the number in
    `Stepped` once that result is complete. Tensors lie at the layout's offsets behind that page.
    """

    in_bytes: int
    out_bytes: int


@dataclass(frozen=True, slots=True)
class OpenSnapshot:
    """Trainer: I keep my parameters in the in region (`adopt`) and want a second region to snapshot them into."""


@dataclass(frozen=True, slots=True)
class SnapshotOpened:
    """Daemon's answer to `OpenSnapshot`; carries one descriptor, laid out like the in region."""

    n_bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """Trainer: average what lies in `source`, "in" or "snapshot". That region is the daemon's until `Stepped`.

    `metadata` (at most 64 KiB) are kept with the result, for those who load it.
    """

    seq: int
    weight: float
    timeout_s: float
    source: str = "in"
    metadata: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.weight <= MAX_WEIGHT:
            raise ValueError(f"weight is {self.weight}: a positive number up to {MAX_WEIGHT:g} expected")
        _ensure_seconds(self.timeout_s)
        if len(self.metadata) > MAX_METADATA_BYTES:
            raise ValueError(f"metadata have {len(self.metadata)} bytes: at most {MAX_METADATA_BYTES} expected")
        if self.source not in ("in", "snapshot"):
            raise ValueError(f"source is {self.source!r}: 'in' or 'snapshot' expected")


@dataclass(frozen=True, slots=True)
class Stepped:
    """Daemon: the outcome of `Step` number `seq`. If `averaged`, the out region holds the mean as `generation`.

    With `new_out`, one descriptor rides along: a fresh out region that replaces the one known so far. `peers`,
    `contributors`, `confirmed` and the keys of `missing` are peer ids in their printed form.
    """

    seq: int
    averaged: bool
    reason: str
    exact: bool = False
    heads: int = 0
    peers: tuple[str, ...] = ()
    contributors: tuple[str, ...] = ()
    confirmed: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    seconds: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    generation: int = 0
    new_out: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """Trainer: I have copied the result of step `seq`; the out region may be written again."""

    seq: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Trainer: I no longer want step `seq`. It is still answered by one `Stepped`."""

    seq: int


@dataclass(frozen=True, slots=True)
class LoadState:
    """Trainer: get me the run's current vector from its peers. Counts as step `seq` for `Cancel` and `Release`."""

    seq: int
    timeout_s: float

    def __post_init__(self) -> None:
        _ensure_seconds(self.timeout_s)


@dataclass(frozen=True, slots=True)
class StateLoaded:
    """Daemon's answer to `LoadState` number `seq`.

    If `loaded`, one descriptor rides along: a fresh out region that holds the vector as `generation` and replaces the
    one known so far. `number` counts the rounds behind it, `sources` are the peers that delivered parts of it, and
    `dropped` says who was given up and why; peers are named in their printed form.
    """

    seq: int
    loaded: bool
    reason: str
    number: int = 0
    metadata: bytes = field(default=b"", repr=False)
    sources: tuple[str, ...] = ()
    dropped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    bytes_received: int = 0
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Query:
    """Anyone: tell me about "status", "rounds" (of `run`, or of all; the `last` ones) or "peers"."""

    what: str
    run: str = ""
    last: int = 20


@dataclass(frozen=True, slots=True)
class Examine:
    """Anyone: look what is wrong, for `mpd doctor`; look at the addresses in `bootstrap` (HOST:PORT) too.

    The answer is a list of findings and takes up to 10 s.
    """

    bootstrap: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """Daemon's answer to `Query` and `Examine`: a JSON text."""

    json: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Anyone: finish the current round, say goodbye to the peers, and exit."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """Daemon's answer to `Leave`; the connection closes when the daemon has gone."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Daemon: what you asked cannot be done, and why. The connection stays open."""

    message: str


LOCAL = Vocabulary(
    LocalError,
    Hello,
    Welcome,
    Attach,
    Attached,
    OpenSnapshot,
    SnapshotOpened,
    Step,
    Stepped,
    LoadState,
    StateLoaded,
    Release,
    Cancel,
    Query,
    Examine,
    Answer,
    Leave,
    Leaving,
    Refused,
)


def _ensure_seconds(value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"timeout is {value}: a positive number of seconds expected")


def pack(message: object) -> bytes:
    """Return `message` as one frame."""
    body = LOCAL.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise LocalError(f"a message of {len(body)} bytes is too long: at most {MAX_FRAME_BYTES} fit")
    return _LENGTH.pack(len(body)) + body


def body_length(prefix: bytes) -> int:
    """Return the body length that the 4-byte `prefix` announces. Raises LocalError if it cannot be right."""
    (length,) = _LENGTH.unpack(prefix)
    if not 0 < length <= MAX_FRAME_BYTES:
        raise LocalError(f"a frame of {length} bytes was announced: 1 to {MAX_FRAME_BYTES} expected")
    return int(length)


PREFIX_BYTES = _LENGTH.size
