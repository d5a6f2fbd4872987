"""The exchange, directed: the interleavings that matter most, one by one, and input that no honest member sends.

Members are real machines in a hand-driven network (`sim.exchange_net`), which checks agreement and exactness all along.
`tests/sim/test_interleavings.py` has those that take a whole story, `tests/sim/test_exchange_sim.py` lets an adversary
drive instead.
"""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.exchange_adversary import simulate
from sim.exchange_net import ALL, Bytes, Net, decode, make_plans
from sim.traces import back_to_the_first_version, machine, outcomes, three_plans

from mpd.errors import PeerError
from mpd.exchange import CloseLink, Ended, Exchange, Finished, Gone, Send, SendPiece, SendResult
from mpd.messages import Ask, Commit, Done, Few, Need, NewPlan, Prepare, Promise, Want


def messages(exchange: Exchange) -> list[tuple[int, object]]:
    return [(action.to, action.message) for action in exchange.take_actions() if isinstance(action, Send)]


def pairs_but(net: Net, *excluded: tuple[int, int]) -> list[tuple[int, int]]:
    return [pair for pair in net.links if pair not in excluded]


# ------------------------------------------------------------------------------------------------------- without faults


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16])
def test_a_round_without_faults_is_a_plain_butterfly(n: int) -> None:
    net = Net(make_plans(n, [owner for owner in range(n) for _ in range(3)]))
    net.run()
    n_chunks, full = 3 * n, (1 << n) - 1
    assert outcomes(net) == [[full] * n_chunks] * n
    assert net.sent["piece"] == net.sent["result"] == n_chunks * (n - 1)
    assert net.sent["control"] <= 2 * n * (n - 1)
    assert not net.sent["duplicate"]
    assert not net.sent["forwarded result"]
    for member in net.members:
        assert member.ended is Ended.SUCCESS
        assert (member.contributors, member.confirmed, member.missing) == (full, full, {})
        assert member.wakeup is None


def test_pieces_leave_for_the_right_neighbour_first_or_as_told() -> None:
    default = Net(make_plans(4, [0, 1, 2, 3]))
    assert [action.action.chunk for action in default.links[1, 2].data] == [2]
    ordered = make_plans(3, [0, 1, 2, 2], sending_order=(3, 0, 2, 1))[0]
    exchange = Exchange(ordered, Bytes(ordered), 0.0)
    exchange.start(0.0)
    pieces = [a for a in exchange.take_actions() if isinstance(a, SendPiece)]
    assert pieces == [SendPiece(2, 3, 0), SendPiece(2, 2, 0), SendPiece(1, 1, 0)]
    neighbour = make_plans(4, [0, 0, 1, 2, 3])[2]
    exchange = Exchange(neighbour, Bytes(neighbour), 0.0)
    exchange.start(0.0)
    assert [a.to for a in exchange.take_actions() if isinstance(a, SendPiece)] == [3, 0, 0, 1]


def test_success_says_publish_before_it_tells_the_others() -> None:
    exchange, _ = machine(2, 0, [0])
    exchange.on_piece(1.0, 1, 0, 0, 4)
    actions = exchange.take_actions()
    assert actions == [SendResult(1, 0, 0, 0b11), Finished(True), Send(1, Commit(0, ()))]
    assert not exchange.gone
    exchange.on_message(1.0, 1, Commit(0, ()))
    assert exchange.take_actions() == [Gone()]
    assert not exchange.holds(0, 0)


def test_members_that_cannot_be_dialled_reduce_nothing_and_never_meet() -> None:
    net = Net(make_plans(4, [0, 0, 1, 1], inbound=0b0011))
    assert net.links[2, 3].lanes() == []
    net.run()
    assert outcomes(net) == [[0b1111] * 4] * 4
    assert not net.members[2].confirmed >> 3 & 1 or net.members[2].confirmed == 0b1111


def test_two_members_behind_a_dead_reducer_fail_at_once() -> None:
    net = Net(make_plans(3, [2], inbound=0b100))
    net.crash(2)
    net.run(until=0.0)
    assert [net.members[i].reason for i in (0, 1)] == ["no link to any other member is left"] * 2


def test_members_without_weight_receive_and_reduce_but_stand_in_no_mean() -> None:
    net = Net(make_plans(4, [0, 1, 2, 3], senders=0b0101))
    net.run()
    assert outcomes(net) == [[0b0101] * 4] * 4
    assert net.sent["piece"] == 3 + 3
    nothing = "weighs nothing in this round"
    assert net.members[0].missing == {1: nothing, 3: nothing}


def test_a_member_without_weight_can_redo() -> None:
    net = Net(make_plans(4, [3], senders=0b1110))
    net.crash(3)
    net.run()
    assert outcomes(net) == [[0b0110]] * 3
    assert "not in 1 of 1 chunks" in net.members[1].missing[3]


# ------------------------------------------------------------------------------------------------------------ in flight


def in_flight() -> Net:
    """Member 2 has closed its chunk and died; member 1 has the result unread, member 0 will never see it."""
    net = Net(make_plans(3, [2]))
    net.data(0, 2)
    net.data(1, 2)
    net.links[2, 0].data.clear()
    net.crash(2, keep=lambda n: n)
    net.links[2, 1].control.clear()
    net.deliver(2, 0, "control")  # DONE(0) of the dead
    net.deliver(2, 0, "lost")
    return net


def test_a_result_read_after_the_promise_is_dropped() -> None:
    net = in_flight()
    net.control(0, 1, Prepare)
    net.control(1, 0, Promise)
    net.control(0, 1, NewPlan)
    net.data(2, 1)
    net.run()
    assert outcomes(net) == [[0b011], [0b011]]


def test_a_result_read_before_the_promise_is_forwarded() -> None:
    net = in_flight()
    net.data(2, 1)
    net.run()
    assert outcomes(net) == [[0b111], [0b111]]
    assert net.sent["forwarded result"] == 1
    assert not net.sent["redone piece"]


# ---------------------------------------------------------------------------------------------------------- three plans


def test_the_highest_done_in_a_quorum_decides() -> None:
    assert outcomes(three_plans()) == [[0b111]] * 3


# ---------------------------------------------------------------------------------------------------- promises and DONE


def test_done_is_held_back_between_promise_and_plan_and_said_at_once_with_it() -> None:
    net = Net(make_plans(4, [3]))
    for i in range(3):
        net.data(i, 3)
    net.data(3, 1)
    net.cut(0, 3)  # 0 will never have the result from 3
    net.control(0, 2, Prepare)
    net.data(3, 2)  # the last chunk, between promise and plan
    assert net.on_the_way(2, 1) == []
    net.go((0, 1), (1, 0), (2, 0))
    net.control(0, 2, NewPlan)  # 1 holds the owner's result: the plan keeps it
    assert net.on_the_way(2, 1) == [Done]
    net.run()
    assert outcomes(net) == [[0b1111]] * 4


# ------------------------------------------------------------------------------------------------------------ open once


def test_a_closed_version_is_fetched_and_not_written_again() -> None:
    exchange, vault = back_to_the_first_version()
    assert [message for _, message in messages(exchange)] == [Want(2, ((0, 0),))]
    assert not exchange.wants_piece(1, 0, 0)
    exchange.on_result(0.0, 1, 0, 0, 0b111, 21)
    assert exchange.holds(0, 0)
    assert vault.slots[0] == 21


# -------------------------------------------------------------------------------------------------------- after success


def test_after_success_a_laggard_is_served_but_no_input_leaves() -> None:
    exchange, _ = machine(3, 0, [0, 1])
    exchange.on_piece(1.0, 1, 0, 0, 4)
    exchange.on_piece(1.0, 2, 0, 0, 16)
    exchange.on_result(1.0, 1, 1, 0, 0b111, 21)
    exchange.on_message(1.0, 1, Done(0, exchange._chunks.digest()))
    assert exchange.ended is Ended.SUCCESS
    assert not exchange.may_send_piece(1, 0)
    exchange.take_actions()
    exchange.on_message(2.0, 2, Want(0, ((1, 0),)))
    assert exchange.take_actions() == [SendResult(2, 1, 0, 0b111)]
    for message in (Ask(((0, 2),)), Need(0, 0), Prepare(2)):
        exchange.on_message(2.0, 2, message)
        assert exchange.take_actions() == [Send(2, Commit(0, ()))]
    exchange.on_message(2.0, 2, NewPlan(2, 0b111, ((0, 2, 1),), ()))
    assert exchange.holds(0, 0)
    exchange.cancel(3.0, "the next round begins")
    assert exchange.take_actions() == [Gone()]
    assert exchange.ended is Ended.SUCCESS
    assert not exchange.holds(0, 0)


def test_who_never_hears_of_the_others_leaves_at_the_deadline() -> None:
    exchange, _ = machine(2, 0, [0])
    exchange.on_piece(1.0, 1, 0, 0, 4)
    assert exchange.wakeup == 100.0
    exchange.on_tick(100.0)
    assert exchange.gone
    assert exchange.ended is Ended.SUCCESS


# ----------------------------------------------------------------------------------------------------- too few are left


def test_half_a_group_that_lacks_a_chunk_gives_up_at_once() -> None:
    net = Net(make_plans(4, [2, 3]))
    net.crash(2)
    net.crash(3)
    net.run(until=0.0)
    assert outcomes(net) == [None, None]
    assert net.sent["Few"] >= 2
    assert "too few" in net.members[0].reason


def test_half_a_group_succeeds_if_one_of_it_holds_everything() -> None:
    net = Net(make_plans(4, [2, 3]))
    net.go((0, 2), (1, 2), (3, 2), (0, 3), (1, 3), (2, 3))
    net.data(2, 0)
    net.data(3, 0)
    net.crash(2)
    net.crash(3)
    net.run(until=0.0)
    assert outcomes(net) == [[0b1111] * 2] * 4


@pytest.mark.parametrize("n_read", [0, 1, 2])
def test_two_members_whose_link_breaks_never_redo(n_read: int) -> None:
    net = Net(make_plans(2, [1, 1]))
    net.data(0, 1, n=2)  # 1 holds everything and succeeds
    net.data(1, 0, n=n_read)
    net.cut(0, 1)
    net.run(until=0.0)
    assert outcomes(net) == [[0b11] * 2 if n_read == 2 else None, [0b11] * 2]
    if n_read < 2:
        assert net.members[0].reason == "no link to any other member is left"


def test_the_deadline_ends_a_round_that_waits() -> None:
    exchange, vault = machine(3, 0, [0, 1], deadline=1.0, progress_s=9.0)
    exchange.on_piece(0.5, 1, 0, 0, 4)
    exchange.on_tick(0.99)
    assert exchange.ended is None
    exchange.on_tick(1.0)
    assert exchange.take_actions() == [Finished(False), Gone()]
    assert "time is over while it waits for 2 of 2 chunks" in exchange.reason
    assert not vault.accumulators
    exchange.on_piece(1.1, 2, 0, 0, 16)
    assert not vault.accumulators
    assert exchange.wakeup is None


def test_a_cancelled_round_never_reports_success() -> None:
    exchange, _ = machine(2, 0, [0])
    exchange.cancel(0.5, "the trainer left")
    exchange.on_piece(0.6, 1, 0, 0, 4)
    assert (exchange.ended, exchange.reason) == (Ended.FAILED, "the trainer left")
    assert exchange.take_actions() == [Finished(False), Gone()]
    assert exchange.confirmed == 0


# ------------------------------------------------------------------------------------------------------------- slowness


def test_a_sender_that_holds_up_a_chunk_is_dropped_for_good() -> None:
    net = Net(make_plans(3, [0, 0]))
    net.data(2, 0)  # its first piece comes, its second does not
    net.go(*pairs_but(net, (2, 0)))
    net.tick(0, 0.9)
    assert net.members[0].waiting_for() == "1 of 2 chunks"
    net.tick(0, 1.3)
    assert net.members[0].holds(1, 0)
    assert not net.members[0].wants_piece(2, 1, 0)
    net.run(until=0.0)
    assert outcomes(net) == [[0b111, 0b011]] * 3
    assert net.members[0].missing == {2: "not in 1 of 2 chunks: it sent nothing for 1 s while a chunk waited for it"}
    without = "another member reduced without it; seen from here nothing was wrong"
    assert net.members[1].missing == {2: f"not in 1 of 2 chunks: {without}"}


def test_bytes_of_an_unfinished_piece_keep_a_sender_in_unless_most_others_were_much_quicker() -> None:
    exchange, _ = machine(3, 0, [0])
    exchange.on_piece(1.0, 1, 0, 0, 4)
    for tick in range(1, 20):
        exchange.on_progress(tick * 0.25, 2)
        exchange.on_tick(tick * 0.25)
    assert exchange.wants_piece(2, 0, 0)
    exchange.on_tick(5.0)
    assert exchange.holds(0, 0)
    assert "it was too slow: 0 of 1 pieces in 5.0 s, after most members had sent theirs in 1.0 s" in exchange.missing[2]


def test_a_writer_that_hears_nobody_waits() -> None:
    exchange, _ = machine(3, 0, [0])
    exchange.on_tick(50.0)
    assert exchange.wants_piece(1, 0, 0)
    assert exchange.wants_piece(2, 0, 0)


def test_two_silent_senders_do_not_excuse_each_other() -> None:
    exchange, _ = machine(4, 0, [0])
    exchange.on_piece(0.0, 1, 0, 0, 4)
    exchange.on_tick(1.3)
    assert exchange.holds(0, 0)
    assert exchange.chunk_contributors == [0b0011]


def test_a_reducer_that_falls_silent_is_replaced() -> None:
    net = Net(make_plans(3, [2, 2]))
    for i in (0, 1):
        net.links[i, 2].data.clear()  # no piece comes through to 2
    net.run(until=2.4)
    assert not net.published
    net.run(until=4.0)
    assert outcomes(net) == [[0b111] * 2] * 3
    assert net.sent["redone piece"] == 2 * 2


def test_a_slow_link_to_a_reducer_is_bypassed() -> None:
    net = Net(make_plans(3, [2, 1]))
    net.data(2, 1)
    net.go(*pairs_but(net, (2, 0)))  # only the way of chunk 0 from 2 to 0 is slow
    net.links[2, 0].data.clear()
    net.go(*pairs_but(net))
    assert net.members[1].ended is Ended.SUCCESS
    assert net.members[0].ended is None
    net.run(until=4.0)
    assert outcomes(net) == [[0b111] * 2] * 3
    assert net.sent["forwarded result"] == 1
    assert not net.sent["redone piece"]


def test_whom_only_the_coordinator_has_lost_is_in_what_others_redo() -> None:
    net = Net(make_plans(5, [4, 4]))
    net.cut(0, 3)
    net.crash(4)
    net.run(until=1.0)  # 0 coordinates without 3, and redoes the first chunk; 1 redoes the second
    assert outcomes(net) == [[0b00111, 0b01111]] * 4


def test_pieces_of_redone_chunks_are_asked_for_a_few_at_a_time() -> None:
    exchange, _ = machine(3, 1, [0] * 20)
    exchange.on_message(0.0, 0, NewPlan(3, 0b111, tuple((c, 3, 1) for c in range(20)), ()))
    asked = [chunk for _, m in messages(exchange) if isinstance(m, Ask) for chunk, _ in m.chunks]
    assert asked == 2 * list(range(8))
    exchange.on_piece(0.0, 0, 3, 3, 1)
    exchange.on_piece(0.0, 2, 3, 3, 16)
    assert [m for _, m in messages(exchange)] == [Ask(((8, 3),))] * 2
    for chunk in (0, 1, 2, 4, 5, 6, 7, 8):
        exchange.on_piece(0.1, 0, chunk, 3, 1)
    exchange.on_tick(1.3)  # 0 has sent all that it was asked for, 2 has not
    assert sum(map(bool, exchange.chunk_contributors)) == 2, "one after the other"
    while exchange.wakeup == 1.3:
        exchange.on_tick(1.3)
    assert exchange.chunk_contributors[:10] == [3, 3, 3, 7, 3, 3, 3, 3, 3, 0]
    assert messages(exchange)[-1] == (0, Ask(((16, 3),)))


# ----------------------------------------------------------------------------------------------------- bad contents


def test_a_sender_of_values_that_are_not_finite_is_left_out_and_named_and_stays() -> None:
    net = Net(make_plans(3, [0, 0, 1]))
    net.vaults[0].distrusted = 0b100
    net.run(until=5.0)
    assert outcomes(net) == [[0b011, 0b011, 0b111]] * 3
    assert net.members[0].missing[2] == "not in 2 of 3 chunks: its piece of chunk 0 is unusable: not a number"


def test_a_sender_of_a_piece_that_is_no_payload_has_broken_the_rules() -> None:
    exchange, vault = machine(3, 0, [0, 2])
    vault.malformed = 0b010
    with pytest.raises(PeerError, match="its piece of chunk 0 is unusable: a bomb"):
        exchange.on_piece(1.0, 1, 0, 0, 4)
    assert "its piece of chunk 0 is unusable: a bomb" in exchange.missing[1]


def test_a_sender_of_a_result_that_is_no_payload_has_broken_the_rules() -> None:
    exchange, _ = machine(3, 0, [1, 2])
    with pytest.raises(PeerError, match="its result of chunk 0 is unusable: a bomb"):
        exchange.on_result(1.0, 1, 0, 0, 0b111, -2)
    assert not exchange.is_occupied(0)
    assert exchange.wants_result(2, 0, 0), "somebody else may have it"


def test_a_sender_of_a_result_that_is_not_finite_is_lost() -> None:
    exchange, _ = machine(3, 0, [1, 2])
    exchange.on_result(1.0, 1, 0, 0, 0b111, -1)
    assert exchange.take_actions()[0] == CloseLink(1)
    assert exchange.missing == {1: "its result of chunk 0 is unusable: not a number"}
    assert not exchange.is_occupied(0)
    assert not exchange.wants_result(1, 0, 0)
    assert exchange.wants_result(2, 0, 0)


def test_other_contents_under_the_same_plan_fail_the_round_before_it_is_published() -> None:
    exchange, _ = machine(3, 0, [0])
    exchange.on_message(0.0, 1, Done(0, b"otherwise"[:8]))
    exchange.on_piece(0.0, 1, 0, 0, 4)
    exchange.on_piece(0.0, 2, 0, 0, 16)
    assert (exchange.ended, exchange.reason) == (Ended.FAILED, "another member says that it holds another result")
    assert Finished(True) not in exchange.take_actions()


# ------------------------------------------------------------------------------------------------------ hostile input


@pytest.mark.parametrize(
    ("sender", "message"),
    [
        (1, Done(1 << 40, b"12345678")),
        (1, Commit(1, ((0, 2, 1),))),
        (1, Commit(0, ((0, 1, 1),))),
        (1, Need(0, 0b1000)),
        (1, Prepare(2)),
        (1, Prepare((1 << 32) + 1)),
        (1, Promise(4, True, 4)),
        (1, NewPlan(2, 0b001, (), ())),
        (1, NewPlan(2, 0b1011, (), ())),
        (1, NewPlan(2, 0b011, (), ())),
        (1, NewPlan(2, 0b110, ((0, 2, 0),), ())),
        (1, NewPlan(2, 0b110, ((1, 2, 1), (0, 2, 1)), ())),
        (1, NewPlan(2, 0b110, ((9, 2, 1),), ())),
        (1, NewPlan(2, 0b110, ((0, 2, 7),), ())),
        (1, NewPlan(2, 0b110, (), ((0, 0b001),))),
        (1, NewPlan(2, 0b110, (), ((5, 0b010),))),
        (1, NewPlan(2, 0b110, (), (), 0b010)),
        (1, NewPlan(2, 0b110, (), (), 0b1000)),
        (1, Want(0, ((-1, 0),))),
        (1, Want(0, ((2, 0),))),
        (1, Want(0, tuple((0, 0) for _ in range(1000)))),
        (1, Ask(((0, 0),))),
        (1, Ask(((0, 1 << 32),))),
    ],
)
def test_messages_that_no_honest_member_sends_are_its_fault(sender: int, message: object) -> None:
    exchange, _ = machine(3, 0, [0, 1])
    with pytest.raises(PeerError):
        exchange.on_message(0.0, sender, message)  # type: ignore[arg-type]


def test_promises_that_contradict_themselves_are_their_senders_fault() -> None:
    good = Promise(3, True, 3, -1, (), b"\x00", b"\x02")
    for bad in (
        dataclasses.replace(good, accepted=3),
        dataclasses.replace(good, held=b""),
        dataclasses.replace(good, held=b"\x00\x00"),
        dataclasses.replace(good, held=b"\x04"),
        dataclasses.replace(good, opened=b"\x01"),
        dataclasses.replace(good, changes=((0, 3, 1),)),
        Promise(3, False, 1),
    ):
        exchange, _ = machine(3, 0, [0, 1])
        exchange.on_message(0.0, 1, Need(0, 0b100))
        assert (1, Prepare(3)) in messages(exchange)
        with pytest.raises(PeerError):
            exchange.on_message(0.0, 1, bad)
        exchange.on_message(0.0, 1, good)


def test_a_commit_or_plan_that_contradicts_the_agreed_one_is_refused() -> None:
    exchange, _ = machine(3, 0, [0, 1])
    exchange.on_message(0.0, 2, NewPlan(2, 0b110, ((0, 2, 1),), ()))
    with pytest.raises(PeerError, match="another table for 2"):
        exchange.on_message(0.0, 1, NewPlan(2, 0b110, ((0, 2, 2),), ()))
    with pytest.raises(PeerError, match="another table"):
        exchange.on_message(0.0, 1, Commit(2, ((0, 2, 2),)))
    exchange.on_message(0.0, 1, Commit(2, ((0, 2, 1),)))


def test_records_that_cannot_belong_to_the_plan_are_refused() -> None:
    exchange, _ = machine(4, 0, [0, 1], senders=0b0111)
    for bad in ((1, 2, 0), (1, -1, 0), (1, 0, -1), (1, 0, 1), (1, 1, 0), (3, 0, 0), (1, 0, 1 << 32)):
        with pytest.raises(PeerError):
            exchange.wants_piece(*bad)
        with pytest.raises(PeerError):
            exchange.on_piece(0.0, *bad, 4)
    for bad in ((1, 2, 0), (1, -1, 0), (1, 1, 1 << 32), (1, 0, 0)):
        with pytest.raises(PeerError):
            exchange.wants_result(*bad)
    for contributors in (0, 0b1000, 0b1111, 1 << 70):
        with pytest.raises(PeerError):
            exchange.on_result(0.0, 1, 1, 0, contributors, 4)
    assert exchange.wants_result(1, 1, 0)


def test_a_piece_counts_once_and_nothing_counts_from_the_lost() -> None:
    exchange, vault = machine(4, 0, [0])
    exchange.on_piece(0.0, 1, 0, 0, 4)
    exchange.on_piece(0.0, 1, 0, 0, 4)
    exchange.on_lost(0.0, 2, "its link ended")
    exchange.on_piece(0.0, 2, 0, 0, 16)
    exchange.on_message(0.0, 2, Few())
    exchange.on_piece(0.0, 3, 0, 0, 64)
    assert exchange.chunk_contributors == [0b1011]
    assert vault.slots[0] == decode(0b1011)


EPOCHS = st.one_of(st.integers(0, 9), st.integers(0, 1 << 34))
ACCEPTED = st.integers(-1, 9)
MEMBERS = st.integers(-1, 5)
CHUNKS = st.integers(-1, 4)
MASKS = st.one_of(st.integers(0, 15), st.integers(0, (1 << 64) - 1))
ENTRIES = st.lists(st.tuples(CHUNKS, EPOCHS, MEMBERS), max_size=4).map(tuple)
WANTS = st.lists(st.tuples(CHUNKS, EPOCHS), max_size=5).map(tuple)
BITMAPS = st.sampled_from([b"", b"\x00", b"\x01", b"\x05", b"\x07", b"\xff", b"\x00\x00"])
MESSAGES = st.one_of(
    st.builds(Done, EPOCHS, st.binary(min_size=8, max_size=8)),
    st.builds(Commit, EPOCHS, ENTRIES),
    st.builds(Need, EPOCHS, MASKS),
    st.just(Few()),
    st.builds(Prepare, EPOCHS.filter(bool)),
    st.builds(
        Promise, EPOCHS.filter(bool), st.booleans(), EPOCHS, EPOCHS.map(lambda e: e - 1), ENTRIES, BITMAPS, BITMAPS
    ),
    st.builds(NewPlan, EPOCHS.filter(bool), MASKS, ENTRIES, st.lists(st.tuples(CHUNKS, MASKS), max_size=3).map(tuple)),
    st.builds(Want, EPOCHS, WANTS),
    st.builds(Ask, WANTS),
)
EVENTS = st.one_of(
    st.tuples(st.just("on_message"), st.integers(1, 3), MESSAGES),
    st.tuples(st.just("on_piece"), st.integers(1, 3), CHUNKS, EPOCHS, st.just(1)),
    st.tuples(st.just("on_result"), st.integers(1, 3), CHUNKS, EPOCHS, MASKS, st.sampled_from([-1, 1])),
    st.tuples(st.just("on_lost"), st.integers(1, 3), st.just("gone")),
    st.tuples(st.just("on_tick")),
)


@given(st.lists(EVENTS, max_size=40))
@settings(max_examples=300)
def test_whatever_members_send_only_they_are_blamed(events: list[tuple[object, ...]]) -> None:
    exchange, vault = machine(4, 0, [0, 1, 0])
    now, n_finished = 0.0, 0
    for name, *arguments in events:
        now += 0.3
        try:
            getattr(exchange, str(name))(now, *arguments)
        except PeerError:
            assert name != "on_tick"
        actions = exchange.take_actions()
        n_finished += sum(isinstance(action, Finished) for action in actions)
        assert len(actions) <= 64
        assert len(vault.accumulators) <= 3
        assert exchange.gone or (exchange.wakeup or 0) > 0
    assert n_finished == (exchange.ended is not None)
    exchange.on_tick(ALL)
    assert exchange.gone


# --------------------------------------------------------------------------------------------------------------- causes

INTERNALS = re.compile(r"epoch|mask|\bplan\b|\bmember \d|0x")


def test_at_the_deadline_everybody_who_still_owes_something_is_named() -> None:
    exchange, _ = machine(3, 0, [0, 1])
    exchange.on_piece(0.1, 1, 0, 0, 4)
    exchange.on_tick(100.0)
    late = "what it had to send had not come when the round's time was over"
    assert exchange.ended is Ended.FAILED
    assert exchange.missing == {1: late, 2: late}  # the mean of chunk 1, and a piece of chunk 0
    assert exchange.reason == "the round's time is over while it waits for 2 of 2 chunks"


def test_who_never_said_that_it_holds_the_result_is_named() -> None:
    exchange, _ = machine(3, 0, [0])
    exchange.on_piece(0.1, 1, 0, 0, 4)
    exchange.on_piece(0.1, 2, 0, 0, 16)
    exchange.on_lost(0.2, 2, "its link ended")
    exchange.on_tick(100.0)
    unsaid = "it had not said when the round's time was over that it holds the result"
    assert exchange.missing == {1: unsaid, 2: "its link ended"}


def test_a_silent_reducer_is_blamed_and_its_chunks_are_counted_as_redone() -> None:
    net = Net(make_plans(3, [2, 2]))
    net.go(*pairs_but(net, (2, 0), (2, 1)))  # its pieces and results go nowhere, and its link is up
    for moment in (2.6, 2.9, 3.3, 4.0, 5.0):
        for i in (0, 1):
            net.tick(i, moment)
        net.go(*pairs_but(net, (2, 0), (2, 1)))
    net.run()
    assert any(member.redone == {2: 2} for member in net.members)
    assert "it sent nothing for 2.5 s while this machine waited for its chunks" in (
        net.members[0].troubles.get(2, ""),
        net.members[1].troubles.get(2, ""),
    )


def test_who_delivered_last_is_known() -> None:
    exchange, _ = machine(3, 0, [0])
    assert exchange.last_delivery is None
    exchange.on_piece(0.5, 2, 0, 0, 16)
    exchange.on_piece(0.7, 1, 0, 0, 4)
    assert exchange.last_delivery == (1, 0.7)


def test_whatever_happens_the_missing_have_a_cause_that_people_understand() -> None:
    told, n_failed = [], 0
    for seed in range(120):
        net = simulate(seed).net
        for member in (each for i, each in enumerate(net.members) if i not in net.dead and each.ended is not None):
            missing = member.missing
            if member.ended is Ended.FAILED:
                n_failed += 1
                assert missing, f"seed {seed}: {member.reason}"
            assert all(missing.values())
            told += [member.reason, *missing.values()]
    assert n_failed > 10
    assert not [sentence for sentence in told if INTERNALS.search(sentence)]
