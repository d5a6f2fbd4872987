"""Keys and records: vectors that another implementation can check, and every way in which a record must not open.

Strategy: the key schedule is written down a second time here from nothing but hashlib and hmac, so that the vectors
stand for the formulas and not for whatever the code did once. Attacks are told as lists of what arrives.
"""

import hashlib
import hmac
import struct

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from mpd import seal
from mpd.errors import LocalError, PeerError
from mpd.ids import PeerId
from mpd.seal import AES_GCM, CHACHA, MAX_BLOCKS, MAX_RECORDS, SUITES, TAG_BYTES, BadRecord, Half, context, derive

SWARM = bytes(range(20))
INITIATOR, ACCEPTOR = PeerId(bytes(range(20, 40))), PeerId(bytes(range(40, 60)))
CONN_ID = bytes(range(60, 76))
OFFER, ACCEPT = bytes(range(100, 132)), bytes(range(132, 164))
HEADER = bytes(range(200, 240))
CIPHERS = {AES_GCM: AESGCM, CHACHA: ChaCha20Poly1305}


def ctx_for(suite: str = AES_GCM, epoch: int = 0) -> bytes:
    return context(SWARM, INITIATOR, ACCEPTOR, CONN_ID, epoch, suite)


def halves(suite: str = AES_GCM, epoch: int = 0) -> tuple[Half, Half]:
    return derive(OFFER, ACCEPT, ctx_for(suite, epoch), suite)


def pair(suite: str = AES_GCM) -> tuple[Half, Half]:
    """Return both ends of one direction."""
    return halves(suite)[0], halves(suite)[0]


def sealed(half: Half, payload: bytes, header: bytes = HEADER) -> bytes:
    out = bytearray(len(payload) + TAG_BYTES)
    assert half.seal_into(header, payload, out) == len(out)
    return bytes(out)


def opened(half: Half, record: bytes, header: bytes = HEADER) -> bytes:
    out = bytearray(len(record) - TAG_BYTES)
    assert half.open_into(header, record, out) == len(out)
    return bytes(out)


# --------------------------------------------------------------------------------------------------------- the schedule


def expand(secret: bytes, info: bytes, n_bytes: int) -> bytes:
    """HKDF-Expand of RFC 5869 for at most one block."""
    return hmac.digest(secret, info + b"\x01", "sha256")[:n_bytes]


@pytest.mark.parametrize("suite", SUITES)
def test_another_implementation_gets_the_same_records(suite: str) -> None:
    names = [b"mpd/1", SWARM, INITIATOR, ACCEPTOR, CONN_ID, struct.pack("<Q", 7), suite.encode()]
    ctx = hashlib.sha256(b"".join(struct.pack("<I", len(name)) + name for name in names)).digest()
    assert ctx == ctx_for(suite, epoch=7)
    secret = hmac.digest(b"mpd data 1", OFFER + ACCEPT, "sha256")
    for half, direction in zip(halves(suite, epoch=7), (b"i2a", b"a2i"), strict=True):
        key, iv = expand(secret, b"key " + direction + ctx, 32), expand(secret, b"iv " + direction + ctx, 12)
        for seq in range(3):
            nonce = iv[:4] + (int.from_bytes(iv[4:], "big") ^ seq).to_bytes(8, "big")
            assert sealed(half, b"payload %d" % seq) == CIPHERS[suite](key).encrypt(nonce, b"payload %d" % seq, HEADER)


@pytest.mark.parametrize(
    ("suite", "ctx", "first", "second"),
    [
        (
            AES_GCM,
            "024cf38b6ec357f020a3cc5ac5dd96496143347404980e4ba39a6ae3c62fc91a",
            "9e208159f62cac1feaa175d8cab52f546ca8cd",
            "df59e472f8af2fb95209075e7d78ed509f1ac6",
        ),
        (
            CHACHA,
            "418f6f67d0fd556d87b3364e5789c8e46dcd786ea8858d60d37fc1498dfa006c",
            "8c3bf292d2cfe45017c9890d1bef86a62af91e",
            "d8fa19e68b3e0f391f6eccd26a636c6167b2c3",
        ),
    ],
)
def test_the_schedule_has_known_values(suite: str, ctx: str, first: str, second: str) -> None:
    """From initiator to acceptor `mpd`, and back, under the inputs at the top of this file."""
    assert ctx_for(suite).hex() == ctx
    i2a, a2i = halves(suite)
    assert (sealed(i2a, b"mpd").hex(), sealed(a2i, b"mpd").hex()) == (first, second)


def test_everything_that_keys_are_for_changes_them() -> None:
    other = bytes(20)
    contexts = [
        ctx_for(),
        context(other, INITIATOR, ACCEPTOR, CONN_ID, 0, AES_GCM),
        context(SWARM, PeerId(other), ACCEPTOR, CONN_ID, 0, AES_GCM),
        context(SWARM, INITIATOR, PeerId(other), CONN_ID, 0, AES_GCM),
        context(SWARM, ACCEPTOR, INITIATOR, CONN_ID, 0, AES_GCM),
        context(SWARM, INITIATOR, ACCEPTOR, bytes(16), 0, AES_GCM),
        ctx_for(epoch=1),
        ctx_for(CHACHA),
        context(SWARM + INITIATOR[:1], PeerId(INITIATOR[1:]), ACCEPTOR, CONN_ID, 0, AES_GCM),  # lengths count
    ]
    records = {sealed(half, b"x" * 32) for ctx in contexts for half in derive(OFFER, ACCEPT, ctx, AES_GCM)}
    records |= {sealed(half, b"x" * 32) for half in derive(ACCEPT, OFFER, ctx_for(), AES_GCM)}
    records |= {sealed(half, b"x" * 32) for half in derive(OFFER, bytes(32), ctx_for(), AES_GCM)}
    records |= {sealed(half, b"x" * 32) for half in derive(bytes(32), ACCEPT, ctx_for(), AES_GCM)}
    assert len(records) == 2 * (len(contexts) + 3)


# -------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("suite", SUITES)
@given(payloads=st.lists(st.tuples(st.binary(max_size=100), st.binary(max_size=300)), max_size=8))
def test_records_open_in_the_order_in_which_they_were_sealed(suite: str, payloads: list[tuple[bytes, bytes]]) -> None:
    near, far = pair(suite)
    for header, payload in payloads:
        assert opened(far, sealed(near, payload, header), header) == payload
    assert near.n_records == far.n_records == len(payloads)


@pytest.mark.parametrize("suite", SUITES)
def test_in_place_is_the_same_as_out_of_place(suite: str) -> None:
    payload = bytes(range(256)) * 17
    (near, far), (other_near, other_far) = pair(suite), pair(suite)
    stage = memoryview(bytearray(payload + bytes(TAG_BYTES)))
    near.seal_into(HEADER, stage[: len(payload)], stage)
    assert bytes(stage) == sealed(other_near, payload)
    far.open_into(HEADER, stage, stage[: len(payload)])
    assert bytes(stage[: len(payload)]) == payload == opened(other_far, sealed(halves(suite)[0], payload))


def test_no_nonce_serves_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither within a direction, nor because a half failed, nor because two halves were made of the same secret."""
    used: list[tuple[bytes, bytes]] = []

    class Watched:
        def __init__(self, key: bytearray) -> None:
            self.key = bytes(key)

        def encrypt_into(self, nonce: bytes, payload: bytes, header: bytes, out: bytearray) -> int:
            used.append((self.key, nonce))
            return AESGCM(self.key).encrypt_into(nonce, payload, header, out)

    monkeypatch.setitem(seal._AEADS, AES_GCM, Watched)
    for epoch in range(3):  # the same randoms, as from a machine that was cloned
        for half in halves(epoch=epoch):
            for size in (0, 1, 100, 0):
                sealed(half, bytes(size))
            with pytest.raises(ValueError, match="buffer must be"):
                half.seal_into(HEADER, b"abc", bytearray(3))
            with pytest.raises(LocalError):
                half.seal_into(HEADER, b"abc", bytearray(19))
    assert len(used) == len(set(used)) == 3 * 2 * 5


def test_a_plaintext_is_written_before_it_is_known_to_be_false_so_it_may_only_go_where_nothing_lies() -> None:
    """Why receivers open into a stage or an empty slot: the cipher library gives no other choice."""
    near, far = pair()
    record, out = bytearray(sealed(near, b"\x05" * 64)), bytearray(b"what was held" * 5)[:64]
    record[0] ^= 1
    with pytest.raises(BadRecord):
        far.open_into(HEADER, record, out)
    assert out[:13] != b"what was held"


# -------------------------------------------------------------------------------------------------------------- attacks

RECORDS = [b"first", b"second", b"third"]


def sent(suite: str) -> list[bytes]:
    near = halves(suite)[0]
    return [sealed(near, payload) for payload in RECORDS]


def accepted(suite: str, arrived: list[bytes]) -> list[bytes]:
    """Return what opens of `arrived`; the first that does not must be the last."""
    far, plain = halves(suite)[0], []
    for record in arrived:
        try:
            plain.append(opened(far, record))
        except BadRecord:
            with pytest.raises(LocalError, match="closed"):  # from here on, nothing opens
                opened(far, sent(suite)[-1])
            break
    return plain


def flipped(record: bytes, at: int) -> bytes:
    return record[:at] + bytes([record[at] ^ 0x80]) + record[at + 1 :]


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(
    ("name", "n_accepted"),
    [
        ("nothing", 3),
        ("flipped body", 1),
        ("flipped tag", 1),
        ("replayed", 1),
        ("replayed later", 3),
        ("dropped", 1),
        ("reordered", 0),
        ("from another connection", 1),
        ("reflected", 1),
        ("injected", 1),
        ("cut", 1),
        ("empty", 1),
    ],
)
def test_what_was_tampered_with_does_not_open_and_neither_does_anything_after_it(
    suite: str, name: str, n_accepted: int
) -> None:
    first, second, third = sent(suite)
    other_way, other_epoch = halves(suite)[1], halves(suite, epoch=1)[0]
    for other in (other_way, other_epoch):
        sealed(other, b"first")
    arrived = {
        "nothing": [first, second, third],
        "flipped body": [first, flipped(second, 2), third],
        "flipped tag": [first, flipped(second, len(second) - 1), third],
        "replayed": [first, first, second],
        "replayed later": [first, second, third, first],
        "dropped": [first, third],
        "reordered": [second, first, third],
        "from another connection": [first, sealed(other_epoch, b"second"), third],
        "reflected": [first, sealed(other_way, b"second"), third],
        "injected": [first, bytes(40), second],
        "cut": [first, second[:-1], third],
        "empty": [first, b"\0" * TAG_BYTES, second],
    }[name]
    assert accepted(suite, arrived) == RECORDS[:n_accepted]


@pytest.mark.parametrize("at", range(len(HEADER)))
def test_every_byte_of_a_header_is_authenticated(at: int) -> None:
    near, far = pair()
    with pytest.raises(BadRecord):
        opened(far, sealed(near, b"payload"), flipped(HEADER, at))


def test_a_bad_record_is_the_fault_of_somebody_outside() -> None:
    assert issubclass(BadRecord, PeerError)


# --------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("seals", [True, False])
def test_a_half_that_failed_is_dead(seals: bool) -> None:
    near, far = pair()
    record = sealed(near, b"payload")
    half = near if seals else far
    with pytest.raises(ValueError, match="buffer must be"):
        (half.seal_into if seals else half.open_into)(HEADER, record, bytearray(1))
    for _ in range(2):
        with pytest.raises(LocalError, match="one of their records has failed"):
            (half.seal_into if seals else half.open_into)(HEADER, record, bytearray(len(record)))


def test_a_half_that_was_closed_is_dead() -> None:
    near, far = pair()
    record = sealed(near, b"payload")
    far.close()
    with pytest.raises(LocalError, match="closed"):
        opened(far, record)


def test_a_half_never_turns_round() -> None:
    """Both ends have the same keys for a direction: the receiver's would seal under the nonces of the sender."""
    near, far = pair()
    record = sealed(near, b"payload")
    opened(far, record)
    with pytest.raises(LocalError, match="either seals or opens"):
        sealed(far, b"payload")
    with pytest.raises(LocalError, match="either seals or opens"):
        opened(near, record)


def test_keys_are_used_up_after_so_many_records() -> None:
    near, _ = pair()
    near.n_records = MAX_RECORDS - 1
    assert near.wear == pytest.approx(1.0, abs=1e-6)
    sealed(near, b"the last one")
    with pytest.raises(LocalError, match="as much as they may"):
        sealed(near, b"one more")


def test_keys_are_used_up_after_so_many_blocks() -> None:
    near, far = pair()
    assert near.wear == 0
    record = sealed(near, bytes(33))
    assert near.wear == (3 + 1) / MAX_BLOCKS
    opened(far, record)
    assert far.wear == near.wear
    near._n_blocks = MAX_BLOCKS - 4
    sealed(near, bytes(33))
    assert near.wear == 1.0
    near, _ = pair()
    near._n_blocks = MAX_BLOCKS - 3
    with pytest.raises(LocalError, match="as much as they may"):
        sealed(near, bytes(33))


# --------------------------------------------------------------------------------------------------------- the greeting


def test_wrong_greetings_do_not_use_a_half_up() -> None:
    near, far = pair()
    tag = sealed(near, b"")
    for wrong in (bytes(TAG_BYTES), flipped(tag, 3), b""):
        assert not far.knows(HEADER, wrong)
    assert not far.knows(flipped(HEADER, 0), tag)
    assert far.knows(HEADER, tag)
    assert opened(far, sealed(near, b"next")) == b"next"


def test_a_greeting_is_the_first_record_or_none() -> None:
    near, far = pair()
    tag = sealed(near, b"")
    assert far.knows(HEADER, tag)
    with pytest.raises(LocalError, match="first record"):
        far.knows(HEADER, tag)


# --------------------------------------------------------------------------------------------------------------- traces


def test_secrets_are_overwritten_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytearray] = []
    erase = seal._erase
    monkeypatch.setattr(seal, "_erase", lambda secret: (seen.append(secret), erase(secret)))
    i2a, a2i = halves()
    assert [bytes(secret) for secret in seen] == [bytes(32)] * 3
    secret = hmac.digest(b"mpd data 1", OFFER + ACCEPT, "sha256")
    key = expand(secret, b"key i2a" + ctx_for(), 32)
    for half in (i2a, a2i):
        assert not {secret, key} & {bytes(held) for held in vars(half).values() if isinstance(held, bytes | bytearray)}
        assert "0x" in repr(half)
        assert "key" not in repr(half)
