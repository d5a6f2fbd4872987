"""What keys have proved: who lives at an address, who is a member, who says goodbye, who published a record.

Everything that is signed begins with a word of its own, so that no signature can be passed off as another, and with the
swarm, so that none counts in two. Verifying takes a tenth of a millisecond; so what has been found genuine is
remembered, as a digest, and a member's certificates are looked at once in a while, not once per datagram.

A node proves its home by signing the question: who asks, with which message id, and from which address the question
came. Nobody can keep such an answer for later, or for somebody else.
"""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from mpd.ids import peer_id_of

from .dht_gate import Address, DhtTrust
from .dht_records import WireRecord

RECHECK_S = 300.0  # how long a certificate is believed without another look at its dates
MAX_MEMBERS = 4096
MAX_GENUINE = 16_384

_HOME, _GOODBYE, _RECORD = b"mpd dht home 1|", b"mpd dht goodbye 1|", b"mpd dht record 1|"

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Memory(Generic[K, V]):
    """A dictionary of the `limit` entries that were written last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: dict[K, V] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        return self._entries.get(key)

    def put(self, key: K, value: V) -> None:
        self._entries.pop(key, None)
        self._entries[key] = value
        if len(self._entries) > self._limit:
            del self._entries[next(iter(self._entries))]

    def drop(self, key: K) -> None:
        self._entries.pop(key, None)


class Proofs:
    """Makes our own proofs and checks those of others. `clock` returns seconds that never go back."""

    def __init__(self, trust: DhtTrust, clock: Callable[[], float]) -> None:
        self.own_id: bytes = peer_id_of(trust.public_key)
        self._trust = trust
        self._clock = clock
        self._members: Memory[bytes, tuple[tuple[bytes, ...], float]] = Memory(MAX_MEMBERS)
        self._genuine: Memory[bytes, bool] = Memory(MAX_GENUINE)

    # homes

    def sign_home(self, asker: bytes, message_id: bytes, asked_from: Address) -> bytes:
        """Return the proof that we live where the question of `asker` reached us."""
        return self._trust.sign(self._home(self.own_id, asker, message_id, asked_from))

    def is_home(self, public_key: bytes, message_id: bytes, asked_from: Address, signature: bytes) -> bool:
        """Return whether the holder of this key answered our question, which it saw come from `asked_from`."""
        return _is_signed(
            public_key, self._home(peer_id_of(public_key), self.own_id, message_id, asked_from), signature
        )

    def _home(self, replier: bytes, asker: bytes, message_id: bytes, asked_from: Address) -> bytes:
        host, port = asked_from
        return b"".join(
            (_HOME, self._trust.swarm_id, replier, asker, message_id, port.to_bytes(2, "little"), host.encode())
        )

    # goodbyes

    def sign_goodbye(self, at_ms: int) -> bytes:
        return self._trust.sign(self._goodbye(self.own_id, at_ms))

    def is_goodbye(self, public_key: bytes, at_ms: int, signature: bytes) -> bool:
        return _is_signed(public_key, self._goodbye(peer_id_of(public_key), at_ms), signature)

    def _goodbye(self, leaver: bytes, at_ms: int) -> bytes:
        return b"".join((_GOODBYE, self._trust.swarm_id, leaver, at_ms.to_bytes(8, "little")))

    # members

    def admit(self, public_key: bytes, chain: Sequence[bytes]) -> bool:
        """Return whether this key, with these certificates, is a member's; from then on `is_member` knows it."""
        if self.is_revoked(public_key):
            return False
        if self._trust.is_open:
            return True
        known = self._members.get(public_key)
        shown = tuple(chain)
        if known is not None and known[0] == shown and self._clock() - known[1] < RECHECK_S:
            return True
        if not self._trust.admits(public_key, shown):
            if known is not None and known[0] == shown:
                self._members.drop(public_key)
            return False
        self._members.put(public_key, (shown, self._clock()))
        return True

    def is_member(self, public_key: bytes) -> bool:
        """Return whether this key is known to be a member's; in an open swarm everybody's is."""
        if self._trust.is_open or public_key == self._trust.public_key:
            return not self.is_revoked(public_key)
        known = self._members.get(public_key)
        return known is not None and self.admit(public_key, known[0])

    def chain_of(self, public_key: bytes) -> tuple[bytes, ...]:
        """Return the certificates that this member has shown us; none if we do not know it."""
        if public_key == self._trust.public_key:
            return self._trust.chain()
        known = self._members.get(public_key)
        return () if known is None else known[0]

    def is_revoked(self, public_key: bytes) -> bool:
        return self._trust.is_revoked(peer_id_of(public_key))

    # records

    def sign_record(self, key: bytes, seq: int, expires_at_ms: int, value: bytes) -> WireRecord:
        """Return our record under `key`."""
        signed = self._record(key, seq, expires_at_ms, value)
        record = WireRecord(self._trust.public_key, seq, expires_at_ms, value, self._trust.sign(signed))
        self._genuine.put(_digest(record, signed), True)
        return record

    def is_genuine(self, key: bytes, record: WireRecord) -> bool:
        """Return whether the holder of the record's key published it under `key`. `record` has a valid shape."""
        signed = self._record(key, record.seq, record.expires_at_ms, record.value)
        digest = _digest(record, signed)
        if self._genuine.get(digest):
            return True
        if not _is_signed(record.public_key, signed, record.signature):
            return False
        self._genuine.put(digest, True)
        return True

    def _record(self, key: bytes, seq: int, expires_at_ms: int, value: bytes) -> bytes:
        fixed = (_RECORD, self._trust.swarm_id, key, seq.to_bytes(8, "little"), expires_at_ms.to_bytes(8, "little"))
        return b"".join((*fixed, value))


def _digest(record: WireRecord, signed: bytes) -> bytes:
    return hashlib.blake2b(record.public_key + record.signature + signed, digest_size=16).digest()


def _is_signed(public_key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
