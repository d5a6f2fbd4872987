"""One round of one member: forward or redo.

Every member pushes its pieces to the chunks' owners; an owner adds them up, divides, and sends the mean to everyone. A
chunk that somebody holds is *forwarded*, same bytes, and that needs no agreement (mpd.seek). A chunk that nobody holds
is *redone* by another member, and that is a decision of the group (mpd.ballot, mpd.agreement): opinions about who is
dead differ, decisions must not. A member succeeds when it holds every chunk and a quorum has said DONE that it does
too; every later decision hears from one of that quorum and keeps the same bytes. So all members that ever succeed hold
the same result, whatever happens to them or is believed about them.

`Exchange` is a machine: events go in, each with its time, `Action`s come out of `take_actions`. It knows no clock and
no socket. Whatever a peer sends is checked first and may only raise PeerError; the daemon then reports that peer lost.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from mpd.agreement import Agreement
from mpd.chunks import NO_VERSION, Chunks
from mpd.errors import NotFinite, PeerError, RoundFailed
from mpd.group import Group
from mpd.messages import Ask, Commit, Done, Few, Need, NewPlan, Prepare, Promise, Want
from mpd.reduce import mask_of, members_of
from mpd.replan import Replanner
from mpd.rounds import (
    Action,
    CloseLink,
    Ended,
    ExchangeMessage,
    Finished,
    Gone,
    RoundPlan,
    Send,
    SendPiece,
    SendResult,
    Vault,
)
from mpd.tempo import Tempo

__all__ = [
    "Exchange",
    "RoundPlan",
    "Vault",
    "Ended",
    "Action",
    "SendPiece",
    "SendResult",
    "Send",
    "CloseLink",
    "Finished",
    "Gone",
    "ExchangeMessage",
]

# Waits, as multiples of the plan's progress_s.
SENDER_SILENCE = 1.0  # then a sender that holds up a chunk of mine is dropped
SUPPLIER_SILENCE = 2.5  # then a reducer is slow: it may itself have waited for a sender that it dropped
PATROL = 0.125  # how often silence is looked for


class Exchange:
    """The machine of one member in one round.

    `ended` and `reason` say how it went, `gone` that the round's links may be forgotten, `tempo` how fast the others
    were. After a success,
    `contributors`, `chunk_contributors`, `confirmed` and `missing` describe the result.
    """

    def __init__(self, plan: RoundPlan, vault: Vault, now: float) -> None:
        self._round = plan
        self._group = Group(plan, now)
        self._chunks = Chunks(plan, vault, self._group)
        self._agreement = Agreement(plan, self._group, self._chunks)
        self.tempo = Tempo(plan, now)
        self.ended: Ended | None = None
        self.reason = ""
        self.gone = False
        self._replanner = Replanner(plan, self._group, self._chunks, self._agreement)
        self._patrol_at = now + PATROL * plan.progress_s
        self._must_review = True  # links, plan or sources have changed
        self._unclosed_at: float | None = None  # since when chunks wait for nobody but us

    # ------------------------------------------------------------------------------------------------ what goes in

    def start(self, now: float) -> None:
        """Push my pieces, open the chunks that I own."""
        self._chunks.start()
        self._settle(now)

    def on_piece(self, now: float, sender: int, chunk: int, version: int, payload: Any) -> None:
        """A whole, verified piece has arrived. Raises PeerError if the sender must not send it."""
        wanted = self.wants_piece(sender, chunk, version)
        if version == 0:
            self.tempo.note_piece(now, sender, chunk)
        if wanted:  # what is sent once more is no sign that the rest will ever come
            self._note_delivery(now, sender)
            try:
                self._chunks.add_piece(sender, chunk, payload)
            except PeerError as error:
                why = f"its piece of chunk {chunk} is unusable: {error}"
                self._drop_senders(1 << sender, why)
                if not isinstance(error, NotFinite):
                    raise PeerError(why) from error  # nobody makes such bytes by mistake
        self._settle_if_needed(now)

    def on_result(self, now: float, sender: int, chunk: int, version: int, contributors: int, payload: Any) -> None:
        """The mean of a chunk has arrived. Raises PeerError if the sender must not send it."""
        wanted = self.wants_result(sender, chunk, version)
        self._chunks.check_contributors(contributors)
        self._chunks.note_result(sender, chunk, version)
        if wanted:
            self._note_delivery(now, sender)
            try:
                self._chunks.store_result(chunk, version, contributors, payload)
            except PeerError as error:
                why = f"its result of chunk {chunk} is unusable: {error}"
                if not isinstance(error, NotFinite):
                    raise PeerError(why) from error
                self._group.actions.append(CloseLink(sender))
                self._lose(sender, why)
        self._settle_if_needed(now)

    def on_message(self, now: float, sender: int, message: ExchangeMessage) -> None:
        """A message of the exchange has arrived. Raises PeerError if it is none that `sender` may send."""
        if self._is_over() or not self._group.is_linked(sender):
            return
        if self.ended is Ended.SUCCESS:
            self._serve(now, sender, message)
        else:
            self._hear(now, sender, message)
        self._settle(now)

    def on_lost(self, now: float, peer: int, reason: str) -> None:
        """The link to `peer` is over, and all that it delivered has been handed in."""
        if self._group.is_linked(peer):
            self._lose(peer, reason)
            self._settle(now)

    def on_progress(self, now: float, sender: int) -> None:
        """Bytes of a data record from `sender` have arrived."""
        self._note_delivery(now, sender)
        self._settle_if_needed(now)

    def on_tick(self, now: float) -> None:
        """`wakeup` has come."""
        if now >= self._round.deadline:
            waiting_for = self.waiting_for()
            self._blame_whom_i_await()
            self.cancel(now, f"the round's time is over while it waits for {waiting_for}")
        if self.ended is not None:
            return
        if self._chunks.has_unclosed:
            self._chunks.close_next()
        if now >= self._patrol_at:
            self._patrol(now)
        attempt = self._agreement.attempt
        if attempt is not None and now >= attempt.grace_ends:
            attempt.grace_over = True
        if self._replanner.retry_at is not None and now >= self._replanner.retry_at:
            self._do_or_fail(self._replanner.retry, now)
        self._settle(now)

    def cancel(self, now: float, reason: str) -> None:
        """End the round here and now: its time is over, the trainer left, or the result's memory is needed."""
        if self.ended is None:
            self._fail(reason)
        self._leave()

    # ----------------------------------------------------------------------------------------------- what comes out

    def take_actions(self) -> list[Action]:
        """Return what is to be done, in this order, and forget it."""
        actions, self._group.actions = self._group.actions, []
        return actions

    @property
    def wakeup(self) -> float | None:
        """When `on_tick` must be called at the latest."""
        if self.gone:
            return None
        times = [self._round.deadline]
        if self.ended is None:
            times.append(self._patrol_at)
            if self._unclosed_at is not None:
                times.append(self._unclosed_at)
            if self._replanner.retry_at is not None:
                times.append(self._replanner.retry_at)
            attempt = self._agreement.attempt
            if attempt is not None and not attempt.grace_over:
                times.append(attempt.grace_ends)
        return min(times)

    def wants_piece(self, sender: int, chunk: int, version: int) -> bool:
        """True if this piece would be added. Raises PeerError if `sender` must not send it."""
        wanted = self._chunks.wants_piece(sender, chunk, version)
        return wanted and self.ended is None and self._group.is_linked(sender)

    def wants_result(self, sender: int, chunk: int, version: int) -> bool:
        """True if this result would be stored. Raises PeerError if `sender` cannot have it.

        Asked before the body is read, so nothing is believed yet: the header may be anybody's.
        """
        wanted = self._chunks.wants_result(sender, chunk, version)
        return wanted and self.ended is None and self._group.is_linked(sender)

    def holds(self, chunk: int, version: int) -> bool:
        """True if the slot of `chunk` still is `version` and may be sent."""
        return not self._is_over() and self._chunks.versions[chunk] == version

    def is_occupied(self, chunk: int) -> bool:
        """True if the slot of `chunk` holds a result of some version: receive another one beside it."""
        return self._chunks.versions[chunk] != NO_VERSION

    def may_send_piece(self, chunk: int, version: int) -> bool:
        """True while my inputs are those of this round, for whatever chunk and version."""
        return self.ended is None

    @property
    def chunk_contributors(self) -> list[int]:
        """The contributor set of every chunk."""
        return self._chunks.contributors

    @property
    def contributors(self) -> int:
        """Mask of the members that stand in every chunk."""
        mask = self._round.everyone
        for chunk_mask in self._chunks.contributors:
            mask &= chunk_mask
        return mask

    @property
    def confirmed(self) -> int:
        """Mask of the members known to hold the result that I succeeded with; 0 before success."""
        return self._agreement.confirmed if self.ended is Ended.SUCCESS else 0

    @property
    def missing(self) -> dict[int, str]:
        """Who does not stand in every chunk, and why as far as is known here. Before success: who is in trouble."""
        if self.ended is not Ended.SUCCESS:
            return self.troubles
        return {member: self._why_missing(member) for member in members_of(self._round.everyone & ~self.contributors)}

    @property
    def troubles(self) -> dict[int, str]:
        """What is known against each member, whether or not it is missing from the result."""
        return dict(self._group.reasons)

    @property
    def redone(self) -> dict[int, int]:
        """How many chunks of each member others have reduced in its place."""
        pairs = zip(self._round.owners, self._chunks.plan.table, strict=True)
        return dict(Counter(owner for owner, (_, writer) in pairs if writer != owner))

    @property
    def last_delivery(self) -> tuple[int, float] | None:
        """Who delivered last, and when."""
        return self._group.last_delivery

    def waiting_for(self) -> str:
        """Say in one sentence what this round needs next."""
        if self.ended is not None:
            return "nothing: the round is over" if self.gone else "others, who may still ask for chunks"
        return self._replanner.waiting_for()

    # ---------------------------------------------------------------------------------------------- what must follow

    def _settle_if_needed(self, now: float) -> None:
        if self.ended is None and (self._must_review or not self._chunks.n_lacking):
            self._settle(now)

    def _settle(self, now: float) -> None:
        """Do everything that follows from the state; every event that may matter ends here."""
        if self.ended is None:
            self._do_or_fail(self._agree, now)
        if self.ended is None and self._must_review:
            self._must_review = False
            self._do_or_fail(self._replanner.review, now)
        if self.ended is None:
            self._replanner.arm(now)
        self._unclosed_at = now if self._chunks.has_unclosed else None
        if self.ended is Ended.SUCCESS and not self._group.linked & ~self.confirmed:
            self._leave()

    def _agree(self, now: float) -> None:
        """Decide and succeed as far as possible. Raises RoundFailed if members hold different bytes."""
        agreement = self._agreement
        agreement.decide_if_possible(now)
        if self._replanner.observe():
            self._must_review = True
        if not self._chunks.n_lacking:
            agreement.conclude()
            if agreement.committed is not None:
                self.ended = Ended.SUCCESS
                agreement.attempt = None
                self._group.actions.append(Finished(True))
                self._group.broadcast(agreement.commit())

    def _do_or_fail(self, step: Callable[[float], None], now: float) -> None:
        try:
            step(now)
        except RoundFailed as error:
            self._fail(str(error))

    def _lose(self, peer: int, reason: str) -> None:
        self._group.lose(peer, reason)
        if self.ended is None:
            self._replanner.lost(peer)
            self._chunks.seeker.lost(peer)
            self._chunks.close_what_is_ready()
            self._must_review = True

    def _drop_senders(self, members: int, reason: str) -> None:
        for member in members_of(members):
            self._group.blame(member, reason)
        self._chunks.collector.drop(members)
        self._chunks.close_what_is_ready()
        self._must_review = True

    def _fail(self, reason: str) -> None:
        self.ended = Ended.FAILED
        self.reason = reason
        self._agreement.attempt = None
        self._chunks.collector.abandon_all()
        self._group.actions.append(Finished(False))
        self._leave()

    def _leave(self) -> None:
        if not self.gone:
            self.gone = True
            self._group.actions.append(Gone())

    def _note_delivery(self, now: float, sender: int) -> None:
        if self._group.note_delivery(now, sender):
            self._must_review = True

    def _patrol(self, now: float) -> None:
        """Stop waiting for whoever has delivered nothing for too long, or far less than the others."""
        progress_s, group = self._round.progress_s, self._group
        self._patrol_at = now + PATROL * progress_s
        collector = self._chunks.collector
        overdue = collector.overdue(group.unheard_since(now - SENDER_SILENCE * progress_s))
        why = dict.fromkeys(members_of(overdue), f"it sent nothing for {progress_s:g} s while a chunk waited for it")
        if collector.chunks():
            why |= self.tempo.slow_senders(now, collector.expected & ~overdue)
        for member, reason in why.items():
            self._drop_senders(1 << member, reason)
        self.tempo.laggards |= mask_of(why)
        lacking = self._chunks.lacking_from_writers()
        slow = self.tempo.slow_reducers(now, self._agreement.plan.epoch, lacking) & group.linked
        if 2 * (group.slow | slow).bit_count() < self._round.n_members:
            group.slow |= slow
        else:
            slow = 0
        unheard = group.unheard_since(now - SUPPLIER_SILENCE * progress_s)
        silent = unheard and unheard & self._chunks.suppliers()
        if (slow | silent) & ~group.silent:
            group.silent |= slow | silent
            silence_s = SUPPLIER_SILENCE * progress_s
            for member in members_of(silent & ~slow):
                group.blame(member, f"it sent nothing for {silence_s:g} s while this machine waited for its chunks")
            for member in members_of(slow):
                group.blame(member, "it sent its chunks far more slowly than the others")
            self._replanner.ask_anew()
            self._must_review = True

    # ------------------------------------------------------------------------------------------------------- messages

    def _hear(self, now: float, sender: int, message: ExchangeMessage) -> None:
        """React to a message while the round is on."""
        match message:
            case Done():
                self._agreement.on_done(sender, message)
                self._must_review |= self._chunks.seeker.stuck
            case Commit():
                self._agreement.on_commit(now, sender, message)
                self._must_review = True
            case Need():
                self._replanner.on_need(now, sender, message)
            case Few():
                self._replanner.on_few(sender)
                self._must_review = True
            case Prepare():
                self._agreement.on_prepare(sender, message)
            case Promise():
                self._agreement.on_promise(sender, message)
            case NewPlan():
                self._agreement.on_new_plan(now, sender, message)
            case Want():
                if message.epoch < self._agreement.plan.epoch:
                    self._agreement.tell_plan(sender)
                self._chunks.answer_want(sender, message.chunks, keep=True)
            case Ask():
                self._chunks.answer_ask(sender, message.chunks)

    def _serve(self, now: float, sender: int, message: ExchangeMessage) -> None:
        """React to a message after success: give what is published, tell those who still decide that it is final."""
        match message:
            case Done():
                self._agreement.on_done(sender, message)
            case Commit():
                self._agreement.on_commit(now, sender, message)
            case Want():
                self._chunks.answer_want(sender, message.chunks, keep=False)
            case Need() | Prepare() | Ask():
                self._group.send(sender, self._agreement.commit())

    # --------------------------------------------------------------------------------------------------- small things

    def _blame_whom_i_await(self) -> None:
        """The time is over: say so of everybody who owes me something, as far as nothing is known of it already."""
        chunks, me = self._chunks, 1 << self._round.me
        for member in members_of((chunks.suppliers() | chunks.collector.awaited()) & ~me):
            self._group.blame(member, "what it had to send had not come when the round's time was over")
        if not chunks.n_lacking:
            for member in members_of(self._round.everyone & ~self._agreement.holders & ~me):
                self._group.blame(member, "it had not said when the round's time was over that it holds the result")

    def _is_over(self) -> bool:
        return self.gone or self.ended is Ended.FAILED

    def _why_missing(self, member: int) -> str:
        if not self._round.senders >> member & 1:
            return "weighs nothing in this round"
        n_without = sum(not mask >> member & 1 for mask in self._chunks.contributors)
        why = self._group.reasons.get(member, "another member reduced without it; seen from here nothing was wrong")
        return f"not in {n_without} of {self._round.n_chunks} chunks: {why}"
