"""What is left of a round when members are lost in the middle of it: whose piece is where, and who holds a result."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.meetings import groups_by_label
from mpd.mixing import exchange, surviving_pieces
from mpd.rounds import redo_quorum, success_quorum

STAYED = np.inf


def lost(size, **when):
    found = np.full(size, STAYED)
    for place, part in when.items():
        found[int(place[1:])] = part
    return found


def test_everybody_is_in_every_chunk_if_nobody_is_lost():
    assert surviving_pieces(lost(5), 32).all()


def test_a_lost_member_is_in_the_chunks_that_came_before():
    pieces = surviving_pieces(lost(4, p1=0.5), 400)

    owners = np.arange(400) // 100
    assert pieces[[0, 2, 3]].all()
    for shard in (0, 1, 2, 3):  # its own too: what it closed is forwarded, the rest is redone without it
        assert pieces[1, owners == shard].mean() == pytest.approx(0.5, abs=0.02)
    assert not surviving_pieces(lost(4, p1=0.0), 400)[1].any()
    assert surviving_pieces(lost(4, p1=1.0), 400).all()


def test_what_is_redone_has_only_those_that_stayed():
    """The shard of place 0 is redone from its first chunk on, after place 1 has gone as well."""
    pieces = surviving_pieces(lost(5, p0=0.0, p1=0.9), 500)

    owners = np.arange(500) // 100
    assert not pieces[1, owners == 0].any()
    assert pieces[1, owners == 2].mean() == pytest.approx(0.9, abs=0.02)
    assert pieces[2:].all()


def test_a_group_without_a_majority_cannot_redo():
    assert surviving_pieces(lost(2, p0=0.5), 32) is None
    assert surviving_pieces(lost(4, p0=0.5, p1=0.5), 32) is None
    assert surviving_pieces(lost(5, p0=0.5, p1=0.5), 32) is not None
    assert surviving_pieces(lost(5, p0=0.5, p1=0.5, p2=0.5), 32) is None


def test_what_is_closed_can_be_forwarded_by_fewer():
    assert surviving_pieces(lost(2, p0=1.0), 32).all()
    assert surviving_pieces(lost(4, p0=1.0, p1=1.0), 32).all()
    assert surviving_pieces(lost(4, p0=1.0, p1=1.0, p2=1.0), 32) is None


@given(st.lists(st.one_of(st.just(STAYED), st.floats(0, 1)), min_size=1, max_size=12))
def test_who_stayed_is_in_all_of_it_or_nothing_came_of_it(when):
    pieces = surviving_pieces(np.array(when), 32)
    n_stayed = when.count(STAYED)
    if n_stayed < success_quorum(len(when)):
        assert pieces is None
    if n_stayed >= redo_quorum(len(when)):
        assert pieces is not None
    if pieces is not None:
        assert pieces[np.isinf(when)].all()


def test_an_exchange_averages_by_weight_within_groups():
    values = np.array([[1.0], [2.0], [4.0], [8.0], [16.0]])
    groups = groups_by_label(np.array([0, 1, 3, 4]), np.array([0, 0, 1, 1]))
    ended = exchange(values, groups, np.array([1.0, 3.0, 0.0, 0.0]), None)

    assert values.ravel().tolist() == [1.75, 1.75, 4.0, 8.0, 16.0]  # nothing weighs anything in the second group
    assert not ended.failed.any()
    assert ended.completed.all()
    assert ended.contributed.all()


def test_a_lost_member_and_a_failed_group_keep_what_they_had():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(10, 64))
    before = values.copy()
    groups = groups_by_label(np.arange(10), np.array([0] * 5 + [1] * 2 + [2] * 3))
    lost_at = lost(10, p4=0.25, p5=0.5)
    ended = exchange(values, groups, np.ones(10), lost_at)

    assert ended.failed.tolist() == [False, True, False]
    assert ended.completed.tolist() == [True] * 4 + [False] * 3 + [True] * 3
    assert ended.contributed.tolist() == [True] * 4 + [False] * 2 + [True] * 4
    assert (values[4:7] == before[4:7]).all()
    assert np.allclose(values[7:], before[7:].mean(axis=0))
    with_it, without_it = before[:5].mean(axis=0), before[:4].mean(axis=0)
    is_with, is_without = np.isclose(values[0], with_it), np.isclose(values[0], without_it)
    assert (is_with ^ is_without).all()
    assert is_with.mean() == pytest.approx(0.25, abs=0.05)
    assert (values[1:4] == values[0]).all()
