"""Limits learnt from measurements: always within their bounds, never shortened by a longer wait, never led by a few."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.deadlines import (
    FRESH_S,
    HISTORY,
    HOPE,
    MAX_LEADER_FACTOR,
    MAX_PEERS,
    MIN_MEASURED_BYTES,
    MIN_SAMPLES,
    PROGRESS,
    WINDOW,
    Bounds,
    Gauge,
    Pace,
    SenderReport,
    is_left_behind,
    patience_s,
)
from mpd.ids import PeerId

ANYTHING = st.floats(allow_nan=True, allow_infinity=True)
SECONDS = st.floats(0, 1e6)
BOUNDS = st.sampled_from([PROGRESS, WINDOW, PROGRESS.starting_at(0.1), WINDOW.starting_at(1000.0)])
MIB = 1 << 20


def gauge(*samples: float) -> Gauge:
    made = Gauge()
    for sample in samples:
        made.add(sample)
    return made


def peer(i: int) -> PeerId:
    return PeerId(i.to_bytes(20, "big"))


def report(pause_s: float = 0.1, seconds: float = 1.0, n_done: int = 8, mib: float = 4.0) -> SenderReport:
    return SenderReport(n_done, 8, int(mib * MIB), seconds, pause_s, n_members=4)


def pace_of(pauses: dict[int, float], n_rounds: int = MIN_SAMPLES) -> Pace:
    """Return what is learnt from `n_rounds` in which each peer paused as long as said."""
    pace = Pace()
    for at in range(n_rounds):
        pace.note_round(float(at), {peer(i): report(pause) for i, pause in pauses.items()})
    return pace


# --------------------------------------------------------------------------------------------------------------- gauges


@given(st.lists(ANYTHING), BOUNDS)
def test_a_limit_keeps_its_bounds_whatever_was_measured(samples: list[float], bounds: Bounds) -> None:
    measured = gauge(*samples)
    assert len(measured) == min(HISTORY, sum(0 <= sample < math.inf for sample in samples))
    assert bounds.floor_s <= bounds.limit(measured) <= bounds.cap_s
    if len(measured) < MIN_SAMPLES:
        assert bounds.limit(measured) == bounds.first_s


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=MIN_SAMPLES, max_size=HISTORY), BOUNDS)
def test_longer_waits_never_make_a_limit_shorter(pairs: list[tuple[float, float]], bounds: Bounds) -> None:
    shorter, longer = gauge(*map(min, pairs)), gauge(*map(max, pairs))
    assert bounds.limit(shorter) <= bounds.limit(longer)


@given(st.lists(st.floats(0, 10), min_size=MIN_SAMPLES, max_size=HISTORY))
def test_between_floor_and_cap_a_limit_exceeds_what_was_usual(samples: list[float]) -> None:
    measured = gauge(*samples)
    assert PROGRESS.limit(measured) >= min(PROGRESS.cap_s, 2 * measured.quantile(0.9))
    assert PROGRESS.limit(measured) <= max(PROGRESS.floor_s, 4 * max(samples))


@given(st.lists(st.floats(0, 0.1), min_size=20, max_size=20), st.lists(st.floats(0, 1e9), max_size=2))
def test_two_odd_measurements_move_nothing_beyond_the_usual(usual: list[float], odd: list[float]) -> None:
    assert PROGRESS.limit(gauge(*usual, *odd)) <= PROGRESS.limit(gauge(*[0.1] * 20))


def test_what_is_long_ago_is_forgotten() -> None:
    measured = gauge(*[100.0] * HISTORY, *[0.01] * HISTORY)
    assert PROGRESS.limit(measured) == PROGRESS.floor_s
    assert gauge().median == 0.0


def test_a_first_value_widens_its_bounds() -> None:
    assert PROGRESS.starting_at(0.1) == Bounds(0.1, 0.1, 20.0, 4.0, 2.0)
    assert PROGRESS.starting_at(50.0) == Bounds(0.5, 50.0, 50.0, 4.0, 2.0)


# ------------------------------------------------------------------------------------------------------- progress limit


def test_a_fast_group_learns_the_floor_and_a_slow_one_to_wait() -> None:
    peers = [peer(i) for i in range(3)]
    assert Pace().progress_s(peers) == Pace().progress_s([]) == PROGRESS.first_s
    assert pace_of(dict.fromkeys(range(3), 0.01)).progress_s(peers) == PROGRESS.floor_s
    assert pace_of(dict.fromkeys(range(3), 3.7)).progress_s(peers) == pytest.approx(4 * 3.7)
    assert pace_of(dict.fromkeys(range(3), 1e9)).progress_s(peers) == PROGRESS.cap_s
    assert Pace(progress_s=0.3).progress_s(peers) == 0.3


@given(st.lists(ANYTHING, min_size=3, max_size=3))
def test_a_minority_does_not_decide_how_long_everybody_waits(pauses: list[float]) -> None:
    pace = pace_of({**dict.fromkeys(range(4), 0.2), **dict(enumerate(pauses, 4))})
    assert pace.progress_s(peer(i) for i in range(7)) <= 0.8 + 1e-9


def test_each_link_is_given_its_own_patience() -> None:
    pace = pace_of({0: 0.01, 1: 3.0})
    assert pace.patience(peer(i) for i in range(3)) == {
        peer(0): PROGRESS.floor_s,
        peer(1): 12.0,
        peer(2): PROGRESS.first_s,
    }


def test_silence_is_no_measurement() -> None:
    """Else those who wait for a dead member would learn to wait even longer the next time."""
    pace = Pace()
    for at in range(10):
        pace.note_round(float(at), {peer(0): report(pause_s=9.0, n_done=0)})
    assert pace.progress_s([peer(0)]) == PROGRESS.first_s


@given(ANYTHING.filter(lambda x: not math.isnan(x)), st.floats(0.001, 30))
def test_no_leader_moves_a_limit_beyond_what_own_links_show(proposed: float, pause_s: float) -> None:
    pace, peers = pace_of({0: pause_s}), [peer(0)]
    own, accepted = pace.progress_s(peers), pace.accept_progress_s(proposed, peers)
    assert own <= accepted <= min(MAX_LEADER_FACTOR * own, PROGRESS.cap_s)
    assert Pace().accept_progress_s(proposed, peers) >= PROGRESS.first_s


# --------------------------------------------------------------------------------------------------------------- window


def window_after(*lateness: dict[int, float], n_times: int = MIN_SAMPLES) -> Pace:
    pace = Pace()
    for _ in range(n_times):
        for arrivals in lateness:
            pace.note_arrivals({peer(i): seconds for i, seconds in arrivals.items()})
    return pace


def test_a_window_is_as_long_as_the_latest_who_comes_in_time() -> None:
    peers = [peer(i) for i in range(3)]
    assert Pace().window_s([]) == Pace().window_s(peers) == WINDOW.first_s
    assert window_after({0: 0.0, 1: 0.01, 2: 0.02}).window_s(peers) == WINDOW.floor_s
    assert window_after({0: 0.0, 1: 0.01, 2: 3.0}).window_s(peers) == 6.0
    assert window_after({0: 0.0, 1: 0.01, 2: 9.0}).window_s(peers) == WINDOW.cap_s
    assert window_after({0: 0.0, 1: 0.01, 2: 99.0}).window_s(peers) == WINDOW.floor_s
    assert window_after({2: 99.0}).window_s([peer(2)]) == WINDOW.floor_s
    assert window_after({0: 0.0, 1: 0.01}).window_s(peers) == WINDOW.first_s  # a newcomer


@given(st.dictionaries(st.integers(0, 9), st.lists(ANYTHING, max_size=9)))
def test_a_window_keeps_its_bounds(arrivals: dict[int, list[float]]) -> None:
    pace = Pace()
    for i, samples in arrivals.items():
        for sample in samples:
            pace.note_arrivals({peer(i): sample})
    assert WINDOW.floor_s <= pace.window_s(peer(i) for i in range(10)) <= WINDOW.cap_s


# ------------------------------------------------------------------------------------------------------------ bandwidth


def test_bandwidth_is_that_of_the_whole_group_and_the_median_of_what_is_fresh() -> None:
    pace = Pace()
    for at, seconds in enumerate([1.0, 100.0, 1.0]):
        pace.note_round(float(at), {peer(0): report(seconds=seconds), peer(1): report(seconds=4.0)})
        assert (pace.upload(2.0, peer(0)) > 0) == (at == 2)
    assert pace.upload(2.0, peer(0)) == 12 * MIB
    assert pace.upload(2.0, peer(1)) == 3 * MIB
    assert pace.download(2.0) == 12 * MIB
    assert pace.upload(3 + FRESH_S, peer(0)) == pace.download(3 + FRESH_S) == 0.0
    assert pace.upload(2.0, peer(2)) == 0.0


def test_small_rounds_tell_nothing_of_bandwidth() -> None:
    pace = Pace()
    for at in range(9):
        pace.note_round(float(at), {peer(0): report(mib=0.5 * MIN_MEASURED_BYTES / MIB)})
    assert pace.upload(9.0, peer(0)) == pace.download(9.0) == 0.0
    assert len(pace.peers()) == 1


def test_who_has_delivered_nothing_is_taken_to_be_half_way_to_the_first_piece() -> None:
    assert report(seconds=2.0, n_done=0).upload == 0.5 / 8 * 4 * MIB * 3 / 2.0
    assert report(seconds=2.0, n_done=8).upload == 4 * MIB * 3 / 2.0
    assert SenderReport(0, 0, 0, 1.0, 0.0, 4).upload == 0.0
    assert report(seconds=0.0).upload == 0.0


def test_only_so_many_peers_are_remembered() -> None:
    pace = Pace()
    for i in range(2 * MAX_PEERS):
        pace.note_arrivals({peer(i): 0.0})
    assert pace.peers() == [peer(i) for i in range(MAX_PEERS, 2 * MAX_PEERS)]


# ------------------------------------------------------------------------------------------------------- left behind

COUNTS = st.integers(0, 64)
SHORT = st.floats(0, 1000)


@given(SHORT, COUNTS, SHORT, COUNTS, SHORT, st.floats(0.1, 20))
def test_nobody_is_left_behind_early_and_everybody_is_in_the_end(
    elapsed_s: float, n_done: int, last_s: float, n_owed: int, typical_s: float, progress_s: float
) -> None:
    patience = patience_s(typical_s, progress_s)
    if is_left_behind(elapsed_s, n_done, last_s, n_owed, typical_s, progress_s):
        assert n_done < n_owed
        assert elapsed_s >= patience
        assert is_left_behind(elapsed_s + 1, n_done, last_s, n_owed, typical_s, progress_s)
    elif n_done < n_owed:
        assert elapsed_s < HOPE * patience


@given(SHORT, st.integers(1, 64), SHORT, COUNTS, SHORT, st.floats(0.1, 20), COUNTS, SHORT)
def test_a_lower_rate_only_makes_it_worse(
    elapsed_s: float, n_done: int, last_s: float, n_owed: int, typical_s: float, progress_s: float, n: int, s: float
) -> None:
    if is_left_behind(elapsed_s, n_done, last_s, n_owed, typical_s, progress_s):
        assert is_left_behind(elapsed_s, max(1, n_done - n), last_s + s, n_owed, typical_s, progress_s)


def test_who_stumbles_or_is_nearly_there_is_waited_for_twice_as_long_as_who_is_slow() -> None:
    patience = patience_s(1.0, 1.0)
    assert is_left_behind(patience, 3, patience, 10, 1.0, 1.0)
    assert not is_left_behind(patience, 7, patience, 10, 1.0, 1.0)
    assert not is_left_behind(patience, 3, 0.5, 10, 1.0, 1.0)
    assert not is_left_behind(patience, 0, 0.0, 10, 1.0, 1.0)
    assert is_left_behind(HOPE * patience, 9, 0.5, 10, 1.0, 1.0)
