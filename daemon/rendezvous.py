"""Where peers find each other: the interface, and its in-memory twin.

A rendezvous maps a 20-byte key to the records of many publishers, one each. It is a hint, never an authority: a record
may be late, missing or a lie, and whoever acts on one confirms it on a link. Two implementations pass the same tests:
`dht.py` over UDP, and `MemoryRendezvous` here, in which a whole swarm shares one `MemoryBoard` and time is an argument.

A record lives as long as its publisher keeps it announced, and `ttl_s` longer when the publisher dies without a word.
"""

import itertools
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from mpd.errors import LocalError
from mpd.ids import PeerId

KEY_BYTES = 20
MAX_VALUE_BYTES = 878  # with key, dates and signature a record has 1000, and fits into one datagram
NO_ANSWER = "unreachable: no answer"  # how a bootstrap fares that is silent, for whatever reason
MIN_TTL_S = 1.0
MAX_TTL_S = 3600.0


@dataclass(frozen=True, slots=True)
class Record:
    """What one publisher says under one key. A higher `seq` replaces a lower one; `expires_in_s` counts down."""

    publisher: PeerId
    value: bytes
    seq: int
    expires_in_s: float


@dataclass(frozen=True, slots=True)
class RendezvousStatus:
    """How finding each other goes.

    `peers` counts the live peers known, `bootstrap` pairs each address as it was given with a sentence on how it fares,
    and `problem` is a sentence, or empty when there is nothing to say; `clock` is what of it is about clocks. `unasked`
    counts the requests that came from addresses which had not been asked anything, `calls` the questions that wait for
    an answer.
    """

    peers: int
    bootstrap: tuple[tuple[str, str], ...] = ()
    problem: str = ""
    unasked: int = 0
    clock: str = ""
    calls: int = 0


class Rendezvous(Protocol):
    """What the rest of the daemon knows of finding peers. Keys have 20 bytes, values 1 to 878."""

    async def announce(self, key: bytes, value: bytes, ttl_s: float) -> None:
        """Publish this peer's one record under `key` and keep it published until it is withdrawn or replaced.

        `ttl_s` is clamped to 1 s .. 1 h. Raises LocalError for a bad key, value or ttl. When this is cancelled, the
        record may or may not be announced.
        """

    async def withdraw(self, key: bytes) -> None:
        """Take this peer's record under `key` back; without one this does nothing. Raises LocalError for a bad key."""

    async def seek(self, key: bytes) -> tuple[Record, ...]:
        """Return the live records of all publishers, this peer included, sorted by publisher."""

    def snapshot(self) -> RendezvousStatus:
        """Return how it goes, for `mpd status`. Never waits."""


def check_key(key: bytes) -> None:
    """Raise LocalError unless `key` has 20 bytes."""
    if len(key) != KEY_BYTES:
        raise LocalError(f"a rendezvous key has {KEY_BYTES} bytes, this has {len(key)}")


def check_announcement(key: bytes, value: bytes, ttl_s: float) -> float:
    """Return `ttl_s` clamped to what is allowed. Raises LocalError if the announcement is impossible."""
    check_key(key)
    if not 1 <= len(value) <= MAX_VALUE_BYTES:
        raise LocalError(f"a rendezvous value has 1 to {MAX_VALUE_BYTES} bytes, this has {len(value)}")
    if not (math.isfinite(ttl_s) and ttl_s > 0):
        raise LocalError(f"a time to live of {ttl_s} s was asked for: a positive number expected")
    return min(max(ttl_s, MIN_TTL_S), MAX_TTL_S)


class MemoryBoard:
    """What all `MemoryRendezvous` of one swarm share. `clock` returns seconds that never go back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.members: list[MemoryRendezvous] = []


class MemoryRendezvous:
    """The in-memory twin. `delay` is awaited first in every call: a sleep, or a gate that a test holds."""

    def __init__(self, board: MemoryBoard, peer_id: PeerId, delay: Callable[[], Awaitable[None]] | None = None) -> None:
        self.peer_id = peer_id
        self._board = board
        self._delay = delay
        self._records: dict[bytes, Record] = {}
        self._seq = itertools.count(1)
        self._died_at: float | None = None
        board.members.append(self)

    async def announce(self, key: bytes, value: bytes, ttl_s: float) -> None:
        life_s = check_announcement(key, value, ttl_s)
        await self._wait()
        self._records[bytes(key)] = Record(self.peer_id, bytes(value), next(self._seq), life_s)

    async def withdraw(self, key: bytes) -> None:
        check_key(key)
        await self._wait()
        self._records.pop(bytes(key), None)

    async def seek(self, key: bytes) -> tuple[Record, ...]:
        check_key(key)
        await self._wait()
        found = (member._published(bytes(key)) for member in self._board.members)
        return tuple(sorted((record for record in found if record is not None), key=lambda record: record.publisher))

    def snapshot(self) -> RendezvousStatus:
        return RendezvousStatus(peers=sum(member._died_at is None for member in self._board.members if member != self))

    def close(self) -> None:
        """Leave with a goodbye: every record of this peer is gone at once."""
        self._records.clear()
        self._died_at = self._board.clock()

    def die(self) -> None:
        """Leave without a word: the records stay until their ttl has passed."""
        self._died_at = self._board.clock()

    async def _wait(self) -> None:
        if self._died_at is not None:
            raise LocalError("this rendezvous is closed")
        if self._delay is not None:
            await self._delay()

    def _published(self, key: bytes) -> Record | None:
        record = self._records.get(key)
        if record is None or self._died_at is None:
            return record
        left_s = record.expires_in_s - (self._board.clock() - self._died_at)
        return Record(record.publisher, record.value, record.seq, left_s) if left_s > 0 else None
