"""A state directory that is full, read-only, or limited: daemons go on, and lose nothing that they had.

Strategy: the daemon lives in a mount namespace of its own, where its state directory is a small file system that the
test fills or makes read-only under it; the socket lies outside, so trainers and commands reach it as always. A limit on
the size of files does the same to a single process and needs no rights. What has to be written at a moment of our
choice is the port: the one of last time is taken, so that the daemon has to find another and remember it.
"""

import contextlib
import os
import resource
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import pytest
from conftest import Score
from e2e_swarm import ENVIRONMENT, MPD, DaemonProcess, Swarm, averagers, eventually, mpd, new_run, step_all

TMPFS = "size=64k"


class Namespace:
    """A mount namespace in which `folder` is a tmpfs of 64 KiB. Held open by a process that does nothing else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs -o {TMPFS} none '{folder}' && echo ready && read _"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout
        self.works = self._holder.stdout.readline() == "ready\n"
        self.prefix = ("nsenter", "--mount", f"--target={self._holder.pid}", "--")

    def run(self, script: str) -> str:
        """Run a shell script in the folder; return what it prints."""
        command = [*self.prefix, "sh", "-c", f"cd '{self._folder}' && {script}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def fill(self) -> None:
        """Leave no room for a byte."""
        self.run("cat /dev/zero > full 2> /dev/null || true")

    def contents(self) -> str:
        """Return what every file holds but the one that fills the disk, which has to be the only thing in the way."""
        return self.run("for f in $(find . -type f ! -name full | sort); do echo $f; base64 < $f; done")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._holder.communicate("end\n")


@pytest.fixture(scope="module")
def other(swarm: Swarm) -> DaemonProcess:
    return swarm.grow(1)[0]


@pytest.fixture
def daemon(swarm: Swarm, other: DaemonProcess) -> Iterator[DaemonProcess]:
    """A daemon that is not started yet, with the other one as its bootstrap."""
    daemon = swarm.new("--bootstrap", other.listen)
    yield daemon
    daemon.kill()


@pytest.fixture
def disk(daemon: DaemonProcess) -> Iterator[Namespace]:
    """The small disk under the daemon's state directory."""
    with Namespace(daemon.state_dir) as space:
        if not space.works:
            pytest.skip("this needs a mount namespace, which only root may make here")
        daemon.enter = space.prefix
        yield space
        daemon.kill()


@contextlib.contextmanager
def taken(listen: str) -> Iterator[None]:
    """Have the port of `listen` in use."""
    host, _, port = listen.rpartition(":")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, int(port)))
        sock.listen()
        yield


def assert_averages(daemon: DaemonProcess, other: DaemonProcess) -> None:
    vectors = [np.full(1000, 2.0**i, np.float32) for i in range(2)]
    with averagers([daemon, other], new_run(), vectors) as attached:
        assert all(step_all(attached))
    assert all((vector == 1.5).all() for vector in vectors)
    assert daemon.is_running()
    assert "Traceback" not in daemon.log()


def test_a_daemon_on_a_full_disk_goes_on_and_writes_when_there_is_room(
    daemon: DaemonProcess, other: DaemonProcess, disk: Namespace, score: Score
) -> None:
    daemon.start().wait_ready()
    peer, listen = daemon.peer, daemon.listen
    daemon.kill()
    disk.fill()
    before = disk.contents()
    with taken(listen):
        daemon.start().wait_ready()
    assert daemon.peer == peer
    assert daemon.listen != listen
    assert "cannot be written: No space left on device" in daemon.status()["problem"]
    assert "No space left on device" in mpd("status", "--socket", daemon.socket).stdout
    eventually(lambda: bool(daemon.status()["dht"]["peers"]), "it joins", daemon.log)
    assert_averages(daemon, other)
    assert disk.contents() == before
    disk.run("rm full")
    eventually(lambda: not daemon.status()["problem"], "what was owed is written", daemon.log)
    assert disk.run("cat port") == daemon.listen.rpartition(":")[2]
    assert not disk.run("find . -name '.new-*'")
    disk.fill()
    assert mpd("leave", "--socket", daemon.socket).returncode == 0
    assert daemon.wait() == 0
    assert "Traceback" not in daemon.log()
    daemon.start().wait_ready()
    assert daemon.peer == peer
    score(23, "full: no crash, old state intact, shown in status, written later", disk=TMPFS, works=True)


def test_a_daemon_whose_disk_becomes_read_only_goes_on(
    daemon: DaemonProcess, other: DaemonProcess, disk: Namespace, score: Score
) -> None:
    daemon.start().wait_ready()
    peer, listen = daemon.peer, daemon.listen
    before = disk.contents()
    # What is open stays writable, so the disk itself cannot be made read-only: lay a read-only view over it.
    view = f"mount --bind '{daemon.state_dir}' '{daemon.state_dir}' && mount -o remount,bind,ro '{daemon.state_dir}'"
    disk.run(view)
    eventually(lambda: bool(daemon.status()["dht"]["peers"]), "it joins", daemon.log)
    assert_averages(daemon, other)
    assert mpd("leave", "--socket", daemon.socket).returncode == 0  # it would save the peers that it knows
    assert daemon.wait() == 0
    assert "Read-only file system" in daemon.log()
    assert "Traceback" not in daemon.log()
    assert disk.contents() == before
    daemon.start()
    assert daemon.wait() == 1  # nothing can be locked there
    assert "cannot be used: Read-only file system; choose another with --state-dir" in daemon.log()
    disk.run(f"cd / && umount '{daemon.state_dir}'")
    daemon.start().wait_ready()
    assert (daemon.peer, daemon.listen) == (peer, listen)
    score(23, "read-only: no crash, old state intact, said at the start", disk=TMPFS, works=True)


def test_a_limit_on_files_is_outlived(daemon: DaemonProcess, other: DaemonProcess, score: Score) -> None:
    daemon.start().wait_ready()
    listen, peer = daemon.listen, daemon.peer
    daemon.kill()
    before = {file.name: file.read_bytes() for file in daemon.state_dir.iterdir()}
    with taken(listen):
        daemon.enter = ("prlimit", "--fsize=3:", "--")  # its log is over the limit as well, so it says nothing
        daemon.start().wait_ready()
    problem = daemon.status()["problem"]
    assert f"{daemon.state_dir} cannot be written: File too large" in problem
    assert {file.name: file.read_bytes() for file in daemon.state_dir.iterdir()} == before
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    eventually(lambda: not daemon.status()["problem"], "what was owed is written", daemon.log)
    assert (daemon.state_dir / "port").read_text() == daemon.listen.rpartition(":")[2]
    eventually(lambda: bool(daemon.status()["dht"]["peers"]), "it joins", daemon.log)
    assert_averages(daemon, other)
    assert daemon.peer == peer
    score(23, "RLIMIT_FSIZE: no crash, old state intact, shown in status, written later", works=True)


def test_a_first_start_without_room_for_a_key_says_so(swarm: Swarm) -> None:
    folder = swarm.home / "no room"
    command = ["prlimit", "--fsize=0:", "--", *MPD, "join", "--state-dir", str(folder), "--listen", "127.0.0.1:0"]
    done = subprocess.run(
        [*command, "--socket", str(swarm.home / "no.sock")],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"mpd: the key {folder}/key.pem cannot be read or made: File too large\n"
    assert sorted(os.listdir(folder)) == ["lock", "lock.files"]
