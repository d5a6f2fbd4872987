"""What `mpd doctor` can see of this machine without asking anybody. Nothing is changed: what is written has no name.

Every function returns facts for mpd/doctor.py and raises nothing: what cannot be found out is a fact as well.
"""

import errno
import os
import resource
import socket
import stat
import sys
from pathlib import Path

from mpd.errors import Fatal, MpdError
from mpd.findings import Descriptors, Disk, Kernel, LocalSocket, Memory, Platform

from .budgets import RESERVED_DESCRIPTORS, WANTED_DESCRIPTORS, Budgets
from .clients import SEAT_DESCRIPTORS, ensure_safe
from .memory import why_no_sealing

_PROBE_BYTES = 4096
_LINK_DESCRIPTORS = 2  # control and data


def platform() -> Platform:
    """Return what this system offers."""
    return Platform(sys.version_info[:2], hasattr(socket, "SO_PEERCRED"), why_no_sealing())


def disk(path: Path) -> Disk:
    """Return how a state directory fares, or the place where it would be made."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    trouble, free_bytes, is_private = "", 0, True
    try:
        info, room = there.stat(), os.statvfs(there)
        free_bytes = room.f_bavail * room.f_frsize
        if not stat.S_ISDIR(info.st_mode):
            trouble = "it is not a folder" if there == path else f"{there} is not a folder"
        else:
            is_private = not info.st_mode & 0o077
            _try_to_write(there)
    except OSError as error:
        trouble = error.strerror or str(error)
    return Disk(str(path), there == path, trouble, free_bytes, is_private)


def _try_to_write(folder: Path) -> None:
    """Write a file that has no name and is gone when it is closed. Raises OSError if a named one would fail."""
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        if not os.access(folder, os.W_OK):  # a file system without nameless files
            raise OSError(errno.EACCES, os.strerror(errno.EACCES)) from None
        return
    try:
        os.write(fd, bytes(_PROBE_BYTES))
        os.fsync(fd)
    finally:
        os.close(fd)


def descriptors(budgets: Budgets, used: int = 0) -> Descriptors:
    """Return how many files a daemon may open. With `used`, this process is the daemon and has asked for them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    limit = soft if used else max(soft, WANTED_DESCRIPTORS if hard == unlimited else min(hard, WANTED_DESCRIPTORS))
    needed = (
        _LINK_DESCRIPTORS * budgets.links.limit
        + budgets.handshakes.limit
        + budgets.clients.limit
        + SEAT_DESCRIPTORS * budgets.trainers.limit
        + RESERVED_DESCRIPTORS
    )
    return Descriptors(limit, needed, used)


def local_socket(path: Path) -> LocalSocket:
    """Return whether a daemon could make its socket at `path`."""
    trouble = ""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        if folder == path.parent:
            ensure_safe(folder)
        if path.exists() and not path.is_socket():
            trouble = f"{path} is there and is no socket"
        elif not os.access(folder, os.W_OK | os.X_OK):
            trouble = f"nothing can be made in {folder}"
        elif len(os.fsencode(path)) > 107:
            trouble = f"{path} is too long for a socket: 107 bytes are allowed"
    except (OSError, Fatal) as error:
        trouble = str(error).partition(": choose")[0] if isinstance(error, MpdError) else f"{folder}: {error.strerror}"
    return LocalSocket(str(path), trouble)


def kernel(root: Path = Path("/proc/sys/net/ipv4")) -> Kernel:
    """Return how large TCP buffers may become."""

    def largest(name: str) -> int:
        try:
            return int((root / name).read_text(encoding="ascii").split()[2])
        except (OSError, ValueError, IndexError):
            return 0

    return Kernel(largest("tcp_rmem"), largest("tcp_wmem"))


def memory(held_bytes: int = 0, root: Path = Path("/")) -> Memory:
    """Return what memory is left for runs: to this process's control group, if that has a limit, or to the machine."""
    available_bytes = limit_bytes = 0
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available_bytes = int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        available_bytes = 1 << 62
    for limit_file, used_file in _group_files(root):
        try:
            limit = int(limit_file.read_text(encoding="ascii"))
            left = limit - int(used_file.read_text(encoding="ascii"))
        except (OSError, ValueError):  # "max": no limit at this level
            continue
        if 0 <= left < available_bytes:
            available_bytes, limit_bytes = left, limit
    return Memory(available_bytes, limit_bytes, held_bytes)


def _group_files(root: Path) -> list[tuple[Path, Path]]:
    """Return where the limit and the use of our control groups stand, from the innermost on (version 2, then 1)."""
    files = []
    top = root / "sys/fs/cgroup"
    try:
        own = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        own = []
    for line in own:
        _, controllers, path = line.split(":", 2)
        place = Path(path.lstrip("/"))
        if not controllers:
            places = [top / place, *(top / parent for parent in place.parents)]
            files += [(each / "memory.max", each / "memory.current") for each in places]
        elif "memory" in controllers.split(","):
            places = [top / "memory" / place, top / "memory"]
            files += [(each / "memory.limit_in_bytes", each / "memory.usage_in_bytes") for each in places]
    return files
