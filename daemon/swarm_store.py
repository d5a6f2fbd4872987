"""The folder `swarm/` in the state directory: what makes this machine a member of a private swarm, and survives it.

    swarm.json    the root certificate, and where admitters were last found
    chain.pem     our certificate, and that of the admitter who signed it
    news.json     the newest revocation list, signed by the root, and the datagram keys that go with it
    invites.json  who has used which invite of ours, until those expire
    root.pem      the root key: only where the swarm was created, unless it was moved to a safer place

Strategy: a machine becomes a member by one rename of a complete folder, and every file in it is replaced whole, so no
crash and no full disk leaves something half done. What is read is checked down to the signatures before it is believed;
a file that does not pass is never overwritten, because it may be the only copy, but named in one sentence with what to
do. The daemon and the commands change these files by turns (`writing`), never at once.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from mpd import revocations
from mpd.admission import DATAGRAM_KEY_BYTES
from mpd.errors import Fatal, LocalError, PeerError
from mpd.identity import read_root, swarm_id_of
from mpd.ids import Endpoint, PeerId, parse_endpoint, parse_peer, show_peer
from mpd.invites import Invite
from mpd.revocations import Revocations

from .state import private_pem, read_private_key, replace_file, sync_folder, writing

KEPT_KEY_S = 86400.0  # how long the datagram key before the current one is accepted

_FOLDER = "swarm"
CHAIN = "chain.pem"
_SWARM, _NEWS, _INVITES, _ROOT_KEY = "swarm.json", "news.json", "invites.json", "root.pem"
_MAX_FILE_BYTES = 16 << 20
_MAX_KEYS = 8
_MAX_ADMITTERS = 8
_FORGET_S = 86400.0  # an invite is remembered this much longer than it is valid: clocks get corrected

T = TypeVar("T")


def key_digest(key: bytes) -> bytes:
    """Return what a revocation list says about the datagram key that goes with it."""
    return hashlib.sha256(key).digest()


@dataclass(frozen=True, slots=True)
class DatagramKey:
    """A key of 32 bytes for datagrams, accepted until `until_s` (seconds since 1970); None: the current one."""

    key: bytes = field(repr=False)
    until_s: float | None = None


@dataclass(frozen=True, slots=True)
class SwarmNews:
    """The newest revocation list, the `blob` that proves it, and the datagram keys, the current one first."""

    revocations: Revocations
    blob: bytes = field(repr=False)
    keys: tuple[DatagramKey, ...]

    def valid_keys(self, now_s: float) -> tuple[DatagramKey, ...]:
        """Return the keys that are accepted now, the current one first."""
        return tuple(each for each in self.keys if each.until_s is None or each.until_s > now_s)

    def followed_by(self, revocations: Revocations, blob: bytes, key: bytes, now_s: float) -> "SwarmNews":
        """Return what holds once the newer list `revocations` has arrived with `key`."""
        current = self.keys[0].key
        rest = [old for old in self.valid_keys(now_s)[1:] if old.key != key]
        if current != key:
            rest.insert(0, DatagramKey(current, now_s + KEPT_KEY_S))
        return SwarmNews(revocations, blob, (DatagramKey(key), *rest)[:_MAX_KEYS])


class _SwarmFile(msgspec.Struct, frozen=True):
    root: bytes
    admitters: dict[str, list[str]]


class _NewsFile(msgspec.Struct, frozen=True):
    revocations: bytes
    datagram_keys: list[DatagramKey]


class _Use(msgspec.Struct):
    not_after_s: int
    peers: list[bytes]


class SwarmStore:
    """The folder `swarm/` of the state directory `path`. Every method blocks for as long as the disk takes.

    Reading raises Fatal with what is wrong and what to do; writing raises LocalError and leaves what was there.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path / _FOLDER
        self._path = path

    def exists(self) -> bool:
        """Return True if this machine belongs, or did belong, to a private swarm."""
        return self.folder.exists()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Let nobody else change these files for one short block. Raises LocalError."""
        try:
            with writing(self._path):
                yield
        except OSError as error:
            raise LocalError(f"the state directory {self._path} cannot be written: {error.strerror}") from error

    # --------------------------------------------------------------------------------------------------- becoming one

    def found(
        self,
        root: x509.Certificate,
        chain: Sequence[bytes],
        news: SwarmNews,
        admitters: Mapping[PeerId, Sequence[Endpoint]],
        root_key: Ed25519PrivateKey | None = None,
    ) -> None:
        """Make the folder, complete or not at all. Raises LocalError, also if there is one already."""
        files = {
            _SWARM: _encode_swarm(root, admitters),
            CHAIN: _encode_chain(chain),
            _NEWS: _encode_news(news),
            _INVITES: b"{}",
        }
        if root_key is not None:
            files[_ROOT_KEY] = private_pem(root_key)
        fresh = ""
        try:
            fresh = tempfile.mkdtemp(prefix=".new-", dir=self._path)
            for name, content in files.items():
                replace_file(Path(fresh) / name, content)
            os.rename(fresh, self.folder)  # fails if the folder is there: it is never empty
            sync_folder(self._path)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if self.exists():
                raise LocalError(f"{self.folder} exists already: this machine belongs to a swarm") from error
            raise LocalError(f"{self.folder} cannot be made: {error.strerror}; nothing was changed") from error

    # -------------------------------------------------------------------------------------------------------- reading

    def root(self) -> x509.Certificate:
        """Return the root certificate of the swarm."""
        return self._swarm()[0]

    def admitters(self) -> dict[PeerId, tuple[Endpoint, ...]]:
        """Return where admitters were last found."""
        return self._swarm()[1]

    def chain(self) -> tuple[bytes, ...]:
        """Return our certificate and its issuer's (DER, leaf first). Whether they are valid, the caller checks."""
        try:
            certificates = x509.load_pem_x509_certificates(self._read(CHAIN))
        except (ValueError, x509.InvalidVersion) as error:
            raise self.damaged(CHAIN, error) from error
        return tuple(certificate.public_bytes(Encoding.DER) for certificate in certificates)

    def news(self) -> SwarmNews:
        """Return the newest revocation list on this machine."""
        root = self.root()
        file = self._decode(_NEWS, _NewsFile)
        try:
            listed = revocations.parse(file.revocations, raw_public(root), swarm_id_of(root))
            _check_keys(listed, file.datagram_keys)
        except (PeerError, ValueError) as error:
            raise self.damaged(_NEWS, error) from error
        return SwarmNews(listed, file.revocations, tuple(file.datagram_keys))

    def root_key(self) -> Ed25519PrivateKey | None:
        """Return the root key, if it is on this machine."""
        file = self.folder / _ROOT_KEY
        try:
            key = read_private_key(file)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Fatal(f"{file} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise Fatal(f"{file} {error}: restore it, or move it away to go on without the root key") from error
        if key.public_key().public_bytes_raw() != raw_public(self.root()):
            raise Fatal(f"{file} is the root key of another swarm: restore it, or move it away to go on without it")
        return key

    def news_stamp(self) -> tuple[int, int] | None:
        """Return something that differs once the news have been replaced; None if they cannot be looked at."""
        try:
            status = (self.folder / _NEWS).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    def check(self) -> None:
        """Read everything once, so that a daemon does not start on what is damaged. Raises Fatal."""
        self.chain()
        self.news()
        self.root_key()
        self._uses()

    # -------------------------------------------------------------------------------------------------------- writing

    def save_chain(self, chain: Sequence[bytes]) -> None:
        """Replace our certificate."""
        with self.writing():
            self._replace(CHAIN, _encode_chain(chain))

    def remember_admitter(self, peer: PeerId, *addresses: Endpoint) -> None:
        """Remember where an admitter can be found, and forget the one that was remembered the longest time ago."""
        with self.writing():
            known = [(other, where) for other, where in self.admitters().items() if other != peer]
            kept = [(peer, addresses), *known][:_MAX_ADMITTERS]
            self._replace(_SWARM, _encode_swarm(self.root(), dict(kept)))

    def save_news(self, news: SwarmNews) -> None:
        """Replace the news. Only inside `writing`, by whoever has read them there."""
        self._replace(_NEWS, _encode_news(news))

    def exchange_news(self, known: SwarmNews) -> SwarmNews:
        """Return the newer of `known` and what is on disk, which is what lies there afterwards."""
        with self.writing():
            stored = self.news()
            if stored.revocations.seq >= known.revocations.seq:
                return stored
            self.save_news(known)
            return known

    def count_use(self, invite: Invite, peer: PeerId, now_s: float) -> bool:
        """Count `peer` among those who have used `invite`; when this returns, that is on disk. False: used up.

        Whoever asks twice, because the answer was lost on the way, is counted once.
        """
        with self.writing():
            uses = {nonce: use for nonce, use in self._uses().items() if use.not_after_s + _FORGET_S > now_s}
            use = uses.setdefault(invite.nonce.hex(), _Use(invite.not_after_s, []))
            if peer in use.peers:
                return True
            if len(use.peers) >= invite.uses:
                return False
            use.peers.append(peer)
            self._replace(_INVITES, msgspec.json.encode(uses))
            return True

    # ----------------------------------------------------------------------------------------------------- the files

    def _swarm(self) -> tuple[x509.Certificate, dict[PeerId, tuple[Endpoint, ...]]]:
        file = self._decode(_SWARM, _SwarmFile)
        try:
            root = read_certificate(file.root)
            read_root(file.root, swarm_id_of(root))
            admitters = {parse_peer(name): tuple(map(parse_endpoint, given)) for name, given in file.admitters.items()}
            if not all(admitters.values()):
                raise ValueError("an admitter has an address")
            return root, admitters
        except (PeerError, LocalError, ValueError) as error:
            raise self.damaged(_SWARM, error) from error

    def _uses(self) -> dict[str, _Use]:
        if not (self.folder / _INVITES).exists():
            return {}
        return self._decode(_INVITES, dict[str, _Use])

    def _decode(self, name: str, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(self._read(name), type=kind)
        except (ValueError, RecursionError) as error:  # msgspec's own errors are ValueErrors too
            raise self.damaged(name, error) from error

    def _read(self, name: str) -> bytes:
        try:
            with open(self.folder / name, "rb") as file:
                content = file.read(_MAX_FILE_BYTES + 1)
        except OSError as error:
            raise Fatal(f"{self.folder / name} cannot be read: {error.strerror}; {_ADVICE[name]}") from error
        if len(content) > _MAX_FILE_BYTES:
            raise ValueError(f"it is longer than {_MAX_FILE_BYTES >> 20} MiB")
        return content

    def _replace(self, name: str, content: bytes) -> None:
        try:
            replace_file(self.folder / name, content)
        except OSError as error:
            raise LocalError(f"{self.folder / name} cannot be written: {error.strerror}") from error

    def damaged(self, name: str, error: Exception) -> Fatal:
        """Return what to raise because the file `name` holds something impossible."""
        return Fatal(f"{self.folder / name} is damaged ({error}): {_ADVICE[name]}")


_START_ANEW = "restore it, or move the folder away and join again with a new invite"
_ADVICE = {
    _SWARM: _START_ANEW,
    CHAIN: _START_ANEW,
    _NEWS: _START_ANEW,
    _INVITES: "restore it, or remove it, and then invites that were used up may be used again until they expire",
}


def read_certificate(der: bytes) -> x509.Certificate:
    """Return the certificate in `der`. Raises PeerError."""
    try:
        return x509.load_der_x509_certificate(der)
    except (ValueError, x509.InvalidVersion) as error:
        raise PeerError(f"this is not a certificate: {error}") from error


def raw_public(certificate: x509.Certificate) -> bytes:
    """Return the 32 bytes of the ed25519 key of one of our own certificates."""
    key = certificate.public_key()
    assert isinstance(key, Ed25519PublicKey), "certificates of a swarm were checked when they were read"
    return key.public_bytes_raw()


def _encode_swarm(root: x509.Certificate, admitters: Mapping[PeerId, Sequence[Endpoint]]) -> bytes:
    named = {show_peer(peer): [str(address) for address in addresses] for peer, addresses in admitters.items()}
    return _json(_SwarmFile(root.public_bytes(Encoding.DER), named))


def _encode_chain(chain: Sequence[bytes]) -> bytes:
    return b"".join(x509.load_der_x509_certificate(each).public_bytes(Encoding.PEM) for each in chain)


def _encode_news(news: SwarmNews) -> bytes:
    return _json(_NewsFile(news.blob, list(news.keys)))


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value))


def _check_keys(listed: Revocations, keys: list[DatagramKey]) -> None:
    """Raise ValueError unless `keys` are what goes with the list."""
    if not keys or any(len(each.key) != DATAGRAM_KEY_BYTES for each in keys):
        raise ValueError(f"at least one datagram key of {DATAGRAM_KEY_BYTES} bytes expected")
    if key_digest(keys[0].key) != listed.key_digest:
        raise ValueError("the datagram key is not that of the revocation list")
    if [each.until_s is None for each in keys] != [True, *[False] * (len(keys) - 1)]:
        raise ValueError("every datagram key but the first has an end")
