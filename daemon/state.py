"""What a daemon keeps on disk: its key, the port it had, and the lock that makes it the only one here.

Everything in the state directory may be lost without harm but the key, which is the peer's name. Files are replaced by
renaming a complete new one, so a full disk or a crash leaves the old state.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mpd.errors import Fatal
from mpd.ids import PeerId, peer_id_of

_KEY = "key.pem"
_PORT = "port"
_LOCK = "lock"
PEERS = "peers.json"


class StateDir:
    """The state directory at `path`; made by `open_state_dir`, valid inside its block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""  # what could not be written, for `mpd status`

    def load_key(self) -> Ed25519PrivateKey:
        """Return this machine's key, made at the first start. Raises Fatal if there is one that cannot be read."""
        file = self.path / _KEY
        try:
            if not file.exists():
                self._replace(file, _new_key())
            key = serialization.load_pem_private_key(file.read_bytes(), password=None)
        except OSError as error:
            raise Fatal(f"the key {file} cannot be read or made: {error.strerror}") from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise Fatal(f"{file} is not a private key: restore it, or remove it to become a new peer") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise Fatal(f"{file} is not an ed25519 key: restore it, or remove it to become a new peer")
        return key

    def last_port(self) -> int:
        """Return the port of the last start with port 0; 0 if there was none."""
        try:
            port = int((self.path / _PORT).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0
        return port if 0 < port < 65536 else 0

    def remember_port(self, port: int) -> None:
        """Try this port first next time."""
        try:
            self._replace(self.path / _PORT, str(port).encode("ascii"))
        except OSError as error:
            self.problem = f"the state directory {self.path} cannot be written: {error.strerror}"

    def _replace(self, file: Path, content: bytes) -> None:
        fresh = file.with_suffix(".new")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(fresh, file)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise


@contextlib.contextmanager
def open_state_dir(path: Path) -> Iterator[StateDir]:
    """Make and lock the state directory for the length of the block. Raises Fatal with what stands in the way."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Fatal(
            f"the state directory {path} cannot be used: {error.strerror}; choose another with --state-dir"
        ) from error
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


def own_id(key: Ed25519PrivateKey) -> PeerId:
    """Return the id of the peer that holds `key`."""
    return peer_id_of(key.public_key().public_bytes_raw())


def _new_key() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
