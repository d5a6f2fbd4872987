"""How a data connection begins and what it carries: the offer, the greeting, the HELLO, and sealed records."""

from collections.abc import Iterator

from fuzz.target import Choices, Target

from mpd.daemon.channels import Sealing
from mpd.errors import LocalError, PeerError
from mpd.ids import PeerId
from mpd.messages import PEERS, DataAccept, DataOffer
from mpd.seal import NO_SEAL, SUITES, TAG_BYTES, BadRecord, Half, context, derive
from mpd.wire import CONN_ID_BYTES, HEADER_BYTES, data_greeting, parse_data_greeting

SWARM, DIALLER, DIALLED = b"s" * 20, PeerId(b"a" * 20), PeerId(b"b" * 20)


def parse_greeting(data: bytes) -> bytes:
    """A greeting that is understood has one form only."""
    conn_id = parse_data_greeting(data)
    assert data_greeting(conn_id) == data
    return conn_id


def _sealing(is_initiator: bool, suites: tuple[str, ...]) -> Sealing:
    return Sealing(SWARM, DIALLER, DIALLED, is_initiator, suites, bytes)


def parse_agreement(data: bytes) -> object:
    """An offer or an acceptance leads to keys that were allowed here, and then a HELLO proves them or does not."""
    message = PEERS.decode(data[1:])
    suites = SUITES if data[0] % 2 else (NO_SEAL,)
    if isinstance(message, DataOffer):
        answer, keys = _sealing(False, suites).accept(message, 0)
        assert answer.suite in suites
        assert (keys.rx is None) == (suites == (NO_SEAL,))
        return keys
    if isinstance(message, DataAccept):
        dialler = _sealing(True, suites)
        return dialler.agreed(dialler.offer(0), message)
    raise PeerError("neither")


def agreement_seeds() -> Iterator[bytes]:
    for how, suites in ((b"\0", (NO_SEAL,)), (b"\1", SUITES)):
        yield how + PEERS.encode(DataOffer(bytes(CONN_ID_BYTES), bytes(32), suites))
        yield how + PEERS.encode(DataAccept(bytes(CONN_ID_BYTES), bytes(32), suites[-1]))


def parse_hello(data: bytes) -> bool:
    """Only the HELLO of these very keys opens the door; a wrong one changes nothing, so the right one still does."""
    dialler, dialled = (_sealing(is_initiator, SUITES) for is_initiator in (True, False))
    offer = dialler.offer(0)
    answer, theirs = dialled.accept(offer, 0)
    hello = dialler.agreed(offer, answer).hello()
    tried = bytes(a ^ b for a, b in zip(hello, data.ljust(len(hello), b"\0"), strict=False))
    is_right = theirs.is_hello(tried)
    assert is_right == (tried == hello)
    assert is_right or theirs.is_hello(hello)
    return is_right


def parse_sealed(data: bytes) -> bytes:
    """A record opens if it is the one that was sealed at this place, and after any other nothing opens any more."""
    choices = Choices(data)
    suite, n_before, at, mask = SUITES[choices.number(2)], choices.number(3), choices.number(256), choices.take(1)
    header, payload = choices.take(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), choices.take(len(data))
    sender, receiver = (_half(suite) for _ in range(2))
    for _ in range(n_before):
        receiver.open_into(header, _sealed(sender, header, b""), bytearray())
    record = bytearray(header + _sealed(sender, header, payload))
    record[at % len(record)] ^= int.from_bytes(mask)
    out = bytearray(len(payload))
    try:
        receiver.open_into(bytes(record[:HEADER_BYTES]), bytes(record[HEADER_BYTES:]), out)
    except BadRecord:
        assert mask not in (b"", b"\0")
        try:
            receiver.open_into(header, _sealed(sender, header, b""), bytearray())
        except LocalError:
            raise PeerError("altered") from None
        raise AssertionError("something opened after a bad record") from None
    assert mask in (b"", b"\0")
    assert out == payload
    return bytes(out)


def _half(suite: str) -> Half:
    return derive(bytes(32), bytes(32), context(SWARM, DIALLER, DIALLED, bytes(CONN_ID_BYTES), 0, suite), suite)[0]


def _sealed(sender: Half, header: bytes, payload: bytes) -> bytes:
    sealed = bytearray(len(payload) + TAG_BYTES)
    sender.seal_into(header, payload, sealed)
    return bytes(sealed)


PEER = (PeerError,)
TARGETS = {
    "data-greeting": Target(parse_greeting, PEER, lambda: [data_greeting(b"c" * CONN_ID_BYTES)], max_bytes=64),
    "data-agreement": Target(parse_agreement, PEER, agreement_seeds, max_bytes=300),
    "data-hello": Target(parse_hello, (), lambda: [b"", bytes(50), b"\1"], max_bytes=64),
    "sealed-record": Target(
        parse_sealed,
        PEER,
        lambda: [bytes([s, n]) + bytes(42) + b"p" * 50 for s in (0, 1) for n in (0, 2)],
        max_bytes=300,
    ),
}
