"""Formulas for the variance: exact cases by hand; what simulation says of them is in test_simulate.py."""

import numpy as np
import pytest

from mpd import theory


def test_a_butterfly_moves_two_vectors_less_what_stays_at_home():
    assert theory.butterfly_vectors(1) == 0
    assert theory.butterfly_vectors(2) == 1
    assert theory.butterfly_vectors(16) == 1.875


def test_random_groups_shrink_by_the_exact_factor():
    expected = theory.random_groups(64, 8, 0.0, 3)
    assert expected == pytest.approx(63 / 64 * (7 / 63) ** np.arange(4))
    assert theory.random_groups(8, 2, 0.0, 1)[1] == pytest.approx(7 / 8 * 3 / 7)
    assert theory.random_groups(8, 8, 0.0, 2)[1:] == pytest.approx([0, 0])
    assert theory.random_groups(1, 8, 0.5, 2).tolist() == [0, 0, 0]
    assert theory.random_groups(64, 8, 1.0, 2) == pytest.approx([63 / 64] * 3)


def test_absence_slows_random_groups_as_the_approximation_says():
    exact = theory.random_groups(1000, 10, 0.1, 1)[1] / theory.random_groups(1000, 10, 0.1, 1)[0]
    assert exact == pytest.approx(0.1 + 0.9 / 10, rel=0.06)


def test_all_or_nothing_waits_for_a_round_with_everybody():
    assert theory.all_or_nothing(512, 0.0, 2) == pytest.approx([511 / 512, 0, 0])
    assert theory.all_or_nothing(2, 0.5, 1)[1] == pytest.approx(0.5 * 0.75)


def test_a_grid_is_exact_from_round_d_on():
    assert theory.grid(64, (4, 4, 4), 4) == pytest.approx([63 / 64, 15 / 64, 3 / 64, 0, 0])
    assert theory.grid(64, (4, 4, 4), 1) == pytest.approx([63 / 64, 15 / 64])


@pytest.mark.parametrize("n_peers", [1, 2, 3, 8, 33])
def test_gossip_of_all_kinds_begins_with_the_variance_of_independent_values(n_peers):
    for formula in (theory.ring_gossip, theory.chebyshev_gossip, theory.push_sum):
        expected = formula(n_peers, 30)
        assert expected[0] == pytest.approx((n_peers - 1) / n_peers)
        assert (expected >= 0).all()
        assert expected[30] <= expected[0]


def test_chebyshev_is_faster_than_plain_gossip():
    assert theory.chebyshev_gossip(64, 111)[-1] < 1e-7 < theory.ring_gossip(64, 111)[-1]
