"""The grid is balanced for every number of peers: shapes by exhaustive search, moves by the table."""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from core.grid_sim import (
    emptiest_cells,
    line_sizes,
    moved,
    random_cells,
    rank_cells,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mpd.grid import (
    MAX_PEERS,
    MAX_ROSTER,
    Shape,
    ShapeRecord,
    axis_of,
    emptiest,
    fit,
    line_of,
    newer,
    next_cell,
    on_grid,
    rank_cell,
    roster_key,
    roster_of,
    sample_cells,
    seating,
    shape_key,
    slot,
    table,
)

GROUP_SIZES = (4, 8, 16, 32)


def largest_line(n_peers: int, shape: Shape) -> int:
    return math.ceil(n_peers * max(shape) / math.prod(shape))


def shapes_that_fit(n_peers: int, cap: int, n_axes: int) -> list[Shape]:
    """Every shape of `n_axes` with lines up to `cap` and a tenth more peers than cells, by looking at all of them."""
    longest = int(n_peers / 1.1) >> (n_axes - 1)  # the other axes have two cells at least
    return [
        shape
        for shape in itertools.combinations_with_replacement(range(2, longest + 1), n_axes)
        if math.prod(shape) * 1.1 <= n_peers and largest_line(n_peers, shape) <= cap
    ]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_fit_bounds_lines_and_leaves_headroom_for_every_number_of_peers(group_size):
    for n_peers in range(1, 2001):
        shape = fit(n_peers, group_size)
        if n_peers <= group_size + 2:
            assert shape == (1,)
        else:
            assert largest_line(n_peers, shape) <= group_size + 2
            assert math.prod(shape) * 1.1 <= n_peers
            assert list(shape) == sorted(shape)


@pytest.mark.parametrize(
    ("group_size", "ranges"),
    [
        (4, {1: (2, 6), 2: (7, 30), 3: (25, 150), 4: (97, 750), 5: (385, 1920), 6: (1537, 2000)}),
        (8, {1: (2, 10), 2: (11, 90), 3: (81, 810), 4: (491, 2000)}),
        (16, {1: (2, 18), 2: (19, 288), 3: (271, 2000)}),
        (32, {1: (2, 34), 2: (35, 1020), 3: (987, 2000)}),
    ],
)
def test_fit_uses_the_known_number_of_axes(group_size, ranges):
    found: dict[int, list[int]] = {}
    for n_peers in range(2, 2001):
        found.setdefault(len(fit(n_peers, group_size)), []).append(n_peers)

    assert {n_axes: (members[0], members[-1]) for n_axes, members in found.items()} == ranges


@pytest.mark.parametrize("group_size", [2, 3, *GROUP_SIZES])
def test_fit_agrees_with_exhaustive_search(group_size):
    for n_peers in range(group_size + 3, 260, 7):
        shape = fit(n_peers, group_size)
        if group_size == 2 and n_peers == 17:  # the one number that no shape serves
            continue
        caps = range(group_size, group_size + 3)
        for n_axes in range(2, len(shape)):
            assert not shapes_that_fit(n_peers, group_size + 2, n_axes)
        best = next(found for cap in caps if (found := shapes_that_fit(n_peers, cap, len(shape))))
        assert math.prod(shape) == min(map(math.prod, best))
        assert shape in best


def test_fit_of_small_swarms():
    assert [fit(n, 3) for n in (1, 5, 8, 9, 11)] == [(1,), (1,), (2, 2), (2, 2), (3, 3)]


def test_fit_lets_lines_grow_where_no_integers_fit():
    assert not any(shapes_that_fit(17, 4, n_axes) for n_axes in range(2, 5))
    assert fit(17, 2) == (2, 2, 2)
    assert largest_line(17, (2, 2, 2)) == 5


@given(n_peers=st.integers(1, MAX_PEERS), group_size=st.integers(3, 48))
@settings(deadline=None, max_examples=200)
def test_fit_of_large_swarms(n_peers, group_size):
    shape = fit(n_peers, group_size)

    assert math.prod(shape) <= n_peers
    assert largest_line(n_peers, shape) <= group_size + 2


@pytest.mark.parametrize(("n_peers", "group_size"), [(0, 16), (-1, 16), (10, 1), (10, 0)])
def test_fit_refuses_nonsense(n_peers, group_size):
    with pytest.raises(ValueError, match="no grid for"):
        fit(n_peers, group_size)


def balanced_sizes(n_peers: int, shape: Shape, axis: int) -> set[int]:
    """The sizes that lines have where no rule could balance better."""
    mean = n_peers * shape[axis] / math.prod(shape)
    return {math.floor(mean), math.ceil(mean)}


def check_balance(n_peers: int, shape: Shape, n_rounds: int, rng: random.Random) -> None:
    cells = rank_cells(n_peers, shape)
    for number in range(n_rounds):
        axis = axis_of(number, shape)
        sizes = line_sizes(cells, axis)
        assert set(sizes.values()) <= balanced_sizes(n_peers, shape, axis)
        assert sizes == {line: table(n_peers, shape).expected(axis, line) for line in sizes}
        assert sizes.total() == n_peers
        cells = moved(cells, number, shape, n_peers, rng)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_lines_stay_balanced_and_as_the_table_says_for_ever(group_size):
    rng = random.Random(group_size)
    for n_peers in [*range(2, 200), *range(200, 2001, 51)]:
        shape = fit(n_peers, group_size)
        check_balance(n_peers, shape, 3 * len(shape), rng)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 100), st.integers(0, 2**32))
@settings(deadline=None, max_examples=100)
def test_lines_are_balanced_on_any_grid(sides, n_more, seed):
    shape = tuple(sides)
    check_balance(math.prod(shape) + n_more, shape, 2 * len(shape), random.Random(seed))


def test_table_counts_every_peer_in_every_phase():
    for n_peers, shape in [(1, (1,)), (7, (3,)), (11, (3, 3)), (200, (13, 13)), (1000, (6, 6, 6)), (40, (2, 3, 3))]:
        for phase, m in enumerate(shape):
            lines = [line_of(cell, phase) for cell in itertools.product(*map(range, shape)) if cell[phase] == 0]
            assert len(lines) * m == math.prod(shape)
            assert sum(table(n_peers, shape).expected(phase, line) for line in lines) == n_peers


def test_table_keeps_its_shape_with_too_few_peers():
    rng = random.Random(3)
    cells = rank_cells(5, (3, 4, 2))  # 24 cells
    for number in range(9):
        assert all(on_grid(cell, (3, 4, 2)) for cell in cells)
        cells = moved(cells, number, (3, 4, 2), 5, rng)


def test_next_cell_changes_the_averaged_axis_only():
    rng = random.Random(1)
    for number in range(6):
        cell = sample_cells(rng, (4, 5, 5), 1)[0]
        cells = {next_cell(cell, number, place, 300, (4, 5, 5)) for place in range(5)}
        assert {line_of(c, number % 3) for c in cells} == {line_of(cell, number % 3)}
        assert len(cells) == (4, 5, 5)[number % 3]


@pytest.mark.parametrize("m", [1, 4])
def test_one_axis_is_one_line(m):
    assert line_of((0,), 0) == ()
    assert table(9, (m,)).expected(0, ()) == 9
    assert [next_cell((0,), number, 5, 9, (m,)) for number in range(3)] == [(5 % m,)] * 3
    assert rank_cell(5, (m,), 9) == (5 % m,)


def test_on_grid():
    assert on_grid((0, 3), (1, 4))
    assert not on_grid((0, 4), (1, 4))
    assert not on_grid((-1, 0), (1, 4))
    assert not on_grid((0,), (1, 4))
    assert not on_grid((0, 0, 0), (1, 4))


def test_seating_depends_on_the_round_and_not_on_who_computes_it():
    rng = random.Random(5)
    peers = [rng.randbytes(20) for _ in range(8)]

    def seat(names, round_id):
        return seating(dict.fromkeys(names, (0,)), 3, 8, (1,), round_id)

    seats = {seat(rng.sample(peers, 8), b"a" * 16) for _ in range(10)}
    assert len(seats) == 1
    assert sorted(seats.pop()) == sorted(peers)
    assert len({seat(peers, rng.randbytes(16)) for _ in range(50)}) == 50


@given(st.data())
def test_who_can_stay_stays_and_nobody_is_counted_twice(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    n_peers = math.prod(shape) + data.draw(st.integers(0, 20))
    number = data.draw(st.integers(0, 5))
    axis = axis_of(number, shape)
    here = tuple(data.draw(st.integers(0, m - 1)) for m in shape)
    stands = data.draw(st.lists(st.integers(0, shape[axis] - 1), min_size=1, max_size=20))
    cells = {bytes([i]) * 20: (*here[:axis], c, *here[axis + 1 :]) for i, c in enumerate(stands)}
    seats = seating(cells, number, n_peers, shape, b"r" * 16)
    assert sorted(seats) == sorted(cells)
    after = {peer: next_cell(cells[peer], number, place, n_peers, shape) for place, peer in enumerate(seats)}
    room = Counter(cell[axis] for cell in after.values())
    for coordinate, there in Counter(stands).items():
        peers = sorted(peer for peer, cell in cells.items() if cell[axis] == coordinate)
        stayed = [peer for peer in peers if after[peer] == cells[peer]]
        assert stayed == peers[: min(there, room[coordinate])]  # the smallest ids of a cell, as many as have room


def test_a_grid_that_is_full_everywhere_alike_is_at_rest():
    shape, peers = (4, 4), [bytes([i]) * 20 for i in range(32)]
    cells = {peer: rank_cell(i, shape, 32) for i, peer in enumerate(peers)}
    for number in range(4):
        for line in {line_of(cell, axis_of(number, shape)) for cell in cells.values()}:
            members = {p: cell for p, cell in cells.items() if line_of(cell, axis_of(number, shape)) == line}
            seats = seating(members, number, 32, shape, bytes([number]) * 16)
            assert all(next_cell(cells[p], number, i, 32, shape) == cells[p] for i, p in enumerate(seats))


def test_ranks_fill_every_cell():
    for n_peers in [7, 11, 30, 200, 509, 1000]:
        for group_size in GROUP_SIZES:
            shape = fit(n_peers, group_size)
            assert len(set(rank_cells(n_peers, shape))) == math.prod(shape)


@pytest.mark.parametrize("rank", [-1, 9])
def test_rank_outside_the_roster_is_refused(rank):
    with pytest.raises(ValueError, match="0 to 8 expected"):
        rank_cell(rank, (2, 2), 9)


def test_sampled_cells_differ_and_reach_the_whole_grid():
    rng = random.Random(2)
    samples = [sample_cells(rng, (3, 4, 5)) for _ in range(200)]

    assert all(len(set(sample)) == 4 for sample in samples)
    assert {cell for sample in samples for cell in sample} == set(itertools.product(range(3), range(4), range(5)))
    assert sorted(sample_cells(rng, (1, 3))) == [(0, 0), (0, 1), (0, 2)]


def test_emptiest_looks_at_lines_and_breaks_ties_at_random():
    rng = random.Random(2)
    candidates = [(0, 0), (0, 1), (0, 2), (1, 2)]
    counts = {(0,): 2, (1,): 1, (2,): 1}

    assert {emptiest(counts, candidates, 0, rng) for _ in range(50)} == {(0, 1), (0, 2), (1, 2)}
    assert {emptiest(counts, candidates, 1, rng) for _ in range(50)} == {(1, 2)}
    assert emptiest({(0,): 1}, candidates[:2], 0, rng) == (0, 1)


def test_emptiest_of_four_is_nearly_balanced():
    rng = random.Random(7)
    shape = (6, 6, 6)  # 13.9 peers a line
    drawn = line_sizes(random_cells(rng, 500, shape), 0).values()
    chosen = line_sizes(emptiest_cells(rng, 500, shape), 0).values()

    assert min(drawn) < 12 <= min(chosen)
    assert max(chosen) <= 16 < max(drawn)


def test_slots_are_distinct_and_fixed():
    grids = [ShapeRecord(epoch, n, shape, digest) for epoch in (1, 2) for digest in (bytes(32), b"\1" * 32)
             for n, shape in ((900, (2, 2)), (901, (2, 2)), (900, (2, 2, 2)), (900, (1,)))]  # fmt: skip
    lines = ((), (0,), (0, 0), (0, 1), (1, 0), (256,))
    keys = {
        slot(run, grid, phase, line) for run in ("a", "b", "") for grid in grids for phase in (0, 1) for line in lines
    }

    assert len(keys) == 3 * len(grids) * 2 * len(lines)
    assert {len(key) for key in keys} == {20}
    assert (
        slot("run", ShapeRecord(1, 9, (2, 2), bytes(32)), 0, (2, 3)).hex() == "be231a03a1e9de16dadb2615c6cd36f677204a5f"
    )


def test_on_a_single_line_the_slot_is_the_same_for_any_number_of_peers():
    one, other = (
        ShapeRecord(1, 2, (1,), bytes(32), roster_of([b"a" * 20, b"b" * 20])),
        ShapeRecord(1, 3, (1,), bytes(32)),
    )
    assert slot("run", one, 0, ()) == slot("run", other, 0, ())
    assert slot("run", one, 0, ()) != slot("run", replace(one, epoch=2), 0, ())


def test_keys_of_one_run_are_apart():
    names = ["", "a", "ab", "a\0"]
    keys = [roster_key(run) for run in names] + [shape_key(run, bytes(32)) for run in names]
    keys += [slot(run, ShapeRecord(1, 2, (1,), bytes(32)), 0, ()) for run in names] + [shape_key("a", b"\1" * 32)]

    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {20}


RECORD = ShapeRecord(epoch=1, n_peers=9, shape=(2, 2), digest=bytes(32))


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 0},
        {"epoch": 2**63},
        {"n_peers": 0},
        {"n_peers": MAX_PEERS + 1},
        {"shape": ()},
        {"shape": (0, 2)},
        {"shape": (-2, -2)},
        {"shape": (2, 5)},
        {"shape": (1,) * 21},
        {"digest": bytes(31)},
        {"digest": b""},
        {"roster": bytes(3)},
        {"roster": bytes(37)},
        {"roster": b"\1" + bytes(35)},
        {"n_peers": MAX_ROSTER + 1, "roster": bytes(4 * (MAX_ROSTER + 1))},
    ],
)
def test_record_refuses_nonsense(change):
    with pytest.raises(ValueError, match=r"expected|more cells|ascending"):
        replace(RECORD, **change)


def test_rank_is_the_place_in_the_roster():
    rng = random.Random(4)
    peers = sorted(rng.randbytes(20) for _ in range(9))
    record = replace(RECORD, roster=roster_of(rng.sample(peers, 9)))

    assert [record.rank_of(peer) for peer in peers] == list(range(9))
    assert record.rank_of(bytes(20)) is None
    assert RECORD.rank_of(peers[0]) is None
    assert [record.first_cell(peer) for peer in peers] == rank_cells(9, record.shape)
    assert record.first_cell(bytes(20)) is None


@pytest.mark.parametrize("n_known", [5, 9, 12, 20])
def test_a_roster_of_more_or_fewer_peers_than_the_grid_is_for_is_spread_over_it(n_known):
    peers = [bytes([i]) * 20 for i in range(n_known)]
    record = replace(RECORD, roster=roster_of(peers))
    cells = [record.first_cell(peer) for peer in peers]
    for axis, m in enumerate(record.shape):
        sizes = line_sizes(cells, axis)
        assert len(sizes) == math.prod(record.shape) // m
        assert max(sizes.values()) - min(sizes.values()) <= 1


def test_a_roster_makes_no_other_grid():
    roster = roster_of([bytes([i]) * 20 for i in range(5)])
    assert replace(RECORD, roster=roster).is_same_grid(RECORD)
    assert not replace(RECORD, epoch=2).is_same_grid(RECORD)
    assert not replace(RECORD, n_peers=8).is_same_grid(RECORD)


def test_peers_with_one_prefix_have_no_rank():
    record = replace(RECORD, n_peers=4, roster=roster_of([b"aaaa1", b"aaaa2", b"bbbb", b"cccc"]))

    assert record.rank_of(b"aaaa1") is None
    assert record.rank_of(b"cccc") == 3


def test_roster_is_left_out_where_it_would_not_fit():
    peers = [i.to_bytes(20, "little") for i in range(MAX_ROSTER + 1)]

    assert len(roster_of(peers[:-1])) == 4 * MAX_ROSTER
    assert roster_of(peers) == b""


def test_newer_is_a_total_order_by_epoch_first():
    contents = [{}, {"n_peers": 8}, {"shape": (1, 2)}, {"digest": b"\1" * 32}, {"roster": bytes(36)}]
    records = [replace(RECORD, epoch=epoch, **content) for epoch in (1, 2) for content in contents]

    assert len({record.content_digest() for record in records}) == len(records)
    for a, b in itertools.product(records, repeat=2):
        assert newer(a, b) + newer(b, a) == (a != b)
        if a.epoch != b.epoch:
            assert newer(a, b) == (a.epoch > b.epoch)
        elif a.n_peers != b.n_peers:
            assert newer(a, b) == (a.n_peers > b.n_peers)
