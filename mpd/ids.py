"""Names of peers, rounds and places on the network.

A `PeerId` is what a key proves: the first 20 bytes of SHA-256 over the ed25519 public key. The same bytes are the DHT
node id, so 160 bits is not a choice of ours. People see 32 lower-case base32 characters.
"""

import base64
import functools
import hashlib
import ipaddress
import re
from dataclasses import dataclass
from typing import NewType

from mpd.errors import LocalError

PEER_ID_BYTES = 20
ROUND_ID_BYTES = 16
MAX_HOST_CHARS = 253

PeerId = NewType("PeerId", bytes)
RoundId = NewType("RoundId", bytes)

_LABEL = "[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_HOSTNAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?", re.IGNORECASE | re.ASCII)
_ZONE = re.compile("[a-z0-9_.-]{1,15}", re.IGNORECASE | re.ASCII)
_PORT = re.compile("[0-9]{1,5}", re.ASCII)


def peer_id_of(public_key: bytes) -> PeerId:
    """Return the id of the peer that holds `public_key` (32 raw bytes, ed25519)."""
    return PeerId(hashlib.sha256(public_key).digest()[:PEER_ID_BYTES])


def peer_id(raw: bytes) -> PeerId:
    """Return `raw` as a `PeerId`. Raises ValueError unless it is exactly 20 bytes."""
    if len(raw) != PEER_ID_BYTES:
        raise ValueError(f"a peer id has {PEER_ID_BYTES} bytes, this has {len(raw)}")
    return PeerId(bytes(raw))


@functools.lru_cache(maxsize=1024)
def show_peer(peer: bytes) -> str:
    """Return `peer` as people see it: 32 lower-case base32 characters. Cached: every decision has its sentence."""
    return base64.b32encode(peer).decode("ascii").lower()


def parse_peer(text: str) -> PeerId:
    """Return the peer that `show_peer` shows as `text`. Raises LocalError."""
    try:
        return peer_id(base64.b32decode(text, casefold=True))
    except ValueError as error:
        raise LocalError(
            f"{text[:64]!r} is not a peer: the 32 letters and digits expected that `mpd status` shows"
        ) from error


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """A host (name or numeric address, no brackets) and a port from 0 to 65535. Raises ValueError for anything else.

    Hosts come from peers too and go to resolvers, logs and terminals, so the characters of a name are the classic ones.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        if not _is_host(self.host):
            raise ValueError(f"{self.host[:64]!r} is not a host: a name or an address expected")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"{self.port} is not a port: 0 to 65535 expected")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True if this can only be reached from the same machine."""
        return self.host == "localhost" or self._address_is("is_loopback")

    @property
    def is_wildcard(self) -> bool:
        """True if this stands for every address of the machine (0.0.0.0 or ::)."""
        return self._address_is("is_unspecified")

    def _address_is(self, what: str) -> bool:
        try:
            return bool(getattr(ipaddress.ip_address(self.host), what))
        except ValueError:
            return False


def parse_endpoint(text: str, default_port: int | None = None) -> Endpoint:
    """Parse `host:port`, `[v6]:port`, or a bare host where there is a `default_port`. Raises LocalError."""
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]") or (":" in host and not host.endswith("]")):
        host, port = text, "" if default_port is None else str(default_port)
    if host.startswith("[") and host.endswith("]") and ":" in host:
        host = host[1:-1]
    try:
        if not _PORT.fullmatch(port):
            raise ValueError(f"{port!r} is not a port")
        return Endpoint(host, int(port))
    except ValueError as error:
        raise LocalError(f"{text!r} is not an address: HOST:PORT expected, for example 192.0.2.7:4747") from error


def _is_host(text: str) -> bool:
    return len(text) <= MAX_HOST_CHARS and _is_short_host(text)


@functools.lru_cache(maxsize=1024)  # every message about a group names those of its members again
def _is_short_host(text: str) -> bool:
    address, percent, zone = text.partition("%")
    try:
        ipaddress.ip_address(address)
    except ValueError:
        # All digits and dots would be an address, and is none: resolvers read 1.2.3 and 1234 in surprising ways.
        return bool(_HOSTNAME.fullmatch(text)) and not text.replace(".", "").isdigit()
    return not percent or (":" in address and bool(_ZONE.fullmatch(zone)) and ".." not in zone)
