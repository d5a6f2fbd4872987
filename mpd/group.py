"""The other members of a round as one member sees them, and the queue of what it has to tell them.

That a link is lost is final for this round and this pair, and says nothing about anybody else: two members may well
differ about who is there. Only the plan, on which the group agrees, is the same for all.
"""

from mpd.errors import PeerError
from mpd.reduce import mask_of, members_of
from mpd.rounds import Action, ExchangeMessage, RoundPlan, Send

MAX_SERVINGS = 16  # how often a member may ask for every chunk; honest ones ask once a plan, and plans are few


class Group:
    """Who is linked, who delivers, who can still gather a redo quorum; sets are masks.

    `silent` holds the suppliers that are linked but deliver nothing, or too slowly: those are in `slow` as well, and
    stay there. `few` holds those that are linked to too few
    members to gather a redo quorum, as far as they said so.
    """

    def __init__(self, plan: RoundPlan, now: float) -> None:
        self._plan = plan
        self._me = 1 << plan.me
        self.actions: list[Action] = []
        self.linked = plan.linked_from_start()
        self.silent = 0
        self.slow = 0
        self.reasons: dict[int, str] = {}
        self.last_delivery: tuple[int, float] | None = None  # who delivered last, and when
        self._heard = [now] * plan.n_members
        self._servings = [0] * plan.n_members
        outbound_only = plan.everyone & ~plan.inbound
        self.few = outbound_only if plan.inbound.bit_count() + 1 < plan.redo_quorum else 0

    @property
    def in_reach(self) -> int:
        """The members linked to me, and me."""
        return self.linked | self._me

    @property
    def can_redo(self) -> bool:
        """True if those in reach are enough to decide a redo."""
        return self.in_reach.bit_count() >= self._plan.redo_quorum

    @property
    def possible_coordinators(self) -> int:
        """Those in reach that may yet gather a redo quorum; who delivers comes before who is silent."""
        able = self.in_reach & ~self.few
        return able & ~self.silent or able

    def is_linked(self, member: int) -> bool:
        """True if there is a link to `member`."""
        return self.linked >> member & 1 == 1

    def send(self, to: int, message: ExchangeMessage) -> None:
        """Queue a message."""
        self.actions.append(Send(to, message))

    def broadcast(self, message: ExchangeMessage) -> None:
        """Queue a message to everyone linked."""
        self.actions.extend(Send(member, message) for member in members_of(self.linked))

    def lose(self, peer: int, reason: str) -> None:
        """The link to `peer` is over."""
        self.linked &= ~(1 << peer)
        self.silent &= self.linked
        self.blame(peer, reason)

    def blame(self, member: int, reason: str) -> None:
        """Remember why `member` may be missing from chunks; the first reason counts."""
        self.reasons.setdefault(member, reason)

    def note_delivery(self, now: float, sender: int) -> bool:
        """Bytes of a data record came from `sender`. Returns True if that ends its silence."""
        self._heard[sender] = now
        self.last_delivery = sender, now
        ends_silence = (self.silent & ~self.slow) >> sender & 1 == 1
        if ends_silence:
            self.silent &= ~(1 << sender)
        return ends_silence

    def restart_clocks(self, now: float) -> None:
        """Measure silence from `now` on: others are waited for than before."""
        self._heard = [now] * self._plan.n_members

    def unheard_since(self, moment: float) -> int:
        """The linked members that have delivered nothing after `moment`."""
        return mask_of(member for member in members_of(self.linked) if self._heard[member] <= moment)

    def count_servings(self, member: int, n_chunks: int) -> None:
        """Raise PeerError if `member` has asked for far more than it can need."""
        self._servings[member] += n_chunks
        if self._servings[member] > MAX_SERVINGS * (self._plan.n_chunks + self._plan.n_members):
            raise PeerError(f"it asked for {self._servings[member]} chunks of {self._plan.n_chunks}")
