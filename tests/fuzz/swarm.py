"""What proves who belongs to a swarm: certificates, revocation lists, invites, and what is said at the door.

A signature keeps a fuzzer out as it keeps everyone out, and then nothing behind it is tried. So the first byte of an
input says whether the rest is taken as it is or signed first, as a hostile admitter or root would.
"""

import base64
from collections.abc import Iterator

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from fuzz.target import Target

from mpd import admission, invites, revocations
from mpd.errors import LocalError, PeerError
from mpd.identity import (
    ROLES,
    issue_admitter,
    issue_leaf,
    member_of,
    new_root,
    read_root,
    swarm_id_of,
    swarm_name_of,
    verify_member,
)
from mpd.ids import Endpoint, PeerId, peer_id_of

NOW_S = 1.8e9
ROOT_KEY, ADMITTER_KEY, PEER_KEY = (Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in (1, 2, 3))
ROOT = new_root(ROOT_KEY, "lab", NOW_S, 1)
SWARM = swarm_id_of(ROOT)


def _public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


ADMITTER = issue_admitter(ROOT_KEY, ROOT, _public(ADMITTER_KEY), NOW_S, 2)
BY_ROOT = [issue_leaf(ROOT_KEY, ROOT, SWARM, _public(PEER_KEY), role, NOW_S, 3) for role in ROLES]
LEAF = issue_leaf(ADMITTER_KEY, ADMITTER, SWARM, _public(PEER_KEY), "member", NOW_S, 4)
BY_ADMITTER = (_der(LEAF), _der(ADMITTER))


# --------------------------------------------------------------------------------------------------------- certificates


def parse_chain(data: bytes) -> object:
    """A chain proves what its certificates say, or costs whoever showed it its place."""
    how, body = data[:1], data[1:]
    if how == b"\0":
        chain = [body]
    elif how == b"\1":
        chain = [_signed(body, ROOT_KEY)]
    elif how == b"\2":
        chain = [_signed(body, ADMITTER_KEY), BY_ADMITTER[1]]
    elif how == b"\3":
        chain = [BY_ADMITTER[0], _signed(body, ROOT_KEY)]
    else:
        return read_root(_signed(body, ROOT_KEY), SWARM)
    member = verify_member(chain, ROOT, NOW_S)
    assert member.not_before_s <= NOW_S <= member.not_after_s
    assert member.role in ROLES
    named = member_of(chain[0], SWARM)
    assert (named.peer, named.role, named.issuer) == (member.peer, member.role, member.issuer)
    return member


def chain_seeds() -> Iterator[bytes]:
    for leaf in BY_ROOT:
        yield b"\0" + _der(leaf)
        yield b"\1" + leaf.tbs_certificate_bytes
    yield b"\2" + LEAF.tbs_certificate_bytes
    yield b"\3" + ADMITTER.tbs_certificate_bytes
    yield b"\4" + ROOT.tbs_certificate_bytes


def parse_leaf(data: bytes) -> object:
    """What TLS let through names the peer whose key it holds, or nobody."""
    member = member_of(data, SWARM)
    assert member.peer == peer_id_of(_public_of(data))
    return member


def _public_of(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_key().public_bytes_raw()  # type: ignore[union-attr]


def parse_root(data: bytes) -> str:
    """A root certificate that is shown at the door is that of the swarm, and its name can be printed."""
    name = swarm_name_of(read_root(data, SWARM))
    assert name.isprintable()
    return name


def _signed(tbs: bytes, key: Ed25519PrivateKey) -> bytes:
    """Return `tbs`, the signed part of a certificate, as a certificate (RFC 5280, 4.1) that `key` signed."""
    algorithm = b"\x30\x05\x06\x03\x2b\x65\x70"
    return _element(0x30, tbs + algorithm + _element(0x03, b"\0" + key.sign(tbs)))


def _element(tag: int, content: bytes) -> bytes:
    n = len(content)
    length = bytes([n]) if n < 128 else b"\x82" + n.to_bytes(2)
    return bytes([tag]) + length + content


# ---------------------------------------------------------------------------------------------------------- revocations


def parse_revocations(data: bytes) -> revocations.Revocations:
    """A list is the root's, and then it can be signed again to the same bytes, or it is refused."""
    blob = data[1:]
    if data[:1] == b"\1":
        blob = ROOT_KEY.sign(b"mpd revocations 1" + blob) + blob
    found = revocations.parse(blob, _public(ROOT_KEY), SWARM)
    assert revocations.sign(ROOT_KEY, found) == blob
    return found


def revocation_seeds() -> Iterator[bytes]:
    for n in (0, 1, 3):
        peers = frozenset(PeerId(bytes([i]) * 20) for i in range(n))
        blob = revocations.sign(ROOT_KEY, revocations.Revocations(SWARM, n + 1, peers, bytes(32)))
        yield b"\0" + blob
        yield b"\1" + blob[64:]


# -------------------------------------------------------------------------------------------------------------- invites


def parse_invite(data: bytes) -> invites.SignedInvite:
    """What someone pastes is an invite that can be made again, or is refused without being shown."""
    text = data[1:].decode("utf-8", "surrogateescape")
    if data[:1] == b"\1":
        signed = ADMITTER_KEY.sign(b"mpd invite 1" + data[1:]) + data[1:]
        text = "mpdi1." + base64.urlsafe_b64encode(signed).decode("ascii").rstrip("=")
    found = invites.parse_token(text)
    if data[:1] == b"\1":
        assert found.is_signed_by(_public(ADMITTER_KEY))
    assert not found.is_signed_by(_public(PEER_KEY))
    assert invites.parse_token(invites.make_token(found.invite, PEER_KEY)).invite == found.invite
    return found


def tokens() -> Iterator[str]:
    addresses = (Endpoint("192.0.2.7", 4747), Endpoint("peer.example", 1))
    for peer, role in ((None, "member"), (peer_id_of(_public(PEER_KEY)), "observer")):
        admitter = peer_id_of(_public(ADMITTER_KEY))
        invite = invites.Invite(SWARM, admitter, addresses, b"n" * 16, int(NOW_S), 2, role, peer)
        yield invites.make_token(invite, ADMITTER_KEY)


def invite_seeds() -> Iterator[bytes]:
    for token in tokens():
        yield b"\0" + token.encode()
        yield b"\1" + base64.urlsafe_b64decode(token.removeprefix("mpdi1.") + "==")[64:]


# ------------------------------------------------------------------------------------------------------------ admission


def parse_admission(data: bytes) -> object:
    """What is said at the door is understood to the end, or costs whoever said it the connection."""
    message = admission.ADMISSION.decode(data)
    match message:
        case admission.Apply():
            message.invite()
        case admission.Renew():
            verify_member(message.chain, ROOT, NOW_S, 86400.0)
        case admission.Admitted():
            verify_member(message.chain, ROOT, NOW_S)
            if message.news:
                revocations.parse(message.news, _public(ROOT_KEY), SWARM)
        case admission.Card():
            read_root(message.root, SWARM)
    return message


def admission_seeds() -> list[bytes]:
    chain, news = BY_ADMITTER, revocations.sign(ROOT_KEY, revocations.Revocations(SWARM, 1, frozenset(), bytes(32)))
    said = [
        admission.Card(_der(ROOT)),
        *map(admission.Apply, tokens()),
        admission.Renew(chain),
        admission.Admitted(chain, (bytes(32),), news),
        admission.Refused("this invite was used"),
    ]
    return [admission.ADMISSION.encode(message) for message in said]


PEER = (PeerError,)
TARGETS = {
    "certificate-chain": Target(parse_chain, PEER, chain_seeds),
    "certificate-leaf": Target(parse_leaf, PEER, lambda: [BY_ADMITTER[0], *map(_der, BY_ROOT)]),
    "certificate-root": Target(parse_root, PEER, lambda: [_der(ROOT)]),
    "revocations": Target(parse_revocations, PEER, revocation_seeds),
    "invite": Target(parse_invite, (LocalError,), invite_seeds),
    "admission": Target(parse_admission, PEER, admission_seeds, max_bytes=4096),
}
