"""Frames whole, split at every byte, byte by byte and with a tail; headers and greetings field by field."""

import struct
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.errors import LocalError, PeerError
from mpd.ids import RoundId
from mpd.wire import (
    DATA_GREETING_BYTES,
    DATA_MAGIC,
    GREETING_BYTES,
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    ControlBuffer,
    Header,
    Kind,
    control_frame,
    data_greeting,
    pack_header,
    parse_data_greeting,
    unpack_header,
)

ROUND = RoundId(bytes(range(16)))
CHUNK = Header(Kind.CHUNK, 2, 0x0102, 0x03040506, 0x0708090A, 0x0B0C0D0E, ROUND, 0x1112131415161718)
HEADERS = st.builds(
    Header,
    kind=st.sampled_from([Kind.PIECE, Kind.CHUNK]),
    codec=st.integers(0, 2**8 - 1),
    member=st.integers(0, 2**16 - 1),
    chunk=st.integers(0, 2**32 - 1),
    length=st.integers(0, 2**32 - 1),
    version=st.integers(0, 2**32 - 1),
    round_id=st.binary(min_size=16, max_size=16).map(RoundId),
    contributors=st.integers(0, 2**64 - 1),
)


def frames_of(*reads: bytes) -> list[bytes]:
    """Return what a buffer yields for these reads, asked after each."""
    buffer, frames = ControlBuffer(), []
    for data in reads:
        buffer.feed(data)
        frames += buffer
    return frames


def ways_to_read(stream: bytes):
    """Yield the stream whole, split in two at every byte, and byte by byte."""
    yield (stream,)
    for cut in range(len(stream) + 1):
        yield stream[:cut], stream[cut:]
    yield tuple(stream[i : i + 1] for i in range(len(stream)))


@pytest.mark.parametrize("bodies", [[b"x"], [b"hello"], [b"a", b"bc" * 40, b"\0\0\0\0\0"]])
def test_frames_are_cut_however_they_arrive(bodies):
    stream = b"".join(map(control_frame, bodies))
    for reads in ways_to_read(stream):
        assert frames_of(*reads) == bodies


def test_a_tail_waits_for_its_rest():
    stream = control_frame(b"first")
    second = control_frame(b"second")
    for cut in range(len(second)):
        for reads in ways_to_read(stream + second[:cut]):
            assert frames_of(*reads) == [b"first"]
            assert frames_of(*reads, second[cut:]) == [b"first", b"second"]


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=10), st.lists(st.integers(1, 60), min_size=1))
def test_any_bodies_survive_any_read_sizes(bodies, sizes):
    stream, reads = b"".join(map(control_frame, bodies)), []
    while stream:
        size = sizes[len(reads) % len(sizes)]
        reads.append(stream[:size])
        stream = stream[size:]
    assert frames_of(*reads) == bodies


def test_the_frame_format_is_length_then_body():
    assert control_frame(b"abc") == b"\x03\x00\x00\x00abc"


def test_the_largest_frame_passes():
    body = bytes(MAX_CONTROL_BYTES)
    assert frames_of(control_frame(body)) == [body]


@pytest.mark.parametrize("length", [0, MAX_CONTROL_BYTES + 1, 2**31, 2**32 - 1])
def test_an_illegal_length_is_refused_before_its_body_arrives(length):
    stream = control_frame(b"fine") + struct.pack("<I", length)
    tracemalloc.start()
    for reads in ways_to_read(stream):
        buffer, frames = ControlBuffer(), []
        for data in reads:
            buffer.feed(data)
        frames.append(buffer.next_frame())
        for _ in range(2):  # and the buffer stays refused
            with pytest.raises(PeerError, match=f"announces {length} bytes"):
                buffer.next_frame()
        assert frames == [b"fine"]
    assert tracemalloc.get_traced_memory()[1] < 64 * 1024, "room was made for what was only announced"
    tracemalloc.stop()


@pytest.mark.parametrize("n_bytes", [0, MAX_CONTROL_BYTES + 1])
def test_an_illegal_body_is_never_framed(n_bytes):
    with pytest.raises(LocalError, match=f"{n_bytes} bytes"):
        control_frame(bytes(n_bytes))


def test_a_header_has_its_fields_where_the_protocol_says():
    packed = pack_header(CHUNK)
    assert len(packed) == HEADER_BYTES
    assert packed.hex() == "02020201060504030a0908070e0d0c0b" + ROUND.hex() + "1817161514131211"


@given(HEADERS, st.binary(max_size=9))
def test_headers_survive_the_trip_and_ignore_what_follows(header, tail):
    packed = pack_header(header)
    for buffer in (packed, packed + tail, bytearray(packed), memoryview(packed + tail)):
        assert unpack_header(buffer) == header


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.BYE])
def test_hello_and_bye_carry_no_payload(kind):
    header = replace(CHUNK, kind=kind, length=0)
    assert unpack_header(pack_header(header)) == header
    with pytest.raises(PeerError, match=f"{kind.name} record announces 1 bytes"):
        unpack_header(pack_header(replace(header, length=1)))


@pytest.mark.parametrize("number", [5, 6, 0x16, 255])
def test_an_unknown_kind_is_refused(number):
    with pytest.raises(PeerError, match=f"kind {number}"):
        unpack_header(bytes([number]) + pack_header(CHUNK)[1:])


def test_a_short_header_is_refused():
    for n_bytes in range(HEADER_BYTES):
        with pytest.raises(PeerError, match=f"{n_bytes} bytes"):
            unpack_header(pack_header(CHUNK)[:n_bytes])


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_any_40_bytes_are_a_header_or_a_peer_error(data):
    try:
        header = unpack_header(data)
    except PeerError:
        assert data[0] > max(Kind) or data[8:12] != bytes(4)
    else:
        assert pack_header(header) == data


@pytest.mark.parametrize(
    "change",
    [
        {"codec": 256},
        {"member": 65536},
        {"chunk": -1},
        {"length": 2**32},
        {"contributors": 2**64},
        {"round_id": b"short"},
    ],
)
def test_fields_that_do_not_fit_are_never_packed(change):
    with pytest.raises(ValueError, match=r"does not fit|round id"):
        pack_header(replace(CHUNK, **change))


def test_a_greeting_has_the_documented_bytes():
    conn_id = bytes(range(100, 116))
    assert data_greeting(conn_id) == b"mpdD\x01\0\0\0" + conn_id
    assert (GREETING_BYTES, len(data_greeting(conn_id))) == (8, DATA_GREETING_BYTES)
    assert data_greeting(conn_id).startswith(DATA_MAGIC)


@given(st.binary(min_size=16, max_size=16))
def test_a_data_greeting_returns_its_connection(conn_id):
    assert parse_data_greeting(data_greeting(conn_id)) == conn_id


def test_any_other_greeting_is_refused_with_its_cause():
    greeting = data_greeting(bytes(16))
    for other in (b"mpdA" + greeting[4:], b"\x16" + greeting[1:]):
        with pytest.raises(PeerError, match=r"begins with b'(mpdA|\\x16)"):
            parse_data_greeting(other)
    with pytest.raises(PeerError, match="speaks version 2"):
        parse_data_greeting(greeting[:4] + b"\x02" + greeting[5:])
    for position in (5, 6, 7):
        with pytest.raises(PeerError, match="reserved"):
            parse_data_greeting(greeting[:position] + b"\x01" + greeting[position + 1 :])
    for wrong_size in [greeting[:cut] for cut in range(len(greeting))] + [greeting + b"\0"]:
        with pytest.raises(PeerError, match=f"{len(wrong_size)} bytes"):
            parse_data_greeting(wrong_size)


def test_a_connection_id_has_16_bytes():
    with pytest.raises(ValueError, match="has 15"):
        data_greeting(bytes(15))
