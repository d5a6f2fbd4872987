"""A round as it is fixed before its first byte moves, and the words between its machine and the daemon.

`Exchange` (mpd.exchange) decides, a `Vault` does what is decided with bytes, and whatever concerns other members leaves
as an `Action` that the daemon carries out. Sets of members are masks: bit i stands for member i.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from mpd.messages import MAX_MEMBERS, Ask, Commit, Done, Few, Need, NewPlan, Prepare, Promise, Want

ExchangeMessage = Done | Commit | Need | Few | Prepare | Promise | NewPlan | Want | Ask


def redo_quorum(n_members: int) -> int:
    """Return how many of the members of a group must promise before anything is redone."""
    return n_members // 2 + 1


def success_quorum(n_members: int) -> int:
    """Return how many of the members of a group must hold everything before one of them succeeds."""
    return n_members - redo_quorum(n_members) + 1


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """What BEGIN fixes for member `me` of a group.

    `owners[chunk]` is the member that reduces the chunk; `inbound` masks the members that can be dialled (two others
    are never linked); `senders` masks those whose weight counts: the others send no pieces and stand in no contributor
    set, but receive results and may reduce. `deadline` is absolute, on the clock of all `now` arguments; `progress_s`
    is how long a member may deliver nothing while somebody waits for it. `sending_order` lists all chunks in the order
    in which my pieces leave; empty means shard by shard, my right neighbour's first.
    """

    n_members: int
    me: int
    owners: tuple[int, ...]
    inbound: int
    senders: int
    deadline: float
    progress_s: float
    sending_order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 2 <= self.n_members <= MAX_MEMBERS or not 0 <= self.me < self.n_members:
            raise ValueError(f"member {self.me} of {self.n_members}: a group has 2 to {MAX_MEMBERS} members")
        if not 0 < self.senders <= self.everyone or not 0 < self.inbound <= self.everyone:
            raise ValueError("senders and inbound are masks of members, at least one each")
        if not self.owners or not all(0 <= o < self.n_members and self.inbound >> o & 1 for o in self.owners):
            raise ValueError("a round has chunks, and each is owned by a member that can be dialled")
        if self.sending_order and sorted(self.sending_order) != list(range(self.n_chunks)):
            raise ValueError("sending_order must list every chunk once")
        if not self.progress_s > 0:
            raise ValueError("progress_s must be positive")

    @property
    def n_chunks(self) -> int:
        """How many chunks the vector has."""
        return len(self.owners)

    @property
    def everyone(self) -> int:
        """Mask of all members."""
        return (1 << self.n_members) - 1

    @property
    def redo_quorum(self) -> int:
        """How many members must promise before anything is redone."""
        return redo_quorum(self.n_members)

    @property
    def success_quorum(self) -> int:
        """How many members must hold everything before one of them succeeds.

        Both quorums together exceed the group, so whoever redoes hears from somebody who knows of a success.
        """
        return success_quorum(self.n_members)

    def linked_from_start(self) -> int:
        """Mask of the members with whom I have a link: two members of which neither can be dialled have none."""
        others = self.everyone & ~(1 << self.me)
        return others if self.inbound >> self.me & 1 else others & self.inbound

    def pieces_in_order(self) -> tuple[int, ...]:
        """All chunks in the order in which my pieces of them leave."""
        if self.sending_order:
            return self.sending_order
        by_neighbour = sorted(range(self.n_chunks), key=lambda c: ((self.owners[c] - self.me) % self.n_members, c))
        return tuple(by_neighbour)


class Ended(Enum):
    """How a round went for this member."""

    SUCCESS = "success"
    FAILED = "failed"


class Vault(Protocol):
    """What the machine does with bytes: a chunk has one accumulator and one slot, and calls take effect at once."""

    def open(self, chunk: int) -> None:
        """Start an accumulator that holds my own piece, or nothing if my weight is 0."""

    def add(self, chunk: int, sender: int, payload: Any) -> None:
        """Add a piece. Raises PeerError, having added nothing, if the piece is unusable."""

    def close(self, chunk: int, contributors: int) -> None:
        """Divide by the weights of `contributors`, write the mean into the slot, forget the accumulator."""

    def store(self, chunk: int, payload: Any) -> None:
        """Write a received result into the slot. Raises PeerError if it is unusable."""

    def discard(self, chunk: int) -> None:
        """Forget an accumulator that was opened and will not be closed."""

    def before_overwrite(self, chunk: int) -> None:
        """The slot's result is about to be replaced: sends of it that have begun must go on from a copy.

        Sends that have not begun need no care, because `Exchange.holds` refuses them from now on.
        """


@dataclass(frozen=True, slots=True)
class SendPiece:
    """Send my piece of `chunk` for `version`, if `Exchange.may_send_piece` still says yes when its turn comes."""

    to: int
    chunk: int
    version: int


@dataclass(frozen=True, slots=True)
class SendResult:
    """Send the slot of `chunk`, if `Exchange.holds` still says yes for `version` when its turn comes."""

    to: int
    chunk: int
    version: int
    contributors: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` on the control connection."""

    to: int
    message: ExchangeMessage


@dataclass(frozen=True, slots=True)
class CloseLink:
    """I judge `to` lost: nothing more to or from it in this round."""

    to: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The round has ended for this member, once. On success: publish now."""

    success: bool


@dataclass(frozen=True, slots=True)
class Gone:
    """Nobody needs this round's links from me any more, once. Control messages already handed out still go out."""


Action = SendPiece | SendResult | Send | CloseLink | Finished | Gone
