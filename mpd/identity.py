"""Who is who: a key is a peer, a root key is a swarm, and a certificate says that this peer belongs to that swarm.

A private swarm's root key signs certificates of admitters, and an admitter signs the leaves of the peers that it lets
in; the root may sign leaves as well. The root key of the open swarm is published, so there everyone signs a leaf of his
own: it proves the key, and nothing about membership. One shape of certificate serves both, and one check.

Strategy: what a certificate must look like is written once, as the list of its extensions. Issuing writes that list,
checking compares with it, so nothing is let through that mpd would not have written. Key identifiers are the first 20
bytes of SHA-256 (RFC 7093, method 1), so those of X.509 are peer ids and swarm ids, and a leaf names who issued it.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import NewType, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mpd.errors import LocalError, PeerError
from mpd.ids import PEER_ID_BYTES, PeerId, peer_id_of, show_peer

ROLES = ("member", "observer", "admitter")
LEAF_LIFE_S = 7 * 86400.0
ADMITTER_LIFE_S = 30 * 86400.0
ROOT_LIFE_S = 20 * 365.25 * 86400
BACK_DATED_S = 4 * 3600.0  # clocks differ; whoever meets one that is hours off shall be able to talk to it and say so
MAX_CERTIFICATE_BYTES = 2048
MAX_CHAIN = 2  # a leaf and its admitter: an admitter's path length is 0

SwarmId = NewType("SwarmId", bytes)

_Extensions = dict[x509.ObjectIdentifier, x509.Extension[x509.ExtensionType]]
_Kind = TypeVar("_Kind", bound=x509.ExtensionType)

_PURPOSES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip

# What the cryptography package raises for hostile bytes. It only warns of some that break RFC 5280; whoever turns
# warnings into errors wants those refused as well.
_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    UserWarning,
)


@dataclass(frozen=True, slots=True)
class Member:
    """What a certificate proves. `issuer` is the admitter that let the peer in, None if the root itself did.

    Valid from `not_before_s` to `not_after_s`, in seconds since 1970.
    """

    peer: PeerId
    swarm: SwarmId
    role: str
    issuer: PeerId | None
    not_before_s: float
    not_after_s: float


# ---------------------------------------------------------------------------------------------------------------- names


def swarm_id_of(root: x509.Certificate) -> SwarmId:
    """Return the id of the swarm whose root certificate this is: the hash of its key. Raises PeerError."""
    return SwarmId(_parsed(root).key_id)


def show_swarm(swarm: bytes) -> str:
    """Return `swarm` as people see it: 32 lower-case base32 characters."""
    return show_peer(swarm)


def swarm_name_of(root: x509.Certificate) -> str:
    """Return the name that the swarm was given when it was made. Raises PeerError if there is none to show."""
    names = [attribute.value for attribute in _parsed(root).subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1 or not isinstance(names[0], str) or not _is_swarm_name(names[0]):
        raise PeerError("the swarm's root certificate has no name that can be shown")
    return names[0]


def peer_name(peer: bytes, swarm: bytes) -> str:
    """Return the name of `peer` in certificates of `swarm`, which is also what whoever dials it asks TLS for."""
    return f"{show_peer(peer)}.{show_swarm(swarm)}.mpd"


# -------------------------------------------------------------------------------------------------------------- issuing


def new_root(key: Ed25519PrivateKey, name: str, now_s: float, serial: int) -> x509.Certificate:
    """Return the root certificate of a new swarm called `name`. Raises LocalError for a name that cannot be shown."""
    if not _is_swarm_name(name):
        raise LocalError(
            f"{name[:64]!r} cannot be the name of a swarm: 1 to 64 printable ASCII characters expected, "
            "with no space at either end"
        )
    return _root(key, name, (_moment(now_s - BACK_DATED_S), _moment(now_s + ROOT_LIFE_S)), serial)


def issue_admitter(
    root_key: Ed25519PrivateKey, root: x509.Certificate, peer_public: bytes, now_s: float, serial: int
) -> x509.Certificate:
    """Return a certificate with which the peer that holds `peer_public` (32 bytes) may let others in for 30 days.

    Raises LocalError if `root_key` is not the key of `root`, or if `root` is not valid now.
    """
    swarm = _issuer_swarm(root_key, root, now_s)
    if swarm != _own_id(root_key):
        raise LocalError("only the root of a swarm can make admitters")
    peer = peer_id_of(peer_public)
    validity = _validity(now_s, ADMITTER_LIFE_S, root)
    draft = _draft(peer_public, validity, serial, _authority_extensions(peer, swarm, path_length=0))
    return draft.issuer_name(root.subject).subject_name(_name(show_peer(peer))).sign(root_key, None)


def issue_leaf(
    issuer_key: Ed25519PrivateKey,
    issuer: x509.Certificate,
    swarm: SwarmId,
    peer_public: bytes,
    role: str,
    now_s: float,
    serial: int,
    life_s: float = LEAF_LIFE_S,
) -> x509.Certificate:
    """Return the certificate of the peer that holds `peer_public` (32 bytes), which never outlives its issuer's.

    Raises LocalError if `issuer_key` is not the key of `issuer`, or if `issuer` is not valid now or of another swarm.
    """
    if _issuer_swarm(issuer_key, issuer, now_s) != swarm:
        raise LocalError(f"this issuer belongs to another swarm than {show_swarm(swarm)}")
    if role not in ROLES:
        raise LocalError(f"{role[:40]!r} is not a role: one of {', '.join(ROLES)} expected")
    if not life_s > 0:
        raise LocalError(f"a certificate cannot be valid for {life_s} s")
    extensions = _leaf_extensions(peer_id_of(peer_public), swarm, role, _own_id(issuer_key))
    draft = _draft(peer_public, _validity(now_s, life_s, issuer), serial, extensions)
    return draft.issuer_name(issuer.subject).subject_name(x509.Name([])).sign(issuer_key, None)


def _issuer_swarm(key: Ed25519PrivateKey, issuer: x509.Certificate, now_s: float) -> bytes:
    """Return the id of the swarm in which `issuer` may sign with `key` now. Raises LocalError."""
    try:
        facts = _parsed(issuer)
        swarm = facts.authority
        _check_dates(facts, now_s)
    except PeerError as error:
        raise LocalError(f"no certificate can be issued: {error}") from error
    if facts.public != key.public_key().public_bytes_raw():
        raise LocalError("no certificate can be issued: this key is not the key of the issuer's certificate")
    if facts.extensions != _authority_extensions(facts.key_id, swarm, path_length=int(swarm == facts.key_id)):
        raise LocalError("no certificate can be issued: only a root or an admitter can do that")
    return swarm


def _root(key: Ed25519PrivateKey, name: str, validity: tuple[datetime, datetime], serial: int) -> x509.Certificate:
    own = _own_id(key)
    draft = _draft(
        key.public_key().public_bytes_raw(), validity, serial, _authority_extensions(own, own, path_length=1)
    )
    return draft.issuer_name(_name(name)).subject_name(_name(name)).sign(key, None)


def _draft(
    public: bytes, validity: tuple[datetime, datetime], serial: int, extensions: _Extensions
) -> x509.CertificateBuilder:
    if not 0 < serial < 1 << 159:
        raise LocalError("a serial number is positive and has at most 159 bits")
    if len(public) != 32:
        raise LocalError(f"an ed25519 public key has 32 bytes, this has {len(public)}")
    draft = x509.CertificateBuilder().public_key(Ed25519PublicKey.from_public_bytes(public)).serial_number(serial)
    for extension in extensions.values():
        draft = draft.add_extension(extension.value, extension.critical)
    return draft.not_valid_before(validity[0]).not_valid_after(validity[1])


def _validity(now_s: float, life_s: float, issuer: x509.Certificate) -> tuple[datetime, datetime]:
    return _moment(now_s - BACK_DATED_S), min(_moment(now_s + life_s), issuer.not_valid_after_utc)


# ------------------------------------------------------------------------------------------------------------ the shape


def _authority_extensions(own: bytes, issuer: bytes, path_length: int) -> _Extensions:
    """Return the extensions of a root (path length 1) or an admitter (0) with key id `own`."""
    return _extensions(
        (x509.BasicConstraints(ca=True, path_length=path_length), True),
        (_key_usage("key_cert_sign"), True),
        (x509.SubjectKeyIdentifier(own), False),
        (x509.AuthorityKeyIdentifier(issuer, None, None), False),
    )


def _leaf_extensions(peer: bytes, swarm: bytes, role: str, issuer: bytes) -> _Extensions:
    names = [x509.DNSName(peer_name(peer, swarm)), x509.UniformResourceIdentifier(f"mpd:{role}")]
    return _extensions(
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_key_usage("digital_signature"), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName(names), True),  # critical, because the subject is empty (RFC 5280, 4.1.2.6)
        (x509.AuthorityKeyIdentifier(issuer, None, None), False),
    )


def _extensions(*values: tuple[x509.ExtensionType, bool]) -> _Extensions:
    return {value.oid: x509.Extension(value.oid, critical, value) for value, critical in values}


def _key_usage(purpose: str) -> x509.KeyUsage:
    return x509.KeyUsage(**(dict.fromkeys(_PURPOSES, False) | {purpose: True}))


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _is_swarm_name(text: str) -> bool:
    return 1 <= len(text) <= 64 and text.isascii() and text.isprintable() and text == text.strip()


# ------------------------------------------------------------------------------------------------------------- checking


@dataclass(frozen=True, slots=True)
class _Facts:
    """A certificate, parsed to the last field, so that nothing below can stumble over one."""

    certificate: x509.Certificate
    public: bytes
    subject: x509.Name
    issuer: x509.Name
    extensions: _Extensions
    not_before_s: float
    not_after_s: float

    @property
    def key_id(self) -> bytes:
        return peer_id_of(self.public)

    @property
    def authority(self) -> bytes:
        """The key id of whoever issued this, as the certificate has it. Raises PeerError."""
        key_id = self.extension(x509.AuthorityKeyIdentifier).key_identifier or b""
        if len(key_id) != PEER_ID_BYTES:
            raise PeerError("the certificate does not say which key signed it")
        return key_id

    def extension(self, kind: type[_Kind]) -> _Kind:
        """Return the extension of this kind. Raises PeerError if there is none."""
        found = self.extensions.get(kind.oid)
        if found is None or not isinstance(found.value, kind):
            raise PeerError(f"the certificate lacks an extension: {kind.__name__}")
        return found.value


def read_root(der: bytes, swarm: SwarmId) -> x509.Certificate:
    """Return the root certificate of `swarm` from bytes that anyone may have sent. Raises PeerError."""
    facts = _read(der)
    if facts.key_id != swarm:
        raise PeerError(f"this is a certificate of {show_swarm(facts.key_id)}, not the root of {show_swarm(swarm)}")
    if facts.extensions != _authority_extensions(facts.key_id, facts.key_id, path_length=1):
        raise PeerError("this is not the certificate of a root")
    _check_signature(facts, facts)
    swarm_name_of(facts.certificate)
    return facts.certificate


def member_of(leaf: bytes, swarm: SwarmId) -> Member:
    """Return who holds `leaf` (DER), a certificate that TLS has verified against the root of `swarm`. Raises PeerError.

    TLS checked signatures, dates and authorities. That the name belongs to the key it cannot know, so it is done here;
    without it an admitter could hand out the names of others.
    """
    return _member(_read(leaf), swarm)


def verify_member(chain: Sequence[bytes], root: x509.Certificate, now_s: float, grace_s: float = 0.0) -> Member:
    """Return who holds the first certificate of `chain` (DER, leaf first, without the root), checked without TLS.

    The leaf may have expired up to `grace_s` ago, its issuers not at all. Raises PeerError that says what is wrong.
    """
    if not 1 <= len(chain) <= MAX_CHAIN:
        raise PeerError(f"a chain has 1 to {MAX_CHAIN} certificates, this has {len(chain)}")
    anchor = _parsed(root)
    swarm = SwarmId(anchor.key_id)
    leaf, *admitters = map(_read, chain)
    member = _member(leaf, swarm)
    for admitter in admitters:
        if admitter.extensions != _authority_extensions(admitter.key_id, swarm, path_length=0):
            raise PeerError("the second certificate of the chain is not that of an admitter of this swarm")
        if admitter.subject != _name(show_peer(admitter.key_id)):
            raise PeerError("the admitter's certificate is named after another key")
    links = [leaf, *admitters, anchor]
    for below, above in itertools.pairwise(links):
        if below.authority != above.key_id:
            raise PeerError("the certificates of the chain do not follow from each other")
        _check_signature(below, above)
    for link in links:
        _check_dates(link, now_s, grace_s if link is leaf else 0.0)
    return replace(member, not_after_s=min(link.not_after_s for link in links))


def _member(leaf: _Facts, swarm: SwarmId) -> Member:
    role, authority = _role_of(leaf, swarm), leaf.authority
    if leaf.extensions != _leaf_extensions(leaf.key_id, swarm, role, authority):
        raise PeerError("this is not the certificate of a member")
    issuer = None if authority == swarm else PeerId(authority)
    if issuer is not None and leaf.issuer != _name(show_peer(issuer)):
        raise PeerError("the certificate names two issuers")
    return Member(PeerId(leaf.key_id), swarm, role, issuer, leaf.not_before_s, leaf.not_after_s)


def _role_of(leaf: _Facts, swarm: SwarmId) -> str:
    """Return the role among the alternative names; that nothing else is there, the caller finds by comparing."""
    names = leaf.extension(x509.SubjectAlternativeName)
    hosts = names.get_values_for_type(x509.DNSName)
    if not any(host.endswith(f".{show_swarm(swarm)}.mpd") for host in hosts):
        raise PeerError(f"the certificate is not for swarm {show_swarm(swarm)}")
    if hosts != [peer_name(leaf.key_id, swarm)]:
        raise PeerError("the certificate is named after another key than its own")
    roles = [uri.removeprefix("mpd:") for uri in names.get_values_for_type(x509.UniformResourceIdentifier)]
    if len(roles) != 1 or roles[0] not in ROLES:
        raise PeerError(f"the certificate gives no role that is known: one of {', '.join(ROLES)} expected")
    return roles[0]


def _read(der: bytes) -> _Facts:
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise PeerError(f"a certificate has at most {MAX_CERTIFICATE_BYTES} bytes, this has {len(der)}")
    try:
        certificate = x509.load_der_x509_certificate(der)
    except _UNREADABLE as error:
        raise PeerError(f"this is not a certificate: {error}") from error
    return _parsed(certificate)


def _parsed(certificate: x509.Certificate) -> _Facts:
    try:
        key = certificate.public_key()
        if not isinstance(key, Ed25519PublicKey):
            raise PeerError("the certificate's key is not an ed25519 key")
        return _Facts(
            certificate,
            key.public_bytes_raw(),
            certificate.subject,
            certificate.issuer,
            {extension.oid: extension for extension in certificate.extensions},
            certificate.not_valid_before_utc.timestamp(),
            certificate.not_valid_after_utc.timestamp(),
        )
    except _UNREADABLE as error:
        raise PeerError(f"the certificate cannot be read: {error}") from error


def _check_signature(below: _Facts, above: _Facts) -> None:
    try:
        below.certificate.verify_directly_issued_by(above.certificate)
    except (InvalidSignature, *_UNREADABLE) as error:
        raise PeerError("the certificate was not signed by whom it says") from error


def _check_dates(facts: _Facts, now_s: float, grace_s: float = 0.0) -> None:
    who = f"the certificate of {show_peer(facts.key_id)}"
    if now_s < facts.not_before_s:
        raise PeerError(f"{who} is not valid before {_date(facts.not_before_s)}: one of the two clocks is wrong")
    if now_s > facts.not_after_s + grace_s:
        raise PeerError(f"{who} expired on {_date(facts.not_after_s)}: it needs a new one")


# --------------------------------------------------------------------------------------------------------------- dates


def _moment(time_s: float) -> datetime:
    """Return `time_s` in X.509's resolution of a second. Raises LocalError for what no honest clock says."""
    if not 0 <= time_s < 1 << 34:
        raise LocalError(f"{time_s} is not a time, in seconds since 1970: is this machine's clock right?")
    return datetime.fromtimestamp(int(time_s), UTC)


def _date(time_s: float) -> str:
    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M} UTC"


def _own_id(key: Ed25519PrivateKey) -> bytes:
    return peer_id_of(key.public_key().public_bytes_raw())


# ------------------------------------------------------------------------------------------------------ the open swarm


def _published(purpose: bytes) -> bytes:
    """Return the 32 bytes that everyone derives for `purpose` (HKDF, RFC 5869, empty salt)."""
    return HKDF(SHA256(), 32, salt=None, info=purpose).derive(b"mpd open swarm 1")


@functools.cache
def open_root() -> tuple[Ed25519PrivateKey, x509.Certificate]:
    """Return the published key and root certificate of the open swarm, the same bytes on every machine."""
    key = Ed25519PrivateKey.from_private_bytes(_published(b"root key"))
    always = (datetime(2000, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))
    return key, _root(key, "open", always, serial=1)


OPEN_SWARM = swarm_id_of(open_root()[1])
OPEN_DATAGRAM_KEY = _published(b"datagram key")
