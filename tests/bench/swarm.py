"""Start daemons and peers as processes, talk to them, and leave none behind.

Every process enters the list of `children()` as soon as it exists: whatever goes wrong, each gets a moment to end by
itself and is then killed together with its own children. Logs lie in the swarm's folder and are quoted in errors.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpd.client import connect
from mpd.errors import DaemonUnavailable

HERE = Path(__file__).parent
MPD = Path(sys.executable).with_name("mpd")
STOP_S = 10.0
START_S = 120.0
ANSWER_S = 180.0


class BenchError(Exception):
    """A benchmark cannot go on; the message says which process failed and how."""


class Child:
    """A process with its errors in a log file and a JSON conversation over its standard streams; joins `started`."""

    def __init__(self, name: str, command: Sequence[str | Path], folder: Path, started: "list[Child]") -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("w") as log:
            # A session of its own: Ctrl+C is ours to handle, and one signal reaches the child's children too.
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        started.append(self)
        self.pid = self._process.pid
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def say(self, command: dict[str, Any]) -> None:
        """Send one command."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BenchError(f"{self.name} ended: {self.last_words()}") from None

    def hear(self, limit_s: float) -> dict[str, Any]:
        """Return the next answer."""
        try:
            line = self._answers.get(timeout=limit_s)
        except queue.Empty:
            raise BenchError(f"{self.name} did not answer within {limit_s:.0f} s: {self.last_words()}") from None
        if not line:
            raise BenchError(f"{self.name} ended: {self.last_words()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def check(self) -> None:
        """Raise BenchError if the process has ended."""
        if self._process.poll() is not None:
            raise BenchError(f"{self.name} ended: {self.last_words()}")

    def last_words(self) -> str:
        """Return the end of the log."""
        return " | ".join(self._log.read_text().strip().splitlines()[-3:]) or "its log is empty"

    def interrupt(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Signal the process and its children, if there are any left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def reap(self, limit_s: float) -> None:
        """Wait for the process to end, then kill what is left of it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, limit_s))
        self.interrupt(signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def children() -> Iterator[list[Child]]:
    """Yield a list; every process that is in it at the end is stopped."""
    started: list[Child] = []
    try:
        yield started
    finally:
        for child in started:
            child.interrupt()
        deadline = time.monotonic() + STOP_S
        for child in started:
            child.reap(deadline - time.monotonic())


# ---- daemons


@dataclass(frozen=True)
class Daemon:
    """A running daemon; `started_s` is the time from exec to its first answer."""

    child: Child
    socket: Path
    started_s: float

    def status(self) -> dict[str, Any]:
        """Return what `mpd status --json` shows."""
        status: dict[str, Any] = connect(self.socket).status()
        return status


@dataclass(frozen=True)
class Place:
    """Where a process runs: `enter` is what to put in front of its command, `host` the address it has there."""

    enter: tuple[str, ...] = ()
    host: str = "127.0.0.1"


LOOPBACK = Place()


def start_daemon(folder: Path, index: int, started: list[Child], *options: str, place: Place = LOOPBACK) -> Daemon:
    """Start one daemon with more `options` of `mpd join`, and wait for its first answer."""
    return answering(launch(folder, index, started, *options, place=place))


def launch(folder: Path, index: int, started: list[Child], *options: str, place: Place) -> tuple[Child, Path, float]:
    """Start one daemon and return at once: its process, its socket, and when that was."""
    path = folder / f"{index}.sock"
    command: list[str | Path] = [*place.enter, MPD, "join", "--listen", f"{place.host}:0", "--socket", path]
    command += ["--state-dir", folder / f"state{index}", *options]
    began = time.monotonic()
    return Child(f"daemon{index}", command, folder, started), path, began


def answering(launched: tuple[Child, Path, float]) -> Daemon:
    """Wait for the first answer of a daemon that has just been started."""
    child, path, began = launched
    while True:
        try:
            connect(path).status()
            return Daemon(child, path, time.monotonic() - began)
        except DaemonUnavailable:
            child.check()
            if time.monotonic() - began > START_S:
                raise BenchError(f"{child.name} does not answer: {child.last_words()}") from None
            time.sleep(0.002)


def start_daemons(
    folder: Path, n: int, started: list[Child], *options: str, places: Sequence[Place] = ()
) -> list[Daemon]:
    """Start `n` daemons, each bootstrapped from the first, and wait until every one knows another."""
    where = list(places) or [LOOPBACK] * n
    first = start_daemon(folder, 0, started, *options, place=where[0])
    options = ("--bootstrap", first.status()["listen"], *options)
    launched = [launch(folder, i, started, *options, place=where[i]) for i in range(1, n)]
    daemons = [first, *map(answering, launched)]
    deadline = time.monotonic() + START_S
    while n > 1 and not all(daemon.status()["dht"]["peers"] for daemon in daemons):
        if time.monotonic() > deadline:
            raise BenchError(f"{n} daemons do not find each other within {START_S:.0f} s")
        time.sleep(0.1)
    return daemons


# ---- peers


class Peers:
    """The peers of one system under test, spoken to all at once. `sessions` are those of all its processes."""

    def __init__(self, peers: list[Child], daemons: Sequence[Daemon] = ()) -> None:
        self.daemon_sessions = {daemon.child.pid for daemon in daemons}
        self.sessions = {child.pid for child in peers} | self.daemon_sessions
        self._peers = peers

    def __len__(self) -> int:
        return len(self._peers)

    def ask(self, do: str, limit_s: float = ANSWER_S, **command: Any) -> list[dict[str, Any]]:
        """Send the same command to every peer and return their answers; a list in `command` has one item per peer."""
        for index, peer in enumerate(self._peers):
            own = {name: value[index] if isinstance(value, list) else value for name, value in command.items()}
            peer.say({"do": do, **own})
        return self.hear(limit_s)

    def hear(self, limit_s: float) -> list[dict[str, Any]]:
        """Return every peer's next answer."""
        return [peer.hear(limit_s) for peer in self._peers]


def start_mpd(folder: Path, n: int, started: list[Child], *options: str, places: Sequence[Place] = ()) -> Peers:
    """Start `n` daemons, with more `options` of `mpd join`, and one trainer each."""
    folder.mkdir(exist_ok=True)
    return trainers(folder, start_daemons(folder, n, started, *options, places=places), started)


def trainers(folder: Path, daemons: Sequence[Daemon], started: list[Child]) -> Peers:
    """Start one trainer for each of the `daemons`."""
    command: list[str | Path] = [sys.executable, HERE / "mpd_peer.py"]
    peers = [Child(f"mpd{i}", [*command, daemon.socket], folder, started) for i, daemon in enumerate(daemons)]
    return ready(Peers(peers, daemons))


def start_gloo(folder: Path, n: int, started: list[Child], place: Place = LOOPBACK) -> Peers:
    """Start the `n` ranks of a Gloo world, all of them at `place`."""
    command: list[str | Path] = [*place.enter, sys.executable, HERE / "gloo_peer.py"]
    meet = folder / "gloo"
    return ready(Peers([Child(f"gloo{i}", [*command, str(i), str(n), meet], folder, started) for i in range(n)]))


def start_floor(folder: Path, n: int, started: list[Child]) -> Peers:
    """Start the `n` peers that do the least there is to do."""
    command: list[str | Path] = [sys.executable, HERE / "floor_peer.py"]
    return ready(Peers([Child(f"floor{i}", [*command, str(i), str(n), folder], folder, started) for i in range(n)]))


def start_hivemind(python: Path, folder: Path, n: int, started: list[Child]) -> Peers:
    """Start `n` peers of hivemind with the interpreter `python`."""
    command: list[str | Path] = [python, HERE / "hivemind_peer.py"]
    first = Child("hivemind0", command, folder, started)
    address = first.hear(START_S)["address"]
    others = [Child(f"hivemind{index}", [*command, *address], folder, started) for index in range(1, n)]
    ready(Peers(others))
    return Peers([first, *others])


def ready(peers: Peers) -> Peers:
    """Wait for every peer's greeting."""
    peers.hear(START_S)
    return peers
