"""Records that this node holds for others: what a record is, when it is valid, and when it goes.

Storage is pure: the clock is an argument. Each key has one record per publisher. The sequence number decides between
two records of one publisher, an identical record only renews the life of the one held, and what is over a limit makes
room by evicting whatever would expire first. An empty value is a tombstone: it is kept and handed out like any
record, because it has to beat the older copies on other nodes, and readers drop it.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from kademlia.storage import IStorage

from mpd.ids import PEER_ID_BYTES

from .rendezvous import KEY_BYTES, MAX_TTL_S, MAX_VALUE_BYTES

MAX_SEQ = 2**63 - 1
RECORD_OVERHEAD_BYTES = 128  # charged per record beside its value, so that many empty ones are not free


class WireRecord(msgspec.Struct, frozen=True, array_like=True):
    """A record as it travels. `ttl_ms` is what is left of its life: a duration, so that no two clocks need to agree."""

    publisher: bytes
    seq: int
    ttl_ms: int
    value: bytes


def valid(record: WireRecord) -> bool:
    """True if `record` may be stored, handed out and believed. Every record passes here, on store and on read."""
    return (
        len(record.publisher) == PEER_ID_BYTES
        and 0 <= record.seq <= MAX_SEQ
        and 0 < record.ttl_ms <= MAX_TTL_S * 1000
        and len(record.value) <= MAX_VALUE_BYTES
    )


def digest_of(records: Iterable[WireRecord]) -> bytes:
    """Return 8 bytes that name this set of records (publishers and sequence numbers) in this order."""
    digest = hashlib.blake2b(digest_size=8)
    for record in records:
        digest.update(record.publisher)
        digest.update(record.seq.to_bytes(8, "big"))
    return digest.digest()


@dataclass(slots=True)
class _Held:
    seq: int
    value: bytes
    expires_at: float


class RecordStore(IStorage):  # type: ignore[misc]  # kademlia has no annotations
    """Many records per key, one per publisher, in bounded memory. `clock` returns seconds that never go back."""

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        max_records: int = 10_000,
        max_bytes: int = 16 * 2**20,
        max_per_publisher: int = 64,
    ) -> None:
        self._clock = clock
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._max_per_publisher = max_per_publisher
        self._shelves: dict[bytes, dict[bytes, _Held]] = {}
        self._keys_of: dict[bytes, set[bytes]] = {}
        self._expiries: list[tuple[float, bytes, bytes]] = []  # heap; entries that no longer match are skipped
        self.n_records = 0
        self.n_bytes = 0

    def put(self, key: bytes, record: WireRecord) -> bool:
        """Keep `record` under `key` if it is valid and not older than the one held. Return whether it is held now."""
        now = self._clock()
        self._drop_expired(now)
        if len(key) != KEY_BYTES or not valid(record):
            return False
        expires_at = now + record.ttl_ms / 1000
        held = self._shelves.get(key, {}).get(record.publisher)
        if held is not None and record.seq <= held.seq:
            if (record.seq, record.value) != (held.seq, held.value):
                return False
            held.expires_at = max(held.expires_at, expires_at)
        else:
            self._remove(key, record.publisher)
            held = _Held(record.seq, record.value, expires_at)
            self._shelves.setdefault(key, {})[record.publisher] = held
            self._keys_of.setdefault(record.publisher, set()).add(key)
            self.n_records += 1
            self.n_bytes += len(record.value) + RECORD_OVERHEAD_BYTES
        heapq.heappush(self._expiries, (held.expires_at, key, record.publisher))
        self._make_room(record.publisher)
        return record.publisher in self._shelves.get(key, ())

    def records(self, key: bytes) -> list[WireRecord]:
        """Return what is held under `key` (tombstones included) sorted by publisher, with what is left of each life."""
        now = self._clock()
        left = ((publisher, held, int((held.expires_at - now) * 1000)) for publisher, held in self._shelf(key))
        return [WireRecord(publisher, held.seq, ttl_ms, held.value) for publisher, held, ttl_ms in left if ttl_ms > 0]

    def __setitem__(self, key: bytes, value: WireRecord) -> None:
        self.put(key, value)

    def __getitem__(self, key: bytes) -> list[WireRecord]:
        if not (records := self.records(key)):
            raise KeyError(key)
        return records

    def get(self, key: bytes, default: Any = None) -> Any:
        return self.records(key) or default

    def __iter__(self) -> Iterator[tuple[bytes, list[WireRecord]]]:
        return iter([(key, self.records(key)) for key in self._shelves])

    def iter_older_than(self, seconds_old: float) -> Iterator[tuple[bytes, WireRecord]]:
        """Return nothing: a holder never republishes, or records of dead peers would live for ever."""
        return iter(())

    def _shelf(self, key: bytes) -> list[tuple[bytes, _Held]]:
        return sorted(self._shelves.get(key, {}).items(), key=lambda item: item[0])

    def _drop_expired(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            self._drop_nearest_expiry()

    def _drop_nearest_expiry(self) -> None:
        expires_at, key, publisher = heapq.heappop(self._expiries)
        held = self._shelves.get(key, {}).get(publisher)
        if held is not None and held.expires_at == expires_at:
            self._remove(key, publisher)

    def _make_room(self, publisher: bytes) -> None:
        keys = self._keys_of[publisher]
        while len(keys) > self._max_per_publisher:
            self._remove(min(keys, key=lambda key: self._worth(key, publisher)), publisher)
        while self.n_records > self._max_records or self.n_bytes > self._max_bytes:
            self._drop_nearest_expiry()
        if len(self._expiries) > 2 * self.n_records + 64:  # renewals left their old entries behind
            self._expiries = [(h.expires_at, k, p) for k, shelf in self._shelves.items() for p, h in shelf.items()]
            heapq.heapify(self._expiries)

    def _worth(self, key: bytes, publisher: bytes) -> tuple[bool, float]:
        held = self._shelves[key][publisher]
        return bool(held.value), held.expires_at  # tombstones go first

    def _remove(self, key: bytes, publisher: bytes) -> None:
        shelf = self._shelves.get(key, {})
        held = shelf.pop(publisher, None)
        if held is None:
            return
        self.n_records -= 1
        self.n_bytes -= len(held.value) + RECORD_OVERHEAD_BYTES
        if not shelf:
            del self._shelves[key]
        self._keys_of[publisher].discard(key)
        if not self._keys_of[publisher]:
            del self._keys_of[publisher]
