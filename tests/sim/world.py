"""A swarm in one thread: real daemons above simulated links, records and clocks, and whatever a seed lets go wrong.

`play(seed)` builds a swarm of two to eight machines, lets its trainers ask for step after step while the faults of the
seed happen, then lets it recover. The oracle looks at everything; what it objects to is raised with the one line that
plays it again, with as few of its faults as bring it about.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sim import peer as peer_module
from sim import tasks
from sim.datagrams import Datagrams
from sim.faults import Fault, draw, shorten, show
from sim.machine import Scheduler
from sim.network import Network
from sim.oracle import Oracle, Violation
from sim.peer import LIMITS, Daemon, Memory

from mpd import grouping, ids, manifest
from mpd.daemon import (
    budgets,
    contacts,
    containment,
    loading,
    lobby,
    roster,
    run,
    runs,
    sessions,
    shaping,
    shelf,
    state_desk,
    transfers,
)

CHUNK_BYTES = 4096  # the smallest that BEGIN allows
SIZES = (2, 3, 3, 4, 4, 5, 5, 6, 7)
FAULTS_FROM_S, FAULTS_TO_S = 0.8, 7.0
END_S = 12.0


class World:
    """The swarm of `seed`. `faults` replaces those that the seed would draw."""

    def __init__(self, seed: int, faults: Sequence[Fault] | None = None, n: int = 0) -> None:
        self.rng = rng = random.Random(seed)
        self.scheduler = Scheduler(random.Random(rng.random()))
        self.n = n or rng.choice(SIZES)
        self.group_size = rng.choice((16, 16, 16, 2, 3))
        self.rounds: int | str = rng.choice((1, 1, "exact"))
        self.is_weighted = rng.random() < 0.3
        self.n_elems = CHUNK_BYTES // 8 * self.n * rng.choice((1, 1, 2)) + rng.choice((0, 40))
        self.think_s = rng.choice((0.3, 1.0, 2.0, 2.0))
        self.timeouts_s = rng.choice(((20.0,), (5.0, 20.0)))
        self.outbound = set(rng.sample(range(self.n), self.n - 1)[: rng.choice((0, 0, 0, 1, 2))])
        drawn = draw(random.Random(rng.random()), self.n, FAULTS_FROM_S, FAULTS_TO_S)
        self.faults = list(drawn if faults is None else faults)
        self.limits = LIMITS
        own = random.Random(f"loads {seed}")  # so that who does not load lives as before
        self.load_share = own.choice((0.0, 0.0, 0.5, 1.0))  # of the trainers that load a state when they come
        self.clock_off_s = {index: rng.choice((0.0, 0.0, -10.0, 10.0)) for index in range(self.n)}
        self.network = Network(self.scheduler, random.Random(rng.random()))
        self.datagrams = Datagrams(self.network, random.Random(rng.random()))
        self.oracle = Oracle(self)
        self.daemons: dict[int, Daemon] = {}
        self.lives: list[Daemon] = []
        self.struck: list[Fault] = []  # when they really did
        self._aimed: list[Fault] = []
        self._steps = [0] * self.n

    def play(self) -> None:
        """Let everything happen, and judge it."""
        for index in range(self.n):
            self._start(index)
        for fault in self.faults:
            self.scheduler.at(fault.at_s, partial(self._aim if fault.aimed else self._strike, fault))
        self.scheduler.run(END_S)
        self.oracle.judge_rounds(self.struck)

    def has_begun(self, index: int) -> None:
        """A round has begun at this place: whatever is aimed at it strikes soon."""
        for fault in [fault for fault in self._aimed if fault.who[0] == index]:
            self._aimed.remove(fault)
            self.scheduler.at(
                self.scheduler.now + self.network.round_s() * self.rng.random(), partial(self._strike, fault)
            )

    def next_step(self, index: int) -> int:
        self._steps[index] += 1
        return self._steps[index]

    def dispose(self) -> None:
        for daemon in self.lives:
            daemon.machine.dispose()

    def _start(self, index: int) -> None:
        daemon = Daemon(self, index, lambda: self.oracle.look(daemon))
        self.daemons[index] = daemon
        self.lives.append(daemon)
        daemon.machine.soon(daemon.start)

    def _end(self, index: int, *, silently: bool) -> None:
        daemon = self.daemons[index]
        if not daemon.machine.is_over:
            self.oracle.has_died(daemon)
            self.network.die(index, silently=silently)

    def _aim(self, fault: Fault) -> None:
        self._aimed.append(fault)

    def _strike(self, fault: Fault) -> None:
        fault = replace(fault, at_s=self.scheduler.now)
        self.struck.append(fault)
        first = fault.who[0]
        daemon = self.daemons[first]
        is_up = not daemon.machine.is_over
        match fault.kind:
            case "kill" | "power":
                self._end(first, silently=fault.kind == "power")
            case "start":
                self._end(first, silently=False)
                self._start(first)
            case "freeze" if is_up and not daemon.machine.is_frozen:
                self.network.freeze(first)
                self.scheduler.at(fault.end_s, partial(self._thaw, daemon, fault.value))
            case "reset":
                self.network.reset(first, fault.who[1])
            case "deaf" | "split" | "bridge":
                pairs = _pairs(fault, self.n) - self.network.cuts
                self.network.cut(pairs)
                self.scheduler.at(fault.end_s, partial(self.network.heal, pairs))
            case "slow":
                self.network.slow[first] = 20.0
                self.scheduler.at(fault.end_s, lambda: self.network.slow.pop(first, None))
            case "clock":
                self.clock_off_s[first] += fault.value
            case "quit" if is_up:
                daemon.quit()
            case "cancel" if is_up:
                daemon.cancel()

    def _thaw(self, daemon: Daemon, frozen_s: float) -> None:
        if not daemon.machine.is_over:
            daemon.thawed_at = daemon.machine.clock()
            self.network.thaw(daemon.index, frozen_s)


def _pairs(fault: Fault, n: int) -> set[tuple[int, int]]:
    """Return the (from, to) between which nothing passes."""
    if fault.kind == "deaf":
        return {(fault.who[0], fault.who[1])}
    if fault.kind == "split":
        inside, outside = set(fault.who), set(range(n)) - set(fault.who)
    else:  # a bridge: the first reaches both halves
        half = (len(fault.who) + 1) // 2
        inside, outside = set(fault.who[1:half]), set(fault.who[half:])
    return {pair for a in inside for b in outside for pair in ((a, b), (b, a))}


def play(seed: int, faults: Sequence[Fault] | None = None) -> World:
    """Play the swarm of `seed`. Raises Violation, or whatever else came out of the product."""
    world = World(seed, faults)
    with simulated():
        try:
            world.play()
        except BaseExceptionGroup as group:  # it came through a block of several tasks
            raise _innermost(group) from group
        finally:
            world.dispose()
    return world


def replay(seed: int, faults: Sequence[Fault] | None = None) -> World:
    """Play the swarm of `seed`. A failure bears the line that plays it again, with as few faults as it needs."""
    try:
        return play(seed, faults)
    except Exception as error:
        kind = type(error)
        wanted = list(faults) if faults is not None else World(seed).faults

        def fails(fewer: list[Fault]) -> bool:
            try:
                play(seed, fewer)
            except kind:
                return True
            except Exception:  # noqa: BLE001  # something else goes wrong: that is another failure
                return False
            return False

        few = shorten(wanted, fails)
        error.add_note(
            f"again: MPD_SIM_SEEDS={seed}:{seed + 1} MPD_SIM_FAULTS='{show(few)}' pytest tests/sim/test_world.py"
        )
        raise


def unexpected(share: str, error: BaseException) -> None:
    """A bug is contained in a daemon, and is the end of a simulation."""
    raise _innermost(error)


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class simulated:  # used like a function
    """Put simulated time and memory in the place of the real ones, in all modules of the daemon that use them."""

    def __enter__(self) -> None:
        self._trio = tasks.installed(
            tasks,
            budgets,
            contacts,
            containment,
            loading,
            lobby,
            roster,
            run,
            runs,
            sessions,
            shaping,
            shelf,
            state_desk,
            transfers,
        )
        self._trio.__enter__()
        self._before: list[tuple[Any, str, Any]] = []
        for module, name, stand_in in (
            (run, "OutRegion", Memory),
            (run, "Region", Memory),
            (run, "private", peer_module.private),
            (run, "_Ask", peer_module.Ask),
            *((module, "OutRegion", Memory) for module in (runs, loading, shelf)),
            (manifest, "STATE_CHUNK_BYTES", CHUNK_BYTES),
            *((module, "report", unexpected) for module in (containment, run, sessions)),
            (runs, "Region", Memory),
            (lobby, "MIN_CHUNK_BYTES", CHUNK_BYTES),
            (ids, "_is_host", functools.lru_cache(ids._is_host)),  # a third of all time would go into addresses
            (grouping, "chunk_bytes_for", lambda *args: CHUNK_BYTES),
        ):
            self._before.append((module, name, getattr(module, name)))
            setattr(module, name, stand_in)

    def __exit__(self, *error: object) -> None:
        for module, name, before in self._before:
            setattr(module, name, before)
        self._trio.__exit__(*error)


__all__ = ["Violation", "World", "play", "replay"]
