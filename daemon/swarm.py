"""The swarm that this daemon is in: who we are there, who else is, and who is no more.

Strategy: all that changes (our certificate, the revocation list, the datagram keys) lies in one frozen `_Papers`, which
is replaced whole; so the DHT's thread may ask at any time and never sees half of a change. A private swarm comes from
the folder `swarm/`. Without one this is the open swarm, whose root key everybody has: then the daemon signs its own
certificate, keeps it in memory, and all else is the same.

Nothing here waits for the network. `admission.py` asks admitters, `news.py` decides when.
"""

import ssl
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from mpd import revocations
from mpd.admission import MAX_DATAGRAM_KEYS
from mpd.errors import Fatal, LocalError, PeerError
from mpd.identity import (
    OPEN_DATAGRAM_KEY,
    Member,
    SwarmId,
    issue_admitter,
    issue_leaf,
    member_of,
    open_root,
    show_swarm,
    swarm_id_of,
    swarm_name_of,
    verify_member,
)
from mpd.ids import Endpoint, PeerId, peer_id_of, show_peer
from mpd.messages import News
from mpd.revocations import Revocations, nothing_revoked

from .state import own_id, private_pem
from .swarm_store import CHAIN, KEPT_KEY_S, SwarmNews, SwarmStore, key_digest, raw_public, read_certificate
from .tls import admission_server_context, client_context, server_context

WORTH_RENEWING_S = 3600.0  # a new certificate that lasts no longer than this beyond the old one is none
GRACE_S = 30 * 86400.0  # how long after its end a certificate may still be renewed
TURN_S = 300.0  # how long after a revocation datagrams are still sent with the old key
_MAX_VERIFIED = 4096
_RANKS = ("observer", "member", "admitter")

Wall = Callable[[], float]
RandomBytes = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class _Papers:
    """What is true at one moment. `chain` is DER, our leaf first; there are no news in an open swarm.

    `right` is the certificate with which we let others in, if we have one; then our own leaf was signed with it.
    """

    chain: tuple[bytes, ...]
    member: Member
    right: x509.Certificate | None
    news: SwarmNews | None

    @property
    def admits_until_s(self) -> float:
        return 0.0 if self.right is None else self.right.not_valid_after_utc.timestamp()


class Swarm:
    """One swarm, as seen by the holder of `key`. A `Membership` for links and a `DhtTrust` for the DHT's thread."""

    def __init__(self, key: Ed25519PrivateKey, wall: Wall, random_bytes: RandomBytes, store: SwarmStore | None) -> None:
        self.store = store
        self.is_open = store is None
        self.root = open_root()[1] if store is None else store.root()
        self.name = swarm_name_of(self.root)
        self.swarm_id: SwarmId = swarm_id_of(self.root)
        self.own: PeerId = own_id(key)
        self.public_key = key.public_key().public_bytes_raw()
        self.sign = key.sign
        self._key = key
        self._wall = wall
        self._random_bytes = random_bytes
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._verified: OrderedDict[tuple[bytes, ...], Member] = OrderedDict()
        self._verified_lock = Lock()
        if store is None:
            leaf = self._signed_by(*open_root())
            self._papers = _Papers((leaf,), member_of(leaf, self.swarm_id), None, None)
        else:
            chain = store.chain()
            member = _own_member(store, chain, self.own, wall())
            self._papers = _Papers(chain, member, _right(chain, member), store.news())

    # ------------------------------------------------------------------------------------------------------ who we are

    @property
    def role(self) -> str:
        """What we may do."""
        return self._papers.member.role

    @property
    def not_after_s(self) -> float:
        """When our certificate ends."""
        return self._papers.member.not_after_s

    @property
    def revocations(self) -> Revocations:
        """The list that we go by."""
        news = self._papers.news
        return nothing_revoked(self.swarm_id) if news is None else news.revocations

    @property
    def news_seq(self) -> int:
        """The number of that list."""
        return self.revocations.seq

    @property
    def may_admit(self) -> bool:
        """Return True if this machine can let others in now."""
        return self._wall() < self.admits_until_s

    def can_stay(self, role: str) -> bool:
        """Return True if nobody has to let this machine in again for it to be a `role`."""
        rank = _RANKS.index("admitter" if self.may_admit else min(self.role, "member", key=_RANKS.index))
        is_in_time = self._wall() <= self.not_after_s + GRACE_S
        return is_in_time and not self.is_revoked_here() and rank >= _RANKS.index(role)

    @property
    def admits_until_s(self) -> float:
        """When our right to let others in ends; 0 if we have none."""
        return self._papers.admits_until_s

    def now_s(self) -> float:
        """Return the time, in seconds since 1970."""
        return self._wall()

    def bootstrap(self) -> tuple[Endpoint, ...]:
        """Return where this swarm was found before. Blocks on the disk."""
        known = {} if self.store is None else self.store.admitters()
        return tuple(address for addresses in known.values() for address in addresses)

    def is_revoked_here(self) -> bool:
        """Return True if we are revoked ourselves, or whoever let us in."""
        return self.revocations.names(self._papers.member)

    def status(self) -> dict[str, Any]:
        """Return what `mpd status` and `mpd swarm show` tell."""
        return {
            "name": self.name,
            "id": show_swarm(self.swarm_id),
            "open": self.is_open,
            "role": self.role,
            "expires_in_s": round(self.not_after_s - self._wall()),
            "admits": self.may_admit,
            "revoked": len(self.revocations.peers),
            "news": self.news_seq,
        }

    # ------------------------------------------------------------------------------------------------------- for links

    def server_context(self) -> ssl.SSLContext:
        """Return the context for members that dial us."""
        return self._context("server", lambda pem, chain: server_context(pem, chain, self.root))

    def client_context(self, pinned: bool = True) -> ssl.SSLContext:
        """Return the context for dialling members."""
        name = "client" if pinned else "any client"
        return self._context(name, lambda pem, chain: client_context(pem, chain, self.root, pinned=pinned))

    def admission_context(self) -> ssl.SSLContext:
        """Return the context for peers that ask to be let in."""
        return self._context("admission", admission_server_context)

    def _context(self, name: str, make: Callable[[bytes, Sequence[bytes]], ssl.SSLContext]) -> ssl.SSLContext:
        if name not in self._contexts:
            self._contexts[name] = make(private_pem(self._key), self._papers.chain)
        return self._contexts[name]

    def check(self, leaf: bytes) -> Member:
        """Return whom `leaf` (DER, verified by TLS) names. Raises PeerError, also if it is revoked."""
        member = member_of(leaf, self.swarm_id)
        self.check_not_revoked(member)
        return member

    def check_not_revoked(self, member: Member) -> None:
        """Raise PeerError if `member` is revoked, or whoever let it in."""
        if not self.revocations.names(member):
            return
        if member.peer in self.revocations.peers:
            raise PeerError(f"{show_peer(member.peer)} is revoked in swarm {self.name}")
        raise PeerError(
            f"{show_peer(member.peer)} was let into swarm {self.name} by an admitter that is revoked: "
            "it needs a new invite"
        )

    # ---------------------------------------------------------------------------------------- for the thread of the DHT

    def chain(self) -> tuple[bytes, ...]:
        """Return what proves our membership (DER, leaf first); in an open swarm nothing does."""
        return () if self.is_open else self._papers.chain

    def datagram_keys(self) -> tuple[bytes, ...]:
        """Return the keys for datagrams: the first sends, all are accepted.

        A new key is accepted at once and sent with a little later, when everybody has heard of it: whoever only knows
        the old one would no longer hear us, and find nobody who could tell it.
        """
        news = self._papers.news
        if news is None:
            return (OPEN_DATAGRAM_KEY,)
        keys = news.valid_keys(self._wall())
        recent_s = self._wall() + KEPT_KEY_S - TURN_S
        known_to_all = [each for each in keys[1:] if each.until_s is not None and each.until_s > recent_s]
        first = known_to_all[-1] if known_to_all else keys[0]
        return (first.key, *(each.key for each in keys if each is not first))

    def admits(self, public_key: bytes, chain: Sequence[bytes]) -> bool:
        """Return True if the holder of `public_key` is a member now. In an open swarm everybody is."""
        if self.is_open:
            return True
        now_s = self._wall()
        try:
            member = self._verify(tuple(chain), now_s)
        except PeerError:
            return False
        is_valid = member.not_before_s <= now_s <= member.not_after_s
        return is_valid and member.peer == peer_id_of(public_key) and not self.revocations.names(member)

    def is_revoked(self, peer: bytes) -> bool:
        """Return True if `peer` is revoked."""
        return peer in self.revocations.peers

    def _verify(self, chain: tuple[bytes, ...], now_s: float) -> Member:
        """Return what `chain` proves; that it was valid once is remembered, so the caller looks at the dates."""
        with self._verified_lock:
            if chain in self._verified:
                self._verified.move_to_end(chain)
                return self._verified[chain]
        member = verify_member(chain, self.root, now_s)
        with self._verified_lock:
            self._verified[chain] = member
            if len(self._verified) > _MAX_VERIFIED:
                self._verified.popitem(last=False)
        return member

    # ------------------------------------------------------------------------------------------------------------ news

    def news(self) -> News | None:
        """Return what others should know; nothing in an open swarm."""
        news = self._papers.news
        return None if news is None else News(news.blob, news.keys[0].key)

    def learn(self, blob: bytes, key: bytes) -> bool:
        """Go by the list in `blob`, which came with the datagram key `key`, if it is newer. Raises PeerError if forged.

        This is in memory only until `sync_news`.
        """
        news = self._papers.news
        if news is None:
            raise PeerError("it sent news of a private swarm in an open one")
        if blob == news.blob:
            return False
        listed = revocations.parse(blob, raw_public(self.root), self.swarm_id)
        if key_digest(key) != listed.key_digest:
            raise PeerError("it sent a datagram key that is not the one of its revocation list")
        if listed.seq <= news.revocations.seq:
            return False
        self._papers = replace(self._papers, news=news.followed_by(listed, blob, key, self._wall()))
        return True

    def take_news(self, news: SwarmNews) -> bool:
        """Go by `news`, as they lie on disk, if they are newer. Returns True if they are."""
        if news.revocations.seq <= self.news_seq:
            return False
        self._papers = replace(self._papers, news=news)
        return True

    @property
    def swarm_news(self) -> SwarmNews:
        """What is to be kept on disk. Only in a private swarm."""
        news = self._papers.news
        assert news is not None, "an open swarm has no news"
        return news

    # ----------------------------------------------------------------------------------------------- letting others in

    def issue(self, public: bytes, role: str) -> tuple[bytes, ...]:
        """Return a chain for the peer with the key `public` (32 bytes). Raises LocalError if we may not admit."""
        issuer = self._papers.right
        if issuer is None:
            raise LocalError(f"{show_peer(self.own)} is no admitter of swarm {self.name}: ask for an invite of one")
        leaf = issue_leaf(self._key, issuer, self.swarm_id, public, role, self._wall(), self._serial())
        return _der(leaf), _der(issuer)

    def issue_admitter(self, public: bytes) -> bytes:
        """Return a certificate that makes an admitter. Blocks on the disk. Raises LocalError without the root key."""
        root_key = self._root_key()
        if root_key is None:
            raise LocalError("the root key is needed to make an admitter, and it is not on the admitter's machine")
        return _der(issue_admitter(root_key, self.root, public, self._wall(), self._serial()))

    def has_root_key(self) -> bool:
        """Return True if the root key is on this machine. Blocks on the disk."""
        return self._root_key() is not None

    def keys_to_give(self) -> tuple[bytes, ...]:
        """Return the datagram keys that a new member needs, the current one first. Only in a private swarm."""
        return tuple(each.key for each in self.swarm_news.valid_keys(self._wall())[:MAX_DATAGRAM_KEYS])

    # -------------------------------------------------------------------------------------------------------- renewal

    def leaf_is_due(self) -> bool:
        """Return True if half of the life of our certificate is over."""
        member = self._papers.member
        return self._wall() >= (member.not_before_s + member.not_after_s) / 2

    def admitter_is_due(self) -> bool:
        """Return True if we are an admitter, and half of the life of that certificate is over."""
        issuer = self._papers.right
        if issuer is None:
            return False
        return self._wall() >= (issuer.not_valid_before_utc.timestamp() + issuer.not_valid_after_utc.timestamp()) / 2

    def renewed_here(self) -> tuple[bytes, ...] | None:
        """Return a new chain for us if one is due and this machine can sign it alone. Blocks on the disk."""
        if self.is_open:
            return (self._signed_by(*open_root()),) if self.leaf_is_due() else None
        issuer = self._papers.right
        if issuer is not None and self.admitter_is_due() and self._root_key() is not None:
            issuer = read_certificate(self.issue_admitter(self.public_key))
        elif not self.leaf_is_due():
            return None
        if issuer is None or self._wall() > issuer.not_valid_after_utc.timestamp():
            return None
        return self._signed_by(self._key, issuer), _der(issuer)

    def adopt(self, chain: tuple[bytes, ...]) -> bool:
        """Use `chain` from now on if it lasts longer than ours. Raises PeerError if it is not one for us.

        Our right to admit others is only given up when it ends anyway: the root alone could give it back.
        """
        member = verify_member(chain, self.root, self._wall())
        if member.peer != self.own:
            raise PeerError("that certificate is for another peer than this one")
        papers = replace(self._papers, chain=chain, member=member, right=_right(chain, member))
        gain_s, gain_of_right_s = member.not_after_s - self.not_after_s, papers.admits_until_s - self.admits_until_s
        is_demotion = gain_of_right_s < 0 and self.admits_until_s > self._wall() + 2 * WORTH_RENEWING_S
        if is_demotion or max(gain_s, gain_of_right_s) < WORTH_RENEWING_S:
            return False
        self._papers = papers
        self._contexts = {}
        return True

    def _root_key(self) -> Ed25519PrivateKey | None:
        return None if self.store is None else self.store.root_key()

    def _signed_by(self, issuer_key: Ed25519PrivateKey, issuer: x509.Certificate) -> bytes:
        """Return our own leaf, signed here."""
        role = "member" if self.is_open else "admitter"
        return _der(issue_leaf(issuer_key, issuer, self.swarm_id, self.public_key, role, self._wall(), self._serial()))

    def _serial(self) -> int:
        return new_serial(self._random_bytes)


def load_swarm(path: Path, key: Ed25519PrivateKey, wall: Wall, random_bytes: RandomBytes) -> Swarm:
    """Return the swarm that the state directory `path` belongs to, the open one if to none. Raises Fatal.

    `wall` returns seconds since 1970. Afterwards nothing in `swarm/` was found damaged.
    """
    store = SwarmStore(path)
    if not store.exists():
        return Swarm(key, wall, random_bytes, None)
    store.check()
    return Swarm(key, wall, random_bytes, store)


def new_serial(random_bytes: RandomBytes) -> int:
    """Return a serial number that no other certificate has."""
    return int.from_bytes(random_bytes(16)) | 1


def verify_lapsed(chain: Sequence[bytes], root: x509.Certificate, now_s: float) -> Member:
    """Return who holds `chain`, which was valid when it ended, if it has ended. Raises PeerError.

    Its issuer may have renewed its own certificate since, so a lapsed chain is judged as of its last moment.
    """
    if not chain:
        raise PeerError("there is no certificate")
    end_s = member_of(chain[0], swarm_id_of(root)).not_after_s
    return verify_member(chain, root, min(now_s, end_s))


def _own_member(store: SwarmStore, chain: Sequence[bytes], own: PeerId, now_s: float) -> Member:
    """Return what our own chain says; that it has lapsed, or that the clock is wrong, keeps nobody from starting."""
    root = store.root()
    try:
        begin_s = member_of(chain[0], swarm_id_of(root)).not_before_s if chain else now_s
        member = verify_lapsed(chain, root, max(now_s, begin_s))
    except PeerError as error:
        raise store.damaged(CHAIN, error) from error
    if member.peer != own:
        raise Fatal(
            f"the certificate in {store.folder} is that of {show_peer(member.peer)}, and this machine's key is that of "
            f"{show_peer(own)}: restore key.pem, or move {store.folder} away and join again with a new invite"
        )
    return member


def _right(chain: Sequence[bytes], member: Member) -> x509.Certificate | None:
    """Return the certificate in our verified `chain` that makes us an admitter."""
    return read_certificate(chain[1]) if member.issuer == member.peer else None


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)
