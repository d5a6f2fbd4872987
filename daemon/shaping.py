"""Which shape record a run goes by here, which one comes next, and when: the elastic side of the grid.

What the cycles count goes into an `Elastic` (mpd/elastic.py); when it asks for another grid and it is up to this peer,
the record is written into the rendezvous. Then everybody has to go over to it at the same time, or there are two swarms
for a while. So whoever has read a newer record tells of it in the first round of a cycle, and whoever hears of one
passes it on in the next: after the last round of that cycle all who took part in it know, since a cycle brings
everything to everybody. They read the record meanwhile, and begin the next cycle in the new grid. Whoever has missed
that finds nobody, or meets somebody who is there already, and follows as soon as it has read the record.

What is told is a number that makes us look, no more: what we go by, we have read, and it has to be believable.
"""

import math
import statistics
from typing import Any

import trio

from mpd.elastic import CycleCount, Elastic
from mpd.grid import MAX_ROSTER, Cell, ShapeRecord, axis_of, newer
from mpd.layout import Terms

from .contacts import Contacts
from .roster import Roster

_NEARLY = 0.9
_NEWS_S = 0.6  # how long a cycle may wait for a record that others have read; its line waits for us for a second
_LATE_S = 1.0  # how long a line waits for its members in the midst of a cycle when others have gone over
_DESERTED_S = 1.0  # between two looks because nobody is there
_IN_VAIN_S = 10.0  # so long nobody is waited for again after a record that was not there


class Shaping:
    """The shapes of one run as this peer follows them.

    `stirred` is set, and replaced by a new event, when `look` has something to do at once. `is_settled` says whether
    the lines of this cycle are of the sizes that the grid expects.
    """

    def __init__(self, terms: Terms, roster: Roster, contacts: Contacts) -> None:
        self.record: ShapeRecord | None = None
        self.successor: ShapeRecord | None = None  # newer than `record`, and believable
        self.stirred = trio.Event()
        self._terms = terms
        self._roster = roster
        self._contacts = contacts
        self._elastic = Elastic(terms.group_size)
        self._heard = 0  # the epoch to which others go over when this cycle ends, or have gone over
        self._there = 0  # the newest epoch in which somebody says that it stands
        self._looked = trio.Event()
        self._looked_at = -math.inf
        self._is_urgent = False
        self._vain_until = -math.inf
        self._sizes: list[tuple[int, int]] = []  # of the lines of this cycle: members, and peers at that rate
        self._n_written = 0
        self._last_counted: float | None = None  # heads of the last cycle, or peers if its lines are typical
        self._counted_all = False  # the last cycle has counted as many peers as its shape is for
        self.is_settled = True

    # ------------------------------------------------------------------------------------------------- what is counted

    def note_round(self, number: int, n_members: int) -> None:
        """A round of this cycle has had a line with so many members, or (1) no group."""
        if self.record is not None:
            shape = self.record.shape
            n_lines = math.prod(shape) // shape[axis_of(number, shape)]
            self._sizes.append((n_members, n_members * n_lines))

    def note_cycle(self, heads: int, *, is_certified: bool) -> None:
        """A cycle has ended; `heads` is how many peers it has counted, if that is certified."""
        if self.record is None or not self._sizes:
            return
        sizes, self._sizes = self._sizes, []
        # Most lines of a swarm that has come apart are short. Who was only late itself has missed one of them.
        self._last_counted = heads if is_certified else statistics.median(peers for _, peers in sizes)
        self._counted_all = is_certified and heads == self.record.n_peers
        if not is_certified:
            heads = round(sum(peers for _, peers in sizes) / len(sizes))
            if len(self._roster.others) < MAX_ROSTER:  # else they are more than can be seen
                heads = min(heads, len(self._roster.others) + 1)
        had_finished = self._elastic.has_finished_a_cycle
        self._elastic.note(trio.current_time(), CycleCount(heads, is_certified, max(size for size, _ in sizes)))
        if not had_finished or (self.successor is None and self._may_write()):
            self._stir()

    def begin_cycle(self) -> None:
        """An exact cycle begins: decide how long its lines wait, the same for all its rounds."""
        self.is_settled = self._has_settled()

    def is_back(self) -> None:
        """A peer that had gone is linked again: see who is there."""
        self._stir()

    def _has_settled(self) -> bool:
        """Return whether lines have the sizes that the grid expects, and the last cycle has counted nearly all.

        Balance is the work of a table for so many peers: with more or fewer, lines are not quite even.
        """
        record, n_announced = self.record, len(self._roster.others) + 1
        if record is None or n_announced > MAX_ROSTER:
            return True  # they are more than can be seen, so nobody knows better
        if self._counted_all and n_announced <= record.n_peers:
            return True  # whom a cycle has counted was there, whatever one lookup shows
        is_counted = self._last_counted is None or self._last_counted >= _NEARLY * n_announced
        return is_counted and n_announced == record.n_peers

    @property
    def counted(self) -> int:
        """How many peers the last cycles have counted for certain; 0: nobody knows."""
        return self._elastic.n_peers if self._elastic.is_certified else 0

    # ---------------------------------------------------------------------------------------------------- what is told

    def to_tell(self, number: int) -> int:
        """Return the epoch that a ticket for round `number` names: of the record to come, or 0."""
        record, successor = self.record, self.successor
        assert record is not None
        begins_cycle = axis_of(number, record.shape) == 0
        told = self._heard
        if successor is not None and begins_cycle:
            told = max(told, successor.epoch)
        return told if told > record.epoch else 0

    def hear(self, epoch: int, *, is_there: bool = False) -> None:
        """Somebody goes, or the members of our round will go, by a record with this epoch; or somebody `is_there`."""
        if is_there:
            self._there = max(self._there, epoch)
        if self.record is not None and epoch > max(self.record.epoch, self._heard):
            self._heard = epoch
            if self._is_behind and trio.current_time() >= self._vain_until:
                self._stir()

    def is_deserted(self) -> None:
        """A step has found nobody: perhaps they are all in another grid, and there is nobody to wait for here."""
        if self.successor is not None:
            self._heard = max(self._heard, self.successor.epoch)
        if trio.current_time() - self._looked_at > _DESERTED_S:
            self._stir()

    # ---------------------------------------------------------------------------------------------------- what is read

    async def look(self, record: ShapeRecord) -> None:
        """Find out whether there is another record; write one if it is up to us; keep the newest one published."""
        self._is_urgent = False
        self._looked_at = trio.current_time()
        known = self.successor or record
        found = await self._roster.newest_shape(known)
        if found is not None and newer(found, known) and not found.is_same_grid(known):
            self.successor = known = found
        lived_in = max((seen.place.epoch for seen in self._roster.others.values()), default=0)
        if known.epoch <= lived_in:
            self.hear(known.epoch)
        if known is record and self._may_write():
            known = await self._write()
        await self._roster.keep_shape(known)
        if self._elastic.has_finished_a_cycle:
            await self._roster.has_finished(record.epoch)
        self._looked.set()
        self._looked = trio.Event()

    async def _write(self) -> ShapeRecord:
        peers = [self._roster.own, *self._roster.others]
        record = self._elastic.successor([bytes(peer) for peer in peers])
        await self._roster.publish_shape(record)
        self.successor = record
        self._n_written += 1
        return record

    def _may_write(self) -> bool:
        return self._elastic.wants_another(trio.current_time(), self._n_before())

    def _n_before(self) -> int:
        """Return how many peers should write rather than we."""
        epoch = self.record.epoch if self.record is not None else 0
        others = self._roster.others.values()
        return sum(seen.peer < self._roster.own and seen.place.epoch == epoch for seen in others)

    def call_everybody(self) -> None:
        """If it may soon be up to us to write, find out who is still there: records outlive those who made them."""
        others = self._roster.others
        if self._elastic.is_restless and len(others) < MAX_ROSTER and not self._n_before():
            for seen in others.values():
                self._contacts.note(seen)
                self._contacts.call(seen.peer)

    @property
    def is_urgent(self) -> bool:
        """Whether `look` should be called at once."""
        return self._is_urgent

    @property
    def is_restless(self) -> bool:
        """Whether `look` should be called soon."""
        return self._elastic.is_restless and not self._n_before()

    # ------------------------------------------------------------------------------------------------ what is followed

    async def next_place(self, deadline: float) -> tuple[ShapeRecord, Cell, int] | None:
        """A cycle is about to begin: return the record to begin it in, and our place there; None to stay."""
        now = trio.current_time()
        if self._is_behind and now >= self._vain_until:
            self._stir()
            with trio.move_on_at(min(now + _NEWS_S, now + (deadline - now) / 4)):
                while self._is_behind:
                    await self._looked.wait()
            if self._is_behind:  # whoever spoke of it may have made it up
                self._heard = self._there = 0
                self._vain_until = trio.current_time() + _IN_VAIN_S
        successor = self.successor
        if successor is None or not self._should_follow:
            return None  # those whom we tell in this cycle will come with us in the next
        cell = self._roster.cell_of(successor, self._roster.own)
        if cell is not None:
            # Others begin there at the same time. If they are ahead, they will greet us when they come round again.
            return successor, cell, 0
        with trio.move_on_at(min(now + 2 * _NEWS_S, now + (deadline - now) / 2)):
            cell, number = await self._roster.first_place(successor)
            return successor, cell, number
        return None

    def may_leave(self, waited_s: float) -> bool:
        """Whether it is time to leave this grid without a group, having waited so long in our line.

        At once where a cycle begins (infinite). Later some lines end it a little after the others, so somebody has to
        stand in the next grid already, and we to have waited for a while.
        """
        successor = self.successor
        if successor is None or not self._should_follow:
            return False
        return waited_s == math.inf or (self._there >= successor.epoch and waited_s >= _LATE_S)

    @property
    def _should_follow(self) -> bool:
        """Whether others go by a record that we have read, or will when this cycle ends."""
        record, successor = self.record, self.successor
        if record is None or successor is None:
            return False
        return self._heard >= successor.epoch or successor.epoch == record.epoch

    def go_by(self, record: ShapeRecord) -> None:
        """From now on `record` is the one."""
        self.record = record
        self._elastic.adopt(record)
        self._sizes.clear()
        self._last_counted = None
        self._counted_all = False
        if self.successor is not None and not newer(self.successor, record):
            self.successor = None
        if self._heard <= record.epoch:
            self._heard = 0

    @property
    def _is_behind(self) -> bool:
        """Whether others go by a record that we have not read yet."""
        known = self.successor or self.record
        return known is not None and known.epoch < self._heard

    def _stir(self) -> None:
        self._is_urgent = True
        self.stirred.set()
        self.stirred = trio.Event()

    def describe(self) -> dict[str, Any]:
        """Return what `mpd status` tells of this."""
        record, successor, elastic = self.record, self.successor, self._elastic
        return {
            "epoch": record.epoch if record is not None else 0,
            "n_peers": record.n_peers if record is not None else 0,
            "heads": elastic.n_peers,
            "certified": elastic.is_certified,
            "says": elastic.says(),
            "next": list(successor.shape) if successor is not None else None,
            "written": self._n_written,
        }
