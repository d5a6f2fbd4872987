"""What one peer reads from the rendezvous about its run, and what it writes there."""

import random

import pytest
import trio
from fake_peers import peer, terms
from trio.testing import MockClock

from mpd.config import RoundLimits
from mpd.daemon.rendezvous import MemoryBoard, MemoryRendezvous
from mpd.daemon.roster import RESTATE_S, Roster
from mpd.grid import (
    Cell,
    ShapeRecord,
    axis_of,
    fit,
    line_of,
    on_grid,
    rank_cell,
    roster_key,
    roster_of,
    shape_key,
    slot,
)
from mpd.ids import Endpoint
from mpd.layout import Terms
from mpd.records import RECORDS, Place

pytestmark = pytest.mark.usefixtures("repeatable")

HERE = Endpoint("192.0.2.1", 4747)
LIMITS = RoundLimits()


class Table:
    """Some rosters of one run around one board."""

    def __init__(self, n: int, run_terms: Terms | None = None) -> None:
        self.board = MemoryBoard(trio.current_time)
        self.terms = run_terms or terms(3)
        self.rendezvous = [MemoryRendezvous(self.board, peer(i)) for i in range(n)]
        self.rosters = [self.roster(i) for i in range(n)]

    def roster(self, index: int, run_terms: Terms | None = None) -> Roster:
        rng = random.Random(index)
        return Roster("run", run_terms or self.terms, peer(index), self.rendezvous[index], LIMITS, rng)

    def record(self, n_peers: int) -> ShapeRecord:
        shape = fit(n_peers, 3)
        return ShapeRecord(1, n_peers, shape, self.terms.digest, roster_of(peer(i) for i in range(n_peers)))

    async def stand(self, index: int, record: ShapeRecord, number: int, cell: Cell) -> None:
        """Announce a peer where it stands for round `number`."""
        axis = axis_of(number, record.shape)
        key = slot("run", record, axis, line_of(cell, axis))
        await self.rosters[index].stand(key, HERE, number, cell)


async def pass_time(seconds: float) -> None:
    await trio.sleep_until(trio.current_time() + seconds)


async def test_the_roster_tells_peers_with_our_terms_from_strangers(autojump_clock: MockClock) -> None:
    table = Table(4)
    table.rosters[2] = table.roster(2, terms(5))
    for roster in table.rosters[:3]:
        await roster.announce(HERE)
    await table.rendezvous[3].announce(roster_key("run"), b"nonsense", 60)
    await table.rosters[0].read()
    assert set(table.rosters[0].others) == {peer(1)}
    assert set(table.rosters[0].strangers) == {peer(2)}
    assert table.rosters[0].others[peer(1)].endpoint == HERE


async def test_who_is_not_live_does_not_count(autojump_clock: MockClock) -> None:
    table = Table(3)
    for roster in table.rosters:
        await roster.announce(None)
    table.rosters[0].is_live = lambda seen: seen.peer != peer(1)
    await table.rosters[0].read()
    assert set(table.rosters[0].others) == {peer(2)}
    assert table.rosters[0].others[peer(2)].endpoint is None


async def test_the_smallest_id_writes_the_shape_once_the_roster_is_quiet(autojump_clock: MockClock) -> None:
    table = Table(3)
    for roster in table.rosters[:2]:
        await roster.announce(HERE)
    for _ in range(4):
        for roster in table.rosters[:2]:
            await roster.read()
            assert await roster.find_shape() is None
        await pass_time(0.2)
    await table.rosters[2].announce(HERE)
    await table.rosters[0].read()
    await pass_time(0.9)
    assert await table.rosters[0].find_shape() is None
    await pass_time(0.2)
    await table.rosters[1].read()
    assert await table.rosters[1].find_shape() is None  # it is not the smallest
    await table.rosters[0].read()
    record = await table.rosters[0].find_shape()
    assert record == table.record(3)
    assert await table.rosters[1].find_shape() == record


async def test_alone_nobody_writes_a_shape(autojump_clock: MockClock) -> None:
    table = Table(1)
    await table.rosters[0].announce(HERE)
    await pass_time(10)
    await table.rosters[0].read()
    assert await table.rosters[0].find_shape() is None


async def test_of_several_shape_records_the_newest_with_our_terms_counts(autojump_clock: MockClock) -> None:
    table = Table(6)
    key = shape_key("run", table.terms.digest)
    newest = ShapeRecord(3, 9, (2, 2), table.terms.digest)
    values = [
        RECORDS.encode(ShapeRecord(2, 9, (2, 2), table.terms.digest)),
        RECORDS.encode(newest),
        RECORDS.encode(ShapeRecord(9, 9, (2, 2), b"x" * 32)),
        RECORDS.encode(ShapeRecord(9, 9, (2, 3), table.terms.digest)),
        b"nonsense",
        RECORDS.encode(Place("h", 1, table.terms.digest)),
    ]
    for rendezvous, value in zip(table.rendezvous, values, strict=True):
        await rendezvous.announce(key, value, 60)
    assert await table.rosters[0].find_shape() == newest


async def test_three_peers_keep_the_shape(autojump_clock: MockClock) -> None:
    table = Table(6)
    record = table.record(6)
    for roster in table.rosters:
        await roster.announce(HERE)
    for roster in table.rosters:
        await roster.read()
        await roster.keep_shape(record)
    key = shape_key("run", table.terms.digest)
    assert [r.publisher for r in await table.rendezvous[5].seek(key)] == [peer(0), peer(1), peer(2)]
    table.rendezvous[0].close()
    await table.rosters[3].read()
    await table.rosters[3].keep_shape(record)
    assert [r.publisher for r in await table.rendezvous[5].seek(key)] == [peer(1), peer(2), peer(3)]
    for roster in table.rosters[1:]:
        await roster.withdraw()
    assert await table.rendezvous[5].seek(key) == ()
    assert await table.rendezvous[5].seek(roster_key("run")) == ()


async def test_who_is_in_the_roster_takes_its_rank(autojump_clock: MockClock) -> None:
    table = Table(9)
    record = table.record(9)
    places = [await roster.first_place(record) for roster in table.rosters]
    assert places == [(rank_cell(rank, record.shape, 9), 0) for rank in range(9)]


async def test_a_record_without_roster_still_gives_ranks_if_the_count_is_ours(autojump_clock: MockClock) -> None:
    table = Table(9)
    for roster in table.rosters:
        await roster.announce(HERE)
    for roster in table.rosters:
        await roster.read()
    record = ShapeRecord(1, 9, fit(9, 3), table.terms.digest)
    assert [(await roster.first_place(record))[0] for roster in table.rosters] == [
        rank_cell(rank, record.shape, 9) for rank in range(9)
    ]


async def test_a_newcomer_takes_the_emptiest_line_of_the_round_that_most_are_in(autojump_clock: MockClock) -> None:
    table = Table(10)
    record = table.record(9)
    assert record.shape == (2, 2)
    for index in range(6):
        await table.stand(index, record, 5, (0, 0))  # the line (0, *) is crowded in rounds along axis 1
    await table.stand(6, record, 5, (1, 0))
    await table.stand(7, record, 9, (1, 1))
    cell, number = await table.rosters[9].first_place(record)
    assert number == 5
    assert on_grid(cell, record.shape)
    assert cell[0] == 1


async def test_a_rank_that_comes_late_joins_the_round_of_its_line(autojump_clock: MockClock) -> None:
    table = Table(9)
    record = table.record(9)
    cell, _ = await table.rosters[0].first_place(record)
    for index in (1, 2):
        await table.stand(index, record, 1, cell)
    assert await table.rosters[0].first_place(record) == (cell, 0)  # in the first cycle our line waits for us
    await trio.sleep(RESTATE_S)
    for index in (1, 2):
        await table.stand(index, record, 7, cell)
    assert await table.rosters[0].first_place(record) == (cell, 7)


async def test_the_round_of_a_line_is_that_of_most_peers_and_the_closer_one_of_two(autojump_clock: MockClock) -> None:
    table = Table(9)
    record = table.record(9)
    roster = table.rosters[0]
    assert await roster.find_number(record, (0, 0), near=3) is None
    await table.stand(1, record, 4, (0, 0))
    await table.stand(2, record, 9, (0, 0))
    assert await roster.find_number(record, (0, 0), near=3) == 4
    assert await roster.find_number(record, (0, 0), near=8) == 9
    await table.stand(3, record, 9, (0, 1))
    assert await roster.find_number(record, (0, 0), near=3) == 9
    await table.stand(4, record, (1 << 62) - 1, (0, 0))
    await table.stand(5, record, (1 << 62) - 1, (0, 0))
    await table.stand(6, record, (1 << 62) - 1, (0, 0))
    assert await roster.find_number(record, (0, 0), near=3) == 9  # nobody follows a record to the end of the numbers


async def test_in_one_line_nobody_goes_by_numbers(autojump_clock: MockClock) -> None:
    table = Table(3)
    record = table.record(3)
    await table.stand(1, record, 5, (0,))
    assert await table.rosters[0].find_number(record, (0,), near=0) is None
    assert await table.rosters[0].first_place(record) == ((0,), 0)


async def test_a_peer_stands_in_the_slots_of_its_cell_and_standing_still_is_free(autojump_clock: MockClock) -> None:
    table = Table(2)
    roster, reader = table.rosters[0], table.rosters[1]
    first, second, third = b"1" * 20, b"2" * 20, b"3" * 20
    await roster.stand(first, HERE, 0, (0, 0))
    (before,) = await table.rendezvous[0].seek(first)
    await roster.stand(first, HERE, 0, (0, 0))
    await roster.stand(second, HERE, 1, (0, 0), {first, second})
    await roster.stand(first, HERE, 2, (0, 0), {first, second})
    assert (await table.rendezvous[0].seek(first)) == (before,)  # who comes there will hear the number from us
    await trio.sleep(RESTATE_S)
    await roster.stand(first, HERE, 4, (0, 0), {first, second})
    assert [seen.place.number for seen in await reader.look(first)] == [4]
    assert [seen.place.number for seen in await reader.look(second)] == [1]
    await roster.stand(third, HERE, 5, (0, 1), {first, third})
    assert await reader.look(second) == []
    await roster.stand(third, HERE, 5, (0, 1))
    assert await reader.look(first) == []
    assert [seen.place.cell for seen in await reader.look(third)] == [(0, 1)]
    assert await roster.look(third) == []  # oneself is nobody else
    await roster.withdraw()
    assert await reader.look(third) == []


async def test_who_stands_nowhere_is_still_on_the_roster() -> None:
    table = Table(2)
    record = ShapeRecord(1, 2, (1,), terms().digest, b"")
    for index in range(2):
        await table.rosters[index].announce(HERE)
        await table.stand(index, record, 3, (0,))
    key = next(iter(table.rosters[0]._stands))
    await table.rosters[0].stand_nowhere()
    await table.rosters[0].stand_nowhere()
    assert [seen.peer for seen in await table.rosters[1].look(key)] == []
    await table.rosters[1].read()
    assert list(table.rosters[1].others) == [table.rosters[0].own]
