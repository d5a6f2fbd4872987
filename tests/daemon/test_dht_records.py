"""The record store as a pure value: a clock that the test turns, literals in, records out."""

import pytest
from dht_swarm import Clock
from hypothesis import given
from hypothesis import strategies as st

from mpd.daemon.budgets import Budget, Budgets, KeyedBudget
from mpd.daemon.dht_limits import MAX_RECORDS_PER_PREFIX
from mpd.daemon.dht_records import (
    MAX_SEQ,
    RECORD_OVERHEAD_BYTES,
    SKEW_MS,
    RecordStore,
    WireRecord,
    digest_of,
    valid,
)
from mpd.daemon.rendezvous import MAX_VALUE_BYTES

KEY = b"k" * 20
NOW_MS = 1_000_000


class Shop:
    """A store that believes everybody but `liars`, its clock and its budgets."""

    def __init__(self, **limits: Budget | KeyedBudget) -> None:
        self.clock = Clock(NOW_MS)
        self.budgets = Budgets(**limits)  # type: ignore[arg-type]
        self.liars: set[bytes] = set()
        self.asked: list[WireRecord] = []
        self.store = RecordStore(self.clock, self.budgets, self._believe)

    def _believe(self, key: bytes, record: WireRecord) -> bool:
        self.asked.append(record)
        return record.public_key not in self.liars

    @property
    def n_records(self) -> int:
        return self.budgets.records.used


def publisher(number: int) -> bytes:
    return number.to_bytes(32, "big")


def record(number: int = 1, seq: int = 1, life_s: float = 60, value: bytes = b"v") -> WireRecord:
    return WireRecord(publisher(number), seq, NOW_MS + int(life_s * 1000), value, bytes(64))


def test_many_publishers_share_a_key() -> None:
    store = Shop().store
    assert all(store.put(KEY, record(number)) for number in (3, 1, 2))
    assert store.records(KEY) == [record(1), record(2), record(3)]
    assert store.records(b"x" * 20) == []


@pytest.mark.parametrize(
    "bad",
    [
        WireRecord(b"short", 1, NOW_MS + 1, b"v", bytes(64)),
        WireRecord(bytes(33), 1, NOW_MS + 1, b"v", bytes(64)),
        WireRecord(bytes(32), 1, NOW_MS + 1, b"v", bytes(63)),
        record(seq=-1),
        record(seq=MAX_SEQ + 1),
        record(life_s=0),
        record(life_s=-30),
        record(life_s=3600 + SKEW_MS / 1000 + 0.001),
        WireRecord(bytes(32), 1, 2**70, b"v", bytes(64)),
        record(value=bytes(MAX_VALUE_BYTES + 1)),
    ],
    ids=str,
)
def test_an_invalid_record_is_refused_before_its_signature_is_looked_at(bad: WireRecord) -> None:
    shop = Shop()
    assert not valid(bad, NOW_MS)
    assert not shop.store.put(KEY, bad)
    assert (shop.n_records, shop.asked) == (0, [])


def test_a_clock_half_a_minute_ahead_is_fine() -> None:
    assert Shop().store.put(KEY, record(life_s=3600 + SKEW_MS / 1000))


def test_a_bad_key_is_refused() -> None:
    assert not Shop().store.put(b"short", record())


def test_what_is_not_genuine_changes_nothing() -> None:
    shop = Shop()
    shop.store.put(KEY, record(1))
    shop.liars = {publisher(1), publisher(2)}
    assert not shop.store.put(KEY, record(1, seq=2, life_s=70))
    assert not shop.store.put(KEY, record(2))
    assert shop.store.records(KEY) == [record(1)]


def test_sequence_number_and_expiry_must_both_rise() -> None:
    shop = Shop()
    store = shop.store
    assert store.put(KEY, record(seq=5, value=b"new"))
    asked = len(shop.asked)
    assert not store.put(KEY, record(seq=4, life_s=70, value=b"old"))
    assert not store.put(KEY, record(seq=5, life_s=70, value=b"other"))
    assert not store.put(KEY, record(seq=6, life_s=60, value=b"not longer"))
    assert not store.put(KEY, record(seq=6, life_s=50, value=b"shorter"))
    assert len(shop.asked) == asked, "an old record costs no signature"
    assert store.records(KEY) == [record(seq=5, value=b"new")]
    assert store.put(KEY, record(seq=6, life_s=70, value=b"newer"))
    assert store.records(KEY) == [record(seq=6, life_s=70, value=b"newer")]


def test_an_identical_record_is_held_and_changes_nothing() -> None:
    shop = Shop()
    assert shop.store.put(KEY, record())
    assert shop.store.put(KEY, record())
    assert len(shop.asked) == 1
    assert shop.n_records == 1


def test_a_record_ends_at_its_expiry() -> None:
    shop = Shop()
    shop.store.put(KEY, record(life_s=60))
    shop.clock.now += 59_999
    assert shop.store.records(KEY) == [record()]
    shop.clock.now += 1
    assert shop.store.records(KEY) == []
    shop.store.put(b"x" * 20, record(2, life_s=90))
    assert shop.n_records == 1


def test_a_tombstone_is_a_record() -> None:
    store = Shop().store
    store.put(KEY, record(seq=1))
    assert store.put(KEY, record(seq=2, life_s=61, value=b""))
    assert not store.put(KEY, record(seq=1))
    assert store.records(KEY) == [record(seq=2, life_s=61, value=b"")]


def test_a_full_store_evicts_the_nearest_expiry() -> None:
    shop = Shop(records=Budget(3))
    for number, life_s in ((1, 50), (2, 20), (3, 40), (4, 30)):
        assert shop.store.put(KEY, record(number, life_s=life_s))
    assert [held.public_key for held in shop.store.records(KEY)] == [publisher(1), publisher(3), publisher(4)]
    assert not shop.store.put(KEY, record(5, life_s=1)), "the newcomer itself would expire first"
    assert shop.n_records == 3


def test_bytes_are_bounded() -> None:
    cost = 800 + RECORD_OVERHEAD_BYTES
    shop = Shop(record_bytes=Budget(2 * cost))
    for number in range(1, 6):
        assert shop.store.put(KEY, record(number, life_s=number, value=bytes(800)))
    assert not shop.store.put(KEY, record(9, life_s=1, value=bytes(800)))
    assert (shop.n_records, shop.budgets.record_bytes.used) == (2, 2 * cost)
    shop.store.put(KEY, record(5, seq=2, life_s=9, value=b""))
    assert shop.budgets.record_bytes.used == cost + RECORD_OVERHEAD_BYTES


def test_one_publisher_has_its_share_and_loses_tombstones_first() -> None:
    shop = Shop(records_per_publisher=KeyedBudget(2))
    keys = [bytes([i]) * 20 for i in range(3)]
    shop.store.put(keys[0], record(life_s=10))
    shop.store.put(keys[1], record(life_s=60, value=b""))
    shop.store.put(keys[2], record(life_s=60))
    assert [bool(shop.store.records(key)) for key in keys] == [True, False, True]


def test_one_crowd_has_its_share_and_may_renew_it() -> None:
    shop = Shop()
    assert all(shop.store.put(KEY, record(i), crowd="here") for i in range(MAX_RECORDS_PER_PREFIX))
    assert not shop.store.put(KEY, record(1000), crowd="here")
    assert shop.store.put(KEY, record(7, seq=2, life_s=61), crowd="here")
    assert shop.store.put(KEY, record(1000), crowd="there")
    assert shop.store.put(KEY, record(1001), crowd=None)
    shop.store.drop_publishers(lambda public_key: public_key == publisher(5))
    assert shop.store.put(KEY, record(1002), crowd="here")
    shop.clock.now += 3_600_000
    shop.store.put(KEY, WireRecord(publisher(1), 9, shop.clock.now + 1, b"", bytes(64)), crowd="here")
    assert shop.store._n_of_crowd == {"here": 1}, "nothing is kept of crowds that are gone"


def test_publishers_can_be_dropped() -> None:
    shop = Shop()
    for number in (1, 2):
        for key in (KEY, b"x" * 20):
            shop.store.put(key, record(number))
    shop.store.drop_publishers(lambda public_key: public_key == publisher(1))
    assert shop.store.records(KEY) == shop.store.records(b"x" * 20) == [record(2)]
    assert shop.n_records == 2


def test_replacements_do_not_pile_up() -> None:
    shop = Shop()
    for seq in range(1000):
        assert shop.store.put(KEY, record(seq=seq, life_s=60 + seq))
    assert len(shop.store._expiries) < 100


def test_as_kademlia_sees_it() -> None:
    store = Shop().store
    store[KEY] = record()
    assert store[KEY] == store.get(KEY) == [record()]
    assert list(store) == [(KEY, [record()])]
    assert store.get(b"x" * 20) is None
    with pytest.raises(KeyError):
        store[b"x" * 20]
    assert list(store.iter_older_than(0)) == [], "a holder never republishes"


def test_the_digest_names_the_set() -> None:
    assert digest_of([record(1), record(2)]) == digest_of([record(1), record(2)])
    assert digest_of([record(1), record(2)]) != digest_of([record(1), record(2, seq=2)])
    assert digest_of([record(1)]) != digest_of([record(1, value=b"w")]), "or a liar could stand in for the honest"
    assert digest_of([record(1)]) != digest_of([])


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.integers(0, 5),
            st.integers(0, 4),
            st.integers(1, 120),
            st.sampled_from([b"", b"abc"]),
            st.sampled_from([None, "here"]),
            st.integers(0, 9),
        ),
        max_size=60,
    )
)
def test_the_books_always_balance(moves: list[tuple[int, int, int, int, bytes, str | None, int]]) -> None:
    shop = Shop(
        records=Budget(8),
        record_bytes=Budget(7 * (RECORD_OVERHEAD_BYTES + 3)),
        records_per_publisher=KeyedBudget(3),
    )
    shop.liars = {publisher(5)}
    for key, number, seq, life_s, value, crowd, passed_s in moves:
        shop.clock.now += passed_s * 1000
        shop.store.put(bytes([key]) * 20, record(number, seq, life_s, value), crowd)
        held = [each.record for shelf in shop.store._shelves.values() for each in shelf.values()]
        assert len(held) == shop.n_records <= 8
        assert sum(len(each.value) + RECORD_OVERHEAD_BYTES for each in held) == shop.budgets.record_bytes.used
        assert sum(shop.store._n_of_crowd.values()) <= len(held)
        assert all(valid(each, shop.clock.now) for _, records in shop.store for each in records)
        assert not any(each.public_key in shop.liars for each in held)
