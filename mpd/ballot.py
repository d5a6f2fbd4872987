"""Plans, and how a group agrees on one: a single-decree Paxos over a small table (Lamport, "Paxos Made Simple", 2001).

A *version* of a chunk is named by the epoch of the plan that called for it: version 0 is written by the chunk's owner,
version e by the member that plan e names. A *plan* is a table chunk -> (version, writer). Plan 0 is BEGIN; a later plan
is decided by its epoch's coordinator, member `epoch % n_members`, from the promises of a majority. Whoever has said
DONE(e) "accepted" table e: the highest accepted table in a majority may already be somebody's published result, so it
is kept as it is. If nobody in a majority accepted anything, no table was ever final and any choice is safe: then the
coordinator keeps what is held, waits for what is still being written, and has the rest redone.

Everything here is a function of its arguments; what comes from peers is checked in the `read_*` functions.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mpd.errors import PeerError
from mpd.messages import Entry, NewPlan, Promise
from mpd.reduce import mask_of, members_of
from mpd.rounds import RoundPlan

MAX_EPOCH = (1 << 32) - 1  # a version travels as 32 bits

TableEntry = tuple[int, int]  # version, writer
Table = tuple[TableEntry, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Table `epoch`. `alive` masks the members that promised it, `holders[chunk]` those known to hold a chunk.

    `cut` masks the members to which its coordinator has no link. They may be alive and well: one broken link says
    nothing about anybody else, so whoever writes under this plan and has a link to one of them waits for it too.
    """

    epoch: int
    table: Table
    alive: int
    holders: Mapping[int, int]
    cut: int = 0

    @property
    def awaited(self) -> int:
        """Mask of the members for whose pieces a writer waits, as far as it has a link to them."""
        return self.alive | self.cut


@dataclass(frozen=True, slots=True)
class Report:
    """What a member promises with: the epoch it said DONE for (-1: none), its table, and bitmaps over the chunks."""

    accepted: int
    table: Table
    held: bytes
    opened: bytes


def first_plan(round_plan: RoundPlan) -> Plan:
    """Return plan 0: every owner writes its chunks and waits for everybody."""
    return Plan(0, tuple((0, owner) for owner in round_plan.owners), round_plan.everyone, {})


def make_bitmap(chunks: Iterable[int], n_chunks: int) -> bytes:
    """Return a bitmap of `n_chunks` bits: bit c % 8 of byte c // 8 stands for chunk c."""
    bitmap = bytearray(-(-n_chunks // 8))
    for chunk in chunks:
        bitmap[chunk >> 3] |= 1 << (chunk & 7)
    return bytes(bitmap)


def has_bit(bitmap: bytes, chunk: int) -> bool:
    """True if `chunk` is in `bitmap`."""
    return bool(bitmap[chunk >> 3] >> (chunk & 7) & 1)


# ---------------------------------------------------------------------------------------------------------- deciding


def decide(round_plan: RoundPlan, epoch: int, reports: Mapping[int, Report], slow: int, in_reach: int) -> Plan:
    """Return plan `epoch` from the reports of at least a redo quorum; its coordinator has links to all `in_reach`.

    Members in `slow` write nothing new, unless nobody else can, and are not waited for as writers. What they report
    binds only if there is no redo quorum without them: any quorum hears of what may have been published, and what only
    they hold would have to come from them.
    """
    alive = mask_of(reports)
    prompt = {member: report for member, report in reports.items() if not slow >> member & 1}
    if len(prompt) < round_plan.redo_quorum or not mask_of(prompt) & round_plan.inbound:
        prompt = dict(reports)
    highest = max(prompt.values(), key=lambda report: report.accepted)
    table = highest.table if highest.accepted >= 0 else _choose_freely(round_plan, epoch, prompt, slow)
    cut = round_plan.everyone & ~(in_reach | alive)
    return Plan(epoch, table, alive, _uneven_holders(table, reports), cut)


def _choose_freely(round_plan: RoundPlan, epoch: int, reports: Mapping[int, Report], slow: int) -> Table:
    able = mask_of(reports) & round_plan.inbound
    writers = members_of(able & ~slow or able)
    table: list[TableEntry] = []
    n_redone = 0
    for chunk in range(round_plan.n_chunks):
        kept = _most_held(chunk, reports) or _still_open(chunk, reports, slow)
        if kept is None:
            kept = (epoch, writers[n_redone % len(writers)])
            n_redone += 1
        table.append(kept)
    return tuple(table)


def _most_held(chunk: int, reports: Mapping[int, Report]) -> TableEntry | None:
    held = Counter(report.table[chunk] for report in reports.values() if has_bit(report.held, chunk))
    return max(held, key=lambda entry: (held[entry], entry)) if held else None


def _still_open(chunk: int, reports: Mapping[int, Report], slow: int) -> TableEntry | None:
    for member, report in reports.items():
        if has_bit(report.opened, chunk) and not slow >> member & 1:
            return report.table[chunk]
    return None


def _uneven_holders(table: Table, reports: Mapping[int, Report]) -> dict[int, int]:
    """Who holds what, for the chunks that some hold and some lack: nobody asks about the others."""
    uneven: dict[int, int] = {}
    for chunk, entry in enumerate(table):
        holders = 0
        for member, report in reports.items():
            if has_bit(report.held, chunk) and report.table[chunk] == entry:
                holders |= 1 << member
        if 0 < holders.bit_count() < len(reports):
            uneven[chunk] = holders
    return uneven


class Attempt:
    """A coordinator's collection of promises for its `epoch`, with its own report to begin with."""

    def __init__(self, epoch: int, me: int, report: Report, slow: int, grace_ends: float) -> None:
        self.epoch = epoch
        self.reports = {me: report}
        self.slow = slow
        self.grace_ends = grace_ends
        self.grace_over = False

    def may_decide(self, linked: int, quorum: int) -> bool:
        """True with everybody's promise, or with a quorum's once the grace time is over."""
        everybody = all(member in self.reports for member in members_of(linked))
        return len(self.reports) >= quorum and (everybody or self.grace_over)


class Tally:
    """Who said DONE for what: each member's latest word, because a later epoch replaces an earlier one."""

    def __init__(self) -> None:
        self._latest: dict[int, tuple[int, bytes]] = {}

    def say(self, member: int, epoch: int, digest: bytes) -> None:
        """Note that `member` holds everything of plan `epoch`."""
        if epoch > self._latest.get(member, (-1, b""))[0]:
            self._latest[member] = epoch, digest

    def at(self, epoch: int) -> int:
        """Mask of the members whose latest DONE is for `epoch`."""
        return mask_of(member for member, (said, _) in self._latest.items() if said == epoch)

    def at_least(self, epoch: int) -> int:
        """Mask of the members whose latest DONE is for `epoch` or later."""
        return mask_of(member for member, (said, _) in self._latest.items() if said >= epoch)

    def dissenter(self, epoch: int, digest: bytes) -> int | None:
        """Return a member that said DONE(`epoch`) for something else than `digest`."""
        for member, said in self._latest.items():
            if said[0] == epoch and said[1] != digest:
                return member
        return None


# ------------------------------------------------------------------------------------------------- tables on the wire


def changes_of(round_plan: RoundPlan, table: Table) -> tuple[Entry, ...]:
    """Return the entries of `table` that differ from plan 0, lowest chunk first."""
    return tuple((chunk, version, writer) for chunk, (version, writer) in enumerate(table) if version)


def read_table(round_plan: RoundPlan, changes: tuple[Entry, ...], newest: int) -> Table:
    """Return the table that `changes` describe, none newer than `newest`. Raises PeerError for anything else."""
    table = [(0, owner) for owner in round_plan.owners]
    previous = -1
    for chunk, version, writer in changes:
        if not previous < chunk < round_plan.n_chunks:
            raise PeerError(f"a table lists chunk {chunk} after {previous}: rising numbers below {len(table)} expected")
        if not 0 < version <= newest:
            raise PeerError(f"a table names version {version} of chunk {chunk}: 1 to {newest} expected")
        if not (0 <= writer < round_plan.n_members and round_plan.inbound >> writer & 1):
            raise PeerError(f"a table names writer {writer} of chunk {chunk}: a member that can be dialled expected")
        table[chunk] = version, writer
        previous = chunk
    return tuple(table)


def write_plan(round_plan: RoundPlan, plan: Plan) -> NewPlan:
    """Return the message that tells `plan`."""
    changes, holders = changes_of(round_plan, plan.table), tuple(sorted(plan.holders.items()))
    return NewPlan(plan.epoch, plan.alive, changes, holders, plan.cut)


def read_plan(round_plan: RoundPlan, message: NewPlan) -> Plan:
    """Return the plan in `message`. Raises PeerError if no coordinator of this round can have decided it."""
    epoch, alive = message.epoch, message.alive
    check_epoch(epoch)
    if alive & ~round_plan.everyone or alive.bit_count() < round_plan.redo_quorum:
        raise PeerError(f"plan {epoch} was promised by {alive:#x}: {round_plan.redo_quorum} members expected")
    if not alive >> epoch % round_plan.n_members & 1:
        raise PeerError(f"plan {epoch} was not promised by its own coordinator")
    if message.cut & (alive | ~round_plan.everyone):
        raise PeerError(f"plan {epoch} calls {message.cut:#x} cut off: members that did not promise it expected")
    table = read_table(round_plan, message.changes, epoch)
    if any(version == epoch and not alive >> writer & 1 for version, writer in table):
        raise PeerError(f"plan {epoch} has a chunk redone by a member that did not promise it")
    previous = -1
    for chunk, holders in message.holders:
        if not previous < chunk < round_plan.n_chunks or holders & ~alive:
            raise PeerError(f"plan {epoch} lists holders {holders:#x} of chunk {chunk}: promisers, chunks rising")
        previous = chunk
    return Plan(epoch, table, alive, dict(message.holders), message.cut)


def write_promise(round_plan: RoundPlan, epoch: int, report: Report) -> Promise:
    """Return the message that grants `epoch` with `report`."""
    changes = changes_of(round_plan, report.table)
    return Promise(epoch, True, epoch, report.accepted, changes, report.held, report.opened)


def read_report(round_plan: RoundPlan, sender: int, message: Promise) -> Report:
    """Return the report in a granting `message`. Raises PeerError if it contradicts itself or the round."""
    if message.accepted >= message.epoch:
        raise PeerError(f"it promises {message.epoch} after DONE for {message.accepted}")
    table = read_table(round_plan, message.changes, message.epoch - 1)
    for bitmap in (message.held, message.opened):
        spare_bits = -round_plan.n_chunks % 8
        if len(bitmap) * 8 - spare_bits != round_plan.n_chunks or bitmap[-1] >> (8 - spare_bits):
            raise PeerError(f"it sends a bitmap of {len(bitmap)} bytes for {round_plan.n_chunks} chunks")
    if any(has_bit(message.opened, chunk) and writer != sender for chunk, (_, writer) in enumerate(table)):
        raise PeerError("it claims to be writing a chunk that its table gives to another member")
    return Report(message.accepted, table, message.held, message.opened)


def check_epoch(epoch: int) -> None:
    """Raise PeerError unless `epoch` can be the number of a plan."""
    if not 0 <= epoch <= MAX_EPOCH:
        raise PeerError(f"attempt {epoch}: a number from 0 to {MAX_EPOCH} expected")
