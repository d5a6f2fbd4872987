"""Memory that the daemon shares with its trainers, and memory that it keeps to itself.

Strategy: a region is a memfd, so it has no name, never shows up in /dev/shm and dies with its last holder. It is
sealed. A trainer that could shrink it would end the daemon with SIGBUS; a trainer that could write results would send
peers bytes that differ from those which others already hold.

Memory gets its pages when it is made, because the first touch costs ten times a copy and belongs to the attachment, not
to the first step. That takes most of a second per GiB, so it happens slice by slice in another thread, by calls that
let go of the interpreter: other runs do not notice, and whoever no longer wants the memory waits for one slice at most.
To give pages back takes a fifth of that, and has a thread as well.
"""

import fcntl
import mmap
import os
import struct
import threading
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import trio

from mpd.control import OUT_HEADER_BYTES
from mpd.errors import LocalError

_FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_READ_ONLY_FOR_OTHERS = 0x10  # F_SEAL_FUTURE_WRITE (Linux 5.1): maps that exist stay writable, later ones are not
_GENERATION = struct.Struct("<Q")
_MIB = 1 << 20
_SLICE_BYTES = 64 * _MIB  # 40 ms: long enough that handing it to a thread costs nothing
_INLINE_BYTES = 1 * _MIB  # 1 ms: not worth a thread


class Region:
    """`n_bytes` of shared memory that a trainer may write: an in region or a snapshot.

    `fd` is what travels to the trainer, `view` the writable bytes. Pages come with the first touch; `make` returns a
    region that has them. Raises LocalError if the machine has not that much.
    """

    _header_bytes = 0
    _seals = _FIXED_SIZE

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        total = self._header_bytes + n_bytes
        _ensure_available(total)
        try:
            self.fd = os.memfd_create("mpd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(self.fd, total)
                self._map = mmap.mmap(self.fd, total)
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, self._seals)
            except OSError:
                os.close(self.fd)
                raise
        except OSError as error:
            raise _not_set_up(total, error) from error
        self.view = memoryview(self._map)[self._header_bytes :]
        self._is_open = True

    @classmethod
    async def make(cls, n_bytes: int) -> Self:
        """Return a region whose pages are all there. Raises LocalError. Cancelled: nothing is left of it."""
        region = cls(n_bytes)
        try:
            await _fill(region._map, region.fd)
        except BaseException:
            region.close()
            raise
        return region

    def close(self) -> None:
        """Let go of the memory. Whoever still holds a view of it, here or in the trainer, keeps it alive until then."""
        if not self._is_open:
            return
        self._is_open = False
        # Unmapping under a reader would be a crash: the mapping goes with the last view of it, which may be this one.
        self.view, views = memoryview(b""), [self.view]
        del self._map
        give_up(views, self.fd)


class OutRegion(Region):
    """A region that only the daemon can write, with a page in front that says which result it holds."""

    _header_bytes = OUT_HEADER_BYTES
    _seals = _FIXED_SIZE | _READ_ONLY_FOR_OTHERS

    @property
    def generation(self) -> int:
        """The number of the result that `view` holds."""
        return int(_GENERATION.unpack_from(self._map)[0])

    def publish(self, generation: int) -> None:
        """Declare what `view` holds now to be result number `generation`. Call it after the last byte is written."""
        _GENERATION.pack_into(self._map, 0, generation)


def why_no_sealing() -> str:
    """Return why this system cannot make regions that trainers cannot harm, or nothing."""
    try:
        OutRegion(mmap.PAGESIZE).close()
    except LocalError as error:
        return str(error)
    except (AttributeError, OSError) as error:
        return str(error)
    return ""


async def private(n_bytes: int) -> memoryview:
    """Return `n_bytes` of zeroed memory of our own, every page touched. Raises LocalError if there is too little."""
    _ensure_available(n_bytes)
    try:
        pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _not_set_up(n_bytes, error) from error
    await _fill(pages)
    return memoryview(pages)


def give_up(views: list[memoryview], fd: int | None = None) -> None:
    """Free the memory of which these were the last views, and then close its file `fd`; large ones in a thread.

    In this order, because it is who comes last that gives the pages back, and only to close lets go of the interpreter.
    """

    def free() -> None:
        views.clear()
        if fd is not None:
            os.close(fd)

    if sum(view.nbytes for view in views) <= _INLINE_BYTES:
        free()
    else:
        threading.Thread(target=free, daemon=True).start()


async def _fill(zeros: mmap.mmap, fd: int | None = None) -> None:
    """Touch every page of `zeros`, which maps the file `fd` if there is one. Raises LocalError."""
    n_bytes = len(zeros)
    values = np.frombuffer(zeros, np.uint8)
    await trio.lowlevel.checkpoint()
    for begin in range(0, n_bytes, _SLICE_BYTES):
        end = min(begin + _SLICE_BYTES, n_bytes)
        _ensure_available(n_bytes - begin)  # again and again: others fill theirs meanwhile
        try:
            if n_bytes <= _INLINE_BYTES:
                _fill_slice(values, begin, end, fd)
            else:
                await trio.to_thread.run_sync(_fill_slice, values, begin, end, fd)
        except OSError as error:
            raise _not_set_up(n_bytes, error) from error


def _fill_slice(values: npt.NDArray[Any], begin: int, end: int, fd: int | None) -> None:
    if fd is not None:
        os.posix_fallocate(fd, begin, end - begin)  # twice as fast as faults, and an error where those would be SIGBUS
    values[begin : end : mmap.PAGESIZE] = 0


def _not_set_up(n_bytes: int, error: OSError) -> LocalError:
    return LocalError(f"{_mib(n_bytes)} of memory could not be set up: {error.strerror}")


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
