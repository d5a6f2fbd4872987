"""What the owner of a private swarm decides: to make one, to invite, to revoke.

Commands do these, not the daemon, so all of it goes through the files in `swarm/`. A daemon that runs on the same state
directory sees within seconds that they have changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from mpd import revocations
from mpd.admission import DATAGRAM_KEY_BYTES
from mpd.errors import LocalError
from mpd.identity import issue_admitter, issue_leaf, new_root, swarm_id_of
from mpd.ids import Endpoint, PeerId, show_peer
from mpd.invites import Invite, make_token
from mpd.revocations import Revocations

from .state import own_id
from .swarm import RandomBytes, Swarm, new_serial
from .swarm_store import DatagramKey, SwarmNews, SwarmStore, key_digest


def create_swarm(store: SwarmStore, key: Ed25519PrivateKey, name: str, now_s: float, random_bytes: RandomBytes) -> None:
    """Make a swarm called `name`, whose root key lies in `store` and whose first admitter holds `key`.

    Raises LocalError if the name is impossible, if this machine is in a swarm, or if the disk refuses.
    """
    root_key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    root = new_root(root_key, name, now_s, new_serial(random_bytes))
    swarm = swarm_id_of(root)
    admitter = issue_admitter(root_key, root, public, now_s, new_serial(random_bytes))
    leaf = issue_leaf(key, admitter, swarm, public, "admitter", now_s, new_serial(random_bytes))
    datagram_key = random_bytes(DATAGRAM_KEY_BYTES)
    listed = Revocations(swarm, 1, frozenset(), key_digest(datagram_key))
    news = SwarmNews(listed, revocations.sign(root_key, listed), (DatagramKey(datagram_key),))
    store.found(root, [each.public_bytes(Encoding.DER) for each in (leaf, admitter)], news, {}, root_key)


@dataclass(frozen=True, slots=True)
class InviteTerms:
    """What the owner decides about an invite. `admitter`: who redeems it, if not this machine."""

    role: str
    uses: int
    life_s: float
    peer: PeerId | None = None
    admitter: PeerId | None = None


def make_invite(
    swarm: Swarm, key: Ed25519PrivateKey, terms: InviteTerms, addresses: Sequence[Endpoint], nonce: bytes, now_s: float
) -> str:
    """Return the token of an invite, signed with what this machine has. Raises LocalError if it may not invite so."""
    store = swarm.store
    if store is None:
        raise LocalError("an open swarm needs no invites: make a private one with `mpd swarm create NAME`")
    root_key = store.root_key()
    admitter = swarm.own if terms.admitter is None else terms.admitter
    if admitter != swarm.own and root_key is None:
        raise LocalError("an invite to another admitter needs the root key, which is not on this machine")
    if admitter == swarm.own and not swarm.may_admit:
        raise LocalError(
            f"this machine is no admitter of swarm {swarm.name}: run `mpd swarm invite` on one, or get an invite with "
            "--role admitter"
        )
    if swarm.is_revoked(admitter) or (admitter == swarm.own and swarm.is_revoked_here()):
        raise LocalError(f"{show_peer(admitter)}, or whoever let it in, is revoked: invite at another admitter")
    if terms.role == "admitter" and root_key is None:
        raise LocalError("an admitter can only be made where the root key is: run this on that machine")
    if terms.peer is not None and swarm.is_revoked(terms.peer):
        raise LocalError(f"{show_peer(terms.peer)} is revoked for good: that machine needs a new key")
    signer = key if admitter == swarm.own else root_key
    assert signer is not None
    invite = Invite(
        swarm=swarm.swarm_id,
        admitter=admitter,
        addresses=tuple(addresses),
        nonce=nonce,
        not_after_s=int(now_s + terms.life_s),
        uses=terms.uses,
        role=terms.role,
        peer=terms.peer,
    )
    return make_token(invite, signer)


def revoke(store: SwarmStore, key: Ed25519PrivateKey, peer: PeerId, now_s: float, random_bytes: RandomBytes) -> bool:
    """Revoke `peer` for good, with a new datagram key for the others. Returns False if it was revoked already.

    Raises LocalError without the root key, or for this machine itself, which holds `key`.
    """
    if peer == own_id(key):
        raise LocalError("this is this machine itself: revoke it from the machine that is to keep the root key")
    with store.writing():
        root_key = store.root_key()
        if root_key is None:
            raise LocalError("only the root key can revoke, and it is not on this machine: run this where root.pem is")
        news = store.news()
        old = news.revocations
        if peer in old.peers:
            return False
        datagram_key = random_bytes(DATAGRAM_KEY_BYTES)
        listed = Revocations(old.swarm, old.seq + 1, old.peers | {peer}, key_digest(datagram_key))
        blob = revocations.sign(root_key, listed)
        store.save_news(news.followed_by(listed, blob, datagram_key, now_s))
    return True
