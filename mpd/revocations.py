"""Who is no longer welcome: one list per swarm, signed by its root, every new one replacing the one before.

Strategy: a list has a number that only rises, so whoever holds a higher one is right and an old one cannot come back.
It also names the datagram key that went out with it, by digest, so that only the root decides which key is the current
one. In the open swarm the root key is published, and a list signed with it would mean nothing: there is none.

On the wire: `signature (64) | swarm (20) | seq (8) | key digest (32) | revoked peers (20 each, ascending)`, numbers
little endian; the signature covers a text that no other signature of mpd begins with, then everything behind it.
"""

import itertools
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mpd.errors import LocalError, PeerError
from mpd.identity import OPEN_SWARM, Member, SwarmId
from mpd.ids import PEER_ID_BYTES, PeerId

MAX_REVOKED = 10_000
MAX_SEQ = (1 << 62) - 1
DIGEST_BYTES = 32

_DOMAIN = b"mpd revocations 1"
_SIGNATURE_BYTES = 64
_HEAD = struct.Struct(f"<{PEER_ID_BYTES}sQ{DIGEST_BYTES}s")
MAX_BLOB_BYTES = _SIGNATURE_BYTES + _HEAD.size + MAX_REVOKED * PEER_ID_BYTES


@dataclass(frozen=True, slots=True)
class Revocations:
    """The peers of `swarm` that are revoked as of list number `seq`, and the SHA-256 of the current datagram key."""

    swarm: SwarmId
    seq: int
    peers: frozenset[PeerId]
    key_digest: bytes

    def __post_init__(self) -> None:
        if any(len(name) != PEER_ID_BYTES for name in (self.swarm, *self.peers)):
            raise ValueError(f"peers and swarms have ids of {PEER_ID_BYTES} bytes")
        if not 0 <= self.seq <= MAX_SEQ or len(self.key_digest) != DIGEST_BYTES:
            raise ValueError(f"a list has a number and a digest of {DIGEST_BYTES} bytes")

    def names(self, member: Member) -> bool:
        """Return True if `member` is revoked, or the admitter that let it in."""
        return member.peer in self.peers or member.issuer in self.peers


def nothing_revoked(swarm: SwarmId) -> Revocations:
    """Return the list that everyone has before the first one is signed."""
    return Revocations(swarm, 0, frozenset(), bytes(DIGEST_BYTES))


def sign(key: Ed25519PrivateKey, revocations: Revocations) -> bytes:
    """Return `revocations` as bytes that convince every peer, signed with the swarm's root key. Raises LocalError."""
    if revocations.swarm == OPEN_SWARM:
        raise LocalError("nobody can be revoked in an open swarm: make a swarm of your own with mpd swarm create")
    if revocations.seq == 0:
        raise LocalError("the first revocation list has the number 1")
    if len(revocations.peers) > MAX_REVOKED:
        raise LocalError(f"at most {MAX_REVOKED} peers can be revoked: make a new swarm and invite those who stay")
    head = _HEAD.pack(revocations.swarm, revocations.seq, revocations.key_digest)
    body = head + b"".join(sorted(revocations.peers))
    return key.sign(_DOMAIN + body) + body


def parse(blob: bytes, root_public: bytes, swarm: SwarmId) -> Revocations:
    """Return the list in `blob` if the root key `root_public` (32 bytes) of `swarm` signed it. Raises PeerError."""
    n_bytes = len(blob) - _SIGNATURE_BYTES - _HEAD.size
    if n_bytes < 0 or n_bytes % PEER_ID_BYTES or n_bytes > MAX_REVOKED * PEER_ID_BYTES:
        raise PeerError(f"a revocation list cannot have {len(blob)} bytes")
    signature, body = blob[:_SIGNATURE_BYTES], blob[_SIGNATURE_BYTES:]
    named, seq, key_digest = _HEAD.unpack_from(body)
    if named != swarm or swarm == OPEN_SWARM:
        raise PeerError("the revocation list is for another swarm")
    try:
        Ed25519PublicKey.from_public_bytes(root_public).verify(signature, _DOMAIN + body)
    except InvalidSignature as error:
        raise PeerError("the revocation list was not signed by the root of this swarm") from error
    peers = [PeerId(body[i : i + PEER_ID_BYTES]) for i in range(_HEAD.size, len(body), PEER_ID_BYTES)]
    if any(a >= b for a, b in itertools.pairwise(peers)) or not 0 < seq <= MAX_SEQ:
        raise PeerError("the revocation list is signed but malformed")
    return Revocations(swarm, seq, frozenset(peers), key_digest)
