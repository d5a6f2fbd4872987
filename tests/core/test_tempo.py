"""Slow members, directed: a round in which every link takes its time, and who is waited for and who is left behind.

`play` drives real machines by a clock: each ordered pair of members carries so many records a second, control messages
take none. The checks of `sim.exchange_net` hold all along: whatever is judged, nobody ends with other bytes.
"""

from collections import Counter
from collections.abc import Callable

import pytest
from sim.exchange_net import Net, make_plans

from mpd.exchange import Ended, SendResult
from mpd.rounds import RoundPlan
from mpd.tempo import Delivery, Tempo

N = 8
N_CHUNKS = 8  # in every shard
STEP_S = 0.01
FAST = 100.0  # records a second on a link: a round takes N_CHUNKS * 2 / FAST = 0.16 s
PROGRESS_S = 0.5
FULL = (1 << N) - 1

Rates = Callable[[int, int, bool], float]
"""Sender, receiver, whether the record is a result: how many of those the link carries in a second."""


def play(rates: Rates, until: float = 30.0, n: int = N, progress_s: float = PROGRESS_S) -> tuple[Net, dict[int, float]]:
    """Return the network at the end, and when each member ended."""
    net = Net(make_plans(n, [owner for owner in range(n) for _ in range(N_CHUNKS)], progress_s=progress_s))
    credit: dict[tuple[int, int], float] = dict.fromkeys(net.links, 0.0)
    ended: dict[int, float] = {}
    now = 0.0
    while net.up() and now < until:
        now += STEP_S
        for i in net.up():
            if (net.members[i].wakeup or now) <= now:
                net.tick(i, now)
            net.clocks[i] = now
        for pair, link in net.links.items():
            while link.control and pair[1] in net.up():
                net.deliver(*pair, "control")
            if not link.data:
                credit[pair] = 0.0
            while link.data and pair[1] in net.up():
                rate = rates(*pair, isinstance(link.data[0].action, SendResult))
                credit[pair] += rate * STEP_S if credit[pair] < 1 else 0.0
                if credit[pair] < 1:
                    break
                credit[pair] -= 1
                net.deliver(*pair, "data")
        ended |= {i: now for i in range(n) if net.members[i].ended is not None and i not in ended}
    net.check_end()
    return net, ended


def slow_in(member: int, *, sending: float = FAST, receiving: float = FAST, returning: float = FAST) -> Rates:
    """All links are fast but those of `member`."""

    def rates(i: int, j: int, is_result: bool) -> float:
        if i == member:
            return returning if is_result else sending
        return receiving if j == member else FAST

    return rates


def ended_well(net: Net, *but: int) -> None:
    assert all(net.members[i].ended is Ended.SUCCESS for i in range(net.n) if i not in but)


def test_equal_members_wait_for_each_other() -> None:
    net, ended = play(lambda i, j, is_result: FAST)
    ended_well(net)
    assert max(ended.values()) < 0.5
    assert all(member.contributors == FULL for member in net.members)
    net, ended = play(lambda i, j, is_result: 1.0, progress_s=2.0)
    ended_well(net)
    assert all(member.contributors == FULL for member in net.members)


def test_a_slow_sender_is_left_behind_for_the_rest_of_the_shard() -> None:
    """It is never silent: a piece comes from it every 0.4 s. Alone it would hold everybody up for 3.2 s."""
    net, ended = play(slow_in(7, sending=2.5))
    ended_well(net, 7)
    assert max(ended[i] for i in range(7)) < 1.2
    masks = set(net.members[0].chunk_contributors)
    assert masks == {FULL, FULL & ~(1 << 7)}
    assert "it was too slow: " in net.members[0].missing[7]


def test_who_is_only_somewhat_slower_is_waited_for() -> None:
    net, _ = play(slow_in(7, sending=FAST / 4, returning=FAST / 4, receiving=FAST / 4))
    ended_well(net)
    assert all(member.contributors == FULL for member in net.members)
    assert net.sent["redone piece"] == net.sent["Need"] == 0


@pytest.mark.parametrize("direction", ["receiving", "returning"])
def test_what_a_slow_reducer_does_not_return_is_redone_by_others(direction: str) -> None:
    """Whether it has no pieces to reduce or holds every chunk and cannot return them: it never is silent for long."""
    net, ended = play(slow_in(7, **{direction: 2.5}))
    ended_well(net, 7)
    assert max(ended[i] for i in range(7)) < 2.0
    assert 0 < net.sent["redone piece"] <= 2 * N_CHUNKS * (N - 1)
    assert all(net.members[i].chunk_contributors[0] == FULL for i in range(7))


def test_a_slow_link_costs_the_round_its_sender_and_its_reducer_at_once() -> None:
    """A reducer that was too slow to send gets no time of its own."""
    net, ended = play(slow_in(7, sending=1.0, receiving=1.0, returning=1.0))
    ended_well(net, 7)
    assert max(ended[i] for i in range(7)) < 2.0


def test_nobody_waits_for_a_slow_receiver_and_it_ends_with_the_same_bytes() -> None:
    def rates(i: int, j: int, is_result: bool) -> float:
        return 3.0 if j == 7 and is_result else FAST

    net, ended = play(rates)
    ended_well(net)
    assert max(ended[i] for i in range(7)) < 0.5
    assert 2.0 < ended[7] < 30.0


def test_the_majority_is_never_called_slow() -> None:
    def rates(i: int, j: int, is_result: bool) -> float:
        return FAST if i in (0, 1, 2) else 4.0

    net, ended = play(rates)
    ended_well(net)
    assert min(ended.values()) > 2.0
    assert all(member.contributors == FULL for member in net.members)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_in_small_groups_a_slow_member_is_left_behind_as_well(n: int) -> None:
    net, ended = play(slow_in(n - 1, sending=2.5, receiving=2.5, returning=2.5), n=n)
    ended_well(net, n - 1)
    assert max(ended[i] for i in range(n - 1)) < 2.5


def test_a_pair_waits_as_long_as_it_takes() -> None:
    net, _ = play(lambda i, j, is_result: 3.0 if i else FAST, n=2)
    ended_well(net)
    assert all(member.contributors == 0b11 for member in net.members)


# ---------------------------------------------------------------------------------------------------------- the counts


def tempo(owners: tuple[int, ...] = (0, 0, 1, 2), me: int = 0, senders: int = 0b111) -> Tempo:
    return Tempo(RoundPlan(3, me, owners, 0b111, senders, deadline=60.0, progress_s=1.0), 10.0)


def test_a_delivery_counts_pieces_once_and_keeps_the_longest_pause() -> None:
    counts = tempo()
    for at, chunk in ((10.5, 0), (13.5, 0), (12.0, 1), (20.0, 1)):
        counts.note_piece(at, 1, chunk)
    assert counts.deliveries() == {1: Delivery(2, 2.0, 1.5), 2: Delivery(0, None, 0.0)}
    assert tempo(senders=0b011).deliveries() == {1: Delivery(0, None, 0.0)}
    assert tempo(owners=(1, 2)).deliveries() == {}


def test_who_owns_nothing_judges_no_sender() -> None:
    counts = tempo(owners=(1, 2))
    assert counts.slow_senders(1000.0, 0b110) == {}
    assert counts.slow_reducers(10.0, 0, Counter({2: 1})) == 0


def test_reducers_are_compared_once_most_have_returned_everything_and_anew_under_each_plan() -> None:
    counts = tempo()
    counts.note_piece(10.5, 1, 0)
    counts.note_piece(11.0, 1, 1)  # typical: 1 s, so patience is 2.5 s and 5 s
    assert counts.slow_reducers(12.0, 0, Counter({0: 2, 2: 1})) == 0
    assert counts.slow_reducers(100.0, 0, Counter({2: 1})) == 0  # now most have
    assert counts.slow_reducers(104.9, 0, Counter({2: 1})) == 0
    assert counts.slow_reducers(105.0, 0, Counter({2: 1})) == 0b100
    assert counts.slow_reducers(105.0, 3, Counter({2: 1})) == 0
    assert counts.slow_reducers(110.0, 3, Counter({0: 2})) == 0  # we ourselves
    counts.laggards = 0b100
    assert counts.slow_reducers(110.0, 3, Counter({2: 1})) == 0b100
