"""Peers with real keys and certificates, the same in every run, and swarms for them to be members of.

Strategy: keys come from a list that is sorted by peer id, so that smaller numbers have smaller ids. A `TestSwarm` signs
whatever a test asks for, wrong certificates too; a `Card` is one member's view of it, all that TLS needs.
"""

import functools
import hashlib
import ssl
import time
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from mpd.daemon import tls
from mpd.errors import PeerError
from mpd.identity import Member, SwarmId, issue_admitter, issue_leaf, member_of, new_root, open_root, swarm_id_of
from mpd.ids import PeerId, peer_id_of

N_KEYS = 64
DAY_S = 86400.0


def _key(seed: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(seed.encode()).digest())


def public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


@functools.cache
def keys() -> tuple[Ed25519PrivateKey, ...]:
    """Return the keys of all peers, those with smaller ids first."""
    return tuple(sorted((_key(f"peer {i}") for i in range(N_KEYS)), key=lambda key: peer_id_of(public(key))))


def node_id(i: int) -> PeerId:
    """Return the id of peer `i`: smaller numbers have smaller ids."""
    return peer_id_of(public(keys()[i]))


def pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


class Card:
    """What one peer shows, and whom it trusts: a `Membership`."""

    def __init__(self, key: Ed25519PrivateKey, chain: Sequence[bytes], root: x509.Certificate) -> None:
        self.key = key
        self.chain = tuple(chain)
        self.root = root
        self.own = peer_id_of(public(key))
        self.swarm_id: SwarmId = swarm_id_of(root)
        self.is_open = False
        self.news_seq = 0
        self.revoked: set[PeerId] = set()
        self._contexts: dict[object, ssl.SSLContext] = {}

    def server_context(self) -> ssl.SSLContext:
        if None not in self._contexts:
            self._contexts[None] = tls.server_context(pem(self.key), self.chain, self.root)
        return self._contexts[None]

    def client_context(self, pinned: bool = True) -> ssl.SSLContext:
        if pinned not in self._contexts:
            self._contexts[pinned] = tls.client_context(pem(self.key), self.chain, self.root, pinned=pinned)
        return self._contexts[pinned]

    def check(self, leaf: bytes) -> Member:
        member = member_of(leaf, self.swarm_id)
        if member.peer in self.revoked:
            raise PeerError("this peer was revoked")
        return member


class TestSwarm:
    """A private swarm; one admitter lets everybody in. `age_s` is how long ago that was."""

    __test__ = False  # no test, though it is called so

    def __init__(self, name: str = "lab", age_s: float = 0.0) -> None:
        self.now_s = time.time() - age_s
        self.root_key, self.admitter_key = _key(f"root of {name}"), _key(f"admitter of {name}")
        self.root = new_root(self.root_key, name, self.now_s, serial=1)
        self.id = swarm_id_of(self.root)
        self.admitter = issue_admitter(self.root_key, self.root, public(self.admitter_key), self.now_s, serial=2)

    def card(self, i: int, role: str = "member", now_s: float | None = None) -> Card:
        """Return the card of peer `i`, issued by the admitter now or at another time."""
        now_s = self.now_s if now_s is None else now_s
        key = keys()[i]
        leaf = issue_leaf(self.admitter_key, self.admitter, self.id, public(key), role, now_s, serial=i + 3)
        return Card(key, (der(leaf), der(self.admitter)), self.root)


def open_card(i: int) -> Card:
    """Return the card of peer `i` in the open swarm."""
    root_key, root = open_root()
    leaf = issue_leaf(root_key, root, swarm_id_of(root), public(keys()[i]), "member", time.time(), serial=i + 3)
    card = Card(keys()[i], (der(leaf),), root)
    card.is_open = True
    return card


@functools.cache
def lab() -> TestSwarm:
    """Return the swarm that most tests use."""
    return TestSwarm()
