"""Names of peers, rounds and places on the network.

A `PeerId` is what a key proves: the first 20 bytes of SHA-256 over the ed25519 public key. The same bytes are the DHT
node id, so 160 bits is not a choice of ours. People see 32 lower-case base32 characters.
"""

import base64
import hashlib
import ipaddress
from dataclasses import dataclass
from typing import NewType

from mpd.errors import LocalError

PEER_ID_BYTES = 20
ROUND_ID_BYTES = 16

PeerId = NewType("PeerId", bytes)
RoundId = NewType("RoundId", bytes)


def peer_id_of(public_key: bytes) -> PeerId:
    """Return the id of the peer that holds `public_key` (32 raw bytes, ed25519)."""
    return PeerId(hashlib.sha256(public_key).digest()[:PEER_ID_BYTES])


def peer_id(raw: bytes) -> PeerId:
    """Return `raw` as a `PeerId`. Raises ValueError unless it is exactly 20 bytes."""
    if len(raw) != PEER_ID_BYTES:
        raise ValueError(f"a peer id has {PEER_ID_BYTES} bytes, this has {len(raw)}")
    return PeerId(bytes(raw))


def show_peer(peer: bytes) -> str:
    """Return `peer` as people see it: 32 lower-case base32 characters."""
    return base64.b32encode(peer).decode("ascii").lower()


def parse_peer(text: str) -> PeerId:
    """Return the id that `show_peer` printed as `text`. Raises ValueError on anything else."""
    try:
        raw = base64.b32decode(text.strip().upper())
    except ValueError as error:
        raise ValueError(f"{text!r} is not a peer id: 32 base32 characters expected") from error
    return peer_id(raw)


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """A host (name or numeric address, no brackets) and a port from 0 to 65535."""

    host: str
    port: int

    def __post_init__(self) -> None:
        if not self.host or any(c.isspace() for c in self.host):
            raise ValueError(f"{self.host!r} is not a host")
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
    host, colon, port = text.strip().rpartition(":")
    if not colon or "]" in port or (host.count(":") and not host.startswith("[")):
        host, port = text.strip(), ""
    host = host.removeprefix("[").removesuffix("]")
    if not port and default_port is not None:
        port = str(default_port)
    try:
        return Endpoint(host, int(port))
    except ValueError as error:
        raise LocalError(f"{text!r} is not an address: HOST:PORT expected, for example 192.0.2.7:4747") from error
