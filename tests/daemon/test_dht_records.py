"""The record store as a pure value: a clock that the test turns, literals in, records out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.daemon.dht_records import MAX_SEQ, RECORD_OVERHEAD_BYTES, RecordStore, WireRecord, digest_of, valid

KEY = b"k" * 20


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def publisher(number: int) -> bytes:
    return number.to_bytes(20, "big")


def record(number: int = 1, seq: int = 1, ttl_s: float = 60, value: bytes = b"v") -> WireRecord:
    return WireRecord(publisher(number), seq, int(ttl_s * 1000), value)


def test_many_publishers_share_a_key() -> None:
    store = RecordStore(Clock())
    assert all(store.put(KEY, record(number)) for number in (3, 1, 2))
    assert store.records(KEY) == [record(1), record(2), record(3)]
    assert store.records(b"x" * 20) == []


@pytest.mark.parametrize(
    "bad",
    [
        WireRecord(b"short", 1, 1000, b"v"),
        WireRecord(bytes(21), 1, 1000, b"v"),
        record(seq=-1),
        record(seq=MAX_SEQ + 1),
        record(ttl_s=0),
        record(ttl_s=3601),
        record(value=bytes(1001)),
    ],
)
def test_an_invalid_record_is_refused(bad: WireRecord) -> None:
    store = RecordStore(Clock())
    assert not valid(bad)
    assert not store.put(KEY, bad)
    assert store.n_records == 0


def test_a_bad_key_is_refused() -> None:
    assert not RecordStore(Clock()).put(b"short", record())


def test_the_higher_sequence_number_wins() -> None:
    store = RecordStore(Clock())
    assert store.put(KEY, record(seq=5, value=b"new"))
    assert not store.put(KEY, record(seq=4, value=b"old"))
    assert not store.put(KEY, record(seq=5, value=b"other"))
    assert store.records(KEY) == [record(seq=5, value=b"new")]
    assert store.put(KEY, record(seq=6, value=b"newer"))
    assert store.records(KEY) == [record(seq=6, value=b"newer")]


def test_an_identical_record_renews_and_never_shortens() -> None:
    clock = Clock()
    store = RecordStore(clock)
    store.put(KEY, record(ttl_s=60))
    clock.now += 50
    assert store.put(KEY, record(ttl_s=60))
    assert store.put(KEY, record(ttl_s=1))
    clock.now += 55
    assert store.records(KEY) == [record(ttl_s=5)]


def test_life_counts_down_and_ends() -> None:
    clock = Clock()
    store = RecordStore(clock)
    store.put(KEY, record(ttl_s=60))
    clock.now += 59.5
    assert store.records(KEY) == [record(ttl_s=0.5)]
    clock.now += 0.5
    assert store.records(KEY) == []
    store.put(b"x" * 20, record(2))
    assert store.n_records == 1


def test_a_tombstone_is_a_record() -> None:
    store = RecordStore(Clock())
    store.put(KEY, record(seq=1))
    assert store.put(KEY, record(seq=2, value=b""))
    assert not store.put(KEY, record(seq=1))
    assert store.records(KEY) == [record(seq=2, value=b"")]


def test_a_full_store_evicts_the_nearest_expiry() -> None:
    store = RecordStore(Clock(), max_records=3)
    for number, ttl_s in ((1, 50), (2, 20), (3, 40), (4, 30)):
        store.put(KEY, record(number, ttl_s=ttl_s))
    assert [held.publisher for held in store.records(KEY)] == [publisher(1), publisher(3), publisher(4)]
    assert not store.put(KEY, record(5, ttl_s=1)), "the newcomer itself expires first"


def test_bytes_are_bounded() -> None:
    cost = 1000 + RECORD_OVERHEAD_BYTES
    store = RecordStore(Clock(), max_bytes=2 * cost)
    for number in range(1, 6):
        store.put(KEY, record(number, ttl_s=number, value=bytes(1000)))
    assert (store.n_records, store.n_bytes) == (2, 2 * cost)
    store.put(KEY, record(5, seq=2, value=b""))
    assert store.n_bytes == cost + RECORD_OVERHEAD_BYTES


def test_one_publisher_has_its_share_and_loses_tombstones_first() -> None:
    store = RecordStore(Clock(), max_per_publisher=2)
    keys = [bytes([i]) * 20 for i in range(3)]
    store.put(keys[0], record(ttl_s=10))
    store.put(keys[1], record(ttl_s=60, value=b""))
    store.put(keys[2], record(ttl_s=60))
    assert [bool(store.records(key)) for key in keys] == [True, False, True]


def test_renewals_do_not_pile_up() -> None:
    clock = Clock()
    store = RecordStore(clock)
    for _ in range(1000):
        clock.now += 0.01
        store.put(KEY, record())
    assert len(store._expiries) < 100


def test_as_kademlia_sees_it() -> None:
    store = RecordStore(Clock())
    store[KEY] = record()
    assert store[KEY] == store.get(KEY) == [record()]
    assert list(store) == [(KEY, [record()])]
    assert store.get(b"x" * 20) is None
    with pytest.raises(KeyError):
        store[b"x" * 20]
    assert list(store.iter_older_than(0)) == [], "a holder never republishes"


def test_the_digest_names_the_set() -> None:
    assert digest_of([record(1), record(2)]) == digest_of([record(1, ttl_s=5), record(2)])
    assert digest_of([record(1), record(2)]) != digest_of([record(1), record(2, seq=2)])
    assert digest_of([record(1)]) != digest_of([])


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.integers(0, 5),
            st.integers(0, 4),
            st.integers(1, 20),
            st.booleans(),
            st.integers(0, 9),
        ),
        max_size=60,
    )
)
def test_the_books_always_balance(moves: list[tuple[int, int, int, int, bool, int]]) -> None:
    clock = Clock()
    store = RecordStore(clock, max_records=8, max_bytes=8 * (RECORD_OVERHEAD_BYTES + 3), max_per_publisher=3)
    for key, number, seq, ttl_s, full, passed_s in moves:
        clock.now += passed_s
        store.put(bytes([key]) * 20, record(number, seq, ttl_s, b"abc" if full else b""))
        held = [found for _, records in store for found in records]
        assert len(held) == store.n_records <= 8
        assert sum(len(found.value) + RECORD_OVERHEAD_BYTES for found in held) == store.n_bytes
        assert all(valid(found) for found in held)
