"""When a grid is left for another one: rarely, for a reason, by one peer, and for what anybody would have written."""

import math
import random
from dataclasses import replace

import pytest
from core.grid_sim import Swarm, emptiest_cells, rank_cells

from mpd.elastic import (
    COUNTS,
    EASE_CYCLES,
    EPOCH_LEAP,
    HOLD_S,
    HURRY_CYCLES,
    MAX_EPOCH,
    N_FREE,
    CycleCount,
    Elastic,
    believable,
    max_line,
)
from mpd.grid import MAX_PEERS, MAX_ROSTER, ShapeRecord, fit, roster_of

DIGEST = b"d" * 32
PEERS = [bytes([i]) * 20 for i in range(12)]
CYCLE_S = 2.0


def record(n_peers: int, group_size: int = 4, epoch: int = 1) -> ShapeRecord:
    return ShapeRecord(epoch, n_peers, fit(n_peers, group_size), DIGEST)


class Watch:
    """An `Elastic` that is told of cycles which last `cycle_s` each."""

    def __init__(self, n_peers: int, group_size: int = 4, cycle_s: float = CYCLE_S) -> None:
        self.elastic = Elastic(group_size)
        self.elastic.adopt(record(n_peers, group_size))
        self.now, self.cycle_s = 100.0, cycle_s

    def see(self, *counts: CycleCount) -> "Watch":
        for count in counts:
            self.now += self.cycle_s
            self.elastic.note(self.now, count)
        return self

    def wants(self, n_before: int = 0) -> bool:
        return self.elastic.wants_another(self.now, n_before)


def exact(heads: int, largest: int = 4) -> CycleCount:
    return CycleCount(heads, True, largest)


def rough(heads: int, largest: int = 4) -> CycleCount:
    return CycleCount(heads, False, largest)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([], 0),
        ([exact(9)], 9),
        ([exact(9), rough(50), rough(60)], 9),
        ([exact(9), rough(50), rough(60), rough(70)], 60),  # so much has changed that nothing is exact any more
        ([exact(9), exact(11), exact(10)], 10),
        ([exact(9), *[rough(n) for n in (30, 10, 20, 40, 50)]], 30),
        ([rough(8), rough(9)], 8),
    ],
)
def test_the_count_is_the_median_of_the_last_ones_and_certified_ones_come_first(
    counts: list[CycleCount], expected: int
) -> None:
    elastic = Watch(9).see(*counts).elastic
    assert elastic.n_peers == expected
    assert elastic.is_certified == any(count.is_certified for count in counts[-HURRY_CYCLES:])


def test_three_cycles_with_too_few_peers_are_needed_and_one_good_one_starts_again() -> None:
    watch = Watch(12)  # 3 x 3 cells need 10
    watch.see(exact(9), exact(9))
    assert not watch.wants()
    watch.see(*[exact(12)] * COUNTS).see(exact(9), exact(9), exact(9))
    assert not watch.wants()  # the median still says 12
    watch.see(exact(9), exact(9))
    assert watch.wants()
    assert watch.elastic.successor(PEERS[:9]) == ShapeRecord(2, 9, (2, 2), DIGEST, roster_of(PEERS[:9]))


@pytest.mark.parametrize(("n_peers", "wants"), [(8, True), (9, True), (10, False), (12, False), (30, False)])
def test_a_grid_is_left_when_its_cells_are_too_many(n_peers: int, wants: bool) -> None:
    assert Watch(12).see(*[exact(n_peers)] * HURRY_CYCLES).wants() == wants


@pytest.mark.parametrize(("largest", "wants"), [(6, False), (7, False), (8, True), (16, True)])
def test_a_grid_is_left_when_its_lines_are_too_long(largest: int, wants: bool) -> None:
    assert Watch(8).see(*[exact(2 * largest, largest)] * HURRY_CYCLES).wants() == wants


def test_one_group_bears_a_quarter_more_than_it_was_made_for() -> None:
    for n_peers in range(1, 8):
        assert not Watch(6).see(*[exact(n_peers, n_peers)] * 50).wants()
    watch = Watch(6).see(*[exact(8, 8)] * HURRY_CYCLES)
    assert watch.wants()
    assert watch.elastic.successor([]).shape == (2, 2)
    assert max_line(16) == 22


def test_fewer_rounds_are_not_hurried_for() -> None:
    watch = Watch(8).see(*[exact(5)] * (EASE_CYCLES - 1))  # 2 x 2 cells, and one group would do
    assert not watch.wants()
    assert watch.see(exact(5)).wants()
    assert watch.elastic.successor([]).shape == (1,)
    assert not Watch(8).see(*[exact(6)] * 50).wants()  # seven would not fit into one group


def test_fast_cycles_are_not_believed_before_some_time_has_passed() -> None:
    watch = Watch(12, cycle_s=0.01).see(*[exact(5)] * 50)
    assert not watch.wants()
    watch.now += HOLD_S
    assert watch.wants()


def test_those_who_come_later_take_over_one_after_the_other() -> None:
    watch = Watch(12)
    first = []
    for n_before in range(4):
        while not watch.wants(n_before):
            watch.see(exact(5))
        first.append(round((watch.now - 100) / CYCLE_S))
    assert first == [HURRY_CYCLES * n for n in range(1, 5)]


def test_a_new_record_forgets_what_was_counted() -> None:
    watch = Watch(12).see(*[exact(5)] * 5)
    assert watch.elastic.has_finished_a_cycle
    watch.elastic.adopt(watch.elastic.successor([]))
    assert not watch.elastic.has_finished_a_cycle
    assert not watch.wants()
    assert watch.elastic.n_peers == 0


def test_two_writers_with_one_count_write_one_grid() -> None:
    one, other = (Watch(12).see(*[exact(7)] * 3).elastic for _ in range(2))
    assert one.successor(PEERS[:7]).is_same_grid(other.successor(PEERS[2:9]))


def test_whoever_has_no_shape_yet_wants_none() -> None:
    elastic = Elastic(4)
    elastic.note(0.0, exact(5))
    assert not elastic.wants_another(100.0)
    assert elastic.says() == "the run has no shape yet"


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ([], "no cycle has ended in this shape yet"),
        ([exact(12)], "the shape fits 12 peers; with 3 fewer it would not"),
        ([exact(10)], "the shape fits 10 peers; with 1 fewer it would not"),
        ([rough(12)], "the shape fits about 12 peers; with 3 fewer it would not"),
        ([exact(9)] * 2, "9 peers are too few for 9 cells: 2 of 3 cycles in a row that ask for another shape"),
        (
            [exact(32, 11)],
            "a line of 11 peers is too long for groups of 4: 1 of 3 cycles in a row that ask for another shape",
        ),
    ],
)
def test_it_says_what_it_thinks(counts: list[CycleCount], says: str) -> None:
    assert Watch(12).see(*counts).elastic.says() == says


def test_it_says_when_fewer_rounds_would_do() -> None:
    says = "5 peers would do with fewer rounds per cycle: 2 of 20 cycles in a row"
    assert Watch(8).see(exact(5), exact(5)).elastic.says() == says
    assert Watch(6).see(exact(6, 6)).elastic.says() == "the shape fits 6 peers"


# ------------------------------------------------------------------------------------------------- what is believed


def test_a_grid_that_nobody_fits_is_not_believed() -> None:
    wrong = replace(record(12), shape=(2, 2))
    assert believable([record(12), wrong], 4, 12) == [record(12)]
    assert believable([record(12)], 8, 12) == []


def test_epochs_lead_on_in_steps() -> None:
    steps = [record(12, epoch=epoch) for epoch in (3, 4, 3 + EPOCH_LEAP, 4 + 2 * EPOCH_LEAP, 2**61)]
    assert believable(steps, 4, 12) == steps[:3]
    assert believable(reversed(steps[:4]), 4, 12) == steps[:3]
    assert believable([record(12, epoch=MAX_EPOCH)], 4, 12) == []


def test_a_record_may_not_speak_of_far_more_peers_than_there_are() -> None:
    def believed(n_peers: int, n_known: int) -> bool:
        return bool(believable([record(n_peers, 16)], 16, n_known))

    assert believed(N_FREE, 2)
    assert not believed(N_FREE + 1, 2)
    assert believed(400, 100)
    assert not believed(401, 100)
    assert believed(MAX_PEERS, MAX_ROSTER + 1)  # more than can be seen


# --------------------------------------------------------------------------------------------------- whole swarms


def test_swarms_that_grow_and_shrink_are_exact_again_in_the_second_cycle_of_a_new_grid() -> None:
    rng = random.Random(3)
    n_changes = 0
    for group_size, sizes in [(4, (8, 32, 12, 6, 40)), (16, (16, 300, 60, 20)), (8, (9, 90, 30, 12))]:
        elastic, epoch = Elastic(group_size), 1
        swarm = Swarm(rng, fit(sizes[0], group_size), rank_cells(sizes[0], fit(sizes[0], group_size)))
        now = 0.0
        elastic.adopt(record(sizes[0], group_size))
        for n_peers in sizes[1:]:
            del swarm.peers[n_peers:]
            while len(swarm.peers) < n_peers:
                swarm.peers.append(swarm.newcomer(emptiest_cells(rng, 1, swarm.shape)[0]))
            for _ in range(COUNTS + HURRY_CYCLES + 1):
                result = swarm.cycle()
                now += CYCLE_S
                certified, heads = result.ends[0][1]
                assert not certified or heads == n_peers
                estimate = heads if certified else min(n_peers, swarm.largest * math.prod(swarm.shape[:-1]))
                elastic.note(now, CycleCount(estimate, certified, swarm.largest))
                if elastic.wants_another(now):
                    break
            else:
                assert swarm.shape == fit(n_peers, group_size) or elastic.n_peers >= 1.05 * math.prod(swarm.shape)
                continue
            n_changes += 1
            epoch += 1
            after = elastic.successor([])
            assert after.epoch == epoch
            cells = (
                rank_cells(n_peers, after.shape)
                if after.n_peers == n_peers
                else emptiest_cells(rng, n_peers, after.shape)
            )
            values = [peer.value for peer in swarm.peers]
            swarm = Swarm(rng, after.shape, cells)
            swarm.record_n = after.n_peers
            for peer, value in zip(swarm.peers, values, strict=True):
                peer.value = value
            elastic.adopt(after)
            swarm.cycle()
            assert swarm.cycle().is_exact
    assert n_changes >= 8


@pytest.mark.parametrize(("n_peers", "group_size"), [(12, 8), (64, 16), (64, 8), (1000, 32), (1000, 16), (17, 16)])
def test_a_swarm_whose_peers_come_and_go_keeps_its_shape(n_peers: int, group_size: int) -> None:
    """Lifetimes of an hour, a cycle each 30 s, for a day: a fit to every count would change far more often."""
    rng = random.Random(n_peers)
    elastic = Elastic(group_size)
    now, here, refits = 0.0, n_peers, 0
    current = record(n_peers, group_size)
    elastic.adopt(current)
    n_reshapes, always = 0, fit(n_peers, group_size)
    for _ in range(24 * 120):
        now += 30.0
        gone = sum(rng.random() < 30 / 3600 for _ in range(here))
        come = sum(rng.random() < 30 / 3600 for _ in range(n_peers))
        here = max(2, here - gone + come)
        shape = current.shape
        largest = math.ceil(here * max(shape) / math.prod(shape))
        elastic.note(now, CycleCount(here, True, largest))
        if elastic.wants_another(now):
            current = elastic.successor([])
            elastic.adopt(current)
            n_reshapes += 1
        refits += fit(here, group_size) != always
        always = fit(here, group_size)
    assert n_reshapes / 24 <= 1
    assert refits / 24 >= 1.5
