"""Asking for a new plan: when it is needed, whom to ask, how often, and when to give up.

A plan is asked for at once when links are lost, and after that only by a timer that doubles, so that members who
disagree about whom to ask cannot keep each other busy. Whoever is asked may be dead, or cut off from a majority, so
each attempt goes to another member.
"""

from mpd.agreement import Agreement
from mpd.ballot import check_epoch
from mpd.chunks import Chunks
from mpd.errors import PeerError, RoundFailed
from mpd.group import Group
from mpd.messages import Few, Need
from mpd.reduce import members_of
from mpd.rounds import RoundPlan

GRACE = 0.25  # a coordinator that has a quorum waits this long for the others' promises; times progress_s
RETRY = 0.5  # the first wait for a plan before asking again; times progress_s


class Replanner:
    """What one member does to get a plan. `retry_at` is when it asks again, None while there is nothing to ask for."""

    def __init__(self, round_plan: RoundPlan, group: Group, chunks: Chunks, agreement: Agreement) -> None:
        self._round = round_plan
        self._group = group
        self._chunks = chunks
        self._agreement = agreement
        self.retry_at: float | None = None
        self._asked: int | None = None  # who has my Need, until it is lost or a plan comes
        self._links_when_asked = 0  # the links for which I have asked without waiting
        self._n_retries = 0
        self._seen = (0, 0)  # plan and promise at the last look

    def ask_anew(self) -> None:
        """Something has changed that makes asking at once worth while."""
        self._links_when_asked = 0

    def lost(self, member: int) -> None:
        """`member` will not answer. If that leaves too few for a redo, everybody is told that asking me is no use."""
        if self._asked == member:
            self._asked = None
        me = 1 << self._round.me
        if not self._group.can_redo and not self._group.few & me:
            self._group.few |= me
            self._group.broadcast(Few())

    def on_few(self, sender: int) -> None:
        """Asking `sender` is no use."""
        self._group.few |= 1 << sender
        if self._asked == sender:
            self._asked = None
        self.ask_anew()

    def on_need(self, now: float, sender: int, message: Need) -> None:
        """`sender` asks me for a plan. Raises PeerError if it complains about nobody of this round."""
        check_epoch(message.epoch)
        if message.slow & ~self._round.everyone:
            raise PeerError(f"it calls {message.slow:#x} slow: members of this round expected")
        agreement = self._agreement
        if agreement.plan.epoch > message.epoch:
            agreement.tell_plan(sender)
        elif agreement.attempt is not None:
            agreement.attempt.slow |= message.slow
        elif self._group.can_redo and not (agreement.awaits_plan and agreement.awaited_coordinator_is_linked):
            agreement.prepare(now, message.slow, GRACE * self._round.progress_s)

    def observe(self) -> bool:
        """Note what has been agreed since the last look. Returns True if the plan is another one."""
        plan_before, promised_before = self._seen
        self._seen = self._agreement.plan.epoch, self._agreement.promised
        if promised_before != self._agreement.promised:
            self.retry_at = None  # a new coordinator gets its time
        if plan_before == self._agreement.plan.epoch:
            return False
        self._asked = None
        return True

    def review(self, now: float) -> None:
        """Look for sources of what is lacking, ask for a plan if there are none. Raises RoundFailed if hope is lost."""
        group, agreement, seeker = self._group, self._agreement, self._chunks.seeker
        if not group.linked:
            raise RoundFailed("no link to any other member is left")
        if self._chunks.n_lacking:
            self._chunks.seek(agreement.holders)
        if not group.can_redo:
            agreement.attempt = None
        plan_will_not_come = agreement.awaits_plan and not agreement.awaited_coordinator_is_in_reach
        if seeker.orphans or plan_will_not_come or agreement.is_hopeless:
            self._check_hope()
        is_asking = self._asked is not None or agreement.attempt is not None
        if (seeker.stuck or plan_will_not_come) and not is_asking and self._links_when_asked != group.linked:
            self._ask(now)

    def arm(self, now: float) -> None:
        """Set the timer if a plan is needed or awaited, stop it otherwise."""
        if not self._in_trouble():
            self.retry_at = None
        elif self.retry_at is None:
            # Members wait differently long, so that of two competing coordinators one comes through.
            spread = 1 + self._round.me / self._round.n_members
            self.retry_at = now + RETRY * self._round.progress_s * spread * 2.0**self._n_retries

    def retry(self, now: float) -> None:
        """The timer has rung: ask the next member. Raises RoundFailed if there is none."""
        self.retry_at = None
        if self._in_trouble():
            self._agreement.attempt = None
            self._n_retries += 1
            self._ask(now)

    def waiting_for(self) -> str:
        """Say in one sentence what the round needs next."""
        agreement, chunks, n_chunks = self._agreement, self._chunks, self._round.n_chunks
        if agreement.attempt is not None:
            n_promises, n_needed = len(agreement.attempt.reports), self._round.redo_quorum
            return f"members that agree who redoes what is missing: {n_promises} of at least {n_needed} have answered"
        if chunks.seeker.stuck:
            n_stuck = len(chunks.seeker.orphans) + len(chunks.seeker.late)
            return f"a decision who redoes {n_stuck} of {n_chunks} chunks, which nobody in reach can send"
        if chunks.n_lacking:
            return f"{chunks.n_lacking} of {n_chunks} chunks"
        if agreement.awaits_plan:
            return "the decision of another member who redoes what is missing"
        return f"members that hold every chunk: {agreement.n_done} of at least {self._round.success_quorum} said so"

    def _in_trouble(self) -> bool:
        return self._chunks.seeker.stuck or self._agreement.attempt is not None or self._agreement.awaits_plan

    def _check_hope(self) -> None:
        if not self._group.possible_coordinators:
            raise RoundFailed("too few members are left in reach to decide who redoes what is missing")

    def _ask(self, now: float) -> None:
        self._check_hope()
        self._links_when_asked = self._group.linked
        candidates = members_of(self._group.possible_coordinators)
        self._asked = candidates[(self._n_retries + self._agreement.n_refused) % len(candidates)]
        if self._asked == self._round.me:
            self._agreement.prepare(now, self._group.silent, GRACE * self._round.progress_s)
        else:
            self._group.send(self._asked, Need(self._agreement.plan.epoch, self._group.silent))
