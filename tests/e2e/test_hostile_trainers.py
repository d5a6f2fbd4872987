"""Trainers that lie, flood, scribble and die, beside two honest ones whose steps go on.

Strategy: two daemons average for an honest trainer each, all the time. A hostile process talks to the first daemon over
its socket, byte by byte where it must. In the end the same daemon still runs, it holds as many descriptors as before,
and every step of the honest ones averaged, to the right value.
"""

import array
import contextlib
import mmap
import os
import random
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from e2e_swarm import (
    ENVIRONMENT,
    PATIENCE_S,
    DaemonProcess,
    Swarm,
    averagers,
    eventually,
    mpd,
    mpd_json,
    new_run,
    start_step,
    step_all,
    wait_for_company,
)

from mpd import control
from mpd.errors import DaemonUnavailable, LocalError
from mpd.layout import TensorSpec

Record = Callable[[str, object], None]

SOAK = bool(os.environ.get("MPD_SOAK"))
N_TRIES = 1000 if SOAK else 20
N_LIES = 100
N_FLOODS = 10_000 if SOAK else 200
N_CONNECTIONS = 5000 if SOAK else 500
N_DEATHS = 1000 if SOAK else 20
N_STARTS = 100 if SOAK else 3
N_ELEMS = 1000
BIG_ELEMS = 16 << 20
SOON_S = 0.1
STALL_S = 2.0  # for an honest step of 10 ms, on a machine that is busy with something else
NOBODY = 65534

pytestmark = pytest.mark.timeout(3600 if SOAK else 60)


class Hostile:
    """A connection to a daemon's socket that says whatever it is told to."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(daemon.socket))  # may wait for its turn, which a socket with a timeout would not
        self.sock.settimeout(PATIENCE_S)
        self.fds: list[int] = []

    def say(self, message: object) -> None:
        self.sock.sendall(control.pack(message))

    def hear(self) -> Any:
        """Return the next message, or None at the end."""
        prefix = self._read(control.PREFIX_BYTES)
        body = self._read(control.body_length(prefix)) if prefix else None
        return control.LOCAL.decode(body) if body else None

    def ask(self, message: object) -> Any:
        self.say(message)
        return self.hear()

    def greet(self) -> Self:
        assert isinstance(self.ask(control.Hello(control.CONTROL_VERSION, "hostile")), control.Welcome)
        return self

    def attach(self, run: str, n_elems: int = N_ELEMS) -> Self:
        answer = self.greet().ask(attach_of(run, TensorSpec("x", "float32", (n_elems,))))
        assert isinstance(answer, control.Attached), answer
        assert len(self.fds) == 2
        return self

    def close(self) -> None:
        self.sock.close()
        while self.fds:
            os.close(self.fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, n_bytes: int) -> bytes:
        data = b""
        while len(data) < n_bytes:
            part, beside, _, _ = self.sock.recvmsg(n_bytes - len(data), 64)
            for _, _, raw in beside:
                self.fds += array.array("i", raw)
            if not part:
                return b""
            data += part
        return data


def attach_of(run: str, *specs: TensorSpec) -> control.Attach:
    return control.Attach(run, specs, 16, 1, "raw", "mean")


def open_descriptors(daemon: DaemonProcess) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def shared_bytes(daemon: DaemonProcess) -> int:
    """Return the size of all shared memory that the process has mapped."""
    lines = Path(f"/proc/{daemon.pid}/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if "/memfd:mpd" in line]
    return sum(int(end, 16) - int(begin, 16) for begin, end in spans)


@pytest.fixture(scope="module")
def pair(swarm: Swarm) -> list[DaemonProcess]:
    return swarm.grow(2)


class Honest:
    """Two trainers that average without a pause. `steps` are the durations so far, `wrong` what should not be."""

    def __init__(self, pair: list[DaemonProcess]) -> None:
        self.steps: list[float] = []
        self.wrong: list[str] = []
        self._pair = pair
        self._run = new_run()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._train)

    def go_on(self, n: int = 3) -> None:
        """Return after `n` more steps."""
        goal = len(self.steps) + n
        eventually(lambda: len(self.steps) >= goal or bool(self.wrong), "the honest ones go on")
        assert not self.wrong

    def __enter__(self) -> Self:
        self._thread.start()
        self.go_on()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _train(self) -> None:
        vectors = [np.empty(N_ELEMS, np.float32) for _ in self._pair]
        try:
            with averagers(self._pair, self._run, vectors) as attached:
                wait_for_company(self._pair, self._run)
                while not self._end.is_set():
                    for value, vector in enumerate(vectors):
                        vector[:] = 2 * value + 1
                    began = time.monotonic()
                    outcomes = step_all(attached)
                    if not all(outcomes) or any((vector != 2.0).any() for vector in vectors):
                        self.wrong.append(f"{outcomes}")
                    self.steps.append(time.monotonic() - began)
        except (LocalError, DaemonUnavailable, AssertionError) as error:
            self.wrong.append(repr(error))


@pytest.fixture
def victim(pair: list[DaemonProcess]) -> Iterator[DaemonProcess]:
    """A daemon that the test may be hostile to; what every such test expects is checked in the end."""
    victim = pair[0]
    eventually(lambda: not victim.status()["runs"], "other tests have gone", victim.log)
    names = set(os.listdir("/dev/shm"))
    with Honest(pair) as honest:
        pid, descriptors = victim.pid, open_descriptors(victim)
        n_before = len(honest.steps)
        yield victim
        honest.go_on()
        assert victim.is_running()
        assert victim.pid == pid
        eventually(lambda: open_descriptors(victim) <= descriptors, "descriptors come back", victim.log)
        assert victim.status()["version"]
    assert not honest.wrong
    assert set(os.listdir("/dev/shm")) == names
    assert max(honest.steps[n_before:]) < STALL_S


# -------------------------------------------------------------------------------------------------------- who and where


if os.geteuid() == 0:  # only root can be somebody else

    def test_another_user_is_refused_before_a_byte_is_read(victim: DaemonProcess) -> None:
        assert call_as_nobody(victim.socket) == "PermissionError"  # file modes keep them out
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (victim.socket.parent, victim.socket)}
        try:
            for path in modes:
                path.chmod(0o777)
            assert call_as_nobody(victim.socket) == "closed"  # and so do credentials, without a word
        finally:
            for path, mode in modes.items():
                path.chmod(mode)


def call_as_nobody(path: Path) -> str:
    """Say hello at `path` as another user, in a child; return what comes of it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setuid(NOBODY)
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(str(path))
                    with contextlib.suppress(BrokenPipeError):
                        sock.sendall(control.pack(control.Hello(control.CONTROL_VERSION)))
                    with contextlib.suppress(ConnectionResetError):
                        theirs.sendall(sock.recv(1))
                    theirs.sendall(b"closed")
            except OSError as error:
                theirs.sendall(type(error).__name__.encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        return ours.recv(100).decode()


def test_a_daemon_starts_over_what_a_killed_one_left(swarm: Swarm, pair: list[DaemonProcess]) -> None:
    daemon = swarm.new()
    for _ in range(N_STARTS):
        daemon.start().wait_ready()
        daemon.kill()
        assert daemon.socket.is_socket()
    daemon.start().wait_ready()
    assert mpd("leave", "--socket", daemon.socket).returncode == 0
    assert daemon.wait() == 0
    assert not daemon.socket.exists()


def test_of_two_daemons_that_start_at_once_one_wins(swarm: Swarm, pair: list[DaemonProcess]) -> None:
    for _ in range(N_STARTS):
        one = swarm.new()
        other = swarm.new()
        other.socket = one.socket
        both = [one.start(), other.start()]
        eventually(lambda both=both: not all(d.is_running() for d in both), "one gives up")  # type: ignore[misc]
        (winner,) = [d for d in both if d.is_running()]
        (loser,) = [d for d in both if not d.is_running()]
        assert loser.wait() != 0
        assert "already serves" in loser.log()
        winner.wait_ready()
        winner.kill()


# -------------------------------------------------------------------------------------------------------- shared memory


def test_no_region_can_be_cut_or_grown_under_the_daemon(victim: DaemonProcess, pair: list[DaemonProcess]) -> None:
    run = new_run()
    with Hostile(victim).attach(run) as hostile:
        chance = random.Random(0)
        for _ in range(N_TRIES):
            for fd in hostile.fds:
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, chance.choice([0, 1, N_ELEMS * 4 - 1, 1 << 20]))
        with pytest.raises(PermissionError):
            os.pwrite(hostile.fds[1], b"x", 0)
        with averagers(pair[1:], run, [np.ones(N_ELEMS, np.float32)]) as (far,):
            step = start_step(far)
            eventually(lambda: pair[1].is_waiting(run) or step.is_done(), "the other one waits")
            os.posix_fallocate(hostile.fds[0], 0, 1)
            with mmap.mmap(hostile.fds[0], N_ELEMS * 4) as region:
                region.madvise(mmap.MADV_REMOVE)  # a hole: its values are zeros now
            assert hostile.ask(control.Step(1, 1.0, 20.0)).averaged
            assert step.join()


def test_sizes_that_cannot_be_are_refused(victim: DaemonProcess) -> None:
    chance = random.Random(0)
    before = shared_bytes(victim)
    with Hostile(victim).greet() as hostile:
        for _ in range(N_LIES):
            sizes = chance.choices([1 << 20, 1 << 32, 1 << 40, (1 << 40) - 1], k=chance.randint(2, 8))
            answer = hostile.ask(attach_of("lies", TensorSpec("x", "float64", tuple(sizes))))
            assert isinstance(answer, control.Refused), answer
        assert shared_bytes(victim) == before
        frame = control.pack(attach_of("lies", TensorSpec("x", "float64", (77,))))
        hostile.sock.sendall(frame.replace(b"\x4d", b"\xff"))  # a dimension of -1
        assert isinstance(hostile.hear(), control.Refused)
        assert hostile.hear() is None


@pytest.mark.parametrize("n_elems", [N_ELEMS, 1 << 20])
def test_a_trainer_that_scribbles_while_it_averages_poisons_nobody(
    victim: DaemonProcess, pair: list[DaemonProcess], n_elems: int
) -> None:
    run, vector = new_run(), np.ones(n_elems, np.float32)
    end = threading.Event()

    def scribble(fd: int) -> None:
        bad = np.array([np.nan, np.inf, 1e38, -1.0, 0.0], np.float32)
        with mmap.mmap(fd, n_elems * 4) as region:
            values = np.frombuffer(region, np.float32)
            rng = np.random.default_rng(0)
            while not end.is_set():
                values[rng.integers(0, n_elems, 100)] = rng.choice(bad, 100)
            del values

    with Hostile(victim).attach(run, n_elems) as hostile, averagers(pair[1:], run, [vector]) as (far,):
        thread = threading.Thread(target=scribble, args=(hostile.fds[0],))
        thread.start()
        try:
            for seq in range(1, 6 if not SOAK else 200):
                step = start_step(far, timeout=5.0)
                answer = hostile.ask(control.Step(seq, 1.0, 5.0))
                assert isinstance(answer, control.Stepped), answer
                step.join()
                assert np.isfinite(vector).all()
                vector[:] = 1.0
        finally:
            end.set()
            thread.join()


def test_a_trainer_that_never_releases_takes_a_bounded_amount_of_memory(
    victim: DaemonProcess, pair: list[DaemonProcess]
) -> None:
    run = new_run()
    with Hostile(victim).attach(run) as hostile, averagers(pair, run, [np.ones(N_ELEMS, np.float32)] * 2) as honest:
        sizes = []
        for seq in range(1, 10):
            steps = [start_step(each) for each in honest]
            assert hostile.ask(control.Step(seq, 1.0, 20.0)).averaged
            assert all(step.join() for step in steps)
            sizes.append(victim.memory_regions())
        assert max(sizes) == sizes[0], sizes


# ----------------------------------------------------------------------------------------------------------- the socket


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "no length": bytes(4),
    "endless": struct.pack("<I", 0xFFFFFFFF) + bytes(1000),
    "not msgpack": struct.pack("<I", 100) + b"\xc1" * 100,
    "deep": struct.pack("<I", 4000) + b"\x91" * 4000,
    "noise": random.Random(0).randbytes(5000),
}


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_ends_its_connection(victim: DaemonProcess, data: bytes, attached: bool) -> None:
    with Hostile(victim) as hostile:
        if attached:
            hostile.attach(new_run())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            hostile.sock.sendall(data)
            assert isinstance(hostile.hear(), control.Refused)
            assert hostile.hear() is None


def test_frames_without_an_end_are_cut(victim: DaemonProcess) -> None:
    with Hostile(victim).greet() as trickling, Hostile(victim).greet() as pouring:
        trickling.sock.sendall(struct.pack("<I", 1000))
        began = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            pouring.sock.sendall(struct.pack("<I", control.MAX_FRAME_BYTES) + bytes(control.MAX_FRAME_BYTES))
            assert isinstance(pouring.hear(), control.Refused)
        for hostile in (trickling, pouring):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while hostile.hear() is not None:
                    pass
        assert time.monotonic() - began < 8.0


def test_a_million_tensors_stop_nobody(victim: DaemonProcess) -> None:
    n_tensors = 1_000_000 if SOAK else 200_000
    frame = control.pack(attach_of("many", *(TensorSpec(f"{i}", "float32", (1,)) for i in range(n_tensors))))
    with Hostile(victim).greet() as hostile:
        hostile.sock.sendall(frame)
        assert isinstance(hostile.hear(), control.Attached | control.Refused)


def test_a_flood_of_descriptors_is_not_let_in(victim: DaemonProcess) -> None:
    for _ in range(N_FLOODS):
        with Hostile(victim) as hostile, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            flood = array.array("i", [0] * 253)
            hello = control.pack(control.Hello(control.CONTROL_VERSION))
            hostile.sock.sendmsg([hello], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, flood)])
            assert isinstance(hostile.hear(), control.Refused)
            assert hostile.hear() is None


def test_a_flood_of_connections_does_not_keep_questions_out(victim: DaemonProcess) -> None:
    with contextlib.ExitStack() as stack:
        held: deque[Hostile] = deque(maxlen=300)
        for _ in range(N_CONNECTIONS):
            hostile = stack.enter_context(Hostile(victim))
            with contextlib.suppress(BrokenPipeError):  # refused already
                hostile.say(control.Hello(control.CONTROL_VERSION))
            if len(held) == held.maxlen:
                held.popleft().close()
            held.append(hostile)
        assert mpd_json("status", "--socket", victim.socket)["runs"]  # asked by another process


def test_more_trainers_than_there_is_room_for_do_not_keep_questions_out(victim: DaemonProcess) -> None:
    held = []
    run = new_run()
    with contextlib.ExitStack() as stack:
        while True:
            hostile = stack.enter_context(Hostile(victim).greet())
            answer = hostile.ask(attach_of(run, TensorSpec("x", "float32", (N_ELEMS,))))
            if isinstance(answer, control.Refused):
                break
            held.append(hostile)
        assert "trainers are attached to this daemon already" in answer.message
        assert len(held) == 15  # the honest one has the sixteenth place
        assert victim.status()["runs"]


# ---------------------------------------------------------------------------------------------------------------- death


def test_a_trainer_that_is_killed_leaves_nothing(
    victim: DaemonProcess, pair: list[DaemonProcess], record_property: Record
) -> None:
    """It dies in the middle of a step, with 64 MiB of values."""
    run = new_run()
    shared, descriptors = shared_bytes(victim), open_descriptors(victim)
    slowest_s = 0.0
    with averagers(pair[1:], run, [np.ones(BIG_ELEMS, np.float32)]):  # which does not step, so the step waits for it
        for _ in range(20 if SOAK else 2):
            with trainer_process(victim, run) as trainer:
                eventually(lambda: victim.is_waiting(run), "a step has begun", victim.log)
                assert shared_bytes(victim) >= shared + 2 * BIG_ELEMS * 4
                trainer.kill()
                trainer.wait()
                began = time.monotonic()
                while shared_bytes(victim) > shared or open_descriptors(victim) > descriptors:
                    assert time.monotonic() - began < PATIENCE_S
                    time.sleep(0.001)
                slowest_s = max(slowest_s, time.monotonic() - began)
    record_property("until memory and descriptors are back", f"{slowest_s * 1e3:.0f} ms")
    assert slowest_s < SOON_S


@contextlib.contextmanager
def trainer_process(daemon: DaemonProcess, run: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real trainer that has begun a step."""
    script = Path(__file__).parents[1] / "e2e_trainer.py"
    command = [sys.executable, str(script), str(daemon.socket), run, str(BIG_ELEMS), "1.0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as trainer:
        assert trainer.stdin
        assert trainer.stdout
        try:
            assert trainer.stdout.readline() == b"attached\n"
            trainer.stdin.write(b"\n")
            trainer.stdin.flush()
            yield trainer
        finally:
            trainer.kill()


def test_trainers_that_die_at_any_moment_leave_nothing(victim: DaemonProcess) -> None:
    shared = shared_bytes(victim)
    chance = random.Random(0)
    for _ in range(N_DEATHS):
        with Hostile(victim) as hostile:
            moment = chance.randrange(4)
            if moment == 0:
                hostile.greet().say(attach_of(new_run(), TensorSpec("x", "float32", (BIG_ELEMS,))))
                time.sleep(chance.random() * 0.05)
            elif moment > 1:
                hostile.attach(new_run())
                hostile.say(control.OpenSnapshot() if moment == 2 else control.Step(1, 1.0, 20.0))
    eventually(lambda: shared_bytes(victim) <= shared, "memory comes back", victim.log)
