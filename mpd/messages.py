"""What two peers say to each other on their control connection.

Four conversations share it: the link itself (hello, data connection, keep-alive), matchmaking inside one slot, the
exchange of one round, whose messages travel inside `Scoped` so that they need not repeat the round id, and states for
late joiners (mpd.state_messages). All is checked while it is decoded; what a message means is decided by the machines
that receive it.
"""

import math
from dataclasses import dataclass, field

from mpd.errors import PeerError
from mpd.grid import MAX_PEERS
from mpd.ids import PEER_ID_BYTES, ROUND_ID_BYTES, Endpoint
from mpd.layout import TensorSpec
from mpd.manifest import MAX_NUMBER
from mpd.mass import MAX_MASS, MAX_PARTS, Standing
from mpd.schedule import BORDER_BYTES
from mpd.state_messages import NoState, StateAsk, StateGone, StateHashes, StateList, StateOffer, StateWant
from mpd.vocabulary import Vocabulary

PEER_VERSION = 2
MAX_MEMBERS = 64
MAX_COLLECTED = 4 * MAX_MEMBERS  # members of a line that one leader takes in, to cut it into groups
MAX_ROUND_S = 3600.0
MAX_SUITES = 8
MAX_NEWS_BYTES = 512 * 1024

Entry = tuple[int, int, int]  # chunk, version, writer
ChunkVersion = tuple[int, int]


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _require_address(host: str, port: int, needed: bool = False) -> None:
    """An address to dial, or none at all: port 0, with whatever host. Raises ValueError."""
    if port or needed:
        _require(port > 0, "who accepts connections has a port")
        Endpoint(host, port)


def _is_mask(value: int) -> bool:
    return 0 <= value < 1 << MAX_MEMBERS


# ---------------------------------------------------------------------------------------------------------- the link


@dataclass(frozen=True, slots=True)
class Hello:
    """First on a control connection, both ways; the certificate has said who speaks. `instance` is new at every start.

    `host` and `port` are where the sender can be dialled (port 0: nowhere); `seen_host` is the address under which the
    sender sees the receiver; `news` is the number of the revocation list that the sender goes by (0: none), and
    `wall_ms` its clock, which is only ever used to tell people that one of two clocks is wrong.
    """

    version: int
    instance: bytes
    host: str
    port: int
    seen_host: str = ""
    news: int = 0
    wall_ms: int = 0

    def __post_init__(self) -> None:
        _require(len(self.instance) == 16, "an instance has 16 bytes")
        _require(0 <= self.news < 1 << 62 and 0 <= self.wall_ms < 1 << 62, "numbers and times are not negative")
        _require_address(self.host, self.port)
        if self.seen_host:
            Endpoint(self.seen_host, 0)


@dataclass(frozen=True, slots=True)
class DataOffer:
    """The dialler of the control connection will open a data connection under this handle, sealed with fresh keys.

    `random` (32 bytes) is the sender's half of the secret, `suites` names what it can seal with, best first, and
    `received` counts the data records of this link that it has received completely.
    """

    conn_id: bytes
    random: bytes = field(repr=False)
    suites: tuple[str, ...]
    received: int = 0

    def __post_init__(self) -> None:
        _require(len(self.conn_id) == 16, "a connection id has 16 bytes")
        _require(len(self.random) == 32, "a half of a secret has 32 bytes")
        _require(1 <= len(self.suites) <= MAX_SUITES, f"1 to {MAX_SUITES} suites are offered")
        _require(0 <= self.received < 1 << 62, "a count is not negative")


@dataclass(frozen=True, slots=True)
class DataAccept:
    """Dial the data connection `conn_id`; `random` (32 bytes) is the other half of the secret, `suite` the choice."""

    conn_id: bytes
    random: bytes = field(repr=False)
    suite: str
    received: int = 0

    def __post_init__(self) -> None:
        _require(len(self.conn_id) == 16, "a connection id has 16 bytes")
        _require(len(self.random) == 32, "a half of a secret has 32 bytes")
        _require(0 <= self.received < 1 << 62, "a count is not negative")


@dataclass(frozen=True, slots=True)
class DataRefused:
    """No data connection `conn_id`, and why."""

    conn_id: bytes
    reason: str

    def __post_init__(self) -> None:
        _require(len(self.conn_id) == 16, "a connection id has 16 bytes")


@dataclass(frozen=True, slots=True)
class DataBad:
    """Record `seq` of the data connection `conn_id` did not open, so I have closed it: offer another one."""

    conn_id: bytes
    seq: int

    def __post_init__(self) -> None:
        _require(len(self.conn_id) == 16, "a connection id has 16 bytes")
        _require(0 <= self.seq < 1 << 62, "a count is not negative")


@dataclass(frozen=True, slots=True)
class News:
    """My revocation list, signed by the swarm's root, and the datagram key that goes with it: yours is older."""

    revocations: bytes
    datagram_key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _require(len(self.revocations) <= MAX_NEWS_BYTES, f"news has at most {MAX_NEWS_BYTES} bytes")
        _require(len(self.datagram_key) == 32, "a datagram key has 32 bytes")


@dataclass(frozen=True, slots=True)
class Ping:
    """I am alive; with `answer`, please say that you are too."""

    answer: bool = False


@dataclass(frozen=True, slots=True)
class Goodbye:
    """I am leaving on purpose; do not wait for me."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class DialBack:
    """Please dial me at this port of the address you see, and tell me whether it worked."""

    port: int

    def __post_init__(self) -> None:
        _require(0 < self.port <= 65535, "a port lies between 1 and 65535")


@dataclass(frozen=True, slots=True)
class DialledBack:
    """Answer to `DialBack`."""

    reached: bool
    host: str = ""

    def __post_init__(self) -> None:
        if self.host:
            Endpoint(self.host, 0)


@dataclass(frozen=True, slots=True)
class RunTerms:
    """My terms for `run`, because yours have another digest: both sides name the first difference."""

    run: str
    tensors: tuple[TensorSpec, ...]
    group_size: int
    rounds: int | str
    codec: str
    aggregate: str
    answer_me: bool


@dataclass(frozen=True, slots=True)
class UnknownRound:
    """You send me data of a round for which I have no `Begin`; if you have it, pass it on."""

    round_id: bytes

    def __post_init__(self) -> None:
        _require(len(self.round_id) == ROUND_ID_BYTES, "a round id has 16 bytes")


# ------------------------------------------------------------------------------------------------------- matchmaking


@dataclass(frozen=True, slots=True)
class Here:
    """I stand in this slot: expected (`ready` false) or ready with the stamp that I published.

    `epoch` is that of the shape record that I go by (0: not told). `answer` asks whoever stands there too to say so:
    I only know that it did the last time.
    """

    run: str
    slot: bytes
    number: int
    ready: bool
    stamp: int
    epoch: int = 0
    answer: bool = False

    def __post_init__(self) -> None:
        _require(self.epoch >= 0, "an epoch is not negative")
        _require(len(self.slot) == 20, "a slot has 20 bytes")
        _require(0 <= self.number < 1 << 62 and 0 <= self.stamp < 1 << 62, "numbers and stamps are not negative")


@dataclass(frozen=True, slots=True)
class Join:
    """Take me into the group that you lead in this slot.

    `standing` is what I bring (weight, mass, cell), `bandwidth` how fast I receive from a whole group, in bytes per
    second (0: nothing was measured; whether I can reduce is `inbound`), `time_left_s` how long my step may still take,
    `age` how many rounds lie behind the vector that I had last. `newest` is the epoch of a shape record that is to
    replace mine after this cycle (0: I know of none).
    """

    run: str
    slot: bytes
    digest: bytes
    epoch: int
    number: int
    stamp: int
    standing: Standing
    host: str
    port: int
    inbound: bool
    bandwidth: float
    time_left_s: float
    age: int = 0
    newest: int = 0

    def __post_init__(self) -> None:
        _require(self.epoch >= 0 and self.newest >= 0, "an epoch is not negative")
        _require(len(self.slot) == 20 and len(self.digest) == 32, "a slot has 20 bytes and a digest 32")
        _require(0 <= self.number < 1 << 62 and 0 <= self.stamp < 1 << 62, "numbers and stamps are not negative")
        _require(0 <= self.bandwidth < math.inf, "a bandwidth is finite and not negative")
        _require(0 < self.time_left_s <= MAX_ROUND_S, f"time left lies between 0 and {MAX_ROUND_S:g} s")
        _require(0 <= self.age <= MAX_NUMBER, "an age is not negative")
        _require_address(self.host, self.port, needed=self.inbound)


@dataclass(frozen=True, slots=True)
class Joined:
    """You are in; wait for `Begin` or `Disbanded`. `stamp` is that of the `Join` that this answers."""

    slot: bytes
    stamp: int


@dataclass(frozen=True, slots=True)
class Declined:
    """You are not in. `why` is one of DECLINES.

    With "not_leading", `leader` says whom to ask (empty: nobody); with "older_record", `epoch` is that of the newer.
    """

    slot: bytes
    why: str
    detail: str = ""
    leader: bytes = b""
    epoch: int = 0

    def __post_init__(self) -> None:
        _require(self.epoch >= 0, "an epoch is not negative")
        _require(self.why in DECLINES, f"why is one of {', '.join(DECLINES)}")
        _require(len(self.leader) in (0, PEER_ID_BYTES), "a peer id has 20 bytes")


DECLINES = ("not_ready", "not_leading", "other_terms", "other_epoch", "older_record", "other_number", "full", "busy")


@dataclass(frozen=True, slots=True)
class Disbanded:
    """The group that you joined will not begin here; `leader` says whom to ask instead (empty: nobody)."""

    slot: bytes
    leader: bytes = b""

    def __post_init__(self) -> None:
        _require(len(self.leader) in (0, PEER_ID_BYTES), "a peer id has 20 bytes")


@dataclass(frozen=True, slots=True)
class Quit:
    """I joined your group and take that back."""

    slot: bytes


@dataclass(frozen=True, slots=True)
class Member:
    """One place in a group: `weight` and `heads` are the shares that count in this round, `fraction` its shard.

    `stamp` is that of the `Join` from which all this comes. Whoever has asked anew since then, or has begun a new life,
    knows by it that this round is none of its own.
    """

    peer: bytes
    host: str
    port: int
    inbound: bool
    weight: float
    heads: float
    fraction: float
    stamp: int

    def __post_init__(self) -> None:
        _require(0 <= self.stamp < 1 << 62, "a stamp is not negative")
        _require(len(self.peer) == PEER_ID_BYTES, "a peer id has 20 bytes")
        _require_address(self.host, self.port, needed=self.inbound)
        _require(0 <= self.weight <= MAX_MASS, f"a weight lies between 0 and {MAX_MASS:g}")
        _require(0 <= self.heads <= MAX_PEERS, f"heads are a count: 0 to {MAX_PEERS}")
        _require(0 <= self.fraction <= 1, "a fraction lies between 0 and 1")


@dataclass(frozen=True, slots=True)
class Begin:
    """The leader's last word: this is the group, this is the plan. Durations count from its arrival.

    The place of a member in `members` is its index in masks, in the schedule and in the key rule. `whole` is the part
    of the certificate that is known before the exchange. `left_out` names announced peers that are not in the group.
    `timeout_s` is the longest that a member's step may still take; each member also keeps its own deadline. `age` is
    the number of rounds behind the result: one more than behind the vector of any member. `parts` is how many groups
    the line was cut into, of which this is one; `newest` the largest one of its members' tickets.
    """

    round_id: bytes
    run: str
    slot: bytes
    digest: bytes
    epoch: int
    number: int
    members: tuple[Member, ...]
    whole: bool
    chunk_bytes: int
    timeout_s: float
    progress_s: float
    left_out: dict[bytes, str]
    age: int = 0
    parts: int = 1
    newest: int = 0

    def __post_init__(self) -> None:
        _require(len(self.round_id) == ROUND_ID_BYTES, "a round id has 16 bytes")
        _require(len(self.slot) == 20 and len(self.digest) == 32, "a slot has 20 bytes and a digest 32")
        _require(2 <= len(self.members) <= MAX_MEMBERS, f"a group has 2 to {MAX_MEMBERS} members")
        _require(len({m.peer for m in self.members}) == len(self.members), "a peer stands in a group once")
        _require(sum(m.weight for m in self.members) > 0, "somebody's weight must count")
        _require(abs(sum(m.fraction for m in self.members) - 1) < 1e-6, "fractions sum to 1")
        _require(all(m.inbound or m.fraction == 0 for m in self.members), "only who can be dialled reduces")
        _require(4096 <= self.chunk_bytes <= 4 << 20, "a chunk has 4 KiB to 4 MiB")
        _require(self.chunk_bytes % BORDER_BYTES == 0, f"a chunk has a multiple of {BORDER_BYTES} bytes")
        _require(0 < self.timeout_s <= MAX_ROUND_S and 0 < self.progress_s <= MAX_ROUND_S, "durations are positive")
        _require(0 <= self.number < 1 << 62 and self.epoch >= 0 and self.newest >= 0, "numbers are not negative")
        _require(1 <= self.parts <= MAX_PARTS, f"a line is cut into 1 to {MAX_PARTS} groups")
        _require(len(self.left_out) <= 1024, "too many left out")
        _require(0 <= self.age <= MAX_NUMBER, "an age is not negative")


# ---------------------------------------------------------------------------------------------------------- exchange


@dataclass(frozen=True, slots=True)
class Scoped:
    """A message of the exchange, for the round that it belongs to."""

    round_id: bytes
    body: bytes

    def __post_init__(self) -> None:
        _require(len(self.round_id) == ROUND_ID_BYTES, "a round id has 16 bytes")


@dataclass(frozen=True, slots=True)
class Done:
    """I hold every chunk of plan `epoch`; `digest` (8 bytes) covers (version, contributors) of each."""

    epoch: int
    digest: bytes

    def __post_init__(self) -> None:
        _require(self.epoch >= 0 and len(self.digest) == 8, "an epoch is not negative and a digest has 8 bytes")


@dataclass(frozen=True, slots=True)
class Commit:
    """The table of plan `epoch` is final; `changes` are its entries that differ from plan 0."""

    epoch: int
    changes: tuple[Entry, ...]

    def __post_init__(self) -> None:
        _require(self.epoch >= 0, "an epoch is not negative")


@dataclass(frozen=True, slots=True)
class Need:
    """I cannot finish under plan `epoch`; please coordinate a new one. `slow` masks reducers that are too slow."""

    epoch: int
    slow: int

    def __post_init__(self) -> None:
        _require(self.epoch >= 0 and _is_mask(self.slow), "an epoch is not negative and a mask has 64 bits")


@dataclass(frozen=True, slots=True)
class Few:
    """Too few members are linked to me for a redo ever to be decided from here."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """Promise me not to follow a plan below `epoch`, and tell me what you hold."""

    epoch: int

    def __post_init__(self) -> None:
        _require(self.epoch > 0, "a prepared epoch is positive")


@dataclass(frozen=True, slots=True)
class Promise:
    """Answer to `Prepare`: refused with what I promised instead, or granted with my state.

    `accepted` is the epoch at which I said DONE for my table (-1: none), `changes` my table against plan 0, `held` and
    `opened` bitmaps over the chunks (bit c of byte c // 8).
    """

    epoch: int
    granted: bool
    promised: int
    accepted: int = -1
    changes: tuple[Entry, ...] = ()
    held: bytes = b""
    opened: bytes = b""

    def __post_init__(self) -> None:
        _require(self.epoch > 0 and self.promised >= 0 and self.accepted >= -1, "epochs are not negative")


@dataclass(frozen=True, slots=True)
class NewPlan:
    """Plan `epoch`: its table against plan 0, who promised it, who holds what, and who is `cut` off its coordinator.

    Its writers wait for the pieces of those who promised, and of whoever is cut off the coordinator but not off them.
    """

    epoch: int
    alive: int
    changes: tuple[Entry, ...]
    holders: tuple[tuple[int, int], ...]
    cut: int = 0

    def __post_init__(self) -> None:
        _require(self.epoch > 0, "a planned epoch is positive")
        _require(_is_mask(self.alive) and _is_mask(self.cut), "a mask has 64 bits")
        _require(all(_is_mask(mask) for _, mask in self.holders), "a mask has 64 bits")


@dataclass(frozen=True, slots=True)
class Want:
    """Send me these (chunk, version), which you hold or will hold; `epoch` is my plan."""

    epoch: int
    chunks: tuple[ChunkVersion, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """Send me your pieces for these (chunk, version), which I am redoing."""

    chunks: tuple[ChunkVersion, ...]


PEERS = Vocabulary(
    PeerError,
    Hello,
    DataOffer,
    DataAccept,
    DataRefused,
    DataBad,
    News,
    Ping,
    Goodbye,
    DialBack,
    DialledBack,
    RunTerms,
    UnknownRound,
    Here,
    Join,
    Joined,
    Declined,
    Disbanded,
    Quit,
    Begin,
    Scoped,
    StateAsk,
    StateOffer,
    NoState,
    StateList,
    StateHashes,
    StateWant,
    StateGone,
)
EXCHANGE = Vocabulary(PeerError, Done, Commit, Need, Few, Prepare, Promise, NewPlan, Want, Ask)
