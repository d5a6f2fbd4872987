"""Every limit of a daemon in one place: what others may take, how much of it is taken, and how often we said no.

Strategy: whoever spends a resource on someone else's behalf takes it from its budget first and gives it back in the
end; what is refused is counted, so that `mpd status` shows who presses against what. Nothing here has a clock: rates
are told the time. The DHT lives in a thread of its own and takes from budgets of its own; all that the other thread
does with those is to read single numbers, which the interpreter never tears.
"""

import os
import resource
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

import trio

MIB = 1 << 20
MAX_RATE_KEYS = 8192  # of the addresses that one rate remembers; the one heard longest ago is forgotten first
WANTED_DESCRIPTORS = 4096
RESERVED_DESCRIPTORS = 64  # for the daemon's own files, sockets and regions


class Budget:
    """`limit` things of one kind. `used` are taken now, `peak` were at most, `refused` counts the times it was full."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.peak = 0
        self.refused = 0

    def take(self, n: int = 1) -> bool:
        """Take `n`, all or nothing; return whether they were there."""
        if self.used + n > self.limit:
            self.refused += 1
            return False
        self.used += n
        self.peak = max(self.peak, self.used)
        return True

    def give(self, n: int = 1) -> None:
        """Give `n` back."""
        assert 0 <= n <= self.used, "more is given back than was taken"
        self.used -= n


class KeyedBudget:
    """`limit` things for each key. `used` is what the greediest key has now.

    A key is forgotten when it has nothing left, so there are never more of them than things that were taken.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.peak = 0
        self.refused = 0
        self._used: dict[Hashable, int] = {}

    @property
    def used(self) -> int:
        return max(tuple(self._used.values()), default=0)

    def take(self, key: Hashable) -> bool:
        """Take one for `key`; return whether it was there."""
        used = self._used.get(key, 0)
        if used >= self.limit:
            self.refused += 1
            return False
        self._used[key] = used + 1
        self.peak = max(self.peak, used + 1)
        return True

    def give(self, key: Hashable) -> None:
        """Give one of `key` back."""
        used = self._used.pop(key)
        if used > 1:
            self._used[key] = used - 1


class RateBudget:
    """`per_s` things a second for each key, and `burst` at once after a quiet time.

    `limit` is the burst, and `used` how much of it was spent by whoever asked last, when it asked. Each key is a leaky
    bucket (ITU-T I.371).
    """

    def __init__(self, per_s: float, burst: int) -> None:
        self.limit = burst
        self.used = 0
        self.peak = 0
        self.refused = 0
        self._per_s = per_s
        self._buckets: dict[Hashable, tuple[float, float]] = {}  # how full it was, and when; the latest comes last

    def take(self, now_s: float, key: Hashable = None) -> bool:
        """Take one for `key` at the time `now_s`, which never goes backwards; return whether it was there."""
        level, since_s = self._buckets.pop(key, (0.0, now_s))
        level = max(0.0, level - (now_s - since_s) * self._per_s)
        granted = level + 1 <= self.limit
        if granted:
            level += 1
        else:
            self.refused += 1
        self.used = round(level)
        self.peak = max(self.peak, self.used)
        self._buckets[key] = level, now_s
        if len(self._buckets) > MAX_RATE_KEYS:
            del self._buckets[next(iter(self._buckets))]
        return granted


class ByteGate:
    """`limit` bytes (or other things) for the tasks of one event loop, first come, first served: who finds none waits.

    More than `limit` at once passes when nobody else has anything. `refused` counts those who had to wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.peak = 0
        self.refused = 0
        self._queue: deque[tuple[int, trio.Event]] = deque()

    def take_nowait(self, n: int) -> bool:
        """Take `n` bytes if they are there and nobody waits; return whether."""
        if self._queue or not self._fits(n):
            return False
        self._grant(n)
        return True

    async def take(self, n: int) -> None:
        """Take `n` bytes as soon as they are there. Cancelled: nothing was taken."""
        await trio.lowlevel.checkpoint()
        if self.take_nowait(n):
            return
        self.refused += 1
        ticket = (n, trio.Event())
        self._queue.append(ticket)
        try:
            await ticket[1].wait()
        except trio.Cancelled:
            if ticket in self._queue:
                self._queue.remove(ticket)
                self._admit()
            else:
                self.give(n)
            raise

    def give(self, n: int) -> None:
        """Give `n` bytes back."""
        assert 0 <= n <= self.used, "more is given back than was taken"
        self.used -= n
        self._admit()

    def _fits(self, n: int) -> bool:
        return self.used + n <= self.limit or not self.used

    def _grant(self, n: int) -> None:
        self.used += n
        self.peak = max(self.peak, self.used)

    def _admit(self) -> None:
        while self._queue and self._fits(self._queue[0][0]):
            n, arrived = self._queue.popleft()
            self._grant(n)
            arrived.set()


class Descriptors:
    """Open files and sockets of this process; the kernel counts them, so nothing is taken or given."""

    def __init__(self) -> None:
        self.peak = 0
        self.refused = 0

    @property
    def limit(self) -> int:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    @property
    def used(self) -> int:
        # Linux 6.2 and later tells the number as the folder's size, the others 0; listing it counts itself.
        used = os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd")) - 1
        self.peak = max(self.peak, used)
        return used

    def has_room(self, n: int = 1) -> bool:
        """Return whether `n` more may be opened for others, the daemon's own reserve left untouched."""
        if self.used + n + RESERVED_DESCRIPTORS <= self.limit:
            return True
        self.refused += 1
        return False


def raise_descriptor_limit() -> None:
    """Allow this process `WANTED_DESCRIPTORS`, or as many as it may have: systems start it with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < min(WANTED_DESCRIPTORS, hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(WANTED_DESCRIPTORS, hard), hard))


@dataclass(frozen=True)
class Budgets:
    """All limits of one daemon, with their defaults.

    Those of the DHT's thread: `datagrams` and `datagrams_per_address` (of datagrams that carry no valid MAC; those that
    the kernel dropped unread are `refused` by the former), `wake_ups` (to read datagrams; without one left they wait a
    moment for each other), `requests_per_member`, `requests_of_strangers`, `records`, `record_bytes` and
    `records_per_publisher`.
    """

    # Other daemons.
    links: Budget = field(default_factory=lambda: Budget(256))
    handshakes: Budget = field(default_factory=lambda: Budget(64))
    handshakes_per_address: KeyedBudget = field(default_factory=lambda: KeyedBudget(8))
    admissions: Budget = field(default_factory=lambda: Budget(8))  # requests to be let in, while they are decided
    dial_backs: Budget = field(default_factory=lambda: Budget(8))
    dials: ByteGate = field(default_factory=lambda: ByteGate(32))  # of addresses that records name: anybody's word
    in_flight: ByteGate = field(default_factory=lambda: ByteGate(256 * MIB))
    joiners: Budget = field(default_factory=lambda: Budget(16))  # who are being served a state
    states: Budget = field(default_factory=lambda: Budget(8))  # held for them, or being loaded, of all runs together
    # This machine. Questions have connections of their own: `mpd status` answers while every trainer's place is taken.
    trainers: Budget = field(default_factory=lambda: Budget(16))
    clients: Budget = field(default_factory=lambda: Budget(64))
    clients_per_process: KeyedBudget = field(default_factory=lambda: KeyedBudget(16))
    long_frames: ByteGate = field(default_factory=lambda: ByteGate(64 * MIB))  # from clients
    descriptors: Descriptors = field(default_factory=Descriptors)
    # The DHT.
    datagrams: RateBudget = field(default_factory=lambda: RateBudget(2000, 2000))
    datagrams_per_address: RateBudget = field(default_factory=lambda: RateBudget(50, 100))
    wake_ups: RateBudget = field(default_factory=lambda: RateBudget(500, 500))
    requests_per_member: RateBudget = field(default_factory=lambda: RateBudget(200, 400))
    requests_of_strangers: RateBudget = field(default_factory=lambda: RateBudget(200, 500))  # of all of them together
    records: Budget = field(default_factory=lambda: Budget(10_000))
    record_bytes: Budget = field(default_factory=lambda: Budget(16 * MIB))
    records_per_publisher: KeyedBudget = field(default_factory=lambda: KeyedBudget(64))

    def snapshot(self) -> dict[str, dict[str, int]]:
        """Return what `mpd status` shows of each budget by its name. May be called from any thread."""
        return {
            name: {"limit": each.limit, "used": each.used, "peak": each.peak, "refused": each.refused}
            for name, each in vars(self).items()
        }
