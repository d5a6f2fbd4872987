"""What the members of simulated groups hold after a round, also if some of them are lost in the middle of it.

A vector is a row of W elements, a sample of its chunks: column k lies in the shard of place k * m // W of a group of m,
anywhere in it. All members send to all others at once, so that at a moment when a part u of the round is over,
everybody has sent the first part u of every shard, and every reducer has closed the first part u of its own. From this
follows what a loss does, with the rules of the daemon's exchange (`mpd.exchange`):

* A lost member is in the chunks that were closed before its loss, and in no later one.
* What a lost reducer has closed is forwarded, the same bytes. What it has not closed is redone by those that stayed,
  without the pieces of any lost member.
* Where too few stayed for what has to be done (no quorum to redo, or none to succeed), the group fails and all keep
  what they had. So a group of two fails unless its other member was lost after its last chunk.

A lost member keeps what it had; it ends its round like one that was absent.
"""

from dataclasses import dataclass

import numpy as np

from mpd.meetings import Bools, Floats, Groups
from mpd.rounds import redo_quorum, success_quorum

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Exchanged:
    """How the groups of a round ended. By group (n_groups,): `failed`; by member (m,): `completed`, `contributed`.

    `completed`: the member holds the result of its group. `contributed`: its piece is in every chunk of that.
    """

    failed: Bools
    completed: Bools
    contributed: Bools


def exchange(values: Floats, groups: Groups, weights: Floats, lost_at: Floats | None) -> Exchanged:
    """Average `values` (n, W) inside the groups, in place.

    Args:
        weights: of the members (m,); where all of a group are 0, its members keep what they have.
        lost_at: by peer (n,), the part of the round that was over when the peer was lost, 0 to 1; infinite for those
            that stayed. None: all stayed.
    """
    lost = np.full(len(groups.members), np.inf) if lost_at is None else lost_at[groups.members]
    stayed = np.isinf(lost)
    whole = groups.all(stayed)
    failed = np.zeros(groups.n_groups, dtype=bool)
    contributed = stayed.copy()
    means = _means(values[groups.members], groups, weights)
    for group in np.flatnonzero(~whole):  # rare, and every one is another case
        members = slice(groups.starts[group], groups.starts[group + 1])
        pieces = surviving_pieces(lost[members], values.shape[1])
        if pieces is None:
            failed[group] = True
            continue
        contributed[members] = pieces.all(axis=1)
        weighed = pieces * weights[members, np.newaxis]
        totals = weighed.sum(axis=0)
        sums = (weighed * values[groups.members[members]]).sum(axis=0)
        means[group] = np.divide(sums, totals, out=np.full_like(sums, np.nan), where=totals > 0)
    completed = stayed & ~failed[groups.group_of_member]
    results = means[groups.group_of_member[completed]]
    ends = groups.members[completed]
    values[ends] = np.where(np.isnan(results), values[ends], results)
    return Exchanged(failed, completed, contributed)


def _means(values: Floats, groups: Groups, weights: Floats) -> Floats:
    """Return the weighted mean of each group (n_groups, W), NaN where nothing weighs anything."""
    totals = groups.sums(weights)
    sums = groups.sums(values * weights[:, np.newaxis])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(totals[:, np.newaxis] > 0, sums / totals[:, np.newaxis], np.nan))


def surviving_pieces(lost_at: Floats, n_chunks: int) -> Bools | None:
    """Return whose piece is in which chunk of a group's result, (m, n_chunks); None if the group fails.

    `lost_at` (m,) is the part of the round that was over when a member was lost, infinite for those that stayed.
    """
    size, n_stayed = len(lost_at), int(np.isinf(lost_at).sum())
    columns = np.arange(n_chunks)
    owners, parts = columns * size // n_chunks, (columns + 1) * GOLDEN % 1  # parts that are spread over 0 to 1
    is_redone = lost_at[owners] < parts
    if n_stayed < (redo_quorum(size) if is_redone.any() else success_quorum(size)):
        return None
    stayed = np.isinf(lost_at)[:, np.newaxis]
    return np.asarray(np.where(is_redone, stayed, lost_at[:, np.newaxis] >= parts))
