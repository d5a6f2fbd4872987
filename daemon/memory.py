"""Memory that the daemon shares with its trainers, and memory that it keeps to itself.

Strategy: a region is a memfd, so it has no name, never shows up in /dev/shm and dies with its last holder. It is filled
with pages when it is made, because the first touch of memory costs ten times a copy and belongs to the attachment, not
to the first step. Then it is sealed. A trainer that could shrink it would end the daemon with SIGBUS; a trainer that
could write results would send peers bytes that differ from those which others already hold.
"""

import fcntl
import mmap
import os
import struct
from pathlib import Path

from mpd.control import OUT_HEADER_BYTES
from mpd.errors import LocalError

_FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_READ_ONLY_FOR_OTHERS = 0x10  # F_SEAL_FUTURE_WRITE (Linux 5.1): maps that exist stay writable, later ones are not
_GENERATION = struct.Struct("<Q")
_MIB = 1 << 20


class Region:
    """`n_bytes` of shared memory that a trainer may write: an in region or a snapshot.

    `fd` is what travels to the trainer, `view` the writable bytes. Raises LocalError if the machine has not that much.
    """

    _header_bytes = 0
    _seals = _FIXED_SIZE

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        total = self._header_bytes + n_bytes
        _ensure_available(total)
        self.fd = os.memfd_create("mpd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.fd, 0, total)
            self._map = mmap.mmap(self.fd, total, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, self._seals)
        except OSError as error:
            os.close(self.fd)
            raise LocalError(f"{_mib(total)} of shared memory could not be set up: {error.strerror}") from error
        self.view = memoryview(self._map)[self._header_bytes :]
        self._is_open = True

    def close(self) -> None:
        """Let go of the memory. Whoever still holds a view of it, here or in the trainer, keeps it alive until then."""
        if not self._is_open:
            return
        self._is_open = False
        os.close(self.fd)
        # Unmapping under a reader would be a crash: the mapping goes with the last view of it, which may be this one.
        del self._map
        self.view = memoryview(b"")


class OutRegion(Region):
    """A region that only the daemon can write, with a page in front that says which result it holds."""

    _header_bytes = OUT_HEADER_BYTES
    _seals = _FIXED_SIZE | _READ_ONLY_FOR_OTHERS

    def publish(self, generation: int) -> None:
        """Declare what `view` holds now to be result number `generation`. Call it after the last byte is written."""
        _GENERATION.pack_into(self._map, 0, generation)


def private(n_bytes: int) -> memoryview:
    """Return `n_bytes` of zeroed memory of our own, every page touched. Raises LocalError if there is too little."""
    _ensure_available(n_bytes)
    return memoryview(mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))


def _ensure_available(n_bytes: int) -> None:
    """Raise LocalError rather than let the kernel find out: what it does then is to kill a process of its choice."""
    available = _available_bytes()
    if n_bytes > available:
        raise LocalError(
            f"{_mib(n_bytes)} of memory are needed for these tensors, {_mib(available)} are available: "
            "average fewer tensors, or free memory on this machine"
        )


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise LocalError("/proc/meminfo does not tell how much memory is available: Linux 3.14 or newer is needed")


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / _MIB:.1f} MiB"
