"""What end-to-end tests share: real daemons as processes, trainers as threads, and waiting for what they do.

Strategy: a `Swarm` owns a short temporary folder (a socket's path has room for 107 bytes) and every process that it
started, and ends them by pid on every way out. A daemon is there when its socket answers. Starting one costs most of a
second of processor time, so tests share a swarm per module and keep apart by the names of their runs; a daemon that a
test killed is started again on its socket and state directory, as its owner would do it.

Time is real here. `eventually` looks again every few milliseconds; its limits are for machines that are busy with
something else, and nothing waits that long when all is well.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt

from mpd.client import Averager, Daemon, Outcome, connect
from mpd.errors import DaemonUnavailable

T = TypeVar("T")
Array = npt.NDArray[Any]

PATIENCE_S = 20.0
LOOK_AGAIN_S = 0.01
STEP_S = 20.0  # the longest a step of these tests may take
MPD = [sys.executable, "-m", "mpd.cli"]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "MPD_SOCKET"},
    "PYTHONSAFEPATH": "1",  # the repository's root, if we stand there, would hide the installed mpd
    "COLUMNS": "200",  # tables with room for everything
}

_run_numbers = itertools.count()


class DaemonProcess:
    """One `mpd join`: its socket, its state directory and its log survive the process, which can be started again.

    `enter` is a command that runs the one behind it somewhere else, in the same process (`netns.Host.enter`).
    """

    def __init__(self, home: Path, name: str, *options: str, enter: Sequence[str] = ()) -> None:
        self.name = name
        self.enter = enter
        self.program: Sequence[str] = MPD
        self.socket = home / f"{name}.sock"
        self.state_dir = home / name
        self.options = options
        self.started_s = 0.0  # from the start of the process to the first answer on its socket
        self.peer = ""
        self.listen = ""
        self._log = home / f"{name}.log"
        self._orders = home / f"{name}.faults"
        self._marked = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, f"daemon {self.name} was never started"
        return self._process.pid

    def start(self) -> Self:
        """Start the process and return at once."""
        command = [
            *self.enter,
            *self.program,
            "join",
            "--socket",
            str(self.socket),
            "--state-dir",
            str(self.state_dir),
            *self.options,
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT)
        self._began = time.monotonic()
        return self

    def wait_ready(self, patience_s: float = PATIENCE_S) -> Self:
        """Return once the socket answers."""
        eventually(self._answers, f"daemon {self.name} answers", self.log, patience_s)
        status = self.status()
        self.peer, self.listen = status["peer_id"], status["listen"]
        return self

    def connect(self) -> Daemon:
        return connect(self.socket)

    def status(self) -> dict[str, Any]:
        return self.connect().status()

    def run_status(self, run: str) -> dict[str, Any] | None:
        """Return what the daemon says about `run`; None while it takes no part in it."""
        return next((each for each in self.status()["runs"] if each["name"] == run), None)

    def is_waiting(self, run: str) -> bool:
        """Return whether a step of `run` has begun and waits for others."""
        status = self.run_status(run)
        return status is not None and "waiting" in status["state"] and not status["state"].startswith("averaging")

    def memory_regions(self) -> int:
        """Return how many pieces of shared memory the process holds."""
        return int(self.status()["held"]["regions"])

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        """Return the exit code of a process that is about to end."""
        assert self._process is not None
        try:
            return self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"daemon {self.name} has not ended within {PATIENCE_S} s\n{self.log()}") from None

    def kill(self) -> None:
        """End the process as a power cut would."""
        if self.is_running():
            self.send(signal.SIGKILL)
            self.wait()

    def make_armable(self) -> None:
        """Have the process, which has not been started yet, read from a file what is to go wrong."""
        self._orders.touch()
        self.options = ("--fault", f"@{self._orders}", *self.options)

    def arm(self, spec: str) -> None:
        """Let the process, if it is armable, have these accidents from now on (see mpd.daemon.faults), or none."""
        new = self._orders.with_suffix(".new")
        new.write_text(spec)
        new.rename(self._orders)

    def log(self) -> str:
        """Return what the daemon has written since `mark_log`, for failure messages."""
        text = self._log.read_bytes()[self._marked :].decode() if self._log.exists() else ""
        return f"--- {self.name} ({self.peer[:8]}) ---\n{text}"

    def mark_log(self) -> None:
        """Leave out of `log` what is there now."""
        self._marked = self._log.stat().st_size if self._log.exists() else 0

    def _answers(self) -> bool:
        assert self.is_running(), f"the daemon has ended with exit code {self.wait()}\n{self.log()}"
        try:
            self.connect()
        except DaemonUnavailable:
            return False
        self.started_s = time.monotonic() - self._began
        return True


class Swarm:
    """Daemons on this machine. `new` makes one that knows nobody; `grow` makes several that join the first."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mpd-")
        self.home = Path(self._folder.name)
        self.daemons: list[DaemonProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for daemon in self.daemons:
            daemon.kill()
        self._folder.cleanup()

    def __getitem__(self, index: int) -> DaemonProcess:
        return self.daemons[index]

    def new(self, *options: str, enter: Sequence[str] = (), armable: bool = False) -> DaemonProcess:
        """Return a daemon that is not started yet; an `armable` one can be told later what goes wrong."""
        listen = () if "--listen" in options else ("--listen", "127.0.0.1:0")
        daemon = DaemonProcess(self.home, f"d{len(self.daemons)}", *listen, *options, enter=enter)
        if armable:
            daemon.make_armable()
        self.daemons.append(daemon)
        return daemon

    def grow(self, n: int, *options: str) -> list[DaemonProcess]:
        """Start `n` daemons that join through the first, which is one of them if there was none; wait for them."""
        if not self.daemons:
            self.new().start().wait_ready()
            return [self[0], *(self.grow(n - 1, *options) if n > 1 else [])]
        started = [self.new("--bootstrap", self[0].listen, *options).start() for _ in range(n)]
        for daemon in started:
            daemon.wait_ready()
        eventually(lambda: all(d.status()["dht"]["peers"] for d in started), "new daemons find another", self.log)
        return started

    def revive(self) -> None:
        """Start again whatever does not run."""
        dead = [daemon for daemon in self.daemons if not daemon.is_running()]
        for daemon in dead:
            daemon.start()
        for daemon in dead:
            daemon.wait_ready()

    def log(self) -> str:
        """Return what all daemons have written since the last `mark_logs`, for failure messages."""
        return "\n".join(daemon.log() for daemon in self.daemons)


def mpd(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run one `mpd` command to its end."""
    command = [*MPD, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=PATIENCE_S, check=False)


def mpd_json(*arguments: object) -> Any:
    """Return what a successful `mpd` command prints as JSON."""
    done = mpd(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def new_run() -> str:
    """Return a name that no other test uses."""
    return f"run {next(_run_numbers)}"


def eventually(
    holds: Callable[[], bool], what: str, context: Callable[[], str] = str, patience_s: float = PATIENCE_S
) -> None:
    """Return as soon as `holds()` is true; fail with `what` and the `context` if it stays false for too long."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"never came true within {patience_s} s: {what}\n{context()}"
        time.sleep(LOOK_AGAIN_S)


class Background(Generic[T]):
    """A thread that runs `job` and keeps its result for `join`."""

    def __init__(self, job: Callable[[], T]) -> None:
        pool = ThreadPoolExecutor(1)
        self._future = pool.submit(job)
        pool.shutdown(wait=False)

    def is_done(self) -> bool:
        return self._future.done()

    def join(self, patience_s: float | None = 2 * STEP_S) -> T:
        """Return the result, or raise what the job raised."""
        return self._future.result(patience_s)

    def wait(self) -> T:
        """Like `join`, for as long as it takes."""
        return self._future.result()


@contextlib.contextmanager
def averagers(
    daemons: Sequence[DaemonProcess], run: str, vectors: Sequence[Any], **terms: Any
) -> Iterator[list[Averager]]:
    """Attach a trainer with one of the `vectors` (an array, or tensors by name) to each of the `daemons`."""
    with contextlib.ExitStack() as stack:
        attached = []
        for daemon, vector in zip(daemons, vectors, strict=True):
            tensors = vector if isinstance(vector, dict) else {"x": vector}
            attached.append(stack.enter_context(daemon.connect().averager(run, tensors, **terms)))
        yield attached


def start_step(averager: Averager, weight: float = 1.0, timeout: float = STEP_S) -> Background[Outcome]:
    """Begin a step in a thread."""
    return Background(lambda: averager.step(weight, timeout))


def step_all(
    attached: Sequence[Averager], weights: Sequence[float] | None = None, timeout: float = STEP_S
) -> list[Outcome]:
    """Step all averagers at once; return their outcomes in order, or raise what one of them raised."""
    weighted = zip(attached, weights or [1.0] * len(attached), strict=True)
    steps = [start_step(averager, weight, timeout) for averager, weight in weighted]
    return [step.join() for step in steps]


def moved_bytes(daemon: DaemonProcess) -> int:
    """Return how many bytes of tensors have passed between the daemon and those that it is linked to."""
    return sum(link["bytes_sent"] + link["bytes_received"] for link in daemon.connect().peers())


def wait_for_moved_bytes(daemon: DaemonProcess, goal: float) -> None:
    """Return as soon as `moved_bytes` has reached `goal`."""
    eventually(lambda: moved_bytes(daemon) >= goal, f"daemon {daemon.name} moves bytes", daemon.log)


def wait_for_company(daemons: Sequence[DaemonProcess], run: str, n_peers: int | None = None) -> None:
    """Return once each of the `daemons` knows its whole line in `run`, so that their next step meets it."""
    expected = len(daemons) if n_peers is None else n_peers

    def is_settled() -> bool:
        states = [daemon.run_status(run) for daemon in daemons]
        return all(state is not None and state["shape"] and state["peers"] == expected for state in states)

    eventually(is_settled, f"{expected} peers meet in {run!r}", lambda: f"{[d.run_status(run) for d in daemons]}")


def contributors_of(vector: Array, n: int) -> list[frozenset[int]]:
    """Return the sets of peers whose means the elements are, one for each stretch of equal elements."""
    starts = np.concatenate([[0], np.flatnonzero(vector[1:] != vector[:-1]) + 1])
    subsets = [frozenset(s) for size in range(1, n + 1) for s in itertools.combinations(range(n), size)]
    means = np.array([sum(2.0**i for i in subset) / len(subset) for subset in subsets])
    found = []
    for value in vector[starts]:
        nearest = int(np.argmin(np.abs(means - value)))
        assert abs(means[nearest] - value) < 1e-6 * value, f"{value} is the mean of nobody"
        found.append(subsets[nearest])
    return found
