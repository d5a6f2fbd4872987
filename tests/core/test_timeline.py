"""Clocks: groups wait for their members and for nobody else, and absence, lateness and loss cost what they should."""

import time

import numpy as np
import pytest

from mpd.costs import Costs
from mpd.deadlines import WINDOW
from mpd.pricing import NOBODY, Floats, Peers, Work
from mpd.roll import MatchLimits
from mpd.timeline import ABSENT, Timeline, places_of

FREE = Costs(0, 0, 0, 0, 0, 0, 0, busy=1.0, serial=0.0)
V = 10**7


def timeline(up: Floats, costs: Costs = FREE, train_s: Floats | float = 0.0, **work: bool) -> Timeline:
    return Timeline(Peers(up, up, np.zeros(len(up))), Work(V, **work), costs, train_s)


def test_groups_are_laid_out_by_place() -> None:
    places = places_of(np.array([1, 0, ABSENT, 1, 7, 1]))
    assert places.tolist() == [[1, NOBODY, NOBODY], [0, 3, 5], [4, NOBODY, NOBODY]]
    assert places_of(np.array([ABSENT, ABSENT])).shape == (0, 0)


def test_groups_do_not_wait_for_each_other() -> None:
    clock = timeline(np.array([1e7, 1e7, 1e6, 1e6]))
    for _ in range(3):
        seen = clock.play(np.array([0, 0, 1, 1]))
    assert seen.ended[2:] == pytest.approx(10 * seen.ended[:2])
    assert (seen.begun == seen.ready).all()


def test_a_peer_that_moves_brings_its_delay_along() -> None:
    clock = timeline(np.array([1e7, 1e7, 1e6, 1e6]))
    first = clock.play(np.array([0, 0, 1, 1]))
    second = clock.play(np.array([0, 1, 0, 1]))
    assert second.begun == pytest.approx(np.full(4, first.ended[2]))
    assert (second.begun - second.ready)[:2] == pytest.approx(np.full(2, first.ended[2] - first.ended[0]))


def test_no_barrier_is_cheaper_than_one() -> None:
    rng = np.random.default_rng(3)
    up = 1e7 * np.exp(0.5 * rng.standard_normal(1000))
    clock, barrier = timeline(up, is_grid=True), 0.0
    for _ in range(6):
        groups = rng.permutation(1000) // 8
        seen = clock.play(groups)
        barrier += float(timeline(up, is_grid=True).play(groups).ended.max())
    assert seen.ended.max() < barrier
    assert np.median(seen.ended) < 0.9 * barrier


def test_who_comes_after_the_window_is_left_out() -> None:
    for is_grid, window_s in ((True, WINDOW.first_s), (False, WINDOW.cap_s)):
        train_s = np.array([0.0, 1.0, window_s - 0.1, window_s + 1.0])
        seen = timeline(np.full(4, 1e7), train_s=train_s, is_grid=is_grid).play(np.zeros(4, np.int64))
        assert seen.size.tolist() == [3, 3, 3, 0]
        assert seen.begun[:3] == pytest.approx(np.full(3, window_s))
        assert seen.took_part.tolist() == [True, True, True, False]
        assert seen.ended[3] == pytest.approx(max(window_s + 1.0, float(np.median(seen.ended[:3]))))


def test_the_absent_come_back_where_the_others_are() -> None:
    clock = timeline(np.full(5, 1e7))
    seen = clock.play(np.array([0, 0, 0, 0, ABSENT]))
    assert seen.size[4] == 0
    assert seen.sent[4] == 0
    assert seen.limit[4] == -1
    assert clock.ready[4] == pytest.approx(seen.ended[0])


def test_a_line_that_lacks_a_peer_waits_a_moment_for_newcomers() -> None:
    groups = np.arange(16) // 4
    whole = timeline(np.full(16, 1e7), is_grid=True).play(groups)
    groups[0] = ABSENT
    short = timeline(np.full(16, 1e7), is_grid=True).play(groups)
    assert short.begun[1:4] == pytest.approx(np.full(3, MatchLimits().settle_s))
    assert short.begun[4:] == pytest.approx(whole.begun[4:])


def test_a_peer_without_company_waits_for_one_window() -> None:
    seen = timeline(np.full(3, 1e7)).play(np.array([0, 0, 1]))
    assert seen.size.tolist() == [2, 2, 0]
    assert seen.ended[2] == WINDOW.first_s


def test_nobody_there_is_no_round() -> None:
    seen = timeline(np.full(3, 1e7)).play(np.full(3, ABSENT))
    assert (seen.ended == 0).all()


def test_a_lost_member_delays_its_group_only() -> None:
    lost_at = np.full(16, np.inf)
    lost_at[5] = 0.5
    clock = timeline(np.full(16, 1e7))
    seen = clock.play(np.arange(16) // 4, lost_at)
    assert seen.ended[4:8].min() > seen.ended[:4].max()
    assert seen.ended[8:] == pytest.approx(np.full(8, seen.ended[0]))


def test_thousands_of_peers_take_a_moment() -> None:
    rng = np.random.default_rng(1)
    clock = timeline(1e7 * np.exp(0.8 * rng.standard_normal(5000)), is_grid=True)
    began = time.process_time()
    for _ in range(3):
        clock.play(rng.permutation(5000) // 16)
    assert time.process_time() - began < 3  # 0.1 s on the machine of docs/performance.md: this only forbids a blow-up
