"""Frames between peers: bytes in, values out; payloads ride through untouched.

Strategy: a pair of peers has two kinds of connections. Control carries length-prefixed messages, small and whole, so
they are cut here into `bytes`. Data carries records, a fixed 40-byte header and then a payload that goes straight
between socket and shared memory, so only the header is ever packed or parsed here. Either begins with a greeting that
says which it is. All numbers are little endian.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from mpd.errors import LocalError, PeerError
from mpd.ids import ROUND_ID_BYTES, RoundId

MAX_CONTROL_BYTES = 2**20
"""Largest body of a control frame."""
HEADER_BYTES = 40
WIRE_VERSION = 1
CONN_ID_BYTES = 16

DATA_MAGIC = b"mpdD"
GREETING_BYTES = 8
DATA_GREETING_BYTES = GREETING_BYTES + CONN_ID_BYTES

_LENGTH = struct.Struct("<I")
_GREETING = struct.Struct("<4sB3s")
# kind, codec, member, chunk, length, version, round id, contributors
_HEADER = struct.Struct("<BBHIII16sQ")


class Kind(IntEnum):
    """What a data record is."""

    HELLO = 0
    PIECE = 1
    CHUNK = 2
    BYE = 3
    STATE = 4


@dataclass(frozen=True, slots=True)
class Header:
    """What precedes a payload of `length` bytes on a data connection.

    Attributes:
        codec: how the payload is encoded, `Codec.code`.
        member: whose shard the chunk belongs to.
        chunk: index of the chunk in the round's schedule.
        version: which version of the chunk; 0 is its owner's.
        contributors: bit i stands for member i; 0 in a PIECE.

    In a STATE, `chunk` is one of a state, `round_id` the first 16 bytes of its manifest's digest, and the rest is 0.
    """

    kind: Kind
    codec: int
    member: int
    chunk: int
    length: int
    version: int
    round_id: RoundId
    contributors: int


def control_frame(body: bytes) -> bytes:
    """Return `body` as a frame: its length (u32), then itself. Raises LocalError unless 1 to MAX_CONTROL_BYTES long."""
    if not 1 <= len(body) <= MAX_CONTROL_BYTES:
        raise LocalError(f"a control message has {len(body)} bytes: 1 to {MAX_CONTROL_BYTES} expected")
    return _LENGTH.pack(len(body)) + body


class ControlBuffer:
    """Cuts a control stream into frames: feed what was read, then take frames until there are no more."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Append what was read from the connection."""
        self._data += data

    def next_frame(self) -> bytes | None:
        """Return the body of the next frame, None until it is whole.

        Raises PeerError as soon as a length is 0 or above MAX_CONTROL_BYTES, and again at every later call: the stream
        has no next frame border.
        """
        if len(self._data) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._data)
        if not 1 <= length <= MAX_CONTROL_BYTES:
            raise PeerError(f"a control frame announces {length} bytes: 1 to {MAX_CONTROL_BYTES} expected")
        end = _LENGTH.size + length
        if len(self._data) < end:
            return None
        body = bytes(self._data[_LENGTH.size : end])
        del self._data[:end]  # from the front of a bytearray this moves a pointer, not the rest
        return body

    def __iter__(self) -> Iterator[bytes]:
        """Yield the bodies of all frames that are whole."""
        while (body := self.next_frame()) is not None:
            yield body


def pack_header(header: Header) -> bytes:
    """Return the 40 bytes of `header`. Raises ValueError if a field does not fit."""
    if len(header.round_id) != ROUND_ID_BYTES:  # struct would pad or cut it in silence
        raise ValueError(f"a round id has {ROUND_ID_BYTES} bytes, this has {len(header.round_id)}")
    try:
        return _HEADER.pack(
            header.kind,
            header.codec,
            header.member,
            header.chunk,
            header.length,
            header.version,
            header.round_id,
            header.contributors,
        )
    except struct.error as error:
        raise ValueError(f"{header} does not fit a record: {error}") from error


def unpack_header(buffer: bytes | bytearray | memoryview) -> Header:
    """Return the header in the first 40 bytes of `buffer`.

    Raises PeerError if there are fewer, on an unknown kind, and on a HELLO or BYE with a payload. The other fields are
    for the round's plan to judge.
    """
    if len(buffer) < HEADER_BYTES:
        raise PeerError(f"a record header has {len(buffer)} bytes: {HEADER_BYTES} expected")
    number, codec, member, chunk, length, version, round_id, contributors = _HEADER.unpack_from(buffer)
    try:
        kind = Kind(number)
    except ValueError:
        raise PeerError(f"there is no record of kind {number}: 0 to {max(Kind)} expected") from None
    if length and kind in (Kind.HELLO, Kind.BYE):
        raise PeerError(f"a {kind.name} record announces {length} bytes: it carries none")
    return Header(kind, codec, member, chunk, length, version, RoundId(round_id), contributors)


def data_greeting(conn_id: bytes) -> bytes:
    """Return the 24 bytes with which data connection `conn_id` (16 bytes, agreed over control) begins."""
    if len(conn_id) != CONN_ID_BYTES:
        raise ValueError(f"a connection id has {CONN_ID_BYTES} bytes, this has {len(conn_id)}")
    return _GREETING.pack(DATA_MAGIC, WIRE_VERSION, bytes(3)) + conn_id


def parse_data_greeting(greeting: bytes) -> bytes:
    """Return the connection id (16 bytes) in the 24 bytes of `data_greeting`. Raises PeerError on anything else."""
    if len(greeting) != DATA_GREETING_BYTES:
        raise PeerError(f"the greeting of a data connection has {len(greeting)} bytes: {DATA_GREETING_BYTES} expected")
    found, version, reserved = _GREETING.unpack_from(greeting)
    if found != DATA_MAGIC:
        raise PeerError(f"this is no mpd data connection: it begins with {found!r}, {DATA_MAGIC!r} expected")
    if version != WIRE_VERSION:
        raise PeerError(
            f"the peer speaks version {version} of the data protocol, this daemon {WIRE_VERSION}: upgrade one"
        )
    if any(reserved):
        raise PeerError(f"the reserved bytes of a data greeting are {reserved!r}: zeros expected")
    return bytes(greeting[GREETING_BYTES:])
