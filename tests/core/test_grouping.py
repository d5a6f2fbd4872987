"""From tickets to a `Begin`: seats, shares, shards, durations, and tickets that lie."""

import contextlib
import random
from dataclasses import replace
from typing import Any

import pytest
from sim.slot_sim import DIGEST, NUMBER, SLOT, peer, ticket

from mpd.errors import PeerError, RoundFailed
from mpd.grid import seating
from mpd.grouping import MAX_LEFT_OUT, check_weights, compose_begins
from mpd.ids import PeerId
from mpd.layout import MAX_WEIGHT
from mpd.manifest import MAX_NUMBER
from mpd.mass import MAX_MASS, Standing, enter
from mpd.messages import PEERS, Begin, Join

Tickets = dict[PeerId, Join]


def tickets(*joins: Join) -> Tickets:
    return {who(i): join for i, join in enumerate(joins)}


def who(i: int) -> PeerId:
    """Return one of more peers than `peer` has names for."""
    return peer(i) if i < 32 else PeerId(bytes([i]) * 20)


def compose(joined: Tickets, left_out: dict[PeerId, str] | None = None, seed: int = 1, **options: Any) -> Begin:
    plan: dict[str, Any] = {
        "shape": (1,),
        "n_peers": 4,
        "exact": True,
        "progress_s": 2.0,
        "payload_bytes": 64 << 20,
    } | options
    (begin,) = compose_begins(tuple(joined.items()), left_out or {}, rng=random.Random(seed), **plan)
    return begin


def cut(joined: Tickets, **options: Any) -> tuple[Begin, ...]:
    """Return the groups of a line that has swollen to more than groups of 4 bear."""
    plan: dict[str, Any] = {
        "shape": (2, 2),
        "n_peers": 8,
        "exact": True,
        "progress_s": 2.0,
        "payload_bytes": 64 << 20,
    } | options
    return compose_begins(tuple(joined.items()), {}, rng=random.Random(1), group_size=4, **plan)


def line(n: int, **changes: Any) -> Tickets:
    return tickets(*(ticket(i, standing=enter(1.0 + i, (i % 2, 0)), **changes) for i in range(n)))


@pytest.mark.parametrize(("n", "sizes"), [(7, [7]), (8, [4, 4]), (16, [5, 5, 6]), (65, [5] * 1 + [6] * 10)])
def test_a_line_that_has_swollen_is_cut_into_groups(n: int, sizes: list[int]) -> None:
    begins = cut(line(n, number=0))
    assert sorted(len(begin.members) for begin in begins) == sorted(sizes)
    assert len({begin.round_id for begin in begins}) == len(begins)
    weights = {m.peer: m.weight for begin in begins for m in begin.members}
    assert weights == {who(i): 1.0 + i for i in range(n)}
    assert peer(0) in {m.peer for m in begins[0].members}  # the leader's own comes first
    for begin in begins:
        assert begin.whole
        assert begin.parts == len(begins)
        cells = {who(i): (i % 2, 0) for i in range(n) if who(i) in {m.peer for m in begin.members}}
        assert tuple(m.peer for m in begin.members) == seating(cells, 0, 8, (2, 2), begin.round_id)
        assert PEERS.decode(PEERS.encode(begin)) == begin


def test_in_the_last_round_only_what_no_group_holds_is_cut() -> None:
    claims = [Standing(6.0, 2.0, bytes([i % 2]) * 16, 0, True, (0, i % 2)) for i in range(70)]
    joined = tickets(*(ticket(i, number=1, standing=claim) for i, claim in enumerate(claims)))
    assert [begin.parts for begin in cut(dict(list(joined.items())[:64]))] == [1]
    assert sorted(len(begin.members) for begin in cut(joined)) == [35, 35]


def test_a_claim_of_mates_in_two_groups_is_counted_once() -> None:
    claims = [Standing(6.0, 2.0, bytes([i % 2]) * 16, 0, True, (0, i % 2, 0)) for i in range(16)]
    joined = tickets(*(ticket(i, number=1, standing=claim) for i, claim in enumerate(claims)))
    begins = cut(joined, shape=(2, 2, 2))
    assert len(begins) == 3
    assert sum(m.weight for begin in begins for m in begin.members) == pytest.approx(12.0)
    assert all(begin.whole for begin in begins)


def test_the_largest_number_counts_and_another_phase_does_not() -> None:
    numbers = [4, 8, 7, 2]
    joined = tickets(*(ticket(i, number=n, standing=enter(1.0, (i, 0))) for i, n in enumerate(numbers)))
    begin = compose(joined, shape=(4, 2), exact=True)
    assert begin.number == 8
    assert begin.left_out == {peer(2): "stands at round 7, in another phase"}


@pytest.mark.parametrize(
    ("numbers", "exact", "common"),
    [
        ([3, 3, 5], True, 3),  # who is ahead, or says so, takes nothing from the others
        ([3, 5, 5], True, 5),
        ([3, 5], True, 5),
        ([3, 3, 5], False, 5),  # where weights do not move with the rounds, nothing is lost
    ],
)
def test_in_the_midst_of_a_cycle_the_number_of_most_who_bring_something_counts(
    numbers: list[int], exact: bool, common: int
) -> None:
    joined = tickets(
        *(
            ticket(i, number=n, standing=Standing(6.0, 2.0, bytes([i + 1]) * 16, n - 1, True, (0, i)))
            for i, n in enumerate(numbers)
        ),
        ticket(len(numbers), number=7, standing=enter(1.0, (0, 0))),  # it has begun no cycle, and decides nothing
    )
    begin = compose(joined, shape=(3, 4), exact=exact)
    assert begin.number == (common if exact else 7)
    brings = {m.peer for m in begin.members if m.weight > 0}
    assert brings == ({who(i) for i, n in enumerate(numbers) if n == common} if exact else set(joined))


def test_if_nobody_brings_anything_into_the_midst_of_a_cycle_there_is_no_round() -> None:
    with pytest.raises(RoundFailed, match="nobody in the group brings any weight"):
        compose(
            tickets(*(ticket(i, number=n, standing=enter(1.0, (0, i))) for i, n in enumerate([3, 5]))), shape=(3, 4)
        )


def test_a_line_in_which_too_few_can_reduce_is_not_cut() -> None:
    def behind_a_wall(n: int) -> Tickets:
        joined = line(n, number=0)
        return {p: replace(join, inbound=p == peer(3), port=4747 * (p == peer(3))) for p, join in joined.items()}

    assert [len(begin.members) for begin in cut(behind_a_wall(16))] == [16]
    with pytest.raises(RoundFailed, match="65 members are more than one group holds"):
        cut(behind_a_wall(65))


def test_everybody_hears_of_a_record_that_one_of_them_knows() -> None:
    assert compose(tickets(ticket(0), ticket(1, newest=7), ticket(2))).newest == 7
    assert {begin.newest for begin in cut(line(16, number=0, newest=3))} == {3}


def test_a_begin_says_what_the_tickets_said() -> None:
    begin = compose(tickets(*(ticket(i, standing=enter(float(i + 1), (0,)), time_left_s=30.0 - i) for i in range(4))))
    assert (begin.slot, begin.digest, begin.epoch, begin.number) == (SLOT, DIGEST, 1, NUMBER)
    assert {(m.peer, m.weight, m.heads) for m in begin.members} == {(peer(i), i + 1.0, 1.0) for i in range(4)}
    assert [m.fraction for m in begin.members] == pytest.approx([0.25] * 4)
    assert (begin.whole, begin.left_out, begin.timeout_s, begin.progress_s) == (True, {}, 30.0, 2.0)
    assert begin.chunk_bytes == 256 << 10
    assert PEERS.decode(PEERS.encode(begin)) == begin


def test_seats_are_drawn_by_the_round_id() -> None:
    joined = tickets(*(ticket(i) for i in range(8)))
    begins = [compose(joined, seed=seed) for seed in range(5)]
    for begin in begins:
        cells = {p: ticket.standing.cell for p, ticket in joined.items()}
        assert tuple(m.peer for m in begin.members) == seating(cells, NUMBER, 4, (1,), begin.round_id)
    assert len({tuple(m.peer for m in begin.members) for begin in begins}) == 5


def test_whoever_is_left_out_costs_the_certificate() -> None:
    joined = tickets(ticket(0), ticket(1))
    assert compose(joined).whole
    begin = compose(joined, {peer(9): "its link broke"})
    assert not begin.whole
    assert begin.left_out == {peer(9): "its link broke"}


def test_in_a_later_round_whoever_is_left_out_has_a_mate_or_is_missed() -> None:
    claims = [Standing(6.0, 2.0, bytes([i]) * 16, 0, True, (0, i)) for i in range(2)]
    joined = tickets(*(ticket(i, number=1, standing=claim) for i, claim in enumerate(claims)))
    assert compose(joined, {peer(9): "its link broke"}, shape=(2, 2)).whole
    twice = ticket(2, number=1, standing=replace(claims[0], cell=(0, 1)))
    assert not compose({**joined, peer(2): twice}, shape=(2, 2)).whole


def fractions_of(bandwidths: list[float], **options: Any) -> list[float]:
    """Return the shards of peers that say these bandwidths of themselves; one more cannot be dialled."""
    n = len(bandwidths)
    joined = tickets(
        *(ticket(i, bandwidth=bandwidth) for i, bandwidth in enumerate(bandwidths)),
        ticket(n, inbound=False, bandwidth=900.0),
    )
    by_peer = {m.peer: m.fraction for m in compose(joined, **options).members}
    assert by_peer[peer(n)] == 0
    return [by_peer[peer(i)] for i in range(n)]


def test_all_who_can_be_dialled_reduce_equal_shards_unless_they_certainly_differ() -> None:
    assert fractions_of([0.0, 0.0, 0.0]) == pytest.approx([1 / 3] * 3)
    assert fractions_of([100.0, 300.0, 0.0]) == pytest.approx([1 / 3] * 3)
    assert fractions_of([1e8, 1e8, 0.0, 1e8, 2e7]) == pytest.approx([0.25] * 4 + [0])


def test_what_the_leader_has_measured_counts_as_well() -> None:
    uploads = {peer(0): 1e8, peer(1): 1e8, peer(2): 1e5}
    assert fractions_of([0.0, 0.0, 0.0], uploads=uploads) == pytest.approx([0.5, 0.5, 0.0])
    assert fractions_of([1e8, 1e8, 1e8], uploads={peer(2): 1e5}) == pytest.approx([0.5, 0.5, 0.0])


def test_a_peer_that_lies_about_its_bandwidth_gets_no_more_than_twice_its_share() -> None:
    fractions = fractions_of([1e8, 1e308, 1e8, 1e8])
    assert 0.25 < fractions[1] <= 0.5
    assert min(fractions) > 0.1
    assert min(fractions_of([100.0, 1e308, 0.0])) > 0.1


@pytest.mark.parametrize(
    ("bandwidths", "chunk_kib"),
    [([0.0, 0.0, 0.0], 256), ([0.0, 12.5e6, 125e6], 192), ([0.0, 0.0, 125e6], 2048), ([1.0, 1e308, 0.0], 64)],
)
def test_chunks_are_made_for_the_slowest_that_has_measured_itself(bandwidths: list[float], chunk_kib: int) -> None:
    begin = compose(tickets(*(ticket(i, bandwidth=bandwidth) for i, bandwidth in enumerate(bandwidths))))
    assert begin.chunk_bytes == chunk_kib << 10


def test_a_ticket_from_another_line_costs_only_its_owner() -> None:
    cells = [(1, 0), (1, 2), (0, 1), (1, 5), (1,)]
    joined = tickets(*(ticket(i, number=1, standing=enter(1.0, cell)) for i, cell in enumerate(cells)))
    begin = compose(joined, shape=(3, 3), exact=False)
    assert {m.peer for m in begin.members} == {peer(0), peer(1)}
    assert set(begin.left_out) == {peer(2), peer(3), peer(4)}
    assert not begin.whole


@pytest.mark.parametrize(("number", "exact"), [(0, True), (1, False), (0, False)])
def test_mass_where_none_has_moved_yet_costs_only_its_owner(number: int, exact: bool) -> None:
    """What a cell may weigh in the middle of a cycle, no peer may weigh at its start."""
    boast = Standing(2 * MAX_WEIGHT, 1.0, b"o" * 16, number - 1, True, (0, 0))
    joined = tickets(
        *(ticket(i, number=number, standing=enter(MAX_WEIGHT, (0, 0))) for i in range(2)),
        ticket(2, number=number, standing=boast),
    )
    begin = compose(joined, shape=(2, 2), exact=exact)
    assert {m.peer for m in begin.members} == {peer(0), peer(1)}
    assert begin.left_out == {peer(2): "weighs 2e+08: at most 1e+08 expected"}


@pytest.mark.parametrize(("number", "exact", "refuses"), [(0, True, True), (3, False, True), (3, True, False)])
def test_no_leader_makes_anybody_weigh_more_than_a_peer_may(number: int, exact: bool, refuses: bool) -> None:
    begin = replace(compose(tickets(ticket(0), ticket(1))), number=number)
    check_weights(begin, (2, 2), exact)
    heavy = replace(begin, members=(replace(begin.members[0], weight=1e9), begin.members[1]))
    with pytest.raises(PeerError, match=r"weighs 1e\+09: at most 1e\+08") if refuses else contextlib.nullcontext():
        check_weights(heavy, (2, 2), exact)


def test_mass_inside_a_cycle_counts_each_cell_once() -> None:
    claims = [Standing(6.0, 2.0, b"a" * 16, 0, True, (0, 0))] * 2 + [Standing(4.0, 1.0, b"b" * 16, 0, True, (0, 1))]
    begin = compose(tickets(*(ticket(i, number=1, standing=claim) for i, claim in enumerate(claims))), shape=(2, 2))
    assert {m.peer: (m.weight, m.heads) for m in begin.members} == {
        peer(0): (3.0, 1.0),
        peer(1): (3.0, 1.0),
        peer(2): (4.0, 1.0),
    }
    assert begin.whole


@pytest.mark.parametrize(
    ("joined", "reason"),
    [
        (tickets(ticket(0), ticket(1, standing=enter(1.0, (3,)))), "our line"),
        (tickets(ticket(0, inbound=False), ticket(1, inbound=False)), "accepts connections"),
        (tickets(ticket(0, standing=enter(0.0, (0,))), ticket(1, standing=enter(0.0, (0,)))), "any weight"),
    ],
)
def test_a_round_that_makes_no_sense_fails_with_its_reason(joined: Tickets, reason: str) -> None:
    with pytest.raises(RoundFailed, match=reason):
        compose(joined)


def test_the_result_is_one_round_older_than_the_oldest_vector() -> None:
    assert compose(tickets(ticket(0), ticket(1))).age == 1
    assert compose(tickets(ticket(0, age=7), ticket(1, age=3), ticket(2))).age == 8
    assert compose(tickets(ticket(0, age=MAX_NUMBER), ticket(1))).age == MAX_NUMBER  # and no further


def test_more_left_out_than_a_message_takes_are_not_all_named() -> None:
    absent = {PeerId(i.to_bytes(20, "big")): "late" for i in range(MAX_LEFT_OUT + 5)}
    assert len(compose(tickets(ticket(0), ticket(1)), absent).left_out) == MAX_LEFT_OUT


def test_a_ticket_off_the_wire_composes_or_is_refused() -> None:
    wild = replace(ticket(1), bandwidth=5e-324, time_left_s=3600.0, standing=enter(MAX_WEIGHT, (0,)))
    begin = compose(tickets(ticket(0, standing=enter(MAX_WEIGHT, (0,))), PEERS.decode(PEERS.encode(wild))))
    assert begin.timeout_s == 3600.0
    heavy = Standing(MAX_MASS, 1.0, b"o" * 16, 0, True, (0, 0))
    moved = tickets(*(ticket(i, number=1, standing=replace(heavy, cell=(0, i))) for i in range(2)))
    assert PEERS.decode(PEERS.encode(compose(moved, shape=(2, 2)))).members[0].weight == MAX_MASS / 2
    with pytest.raises(PeerError):
        PEERS.decode(PEERS.encode(ticket(1)).replace(b"slot", b"slut"))
