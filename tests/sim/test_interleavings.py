"""The nastiest interleavings of one round, step by step; `sim.exchange_net` objects as soon as a promise is broken.

Those that are told in tests/core/test_exchange.py: a result that is read just before or just after the promise, three
plans of which the second is somebody's result, the last chunk between promise and plan, half a group that is left.
"""

from sim.exchange_net import ALL, Net, make_plans
from sim.traces import outcomes

from mpd.exchange import Ended
from mpd.messages import Ask, NewPlan, Prepare, Promise


def test_an_owner_that_only_the_coordinator_has_lost_never_writes_its_chunk_again() -> None:
    net = Net(make_plans(4, [3]))
    net.cut(0, 3)  # 0 coordinates
    net.deliver(0, 3, "lost")
    for i in (1, 2):
        net.control(0, i, Prepare)
        net.control(i, 0, Promise)  # nobody holds anything: 0 redoes the chunk under plan 4
    for i in (1, 2):
        net.data(i, 3)
    assert net.members[3].holds(0, 0)  # meanwhile its owner closes it without 0
    for i in (1, 2):
        net.data(3, i)  # and both hold that
    net.go((0, 1), (1, 3))  # plan 4 reaches 1, and through it the owner
    net.crash(0)
    net.run()  # 2, which never saw plan 4, holds version 0: a third plan goes back to it
    assert outcomes(net) == [None, [0b1110], [0b1110], [0b1110]][1:]


def test_an_owner_that_freezes_before_its_done_is_heard_never_ends_with_its_own_bytes() -> None:
    for n_suspicious in (1, 2):
        net = Net(make_plans(3, [2]))
        for i in (0, 1):
            net.data(i, 2)
        assert net.members[2].holds(0, 0)  # and now it is frozen: nothing of it is read
        for i in range(n_suspicious):
            net.cut(i, 2)
        net.go((0, 1), (1, 0))
        while not all(net.members[i].ended for i in (0, 1)) and n_suspicious == 2:
            net.tick(0)
            net.go((0, 1), (1, 0))
        net.run()  # it goes on, with full socket buffers
        results = {tuple(masks) for masks in outcomes(net) if masks is not None}
        assert results == {(0b011,)} if n_suspicious == 2 else len(results) == 1
        assert (net.published[2] is None) == (n_suspicious == 2)


def test_a_coordinator_and_its_writer_die_in_the_middle_of_their_plan() -> None:
    net = Net(make_plans(7, [6, 6]))
    net.crash(6)
    for i in range(6):
        net.deliver(6, i, "lost")
    for i in range(1, 6):
        net.go((i, 0))
        net.control(0, i, Prepare)
        net.control(i, 0, Promise)
    for i in (1, 2):
        net.control(0, i, NewPlan)  # chunk 0 is redone by 0, chunk 1 by 1, and only 1 and 2 know
    net.crash(0)
    for i in range(2, 6):
        while Ask not in net.on_the_way(1, i)[:1]:
            net.deliver(1, i, "control")
        net.control(1, i, Ask)
        net.data(i, 1)
    net.deliver(0, 1, "lost")  # so 1 closes
    net.data(1, 2)  # one member gets its chunk
    net.crash(1)
    net.run()
    assert outcomes(net) == [[0b0111100, 0b0111110]] * 4
    assert net.sent["forwarded result"] == 3


def test_a_piece_that_thaws_after_the_redone_chunk_was_closed_counts_nothing() -> None:
    net = Net(make_plans(4, [3]))
    net.crash(3)
    for i in range(3):
        net.deliver(3, i, "lost")
    for i in (1, 2):
        net.go((i, 0))
        net.control(0, i, Prepare)
        net.control(i, 0, Promise)
    for i in (1, 2):
        net.control(0, i, NewPlan, Ask)
    net.data(1, 0)  # the piece of 2 is on its way when 2 freezes
    assert not net.members[0].holds(0, 4)
    net.tick(0, 1.3)
    assert net.members[0].holds(0, 4)
    net.data(2, 0)
    net.run()
    assert outcomes(net) == [[0b0011]] * 3


def test_a_finisher_whose_inputs_are_overwritten_serves_results_and_no_input() -> None:
    net = Net(make_plans(3, [0, 1]))
    net.go((0, 1), (1, 0), (2, 0), (2, 1))
    assert [net.members[i].ended for i in (0, 1)] == [Ended.SUCCESS] * 2  # their trainers go on: inputs are garbage
    net.cut(2, 1)  # the laggard will never have chunk 1 from its owner
    net.links[2, 0].control.append(Ask(((1, 5),)))  # of a plan of its own that has come to nothing
    net.run()
    assert outcomes(net) == [[0b111] * 2] * 3
    assert net.sent["forwarded result"] == 1
    assert not net.sent["redone piece"]


def test_a_ring_of_lost_links_ends_for_everybody_after_a_few_attempts() -> None:
    net = Net(make_plans(4, [0, 1, 2, 3]))
    net.cut(0, 1, ALL, 0)
    net.cut(2, 3, ALL, 0)
    net.run()
    assert all(member.ended for member in net.members)
    assert len({tuple(masks) for masks in outcomes(net) if masks is not None}) == 1
    assert net.sent["Prepare"] <= 12
    assert max(net.clocks) < 10
