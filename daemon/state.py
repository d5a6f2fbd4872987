"""What a daemon keeps on disk: its key, the port and address it had, and the lock that makes it the only one here.

Everything in the state directory may be lost without harm but the key, which is the peer's name, and the folder
`swarm/`, which `swarm_store.py` keeps. Files are replaced by renaming a complete new one, so a full disk or a crash
leaves the old state. One lock is held for the life of a daemon; commands run beside it, so whoever changes a file that
both change holds another lock for that moment.
"""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mpd.errors import Fatal, LocalError
from mpd.ids import Endpoint, PeerId, parse_endpoint, peer_id_of

_KEY = "key.pem"
_PORT = "port"
_ANNOUNCED = "announced"
_LOCK = "lock"
_WRITERS = "lock.files"
_WRITERS_TRIES = 200
_WRITERS_PAUSE_S = 0.05  # everybody needs that lock for milliseconds only
PEERS = "peers.json"


class StateDir:
    """The state directory at `path`; `open_state_dir` makes it. A command may use one that belongs to a daemon."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._owed: dict[str, str] = {}  # what could not be written, by name of its file
        self._failure = ""

    @property
    def problem(self) -> str:
        """What `mpd status` says while something could not be written; empty once it could."""
        if not self._owed:
            return ""
        return (
            f"the state directory {self.path} cannot be written: {self._failure}; what it holds is whole but out of "
            "date, and is written as soon as that works again"
        )

    def retry(self) -> None:
        """Try again to write what could not be written. Blocks for as long as the disk takes."""
        for name, text in list(self._owed.items()):
            self._remember(name, text)

    def load_key(self) -> Ed25519PrivateKey:
        """Return this machine's key, made at the first start. Raises Fatal if there is one that cannot be read."""
        file = self.path / _KEY
        try:
            if not file.exists():
                with writing(self.path):
                    if not file.exists():  # nobody else has made it meanwhile
                        replace_file(file, private_pem(Ed25519PrivateKey.generate()))
            return read_private_key(file)
        except OSError as error:
            raise Fatal(f"the key {file} cannot be read or made: {error.strerror}") from error
        except ValueError as error:
            raise Fatal(f"{file} {error}: restore it, or remove it to become a new peer") from error

    def last_port(self) -> int:
        """Return the port of the last start with port 0; 0 if there was none."""
        try:
            port = int((self.path / _PORT).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0
        return port if 0 < port < 65536 else 0

    def remember_port(self, port: int) -> None:
        """Try this port first next time."""
        self._remember(_PORT, str(port))

    def last_announced(self) -> Endpoint | None:
        """Return the address that others were told last."""
        try:
            endpoint = parse_endpoint((self.path / _ANNOUNCED).read_text(encoding="ascii"))
        except (OSError, ValueError, LocalError):
            return None
        return endpoint if endpoint.port else None

    def remember_announced(self, endpoint: Endpoint) -> None:
        """Keep the address that others are told, for invites that are made while the daemon is down."""
        self._remember(_ANNOUNCED, str(endpoint))

    def _remember(self, name: str, text: str) -> None:
        file = self.path / name
        try:
            with contextlib.suppress(FileNotFoundError, ValueError):
                if file.read_text(encoding="ascii") == text:
                    self._owed.pop(name, None)
                    return
            replace_file(file, text.encode("ascii"))
            self._owed.pop(name, None)
        except OSError as error:
            self._owed[name], self._failure = text, str(error.strerror)


@contextlib.contextmanager
def open_state_dir(path: Path) -> Iterator[StateDir]:
    """Make and lock the state directory for the length of the block. Raises Fatal with what stands in the way."""
    make_state_dir(path)
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fatal(
                f"another daemon uses the state directory {path}: stop it, or choose another with --state-dir"
            ) from None
        yield StateDir(path)
    finally:
        os.close(lock)


def make_state_dir(path: Path) -> StateDir:
    """Make the state directory if there is none, without locking it. Raises Fatal."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(path, error) from error
    return StateDir(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Be the only process that changes files below the state directory `path`, for one short block.

    Raises OSError if there can be no lock, and LocalError if another process does not let go of it.
    """
    lock = os.open(path / _WRITERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for _ in range(_WRITERS_TRIES):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(_WRITERS_PAUSE_S)
        else:
            raise LocalError(f"another process does not let go of {path / _WRITERS}: end it, then try again")
        yield
    finally:
        os.close(lock)


def replace_file(file: Path, content: bytes) -> None:
    """Make `content` what `file` holds, readable for its owner only. Whatever happens, it holds the old or the new.

    Raises OSError if the new may not last.
    """
    fd, fresh = tempfile.mkstemp(prefix=".new-", dir=file.parent)
    try:
        with os.fdopen(fd, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(fresh, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` last through a power cut. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_private_key(file: Path) -> Ed25519PrivateKey:
    """Return the ed25519 key in the PEM `file`. Raises OSError, or ValueError with what the file is instead."""
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm, InternalError) as error:
        raise ValueError("is not a private key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("is not an ed25519 key")
    return key


def private_pem(key: Ed25519PrivateKey) -> bytes:
    """Return `key` as PEM text, without a password."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def own_id(key: Ed25519PrivateKey) -> PeerId:
    """Return the id of the peer that holds `key`."""
    return peer_id_of(key.public_key().public_bytes_raw())


def _unusable(path: Path, error: OSError) -> Fatal:
    return Fatal(f"the state directory {path} cannot be used: {error.strerror}; choose another with --state-dir")
