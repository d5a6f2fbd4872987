"""Records that this node holds for others: what a record is, when it is valid, and when it goes.

Storage is pure: the clock is an argument, and so is who says whether a signature is genuine. Each key has one record
per publisher. A record replaces another only if its sequence number and its expiry both rise, so that nobody can bring
an old one back, and who repeats what is held changes nothing. What is over a limit makes room by evicting whatever
would expire first. An empty value is a tombstone: it is kept and handed out like any record, because it has to beat
the older copies on other nodes, and readers drop it.

Expiry is a point in time, signed by the publisher. A publisher repeats its record after a third of its life, with a
new expiry, so that clocks may differ by half a minute before a record of a minute is missed.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from kademlia.storage import IStorage

from .budgets import Budgets
from .dht_limits import MAX_RECORDS_PER_PREFIX
from .rendezvous import KEY_BYTES, MAX_TTL_S, MAX_VALUE_BYTES

MAX_SEQ = 2**63 - 1
SKEW_MS = 30_000  # how far ahead of ours a publisher's clock may be
RECORD_FIXED_BYTES = 122  # a record's msgpack beside its value, at most
RECORD_OVERHEAD_BYTES = 512  # charged per record beside its value: what it takes in memory


class WireRecord(msgspec.Struct, frozen=True, array_like=True):
    """A record as it travels, 1000 bytes at most. `dht_proof.py` makes and checks the signature."""

    public_key: bytes
    seq: int
    expires_at_ms: int
    value: bytes
    signature: bytes


def valid(record: WireRecord, now_ms: int) -> bool:
    """True if `record` has the shape of one and is alive. Every record passes here, on store and on read."""
    return (
        len(record.public_key) == 32
        and len(record.signature) == 64
        and 0 <= record.seq <= MAX_SEQ
        and now_ms < record.expires_at_ms <= now_ms + MAX_TTL_S * 1000 + SKEW_MS
        and len(record.value) <= MAX_VALUE_BYTES
    )


def digest_of(records: Iterable[WireRecord]) -> bytes:
    """Return 16 bytes that name this set of records in this order; no other set can be made to have the same."""
    return hashlib.blake2b(msgspec.msgpack.encode(list(records)), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class _Held:
    record: WireRecord
    crowd: str | None

    @property
    def n_bytes(self) -> int:
        return len(self.record.value) + RECORD_OVERHEAD_BYTES


class RecordStore(IStorage):  # type: ignore[misc]  # kademlia has no annotations
    """Many records per key, one per publisher, in the bounded memory of `budgets`.

    `clock` returns milliseconds since 1970. `believe(key, record)` says whether a record of valid shape is genuine; it
    is asked last, because it is dear.
    """

    def __init__(
        self, clock: Callable[[], int], budgets: Budgets, believe: Callable[[bytes, WireRecord], bool]
    ) -> None:
        self._clock = clock
        self._budgets = budgets
        self._believe = believe
        self._shelves: dict[bytes, dict[bytes, _Held]] = {}
        self._keys_of: dict[bytes, set[bytes]] = {}
        self._n_of_crowd: Counter[str] = Counter()
        self._expiries: list[tuple[int, bytes, bytes]] = []  # heap; entries that no longer match are skipped

    def put(self, key: bytes, record: WireRecord, crowd: str | None = None) -> bool:
        """Keep `record` under `key` if it is valid, genuine and newer than the one held. Return whether it is held now.

        Only so many come from one `crowd`.
        """
        now_ms = self._clock()
        self._drop_expired(now_ms)
        if len(key) != KEY_BYTES or not valid(record, now_ms):
            return False
        held = self._shelves.get(key, {}).get(record.public_key)
        if held is not None:
            if held.record == record:
                return True
            if record.seq <= held.record.seq or record.expires_at_ms <= held.record.expires_at_ms:
                return False
        elif crowd is not None and self._n_of_crowd[crowd] >= MAX_RECORDS_PER_PREFIX:
            return False
        if not self._believe(key, record):
            return False
        self._remove(key, record.public_key)
        return self._make_room(record) and self._add(key, _Held(record, crowd))

    def records(self, key: bytes) -> list[WireRecord]:
        """Return what is held under `key` (tombstones included) sorted by public key."""
        now_ms = self._clock()
        shelf = (held.record for _, held in sorted(self._shelves.get(key, {}).items()))
        return [record for record in shelf if record.expires_at_ms > now_ms]

    def drop_publishers(self, is_dropped: Callable[[bytes], bool]) -> None:
        """Forget the records of all public keys of which `is_dropped` is true."""
        for public_key in [each for each in self._keys_of if is_dropped(each)]:
            for key in list(self._keys_of[public_key]):
                self._remove(key, public_key)

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

    def _drop_expired(self, now_ms: int) -> None:
        while self._expiries and self._expiries[0][0] <= now_ms:
            self._drop_nearest_expiry()

    def _drop_nearest_expiry(self) -> None:
        expires_at_ms, key, public_key = heapq.heappop(self._expiries)
        held = self._shelves.get(key, {}).get(public_key)
        if held is not None and held.record.expires_at_ms == expires_at_ms:
            self._remove(key, public_key)

    def _make_room(self, record: WireRecord) -> bool:
        """Take what `record` needs from the budgets. Return False if it would itself be the first to go."""
        budgets, n_bytes = self._budgets, _Held(record, None).n_bytes
        if not budgets.records_per_publisher.take(record.public_key):
            keys = self._keys_of[record.public_key]
            self._remove(min(keys, key=lambda key: self._worth(key, record.public_key)), record.public_key)
            budgets.records_per_publisher.take(record.public_key)
        while not budgets.records.take():
            if not self._drop_earlier(record):
                budgets.records_per_publisher.give(record.public_key)
                return False
        while not budgets.record_bytes.take(n_bytes):
            if not self._drop_earlier(record):
                budgets.records_per_publisher.give(record.public_key)
                budgets.records.give()
                return False
        return True

    def _drop_earlier(self, record: WireRecord) -> bool:
        """Drop what expires first, if that is earlier than `record`."""
        if not self._expiries or self._expiries[0][0] >= record.expires_at_ms:
            return False
        self._drop_nearest_expiry()
        return True

    def _worth(self, key: bytes, public_key: bytes) -> tuple[bool, int]:
        record = self._shelves[key][public_key].record
        return bool(record.value), record.expires_at_ms  # tombstones go first

    def _add(self, key: bytes, held: _Held) -> bool:
        public_key = held.record.public_key
        self._shelves.setdefault(key, {})[public_key] = held
        self._keys_of.setdefault(public_key, set()).add(key)
        if held.crowd is not None:
            self._n_of_crowd[held.crowd] += 1
        heapq.heappush(self._expiries, (held.record.expires_at_ms, key, public_key))
        if len(self._expiries) > 2 * self._budgets.records.used + 64:  # replacements left their old entries behind
            every = ((key, each) for key, shelf in self._shelves.items() for each in shelf.values())
            self._expiries = [(each.record.expires_at_ms, key, each.record.public_key) for key, each in every]
            heapq.heapify(self._expiries)
        return True

    def _remove(self, key: bytes, public_key: bytes) -> None:
        shelf = self._shelves.get(key, {})
        held = shelf.pop(public_key, None)
        if held is None:
            return
        self._budgets.records.give()
        self._budgets.record_bytes.give(held.n_bytes)
        self._budgets.records_per_publisher.give(public_key)
        if held.crowd is not None:
            self._n_of_crowd[held.crowd] -= 1
            if not self._n_of_crowd[held.crowd]:
                del self._n_of_crowd[held.crowd]
        if not shelf:
            del self._shelves[key]
        self._keys_of[public_key].discard(key)
        if not self._keys_of[public_key]:
            del self._keys_of[public_key]
