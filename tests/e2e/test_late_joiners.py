"""A trainer that comes late gets the run's vector from real daemons, which go on averaging; and what disks remember.

Peer i brings 2^i, plus the number of the step, plus a pattern, in every element. So the vector that is loaded tells of
which step it is, and a chunk that is missing, old or in the wrong place would show.
"""

import functools
import itertools
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from e2e_swarm import (
    Background,
    DaemonProcess,
    Swarm,
    averagers,
    eventually,
    new_run,
    step_all,
    wait_for_company,
    wait_for_moved_bytes,
)

from mpd.client import Averager, LoadedState
from mpd.daemon.keeping import FOLDER, state_file

Vector = npt.NDArray[np.float32]
Record = Callable[[str, object], None]

MIB = 1 << 20
BIG_BYTES = 64 * MIB
SMALL_BYTES = 2 * MIB
N = 4
MEAN = sum(2.0**i for i in range(N)) / N


@pytest.fixture(scope="module")
def daemons(swarm: Swarm) -> list[DaemonProcess]:
    """The first N average, the last one comes late."""
    first = swarm.new("--keep-state").start().wait_ready()
    return [first, *swarm.grow(N, "--keep-state")]


@pytest.fixture(autouse=True)
def all_alive(daemons: list[DaemonProcess], swarm: Swarm) -> Iterator[None]:
    yield
    swarm.revive()


class Loop:
    """Trainers that step and step, each in its thread, until `stop`. `seconds` are those of the first one's rounds."""

    def __init__(self, attached: Sequence[Averager], vectors: Sequence[Vector]) -> None:
        self.seconds: list[float] = []
        self.n_steps = 0
        self._attached = attached
        self._vectors = vectors
        self._pattern = pattern(vectors[0].nbytes)
        self._is_over = False
        self._job = Background(self._run)

    def wait(self, n_steps: int) -> None:
        goal = self.n_steps + n_steps
        eventually(lambda: self.n_steps >= goal or self._job.is_done(), f"{n_steps} more steps")

    def stop(self) -> None:
        """End with the step under way."""
        self._is_over = True
        self._job.join()

    def _run(self) -> None:
        for number in itertools.count(1):
            if self._is_over:
                return
            for i, vector in enumerate(self._vectors):
                np.add(self._pattern, 2.0**i + number, out=vector)
            began = time.monotonic()
            step_all(self._attached)
            self.seconds.append(time.monotonic() - began)
            self.n_steps = number


@functools.cache
def pattern(n_bytes: int) -> Vector:
    return (np.arange(n_bytes // 4) % 1021).astype(np.float32)


def fill(attached: Sequence[Averager], vectors: Sequence[Vector], number: int) -> None:
    """Step once: all average, as step `number`."""
    for i, vector in enumerate(vectors):
        np.add(pattern(vector.nbytes), 2.0**i + number, out=vector)
    outcomes = step_all(attached)
    assert all(outcome.averaged for outcome in outcomes), outcomes


def new_vectors(n_bytes: int, n: int = N) -> list[Vector]:
    return [np.zeros(n_bytes // 4, np.float32) for _ in range(n)]


def assert_is_state(vector: Vector, loaded: LoadedState, contributors_mean: float = MEAN) -> None:
    assert loaded.loaded, str(loaded)
    assert np.array_equal(vector, pattern(vector.nbytes) + np.float32(contributors_mean + loaded.number))


def test_a_late_trainer_loads_from_many_while_they_average(
    daemons: list[DaemonProcess], record_property: Record
) -> None:
    run, vectors = new_run(), new_vectors(BIG_BYTES)
    with ExitStack() as stack:
        attached = stack.enter_context(averagers(daemons[:N], run, vectors))
        wait_for_company(daemons[:N], run)
        loop = Loop(attached, vectors)
        loop.wait(4)
        before, began = len(loop.seconds), time.monotonic()
        late = np.zeros(BIG_BYTES // 4, np.float32)
        joiner = stack.enter_context(daemons[N].connect().averager(run, {"x": late}))
        loaded = joiner.load_state(timeout=30)
        took_s, during = time.monotonic() - began, loop.seconds[before:]
        loop.stop()
        assert_is_state(late, loaded)
        assert loaded.bytes_received == BIG_BYTES
        assert len(loaded.sources) > 1
        assert loaded.dropped == {}
        alone = statistics.median(loop.seconds[1:before])
        record_property("seconds per round of 4 x 64 MiB, nobody loading", f"{alone:.2f}")
        served = f"{statistics.median(during):.2f} ({len(during)} rounds)" if during else "none ended meanwhile"
        record_property("seconds per round while a fifth loads 64 MiB", served)
        took = f"{loaded.seconds:.2f}, {took_s:.2f} with attaching, from {len(loaded.sources)} sources"
        record_property("seconds to load 64 MiB", took)
        vectors = [*vectors, late]
        fill([*attached, joiner], vectors, 0)  # and from now on it is one of them
        assert np.array_equal(late, vectors[0])


def test_a_source_that_is_killed_half_way_does_not_matter(
    daemons: list[DaemonProcess], record_property: Record
) -> None:
    run, vectors = new_run(), new_vectors(BIG_BYTES)
    with ExitStack() as stack:
        attached = stack.enter_context(averagers(daemons[:N], run, vectors))
        wait_for_company(daemons[:N], run)
        attached[0].metadata = attached[1].metadata = attached[2].metadata = b"epoch 7"
        fill(attached, vectors, 1)
        late = np.zeros(BIG_BYTES // 4, np.float32)
        joiner = stack.enter_context(daemons[N].connect().averager(run, {"x": late}, adopt=False))
        load = Background(lambda: joiner.load_state(timeout=30))
        wait_for_moved_bytes(daemons[N], BIG_BYTES / 4)
        daemons[1].send(signal.SIGKILL)
        was_loading = not load.is_done()
        loaded = load.join()
        assert_is_state(late, loaded)
        assert loaded.metadata == b"epoch 7"
        assert loaded.bytes_received == BIG_BYTES
        record_property("seconds to load 64 MiB with one source killed", f"{loaded.seconds:.2f}")
        record_property("was still loading when it was killed", was_loading)


def test_a_swarm_whose_machines_all_vanished_goes_on(daemons: list[DaemonProcess], swarm: Swarm) -> None:
    run, vectors = new_run(), new_vectors(SMALL_BYTES)
    with averagers(daemons[:N], run, vectors) as attached:
        wait_for_company(daemons[:N], run)
        for averager in attached:
            averager.metadata = b"before the power cut"
        fill(attached, vectors, 1)
        for daemon in daemons[:N]:
            eventually(lambda daemon=daemon: kept(daemon, run).exists(), "the state is kept", daemon.log)  # type: ignore[misc]
    for daemon in daemons:
        daemon.kill()
    kept(daemons[0], run).unlink()  # this one has lost its disk too
    kept(daemons[1], run).write_bytes(kept(daemons[1], run).read_bytes()[:-1])  # and this one was torn
    swarm.revive()
    vectors = new_vectors(SMALL_BYTES)
    with averagers(daemons[:N], run, vectors) as attached:
        wait_for_company(daemons[:N], run)
        for averager, vector in zip(attached, vectors, strict=True):
            loaded = averager.load_state(timeout=20)
            assert_is_state(vector, loaded)
            assert (loaded.number, loaded.metadata) == (1, b"before the power cut")
        assert "bytes, its header speaks of" in daemons[1].status()["problem"]
        fill(attached, vectors, 2)
        assert daemons[2].run_status(run)["age"] == 2  # type: ignore[index]


def kept(daemon: DaemonProcess, run: str) -> Path:
    return state_file(daemon.state_dir / FOLDER, run)


def test_a_full_disk_costs_the_file_and_nothing_else(daemons: list[DaemonProcess], swarm: Swarm) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no mount namespace, so there is no small disk to fill")
    small = swarm.new("--keep-state", "--bootstrap", daemons[0].listen)
    small.state_dir.mkdir(mode=0o700)
    mount = f'mount -t tmpfs -o size=5m none {small.state_dir} && exec "$@"'
    small.enter = ("unshare", "-m", "sh", "-c", mount, "sh")
    small.start().wait_ready()
    inside = Path(f"/proc/{small.pid}/root{small.state_dir}")
    pair = [daemons[0], small]
    fits, too_big = new_run(), new_run()
    with averagers(pair, fits, new_vectors(SMALL_BYTES, 2)) as attached:
        wait_for_company(pair, fits)
        assert all(step_all(attached))
        eventually(lambda: len(list(inside.glob("runs/*.state"))) == 1, "the state is kept", small.log)
    (file,) = inside.glob("runs/*.state")
    content = file.read_bytes()
    with averagers(pair, too_big, new_vectors(2 * SMALL_BYTES, 2)) as attached:
        wait_for_company(pair, too_big)
        assert all(step_all(attached))
        eventually(lambda: "No space left on device" in small.status()["problem"], "the problem shows", small.log)
        assert all(step_all(attached))
    assert small.is_running()
    assert [each.name for each in inside.glob("runs/*")] == [file.name]  # nothing half-written is left
    assert file.read_bytes() == content
    small.send(signal.SIGTERM)
    assert small.wait() == 0
    swarm.daemons.remove(small)
