"""Runs that grow and shrink: whole daemons without sockets change their shape by themselves, all in the same cycle."""

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import trio
from fake_peers import FakeDaemon, Swarm, specs
from trio.testing import MockClock

from mpd.control import Attach, Step, Stepped
from mpd.daemon.run import Run, TrainerSeat
from mpd.grid import MAX_PEERS, ShapeRecord, fit, shape_key
from mpd.ids import PeerId
from mpd.records import RECORDS

pytestmark = pytest.mark.usefixtures("repeatable", "inline_threads")

GROUP_SIZE = 4
SOAK = os.environ.get("MPD_SOAK") == "1"
MOST, FEWEST = (32, 12) if SOAK else (20, 9)


@pytest.fixture
def inline_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock clock cannot see what a thread does, so there is none."""

    async def run_sync(function: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)


@dataclass(frozen=True)
class Stride:
    """One step of one trainer: when it began and ended, in which record and in how many rounds a cycle."""

    began: float
    ended: float
    epoch: int
    d: int
    stepped: Stepped
    value: float


@dataclass
class Trainee:
    """A daemon with a trainer that does one step after the other."""

    daemon: FakeDaemon
    value: float
    strides: list[Stride] = field(default_factory=list)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    life: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def own(self) -> PeerId:
        return self.daemon.own

    @property
    def run(self) -> Run:
        return self.daemon.runs._runs["run"]

    @property
    def epoch(self) -> int:
        record = self.run.lobby.record
        return record.epoch if record is not None else 0

    async def live(self, task_status: trio.TaskStatus[None]) -> None:
        with self.life:
            await self.daemon.runs.serve(task_status)

    async def train(self, seat: TrainerSeat, pause_s: Callable[[], float]) -> None:
        with self.scope:
            for seq in range(1, 10_000):
                np.frombuffer(seat.in_region.view, np.float32)[:] = self.value
                began = trio.current_time()
                stepped = await seat.step(Step(seq, 1.0, 20.0))
                mean = float(np.frombuffer(seat.out_region.view, np.float32)[0])
                record = self.run.lobby.record
                assert record is not None
                now = trio.current_time()
                self.strides.append(Stride(began, now, record.epoch, len(record.shape), stepped, mean))
                seat.release(seq)
                await trio.sleep_until(trio.current_time() + pause_s())


class Company:
    """A swarm whose peers come and go."""

    def __init__(self, nursery: trio.Nursery, seed: int, rounds: int | str = "exact", pause_s: float = 0.3) -> None:
        self.rng = rng = random.Random(seed)
        self.nursery = nursery
        self.rounds = rounds
        self.pause_s = pause_s
        self.swarm = Swarm(nursery, delay_s=lambda: rng.uniform(0.001, 0.01), look_up_s=lambda: rng.uniform(0.01, 0.08))
        self.all: list[Trainee] = []

    @property
    def here(self) -> list[Trainee]:
        return [trainee for trainee in self.all if not trainee.scope.cancel_called]

    async def come(self, n: int) -> None:
        for _ in range(n):
            daemon = self.swarm.daemon()
            trainee = Trainee(daemon, self.rng.uniform(-1, 1))
            await self.nursery.start(trainee.live)
            request = Attach("run", specs(64), GROUP_SIZE, self.rounds, "raw", "mean")
            seat = await daemon.runs.attach(request, "trainer")
            self.all.append(trainee)
            self.nursery.start_soon(trainee.train, seat, lambda: self.rng.uniform(0.5, 1.0) * self.pause_s)

    def die(self, n: int) -> None:
        """`n` daemons are gone without a word."""
        for trainee in self.rng.sample(self.here, n):
            self.kill(trainee)

    def kill(self, trainee: Trainee) -> None:
        """The process of a daemon is gone; its records stay for their time to live."""

        async def withdraw(key: bytes) -> None:
            """Leave it where it is."""

        trainee.run.lobby._contacts.nursery = None  # it calls nobody any more
        trainee.scope.cancel()
        trainee.life.cancel()
        self.swarm.hub.kill(trainee.own)
        trainee.daemon.rendezvous.die()
        trainee.daemon.rendezvous.withdraw = withdraw  # type: ignore[method-assign]

    async def pass_time(self, seconds: float) -> None:
        await trio.sleep_until(trio.current_time() + seconds)

    async def until_exact(self, epoch: int, limit_s: float) -> int:
        """Return the newest epoch, after `epoch`, a while after all have been in one exact mean in it."""
        deadline = trio.current_time() + limit_s
        while trio.current_time() < deadline:
            await self.pass_time(0.5)
            last, n = [trainee.strides[-1] for trainee in self.here if trainee.strides], len(self.here)
            newest = max(epochs(self))
            exact = [(s.epoch, s.stepped.exact, s.stepped.heads) == (newest, True, n) for s in last]
            if newest > epoch and len(exact) == n and all(exact):
                await self.pass_time(2)
                assert epochs(self) == {newest}
                return newest
        raise AssertionError(f"not exact within {limit_s} s: {epochs(self)}, {self.last()}")

    def last(self) -> list[Stepped]:
        return [trainee.strides[-1].stepped for trainee in self.here if trainee.strides]


def epochs(company: Company) -> set[int]:
    return {trainee.epoch for trainee in company.here}


async def test_a_swarm_grows_and_shrinks_and_is_exact_again_by_itself(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    company = Company(nursery, 2)
    await company.come(8)
    await company.pass_time(6)
    assert {trainee.run.lobby.shape for trainee in company.here} == {(2, 2)}
    assert [(s.exact, s.heads) for s in company.last()] == [(True, 8)] * 8

    await company.come(MOST - 8)
    epoch = await company.until_exact(1, 22)
    assert {trainee.run.lobby.shape for trainee in company.here} == {fit(MOST, GROUP_SIZE)}
    assert [(s.exact, s.heads) for s in company.last()] == [(True, MOST)] * MOST
    check_first_cycles(company, epoch)

    company.die(MOST - FEWEST)
    epoch = await company.until_exact(epoch, 45)
    assert [(s.exact, s.heads) for s in company.last()] == [(True, FEWEST)] * FEWEST
    check_first_cycles(company, epoch)
    nursery.cancel_scope.cancel()


def check_first_cycles(company: Company, epoch: int) -> None:
    """After 2 d rounds in a new shape all are in the exact mean of all."""
    for trainee in company.here:
        first = [stride.stepped for stride in trainee.strides if stride.epoch == epoch][:2]
        assert first[-1].exact
        assert first[-1].heads == len(company.here)


async def test_what_is_certified_is_the_mean_of_that_many_whatever_changes(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """Certified strides of one round are equal, and none claims more peers than there ever were."""
    company = Company(nursery, 5)
    await company.come(9)
    await company.pass_time(8)
    await company.come(7)
    await company.pass_time(20)
    company.die(6)
    await company.pass_time(30)
    values = {trainee.value for trainee in company.all}
    sums: dict[int, set[float]] = {}
    n_certified = 0
    for trainee in company.all:
        for stride in trainee.strides:
            if stride.stepped.exact:
                n_certified += 1
                assert 2 <= stride.stepped.heads <= 16
                assert min(values) <= stride.value <= max(values)
                sums.setdefault(stride.stepped.heads, set()).add(round(stride.value, 5))
    everybody = sum(trainee.value for trainee in company.all) / 16
    assert n_certified > 50
    assert sums[16] == {round(everybody, 5)}
    nursery.cancel_scope.cancel()


async def test_a_swarm_of_single_rounds_is_counted_and_gets_its_shape_too(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    company = Company(nursery, 3, rounds=1)
    await company.come(7)
    await company.pass_time(6)
    assert {trainee.run.lobby.shape for trainee in company.here} == {(2, 2)}
    await company.come(9)
    await company.pass_time(25)
    assert len(epochs(company)) == 1
    assert math.prod(company.here[0].run.lobby.shape) > 4
    assert not any(stepped.exact for stepped in company.last())  # a round is no cycle
    nursery.cancel_scope.cancel()


async def test_one_group_stays_one_group_up_to_a_quarter_more(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    company = Company(nursery, 4)
    await company.come(5)
    await company.pass_time(5)
    await company.come(2)
    await company.pass_time(20)
    assert epochs(company) == {1}
    assert [(s.exact, s.heads) for s in company.last()] == [(True, 7)] * 7
    await company.come(2)
    await company.pass_time(20)
    assert {trainee.run.lobby.shape for trainee in company.here} == {(2, 2)}
    assert [(s.exact, s.heads) for s in company.last()] == [(True, 9)] * 9
    nursery.cancel_scope.cancel()


async def test_if_the_one_that_should_write_is_dead_another_one_does(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    company = Company(nursery, 6)
    await company.come(8)
    await company.pass_time(5)
    writer = min(company.here, key=lambda trainee: trainee.own)
    await company.come(8)
    company.kill(writer)
    await company.until_exact(1, 22)
    assert sum(trainee.run.lobby.shaping.describe()["written"] for trainee in company.here) >= 1
    nursery.cancel_scope.cancel()


async def test_a_lie_about_a_newer_record_costs_little(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    company = Company(nursery, 7)
    await company.come(8)
    await company.pass_time(5)
    victim = company.here[0].run.lobby
    victim.shaping.hear(1 << 40)
    await company.pass_time(6)
    assert epochs(company) == {1}
    slowest = max(stride.ended - stride.began for trainee in company.here for stride in trainee.strides[-6:])
    assert slowest < 3.0
    assert all(stepped.exact for stepped in company.last())
    nursery.cancel_scope.cancel()


async def test_a_record_that_nobody_would_write_is_not_followed(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    company = Company(nursery, 8)
    await company.come(8)
    await company.pass_time(5)
    digest = company.here[0].run.terms.digest
    for lie in (
        ShapeRecord(1 << 50, 8, fit(8, GROUP_SIZE), digest),
        ShapeRecord(2, MAX_PEERS, fit(MAX_PEERS, GROUP_SIZE), digest),
        ShapeRecord(2, 9, (3, 3), digest),
    ):
        await company.swarm.daemon().rendezvous.announce(shape_key("run", digest), RECORDS.encode(lie), 60)
    await company.pass_time(15)
    assert epochs(company) == {1}
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("n_seen", "sizes", "heads", "certified", "settled"),
    [
        (9, [5, 4], 9, True, True),
        (8, [5, 4], 9, True, True),  # one record was not found: whom the cycle has counted was there all the same
        (10, [5, 4], 9, True, False),  # somebody has come
        (9, [5, 5, 1], 5, False, True),  # only we were late for one line
        (9, [5, 1], 5, False, False),
        (9, [2, 1], 3, False, False),
        (9, [3, 2], 5, False, False),  # a half of the swarm
    ],
)
async def test_lines_wait_for_those_whom_the_grid_expects_unless_the_swarm_has_come_apart(
    n_seen: int,
    sizes: list[int],
    heads: int,
    certified: bool,
    settled: bool,
    nursery: trio.Nursery,
    autojump_clock: MockClock,
) -> None:
    company = Company(nursery, 11)
    await company.come(9)
    await company.pass_time(6)
    lobby = company.here[0].run.lobby
    shaping = lobby.shaping
    assert lobby.shape == (2, 2)
    for peer in sorted(lobby._roster.others)[: max(0, 9 - n_seen)]:
        del lobby._roster.others[peer]
    if n_seen > 9:
        lobby._roster.others[PeerId(b"n" * 20)] = next(iter(lobby._roster.others.values()))
    shaping._sizes.clear()
    for number, size in enumerate(sizes):
        shaping.note_round(number, size)
    shaping.note_cycle(heads, is_certified=certified)
    shaping.begin_cycle()
    assert shaping.is_settled == settled
    nursery.cancel_scope.cancel()


async def test_status_tells_of_the_shape(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    company = Company(nursery, 9)
    await company.come(12)
    await company.pass_time(6)
    told = company.here[0].run.lobby.shaping.describe()
    assert told == {
        "epoch": 1,
        "n_peers": 12,
        "heads": 12,
        "certified": True,
        "says": "the shape fits 12 peers; with 3 fewer it would not",
        "next": None,
        "written": 0,
    }
    nursery.cancel_scope.cancel()
