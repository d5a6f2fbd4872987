"""What the daemon's process asks of the kernel; tried in a child, because it cannot be taken back."""

import os
import resource
import subprocess
import sys
import threading

import pytest

from mpd.daemon.process import count_held, count_regions

CHILD = """
import sys
from mpd.daemon.process import keep_memory_private
keep_memory_private()
print("private", flush=True)
sys.stdin.read()
"""


def test_memory_stays_private() -> None:
    with subprocess.Popen([sys.executable, "-I", "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"private\n"
        assert resource.prlimit(child.pid, resource.RLIMIT_CORE)[0] == 0
        assert os.stat(f"/proc/{child.pid}/mem").st_uid == 0, "other processes of this user could read it"
        child.communicate()


def test_regions_are_counted() -> None:
    before, held = count_regions(), count_held()
    fds = [os.memfd_create("mpd"), os.memfd_create("mpd")]
    try:
        assert count_regions() == before + 2
        assert count_held()["regions"] == before + 2
        assert count_held()["descriptors"] == held["descriptors"] + 2
    finally:
        for fd in fds:
            os.close(fd)
    assert count_regions() == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fds[0])


def test_threads_and_memory_are_counted() -> None:
    before, gate = count_held(), threading.Event()
    thread = threading.Thread(target=gate.wait)
    thread.start()
    block = bytearray(b"x") * (64 << 20)
    held = count_held()
    gate.set()
    thread.join()
    assert held["threads"] == before["threads"] + 1
    assert held["resident_bytes"] - before["resident_bytes"] > len(block) // 2
