"""Invites: a line of text with which a machine that knows nothing finds a swarm and is let in, once.

Strategy: an invite names one admitter, because only one that remembers the nonces it has accepted can keep an invite
from being used too often. It is signed by that admitter, or by the root; the holder cannot tell, the admitter can. The
swarm's id in it is what the holder trusts: the root certificate that it is given has to match.

The text is `mpdi1.` and base64url of `signature (64) | msgpack`. Whoever has it can join, so nothing here shows it.
"""

import base64
import re
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mpd.errors import LocalError
from mpd.identity import ROLES, SwarmId
from mpd.ids import PEER_ID_BYTES, Endpoint, PeerId
from mpd.vocabulary import Vocabulary

NONCE_BYTES = 16
MAX_USES = 10_000
MAX_ADDRESSES = 8
MAX_TOKEN_CHARS = 4096

_DOMAIN = b"mpd invite 1"
_SIGNATURE_BYTES = 64
_PREFIX = "mpdi1."
_ANY_VERSION = re.compile(r"mpdi([0-9]{1,9})\.", re.ASCII)
_BASE64URL = re.compile("[A-Za-z0-9_-]+", re.ASCII)
_DAMAGED = "this invite is damaged or cut short: copy the whole line that was printed"


@dataclass(frozen=True, slots=True)
class Invite:
    """Until `not_after_s` (seconds since 1970), `admitter` lets in `uses` peers with `role`, or only the one `peer`.

    `addresses` is where the admitter may be dialled. Raises LocalError for what no invite can say.
    """

    swarm: SwarmId
    admitter: PeerId
    addresses: tuple[Endpoint, ...]
    nonce: bytes = field(repr=False)
    not_after_s: int
    uses: int
    role: str
    peer: PeerId | None

    def __post_init__(self) -> None:
        ids = (self.swarm, self.admitter) if self.peer is None else (self.swarm, self.admitter, self.peer)
        if any(len(each) != PEER_ID_BYTES for each in ids) or len(self.nonce) != NONCE_BYTES:
            raise LocalError(f"an invite has ids of {PEER_ID_BYTES} bytes and a nonce of {NONCE_BYTES}")
        if not 1 <= len(self.addresses) <= MAX_ADDRESSES:
            raise LocalError(f"an invite has 1 to {MAX_ADDRESSES} addresses, not {len(self.addresses)}")
        for address in self.addresses:
            if address.is_wildcard or not address.port:
                raise LocalError(
                    f"nobody can be dialled at {address}: an invite needs an address that others can reach"
                )
        if not 0 < self.not_after_s < 1 << 34:
            raise LocalError(f"an invite cannot expire at {self.not_after_s} s after 1970")
        if not 1 <= self.uses <= MAX_USES:
            raise LocalError(f"an invite can be used 1 to {MAX_USES} times, not {self.uses}")
        if self.role not in ROLES:
            raise LocalError(f"{self.role[:40]!r} is not a role: one of {', '.join(ROLES)} expected")


@dataclass(frozen=True, slots=True)
class SignedInvite:
    """An invite as it was signed. Its holder cannot check the signature; whoever knows the signer's key can."""

    invite: Invite
    body: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    def is_signed_by(self, public: bytes) -> bool:
        """Return True if the ed25519 key `public` (32 bytes) signed this."""
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(self.signature, _DOMAIN + self.body)
        except (InvalidSignature, ValueError):
            return False
        return True


_WORDS = Vocabulary(LocalError, Invite)


def make_token(invite: Invite, key: Ed25519PrivateKey) -> str:
    """Return the text of `invite`, signed with the key of the admitter that it names or with the root key."""
    body = _WORDS.encode(invite)
    return _PREFIX + base64.urlsafe_b64encode(key.sign(_DOMAIN + body) + body).decode("ascii").rstrip("=")


def parse_token(text: str) -> SignedInvite:
    """Return the invite in `text`, as someone pasted it. Raises LocalError, which never quotes the text."""
    if len(text) > MAX_TOKEN_CHARS:
        raise LocalError(
            f"this is not an invite: it has {len(text)} characters, and an invite at most {MAX_TOKEN_CHARS}"
        )
    token = "".join(text.split())
    version = _ANY_VERSION.match(token)
    if version is None:
        raise LocalError(
            f"this is not an invite: an invite begins with {_PREFIX}; copy the whole line that was printed"
        )
    if version[0] != _PREFIX:
        raise LocalError(
            f"this invite has version {version[1]} and this mpd reads version 1: use the same mpd on both ends"
        )
    encoded = token.removeprefix(_PREFIX)
    if not _BASE64URL.fullmatch(encoded) or len(encoded) % 4 == 1:
        raise LocalError(_DAMAGED)
    raw = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    signature, body = raw[:_SIGNATURE_BYTES], raw[_SIGNATURE_BYTES:]
    try:
        return SignedInvite(_WORDS.decode(body), body, signature)
    except LocalError as error:
        raise LocalError(_DAMAGED) from error
