"""Certificates: what is issued passes, in `ssl` and in `verify_member` alike; whatever anybody bends is refused.

A forgery is a valid certificate that was bent in one place and signed again, by somebody who holds the key for it. Both
judges see the same forgeries; where `ssl` lets one pass because it cannot know better, `member_of` must not.
"""

import contextlib
import hashlib
import hmac
import os
import ssl
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import example, given
from hypothesis import strategies as st

from mpd.errors import LocalError, PeerError
from mpd.identity import (
    ADMITTER_LIFE_S,
    BACK_DATED_S,
    LEAF_LIFE_S,
    MAX_CERTIFICATE_BYTES,
    OPEN_DATAGRAM_KEY,
    OPEN_SWARM,
    ROLES,
    ROOT_LIFE_S,
    Member,
    SwarmId,
    issue_admitter,
    issue_leaf,
    member_of,
    new_root,
    open_root,
    peer_name,
    read_root,
    show_swarm,
    swarm_id_of,
    swarm_name_of,
    verify_member,
)
from mpd.ids import peer_id_of, show_peer

DAY_S = 86400.0
NOW_S = float(int(time.time()))  # `ssl` asks the machine's clock, and nobody can tell it another time
SERIAL = 2**63

Extension = tuple[x509.ExtensionType, bool]  # and whether it is critical


def make_key(seed: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)


def public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


ROOT_KEY, ADMITTER_KEY, ALICE, BOB, OTHER_ROOT_KEY, MALLORY = map(make_key, range(1, 7))
ROOT = new_root(ROOT_KEY, "lab", NOW_S - 100 * DAY_S, SERIAL)
SWARM = swarm_id_of(ROOT)
OTHER_ROOT = new_root(OTHER_ROOT_KEY, "lab", NOW_S, SERIAL)
OTHER_SWARM = swarm_id_of(OTHER_ROOT)
ADMITTER = issue_admitter(ROOT_KEY, ROOT, public(ADMITTER_KEY), NOW_S, SERIAL)
ADMITTER_ID = peer_id_of(public(ADMITTER_KEY))
ALICE_LEAF = issue_leaf(ADMITTER_KEY, ADMITTER, SWARM, public(ALICE), "member", NOW_S, SERIAL)
BOB_LEAF = issue_leaf(ROOT_KEY, ROOT, SWARM, public(BOB), "member", NOW_S, SERIAL)
ALICE_MEMBER, BOB_MEMBER = (
    Member(peer_id_of(public(key)), SWARM, "member", issuer, NOW_S - BACK_DATED_S, NOW_S + LEAF_LIFE_S)
    for key, issuer in ((ALICE, ADMITTER_ID), (BOB, None))
)
ALICE_NAME, BOB_NAME = (peer_name(peer_id_of(public(key)), SWARM) for key in (ALICE, BOB))


def common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def moment(time_s: float) -> datetime:
    return datetime.fromtimestamp(time_s, UTC)


def bend(
    certificate: x509.Certificate,
    key: Ed25519PrivateKey,
    *extensions: Extension,
    without: type[x509.ExtensionType] | None = None,
    issuer: x509.Name | None = None,
    subject: x509.Name | None = None,
    holder: Ed25519PrivateKey | ec.EllipticCurvePrivateKey | None = None,
    valid: tuple[float, float] | None = None,
) -> x509.Certificate:
    """Return `certificate` with these extensions in place of those of the same kinds, and so on, signed by `key`."""
    not_before = moment(valid[0]) if valid else certificate.not_valid_before_utc
    not_after = moment(valid[1]) if valid else certificate.not_valid_after_utc
    builder = (
        x509.CertificateBuilder()
        .serial_number(certificate.serial_number)
        .issuer_name(certificate.issuer if issuer is None else issuer)
        .subject_name(certificate.subject if subject is None else subject)
        .public_key(holder.public_key() if holder else certificate.public_key())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )
    kept = {each.oid: (each.value, each.critical) for each in certificate.extensions if type(each.value) is not without}
    for value, critical in (kept | {value.oid: (value, critical) for value, critical in extensions}).values():
        builder = builder.add_extension(value, critical)
    return builder.sign(key, None)


def bent(*extensions: Extension, **changes: Any) -> tuple[x509.Certificate, ...]:
    """Return Alice's chain with her certificate bent by the admitter."""
    return bend(ALICE_LEAF, ADMITTER_KEY, *extensions, **changes), ADMITTER


def bent_above(*extensions: Extension, **changes: Any) -> tuple[x509.Certificate, ...]:
    """Return Alice's chain with the admitter's certificate bent by the root."""
    return ALICE_LEAF, bend(ADMITTER, ROOT_KEY, *extensions, **changes)


def names(*hosts: str, uris: tuple[str, ...] = ("mpd:member",), mail: tuple[str, ...] = ()) -> Extension:
    general = [*map(x509.DNSName, hosts), *map(x509.UniformResourceIdentifier, uris), *map(x509.RFC822Name, mail)]
    return x509.SubjectAlternativeName(general), True


def signed_by(key: Ed25519PrivateKey) -> Extension:
    return x509.AuthorityKeyIdentifier(peer_id_of(public(key)), None, None), False


def constraints(ca: bool, path_length: int | None = None) -> Extension:
    return x509.BasicConstraints(ca=ca, path_length=path_length), True


def usage(*purposes: x509.ObjectIdentifier) -> Extension:
    return x509.ExtendedKeyUsage(purposes), False


# ------------------------------------------------------------------------------------------------------------ forgeries


class Forgery(NamedTuple):
    chain: tuple[x509.Certificate, ...]
    ssl_says: str | None  # None: it lets this pass
    we_say: str


def admitted_by_a_member() -> tuple[x509.Certificate, ...]:
    issuer = bend(BOB_LEAF, ROOT_KEY, subject=common_name("bob"))
    return bend(ALICE_LEAF, BOB, signed_by(BOB), issuer=issuer.subject), issuer


def admitted_by_whom_an_admitter_appointed() -> tuple[x509.Certificate, ...]:
    mallory = peer_id_of(public(MALLORY))
    own_key_id = x509.SubjectKeyIdentifier(mallory), False
    appointed = bend(
        ADMITTER,
        ADMITTER_KEY,
        signed_by(ADMITTER_KEY),
        own_key_id,
        issuer=ADMITTER.subject,
        subject=common_name(show_peer(mallory)),
        holder=MALLORY,
    )
    return bend(ALICE_LEAF, MALLORY, signed_by(MALLORY), issuer=appointed.subject), appointed, ADMITTER


SELF_SIGNED = bend(ALICE_LEAF, ALICE, signed_by(ALICE), issuer=common_name("alice"), subject=common_name("alice"))
OF_ANOTHER_SWARM = issue_leaf(OTHER_ROOT_KEY, OTHER_ROOT, OTHER_SWARM, public(ALICE), "member", NOW_S, SERIAL)
OF_THE_OPEN_SWARM = issue_leaf(*open_root(), OPEN_SWARM, public(ALICE), "member", NOW_S, SERIAL)
OLD_ADMITTER = issue_admitter(ROOT_KEY, ROOT, public(ADMITTER_KEY), NOW_S - 31 * DAY_S, SERIAL)
EVERY_PURPOSE = (
    ExtendedKeyUsageOID.CLIENT_AUTH,
    ExtendedKeyUsageOID.SERVER_AUTH,
    ExtendedKeyUsageOID.CODE_SIGNING,
)
UNKNOWN_EXTENSION = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"\0"), False

_NO_ISSUER = "unable to get local issuer certificate"
_OTHER_SHAPE = "this is not the certificate of a member"
_OTHER_KEY = "named after another key than its own"
_NO_ROLE = "no role that is known: one of member, observer, admitter expected"

FORGERIES = {
    "self-signed": Forgery((SELF_SIGNED,), "self-signed certificate", "names two issuers"),
    "of another swarm": Forgery((OF_ANOTHER_SWARM,), _NO_ISSUER, "not for swarm"),
    "of the open swarm": Forgery((OF_THE_OPEN_SWARM,), _NO_ISSUER, "not for swarm"),
    "of another root under our names": Forgery(
        (bend(BOB_LEAF, OTHER_ROOT_KEY, names(ALICE_NAME), holder=ALICE),),
        "certificate signature failure",
        "not signed by whom it says",
    ),
    "signed by a stranger": Forgery(
        (bend(ALICE_LEAF, MALLORY), ADMITTER), "certificate signature failure", "not signed by whom it says"
    ),
    "admitter signed by a stranger": Forgery(
        (ALICE_LEAF, bend(ADMITTER, MALLORY)), "certificate signature failure", "not signed by whom it says"
    ),
    "expired": Forgery(
        bent(valid=(NOW_S - DAY_S, NOW_S - 60)),
        "certificate has expired",
        f"{show_peer(peer_id_of(public(ALICE)))} expired on [-0-9: ]+ UTC: it needs a new one",
    ),
    "not yet valid": Forgery(
        bent(valid=(NOW_S + DAY_S, NOW_S + 2 * DAY_S)),
        "certificate is not yet valid",
        "is not valid before [-0-9: ]+ UTC: one of the two clocks is wrong",
    ),
    "admitter expired": Forgery(
        (ALICE_LEAF, OLD_ADMITTER), "certificate has expired", f"{show_peer(ADMITTER_ID)} expired on"
    ),
    "admitter missing": Forgery((ALICE_LEAF,), _NO_ISSUER, "do not follow from each other"),
    "admitted by a member": Forgery(admitted_by_a_member(), "invalid CA certificate", "names two issuers"),
    "admitted by whom an admitter appointed": Forgery(
        admitted_by_whom_an_admitter_appointed(), "path length constraint exceeded", "1 to 2 certificates, this has 3"
    ),
    "claims to come from the root": Forgery(bent(signed_by(ROOT_KEY)), _NO_ISSUER, "do not follow from each other"),
    "admitter named after another": Forgery(
        bent_above(subject=common_name(show_peer(bytes(20)))),
        _NO_ISSUER,
        "admitter's certificate is named after another",
    ),
    "admitter without authority": Forgery(
        bent_above(constraints(ca=False)), "invalid CA certificate", "not that of an admitter of this swarm"
    ),
    "an admitter's certificate as a leaf": Forgery(
        (ADMITTER,), "unsuitable certificate purpose", "lacks an extension: SubjectAlternativeName"
    ),
    "a leaf with authority": Forgery(
        bent(constraints(ca=True, path_length=0)), "Path length given without key usage keyCertSign", _OTHER_SHAPE
    ),
    "a name where none is read": Forgery(
        bent(without=x509.SubjectAlternativeName, subject=common_name(ALICE_NAME[:64])),
        "Hostname mismatch",
        "lacks an extension: SubjectAlternativeName",
    ),
    "no authority key id": Forgery(
        bent(without=x509.AuthorityKeyIdentifier),
        "Missing Authority Key Identifier",
        "lacks an extension: AuthorityKeyIdentifier",
    ),
    "authority key id cut short": Forgery(
        bent((x509.AuthorityKeyIdentifier(ADMITTER_ID[:19], None, None), False)),
        _NO_ISSUER,
        "does not say which key signed it",
    ),
    "for clients only": Forgery(
        bent(usage(ExtendedKeyUsageOID.CLIENT_AUTH)), "unsuitable certificate purpose", _OTHER_SHAPE
    ),
    "for code too": Forgery(bent(usage(*EVERY_PURPOSE)), None, _OTHER_SHAPE),
    "no constraints": Forgery(bent(without=x509.BasicConstraints), None, _OTHER_SHAPE),
    "unknown extension": Forgery(bent(UNKNOWN_EXTENSION), None, _OTHER_SHAPE),
    "named after another": Forgery(bent(holder=MALLORY), None, _OTHER_KEY),
    "a wildcard": Forgery(bent(names(f"*.{show_swarm(SWARM)}.mpd")), None, _OTHER_KEY),
    "two names": Forgery(bent(names(ALICE_NAME, BOB_NAME)), None, _OTHER_KEY),
    "a name elsewhere too": Forgery(bent(names(ALICE_NAME, "www.example")), None, _OTHER_KEY),
    "an address too": Forgery(bent(names(ALICE_NAME, mail=("a@example",))), None, _OTHER_SHAPE),
    "capital letters": Forgery(bent(names(ALICE_NAME.upper())), None, "not for swarm"),
    "no role": Forgery(bent(names(ALICE_NAME, uris=())), None, _NO_ROLE),
    "two roles": Forgery(bent(names(ALICE_NAME, uris=("mpd:member", "mpd:admitter"))), None, _NO_ROLE),
    "empty role": Forgery(bent(names(ALICE_NAME, uris=("mpd:",))), None, _NO_ROLE),
    "unknown role": Forgery(bent(names(ALICE_NAME, uris=("mpd:root",))), None, _NO_ROLE),
    "a role of something else": Forgery(bent(names(ALICE_NAME, uris=("member",))), None, _OTHER_SHAPE),
}


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_chain_is_refused_with_the_reason(forgery: Forgery) -> None:
    with pytest.raises(PeerError, match=forgery.we_say):
        verify_member([der(certificate) for certificate in forgery.chain], ROOT, NOW_S)


def test_an_admitter_cannot_be_given_a_longer_path_even_by_the_root() -> None:
    chain = bent_above(constraints(ca=True, path_length=1))
    with pytest.raises(PeerError, match="not that of an admitter of this swarm"):
        verify_member([der(certificate) for certificate in chain], ROOT, NOW_S)


def test_an_admitter_that_did_not_sign_the_leaf_is_no_part_of_the_chain() -> None:
    with pytest.raises(PeerError, match="do not follow from each other"):
        verify_member([der(BOB_LEAF), der(ADMITTER)], ROOT, NOW_S)


def test_only_ed25519_keys_are_peers() -> None:
    leaf, _ = bent(holder=ec.derive_private_key(7, ec.SECP256R1()))
    with pytest.raises(PeerError, match="not an ed25519 key"):
        member_of(der(leaf), SWARM)


# ------------------------------------------------------------------------------------------------------------------ TLS


def context_of(
    protocol: int, identity: tuple[Ed25519PrivateKey, Sequence[x509.Certificate]] | None, root: x509.Certificate
) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.hostname_checks_common_name = False
    context.load_verify_locations(cadata=der(root))
    if identity is not None:
        key, chain = identity
        with os.fdopen(os.memfd_create("identity"), "wb", buffering=0) as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            file.write(b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain))
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    return context


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> tuple[bytes, bytes]:
    """Run a TLS handshake and return the leaves of client and server as the other side saw them.

    Raises what the first side raises that refuses the other.
    """
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    dialler = client.wrap_bio(to_client, to_server, server_hostname=name)
    acceptor = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (dialler, acceptor) * 2:
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    leaves = acceptor.getpeercert(binary_form=True), dialler.getpeercert(binary_form=True)
    assert dialler.version() == acceptor.version() == "TLSv1.3"
    assert leaves[0] is not None
    assert leaves[1] is not None
    return leaves[0], leaves[1]


def dial_alice(
    chain: Sequence[x509.Certificate], key: Ed25519PrivateKey = ALICE, name: str = ALICE_NAME
) -> tuple[bytes, bytes]:
    """Let Bob dial `name` and be answered by the holder of `key`, who shows `chain`."""
    client = context_of(ssl.PROTOCOL_TLS_CLIENT, (BOB, [BOB_LEAF]), ROOT)
    return shake_hands(client, context_of(ssl.PROTOCOL_TLS_SERVER, (key, chain), ROOT), name)


def answer_alice(identity: tuple[Ed25519PrivateKey, Sequence[x509.Certificate]] | None) -> tuple[bytes, bytes]:
    """Let Alice, or somebody who has no such certificate, dial Bob."""
    server = context_of(ssl.PROTOCOL_TLS_SERVER, (BOB, [BOB_LEAF]), ROOT)
    return shake_hands(context_of(ssl.PROTOCOL_TLS_CLIENT, identity, ROOT), server, BOB_NAME)


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES.keys())
def test_ssl_refuses_a_forged_server_or_member_of_does(forgery: Forgery) -> None:
    key = MALLORY if forgery.chain[0].public_key() == MALLORY.public_key() else ALICE
    key = ADMITTER_KEY if forgery.chain[0] is ADMITTER else key
    if forgery.ssl_says is None:
        _, leaf = dial_alice(forgery.chain, key)
        with pytest.raises(PeerError, match=forgery.we_say):
            member_of(leaf, SWARM)
    else:
        with pytest.raises(ssl.SSLCertVerificationError, match=forgery.ssl_says):
            dial_alice(forgery.chain, key)


@pytest.mark.parametrize(
    ("what", "ssl_says"),
    [
        ("self-signed", "self-signed certificate"),
        ("of another swarm", _NO_ISSUER),
        ("of the open swarm", _NO_ISSUER),
        ("expired", "certificate has expired"),
        ("not yet valid", "certificate is not yet valid"),
        ("admitter expired", "certificate has expired"),
        ("admitted by whom an admitter appointed", "path length constraint exceeded"),
        ("claims to come from the root", _NO_ISSUER),
    ],
)
def test_ssl_refuses_a_forged_client_too(what: str, ssl_says: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=ssl_says):
        answer_alice((ALICE, FORGERIES[what].chain))


def test_ssl_refuses_a_client_without_a_certificate() -> None:
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        answer_alice(None)


def test_ssl_refuses_another_peer_than_the_one_that_was_dialled() -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        dial_alice([ALICE_LEAF, ADMITTER], name=peer_name(peer_id_of(public(MALLORY)), SWARM))


def test_members_meet_whoever_admitted_them() -> None:
    bob, alice = dial_alice([ALICE_LEAF, ADMITTER])
    assert member_of(alice, SWARM) == ALICE_MEMBER
    assert member_of(bob, SWARM) == BOB_MEMBER
    alice, bob = answer_alice((ALICE, [ALICE_LEAF, ADMITTER]))
    assert member_of(alice, SWARM) == ALICE_MEMBER
    assert member_of(bob, SWARM) == BOB_MEMBER


def test_members_of_an_old_and_of_a_renewed_admitter_meet() -> None:
    renewed = issue_admitter(ROOT_KEY, ROOT, public(ADMITTER_KEY), NOW_S + 60, SERIAL + 1)
    _, alice = dial_alice([ALICE_LEAF, renewed])
    assert member_of(alice, SWARM) == ALICE_MEMBER


def test_in_the_open_swarm_everyone_is_his_own_issuer() -> None:
    root_key, root = open_root()
    alice, bob = (
        (key, [issue_leaf(root_key, root, OPEN_SWARM, public(key), "member", NOW_S, SERIAL)]) for key in (ALICE, BOB)
    )
    client = context_of(ssl.PROTOCOL_TLS_CLIENT, alice, root)
    server = context_of(ssl.PROTOCOL_TLS_SERVER, bob, root)
    seen = shake_hands(client, server, peer_name(peer_id_of(public(BOB)), OPEN_SWARM))
    assert [member_of(leaf, OPEN_SWARM).peer for leaf in seen] == [peer_id_of(public(key)) for key in (ALICE, BOB)]
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(client, server, peer_name(peer_id_of(public(MALLORY)), OPEN_SWARM))


def test_the_open_swarm_refuses_private_members() -> None:
    client = context_of(ssl.PROTOCOL_TLS_CLIENT, (BOB, [BOB_LEAF]), open_root()[1])
    server = context_of(ssl.PROTOCOL_TLS_SERVER, (ALICE, [ALICE_LEAF, ADMITTER]), ROOT)
    with pytest.raises(ssl.SSLCertVerificationError, match=_NO_ISSUER):
        shake_hands(client, server, ALICE_NAME)


# -------------------------------------------------------------------------------------------------------------- members


def test_a_chain_proves_who_holds_it() -> None:
    assert verify_member([der(ALICE_LEAF), der(ADMITTER)], ROOT, NOW_S) == ALICE_MEMBER
    assert verify_member([der(BOB_LEAF)], ROOT, NOW_S) == BOB_MEMBER
    assert ALICE_MEMBER.issuer == ADMITTER_ID
    assert BOB_MEMBER.issuer is None


@pytest.mark.parametrize("role", ROLES)
def test_every_role_is_proven(role: str) -> None:
    leaf = issue_leaf(ADMITTER_KEY, ADMITTER, SWARM, public(ALICE), role, NOW_S, SERIAL)
    assert verify_member([der(leaf), der(ADMITTER)], ROOT, NOW_S).role == role
    assert member_of(der(leaf), SWARM).role == role


def test_dates_hold_to_the_second() -> None:
    chain = [der(ALICE_LEAF), der(ADMITTER)]
    first_s, last_s = NOW_S - BACK_DATED_S, NOW_S + LEAF_LIFE_S
    for at_s in (first_s, last_s):
        assert verify_member(chain, ROOT, at_s) == ALICE_MEMBER
    for at_s in (first_s - 0.001, last_s + 0.001):
        with pytest.raises(PeerError, match=r"is not valid before|expired on"):
            verify_member(chain, ROOT, at_s)


def test_grace_is_for_the_leaf_alone() -> None:
    chain = [der(ALICE_LEAF), der(ADMITTER)]
    last_s = NOW_S + LEAF_LIFE_S
    assert verify_member(chain, ROOT, last_s + DAY_S, grace_s=DAY_S) == ALICE_MEMBER
    with pytest.raises(PeerError, match=f"{show_peer(ALICE_MEMBER.peer)} expired"):
        verify_member(chain, ROOT, last_s + DAY_S + 1, grace_s=DAY_S)
    with pytest.raises(PeerError, match=f"{show_peer(ADMITTER_ID)} expired"):
        verify_member(chain, ROOT, NOW_S + ADMITTER_LIFE_S + 1, grace_s=365 * DAY_S)
    with pytest.raises(PeerError, match=f"{show_swarm(SWARM)} expired"):
        verify_member([der(BOB_LEAF)], ROOT, NOW_S + ROOT_LIFE_S, grace_s=2 * ROOT_LIFE_S)


def test_nobody_is_a_member_for_longer_than_his_admitter() -> None:
    longer = bend(ALICE_LEAF, ADMITTER_KEY, valid=(NOW_S, NOW_S + 2 * ADMITTER_LIFE_S))
    member = verify_member([der(longer), der(ADMITTER)], ROOT, NOW_S)
    assert member.not_after_s == NOW_S + ADMITTER_LIFE_S


@pytest.mark.parametrize("n_certificates", [0, 3, 1000])
def test_a_chain_of_another_length_is_not_even_read(n_certificates: int) -> None:
    with pytest.raises(PeerError, match=f"1 to 2 certificates, this has {n_certificates}"):
        verify_member([b"?"] * n_certificates, ROOT, NOW_S)


# -------------------------------------------------------------------------------------------------------------- issuing


def test_key_ids_are_peer_and_swarm_ids() -> None:
    def key_ids(certificate: x509.Certificate) -> tuple[bytes | None, bytes | None]:
        issuer = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        try:
            return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest, issuer
        except x509.ExtensionNotFound:
            return None, issuer

    assert key_ids(ROOT) == (SWARM, SWARM)
    assert key_ids(ADMITTER) == (ADMITTER_ID, SWARM)
    assert key_ids(ALICE_LEAF) == (None, ADMITTER_ID)
    assert show_swarm(SWARM) == show_peer(peer_id_of(public(ROOT_KEY)))


def test_a_name_fits_into_dns_labels_and_says_peer_and_swarm() -> None:
    assert f"{show_peer(ALICE_MEMBER.peer)}.{show_swarm(SWARM)}.mpd" == ALICE_NAME
    assert [len(label) for label in ALICE_NAME.split(".")] == [32, 32, 3]
    assert show_swarm(bytes(20)) == "a" * 32


def test_certificates_are_small() -> None:
    root = new_root(ROOT_KEY, "x" * 64, NOW_S, SERIAL)
    longest = issue_leaf(ROOT_KEY, root, SWARM, public(ALICE), "admitter", NOW_S, SERIAL)
    assert len(der(ALICE_LEAF)) < 430
    assert max(len(der(certificate)) for certificate in (longest, root, ADMITTER)) < 470


def test_lives_are_as_long_as_promised() -> None:
    def life_s(certificate: x509.Certificate) -> tuple[float, float]:
        return certificate.not_valid_before_utc.timestamp() - NOW_S, certificate.not_valid_after_utc.timestamp() - NOW_S

    assert life_s(ALICE_LEAF) == (-BACK_DATED_S, 7 * DAY_S)
    assert life_s(ADMITTER) == (-BACK_DATED_S, 30 * DAY_S)
    assert life_s(OTHER_ROOT) == (-BACK_DATED_S, 20 * 365.25 * DAY_S)
    assert life_s(issue_leaf(ROOT_KEY, ROOT, SWARM, public(BOB), "member", NOW_S, SERIAL, life_s=60)) == (
        -BACK_DATED_S,
        60,
    )


def test_a_leaf_does_not_outlive_its_issuer_nor_an_admitter_the_root() -> None:
    late_s = NOW_S + ADMITTER_LIFE_S - DAY_S
    leaf = issue_leaf(ADMITTER_KEY, ADMITTER, SWARM, public(ALICE), "member", late_s, SERIAL)
    assert leaf.not_valid_after_utc == ADMITTER.not_valid_after_utc
    late_s = ROOT.not_valid_after_utc.timestamp() - DAY_S
    assert (
        issue_admitter(ROOT_KEY, ROOT, public(ADMITTER_KEY), late_s, 1).not_valid_after_utc == ROOT.not_valid_after_utc
    )


def test_the_same_arguments_give_the_same_bytes() -> None:
    assert der(new_root(ROOT_KEY, "lab", NOW_S - 100 * DAY_S, SERIAL)) == der(ROOT)
    assert der(issue_leaf(ROOT_KEY, ROOT, SWARM, public(BOB), "member", NOW_S, SERIAL)) == der(BOB_LEAF)
    assert der(issue_leaf(ROOT_KEY, ROOT, SWARM, public(BOB), "member", NOW_S, SERIAL + 1)) != der(BOB_LEAF)


@pytest.mark.parametrize("name", ["a", "x" * 64, "the lab's swarm (2)", "~"])
def test_a_swarm_has_the_name_that_it_was_given(name: str) -> None:
    assert swarm_name_of(new_root(ROOT_KEY, name, NOW_S, SERIAL)) == name


@pytest.mark.parametrize(
    "name", ["", " ", " a", "a ", "x" * 65, "a\nb", "a\x1b[2J", "a\0", "h\u00e4", "\u202e", "a\x7f"]
)
def test_a_name_that_cannot_be_shown_is_refused(name: str) -> None:
    with pytest.raises(LocalError, match="cannot be the name of a swarm: 1 to 64 printable ASCII characters expected"):
        new_root(ROOT_KEY, name, NOW_S, SERIAL)


@pytest.mark.parametrize("now_s", [0.0, float("nan"), float("inf"), -1e300, 2.0**35])
def test_a_time_that_no_certificate_can_have_is_refused(now_s: float) -> None:
    with pytest.raises(LocalError, match="is not a time"):
        new_root(ROOT_KEY, "lab", now_s, SERIAL)


@pytest.mark.parametrize("serial", [0, -1, 1 << 159])
def test_a_number_that_no_certificate_can_have_is_refused(serial: int) -> None:
    with pytest.raises(LocalError, match="at most 159 bits"):
        new_root(ROOT_KEY, "lab", NOW_S, serial)


@pytest.mark.parametrize("n_bytes", [0, 31, 33])
def test_a_key_has_32_bytes(n_bytes: int) -> None:
    with pytest.raises(LocalError, match=f"32 bytes, this has {n_bytes}"):
        issue_admitter(ROOT_KEY, ROOT, bytes(n_bytes), NOW_S, SERIAL)
    with pytest.raises(LocalError, match=f"32 bytes, this has {n_bytes}"):
        issue_leaf(ROOT_KEY, ROOT, SWARM, bytes(n_bytes), "member", NOW_S, SERIAL)


def test_only_the_root_makes_admitters() -> None:
    with pytest.raises(LocalError, match="only the root"):
        issue_admitter(ADMITTER_KEY, ADMITTER, public(ALICE), NOW_S, SERIAL)


@pytest.mark.parametrize(
    ("key", "issuer", "why"),
    [
        (MALLORY, ADMITTER, "not the key of the issuer's certificate"),
        (ALICE, ALICE_LEAF, "only a root or an admitter"),
        (ADMITTER_KEY, OLD_ADMITTER, "expired on"),
        (ADMITTER_KEY, bend(ADMITTER, ROOT_KEY, valid=(NOW_S + 1, NOW_S + 2)), "not valid before"),
        (ADMITTER_KEY, bend(ADMITTER, ROOT_KEY, without=x509.AuthorityKeyIdentifier), "AuthorityKeyIdentifier"),
    ],
)
def test_who_cannot_issue_is_told_why(key: Ed25519PrivateKey, issuer: x509.Certificate, why: str) -> None:
    with pytest.raises(LocalError, match=why):
        issue_leaf(key, issuer, SWARM, public(BOB), "member", NOW_S, SERIAL)


@pytest.mark.parametrize(
    ("swarm", "role", "life_s", "why"),
    [
        (OTHER_SWARM, "member", 60.0, "belongs to another swarm than"),
        (SWARM, "root", 60.0, "'root' is not a role: one of member, observer, admitter expected"),
        (SWARM, "member", 0.0, "cannot be valid for 0.0 s"),
        (SWARM, "member", float("nan"), "cannot be valid for nan s"),
        (SWARM, "member", float("inf"), "inf is not a time"),
    ],
)
def test_a_leaf_that_nobody_could_use_is_not_issued(swarm: SwarmId, role: str, life_s: float, why: str) -> None:
    with pytest.raises(LocalError, match=why):
        issue_leaf(ADMITTER_KEY, ADMITTER, swarm, public(BOB), role, NOW_S, SERIAL, life_s)


# -------------------------------------------------------------------------------------------- roots, and the open swarm


def test_a_root_is_known_by_its_hash() -> None:
    assert read_root(der(ROOT), SWARM) == ROOT
    assert read_root(der(open_root()[1]), OPEN_SWARM) == open_root()[1]


@pytest.mark.parametrize(
    ("certificate", "why"),
    [
        (OTHER_ROOT, "not the root of"),
        (ADMITTER, "not the root of"),
        (bend(ROOT, MALLORY, valid=(NOW_S - 1, NOW_S + 1e9)), "not signed by whom it says"),
        (bend(ROOT, MALLORY, subject=common_name("bank")), "not signed by whom it says"),
        (bend(ROOT, ROOT_KEY, constraints(ca=True, path_length=2)), "not the certificate of a root"),
        (bend(BOB_LEAF, ROOT_KEY, holder=ROOT_KEY), "not the certificate of a root"),
        (bend(ROOT, ROOT_KEY, issuer=common_name("\x1b"), subject=common_name("\x1b")), "no name that can be shown"),
        (bend(ROOT, ROOT_KEY, issuer=x509.Name([]), subject=x509.Name([])), "no name that can be shown"),
    ],
)
def test_a_root_that_is_none_is_refused(certificate: x509.Certificate, why: str) -> None:
    with pytest.raises(PeerError, match=why):
        read_root(der(certificate), SWARM)


def hkdf(secret: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256 and an empty salt, for one block."""
    extracted = hmac.digest(bytes(32), secret, hashlib.sha256)
    return hmac.digest(extracted, info + b"\1", hashlib.sha256)


def test_the_open_swarm_is_the_same_everywhere() -> None:
    key, root = open_root()
    assert key.private_bytes_raw() == hkdf(b"mpd open swarm 1", b"root key")
    assert hkdf(b"mpd open swarm 1", b"datagram key") == OPEN_DATAGRAM_KEY
    assert swarm_id_of(root) == OPEN_SWARM
    assert show_swarm(OPEN_SWARM) == "s3favr2gc52mfv4jbleu27gnpfrbiu5o"
    assert hashlib.sha256(der(root)).hexdigest() == "159dc02e0e7f1b40ffe43ca89a987606cf885653486117151d6d0ab2ca993931"
    assert swarm_name_of(root) == "open"


def test_the_open_swarm_never_expires() -> None:
    for at_s in (1e9, 2e11):  # years 2001 and 8307
        leaf = bend(OF_THE_OPEN_SWARM, open_root()[0], valid=(at_s, at_s + 1))
        assert verify_member([der(leaf)], open_root()[1], at_s).peer == ALICE_MEMBER.peer


# -------------------------------------------------------------------------------------------------------- hostile bytes


def refusal_of(read: Callable[[], object]) -> str:
    """Return why the bytes were refused, or nothing if they were not; any other error passes through."""
    try:
        read()
    except PeerError as error:
        return str(error)
    return ""


@st.composite
def gone_wrong(draw: st.DrawFn, data: bytes, keeps_length: bool = False) -> bytes:
    """Return `data` after an accident: bytes changed, cut out, or put in."""
    wrong = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        new = draw(st.binary(max_size=4))
        n_gone = len(new) if keeps_length else draw(st.integers(0, 4))
        wrong[start : start + n_gone] = new
    return bytes(wrong[: len(data)] if keeps_length else wrong)


@given(st.binary(max_size=600))
@example(b"")
@example(bytes(MAX_CERTIFICATE_BYTES + 1))
@example(b"\x30\x84\xff\xff\xff\xff")
def test_any_bytes_are_a_peers_mistake(data: bytes) -> None:
    assert refusal_of(lambda: member_of(data, SWARM))
    assert refusal_of(lambda: read_root(data, SWARM))
    assert refusal_of(lambda: verify_member([data, data], ROOT, NOW_S))


def test_a_certificate_beyond_all_measure_is_not_even_read() -> None:
    with pytest.raises(PeerError, match=f"at most {MAX_CERTIFICATE_BYTES} bytes, this has 1000000"):
        member_of(bytes(1_000_000), SWARM)


@given(gone_wrong(der(ALICE_LEAF)), gone_wrong(der(ADMITTER)), gone_wrong(der(ROOT)))
def test_no_altered_certificate_is_accepted(leaf: bytes, admitter: bytes, root: bytes) -> None:
    for wrong, right, read in (
        (leaf, ALICE_LEAF, lambda: verify_member([leaf, der(ADMITTER)], ROOT, NOW_S)),
        (admitter, ADMITTER, lambda: verify_member([der(ALICE_LEAF), admitter], ROOT, NOW_S)),
        (root, ROOT, lambda: read_root(root, SWARM)),
    ):
        assert refusal_of(read) or wrong == der(right)


def signed_again(wrong: bytes, certificate: x509.Certificate, key: Ed25519PrivateKey) -> bytes:
    """Return the certificate whose signed part is `wrong`, of the same length as before."""
    signed = der(certificate).replace(certificate.tbs_certificate_bytes, wrong)
    return signed.replace(certificate.signature, key.sign(wrong))


@given(gone_wrong(ALICE_LEAF.tbs_certificate_bytes, keeps_length=True))
def test_whatever_an_admitter_signs_proves_no_more_than_its_key(wrong: bytes) -> None:
    leaf = signed_again(wrong, ALICE_LEAF, ADMITTER_KEY)
    try:
        member = verify_member([leaf, der(ADMITTER)], ROOT, NOW_S)
    except PeerError:
        return
    certificate = x509.load_der_x509_certificate(leaf)
    key = certificate.public_key()
    assert isinstance(key, Ed25519PublicKey)
    assert member.peer == peer_id_of(key.public_bytes_raw())
    assert (member.swarm, member.issuer) == (SWARM, ADMITTER_ID)
    assert member.not_after_s <= NOW_S + ADMITTER_LIFE_S


@pytest.mark.parametrize("year", [b"0000", b"0001", b"1949", b"2049", b"9999", b"xxxx"])
def test_any_date_can_be_judged(year: bytes) -> None:
    root_key, root = open_root()
    leaf = bend(OF_THE_OPEN_SWARM, root_key, valid=(NOW_S, 2600000000))  # 22 May 2052, in the form with four digits
    wrong = leaf.tbs_certificate_bytes.replace(b"20520522", year + b"0522")
    refusal = refusal_of(lambda: verify_member([signed_again(wrong, leaf, root_key)], root, NOW_S))
    assert bool(refusal) == (year not in (b"2049", b"9999"))
