"""The mass rule on arrays says what `mpd.mass` says, number by number, through cycles full of faults."""

import dataclasses
import random

import numpy as np
import pytest

from mpd import mass
from mpd.grid import line_of
from mpd.grid_arrays import lines_of
from mpd.layout import MAX_WEIGHT
from mpd.mass_arrays import NOWHERE, after, certificates, newcomers, shares
from mpd.meetings import groups_by_label


def origin(number):
    """The id of a round in `mpd.mass` for the number of a group here."""
    return b"" if number == NOWHERE else int(number).to_bytes(16, "big")


def standings_of(arrays):
    return [
        mass.Standing(
            mass=float(arrays.mass[i]),
            heads=float(arrays.heads[i]),
            origin=origin(arrays.origin[i]),
            seen=int(arrays.seen[i]),
            full=bool(arrays.full[i]),
            parts=int(arrays.parts[i]),
            cell=tuple(arrays.cells[i].tolist()),
        )
        for i in range(len(arrays.mass))
    ]


def is_close(ours, theirs):
    return dataclasses.replace(ours, mass=0, heads=0) == dataclasses.replace(theirs, mass=0, heads=0) and np.allclose(
        [ours.mass, ours.heads], [theirs.mass, theirs.heads], rtol=1e-12
    )


@pytest.mark.parametrize(
    ("n_peers", "shape"), [(5, (1,)), (12, (5,)), (14, (3, 3)), (30, (2, 3, 3)), (9, (3, 4)), (70, (2, 2, 3, 3))]
)
@pytest.mark.parametrize("exact", [True, False])
def test_every_number_is_that_of_the_daemon(n_peers, shape, exact):
    rng = random.Random(n_peers)
    weights = np.array([rng.choice([0.0, rng.uniform(0.1, 10), MAX_WEIGHT]) for _ in range(n_peers)])
    cells = np.array([[rng.randrange(m) for m in shape] for _ in range(n_peers)], dtype=np.int32)
    arrays = newcomers(weights, cells)
    first_id = n_certified = n_whole = 0
    for number in range(12 * len(shape)):
        axis = number % len(shape)
        is_calm = number // len(shape) % 3 < 2
        present = np.array([i for i in rng.sample(range(n_peers), n_peers) if is_calm or rng.random() < 0.8])
        if axis == 0:
            arrays.enter(present, weights[present])
        elif not exact:
            arrays.weigh(present, weights[present])
        if not is_calm:  # a claim that was forged, and one that is a duplicate of another
            arrays.full[rng.randrange(n_peers)] = True
            arrays.parts[rng.randrange(n_peers)] = 2
            one, other = rng.randrange(n_peers), rng.randrange(n_peers)
            if NOWHERE not in arrays.origin[[one, other]]:
                arrays.origin[one] = arrays.origin[other]
        split = np.array([0 if is_calm else rng.random() < 0.1 for _ in present], dtype=np.int64)
        groups = groups_by_label(present, lines_of(arrays.cells[present], axis, shape) * 2 + split)
        contributed = np.array([is_calm or rng.random() < 0.95 for _ in groups.members])
        completed = np.array([is_calm or rng.random() < 0.95 for _ in groups.members])
        before = standings_of(arrays)
        weighed = shares(arrays, groups, number, shape, exact)
        sure, heads = certificates(groups, weighed, contributed)
        after(arrays, groups, weighed, contributed, completed, first_id, n_peers)
        ends = standings_of(arrays)
        for group in range(groups.n_groups):
            where = range(groups.starts[group], groups.starts[group + 1])
            members = [int(groups.members[i]) for i in where]
            theirs = mass.shares([before[i] for i in members], number, shape, exact)
            assert np.allclose([weighed.weights[i] for i in where], theirs.weights, rtol=1e-12)
            assert np.allclose([weighed.heads[i] for i in where], theirs.heads, rtol=1e-12)
            assert weighed.whole[group] == theirs.whole
            mask = sum(int(contributed[i]) << place for place, i in enumerate(where))
            assert (sure[group], heads[group]) == mass.certificate(theirs, mask)
            n_certified += sure[group]
            n_whole += theirs.whole
            for place, i in enumerate(where):
                peer = members[place]
                expected = mass.after(before[peer], place, theirs, mask, origin(first_id + group), n_peers)
                assert is_close(ends[peer], expected if completed[i] else before[peer])
                assert line_of(ends[peer].cell, axis) == line_of(before[peer].cell, axis)
        absent = set(range(n_peers)) - set(present.tolist())
        assert all(ends[i] == before[i] for i in absent)
        first_id += groups.n_groups
    assert n_whole > 0
    assert n_certified > 0 or n_peers < np.prod(shape)


def test_peers_of_a_weight_beyond_the_limit_enter_with_the_limit():
    arrays = newcomers(np.array([3.0, 8 * MAX_WEIGHT]), np.zeros((2, 2), dtype=np.int32))
    assert arrays.mass.tolist() == [3.0, MAX_WEIGHT]
    assert standings_of(arrays)[0] == mass.enter(3.0, (0, 0))
