"""How the peers that meet in one slot become one group: a machine per slot, fed with events, asked for actions.

Peers that are ready stand in a total order (`rank` in mpd/roll.py): those that accept connections first, then by the
stamp that each published once, then by id. Everybody asks the smallest ready peer it knows, never a larger one; who
knows no smaller one invites the others, collects them and closes the group. "Ask X instead" therefore only leads
downwards and cannot go in circles. Whoever is named by others but has not spoken for itself is asked once at most, so
a made-up name costs one question.

This is the leader election of hivemind (Ryabinin et al., NeurIPS 2021) without its waits: a group closes when everybody
who was announced is in it, and a dead end is left at the first refusal. An invitation goes out from whoever has nobody
smaller to ask; all others just ask, so a group of n costs some 4 n messages: Here, Join, Joined, Begin.

A slot comes round again every d rounds, so two halves of a line that count their rounds apart still meet in it: with
Begin all of them take over one number, where a cycle begins the largest. In its midst that may be a smaller one
(mpd/grouping.py), because what somebody brings from another cycle weighs nothing.

What to do next is one pure function, `decide`, and what may follow upon what is one table, `MOVES` (both mpd/roll.py).
The machine here brings the events to them and turns what they say into messages.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from mpd.errors import PeerError, RoundFailed
from mpd.ids import PeerId, peer_id
from mpd.messages import Begin, Declined, Disbanded, Here, Join, Joined, Quit
from mpd.roll import (
    MOVES,
    Known,
    MatchLimits,
    Move,
    Rank,
    Register,
    Roll,
    Sighting,
    State,
    Verdict,
    decide,
    name,
    next_change,
    rank,
)

__all__ = ["Alone", "Begun", "Compose", "MatchLimits", "Matchmaker", "Message", "Send", "Sighting", "State"]

Message = Here | Join | Joined | Declined | Disbanded | Quit | Begin
Compose = Callable[[tuple[tuple[PeerId, Join], ...], dict[PeerId, str]], tuple[Begin, ...]]

MAX_DETAIL_CHARS = 200
MAX_LEAP = 1 << 20  # rounds by which the numbers of two members may differ

# What became of a peer that does not take us in.
DECLINED = {
    "other_terms": "declined, because it uses other terms for this run",
    "other_epoch": "declined, because it goes by another shape of the run's grid",
    "older_record": "declined, because it goes by a newer shape of the run's grid",
    "other_number": "declined, because it stands at another round",
    "full": "declined, because its group is full",
    "busy": "declined, because it is done with this round",
}


@dataclass(frozen=True, slots=True)
class Send:
    """An action: send `message` to `peer`, in order. If that is impossible, call `on_gone`."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class Begun:
    """The group is closed. `leader` is True on the one machine that closed it."""

    begin: Begin
    leader: bool


@dataclass(frozen=True, slots=True)
class Alone:
    """There will be no group; `missing` says of each announced peer why it is not here."""

    reason: str
    missing: dict[PeerId, str]


class Matchmaker:
    """One peer in one slot, from its announcement until the group begins or it stays alone.

    `compose` turns the members (we first) and the left out into a `Begin`, or into several that share the members, ours
    first; it may leave out more, and raises RoundFailed where a round makes no sense. `epoch` is that of our shape, and
    `n_phases` how many rounds a cycle has. `line_size` is how many peers the grid expects here, 0 if nobody knows, and
    `line_low` how many at least. Until `quiet_until` others are not told that we are here unless we are ready, too:
    when rounds follow upon each other, nobody has to know.
    After each event take the actions, and call `on_tick` at `wakeup`. Times are seconds on any monotonic clock.
    """

    def __init__(
        self,
        me: PeerId,
        slot: bytes,
        run: str,
        number: int,
        compose: Compose,
        limits: MatchLimits,
        line_size: int = 0,
        line_low: int | None = None,
        epoch: int = 0,
        n_phases: int = 1,
        quiet_until: float = -math.inf,
    ) -> None:
        self.state = State.EXPECTED
        self.leader: PeerId | None = None
        self.verdict: Begun | Alone | None = None
        self.reason = "announced; the trainer has not asked yet"
        self.wakeup: float | None = None
        self._me, self._slot, self._run, self._number = me, slot, run, number
        self._compose, self._limits, self._line_size, self._epoch = compose, limits, line_size, epoch
        self._line_low = line_size if line_low is None else line_low
        self._quiet_until = quiet_until
        self._n_phases = n_phases
        self._register = Register()
        self._ticket: Join | None = None
        self._ready_s = self._asked_s = -math.inf
        self._window_ends_s = self._alone_ends_s = self._time_ends_s = math.inf
        self._arrivals: dict[PeerId, float] = {}  # when each peer first said that it is ready
        self._actions: list[Send] = []

    # ---------------------------------------------------------------------------------------------------------- events

    def on_sighted(self, now: float, sighting: Sighting) -> None:
        """A peer was seen in this slot: by the DHT (not `ready`), or because it says so itself."""
        if self.verdict or sighting.peer == self._me:
            return
        # Announcements outlive those who made them; but while nobody waits for us, there is time to try again.
        peer = self._register.meet(now, sighting.peer, sighting.ready, revive=sighting.ready or self._ticket is None)
        peer.inbound = sighting.inbound
        peer.silent |= sighting.silent
        peer.knows_us |= sighting.knows_us
        if sighting.ready:
            _invited_by(peer, sighting.stamp)
        self._settle(now)

    def on_gone(self, now: float, peer: PeerId, reason: str) -> None:
        """`peer` cannot be reached, its link broke, or it said goodbye. It counts again when it speaks again."""
        if not self.verdict:
            self._lose(now, peer, reason)
            self._settle(now)

    def on_ready(
        self, now: float, ticket: Join, limits: MatchLimits | None = None, line: tuple[int, int] | None = None
    ) -> None:
        """Our trainer asked. `ticket` is what we bring to a leader; its `time_left_s` counts from now.

        `limits`, and `line` (`line_low` and `line_size`), replace what was known when this machine was made.
        """
        self._move(Move.READY)
        self._ticket = ticket
        self._ready_s = now
        self._time_ends_s = now + ticket.time_left_s
        # At least half of a short step is left for the exchange.
        if limits is not None:
            self._limits = limits
        if line is not None:
            self._line_low, self._line_size = line
        self._window_ends_s = now + min(self._limits.window_s, ticket.time_left_s / 2)
        self._alone_ends_s = now + min(self._limits.alone_s, ticket.time_left_s / 2)
        self._settle(now)

    def on_message(self, now: float, peer: PeerId, message: Message) -> None:
        """`peer` said something about this slot. Raises PeerError if no correct peer would."""
        if message.slot != self._slot:
            raise PeerError(f"a {type(message).__name__} for slot {message.slot.hex()} came to {self._slot.hex()}")
        if isinstance(message, Here | Join | Begin) and message.run != self._run:
            raise PeerError(f"a {type(message).__name__} of run {message.run[:64]!r} came to a slot of {self._run!r}")
        if isinstance(message, Join) or (isinstance(message, Here) and message.ready):
            self._arrivals.setdefault(peer, now)
        if self.verdict:
            if isinstance(message, Join):
                self._send(peer, Declined(self._slot, "busy", detail=self.reason))
            return
        match message:
            case Here():
                self._on_here(now, peer, message)
            case Join():
                self._on_join(now, peer, message)
            case Joined():
                self._on_joined(peer, message)
            case Declined():
                self._on_declined(now, peer, message)
            case Disbanded():
                self._on_disbanded(now, peer, message)
            case Quit() if peer == self.leader and self.state is State.JOINING:
                pass  # it was said before our Join came, which has an answer of its own
            case Quit():
                self._lose(now, peer, "withdrew: its group began without us, or its trainer takes no part now")
            case Begin():
                self._on_begin(now, peer, message)
        self._settle(now)

    def on_line(self, now: float, line_low: int, line_size: int) -> None:
        """More is known of how many peers should be here."""
        if (line_low, line_size) != (self._line_low, self._line_size):
            self._line_low, self._line_size = line_low, line_size
            self._settle(now)

    def on_tick(self, now: float) -> None:
        """Time passed."""
        self._settle(now)

    def cancel(self, now: float, reason: str) -> None:
        """End without a group: the trainer is gone, or the caller knows better than to wait."""
        if not self.verdict:
            self._stay_alone(reason)
            self._settle(now)

    def lateness(self, now: float) -> dict[PeerId, float]:
        """Return how many seconds after us each member of the group that began became ready; 0 for those before us.

        To be asked when the group begins: a member that was collected by others was ready by then.
        """
        members = self.verdict.begin.members if isinstance(self.verdict, Begun) else ()
        peers = [peer_id(member.peer) for member in members if member.peer != self._me]
        return {peer: max(0.0, self._arrivals.get(peer, now) - self._ready_s) for peer in peers}

    def take_actions(self) -> list[Send]:
        """Return what is to be sent, in order, and forget it."""
        actions, self._actions = self._actions, []
        return actions

    # -------------------------------------------------------------------------------------------------- what peers say

    def _on_here(self, now: float, sender: PeerId, here: Here) -> None:
        if not self.may_meet(here.number):
            self._refuse(now, sender, "other_number", self._number_differs(here.number))
            return
        peer = self._register.meet(now, sender, in_person=True, revive=True)
        peer.knows_us = not here.answer
        if here.ready:
            _invited_by(peer, here.stamp)

    def _on_join(self, now: float, sender: PeerId, join: Join) -> None:
        if (objection := self._objection(join)) is not None:
            self._refuse(now, sender, *objection)
            return
        peer = self._register.meet(now, sender, in_person=True, revive=True)
        peer.knows_us, peer.inbound, peer.stamp = True, join.inbound, join.stamp
        peer.ticket = None  # if it had joined before, this Join takes the place of that one
        if self._ticket is None:
            _invited_by(peer, join.stamp)
            self._send(sender, Declined(self._slot, "not_ready"))
            return
        is_smaller = self._register.rank_of(sender) < self._rank()
        if self.leader == sender and self.state is State.JOINING and not is_smaller:
            self._let_go(now)  # both asked, because one of us was misinformed about the other
        if self.leader is None and is_smaller:
            _invited_by(peer, join.stamp)  # it does not know that it comes first; it will hear from us at once
            self._turn_away(sender, peer, sender)
        elif self.leader is not None:
            self._turn_away(sender, peer, self.leader)
        else:
            peer.ticket, peer.time_ends_s = join, now + join.time_left_s
            self._move(Move.FOLLOWED)
            self._settle(now)
            if self.state is State.LEADING:  # otherwise the answer was Begin
                self._send(sender, Joined(self._slot, join.stamp))

    def _objection(self, join: Join) -> tuple[str, str] | None:
        if not self.may_meet(join.number):
            return "other_number", self._number_differs(join.number)
        if self._ticket is not None and join.digest != self._ticket.digest:
            return "other_terms", "the terms of the run differ"
        if self._ticket is not None and join.epoch != self._ticket.epoch:
            why = "older_record" if join.epoch < self._ticket.epoch else "other_epoch"
            return why, f"the shape of the run's grid is number {self._ticket.epoch} here, {join.epoch} there"
        return None

    def may_meet(self, number: int) -> bool:
        """Return whether whoever is at round `number` can be in one with us. No lie leads anybody far."""
        return abs(number - self._number) <= MAX_LEAP and (number - self._number) % self._n_phases == 0

    def _number_differs(self, theirs: int) -> str:
        return f"the next round is {self._number} here, {theirs} there"

    def _refuse(self, now: float, sender: PeerId, why: str, detail: str) -> None:
        self._register.meet(now, sender, in_person=True, revive=True)
        self._lose(now, sender, detail)
        self._send(sender, Declined(self._slot, why, detail, epoch=self._epoch if why == "older_record" else 0))

    def _turn_away(self, sender: PeerId, peer: Known, leader: PeerId) -> None:
        peer.invited, peer.pointed_to = False, leader
        self._send(sender, Declined(self._slot, "not_leading", leader=leader))

    def _on_joined(self, sender: PeerId, joined: Joined) -> None:
        if self._ticket is None or joined.stamp != self._ticket.stamp:
            return  # it answers an earlier attempt in this slot, whose Begin came by another way
        if self.leader == sender:
            self._move(Move.ACCEPTED)
        else:  # we stopped waiting for it
            self._send(sender, Quit(self._slot))

    def _on_declined(self, now: float, sender: PeerId, declined: Declined) -> None:
        if declined.why in ("not_ready", "not_leading"):
            self._redirect(now, sender, declined.leader)
        else:
            reason = DECLINED.get(declined.why, "declined")
            if declined.detail:
                reason += f": {declined.detail[:MAX_DETAIL_CHARS]}"
            self._lose(now, sender, reason)

    def _on_disbanded(self, now: float, sender: PeerId, disbanded: Disbanded) -> None:
        if disbanded.leader:
            self._redirect(now, sender, disbanded.leader)
        else:
            self._lose(now, sender, "disbanded its group")

    def _redirect(self, now: float, sender: PeerId, named: bytes) -> None:
        """`sender` does not lead but knows who may. We need not have asked: followers tell those who wait for them."""
        if self.leader == sender:
            self._let_go(now)
        if named and named != self._me:
            self._register.meet(now, peer_id(named), in_person=False, revive=False).inviting = True

    def _on_begin(self, now: float, sender: PeerId, begin: Begin) -> None:
        members = {member.peer: member for member in begin.members}
        # Whoever cuts a line into groups begins all of them, also those in which it is not.
        is_cut = begin.parts > 1
        if sender not in members and not (is_cut and sender == self.leader):
            raise PeerError("a Begin came from a peer that is not in it")
        # A member that has it passes it on, perhaps before our leader's comes. To ignore it is to refuse the round.
        if self._ticket is None or self.leader is None or (self.leader not in members and not is_cut):
            return  # of a group that we left before it began
        if self._me in members and members[self._me].stamp != self._ticket.stamp:
            return  # it answers an earlier Join of ours, with values and a weight that are not those of this step
        if self._me not in members:
            if sender == self.leader:
                self._lose(now, sender, "began without us")
            return
        is_ours = (begin.digest, begin.epoch) == (self._ticket.digest, self._ticket.epoch)
        may_go_back = begin.number % self._n_phases != 0  # to a cycle in whose midst the others are
        is_behind = begin.number < self._number and not may_go_back
        if not is_ours or is_behind or not self.may_meet(begin.number):
            raise PeerError("a Begin has another number, other terms or another shape than the Join it answers")
        self._finish(Move.BEGIN, Begun(begin, leader=False), members)
        self.reason = f"{name(self.leader)} began with {len(members)} members"

    def _lose(self, now: float, peer: PeerId, reason: str) -> None:
        was_follower = peer in self._register.followers
        self._register.lose(peer, reason)
        if peer == self.leader:
            self._let_go(now)
        elif was_follower and not self._register.followers:
            self._move(Move.DESERTED)

    def _let_go(self, now: float) -> None:
        self._move(Move.LET_GO)
        self.leader = None
        # Those who followed the same leader look for a new one now, and must find each other.
        self._window_ends_s = max(self._window_ends_s, now + self._limits.answer_s)
        self._alone_ends_s = max(self._alone_ends_s, now + self._limits.answer_s)

    # ------------------------------------------------------------------------------------------------------ what we do

    def _settle(self, now: float) -> None:
        """Do what `decide` says until it says wait; then tell our peers what is news to them."""
        while self._ticket is not None and not self.verdict:
            for peer in self._register.followers:
                if self._register.peers[peer].time_ends_s <= now:
                    self._lose(now, peer, "its step's time was up")
            roll = self._roll()
            verdict, self.reason = decide(now, roll, self._limits)
            if verdict is Verdict.WAIT:
                self.wakeup = next_change(now, roll, self._limits)
                break
            self._carry_out(now, verdict, roll)
        if self.verdict:
            self.wakeup = None
        else:
            self._introduce(now)

    def _carry_out(self, now: float, verdict: Verdict, roll: Roll) -> None:
        if verdict is Verdict.BEGIN:
            self._begin(now)
        elif verdict is Verdict.GIVE_UP:
            self._stay_alone(self.reason)
        elif verdict is Verdict.ASK and roll.to_ask:
            self._ask(now, roll.to_ask)
        elif verdict is Verdict.DROP and roll.leader:
            self._send(roll.leader, Quit(self._slot))
            self._lose(now, roll.leader, self.reason)
        elif verdict is Verdict.POINT and roll.leader:
            for peer in self._register.to_point(roll.leader):
                self._turn_away(peer, self._register.peers[peer], roll.leader)

    def _ask(self, now: float, leader: PeerId) -> None:
        for follower in self._register.followers:
            peer = self._register.peers[follower]
            peer.ticket, peer.invited, peer.pointed_to = None, False, leader
            self._send(follower, Disbanded(self._slot, leader=leader))
        self._move(Move.ASK)
        self.leader, self._asked_s = leader, now
        peer = self._register.peers[leader]
        peer.asked = peer.knows_us = True
        self._send(leader, self._ticket_at(now))

    def _begin(self, now: float) -> None:
        members = [(self._me, self._ticket_at(now))]
        for peer, ticket in self._register.followers.items():
            left_s = self._register.peers[peer].time_ends_s - now
            members.append((peer, replace(ticket, time_left_s=left_s)))
        left_out = self._register.missing(until="when the window ended")
        try:
            begins = self._compose(tuple(members), left_out)
        except RoundFailed as failure:
            self._stay_alone(str(failure))
            return
        of_peer = {PeerId(member.peer): begin for begin in begins for member in begin.members}
        for peer in self._register.followers:
            if peer in of_peer:
                self._send(peer, of_peer[peer])
        self._finish(Move.BEGIN, Begun(of_peer[self._me], leader=True), of_peer)

    def _stay_alone(self, reason: str) -> None:
        self.reason = reason
        missing = self._register.missing(until="in time")
        self._finish(Move.GIVE_UP, Alone(reason, missing), ())

    def _finish(self, move: Move, verdict: Begun | Alone, group: Collection[bytes]) -> None:
        """End here, and tell all who may count on us that they need not."""
        self._move(move)
        self.verdict = verdict
        for peer, known in self._register.peers.items():
            if known.knows_us and peer not in group:
                self._send(peer, Quit(self._slot) if known.ticket is None else Disbanded(self._slot))

    def greeting(self) -> Here:
        """Return what to say to a peer that may be here: that we are, and that it should say so too."""
        may_lead = self._ticket is not None and self.state in (State.SEEKING, State.LEADING)
        stamp = self._ticket.stamp if self._ticket is not None and may_lead else 0
        return Here(self._run, self._slot, self._number, may_lead, stamp, self._epoch, answer=True)

    def _introduce(self, now: float) -> None:
        """Tell each live peer that we are here, and if we have nobody to ask, that it may ask us; once each."""
        if self.state is State.EXPECTED and now < self._quiet_until:
            return
        if self._n_phases > 1 and self.state in (State.JOINING, State.FOLLOWING):
            return  # whom we follow counts us
        may_lead = self.state in (State.SEEKING, State.LEADING)
        stamp = self._ticket.stamp if self._ticket else None
        for peer, known in self._register.peers.items():
            is_news = not known.knows_us or (may_lead and not known.invited)
            if is_news and not known.gone and known.ticket is None:
                known.knows_us, known.invited = True, stamp is not None
                here = Here(self._run, self._slot, self._number, stamp is not None, stamp or 0, self._epoch)
                self._send(peer, here)

    # ----------------------------------------------------------------------------------------------------- the details

    def _roll(self) -> Roll:
        following = self.leader if self.state is State.FOLLOWING else None
        return Roll(
            members=1 + len(self._register.followers),
            awaited=self._register.awaited,
            lost=self._register.lost,
            line_size=self._line_size,
            line_low=self._line_low,
            to_ask=self._register.to_ask(self._rank()),
            leader=self.leader,
            accepted=following is not None,
            to_point=following is not None and bool(self._register.to_point(following)),
            asked_s=self._asked_s,
            news_s=max(self._ready_s, self._register.news_s),
            window_ends_s=self._window_ends_s,
            alone_ends_s=self._alone_ends_s,
            time_ends_s=self._time_ends_s,
        )

    def _own(self) -> Join:
        assert self._ticket is not None, "only a ready peer has a ticket"
        return self._ticket

    def _rank(self) -> Rank:
        return rank(self._me, self._own().inbound, self._own().stamp)

    def _ticket_at(self, now: float) -> Join:
        return replace(self._own(), time_left_s=self._time_ends_s - now)

    def _send(self, peer: PeerId, message: Message) -> None:
        self._actions.append(Send(peer, message))

    def _move(self, move: Move) -> None:
        self.state = MOVES[self.state][move]


def _invited_by(peer: Known, stamp: int) -> None:
    """`peer` said itself that it is ready."""
    peer.stamp, peer.inviting, peer.asked = stamp, True, False
