"""How many one-way delays a step takes: counted in the daemon itself, in a swarm where nothing else takes time.

The event model (mpd/costs.py, mpd/pricing.py) prices latency with these counts, so they are not written down there on
trust: real daemons average above simulated links whose every message takes the same time, and the steps are timed.
"""

import random

import numpy as np
import pytest
from sim import tasks
from sim import world as world_module
from sim.peer import Daemon, coded
from sim.world import World, simulated

from mpd.control import Step
from mpd.costs import hops

EVERY_S = 5.0
N_STEPS = 6
N_WARM = 2  # of them, in which the peers still get to know each other


class Still(random.Random):
    """A generator in whose world nothing unlikely happens."""

    def random(self) -> float:
        return 0.999


class Punctual(Daemon):
    """A daemon whose trainer asks at the same moments as all others, and notes how long each step took."""

    expected = 0  # members of each group

    async def _train(self) -> None:
        origin_s = self.machine.clock() - self.world.scheduler.now
        await tasks.sleep(0.1)
        seat = await self.runs.attach(self._attach(), f"trainer {self.index}")
        self.took: list[float] = []
        for step in range(1, N_STEPS + 1):
            await tasks.sleep(origin_s + step * EVERY_S - self.machine.clock())
            np.frombuffer(seat.in_region.view, np.float64)[:] = coded(self.index, step, self.world.n_elems)
            self.world.oracle.will_step(self, step, 1.0)
            began = self.machine.clock()
            answer = await seat.step(Step(step, 1.0, 20.0))
            assert answer.averaged, answer
            assert len(answer.peers) == self.expected, answer
            self.took.append(self.machine.clock() - began)
            seat.release(step)


def steps(monkeypatch: pytest.MonkeyPatch, n: int, delay_s: float) -> list[float]:
    """Return how long the steps of a warm swarm of `n` took, all its machines together."""
    monkeypatch.setattr(world_module, "Daemon", Punctual)
    monkeypatch.setattr(Punctual, "expected", n)
    with simulated():
        world = World(1, faults=[], n=n)
        world.group_size, world.rounds, world.outbound, world.load_share = 16, 1, set(), 0.0
        world.is_weighted, world.n_elems = False, 512 * n
        world.network.rng = Still()
        world.network.window = 4
        world.datagrams.loss = world.datagrams.copies = 0.0
        world.clock_off_s = dict.fromkeys(range(n), 0.0)
        monkeypatch.setattr(world.network, "delay_s", lambda here, there: delay_s)
        for index in range(n):
            world._start(index)
        world.scheduler.run((N_STEPS + 1) * EVERY_S)
        took = [each for daemon in world.daemons.values() for each in daemon.took[N_WARM:]]
        world.dispose()
    return took


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16])
def test_a_step_takes_as_many_delays_as_the_model_says(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    for delay_s in (0.05, 0.1):
        took = [seconds / delay_s for seconds in steps(monkeypatch, n, delay_s)]
        assert len(took) == n * (N_STEPS - N_WARM)
        assert max(took) == pytest.approx(hops(n), abs=1.01 if n == 4 else 0.01)  # of four, one may hear it earlier
        assert min(took) >= hops(n) - 2.01
