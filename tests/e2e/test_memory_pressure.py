"""A daemon that shares large vectors with several trainers, on a machine that has hardly more memory than these take.

Strategy: four runs on two daemons. The first daemon lives in a memory cgroup where the kernel lets us make one; pages
that it shares with its trainers are charged to it, because it touches them first. Its own memory is what the kernel
counts as anonymous (`RssAnon`), looked at all the time while all four runs average at once.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Score
from e2e_swarm import STEP_S, DaemonProcess, Swarm, averagers, new_run, start_step, wait_for_company

MIB = 1 << 20
SOAK = bool(os.environ.get("MPD_SOAK"))
N_RUNS = 4
VECTOR_MIB = 64 if SOAK else 8
LIMIT_MIB = 768
N_ROUNDS = 20 if SOAK else 3
OWN_MIB = 192  # what the daemon may take for itself
CGROUPS = Path("/sys/fs/cgroup/memory")

pytestmark = pytest.mark.timeout(900 if SOAK else 60)


@contextlib.contextmanager
def limited() -> Iterator[Path | None]:
    """Make a cgroup with the limit; None where we may not."""
    folder = CGROUPS / f"mpd-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(LIMIT_MIB * MIB))
    except OSError:
        yield None
        return
    try:
        yield folder
    finally:
        folder.rmdir()


class OwnMemory:
    """Looks at the anonymous memory of a process again and again; `peak_mib` is the most that was seen."""

    def __init__(self, pid: int) -> None:
        self.peak_mib = 0.0
        self._pid = pid
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "OwnMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.005):
            for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self.peak_mib = max(self.peak_mib, int(line.split()[1]) / 1024)


def kills_of(folder: Path) -> int:
    """Return how many processes of the cgroup the kernel has killed for memory."""
    lines = (folder / "memory.oom_control").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def test_large_vectors_leave_room_for_nothing_but_themselves(score: Score) -> None:
    with limited() as folder, Swarm() as swarm:
        daemon = swarm.new()
        if folder is not None:
            daemon.enter = ("sh", "-c", f'echo $$ > {folder}/tasks && exec "$@"', "sh")
        daemon.start().wait_ready()
        other = swarm.grow(1)[0]
        with OwnMemory(daemon.pid) as memory:
            average([daemon, other])
        assert daemon.is_running()
        peak_mib = int((folder / "memory.max_usage_in_bytes").read_text()) // MIB if folder is not None else None
        kills = kills_of(folder) if folder is not None else None
        daemon.kill()
    score(
        28,
        f"no OOM kill below {LIMIT_MIB} MiB, private memory at most {OWN_MIB} MiB",
        trainers=N_RUNS,
        vector_mib=VECTOR_MIB,
        private_mib=round(memory.peak_mib),
        cgroup_peak_mib=peak_mib,
        kills=kills,
    )
    assert not kills
    assert memory.peak_mib <= OWN_MIB


def average(pair: list[DaemonProcess]) -> None:
    """Attach a trainer of each run to both daemons, and let all of them step at once."""
    with contextlib.ExitStack() as stack:
        runs = [new_run() for _ in range(N_RUNS)]
        vectors = [[np.full(VECTOR_MIB * MIB // 4, 2.0**i, np.float32) for i in range(2)] for _ in runs]
        attached = [stack.enter_context(averagers(pair, run, mine)) for run, mine in zip(runs, vectors, strict=True)]
        for run in runs:
            wait_for_company(pair, run)
        for _ in range(N_ROUNDS):
            for mine in vectors:
                for i, vector in enumerate(mine):
                    vector[:] = 2.0**i
            steps = [start_step(averager, timeout=3 * STEP_S) for both in attached for averager in both]
            outcomes = [step.join() for step in steps]
            assert all(outcomes), outcomes
            assert all((vector == 1.5).all() for mine in vectors for vector in mine)
