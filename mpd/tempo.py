"""How fast the members of a round deliver, and who is so slow that the rest of the group goes on without it.

Silence is not slowness: who trickles bytes is never silent. So each member is compared with the others, in this very
round and on this side of its links. Nothing is judged before most of the group has delivered everything, so it is never
the majority that is called slow, and nothing is assumed about how fast a round ought to be. What a slow sender has not
sent by then is left out of the means; what a slow reducer has not returned is redone by others.
"""

from collections import Counter
from dataclasses import dataclass

from mpd.deadlines import is_left_behind
from mpd.reduce import mask_of, members_of
from mpd.rounds import RoundPlan


@dataclass(frozen=True, slots=True)
class Delivery:
    """How the pieces of one member came in: `n_done` of those that it owes us, the last needed one after `seconds`.

    `seconds` is None while some are missing. `pause_s` is the longest time between two, or before the first.
    """

    n_done: int
    seconds: float | None
    pause_s: float


class Tempo:
    """Counts what comes from whom, and judges. Sets of members are masks.

    `n_owed` is how many pieces each sender owes us. `laggards` holds the senders that we stopped waiting for: as
    reducers they get no extra time.
    """

    def __init__(self, plan: RoundPlan, now: float) -> None:
        self.n_owed = sum(owner == plan.me for owner in plan.owners)
        self.laggards = 0
        self._plan = plan
        self._began = now
        self._owners = mask_of(plan.owners)
        self._came: list[set[int]] = [set() for _ in range(plan.n_members)]
        self._last = [now] * plan.n_members
        self._pauses = [0.0] * plan.n_members
        self._seconds: dict[int, float] = {}  # of the members that have sent everything, in the order in which they did
        self._settled: tuple[int, float, Counter[int]] | None = None  # epoch, when, and what was lacking then

    def note_piece(self, now: float, sender: int, chunk: int) -> None:
        """A verified piece of a chunk that we own has come, wanted or not."""
        came = self._came[sender]
        if chunk in came:
            return
        came.add(chunk)
        self._pauses[sender] = max(self._pauses[sender], now - self._last[sender])
        self._last[sender] = now
        if len(came) == self.n_owed:
            self._seconds[sender] = now - self._began

    def deliveries(self) -> dict[int, Delivery]:
        """Return how each member that owes us pieces has delivered them so far."""
        if not self.n_owed:
            return {}
        return {
            member: Delivery(len(self._came[member]), self._seconds.get(member), self._pauses[member])
            for member in members_of(self._plan.senders & ~(1 << self._plan.me))
        }

    def slow_senders(self, now: float, expected: int) -> dict[int, str]:
        """Return who of the `expected` senders is left behind for the rest of our shard, and why."""
        typical_s = self._typical_s()
        if typical_s is None:
            return {}
        elapsed_s = now - self._began
        return {
            member: f"it was too slow: {len(self._came[member])} of {self.n_owed} pieces in {elapsed_s:.1f} s, "
            f"after most members had sent theirs in {typical_s:.1f} s"
            for member in members_of(expected)
            if is_left_behind(
                elapsed_s,
                len(self._came[member]),
                self._last[member] - self._began,
                self.n_owed,
                typical_s,
                self._plan.progress_s,
            )
        }

    def slow_reducers(self, now: float, epoch: int, lacking: Counter[int]) -> int:
        """Return who keeps us waiting for chunks although most reducers have delivered all of theirs.

        `lacking` counts the chunks under plan `epoch` that are to come from each member.
        """
        n_settled = (self._owners & ~mask_of(lacking)).bit_count()
        if not lacking or 2 * n_settled <= self._owners.bit_count():
            self._settled = None
            return 0
        if self._settled is None or self._settled[0] != epoch:
            self._settled = epoch, now, lacking
        _, since, lacked = self._settled
        typical_s = self._typical_s()
        if typical_s is None:
            typical_s = since - self._began
        slow = mask_of(lacking) & self.laggards
        for member, n_lacking in lacking.items():
            n_lacked, elapsed_s = max(n_lacking, lacked[member]), now - since
            n_came = n_lacked - n_lacking
            if is_left_behind(elapsed_s, n_came, elapsed_s, n_lacked, typical_s, self._plan.progress_s):
                slow |= 1 << member
        return slow & ~(1 << self._plan.me)

    def _typical_s(self) -> float | None:
        """Return how long the faster half of the group took to send us everything, None while it has not."""
        n_others = (self._plan.senders & ~(1 << self._plan.me)).bit_count()
        finished = list(self._seconds.values())
        n_needed = (n_others + 1) // 2  # with us, that is more than half
        return finished[n_needed - 1] if n_needed and len(finished) >= n_needed else None
