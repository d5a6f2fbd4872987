"""What peers publish: it survives the trip, it fits into a datagram, and nonsense is its publisher's mistake."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from message_strategies import any_message, gone_wrong, outcome, required_fields

from mpd.daemon.rendezvous import MAX_VALUE_BYTES
from mpd.errors import PeerError
from mpd.grid import MAX_ROSTER, ShapeRecord, fit
from mpd.records import RECORDS, Place

PLACE = Place("192.0.2.7", 4747, b"d" * 32, 12, (3, 1))
SHAPE = ShapeRecord(1, 6, fit(6, 4), b"d" * 32, bytes(24))


@given(any_message(RECORDS))
def test_every_record_survives_the_trip(record: Any) -> None:
    assert RECORDS.decode(RECORDS.encode(record)) == record


@given(gone_wrong(RECORDS) | st.binary(max_size=200))
def test_a_record_gone_wrong_is_another_record_or_a_peer_error(value: bytes) -> None:
    record = outcome(RECORDS, value, PeerError)
    assert record is None or type(record) in (Place, ShapeRecord)


def test_the_largest_records_fit_into_the_rendezvous() -> None:
    place = Place("x" * 63 + ("." + "y" * 60) * 3, 65535, b"d" * 32, 2**62 - 1, (2**20 - 1,) * 20)
    shape = ShapeRecord(2**63 - 1, MAX_ROSTER, fit(MAX_ROSTER, 2), b"d" * 32, bytes(4 * MAX_ROSTER))
    for record in (place, shape):
        assert len(RECORDS.encode(record)) <= MAX_VALUE_BYTES


def test_a_peer_that_cannot_be_dialled_has_no_place_but_the_run() -> None:
    place = Place("", 0, b"d" * 32)
    assert RECORDS.decode(RECORDS.encode(place)) == place
    assert place.cell == ()


@pytest.mark.parametrize(
    ("record", "change", "words"),
    [
        (PLACE, {"host": ""}, "'' is not a host"),
        (PLACE, {"host": "a b"}, "'a b' is not a host"),
        (PLACE, {"host": "a..b"}, "'a..b' is not a host"),
        (PLACE, {"port": 65536}, "65536 is not a port"),
        (PLACE, {"port": -1}, "-1 is not a port"),
        (PLACE, {"digest": b"d" * 31}, "a digest has 32 bytes"),
        (PLACE, {"number": -1}, "a number is not negative"),
        (PLACE, {"number": 1 << 62}, "a number is not negative"),
        (PLACE, {"cell": 1}, "Expected `array`"),
        (PLACE, {"cell": ["x"]}, "Expected `int`"),
        (SHAPE, {"epoch": 0}, "epoch 0"),
        (SHAPE, {"n_peers": 2**40}, "peers"),
        (SHAPE, {"shape": []}, "shape"),
        (SHAPE, {"shape": [0]}, "shape"),
        (SHAPE, {"shape": [7]}, "more cells than the 6 peers can fill"),
        (SHAPE, {"shape": [1] * 1000}, "shape"),
        (SHAPE, {"roster": b"r"}, "a roster of 1 bytes"),
        (SHAPE, {"digest": b""}, "a digest of 0 bytes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_nonsense_is_refused(record: Any, change: dict[str, Any], words: str) -> None:
    name, body = msgspec.msgpack.decode(RECORDS.encode(record))
    with pytest.raises(PeerError) as refusal:
        RECORDS.decode(msgspec.msgpack.encode([name, {**body, **change}]))
    assert words in str(refusal.value)


@pytest.mark.parametrize("record", [PLACE, SHAPE])
def test_what_is_required_must_be_there(record: Any) -> None:
    name, body = msgspec.msgpack.decode(RECORDS.encode(record))
    for field in required_fields(type(record)):
        with pytest.raises(PeerError, match=f"missing required field `{field}`"):
            RECORDS.decode(msgspec.msgpack.encode([name, {k: v for k, v in body.items() if k != field}]))
