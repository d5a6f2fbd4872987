"""What is said at a swarm's door: by a peer that wants in or wants to stay, and by the admitter that decides.

The admitter speaks first and shows the swarm's root, which the peer checks against what it trusts. Then the peer asks
once and is answered once. Nothing else is ever understood here: most of those who ask are not members.
"""

from dataclasses import dataclass, field
from typing import Self

from mpd.errors import LocalError, PeerError
from mpd.identity import MAX_CERTIFICATE_BYTES, MAX_CHAIN
from mpd.invites import MAX_TOKEN_CHARS, SignedInvite, parse_token
from mpd.revocations import MAX_BLOB_BYTES
from mpd.vocabulary import Vocabulary

DATAGRAM_KEY_BYTES = 32
MAX_DATAGRAM_KEYS = 2  # the current one, and the one before while it is still accepted
MAX_REASON_CHARS = 300


@dataclass(frozen=True, slots=True)
class Card:
    """From the admitter: this is my swarm's root certificate (DER)."""

    root: bytes

    def __post_init__(self) -> None:
        _require_certificates((self.root,))


@dataclass(frozen=True, slots=True)
class Apply:
    """Let me in: I hold this invite, and the key that TLS has seen."""

    token: str = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.token) > MAX_TOKEN_CHARS:
            raise ValueError(f"an invite has at most {MAX_TOKEN_CHARS} characters")

    def invite(self) -> SignedInvite:
        """Return the invite that the peer has sent. Raises PeerError."""
        try:
            return parse_token(self.token)
        except LocalError as error:
            raise PeerError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Renew:
    """Let me stay: this is my chain (DER, leaf first), and TLS has seen its key.

    With `wants_admitter`, renew my admitter's certificate too; only a root can.
    """

    chain: tuple[bytes, ...]
    wants_admitter: bool = False

    def __post_init__(self) -> None:
        _require_chain(self.chain)


@dataclass(frozen=True, slots=True)
class Admitted:
    """You are in: your chain (DER, leaf first), the datagram keys (the first one sends), and the revocation list.

    `news` is empty if there is none yet. `admitter` is your own admitter's certificate, if you get one.
    """

    chain: tuple[bytes, ...]
    datagram_keys: tuple[bytes, ...] = field(repr=False)
    news: bytes = b""
    admitter: bytes = b""

    def __post_init__(self) -> None:
        _require_chain(self.chain)
        if not 1 <= len(self.datagram_keys) <= MAX_DATAGRAM_KEYS:
            raise ValueError(f"1 to {MAX_DATAGRAM_KEYS} datagram keys expected")
        if any(len(key) != DATAGRAM_KEY_BYTES for key in self.datagram_keys):
            raise ValueError(f"a datagram key has {DATAGRAM_KEY_BYTES} bytes")
        if len(self.news) > MAX_BLOB_BYTES:
            raise ValueError(f"a revocation list has at most {MAX_BLOB_BYTES} bytes")
        if self.admitter:
            _require_certificates((self.admitter,))


@dataclass(frozen=True, slots=True)
class Refused:
    """You are not let in, and why, for the person who tried."""

    reason: str

    def __post_init__(self) -> None:
        if len(self.reason) > MAX_REASON_CHARS or not self.reason.isprintable():
            raise ValueError(f"a reason is one printable line of at most {MAX_REASON_CHARS} characters")

    @classmethod
    def because(cls, reason: str) -> Self:
        """Return a refusal that gives `reason`, made fit to be sent."""
        return cls("".join(c if c.isprintable() else " " for c in reason[:MAX_REASON_CHARS]))


ADMISSION = Vocabulary(PeerError, Card, Apply, Renew, Admitted, Refused)


def _require_chain(chain: tuple[bytes, ...]) -> None:
    if not 1 <= len(chain) <= MAX_CHAIN:
        raise ValueError(f"a chain has 1 to {MAX_CHAIN} certificates")
    _require_certificates(chain)


def _require_certificates(certificates: tuple[bytes, ...]) -> None:
    if not all(1 <= len(each) <= MAX_CERTIFICATE_BYTES for each in certificates):
        raise ValueError(f"a certificate has 1 to {MAX_CERTIFICATE_BYTES} bytes")
