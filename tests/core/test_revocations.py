"""Revocation lists: what the root has signed is read as it was written, and nothing else is ever believed."""

import hashlib
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given
from hypothesis import strategies as st

from mpd.errors import LocalError, PeerError
from mpd.identity import OPEN_SWARM, Member, SwarmId, open_root
from mpd.ids import PeerId, peer_id_of
from mpd.messages import MAX_NEWS_BYTES
from mpd.revocations import MAX_BLOB_BYTES, MAX_REVOKED, MAX_SEQ, Revocations, nothing_revoked, parse, sign

ROOT_KEY = Ed25519PrivateKey.from_private_bytes(b"r" * 32)
ROOT_PUBLIC = ROOT_KEY.public_key().public_bytes_raw()
SWARM = SwarmId(peer_id_of(ROOT_PUBLIC))
DIGEST = hashlib.sha256(b"key").digest()
ALICE, BOB, CAROL = (PeerId(bytes([name]) * 20) for name in b"abc")
LIST = Revocations(SWARM, 7, frozenset({CAROL, ALICE}), DIGEST)
BLOB = sign(ROOT_KEY, LIST)

PEERS = st.binary(min_size=20, max_size=20).map(PeerId)


def signed(body: bytes, key: Ed25519PrivateKey = ROOT_KEY, domain: bytes = b"mpd revocations 1") -> bytes:
    """Return `body` as if it were a list, with the signature that it should have."""
    return key.sign(domain + body) + body


def body_of(*peers: bytes, swarm: bytes = SWARM, seq: int = 7) -> bytes:
    return struct.pack("<20sQ32s", swarm, seq, DIGEST) + b"".join(peers)


@given(st.frozensets(PEERS, max_size=50), st.integers(1, MAX_SEQ), st.binary(min_size=32, max_size=32))
def test_what_the_root_signs_is_read_as_it_was_written(peers: frozenset[PeerId], seq: int, digest: bytes) -> None:
    revocations = Revocations(SWARM, seq, peers, digest)
    assert parse(sign(ROOT_KEY, revocations), ROOT_PUBLIC, SWARM) == revocations


def test_a_list_has_the_layout_that_is_documented() -> None:
    assert signed(body_of(ALICE, CAROL)) == BLOB
    assert len(BLOB) == 64 + 20 + 8 + 32 + 2 * 20


def test_the_longest_list_fits_into_a_message() -> None:
    peers = frozenset(PeerId(number.to_bytes(20, "big")) for number in range(MAX_REVOKED))
    blob = sign(ROOT_KEY, Revocations(SWARM, 1, peers, DIGEST))
    assert len(blob) == MAX_BLOB_BYTES <= MAX_NEWS_BYTES
    assert parse(blob, ROOT_PUBLIC, SWARM).peers == peers


def test_a_longer_list_is_not_signed() -> None:
    peers = frozenset(PeerId(number.to_bytes(20, "big")) for number in range(MAX_REVOKED + 1))
    with pytest.raises(LocalError, match="at most 10000 peers can be revoked"):
        sign(ROOT_KEY, Revocations(SWARM, 1, peers, DIGEST))


def test_a_list_names_peers_and_whomever_they_let_in() -> None:
    def member(peer: PeerId, issuer: PeerId | None) -> Member:
        return Member(peer, SWARM, "member", issuer, 0.0, 1.0)

    assert LIST.names(member(ALICE, None))
    assert LIST.names(member(ALICE, BOB))
    assert LIST.names(member(BOB, CAROL))
    assert not LIST.names(member(BOB, None))
    assert not LIST.names(member(BOB, BOB))


def test_before_the_first_list_nobody_is_revoked() -> None:
    nothing = nothing_revoked(SWARM)
    assert (nothing.swarm, nothing.seq, nothing.peers) == (SWARM, 0, frozenset())
    with pytest.raises(LocalError, match="has the number 1"):
        sign(ROOT_KEY, nothing)


def test_an_open_swarm_revokes_nobody() -> None:
    key = open_root()[0]
    with pytest.raises(LocalError, match=r"nobody can be revoked in an open swarm: .* mpd swarm create"):
        sign(key, Revocations(OPEN_SWARM, 1, frozenset({ALICE}), DIGEST))
    blob = signed(body_of(ALICE, swarm=OPEN_SWARM), key)
    with pytest.raises(PeerError, match="for another swarm"):
        parse(blob, key.public_key().public_bytes_raw(), OPEN_SWARM)


@pytest.mark.parametrize(
    ("blob", "why"),
    [
        (b"", "cannot have 0 bytes"),
        (BLOB[:-1], "cannot have 163 bytes"),
        (BLOB + b"\0", "cannot have 165 bytes"),
        (bytes(MAX_BLOB_BYTES + 20), "cannot have 200144 bytes"),
        (BLOB[:-20], "not signed by the root"),
        (BLOB + BOB, "not signed by the root"),
        (signed(body_of(), Ed25519PrivateKey.from_private_bytes(b"x" * 32)), "not signed by the root"),
        (signed(body_of(), domain=b""), "not signed by the root"),
        (signed(body_of(), domain=b"mpd invite 1"), "not signed by the root"),
        (signed(body_of(swarm=b"s" * 20)), "for another swarm"),
        (signed(body_of(seq=0)), "signed but malformed"),
        (signed(body_of(seq=MAX_SEQ + 1)), "signed but malformed"),
        (signed(body_of(CAROL, ALICE)), "signed but malformed"),
        (signed(body_of(ALICE, ALICE)), "signed but malformed"),
    ],
)
def test_anything_else_is_refused(blob: bytes, why: str) -> None:
    with pytest.raises(PeerError, match=why):
        parse(blob, ROOT_PUBLIC, SWARM)


@given(st.binary(max_size=300))
@example(bytes(124))
def test_any_bytes_are_a_peers_mistake(blob: bytes) -> None:
    with pytest.raises(PeerError):
        parse(blob, ROOT_PUBLIC, SWARM)


@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255))
def test_no_altered_list_is_believed(at: int, flip: int) -> None:
    wrong = bytearray(BLOB)
    wrong[at] ^= flip
    with pytest.raises(PeerError, match=r"not signed by the root|for another swarm"):
        parse(bytes(wrong), ROOT_PUBLIC, SWARM)


@given(st.lists(PEERS, max_size=4), st.binary(min_size=8, max_size=8))
def test_what_the_root_signs_is_one_list_in_one_way_or_none(peers: list[PeerId], seq: bytes) -> None:
    blob = signed(SWARM + seq + DIGEST + b"".join(peers))
    try:
        revocations = parse(blob, ROOT_PUBLIC, SWARM)
    except PeerError:
        assert peers != sorted(set(peers)) or not 0 < int.from_bytes(seq, "little") <= MAX_SEQ
        return
    assert sign(ROOT_KEY, revocations) == blob


@pytest.mark.parametrize(
    ("swarm", "seq", "peers", "digest"),
    [
        (b"s" * 19, 1, {ALICE}, DIGEST),
        (SWARM, 1, {ALICE, b"x" * 21}, DIGEST),
        (SWARM, -1, {ALICE}, DIGEST),
        (SWARM, MAX_SEQ + 1, {ALICE}, DIGEST),
        (SWARM, 1, {ALICE}, DIGEST[:31]),
    ],
)
def test_a_list_that_cannot_be_written_cannot_be_made(
    swarm: SwarmId, seq: int, peers: set[PeerId], digest: bytes
) -> None:
    with pytest.raises(ValueError, match=r"have ids of 20 bytes|a number and a digest of 32 bytes"):
        Revocations(swarm, seq, frozenset(peers), digest)
