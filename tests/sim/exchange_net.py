"""A network of real `Exchange` machines, with exact integers for bytes.

Member i contributes 4**i, so the value of a chunk decodes to the set that was summed. Every ordered pair of members has
two queues, control and data, each first in first out and nothing promised between them; a lost link is noticed behind
what was delivered. Data may be read from memory long after the machine asked for it, as a sender task does. Every
member has its own clock. A `Violation` is raised as soon as a promise of the protocol is broken.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpd.errors import NotFinite, PeerError
from mpd.exchange import (
    Action,
    CloseLink,
    Ended,
    Exchange,
    ExchangeMessage,
    Finished,
    Gone,
    RoundPlan,
    Send,
    SendPiece,
    SendResult,
)
from mpd.reduce import members_of

PROGRESS_S = 1.0
DEADLINE_S = 100.0
ALL = 1 << 30  # more than any queue holds
GARBAGE = 1 << 200  # what the trainer's next step leaves in the inputs

Result = list[tuple[int, int | None]]  # per chunk: contributors, value


class Violation(AssertionError):
    """A promise of the protocol is broken."""


def check(condition: object, what: str) -> None:
    """Raise `Violation` unless `condition` holds."""
    if not condition:
        raise Violation(what)


def decode(contributors: int) -> int:
    """Return the sum that stands for a set of members."""
    return sum(4**i for i in members_of(contributors))


def make_plans(n: int, owners: Sequence[int], **fixed: Any) -> list[RoundPlan]:
    """Return the same round as every member sees it; by default everybody sends and can be dialled."""
    full = (1 << n) - 1
    common = {"inbound": full, "senders": full, "deadline": DEADLINE_S, "progress_s": PROGRESS_S, **fixed}
    return [RoundPlan(n_members=n, me=i, owners=tuple(owners), **common) for i in range(n)]


class Bytes:
    """The vault of one member: integers instead of vectors."""

    def __init__(self, plan: RoundPlan) -> None:
        self.input = 4**plan.me
        self.distrusted = 0  # mask of the members whose values are not finite
        self.malformed = 0  # and of those who send what is no payload at all
        self.slots: dict[int, int] = {}
        self.accumulators: dict[int, int] = {}
        self._adds_itself = plan.senders >> plan.me & 1
        self._vacated: set[int] = set()

    def open(self, chunk: int) -> None:
        check(chunk not in self.accumulators, "an accumulator is opened twice")
        self.accumulators[chunk] = self.input if self._adds_itself else 0

    def add(self, chunk: int, sender: int, payload: int) -> None:
        if self.distrusted >> sender & 1:
            raise NotFinite("not a number")
        if self.malformed >> sender & 1:
            raise PeerError("a bomb")
        self.accumulators[chunk] += payload

    def close(self, chunk: int, contributors: int) -> None:
        self._write(chunk, self.accumulators.pop(chunk))

    def store(self, chunk: int, payload: int) -> None:
        if payload < 0:
            raise NotFinite("not a number") if payload == -1 else PeerError("a bomb")
        self._write(chunk, payload)

    def discard(self, chunk: int) -> None:
        del self.accumulators[chunk]

    def before_overwrite(self, chunk: int) -> None:
        self._vacated.add(chunk)

    def _write(self, chunk: int, value: int) -> None:
        check(chunk not in self.slots or chunk in self._vacated, "a slot is overwritten without notice")
        self._vacated.discard(chunk)
        self.slots[chunk] = value


@dataclass
class Frame:
    """A record on a data connection; `value` is read when the sender task gets to it, None if it was cancelled."""

    action: SendPiece | SendResult
    value: int | None = None
    is_read: bool = False


@dataclass
class Link:
    """One direction of a pair of members. `is_over`: the receiver will be told once both queues are empty."""

    control: list[ExchangeMessage] = field(default_factory=list)
    data: list[Frame] = field(default_factory=list)
    is_over: bool = False

    def __bool__(self) -> bool:
        return bool(self.control or self.data or self.is_over)

    def lanes(self) -> list[str]:
        """Return where something can be delivered next."""
        lanes = [lane for lane, queue in (("control", self.control), ("data", self.data)) if queue]
        return lanes or (["lost"] if self.is_over else [])


class Net:
    """Members, links, clocks, and the checks that hold at all times."""

    def __init__(self, plans: Sequence[RoundPlan], make: Callable[..., Exchange] = Exchange) -> None:
        self.n, self.plan = len(plans), plans[0]
        self.vaults = [Bytes(plan) for plan in plans]
        self.clocks = [0.0] * self.n
        self.members = [make(plan, vault, 0.0) for plan, vault in zip(plans, self.vaults, strict=True)]
        self.links = {(i, j): Link() for i in range(self.n) for j in range(self.n) if i != j}
        unlinked = {frozenset(pair) for pair in self.links if not any(self.plan.inbound >> i & 1 for i in pair)}
        self.over = set(unlinked)  # pairs whose link is over, or never was
        self.faulty = set(unlinked)  # of those, all but the ones that ended because a member was through
        self.dead: set[int] = set()
        self.gone: set[int] = set()
        self.published: dict[int, Result | None] = {}  # None: failed
        self.sent: Counter[str] = Counter()
        self._closed: dict[tuple[int, int], tuple[int, int]] = {}
        self._closers: dict[tuple[int, int], int] = {}
        self._first_hand: set[tuple[int, int, int, int]] = set()
        for i in range(self.n):
            self.members[i].start(0.0)
            self.carry_out(i)

    # what happens to members

    def up(self) -> list[int]:
        """Return the members that still take part in the round."""
        return [i for i in range(self.n) if i not in self.dead and i not in self.gone]

    def deliver(self, i: int, j: int, lane: str) -> None:
        """Hand the next thing on its way from i to j to j."""
        link, member, now = self.links[i, j], self.members[j], self.clocks[j]
        try:
            if lane == "control":
                member.on_message(now, i, link.control.pop(0))
            elif lane == "data":
                self._deliver_record(i, j, link.data.pop(0))
            else:
                link.is_over = False
                self.links[j, i] = Link()
                member.on_lost(now, i, "its link ended")
        except PeerError as error:
            raise Violation(f"member {j} blames honest member {i}: {error}") from error
        self.carry_out(j)

    def go(self, *pairs: tuple[int, int]) -> None:
        """Deliver everything that is on its way between these pairs now or because of it, control first."""
        while any(self.links[pair] for pair in pairs):
            for i, j in pairs:
                while self.links[i, j] and j in self.up():
                    self.deliver(i, j, self.links[i, j].lanes()[0])
                if j not in self.up():
                    self.links[i, j] = Link()

    def control(self, i: int, j: int, *kinds: type) -> None:
        """Deliver the next messages from i to j, which are of these kinds."""
        for kind in kinds:
            check(isinstance(self.links[i, j].control[0], kind), f"{kind.__name__} is not next")
            self.deliver(i, j, "control")

    def data(self, i: int, j: int, n: int = 1) -> None:
        """Deliver the next `n` records from i to j."""
        for _ in range(n):
            self.deliver(i, j, "data")

    def on_the_way(self, i: int, j: int) -> list[type]:
        """Return the kinds of the messages that are on their way from i to j."""
        return [type(message) for message in self.links[i, j].control]

    def tick(self, i: int, now: float | None = None) -> None:
        """Let time pass for member i, until it wakes up or until `now`."""
        member = self.members[i]
        wakeup = member.wakeup if now is None else now
        self.clocks[i] = max(self.clocks[i], wakeup or 0.0)
        n_open = len(member._chunks.collector.chunks())
        member.on_tick(self.clocks[i])
        is_due = member.wakeup is not None and member.wakeup <= self.clocks[i]
        check(not is_due or len(member._chunks.collector.chunks()) < n_open, f"member {i} wakes up for nothing")
        self.carry_out(i)

    def run(self, until: float = DEADLINE_S) -> None:
        """Deliver everything, and let time pass when nothing is on its way, up to `until`."""
        while self.up():
            pairs = [pair for pair, link in self.links.items() if link and pair[1] in self.up()]
            if pairs:
                self.go(*pairs)
                continue
            wakeups = [(self.members[i].wakeup or 0.0, i) for i in self.up()]
            if min(wakeups)[0] > until:
                return
            self.tick(min(wakeups)[1])

    def crash(self, i: int, keep: Callable[[int], int] = lambda n: 0) -> None:
        """Member i is no more; `keep(n)` says how many of n things on their way still arrive."""
        for j in range(self.n):
            if j != i:
                link = self.links[i, j]
                self._end(i, j, keep(len(link.control)), keep(len(link.data)))
        self.dead.add(i)

    def cut(self, i: int, j: int, n_control: int = 0, n_data: int = 0) -> None:
        """Member i holds j for lost; j notices behind as much of i's as these numbers say."""
        self.faulty.add(frozenset((i, j)))
        self._end(i, j, n_control, n_data)
        self.members[i].on_lost(self.clocks[i], j, "suspected")
        self.carry_out(i)

    def leave(self, i: int) -> None:
        """Member i is through with the round; what it handed out still goes out."""
        self.gone.add(i)
        for j in range(self.n):
            if j != i:
                self._end(i, j, ALL, ALL)

    # what members do

    def carry_out(self, i: int) -> None:
        """Do what member i asks for, and check what it has become."""
        member = self.members[i]
        for action in member.take_actions():
            self._count(i, action)
            match action:
                case Send(to, message):
                    if self._is_open(i, to):
                        self.links[i, to].control.append(message)
                case SendPiece(to) | SendResult(to):
                    if self._is_open(i, to):
                        self.links[i, to].data.append(Frame(action))
                    if isinstance(action, SendResult):
                        self._check_closed(i, action)
                case CloseLink(to):
                    self.cut(i, to, ALL, ALL)
                case Finished(success):
                    check(i not in self.published, f"member {i} finishes twice")
                    self.published[i] = self._publish(i) if success else None
                case Gone():
                    check(i not in self.gone and member.gone, f"member {i} leaves twice")
                    self.leave(i)
        check((member.ended is None) == (i not in self.published), f"member {i} ended without a word")
        wakes_at = self.plan.deadline + 1 if member.wakeup is None else member.wakeup
        check(member.gone or wakes_at <= self.plan.deadline, f"member {i} sleeps through its deadline")

    def read(self, i: int, frame: Frame) -> None:
        """The sender task of member i reaches this record."""
        if frame.is_read:
            return
        frame.is_read = True
        action, member, vault = frame.action, self.members[i], self.vaults[i]
        if isinstance(action, SendPiece):
            frame.value = vault.input if member.may_send_piece(action.chunk, action.version) else None
        elif member.holds(action.chunk, action.version):
            frame.value = vault.slots[action.chunk]

    def _deliver_record(self, i: int, j: int, frame: Frame) -> None:
        self.read(i, frame)
        if frame.value is None:
            return
        member, now, action = self.members[j], self.clocks[j], frame.action
        if isinstance(action, SendPiece):
            member.wants_piece(i, action.chunk, action.version)
            member.on_piece(now, i, action.chunk, action.version, frame.value)
        else:
            self.sent["duplicate"] += member.holds(action.chunk, action.version)
            self.sent["too early"] += action.version > member._agreement.plan.epoch
            member.wants_result(i, action.chunk, action.version)
            member.on_result(now, i, action.chunk, action.version, action.contributors, frame.value)

    def _is_open(self, i: int, to: int) -> bool:
        check(to != i, "a member talks to itself")
        return to not in self.dead and to not in self.gone and frozenset((i, to)) not in self.over

    def _end(self, i: int, j: int, n_control: int, n_data: int) -> None:
        link, pair = self.links[i, j], frozenset((i, j))
        self.links[j, i] = Link()
        if pair in self.over:
            return
        self.over.add(pair)
        del link.control[n_control:], link.data[n_data:]
        for frame in link.data:
            self.read(i, frame)
        link.is_over = True

    def _count(self, i: int, action: Action) -> None:
        if getattr(action, "to", None) in self.dead:  # whoever has not noticed a death sends once more
            return
        match action:
            case Send(_, message):
                self.sent[type(message).__name__] += 1
                self.sent["control"] += 1
            case SendPiece(_, _, version):
                self.sent["redone piece" if version else "piece"] += 1
            case SendResult(to, chunk, version):
                delivery = i, to, chunk, version
                if self._closers.setdefault((chunk, version), i) != i or delivery in self._first_hand:
                    self.sent["forwarded result"] += 1
                else:
                    self._first_hand.add(delivery)
                    self.sent["redone result" if version else "result"] += 1

    # checks

    def _check_closed(self, i: int, action: SendResult) -> None:
        content = action.contributors, self.vaults[i].slots[action.chunk]
        self._check_exact(action.chunk, *content)
        first = self._closed.setdefault((action.chunk, action.version), content)
        check(first == content, f"chunk {action.chunk} has two versions {action.version}")

    def _check_exact(self, chunk: int, contributors: int, value: int | None) -> None:
        check(value == decode(contributors), f"I1: chunk {chunk} says {contributors:#b} and is {value}")
        check(contributors and not contributors & ~self.plan.senders, f"I1: {contributors:#b} are not all senders")

    def _publish(self, i: int) -> Result:
        masks, slots = self.members[i].chunk_contributors, self.vaults[i].slots
        result = [(masks[chunk], slots.get(chunk)) for chunk in range(self.plan.n_chunks)]
        for chunk, content in enumerate(result):
            self._check_exact(chunk, *content)
        for j, other in self.published.items():
            check(other is None or other == result, f"I2: members {j} and {i} succeed with {other} and {result}")
        self.vaults[i].input = GARBAGE
        return result

    def check_end(self) -> None:
        """After the run: nothing published was written again, and every member tells it as it is."""
        for i, result in self.published.items():
            member, vault = self.members[i], self.vaults[i]
            check(not vault.accumulators, f"member {i} leaves an accumulator behind")
            if result is None:
                check(member.reason, f"I5: member {i} fails without a reason")
                continue
            check(
                [(member.chunk_contributors[c], vault.slots[c]) for c in range(len(result))] == result, "I3: rewritten"
            )
            complement = members_of(self.plan.everyone & ~member.contributors)
            check(sorted(member.missing) == list(complement), "I5: missing is not the complement of contributors")
            for j in members_of(member.confirmed):
                check(self.members[j].ended is not Ended.SUCCESS or self.published[j] == result, "I5: confirmed")
