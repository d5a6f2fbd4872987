"""Groups of a simulated round: what they say of their members, for groups of all sizes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mpd.meetings import Groups, groups_by_label


@given(st.lists(st.integers(0, 5), max_size=30))
def test_groups_hold_each_peer_once_by_label_and_in_order(labels):
    peers = np.arange(len(labels))[::-1]
    groups = groups_by_label(peers, np.array(labels, dtype=np.int64))

    assert sorted(groups.members) == sorted(peers)
    assert groups.n_groups == len(set(labels))
    assert groups.sizes.tolist() == [labels.count(label) for label in sorted(set(labels))]
    for group, label in enumerate(sorted(set(labels))):
        members = groups.members[groups.starts[group] : groups.starts[group + 1]]
        assert members.tolist() == [peer for peer, its in zip(peers, labels, strict=True) if its == label]


def test_groups_know_place_and_group_of_everybody():
    groups = groups_by_label(np.array([4, 0, 3, 1]), np.array([7, 2, 7, 2]))

    assert groups.members.tolist() == [0, 1, 4, 3]
    assert groups.places.tolist() == [0, 1, 0, 1]
    assert groups.group_of_member.tolist() == [0, 0, 1, 1]
    assert groups.group_of(6).tolist() == [0, 0, -1, 1, 1, -1]


def test_sums_are_over_groups():
    groups = groups_by_label(np.arange(5), np.array([0, 1, 1, 0, 2]))

    assert groups.sums(np.array([1.0, 2.0, 4.0, 8.0, 16.0])).tolist() == [3.0, 12.0, 16.0]
    assert groups.sums(np.array([True, True, True, False, True])).tolist() == [2, 1, 1]
    assert groups.all(np.array([True, True, True, False, True])).tolist() == [True, False, True]
    assert groups.sums(np.ones((5, 3))).shape == (3, 3)


def test_nobody_meets_nobody():
    none = np.zeros(0, dtype=np.int64)
    groups = groups_by_label(none, none)

    assert (groups.n_groups, groups.sums(np.zeros(0)).shape, groups.all(np.zeros(0, bool)).shape) == (0, (0,), (0,))
    assert Groups(none, np.zeros(1, dtype=np.int64)).group_of(3).tolist() == [-1, -1, -1]
