"""The versions that I am writing: whose piece is in, who is still waited for.

A version is open from the moment the plan names me until it is closed or the plan changes, but its accumulator exists
only from its first piece on, and the pieces of redone chunks are pulled a few chunks at a time: that is what keeps the
accumulators a window and not a second vector.
"""

import functools
import operator
from typing import Any

from mpd.rounds import RoundPlan, Vault

ASK_WINDOW = 8  # redone chunks whose pieces are on their way at the same time


class Collector:
    """Open versions, one per chunk at most, and the accumulators behind them.

    `expected` masks the members whose pieces are worth waiting for, `dropped` those whose pieces I refuse: both hold
    for all open versions alike.
    """

    def __init__(self, round_plan: RoundPlan, vault: Vault) -> None:
        self._vault = vault
        self._senders = round_plan.senders
        self._mine = round_plan.senders & 1 << round_plan.me
        self._added: dict[int, int] = {}  # open chunk -> mask of the members whose pieces are in
        self._begun: set[int] = set()  # chunks whose accumulator exists
        self._unasked: dict[int, None] = {}  # redone chunks, in order, whose pieces nobody was asked for yet
        self._asked: set[int] = set()
        self.expected = 0
        self.dropped = 0

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._added

    def chunks(self) -> list[int]:
        """Return the open chunks."""
        return list(self._added)

    def expect(self, members: int) -> None:
        """From now on wait for the pieces of `members` (a mask), as far as they send any and are not dropped."""
        self.expected = members & self._senders & ~self._mine & ~self.dropped

    def drop(self, members: int) -> None:
        """Wait for no more pieces of `members` (a mask), and refuse them when they come."""
        self.dropped |= members
        self.expected &= ~members

    def open(self, chunk: int) -> None:
        """Open a version of `chunk` whose pieces are pushed to me."""
        self._added[chunk] = self._mine

    def open_to_ask(self, chunk: int) -> None:
        """Open a version of `chunk` whose pieces I have to ask for."""
        self.open(chunk)
        self._unasked[chunk] = None

    def next_to_ask(self) -> list[int]:
        """Return the chunks whose turn it is, each once."""
        turn = list(self._unasked)[: max(0, ASK_WINDOW - len(self._asked))]
        for chunk in turn:
            del self._unasked[chunk]
        self._asked.update(turn)
        return turn

    def asked(self) -> list[int]:
        """Return the open chunks whose turn has come before."""
        return sorted(self._asked)

    def lacks(self, chunk: int, sender: int) -> bool:
        """True if `chunk` is open and a piece from `sender` would still count."""
        added = self._added.get(chunk)
        return added is not None and not (added | self.dropped) >> sender & 1

    def add(self, chunk: int, sender: int, payload: Any) -> None:
        """Add the piece of `sender`, which `lacks` has approved. Raises PeerError if the piece is unusable."""
        self._begin(chunk)
        self._vault.add(chunk, sender, payload)
        self._added[chunk] |= 1 << sender

    def awaited(self) -> int:
        """Mask of the members whose pieces some open chunk still waits for."""
        return functools.reduce(operator.or_, (self.expected & ~added for added in self._added.values()), 0)

    def is_ready(self, chunk: int) -> bool:
        """True if there is something to close and nobody left to wait for."""
        added = self._added[chunk]
        return added != 0 and not self.expected & ~added

    def is_barren(self, chunk: int) -> bool:
        """True if `chunk` is open but no piece is in and none will come: somebody else must write it."""
        return not (self._added[chunk] | self.expected)

    def close(self, chunk: int) -> int:
        """Write the mean into the slot and return its contributors."""
        self._begin(chunk)
        contributors = self._added[chunk]
        self._vault.close(chunk, contributors)
        self._forget(chunk)
        return contributors

    def abandon(self, chunk: int) -> None:
        """Give up `chunk` if it is open."""
        if chunk in self._added:
            if chunk in self._begun:
                self._vault.discard(chunk)
            self._forget(chunk)

    def abandon_all(self) -> None:
        """Give up everything."""
        for chunk in self.chunks():
            self.abandon(chunk)

    def overdue(self, silent: int) -> int:
        """Mask of the members for which some chunk waits, and for nobody outside `silent`.

        Chunks that hold no piece but mine do not count: to close them would average nothing, and if nobody's pieces
        arrive the fault is more likely here than with everybody else.
        """
        overdue = 0
        for added in self._added.values():
            missing = self.expected & ~added
            if added & ~self._mine and not missing & ~silent:
                overdue |= missing
        return overdue

    def _begin(self, chunk: int) -> None:
        if chunk not in self._begun:
            self._begun.add(chunk)
            self._vault.open(chunk)

    def _forget(self, chunk: int) -> None:
        self._begun.discard(chunk)
        self._asked.discard(chunk)
        self._unasked.pop(chunk, None)
        del self._added[chunk]
