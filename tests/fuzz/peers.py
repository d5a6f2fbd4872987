"""What peers send on a link and publish: frames, messages, terms, record headers, payloads, and records."""

from collections.abc import Iterator

from fuzz.target import Choices, Target, speaks

from mpd.codecs import codec_named
from mpd.errors import LocalError, PeerError
from mpd.grid import ShapeRecord
from mpd.ids import RoundId
from mpd.layout import CODEC_NAMES, ITEM_BYTES, Layout, TensorSpec, Terms
from mpd.messages import EXCHANGE, PEERS, RunTerms
from mpd.records import RECORDS
from mpd.wire import HEADER_BYTES, ControlBuffer, Header, Kind, control_frame, pack_header, unpack_header

DTYPES = tuple(ITEM_BYTES)
LAYOUT = Layout((TensorSpec("a", "float32", (40,)), TensorSpec("b", "bfloat16", (3, 11))))
TERMS = Terms(LAYOUT, 4, 1, "raw", "mean")
ROUND_ID = RoundId(b"r" * 16)


# --------------------------------------------------------------------------------------------------------------- frames


def parse_control_stream(data: bytes) -> list[bytes]:
    """The frames of a control stream do not depend on how it was cut on its way."""
    step = 1 + data[0] if data else 1
    pieces, whole, frames = ControlBuffer(), ControlBuffer(), []
    for start in range(1, len(data), step):
        pieces.feed(data[start : start + step])
        frames.extend(pieces)
    whole.feed(data[1:])
    assert frames == list(whole)
    return frames


def control_stream_seeds() -> list[bytes]:
    bodies = [b"a", b"bc" * 100, bytes(300)]
    return [bytes([step]) + b"".join(map(control_frame, bodies)) for step in (0, 6, 255)]


def parse_header(data: bytes) -> Header:
    """A header that is understood has one form only."""
    header = unpack_header(data)
    assert pack_header(header) == data[:HEADER_BYTES]
    return header


def header_seeds() -> list[bytes]:
    return [pack_header(Header(kind, 0, 1, 2, 0, 3, ROUND_ID, 5)) for kind in Kind]


# ------------------------------------------------------------------------------------------------------------- messages


def parse_terms(data: bytes) -> str | None:
    """Another peer's terms either are terms, which can be compared with ours, or cost that peer its place."""
    message = PEERS.decode(data)
    if not isinstance(message, RunTerms):
        raise PeerError("no terms")
    try:
        layout = Layout(message.tensors)
        theirs = Terms(layout, message.group_size, message.rounds, message.codec, message.aggregate)
    except LocalError as error:
        raise PeerError(str(error)) from error
    assert len(theirs.digest) == 32
    return TERMS.first_difference(theirs)


def terms_seeds() -> list[bytes]:
    other = TensorSpec("c", "float64", (0, 7))
    variants = [LAYOUT.specs, LAYOUT.specs[:1], (*LAYOUT.specs, other), (other, *LAYOUT.specs)]
    return [
        PEERS.encode(RunTerms("run", specs, 4, rounds, "raw", "mean", True))
        for specs in variants
        for rounds in (1, "exact")
    ]


# ------------------------------------------------------------------------------------------------------------- payloads


def parse_payload(data: bytes) -> None:
    """A payload is exactly the planned values, or refused; once decoded, it survives being passed on unchanged."""
    choices = Choices(data)
    codec, dtype = codec_named(CODEC_NAMES[choices.number(3)]), DTYPES[choices.number(4)]
    n_elems = 1 + choices.number(256)
    payload = memoryview(choices.take(len(data)))
    out, again = (memoryview(bytearray(n_elems * ITEM_BYTES[dtype])) for _ in range(2))
    codec.decode(payload, dtype, n_elems, out)
    passed_on = memoryview(codec.encode(out, dtype)).cast("B")
    assert passed_on.nbytes <= codec.payload_limit(dtype, n_elems)
    codec.decode(passed_on, dtype, n_elems, again)
    assert again == out


def payload_seeds() -> Iterator[bytes]:
    for c, name in enumerate(CODEC_NAMES):
        for d, dtype in enumerate(DTYPES):
            for n_elems, values in ((1, b"\x00\x3c"), (200, b"\x01\x30\x02\x38")):
                n_bytes = n_elems * ITEM_BYTES[dtype]
                region = memoryview((values * n_bytes)[:n_bytes])
                yield bytes([c, d, n_elems - 1]) + bytes(codec_named(name).encode(region, dtype))


# -------------------------------------------------------------------------------------------------------------- records


def record_target() -> Target:
    shape = ShapeRecord(1, 6, (3, 2), TERMS.digest, bytes(24))
    spoken = speaks(RECORDS, PeerError)
    return Target(spoken.parse, spoken.blame, lambda: [*spoken.seeds(), RECORDS.encode(shape)])


PEER = (PeerError,)
TARGETS = {
    "control-stream": Target(parse_control_stream, PEER, control_stream_seeds),
    "data-header": Target(parse_header, PEER, header_seeds, max_bytes=64),
    "peer-message": speaks(PEERS, PeerError),
    "exchange-message": speaks(EXCHANGE, PeerError),
    "terms": Target(parse_terms, PEER, terms_seeds),
    "payload": Target(parse_payload, PEER, payload_seeds, max_bytes=4096),
    "published-record": record_target(),
}
