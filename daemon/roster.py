"""How a peer enters a run: the roster of those who want it, the shape records, and its first cell in each.

Everything here goes through the rendezvous and is a hint until a link confirms it. While a run has no shape record,
the smallest id of a roster that has been quiet for a while writes one; everybody takes its rank in that roster as first
cell, so that the very first cycle is balanced. Whoever comes later takes the emptiest of four cells and joins the phase
in which its line is; its own counter would split the swarm for ever. When the shape changes (daemon/shaping.py), the
same holds for the new one.

A peer announces itself in the slots of its cell, and the three smallest ids keep the shape record published.
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import trio

from mpd.config import RoundLimits
from mpd.elastic import believable
from mpd.errors import PeerError
from mpd.grid import (
    Cell,
    Line,
    ShapeRecord,
    axis_of,
    emptiest,
    fit,
    line_of,
    newer,
    rank_cell,
    roster_key,
    roster_of,
    sample_cells,
    shape_key,
    slot,
)
from mpd.ids import Endpoint, PeerId
from mpd.layout import Terms
from mpd.records import RECORDS, Place

from .rendezvous import Record, Rendezvous

_SHAPE_KEEPERS = 3  # so many vanish at once only if the run as good as ends
RESTATE_S = 5.0  # how old the number of an announcement may be
_MAX_NUMBER = 1 << 60  # no run gets there; a record that says so must not lead anybody near the end of the numbers


@dataclass(frozen=True, slots=True)
class Seen:
    """A peer as its record shows it."""

    peer: PeerId
    place: Place
    seq: int

    @property
    def endpoint(self) -> Endpoint | None:
        """Where the peer can be dialled; None: nowhere."""
        return Endpoint(self.place.host, self.place.port) if self.place.port else None


@dataclass(frozen=True, slots=True)
class _Stand:
    """What was announced in a slot, and when; None: something may have been."""

    place: Place | None
    since: float


class Roster:
    """This peer's view of one run in the rendezvous."""

    def __init__(
        self, run: str, terms: Terms, own: PeerId, rendezvous: Rendezvous, limits: RoundLimits, rng: random.Random
    ) -> None:
        self.run = run
        self.terms = terms
        self.own = own
        self.others: dict[PeerId, Seen] = {}  # peers with our terms
        self.strangers: dict[PeerId, Seen] = {}  # peers that use this run's name with other terms
        self.is_live: Callable[[Seen], bool] = lambda seen: True  # others do not count
        self._rendezvous = rendezvous
        self._limits = limits
        self._rng = rng
        self._members: frozenset[PeerId] = frozenset()
        self._quiet_since = trio.current_time()
        self._kept: ShapeRecord | None = None
        self._stands: dict[bytes, _Stand] = {}
        self._entry: Place | None = None  # how we stand in the roster

    async def announce(self, endpoint: Endpoint | None) -> None:
        """Say that this peer wants to take part."""
        self._entry = self.place(endpoint, 0, ())
        await self._publish(roster_key(self.run), self._entry)

    async def has_finished(self, epoch: int) -> None:
        """Say that this peer has finished a cycle in the shape of this epoch. Costs nothing where it has said so."""
        if self._entry is not None and self._entry.epoch != epoch:
            entry = replace(self._entry, epoch=epoch)
            await self._publish(roster_key(self.run), entry)
            self._entry = entry

    async def withdraw(self) -> None:
        """Take everything back that this peer has announced."""
        keys = [roster_key(self.run), *self._stands]
        if self._kept is not None:
            keys.append(shape_key(self.run, self.terms.digest))
        async with trio.open_nursery() as nursery:
            for key in keys:
                nursery.start_soon(self._rendezvous.withdraw, key)

    async def read(self) -> None:
        """Bring `others` and `strangers` up to date."""
        seen = await self.look(roster_key(self.run))
        mine = self.terms.digest
        self.others = {s.peer: s for s in seen if s.place.digest == mine}
        self.strangers = {s.peer: s for s in seen if s.place.digest != mine}
        members = frozenset(self.others)
        if members != self._members:
            self._members, self._quiet_since = members, trio.current_time()

    async def newest_shape(self, known: ShapeRecord | None = None) -> ShapeRecord | None:
        """Return the shape record of the run that replaces all others, `known` included; None if there is none."""
        found = [known] if known is not None else []
        for record in await self._rendezvous.seek(shape_key(self.run, self.terms.digest)):
            shape = _decode(record)
            if not isinstance(shape, ShapeRecord) or shape.digest != self.terms.digest:
                continue
            if known is None or shape.epoch >= known.epoch:
                found.append(shape)
        newest: ShapeRecord | None = None
        for shape in believable(found, self.terms.group_size, len(self.others) + 1):
            if newest is None or newer(shape, newest):
                newest = shape
        return newest

    async def find_shape(self) -> ShapeRecord | None:
        """Return the shape record of the run; write it if that is up to this peer and the time has come."""
        found = await self.newest_shape()
        if found is None and self._is_writer():
            found = self._first_record()
            await self.keep_shape(found)
        return found

    async def keep_shape(self, record: ShapeRecord) -> None:
        """Publish the record if that is up to this peer too: it must outlive whoever wrote it."""
        n_smaller = sum(peer < self.own for peer in self.others)
        if n_smaller < _SHAPE_KEEPERS and record != self._kept:
            await self.publish_shape(record)

    async def publish_shape(self, record: ShapeRecord) -> None:
        """Publish the record."""
        self._kept = record  # first: a cancelled announcement may have been made
        value = RECORDS.encode(record)
        await self._rendezvous.announce(shape_key(self.run, self.terms.digest), value, self._limits.record_ttl_s)

    def cell_of(self, record: ShapeRecord, peer: PeerId) -> Cell | None:
        """Return the cell with which `peer`, one of those we see, starts under `record`, if that is known."""
        cell = record.first_cell(peer)
        if cell is None and not record.roster and len(self.others) + 1 == record.n_peers:
            cell = rank_cell(sorted([*self.others, self.own]).index(peer), record.shape, record.n_peers)
        return cell

    async def first_place(self, record: ShapeRecord) -> tuple[Cell, int]:
        """Return the cell and the round number with which this peer starts under `record`."""
        cell = self.cell_of(record, self.own)
        if cell is not None:
            number = await self.find_number(record, cell, near=0) or 0
            # In the first cycle other lines may be ahead, but our own waits for us.
            return cell, number if number >= len(record.shape) else 0
        candidates = sample_cells(self._rng, record.shape)
        lines_of: dict[Cell, list[Seen]] = {}

        async def look_at(cell: Cell) -> None:
            lines_of[cell] = await self.lines(record, cell)

        async with trio.open_nursery() as nursery:
            for cell in candidates:
                nursery.start_soon(look_at, cell)
        number = _most_common((seen for cell in candidates for seen in lines_of[cell]), near=0) or 0
        axis = axis_of(number, record.shape)
        counts: Counter[Line] = Counter()
        for cell in candidates:
            lines = lines_of[cell]
            here = sum(seen.place.number == number for seen in lines)
            counts[line_of(cell, axis)] = max(counts[line_of(cell, axis)], here)
        return emptiest(counts, candidates, axis, self._rng), number

    async def find_number(self, record: ShapeRecord, cell: Cell, near: int) -> int | None:
        """Return the number of the round for which most peers of our lines have announced themselves, if any has.

        Of two numbers with equally many peers it is the one closer to `near`.
        """
        if len(record.shape) == 1:
            return None  # one line for ever: nobody there goes by numbers
        return _most_common(await self.lines(record, cell), near)

    async def look(self, key: bytes) -> list[Seen]:
        """Return the other live peers that have announced a place under `key`."""
        found = []
        for record in await self._rendezvous.seek(key):
            place = _decode(record)
            if record.publisher != self.own and isinstance(place, Place) and place.number <= _MAX_NUMBER:
                seen = Seen(record.publisher, place, record.seq)
                if self.is_live(seen):
                    found.append(seen)
        return found

    async def stand(
        self, key: bytes, endpoint: Endpoint | None, number: int, cell: Cell, kept: Collection[bytes] = ()
    ) -> None:
        """Announce this peer in the slot `key`, and in no other than those `kept`, where it comes in other rounds.

        Costs nothing where it stands so already, but for the number, which is brought up to date now and then.
        """
        place = self.place(endpoint, number, cell)
        stand = self._stands.get(key)
        is_old = stand is not None and trio.current_time() - stand.since >= RESTATE_S
        if (
            stand is None
            or stand.place is None
            or replace(stand.place, number=number) != place
            or (is_old and stand.place != place)
        ):
            self._stands[key] = _Stand(None, 0.0)  # first: a cancelled announcement may have been made
            await self._publish(key, place)
            self._stands[key] = _Stand(place, trio.current_time())
        for other in [other for other in self._stands if other != key and other not in kept]:
            await self._rendezvous.withdraw(other)
            del self._stands[other]

    async def stand_nowhere(self) -> None:
        """Take back what `stand` has announced. Costs nothing where there is nothing."""
        for key in list(self._stands):
            await self._rendezvous.withdraw(key)
            del self._stands[key]

    def place(self, endpoint: Endpoint | None, number: int, cell: Cell) -> Place:
        """Return this peer's record."""
        host, port = (endpoint.host, endpoint.port) if endpoint is not None else ("", 0)
        return Place(host, port, self.terms.digest, number, cell)

    async def lines(self, record: ShapeRecord, cell: Cell) -> list[Seen]:
        """Return the peers announced in the lines of `cell`, in all phases."""
        found: dict[int, list[Seen]] = {}

        async def look_at(phase: int) -> None:
            found[phase] = await self.look(slot(self.run, record, phase, line_of(cell, phase)))

        async with trio.open_nursery() as nursery:
            for phase in range(len(record.shape)):
                nursery.start_soon(look_at, phase)
        seen: dict[PeerId, Seen] = {}
        for phase in range(len(record.shape)):
            for other in found[phase]:
                known = seen.get(other.peer)
                if known is None or other.place.number > known.place.number:
                    seen[other.peer] = other
        return list(seen.values())

    async def _publish(self, key: bytes, place: Place) -> None:
        await self._rendezvous.announce(key, RECORDS.encode(place), self._limits.record_ttl_s)

    def _is_writer(self) -> bool:
        quiet_s = trio.current_time() - self._quiet_since
        return bool(self.others) and self.own < min(self.others) and quiet_s >= self._limits.roster_quiet_s

    def _first_record(self) -> ShapeRecord:
        peers = sorted([*self.others, self.own])
        shape = fit(len(peers), self.terms.group_size)
        return ShapeRecord(1, len(peers), shape, self.terms.digest, roster_of(peers))


def _most_common(seen: Iterable[Seen], near: int) -> int | None:
    counts = Counter(one.place.number for one in seen)
    return min(counts, key=lambda number: (-counts[number], abs(number - near)), default=None)


def _decode(record: Record) -> object:
    """Return what a record says; None if it is nonsense, which anybody may publish."""
    try:
        return RECORDS.decode(record.value)
    except PeerError:
        return None
