"""Sealed records: the keys of one data connection, and each record encrypted and authenticated with them.

Strategy: both ends of a control connection give 32 random bytes; both halves and everything that the keys are for
(swarm, peers, roles, handle, attempt, suite) go into the schedule, so no two connections ever share a key. A direction
of a connection is a `Half`. It counts its records itself, the count is the nonce, and the count is never sent: a record
that was altered, repeated, left out, moved or taken from elsewhere simply does not open. No call takes a nonce, and a
half that has failed once is dead, so a nonce cannot serve twice.

Key schedule: HKDF with SHA-256 (RFC 5869). Nonces: the initial value XOR the count, as TLS 1.3 does it (RFC 8446, 5.3).
"""

import hashlib
import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from mpd.errors import LocalError, PeerError
from mpd.ids import PeerId

AES_GCM = "aes-256-gcm"
CHACHA = "chacha20-poly1305"
SUITES = (AES_GCM, CHACHA)
NO_SEAL = "none"
"""The suite of data in the clear; only ever used where both ends were told so on their own machines."""
TAG_BYTES = 16
RANDOM_BYTES = 32

MAX_BLOCKS = 2**34
"""AES blocks that one key may seal: at 256 GiB an observer's advantage is still about 2^-61."""
MAX_RECORDS = 2**32

_PROTOCOL = b"mpd/1"
_SALT = b"mpd data 1"
_KEY_BYTES = 32
_IV_BYTES = 12
_BLOCK_BYTES = 16

Buffer = bytes | bytearray | memoryview
_Aead = AESGCM | ChaCha20Poly1305
_AEADS: dict[str, type[_Aead]] = {AES_GCM: AESGCM, CHACHA: ChaCha20Poly1305}


class BadRecord(PeerError):
    """A record did not open. Its sender need not be to blame: anybody on the path can cause this."""


class Half:
    """One direction of one data connection: at one end it seals, at the other it opens, and it never does both."""

    def __init__(self, suite: str, key: bytearray, iv: bytes) -> None:
        self._aead: _Aead | None = _AEADS[suite](key)
        self._iv = int.from_bytes(iv, "big")
        self._seals: bool | None = None  # decided by the first use
        self._n_blocks = 0
        self.n_records = 0

    @property
    def wear(self) -> float:
        """How much of what these keys may seal is used, from 0 to 1."""
        return max(self._n_blocks / MAX_BLOCKS, self.n_records / MAX_RECORDS)

    def seal_into(self, header: Buffer, payload: Buffer, out: Buffer) -> int:
        """Seal the next record: write ciphertext and tag to `out`, `TAG_BYTES` longer than `payload`.

        `header` is authenticated and not written. `payload` may lie where the ciphertext goes. Returns the bytes
        written. Raises LocalError if this half is dead or worn out.
        """
        aead, nonce = self._begin(len(payload), seals=True)
        n_bytes = aead.encrypt_into(nonce, payload, header, out)
        self._aead = aead
        return n_bytes

    def open_into(self, header: Buffer, sealed: Buffer, out: Buffer) -> int:
        """Open the next record: write the plaintext of `sealed` (ciphertext and tag) to `out`, `TAG_BYTES` shorter.

        `out` may be where the ciphertext lies. Returns the bytes written. Raises BadRecord if this is not the record
        that was sealed at this place; then `out` holds garbage, chosen by whoever sent it, and this half is dead.
        """
        aead, nonce = self._begin(len(sealed) - TAG_BYTES, seals=False)
        try:
            n_bytes = aead.decrypt_into(nonce, sealed, header, out)
        except InvalidTag:
            raise BadRecord(f"its record {self.n_records - 1} does not open: it was altered on the way") from None
        self._aead = aead
        return n_bytes

    def knows(self, header: Buffer, tag: Buffer) -> bool:
        """True if `tag` is that of an empty first record, which then counts as opened.

        Unlike `open_into`, a wrong one may be followed by another try: anybody may knock. The caller limits the tries.
        """
        if self.n_records:
            raise LocalError("only the first record of a connection may be tried")
        aead, nonce = self._begin(0, seals=False)
        try:
            aead.decrypt_into(nonce, tag, header, bytearray())
        except InvalidTag:
            self.n_records -= 1
            return False
        finally:
            self._aead = aead
        return True

    def close(self) -> None:
        """Give the keys up."""
        self._aead = None

    def _begin(self, n_bytes: int, *, seals: bool) -> tuple[_Aead, bytes]:
        """Return cipher and nonce of the next record. This half is dead until the caller puts the cipher back."""
        aead, self._aead = self._aead, None
        if aead is None:
            raise LocalError("these keys are closed: one of their records has failed, or their connection has ended")
        if self._seals is not seals and self._seals is not None:
            raise LocalError("one half either seals or opens")
        self._seals = seals
        n_blocks = self._n_blocks + 1 + -(-n_bytes // _BLOCK_BYTES)  # one more makes the tag
        if n_blocks > MAX_BLOCKS or self.n_records >= MAX_RECORDS:
            raise LocalError("these keys have sealed as much as they may")
        nonce = (self._iv ^ self.n_records).to_bytes(_IV_BYTES, "big")
        self._n_blocks = n_blocks
        self.n_records += 1
        return aead, nonce


def context(swarm: bytes, initiator: PeerId, acceptor: PeerId, conn_id: bytes, epoch: int, suite: str) -> bytes:
    """Return the 32 bytes that say what a set of keys is for.

    Args:
        initiator, acceptor: who dialled the control connection, and who was dialled.
        conn_id: the handle of the data connection, 16 bytes.
        epoch: how many data connections were offered before on the same control connection.
    """
    parts = (_PROTOCOL, swarm, initiator, acceptor, conn_id, epoch.to_bytes(8, "little"), suite.encode("ascii"))
    return hashlib.sha256(b"".join(len(part).to_bytes(4, "little") + part for part in parts)).digest()


def derive(offer_random: bytes, accept_random: bytes, ctx: bytes, suite: str) -> tuple[Half, Half]:
    """Return the two directions of the connection that `ctx` names: initiator to acceptor, acceptor to initiator.

    Args:
        offer_random, accept_random: 32 bytes from the initiator and 32 from the acceptor of the control connection.
    """
    secret = bytearray(hmac.digest(_SALT, offer_random + accept_random, "sha256"))  # HKDF-Extract
    try:
        return _half(secret, b"i2a", ctx, suite), _half(secret, b"a2i", ctx, suite)
    finally:
        _erase(secret)


def _half(secret: bytearray, direction: bytes, ctx: bytes, suite: str) -> Half:
    key = bytearray(_KEY_BYTES)
    try:
        HKDFExpand(SHA256(), _KEY_BYTES, b"key " + direction + ctx).derive_into(secret, key)
        iv = HKDFExpand(SHA256(), _IV_BYTES, b"iv " + direction + ctx).derive(secret)
        return Half(suite, key, iv)
    finally:
        _erase(key)


def _erase(secret: bytearray) -> None:
    """Overwrite a secret. Copies inside the interpreter and the cipher library are beyond our reach."""
    secret[:] = bytes(len(secret))
