"""TLS 1.3 between daemons: both sides show a certificate, and nothing is said before both have passed.

Strategy: `ssl` verifies all that it can natively (chain to the swarm's root, dates, the name of whom we dialled); what
it leaves open is checked here, on both sides and before the first byte of ours: the version, ALPN (a mismatch does not
fail a handshake) and that the certificate names the key that it certifies (`Membership.check`). Sessions are never
resumed, so that none outlives a revocation. In TLS 1.3 the dialler learns at its first read only whether it was let in;
`explain` says in a sentence what any of these failures means to the person who waits for the link.
"""

import contextlib
import os
import ssl
from collections.abc import Callable, Sequence
from typing import Protocol

import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from mpd.errors import PeerError
from mpd.identity import Member, SwarmId, open_root, peer_name
from mpd.ids import PeerId

ALPN = "mpd/1"
ADMISSION_ALPN = "mpd-admission/1"

Tls = trio.SSLStream[trio.SocketStream]

# OpenSSL's numbers for why a chain does not hold (X509_V_ERR_...).
_NOT_YET_VALID, _EXPIRED, _NAME_MISMATCH = 9, 10, 62
_NO_CHAIN = {2, 18, 19, 20, 21}  # no issuer, self-signed, or not signed by whom it names
_WRONG_CLOCK = "or one of the two clocks is wrong"
_NOT_MPD = "what answers there is not an mpd daemon"
_CLOSED = "it closed the connection during the handshake: it may not be an mpd daemon, or it refuses this one"

# What the other side says about us before it hangs up, by the end of OpenSSL's name for the alert.
_ALERTS = {
    "UNKNOWN_CA": "it refused this machine's certificate, which is of another swarm: get an invite for its swarm",
    "CERTIFICATE_REQUIRED": "it talks to members of its swarm only: get an invite for that swarm",
    "CERTIFICATE_EXPIRED": f"it refused this machine's certificate: expired, {_WRONG_CLOCK}",
    "CERTIFICATE_REVOKED": "it refused this machine's certificate: revoked",
    "BAD_CERTIFICATE": f"it refused this machine's certificate: not valid yet, {_WRONG_CLOCK}",
    "NO_APPLICATION_PROTOCOL": _NOT_MPD,
    "PROTOCOL_VERSION": f"{_NOT_MPD}: it does not speak TLS 1.3",
}


class Membership(Protocol):
    """The swarm that this daemon is in, as far as links must know it."""

    @property
    def swarm_id(self) -> SwarmId:
        """The swarm."""

    @property
    def own(self) -> PeerId:
        """This daemon."""

    @property
    def news_seq(self) -> int:
        """The number of the revocation list that this daemon goes by."""

    def server_context(self) -> ssl.SSLContext:
        """Return what `server_context` makes of today's certificate."""

    def client_context(self, pinned: bool = True) -> ssl.SSLContext:
        """Return what `client_context` makes of today's certificate."""

    def check(self, leaf: bytes) -> Member:
        """Return whom `leaf` (DER, verified by TLS) names. Raises PeerError if its key is another, or it is revoked."""


class HandshakeFailed(PeerError):
    """No TLS connection came about; the message is for the person who wanted one."""


class Unwelcome(PeerError):
    """A member whom the swarm no longer admits. The connection `tls` still works, so that it can be told why."""

    def __init__(self, tls: Tls, reason: str) -> None:
        super().__init__(reason)
        self.tls = tls


# ------------------------------------------------------------------------------------------------------------ contexts


def server_context(key_pem: bytes, chain: Sequence[bytes], root: x509.Certificate) -> ssl.SSLContext:
    """Return the context with which members are let in. `chain` is DER, our leaf first, without the root."""
    return _context(ssl.PROTOCOL_TLS_SERVER, ALPN, (key_pem, chain), root)


def client_context(
    key_pem: bytes, chain: Sequence[bytes], root: x509.Certificate, *, pinned: bool = True
) -> ssl.SSLContext:
    """Return the context with which members are dialled; not `pinned`, any member of the swarm may answer."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, ALPN, (key_pem, chain), root)
    context.check_hostname = pinned
    return context


def admission_server_context(key_pem: bytes, chain: Sequence[bytes]) -> ssl.SSLContext:
    """Return the context for those who want to become members: a certificate of the open swarm proves their key."""
    return _context(ssl.PROTOCOL_TLS_SERVER, ADMISSION_ALPN, (key_pem, chain), open_root()[1])


def admission_client_context(key_pem: bytes, open_leaf: bytes, root: x509.Certificate | None) -> ssl.SSLContext:
    """Return the context for asking to be admitted to the swarm of `root`.

    Without a root nothing is verified, so that connection serves only to fetch one, which is known by its hash.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, ADMISSION_ALPN, (key_pem, [open_leaf]), root)
    if root is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _context(
    protocol: int, alpn: str, identity: tuple[bytes, Sequence[bytes]], root: x509.Certificate | None
) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.hostname_checks_common_name = False
    context.set_alpn_protocols([alpn])
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    if root is not None:
        context.load_verify_locations(cadata=root.public_bytes(Encoding.DER))
    _load_identity(context, *identity)
    return context


def _load_identity(context: ssl.SSLContext, key_pem: bytes, chain: Sequence[bytes]) -> None:
    """Give `context` our key: `ssl` reads keys from files only, so from one that exists in memory and has no name."""
    with os.fdopen(os.memfd_create("mpd identity"), "wb", buffering=0) as file:
        file.write(key_pem.rstrip() + b"\n" + "".join(map(ssl.DER_cert_to_PEM_cert, chain)).encode("ascii"))
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")


# ---------------------------------------------------------------------------------------------------------- handshakes


async def wrap_client(stream: trio.SocketStream, membership: Membership, peer: PeerId) -> tuple[Tls, Member]:
    """Speak TLS with `peer`, whom we dialled. Raises HandshakeFailed if anybody else answers."""
    name = peer_name(peer, membership.swarm_id)
    tls = await shake_hands(stream, membership.client_context(), alpn=ALPN, server_hostname=name)
    member = membership.check(leaf_of(tls))
    if member.peer != peer:
        raise HandshakeFailed(_explain_refusal(_NAME_MISMATCH, ""))
    return tls, member


async def wrap_server(stream: trio.SocketStream, membership: Membership) -> tuple[Tls, Member]:
    """Speak TLS with a member that dialled us. Raises HandshakeFailed, and Unwelcome if it is one no more."""
    tls = await shake_hands(stream, membership.server_context(), alpn=ALPN, server_side=True)
    try:
        return tls, membership.check(leaf_of(tls))
    except PeerError as error:
        raise Unwelcome(tls, str(error)) from error


async def shake_hands(
    stream: trio.SocketStream,
    context: ssl.SSLContext,
    *,
    alpn: str,
    server_side: bool = False,
    server_hostname: str | None = None,
) -> Tls:
    """Run the TLS handshake; check version and protocol. Raises HandshakeFailed; `stream` is the caller's to close."""
    tap = _Tap(context)
    tls = trio.SSLStream(stream, tap, server_side=server_side, server_hostname=server_hostname)  # type: ignore[arg-type]
    try:
        await tls.do_handshake()
    except (trio.BrokenResourceError, ssl.SSLError, OSError) as error:
        with contextlib.suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.send_all(tap.outgoing.read())  # the alert, so that the other side can tell its user why
        is_foreign = isinstance(error.__cause__, ssl.SSLCertVerificationError) and tap.alpn() != alpn
        raise HandshakeFailed(_NOT_MPD if is_foreign else explain(error)) from error
    if tls.version() != "TLSv1.3" or tls.selected_alpn_protocol() != alpn:
        raise HandshakeFailed(f"{_NOT_MPD}: it does not speak {alpn}")
    return tls


class _Tap:
    """Stands in for a context and keeps hold of what trio hides: the alert that explains a failure is never sent."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *, server_side: bool, server_hostname: str | None
    ) -> ssl.SSLObject:
        self.outgoing = outgoing
        wrapped = self._context.wrap_bio(incoming, outgoing, server_side, server_hostname)
        self.alpn: Callable[[], str | None] = wrapped.selected_alpn_protocol
        return wrapped


def leaf_of(tls: Tls) -> bytes:
    """Return the certificate of the other side (DER). Raises PeerError if it showed none."""
    leaf: bytes | None = tls.getpeercert(binary_form=True)
    if leaf is None:
        raise HandshakeFailed("it showed no certificate")
    return leaf


# -------------------------------------------------------------------------------------------------------- explanations


def explain(error: BaseException) -> str:
    """Return what `error`, from a TLS stream that has not yet received anything, means to a user."""
    cause = error if isinstance(error, OSError) or error.__cause__ is None else error.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _explain_refusal(cause.verify_code, cause.verify_message)
    if isinstance(cause, ssl.SSLEOFError | ssl.SSLSyscallError | ssl.SSLZeroReturnError | ConnectionError):
        return _CLOSED
    if not isinstance(cause, ssl.SSLError):
        return str(cause) or _CLOSED
    reason = cause.reason or ""
    if "ALERT_" not in reason:  # what came is no TLS at all, or a broken one
        return f"{_NOT_MPD}: it does not speak TLS"
    alert = reason.rpartition("ALERT_")[2]
    return _ALERTS.get(alert, f"it ended the handshake: {alert.lower().replace('_', ' ')}")


def _explain_refusal(verify_code: int, verify_message: str) -> str:
    """Say why we do not talk to whoever is there."""
    if verify_code == _NAME_MISMATCH:
        return "another daemon answers there than the one that was called"
    if verify_code == _EXPIRED:
        return f"the certificate of the daemon there has expired, {_WRONG_CLOCK}"
    if verify_code == _NOT_YET_VALID:
        return f"the certificate of the daemon there is not valid yet, {_WRONG_CLOCK}"
    if verify_code in _NO_CHAIN:
        return "that daemon belongs to another swarm: get an invite for it"
    return f"the certificate of the daemon there is not acceptable: {verify_message}"
