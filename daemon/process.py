"""What a daemon asks of the kernel about itself: that keys in its memory stay there, and what it holds."""

import contextlib
import ctypes
import os
import resource

_PR_SET_DUMPABLE = 4


def keep_memory_private() -> None:
    """No core dumps, and no other process of the same user reads our memory; debuggers need root from here on.

    A kernel that refuses leaves things as they were: the process still works, and its owner may have reasons.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def count_regions() -> int:
    """Return how many descriptors of shared memory this process holds."""
    regions = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            regions += os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")
    return regions


def count_held() -> dict[str, int]:
    """Return what this process holds of what may leak: resident bytes, descriptors, regions and threads."""
    with open("/proc/self/statm", "rb") as statm:
        resident_pages = int(statm.read().split()[1])
    return {
        "resident_bytes": resident_pages * resource.getpagesize(),
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,  # that of the listing itself
        "regions": count_regions(),
        "threads": len(os.listdir("/proc/self/task")),
    }
