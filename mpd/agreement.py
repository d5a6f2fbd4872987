"""How one member takes part in the group's decisions: promise, accept, commit, and coordinate when asked to.

The rules that keep two successful members from ever holding different bytes are all here:

* A promise for epoch e fences every lower plan, and DONE is held back until that plan or a higher one is installed.
* DONE(p) is said when everything of plan p is held: that accepts the plan's table. Success needs a quorum of DONE(p),
  or one COMMIT, which says that somebody had that quorum.
* A coordinator decides only with a quorum of promises, and keeps the highest table that any of them accepted.
* A COMMIT is installed whatever was promised, because nothing can be decided against it any more.
"""

from mpd.ballot import (
    MAX_EPOCH,
    Attempt,
    Plan,
    Report,
    Tally,
    changes_of,
    check_epoch,
    decide,
    read_plan,
    read_report,
    read_table,
    write_plan,
    write_promise,
)
from mpd.chunks import Chunks
from mpd.errors import PeerError, RoundFailed
from mpd.group import Group
from mpd.messages import Commit, Done, NewPlan, Prepare, Promise
from mpd.reduce import members_of
from mpd.rounds import RoundPlan


class Agreement:
    """Promises, acceptance and commitment of one member.

    `promised` is the highest epoch that I have promised; above the plan's epoch it means that a plan is to come.
    `accepted` is the epoch at which I said DONE for the table in force (-1: none). `committed` is the lowest epoch
    whose table, mine, is known to be final. `attempt` is there while I coordinate, `n_refused` counts failed attempts.
    """

    def __init__(self, round_plan: RoundPlan, group: Group, chunks: Chunks) -> None:
        self._round = round_plan
        self._group = group
        self._chunks = chunks
        self.promised = 0
        self.accepted = -1
        self.committed: int | None = None
        self.attempt: Attempt | None = None
        self.n_refused = 0
        self._digest = b""  # what I said DONE for
        self._tally = Tally()
        self._committers = 0

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._chunks.plan

    @property
    def awaits_plan(self) -> bool:
        """True if I have promised to wait for a plan that is not here yet."""
        return self.promised > self.plan.epoch

    @property
    def awaited_coordinator_is_linked(self) -> bool:
        """True if the epoch that I promised belongs to another member, and it can still reach me."""
        return self._group.is_linked(self.coordinator_of(self.promised))

    @property
    def awaited_coordinator_is_in_reach(self) -> bool:
        """True if the epoch that I promised belongs to a member that can still reach me, or to me."""
        return self._group.in_reach >> self.coordinator_of(self.promised) & 1 == 1

    @property
    def n_done(self) -> int:
        """How many members are known to hold everything of the plan in force."""
        return self._tally.at(self.plan.epoch).bit_count()

    @property
    def holders(self) -> int:
        """Mask of the members known to hold everything of the plan in force."""
        return self._tally.at(self.plan.epoch) | (self._committers if self.committed is not None else 0)

    @property
    def confirmed(self) -> int:
        """Mask of the members known to hold the committed result; 0 before there is one."""
        if self.committed is None:
            return 0
        return 1 << self._round.me | self._committers | self._tally.at_least(self.committed)

    @property
    def is_hopeless(self) -> bool:
        """True if not even everybody in reach would make a success quorum."""
        possible = self._tally.at(self.plan.epoch) | self._group.in_reach
        return self.committed is None and possible.bit_count() < self._round.success_quorum

    def coordinator_of(self, epoch: int) -> int:
        """Return the member that alone may issue `epoch`."""
        return epoch % self._round.n_members

    # accepting

    def conclude(self) -> None:
        """I hold every chunk: say DONE, and commit as soon as a quorum has said so.

        Raises RoundFailed if somebody says DONE for other contents of the same versions.
        """
        epoch = self.plan.epoch
        if self.accepted < epoch and self.committed is None and self._may_accept():
            self.accepted = epoch
            self._digest = self._chunks.digest()
            self._tally.say(self._round.me, epoch, self._digest)
            if not self._is_quorum_done():
                self._group.broadcast(Done(epoch, self._digest))
        if self.accepted == epoch:
            dissenter = self._tally.dissenter(epoch, self._digest)
            if dissenter is not None:
                self._group.blame(dissenter, "it says that it holds another result than this machine")
                raise RoundFailed("another member says that it holds another result")
            if self.committed is None and self._is_quorum_done():
                self.committed = epoch

    def commit(self) -> Commit:
        """Return the message that makes the table final for whoever reads it."""
        assert self.committed is not None
        return Commit(self.committed, changes_of(self._round, self.plan.table))

    def _may_accept(self) -> bool:
        return self.promised == self.plan.epoch

    def _is_quorum_done(self) -> bool:
        return self.n_done >= self._round.success_quorum

    def on_done(self, sender: int, message: Done) -> None:
        """`sender` holds everything of some plan."""
        check_epoch(message.epoch)
        self._tally.say(sender, message.epoch, message.digest)

    def on_commit(self, now: float, sender: int, message: Commit) -> None:
        """A table is final. Raises PeerError if that contradicts what is agreed."""
        check_epoch(message.epoch)
        table = read_table(self._round, message.changes, message.epoch)
        if message.epoch > self.plan.epoch and self.committed is None:
            self._install(now, Plan(message.epoch, table, self._round.everyone, {}), may_open=False)
        elif table != self.plan.table:
            raise PeerError(f"it commits to another table for {message.epoch} than the group agreed on")
        self._committers |= 1 << sender
        self.committed = message.epoch if self.committed is None else min(self.committed, message.epoch)

    # coordinating

    def prepare(self, now: float, slow: int, grace_s: float) -> None:
        """Begin an attempt to decide a plan without `slow` writers, waiting `grace_s` for more than a quorum."""
        n_members, me = self._round.n_members, self._round.me
        epoch = self.promised + 1 + (me - self.promised - 1) % n_members
        if epoch <= MAX_EPOCH:
            self._promise(epoch)
            self.attempt = Attempt(epoch, me, self._report(), slow, now + grace_s)
            self._group.broadcast(Prepare(epoch))

    def decide_if_possible(self, now: float) -> None:
        """Decide, tell and install the plan of my attempt once enough promises are here."""
        attempt = self.attempt
        if attempt is not None and attempt.may_decide(self._group.linked, self._round.redo_quorum):
            plan = decide(self._round, attempt.epoch, attempt.reports, attempt.slow, self._group.in_reach)
            self._group.broadcast(write_plan(self._round, plan))
            self._install(now, plan, may_open=True)

    def on_promise(self, sender: int, message: Promise) -> None:
        """Somebody answers my `Prepare`."""
        check_epoch(message.promised)
        self._check_coordinator(self._round.me, message.epoch)
        if self.attempt is None or self.attempt.epoch != message.epoch:
            return
        if message.granted:
            self.attempt.reports[sender] = read_report(self._round, sender, message)
        elif message.promised < message.epoch:
            raise PeerError(f"it refuses attempt {message.epoch} after promising only {message.promised}")
        else:
            self.attempt = None
            self.n_refused += 1
            self._promise(message.promised)

    # following

    def on_prepare(self, sender: int, message: Prepare) -> None:
        """A coordinator asks for my promise."""
        self._check_coordinator(sender, message.epoch)
        if message.epoch > self.promised:
            self.attempt = None
            self._promise(message.epoch)
            self._group.send(sender, write_promise(self._round, message.epoch, self._report()))
        else:
            self._group.send(sender, Promise(message.epoch, False, self.promised))

    def on_new_plan(self, now: float, sender: int, message: NewPlan) -> None:
        """A plan was decided. Raises PeerError if it contradicts what is agreed."""
        plan = read_plan(self._round, message)
        is_settled = plan.epoch == self.plan.epoch or (plan.epoch > self.plan.epoch and self.committed is not None)
        if is_settled and plan.table != self.plan.table:
            raise PeerError(f"it sends another table for {plan.epoch} than the group agreed on")
        if self._may_install(plan.epoch):
            self._install(now, plan, may_open=True)
            # The coordinator has told everyone it is linked to; the members it did not reach may be linked to me.
            for member in members_of(self._group.linked & ~plan.alive):
                self.tell_plan(member)

    def tell_plan(self, member: int) -> None:
        """Send `member` the plan in force."""
        self._group.send(member, write_plan(self._round, self.plan))

    def _may_install(self, epoch: int) -> bool:
        return epoch > self.plan.epoch and epoch >= self.promised

    def _install(self, now: float, plan: Plan, *, may_open: bool) -> None:
        """Go over to `plan`. Under a committed one nothing is opened: enough members hold all of it."""
        self._promise(plan.epoch)
        if self.attempt is not None and self.attempt.epoch <= plan.epoch:
            self.attempt = None
        if plan.table != self.plan.table:
            self.accepted = -1
        self._group.restart_clocks(now)
        self._chunks.follow(plan, may_open=may_open)

    def _promise(self, epoch: int) -> None:
        self.promised = max(self.promised, epoch)

    def _report(self) -> Report:
        return Report(self.accepted, self.plan.table, self._chunks.held(), self._chunks.opened())

    def _check_coordinator(self, member: int, epoch: int) -> None:
        check_epoch(epoch)
        if self.coordinator_of(epoch) != member:
            raise PeerError(f"it makes attempt {epoch}, which is for another member to make")
