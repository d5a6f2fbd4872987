"""One life of a daemon in the simulated swarm, and the trainer beside it.

Everything above the sockets is that of the product: switchboard, runs, lobby, sessions, and below them matchmaking and
exchange. Only links, rendezvous, clocks and memory are simulated. The trainer writes values from which every result can
be taken apart again: element k of every 128 is 1 for peer k and 0 for all others, so a result *is* its coefficients,
and element 64 + k bears the number of the step of peer k that these values belong to.
"""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sim import tasks
from sim.datagrams import Rendezvous
from sim.machine import Machine
from sim.network import Peers

from mpd.config import RoundLimits
from mpd.control import Attach, LoadState, Step, Stepped
from mpd.daemon import run as run_module
from mpd.daemon.budgets import ByteGate
from mpd.daemon.lobby import LobbyServices
from mpd.daemon.runs import Runs, Switchboard
from mpd.daemon.sessions import Sessions
from mpd.errors import LocalError
from mpd.ids import PeerId
from mpd.layout import TensorSpec

if TYPE_CHECKING:
    from sim.world import World

MAX_PEERS = 64
CODE = 2 * MAX_PEERS  # elements after which the code repeats
LIMITS = RoundLimits(window_s=2.0, progress_s=1.0, roster_quiet_s=0.3, record_ttl_s=12.0)
RUN = "sim"
EPOCH_MS = 1_700_000_000_000


def peer_of(index: int) -> PeerId:
    """Return the id of the peer at a place; ids are in no order that a place would tell."""
    return PeerId(random.Random(index).randbytes(20))


def coded(index: int, step: int, n_elems: int) -> npt.NDArray[np.float64]:
    """Return the values of a peer in a step."""
    code = np.zeros(CODE)
    code[index], code[MAX_PEERS + index] = 1.0, step
    return np.resize(code, n_elems)


class Memory:
    """A region without a memfd."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.fd = -1
        self.view = memoryview(bytearray(n_bytes))
        self.published = b""
        self.generation = 0

    @classmethod
    async def make(cls, n_bytes: int) -> "Memory":
        await tasks.lowlevel.checkpoint()
        return cls(n_bytes)

    def publish(self, generation: int) -> None:
        self.published = bytes(self.view)
        self.generation = generation

    def close(self) -> None:
        """Whoever holds a view keeps it."""


async def private(n_bytes: int) -> memoryview:
    await tasks.lowlevel.checkpoint()
    return memoryview(bytearray(n_bytes))


class Ask(run_module._Ask):
    """A wish whose event belongs to the simulation: the field's default was made before trio was replaced."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.answered = tasks.Event()  # type: ignore[assignment]


class NoNews:
    """A news desk in a swarm in which nobody is ever revoked."""

    def on_link_up(self, link: Any, their_seq: int) -> None:
        pass

    def on_news(self, link: Any, message: Any) -> None:
        pass


class Daemon:
    """One life at place `index`. `clock_off_s` is how wrong its wall clock is; it may change."""

    def __init__(self, world: "World", index: int, looked_at: Callable[[], None]) -> None:
        self.world, self.index, self.own = world, index, peer_of(index)
        self.machine = Machine(world.scheduler, world.rng.uniform(0, 1000), looked_at)
        self.thawed_at = 0.0  # when it went on for the last time
        self.last: Stepped | None = None
        self.stepping: tasks.CancelScope | None = None
        self.warned: list[str] = []
        self._is_wanted = True

    def start(self) -> None:
        """Begin this life."""
        world = self.world
        self.switchboard = Switchboard(None, lambda text: None)  # type: ignore[arg-type]  # only dial-backs need it
        self.peers: Any = Peers(
            world.network, self.machine, self.index, self.own, self.switchboard, self.index not in world.outbound
        )
        self.sessions = Sessions(self.peers)
        world.oracle.listen(self)
        services = LobbyServices(
            own=self.own,
            peers=self.peers,
            rendezvous=Rendezvous(world.datagrams, self.machine, self.index, self.own, self.wall_ms),
            limits=world.limits,
            dials=ByteGate(32),
            rng=random.Random(world.rng.random()),
            wall_ms=self.wall_ms,
            refuse=self.sessions.refuse,
            warn=self.warned.append,
        )
        self.runs = Runs(services, self.sessions)
        self.switchboard.runs, self.switchboard.sessions = self.runs, self.sessions
        self.switchboard.peers = self.peers
        self.switchboard.news = NoNews()  # type: ignore[assignment]
        world.network.move_in(self.peers)
        world.datagrams.joined(services.rendezvous)  # type: ignore[arg-type]
        self.machine.start(self.runs.serve)
        self.machine.start(self._train)
        if random.Random(f"{self.own.hex()} {self.machine.clock()}").random() < world.load_share:
            self.machine.start(self._look_in)

    def wall_ms(self) -> int:
        """Return this machine's wall clock."""
        return EPOCH_MS + int((self.world.scheduler.now + self.world.clock_off_s.get(self.index, 0.0)) * 1000)

    def quit(self) -> None:
        """The trainer goes, once it has its answer."""
        self._is_wanted = False
        self.cancel()

    def cancel(self) -> None:
        """The trainer takes its step back."""
        if self.stepping is not None:
            self.machine.soon(self.stepping.cancel)

    async def _train(self) -> None:
        world, rng = self.world, random.Random(self.world.rng.random())
        await tasks.sleep(rng.uniform(0, 1.0))
        seat = await self.runs.attach(self._attach(), f"trainer {self.index}")
        if rng.random() < world.load_share:
            with tasks.CancelScope() as self.stepping:
                await self._load(seat, rng)
        while self._is_wanted:
            if rng.random() < world.load_share / 3:
                world.oracle.check_published(self, seat.out_region)
                with tasks.CancelScope() as self.stepping:
                    await self._load(seat, rng)
            await tasks.sleep(rng.expovariate(1 / world.think_s))
            step = world.next_step(self.index)
            values = coded(self.index, step, world.n_elems)
            weight = rng.choice((1.0, 1.0, 2.0, 5.0)) if world.is_weighted else 1.0
            world.oracle.check_published(self, seat.out_region)
            np.frombuffer(seat.in_region.view, np.float64)[:] = values
            world.oracle.will_step(self, step, weight)
            began, timeout_s = self.machine.clock(), rng.choice(world.timeouts_s)
            with tasks.CancelScope() as self.stepping:
                self.last = None
                try:
                    self.last = await seat.step(Step(step, weight, timeout_s))
                except LocalError as error:
                    world.oracle.violated(f"step {step} of {self.index} raises {error}")
            self.stepping = None
            if self.last is not None:
                world.oracle.judge_step(self, self.last, seat.out_region, began, timeout_s)
                seat.release(step)
                await tasks.sleep(0)
        seat.close()

    async def _look_in(self) -> None:
        """A second trainer comes for a while, loads what the swarm holds, and never asks for a step."""
        rng = random.Random(self.own.hex())
        await tasks.sleep(rng.uniform(1.0, 8.0))
        seat = await self.runs.attach(self._attach(), f"second trainer {self.index}")
        for _ in range(rng.randint(1, 3)):
            await self._load(seat, rng)
            await tasks.sleep(rng.uniform(0, 1.0))
        seat.close()

    def _attach(self) -> Attach:
        world = self.world
        tensors = (TensorSpec("w", "float64", (world.n_elems,)),)
        return Attach(RUN, tensors, world.group_size, world.rounds, "raw", "mean")

    async def _load(self, seat: Any, rng: random.Random) -> None:
        """A trainer wants the vector that others hold, and takes a while to copy it."""
        oracle, began, timeout_s = self.world.oracle, self.machine.clock(), rng.choice((2.0, 20.0))
        step = self.world.next_step(self.index)
        answer, region = await seat.load_state(LoadState(step, timeout_s))
        held = oracle.judge_load(self, seat, answer, region, began, timeout_s)
        if held:
            await tasks.sleep(rng.choice((0.0, 0.0, 1.0)))
            oracle.check(held == region.view, "I3: what a trainer loads was written again")
        seat.release(step)
