"""Daemons without sockets that average, and one more that comes late: what the tests of states share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import trio
from fake_peers import FakeDaemon, Swarm, specs

from mpd import manifest
from mpd.control import Attach, LoadState, StateLoaded, Step, Stepped
from mpd.daemon.memory import OutRegion
from mpd.daemon.run import Run, TrainerSeat
from mpd.daemon.shelf import HeldState

CHUNK_BYTES = 4096
N_CHUNKS = 40
N_ELEMS = N_CHUNKS * CHUNK_BYTES // 4 - 7  # the last chunk is shorter
RUN = "run"
_REQUEST = Attach(RUN, specs(N_ELEMS), 16, 1, "raw", "mean")


async def inline(function: Any, *args: Any, **_: Any) -> Any:
    """Do here what would be done in a thread: a mock clock cannot see what a thread does."""
    await trio.lowlevel.checkpoint()
    return function(*args)


def small_chunks_and_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut states into chunks of CHUNK_BYTES, and let everything happen on the test's clock."""
    monkeypatch.setattr(manifest, "STATE_CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(trio.to_thread, "run_sync", inline)


@dataclass
class Host:
    """A daemon with one trainer."""

    daemon: FakeDaemon
    seat: TrainerSeat
    seq: int = 0
    loaded: OutRegion | None = field(default=None)

    @property
    def run(self) -> Run:
        return self.daemon.runs._runs[RUN]

    @property
    def held(self) -> tuple[HeldState, ...]:
        return self.run.shelf.held

    async def step(self, value: float, metadata: bytes = b"", timeout_s: float = 60.0) -> Stepped:
        """Average a vector full of `value`."""
        self.seq += 1
        vector = np.frombuffer(self.seat.in_region.view, np.float32)
        vector[:] = value + np.arange(N_ELEMS) % 5
        return await self.seat.step(Step(self.seq, 1.0, timeout_s, metadata=metadata))

    async def load(self, timeout_s: float = 60.0) -> StateLoaded:
        self.seq += 1
        answer, self.loaded = await self.seat.load_state(LoadState(self.seq, timeout_s))
        return answer

    def values(self) -> set[float]:
        """Return what a trainer finds in the region that came with the last load, less what makes its chunks differ."""
        assert self.loaded is not None
        return set((np.frombuffer(self.loaded.view, np.float32) - np.arange(N_ELEMS) % 5).tolist())


async def host(swarm: Swarm, daemon: FakeDaemon | None = None) -> Host:
    """Start a daemon, with a trainer in the run."""
    daemon = daemon or swarm.daemon()
    await swarm.nursery.start(daemon.runs.serve)
    return Host(daemon, await daemon.runs.attach(_REQUEST, "trainer"))


async def another_trainer(host: Host) -> Host:
    """Attach a second trainer to the daemon of `host`."""
    return Host(host.daemon, await host.daemon.runs.attach(_REQUEST, "second"))


async def together(hosts: Sequence[Host], *values: float, metadata: bytes = b"") -> list[Stepped]:
    """Let all of `hosts` step at the same time."""
    answers: dict[int, Stepped] = {}

    async def step(index: int) -> None:
        answers[index] = await hosts[index].step(values[index % len(values)], metadata)

    async with trio.open_nursery() as nursery:
        for index in range(len(hosts)):
            nursery.start_soon(step, index)
    return [answers[index] for index in range(len(hosts))]
