"""Who meets whom in a round of a simulated swarm, as arrays: groups that average, or single messages.

Peers are numbers from 0. `Groups` lists the members of all groups one after the other, in the order of their places, so
that a sum over each group is one call of numpy; `Sends` lists messages, for schemes that know no groups. Both say all
that a model of time or traffic needs to know of a round: who is in it and who sends to whom.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Random = np.random.Generator | np.random.RandomState
"""Where randomness comes from: handed in, never made here. The older kind replays simulations published with it."""


@dataclass(frozen=True)
class Groups:
    """The groups of a round: group g has the peers `members[starts[g]:starts[g + 1]]`, by place; none is empty.

    `members` is (m,), each peer in it once; who is in no group is not in it. `starts` is (n_groups + 1,).
    """

    members: Ints
    starts: Ints

    @property
    def n_groups(self) -> int:
        """How many groups there are, groups of one peer included."""
        return len(self.starts) - 1

    @cached_property
    def sizes(self) -> Ints:
        """Members of each group: (n_groups,)."""
        return np.diff(self.starts)

    @cached_property
    def group_of_member(self) -> Ints:
        """The group of each of `members`: (m,)."""
        return np.repeat(np.arange(self.n_groups), self.sizes)

    @cached_property
    def places(self) -> Ints:
        """The place of each of `members` in its group, from 0: (m,)."""
        return np.arange(len(self.members)) - np.repeat(self.starts[:-1], self.sizes)

    def group_of(self, n_peers: int) -> Ints:
        """Return the group of each of `n_peers` peers, -1 for those in none: (n_peers,)."""
        found = np.full(n_peers, -1)
        found[self.members] = self.group_of_member
        return found

    def sums(self, of_members: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the sum over each group of what `of_members` (m, ...) says of its members: (n_groups, ...)."""
        if not self.n_groups:
            return np.zeros((0, *of_members.shape[1:]), dtype=of_members.dtype)
        summable = of_members.astype(np.int64) if of_members.dtype == np.bool_ else of_members
        return np.add.reduceat(summable, self.starts[:-1], axis=0)

    def all(self, of_members: Bools) -> Bools:
        """Return for each group whether `of_members` (m,) is True of all its members: (n_groups,)."""
        return np.asarray(self.sums(of_members) == self.sizes)


def groups_by_label(peers: Ints, labels: Ints) -> Groups:
    """Return the groups of the `peers` (m,) that have one label (m,) each, with places in the order of `peers`."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    return Groups(peers[order], np.append(starts, len(peers)))


@dataclass(frozen=True)
class Sends:
    """The messages of a round without groups: peer `senders[i]` sends its vector to `receivers[i]`; both (n_sends,)."""

    senders: Ints
    receivers: Ints


Meeting = Groups | Sends
