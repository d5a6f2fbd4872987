"""The gate of the DHT's socket: what is no fresh datagram of this swarm is dropped before anything looks inside.

    mac (16) | timestamp in ms (8) | kind (1) | message id (20) | msgpack

The MAC is HMAC-SHA256 (RFC 2104), cut to 128 bits, under a key that all members of the swarm share, over everything
behind it. It comes first: it costs two microseconds, and whoever does not know the key gets no further and gets no
answer. Then the timestamp has to be right within half a minute, a request must not have been seen before, and its
sender has to be within its quota. The key tells members from outsiders and not from each other; signatures do that.

An address that keeps sending what fails the MAC is not even listened to for a moment, unless a contact lives there or
it seems to be the answer that we are waiting for; and nobody is, but for those, while noise in total, or the requests
of strangers, come faster than they may. `Gate.muted` tells who that is, so that the socket need not hand it on
(`dht_filter.py`).
"""

import hmac
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mpd.identity import OPEN_DATAGRAM_KEY, OPEN_SWARM
from mpd.ids import Endpoint

from .budgets import Budgets
from .dht_limits import source_of

MAX_DATAGRAM_BYTES = 1232  # IPv6 carries so much everywhere, in one piece
REQUEST, REPLY = 0, 1
MESSAGE_ID_BYTES = 20
WINDOW_MS = 30_000
MAX_REMEMBERED = 65_536  # requests, to know them again
MAX_MUTED = 1024
MUTE_S = 0.1  # time in which a few more are earned
COMPLAIN_S = 60.0  # how long a wrong clock is spoken of

_MAC_BYTES = 16
_HEAD = struct.Struct("<QB20s")
HEADER_BYTES = _MAC_BYTES + _HEAD.size
KIND_AT = _MAC_BYTES + 8

Address = tuple[str, int]


class DhtTrust(Protocol):
    """Who we are, and whom our swarm lets in. It may change at any time, so every answer is asked for anew.

    Called from the thread of the DHT.
    """

    @property
    def swarm_id(self) -> bytes: ...

    @property
    def is_open(self) -> bool:
        """True if keys prove no membership in this swarm, because everyone is let in."""

    @property
    def public_key(self) -> bytes:
        """Our ed25519 key, 32 bytes."""

    def sign(self, message: bytes) -> bytes: ...

    def chain(self) -> tuple[bytes, ...]:
        """Return our certificates (DER, leaf first, without the root); none in an open swarm."""

    def datagram_keys(self) -> tuple[bytes, ...]:
        """Return the keys for datagrams: the first one for sending, all of them for receiving."""

    def admits(self, public_key: bytes, chain: Sequence[bytes]) -> bool:
        """Return whether the holder of this key is a member now and not revoked."""

    def is_revoked(self, peer: bytes) -> bool: ...


class OpenTrust:
    """A key in the open swarm, where everyone is a member."""

    swarm_id = bytes(OPEN_SWARM)
    is_open = True

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self.public_key = key.public_key().public_bytes_raw()
        self.sign = key.sign

    def chain(self) -> tuple[bytes, ...]:
        return ()

    def datagram_keys(self) -> tuple[bytes, ...]:
        return (OPEN_DATAGRAM_KEY,)

    def admits(self, public_key: bytes, chain: Sequence[bytes]) -> bool:
        return True

    def is_revoked(self, peer: bytes) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Opened:
    """A datagram that has passed. `body` is msgpack, as far as the sender knows."""

    is_request: bool
    message_id: bytes
    body: memoryview


@dataclass(frozen=True, slots=True, eq=False)
class Muted:
    """Whom the gate does not listen to for a moment, unless it is a contact, or was asked and replies.

    `sources` are those of `source_of`, None: everybody; by `until` (of the gate's clock) the first of them has served
    its time.
    """

    sources: frozenset[str] | None
    until: float


class Gate:
    """Seals what one socket sends and opens what it receives. `refused` counts what does not pass, by reason.

    `wall_ms` returns milliseconds since 1970, `clock` seconds that never go back.
    """

    def __init__(
        self,
        trust: DhtTrust,
        wall_ms: Callable[[], int],
        clock: Callable[[], float],
        budgets: Budgets,
        refused: Counter[str],
    ) -> None:
        self._trust = trust
        self._wall_ms = wall_ms
        self._clock = clock
        self._budgets = budgets
        self._refused = refused
        self._remembered: dict[bytes, float] = {}  # MACs of requests, and when they came; the oldest first
        self._muted_until: dict[str, float] = {}
        self._all_muted_until = 0.0
        self._muted: Muted | None = None  # as told last
        self._complaint = (0.0, "")

    def seal(self, kind: int, message_id: bytes, body: bytes) -> bytes:
        """Return the datagram that carries `body`."""
        signed = _HEAD.pack(self._wall_ms(), kind, message_id) + body
        return _mac(self._trust.datagram_keys()[0], signed) + signed

    def open(self, datagram: bytes, address: Address, contact: bytes | None, is_expected: bool) -> Opened | None:
        """Return what is inside a datagram from `address`, None if it does not pass.

        `contact` is the id of the contact that lives at `address`, if any; `is_expected`: we asked that address.
        """
        reason = self._reason_against(datagram, address, contact, is_expected)
        if reason:
            self._refused[reason] += 1
            return None
        _, kind, message_id = _HEAD.unpack_from(datagram, _MAC_BYTES)
        return Opened(kind == REQUEST, message_id, memoryview(datagram)[HEADER_BYTES:])

    def muted(self) -> Muted | None:
        """Return who is not listened to now, None: nobody. The same object as before while nobody came or went."""
        if not (self._muted_until or self._all_muted_until):
            return None
        now = self._clock()
        if self._muted is not None and now < self._muted.until:
            return self._muted
        self._muted_until = {source: until for source, until in self._muted_until.items() if now < until}
        if now < self._all_muted_until:
            self._muted = Muted(None, self._all_muted_until)
        elif self._muted_until:
            self._muted = Muted(frozenset(self._muted_until), min(self._muted_until.values()))
        else:
            self._muted, self._all_muted_until = None, 0.0
        return self._muted

    def is_now(self, at_ms: int) -> bool:
        """Return whether a time is the present, as far as clocks may differ."""
        return abs(at_ms - self._wall_ms()) <= WINDOW_MS

    @property
    def problem(self) -> str:
        """A sentence on a clock that was wrong just now, "" if there was none."""
        since, sentence = self._complaint
        return sentence if self._clock() - since < COMPLAIN_S else ""

    def _reason_against(self, datagram: bytes, address: Address, contact: bytes | None, is_expected: bool) -> str:
        if not HEADER_BYTES < len(datagram) <= MAX_DATAGRAM_BYTES:
            return "size"
        is_answer = is_expected and datagram[KIND_AT] == REPLY
        if contact is None and not is_answer and self._is_muted(source_of(address[0])):
            return "flood"
        mac, signed = datagram[:_MAC_BYTES], memoryview(datagram)[_MAC_BYTES:]
        if not any(hmac.compare_digest(mac, _mac(key, signed)) for key in self._trust.datagram_keys()):
            self._note_failure(source_of(address[0]))
            return "mac"
        sent_ms, kind, _ = _HEAD.unpack_from(signed)
        if not self.is_now(sent_ms):
            self._complain(address, sent_ms)
            return "time"
        if kind == REPLY:
            return ""  # it counts once, if at all: for the question that it answers
        if kind != REQUEST:
            return "kind"
        if mac in self._remembered:
            return "replay"
        if not self._is_within_quota(contact):
            return "quota"
        self._remember(mac)
        return ""

    def _is_muted(self, source: str) -> bool:
        now = self._clock()
        return now < self._all_muted_until or now < self._muted_until.get(source, 0.0)

    def _note_failure(self, source: str) -> None:
        now = self._clock()
        if not self._budgets.datagrams_per_address.take(now, source):
            if len(self._muted_until) >= MAX_MUTED:
                self._muted_until.clear()
            if self._muted_until.get(source, 0.0) <= now:
                self._muted = None
            self._muted_until[source] = now + MUTE_S
        if not self._budgets.datagrams.take(now):
            self._mute_all(now)

    def _is_within_quota(self, contact: bytes | None) -> bool:
        now = self._clock()
        if contact is not None:
            return self._budgets.requests_per_member.take(now, contact)
        if self._budgets.requests_of_strangers.take(now):
            return True
        self._mute_all(now)  # until a few more are earned, none of them would pass
        return False

    def _mute_all(self, now: float) -> None:
        if self._all_muted_until <= now:
            self._muted = None
        self._all_muted_until = now + MUTE_S

    def _remember(self, mac: bytes) -> None:
        now = self._clock()
        self._remembered[mac] = now
        while True:
            oldest, came = next(iter(self._remembered.items()))
            if len(self._remembered) <= MAX_REMEMBERED and now - came <= 2 * WINDOW_MS / 1000:
                return
            del self._remembered[oldest]

    def _complain(self, address: Address, sent_ms: int) -> None:
        apart_s = abs(sent_ms - self._wall_ms()) // 1000
        sentence = f"the clock of {Endpoint(*address)} and this machine's differ by {apart_s} s: set the wrong one"
        self._complaint = (self._clock(), sentence)


def _mac(key: bytes, signed: bytes | memoryview) -> bytes:
    return hmac.digest(key, signed, "sha256")[:_MAC_BYTES]
