"""One run on one daemon: its trainers, its memory and its steps.

Half of the tests run whole daemons without sockets (fake_peers.py) with real tensors; where a round must go wrong in a
certain way, the lobby and the sessions follow a script instead.
"""

import contextlib
import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trio
import trio.lowlevel
from fake_peers import FakeDaemon, Swarm, peer, specs, terms
from trio.testing import MockClock

from mpd.config import RoundLimits
from mpd.control import OUT_HEADER_BYTES, Attach, Query, Step, Stepped
from mpd.daemon import run as run_module
from mpd.daemon.budgets import Budget
from mpd.daemon.containment import supervise
from mpd.daemon.memory import OutRegion, Region
from mpd.daemon.run import Run, TrainerSeat
from mpd.daemon.sessions import RoundResult
from mpd.daemon.shelf import Shelf
from mpd.daemon.vault import RegionVault
from mpd.deadlines import MIN_SAMPLES, PROGRESS, Pace, SenderReport
from mpd.errors import LocalError
from mpd.grid import Cell, ShapeRecord
from mpd.ids import PeerId, RoundId, show_peer
from mpd.layout import MAX_WEIGHT
from mpd.mass import Standing, enter
from mpd.matchmaking import Alone, Begun
from mpd.messages import Begin, Member

WINDOW_S = RoundLimits().window_s
N_ELEMS = 1000


@pytest.fixture(autouse=True)
def inline_threads(repeatable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock clock cannot see what a thread does, so there is none."""

    async def run_sync(function: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)


def mapped(region: OutRegion) -> mmap.mmap:
    """Map a region as a client does: on its own, and read-only."""
    return mmap.mmap(region.fd, OUT_HEADER_BYTES + region.n_bytes, prot=mmap.PROT_READ)


class Trainer:
    """A trainer on `daemon`: writes its values, asks for steps, and reads results as a client would."""

    def __init__(self, seat: TrainerSeat) -> None:
        self.seat = seat
        self.out = mapped(self.seat.out_region)
        self.seq = 0

    async def step(self, value: float, weight: float = 1.0, timeout_s: float = 60.0) -> Stepped:
        self.seq += 1
        np.frombuffer(self.seat.in_region.view, np.float32)[:] = value
        stepped = await self.seat.step(Step(self.seq, weight, timeout_s))
        if stepped.new_out:
            self.out = mapped(self.seat.out_region)
        return stepped

    def result(self) -> npt.NDArray[np.float32]:
        """Return a copy of what lies in the out region that this trainer has mapped."""
        return np.frombuffer(self.out, np.float32, offset=OUT_HEADER_BYTES).copy()

    @property
    def generation(self) -> int:
        return int.from_bytes(self.out[:8], "little")

    def release(self) -> None:
        self.seat.release(self.seq)


async def attach(daemon: FakeDaemon, label: str = "trainer", *, group_size: int = 16, rounds: int | str = 1) -> Trainer:
    request = Attach("run", specs(N_ELEMS), group_size, rounds, "raw", "mean")
    return Trainer(await daemon.runs.attach(request, label))


async def daemons(swarm: Swarm, n: int) -> list[FakeDaemon]:
    made = [swarm.daemon() for _ in range(n)]
    for daemon in made:
        await swarm.nursery.start(daemon.runs.serve)
    return made


async def together(*steps: Callable[[], Any]) -> list[Stepped]:
    answers: dict[int, Stepped] = {}

    async def take(index: int) -> None:
        answers[index] = await steps[index]()

    async with trio.open_nursery() as nursery:
        for index in range(len(steps)):
            nursery.start_soon(take, index)
    return [answers[index] for index in range(len(steps))]


def begun(daemon: FakeDaemon) -> trio.Event:
    """Return an event for the next round that begins on `daemon`."""
    event, begin = trio.Event(), daemon.sessions.begin

    def watched(*args: Any) -> Any:
        event.set()
        return begin(*args)

    daemon.sessions.begin = watched  # type: ignore[method-assign]
    return event


def all_step(trainers: Sequence[Trainer], values: Sequence[float], weight: float = 1.0) -> list[Callable[[], Any]]:
    return [
        lambda trainer=trainer, value=value: trainer.step(value, weight)  # type: ignore[misc]
        for trainer, value in zip(trainers, values, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------- whole daemons


async def test_peers_average_and_say_with_whom(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    hosts = await daemons(Swarm(nursery), 3)
    trainers = [await attach(daemon) for daemon in hosts]
    answers = await together(*all_step(trainers, [1, 2, 4]))
    names = {show_peer(daemon.own) for daemon in hosts}
    for trainer, stepped in zip(trainers, answers, strict=True):
        assert stepped.averaged
        assert stepped.exact
        assert (stepped.heads, stepped.rounds, stepped.generation, stepped.seq) == (3, 1, 1, 1)
        assert set(stepped.peers) == set(stepped.contributors) == names
        assert stepped.missing == {}
        assert stepped.reason == "averaged with 2 other peers"
        assert stepped.bytes_sent > N_ELEMS * 4
        assert not stepped.new_out
        assert (trainer.result() == np.float32(7 / 3)).all()
        assert trainer.generation == 1


async def test_weights_count_between_peers_and_between_trainers(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one, other = await daemons(Swarm(nursery), 2)
    left, right, far = await attach(one, "gpu 0"), await attach(one, "gpu 1"), await attach(other)
    answers = await together(
        lambda: left.step(1.0, weight=1.0), lambda: right.step(4.0, weight=2.0), lambda: far.step(10.0, weight=5.0)
    )
    assert [stepped.averaged for stepped in answers] == [True] * 3
    assert all(len(stepped.peers) == 2 for stepped in answers)
    for trainer in (left, right, far):
        assert trainer.result() == pytest.approx((1 * 1 + 2 * 4 + 5 * 10) / 8)
    assert left.seat.out_region is right.seat.out_region


async def test_a_trainer_that_does_not_ask_is_left_out_and_named(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one, other = await daemons(Swarm(nursery), 2)
    busy, _, far = await attach(one, "busy"), await attach(one, "late"), await attach(other)
    answers = await together(lambda: busy.step(1.0), lambda: far.step(3.0))
    assert answers[0].averaged
    assert answers[0].missing == {"trainer late": "had not asked for a step when the window ended"}
    assert answers[1].missing == {}
    assert answers[0].seconds < WINDOW_S
    assert (busy.result() == 2.0).all()


@pytest.mark.parametrize("n", [6, 7])
async def test_every_exact_cycle_is_certified_and_exact(
    n: int, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    hosts = await daemons(Swarm(nursery), n)
    trainers = [await attach(daemon, group_size=3, rounds="exact") for daemon in hosts]
    for turn in range(4):
        answers = await together(
            *(lambda i=i, trainer=trainer: trainer.step(2.0**i, i + 1.0) for i, trainer in enumerate(trainers))
        )
        mean = math.fsum((i + 1) * 2.0**i for i in range(n)) / math.fsum(range(1, n + 1))
        for trainer, stepped in zip(trainers, answers, strict=True):
            assert (stepped.averaged, stepped.exact, stepped.heads, stepped.rounds) == (True, True, n, 2)
            assert stepped.generation == turn + 1
            assert trainer.result() == pytest.approx(mean, rel=1e-6)


async def test_the_history_has_one_line_a_round(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    hosts = await daemons(Swarm(nursery), 2)
    trainers = [await attach(daemon) for daemon in hosts]
    for _ in range(2):
        await together(*all_step(trainers, [1, 3]))
    for daemon in hosts:
        run = daemon.runs._runs["run"]
        history = run.history.records
        assert [record["averaged"] for record in history] == [record["perfect"] for record in history] == [True, True]
        record = history[-1]
        assert {record["run"], record["reason"]} == {"run", ""}
        assert sorted(record["group"]) == sorted(record["contributors"]) == sorted(show_peer(d.own) for d in hosts)
        assert record["missing"] == {}
        assert len({record["round_id"] for record in history}) == 2
        assert record["bytes_sent"] > 0
        assert record["bytes_received"] > 0
        assert run.rounds == 2


async def test_a_step_of_two_dies_with_its_peer_and_the_values_stay(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery, delay_s=lambda: 0.01)
    hosts = await daemons(swarm, 2)
    trainers = [await attach(daemon) for daemon in hosts]
    await together(*all_step(trainers, [1, 3]))
    for trainer in trainers:
        trainer.release()
    answers: list[Stepped] = []

    async def step(trainer: Trainer) -> None:
        answers.append(await trainer.step(5.0))

    async with trio.open_nursery() as steps:
        both = [begun(daemon) for daemon in hosts]
        for trainer in trainers:
            steps.start_soon(step, trainer)
        for event in both:
            await event.wait()
        swarm.hub.kill(hosts[1].own)
    for stepped in answers:
        assert not stepped.averaged
        assert stepped.generation == 0
        assert stepped.reason.startswith("kept the old values: ")
        assert stepped.reason.endswith("; the others may have averaged")
    assert trainers[0].generation == 1


# -------------------------------------------------------------------------------------------------------------- memory


async def test_who_has_not_copied_its_result_keeps_it_for_good(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one, other = await daemons(Swarm(nursery), 2)
    slow, quick, far = await attach(one, "slow"), await attach(one, "quick"), await attach(other)
    first = await together(lambda: slow.step(1.0), lambda: quick.step(1.0), lambda: far.step(4.0))
    assert not any(stepped.new_out for stepped in first)
    quick.release()
    far.release()
    second = await together(lambda: quick.step(5.0), lambda: far.step(7.0))
    assert [stepped.new_out for stepped in second] == [True, False]
    assert (quick.result() == 6.0).all()
    assert (quick.generation, slow.generation) == (2, 1)
    assert (slow.result() == np.float32(slow_mean())).all()
    third = await together(lambda: slow.step(2.0), lambda: quick.step(2.0), lambda: far.step(2.0))
    assert [stepped.new_out for stepped in third] == [True, False, False]
    assert (slow.result() == 2.0).all()


def slow_mean() -> float:
    """Two trainers of weight 1 with value 1, and a peer of weight 1 with value 4."""
    return (1 + 1 + 4) / 3


async def test_released_memory_is_used_again(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    hosts = await daemons(Swarm(nursery), 2)
    trainers = [await attach(daemon) for daemon in hosts]
    for turn in range(3):
        answers = await together(*all_step(trainers, [turn, turn + 2]))
        assert not any(stepped.new_out for stepped in answers)
        assert [trainer.generation for trainer in trainers] == [turn + 1] * 2
        if turn % 2:  # asking again says as much
            for trainer in trainers:
                trainer.release()


async def test_the_generation_flips_after_the_last_byte(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, set[float]]] = []
    publish = OutRegion.publish

    def watch(region: OutRegion, generation: int) -> None:
        before = int.from_bytes(os.pread(region.fd, 8, 0), "little")
        seen.append((before, set(np.frombuffer(region.view, np.float32).tolist())))
        publish(region, generation)

    monkeypatch.setattr(OutRegion, "publish", watch)
    hosts = await daemons(Swarm(nursery), 2)
    trainers = [await attach(daemon) for daemon in hosts]
    await together(*all_step(trainers, [1, 3]))
    await together(*all_step(trainers, [5, 7]))
    assert seen == [(0, {2.0})] * 2 + [(1, {6.0})] * 2


def regions() -> set[int]:
    """Return the inodes of all shared memory that is open."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing itself
            if "memfd:mpd" in os.readlink(f"/proc/self/fd/{fd}"):
                found.add(os.stat(f"/proc/self/fd/{fd}").st_ino)
    return found


async def test_the_last_trainer_takes_the_run_and_its_memory_with_it(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    before = regions()
    (daemon,) = await daemons(Swarm(nursery), 1)
    trainers = [await attach(daemon), await attach(daemon)]
    await trainers[0].seat.open_snapshot()
    assert len(regions() - before) == 4  # two in, one out, one snapshot
    trainers[0].seat.close()
    await trio.testing.wait_all_tasks_blocked()
    assert len(regions() - before) == 2
    assert daemon.runs.of_name("run") is not None
    trainers[1].seat.close()
    trainers[1].seat.close()
    await trio.testing.wait_all_tasks_blocked()
    assert daemon.runs.of_name("run") is None
    for trainer in trainers:
        trainer.out.close()
    assert not regions() - before


async def test_the_last_trainer_may_leave_in_the_middle_of_a_step(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery, delay_s=lambda: 0.01)
    hosts = await daemons(swarm, 3)
    trainers = [await attach(daemon) for daemon in hosts]
    await together(*all_step(trainers, [1, 2, 6]))
    answers: list[Stepped] = []

    async def step(trainer: Trainer) -> None:
        answers.append(await trainer.step(5.0))

    async with trio.open_nursery() as steps:
        with trio.CancelScope() as dying:
            async with trio.open_nursery() as doomed:
                for trainer in trainers[1:]:
                    steps.start_soon(step, trainer)
                doomed.start_soon(step, trainers[0])
                await begun(hosts[0]).wait()
                dying.cancel()
        trainers[0].seat.close()
    assert [stepped.averaged for stepped in answers] == [True, True]
    assert all((trainer.result() == 5.0).all() for trainer in trainers[1:])
    await trio.testing.wait_all_tasks_blocked()
    assert hosts[0].runs.of_name("run") is None


# ------------------------------------------------------------------------------------------------------------ scripts


class ScriptedSession:
    """A round that ends as it is told to."""

    def __init__(self, begin: Begin, me: int, vault: RegionVault, outcome: "float | str") -> None:
        self.begin, self.me, self.vault, self.outcome = begin, me, vault, outcome
        self.round_id = RoundId(begin.round_id)
        self.members = tuple(peer(i) for i in range(len(begin.members)))
        self.finished, self.gone = trio.Event(), trio.Event()
        self.source = bytes(vault._inputs)
        self.cancelled: list[str] = []

    async def run(self) -> None:
        if isinstance(self.outcome, float):
            np.frombuffer(self.vault.slots, np.float32)[:] = self.outcome
        if self.outcome != "hangs":
            self.finished.set()
        await self.gone.wait()  # it lingers for others until it is told to stop

    def result(self) -> RoundResult:
        success = isinstance(self.outcome, float)
        reason = "" if success else str(self.outcome)
        return RoundResult(success, reason, 0b11 if success else 0, 0b11 if success else 0, {}, 0.5, 100, 200)

    def reports(self) -> dict[PeerId, SenderReport]:
        return {peer(1): SenderReport(4, 4, 1 << 20, 0.5, 3.0, 2)}

    def cancel(self, reason: str) -> None:
        self.cancelled.append(reason)
        self.outcome = self.outcome if self.finished.is_set() else reason
        self.finished.set()
        self.gone.set()


class ScriptedSessions:
    """Begins rounds that end like `outcomes`: with a mean, or with a reason."""

    def __init__(self, outcomes: list["float | str"]) -> None:
        self.outcomes = outcomes
        self.made: list[ScriptedSession] = []
        self.refused: list[bytes] = []

    def begin(
        self, begin: Begin, me: int, vault: RegionVault, deadline: float, progress_s: float, patience: object
    ) -> ScriptedSession:
        self.progress_s = progress_s
        self.made.append(ScriptedSession(begin, me, vault, self.outcomes.pop(0)))
        return self.made[-1]

    def end(self, session: ScriptedSession) -> None:
        pass

    def refuse(self, round_id: bytes) -> None:
        self.refused.append(round_id)


class ScriptedLobby:
    """Forms a group of two, or none, as `groups` says; on a grid with cells (2, 2) if `d` is 2."""

    own = peer(0)
    overlooked: tuple[PeerId, ...] = ()

    def __init__(self, d: int, groups: str) -> None:
        shape = (1,) if d == 1 else (2,) * d
        self.record = ShapeRecord(1, 16, shape, b"d" * 32)
        self.shape = shape
        self.number = 0
        self.cell = self.last_cell = (0,) * d
        self.groups = list(groups)
        self.standings: list[Standing] = []
        self.pace = Pace()
        self.fell_back = 0
        self.shaping = self
        self.lines: list[tuple[int, int]] = []  # number of the round, members
        self.counts: list[tuple[int, bool]] = []  # heads, whether certified

    async def serve(self) -> None:
        await trio.sleep_forever()

    async def begin_cycle(self, deadline: float) -> None:
        self.start_cycle()

    def start_cycle(self) -> None:
        self.number = -(-self.number // len(self.shape)) * len(self.shape)

    def fall_back(self) -> None:
        self.fell_back += 1

    def note_round(self, number: int, n_members: int) -> None:
        self.lines.append((number, n_members))

    def note_cycle(self, heads: int, *, is_certified: bool) -> None:
        self.counts.append((heads, is_certified))

    async def form(self, standing: Callable[[Cell], Standing], deadline: float) -> Begun | Alone:
        await trio.lowlevel.checkpoint()
        if self.groups[0] == ">":  # our line has gone on to the next cycle
            self.number += 1
            self.start_cycle()
        self.standings.append(standing(self.cell))
        number = self.number
        self.number += len(self.shape) > 1
        if self.groups.pop(0) == "-":
            return Alone("nobody came", {peer(7): "asleep"})
        mass = self.standings[-1].mass
        members = tuple(Member(peer(i), "192.0.2.1", 1, True, mass or 1.0, 1.0, 0.5, 1) for i in range(2))
        round_id = bytes([number + 1]) * 16
        begin = Begin(round_id, "run", b"s" * 20, b"d" * 32, 1, number, members, True, 4096, 30.0, 2.0, {})
        return Begun(begin, leader=True)


@dataclass
class Script:
    """A run whose lobby and sessions follow a script."""

    run: Run
    lobby: ScriptedLobby
    sessions: ScriptedSessions
    seat: TrainerSeat

    async def step(self, weight: float = 1.0, timeout_s: float = 60.0) -> Stepped:
        return await self.seat.step(Step(1, weight, timeout_s))

    def values(self) -> set[float]:
        return set(np.frombuffer(self.run.out.view, np.float32).tolist())


def script(
    nursery: trio.Nursery,
    d: int,
    groups: str,
    *outcomes: "float | str",
    rounds: int | str = "exact",
    is_served: bool = True,
) -> Script:
    lobby, sessions = ScriptedLobby(d, groups), ScriptedSessions(list(outcomes))
    run_terms = terms(16, rounds, specs(N_ELEMS))
    out = OutRegion(run_terms.layout.n_bytes)
    run = Run("run", run_terms, lobby, sessions, RoundLimits(), Shelf(run_terms, out, Budget(2)))  # type: ignore[arg-type]
    seat = run.sit("trainer", Region(N_ELEMS * 4))
    np.frombuffer(seat.in_region.view, np.float32)[:] = 100.0
    if is_served:
        nursery.start_soon(run.serve)
    return Script(run, lobby, sessions, seat)


@pytest.mark.parametrize("d", [1, 2, 3])
async def test_a_cycle_starts_each_round_from_the_result_of_the_one_before(
    d: int, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    outcomes = [float(i) for i in range(1, d + 1)]
    play = script(nursery, d, "x" * d, *outcomes)
    stepped = await play.step()
    assert (stepped.averaged, stepped.rounds) == (True, d)
    sources = [set(np.frombuffer(session.source, np.float32).tolist()) for session in play.sessions.made]
    assert sources == [{100.0}] + [{value} for value in outcomes[:-1]]
    assert play.sessions.made[-1].vault.slots is play.run.out.view  # nothing is copied in the end
    assert play.values() == {outcomes[-1]}
    assert [standing.seen for standing in play.lobby.standings] == [-1, *range(d - 1)]


@pytest.mark.parametrize(
    ("d", "groups", "outcomes", "result", "rounds", "reason"),
    [
        (2, "xx", [1.0, "it broke"], 1.0, 1, "averaged with 1 other peer; round 2 of 2: it broke"),
        (2, "x-", [1.0], 1.0, 1, "averaged with 1 other peer; round 2 of 2: nobody came"),
        (3, "xxx", [1.0, "it broke", 3.0], 3.0, 2, "averaged with 1 other peer; round 2 of 3: it broke"),
        (3, "xxx", [1.0, 2.0, "it broke"], 2.0, 2, "averaged with 1 other peer; round 3 of 3: it broke"),
        (2, "-x", [2.0], 2.0, 1, "averaged with 1 other peer; round 1 of 2: nobody came"),
    ],
)
async def test_a_failed_round_of_a_cycle_leaves_the_last_good_result(
    d: int,
    groups: str,
    outcomes: list[float | str],
    result: float,
    rounds: int,
    reason: str,
    nursery: trio.Nursery,
    autojump_clock: MockClock,
) -> None:
    play = script(nursery, d, groups, *outcomes)
    stepped = await play.step()
    assert (stepped.averaged, stepped.rounds, stepped.reason) == (True, rounds, reason)
    assert play.values() == {result}
    assert stepped.generation == 1
    if "it broke" in outcomes:
        assert play.lobby.fell_back == 1
    if outcomes[-1] == "it broke" or groups[-1] == "-":
        assert not stepped.exact


@pytest.mark.parametrize(("outcome", "result"), [(2.0, 2.0), ("it broke", 1.0)])
async def test_a_step_that_meets_the_next_cycle_begins_it_afresh(
    outcome: float | str, result: float, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    play = script(nursery, 2, "x>", 1.0, outcome)
    stepped = await play.step(weight=3.0)
    second = play.sessions.made[1]
    assert second.begin.number == 2
    assert set(np.frombuffer(second.source, np.float32).tolist()) == {100.0}  # not the half-averaged 1.0
    assert play.lobby.standings[1] == enter(3.0, play.lobby.cell)
    assert not stepped.exact
    assert play.values() == {result}


@pytest.mark.parametrize(
    ("groups", "outcomes", "reason"),
    [
        ("--", [], "kept the old values: round 1 of 2: nobody came; round 2 of 2: nobody came"),
        (
            "xx",
            ["no quorum", "no quorum"],
            "kept the old values: round 1 of 2: no quorum; round 2 of 2: no quorum; the others may have averaged",
        ),
    ],
)
async def test_if_no_round_succeeds_the_old_values_stay(
    groups: str, outcomes: list[float | str], reason: str, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    play = script(nursery, 2, groups, *outcomes)
    stepped = await play.step()
    assert (stepped.averaged, stepped.reason, stepped.generation) == (False, reason, 0)
    assert stepped.contributors == ()
    assert (show_peer(peer(7)) in stepped.missing) == ("-" in groups)
    assert play.values() == {0.0}


async def test_rounds_teach_the_run_how_long_silence_may_last(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    play = script(nursery, 1, "x" * (MIN_SAMPLES + 1), *[1.0] * (MIN_SAMPLES + 1), rounds=1)
    for _ in range(MIN_SAMPLES):
        await play.step()
        assert play.sessions.progress_s == PROGRESS.first_s
        play.seat.release(1)
    await play.step()  # a pause of 3 s was usual: BEGIN still says 2 s
    assert play.sessions.progress_s == PROGRESS.of_median * 3.0


async def test_a_result_that_is_copied_into_the_out_region_ends_who_still_serves_from_it(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    play = script(nursery, 2, "xxx-", 1.0, 2.0, 3.0)
    await play.step()
    play.seat.release(1)
    serving = play.sessions.made[1]
    assert serving.vault.slots is play.run.out.view
    assert serving.cancelled == []
    await play.step()
    assert serving.cancelled[0] == "the memory of this round is needed for the next one"
    assert play.values() == {3.0}


async def test_the_next_round_ends_who_still_serves_from_the_memory_that_it_needs(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    play = script(nursery, 1, "xx", 1.0, "hangs", rounds=1)
    await play.step()
    serving = play.sessions.made[0]
    assert serving.cancelled == []
    with trio.move_on_after(1):
        await play.step()
    assert serving.cancelled[0] == "the memory of this round is needed for the next one"


@pytest.mark.parametrize(("starts_at", "moves", "n_rounds"), [(1, True, 1), (0, False, 2), (1, False, 2)])
async def test_a_step_ends_with_its_cycle_and_has_at_most_as_many_rounds(
    starts_at: int, moves: bool, n_rounds: int, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    play = script(nursery, 2, "----")
    play.lobby.start_cycle = lambda: None  # type: ignore[method-assign]
    play.lobby.number = starts_at
    form = play.lobby.form

    async def stay(standing: Callable[[Cell], Standing], deadline: float) -> Begun | Alone:
        verdict = await form(standing, deadline)
        play.lobby.number = play.lobby.number if moves else starts_at
        return verdict

    play.lobby.form = stay  # type: ignore[method-assign]
    assert not (await play.step()).averaged
    assert len(play.lobby.standings) == (n_rounds if moves or starts_at else 1)


async def test_a_region_left_to_a_slow_reader_goes_on_serving_others(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    play = script(nursery, 1, "xx", 1.0, 2.0, rounds=1)
    play.run.readers.add(other := play.run.sit("slow reader", Region(N_ELEMS * 4)))
    old = play.run.out
    play.run.leave(other)
    play.run.readers.add(other)
    await play.step()
    assert play.run.out is not old
    assert play.values() == {1.0}


async def test_a_round_without_a_grid_step_moves_no_mass(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    play = script(nursery, 2, "xx", 1.0, 2.0, rounds=1)
    for _ in range(2):
        stepped = await play.step(weight=3.0)
        assert stepped.rounds == 1
    # Heads move from step to step, so that the swarm is counted.
    assert [(standing.mass, standing.seen) for standing in play.lobby.standings] == [(3.0, -1), (3.0, 0)]
    assert play.lobby.lines == [(0, 2), (1, 2)]
    assert len(play.lobby.counts) == 1  # when the cycle was over


async def test_a_cancelled_step_ends_its_round_and_the_next_one_is_fine(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    play = script(nursery, 1, "xx", "hangs", 2.0, rounds=1)
    with trio.move_on_after(1) as scope:
        await play.step()
    assert scope.cancelled_caught
    await trio.testing.wait_all_tasks_blocked()
    assert play.sessions.made[0].cancelled[0] == "cancelled by the trainer"
    assert play.run.idle.is_set()
    assert play.values() == {0.0}
    stepped = await play.step()
    assert (stepped.averaged, stepped.generation) == (True, 1)


async def test_one_of_two_trainers_may_cancel_and_the_other_gets_the_result(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one, other = await daemons(Swarm(nursery, delay_s=lambda: 0.05), 2)
    stays, cancels, far = await attach(one, "stays"), await attach(one, "cancels"), await attach(other)
    answers: list[Stepped] = []

    async def step(trainer: Trainer, value: float) -> None:
        answers.append(await trainer.step(value))

    async with trio.open_nursery() as steps:
        steps.start_soon(step, stays, 1.0)
        steps.start_soon(step, far, 4.0)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as impatient:
                impatient.start_soon(step, cancels, 1.0)
                await begun(one).wait()
                scope.cancel()
    assert [stepped.averaged for stepped in answers] == [True, True]
    assert (stays.result() == 2.0).all()  # both had been taken in already


async def test_a_trainer_that_cancels_while_another_is_awaited_leaves_no_step_behind(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    play = script(nursery, 1, "x", 2.0, rounds=1)
    other = play.run.sit("other", Region(N_ELEMS * 4))
    with trio.move_on_after(1) as scope:
        await play.step()
    assert scope.cancelled_caught
    await trio.testing.wait_all_tasks_blocked()
    assert play.run.idle.is_set()
    other.close()
    assert (await play.step()).averaged


async def test_a_trainer_that_cancels_while_memory_is_made_lets_the_others_go_on(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = script(nursery, 2, "xx", 1.0, 2.0)

    async def private(n_bytes: int) -> memoryview:
        scope.cancel()
        await trio.sleep_forever()
        raise AssertionError

    with trio.CancelScope() as scope, monkeypatch.context() as patch:
        patch.setattr(run_module, "private", private)
        await play.step()
    await trio.testing.wait_all_tasks_blocked()
    assert scope.cancelled_caught
    assert play.run.idle.is_set()
    assert play.sessions.refused == [RoundId(bytes([1]) * 16)]


async def test_the_memory_of_a_run_goes_with_its_last_trainer(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    play = script(nursery, 2, "xx", 1.0, 2.0)
    assert (await play.step()).averaged
    fds = [play.seat.in_region.fd, play.run.out.fd]
    play.seat.close()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    assert (play.run._spare, play.run._gathered) == (None, None)


async def test_who_leaves_is_not_waited_for(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    play = script(nursery, 1, "x", 2.0, rounds=1)
    other = play.run.sit("other", Region(N_ELEMS * 4))
    began = trio.current_time()
    async with trio.open_nursery() as steps:
        steps.start_soon(play.step)
        await trio.sleep_until(trio.current_time() + 1)
        other.close()
    assert trio.current_time() - began == pytest.approx(1)


async def test_one_trainers_bad_values_spoil_this_step_only(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    (daemon,) = await daemons(Swarm(nursery), 1)
    good, bad = await attach(daemon, "good"), await attach(daemon, "bad")
    answers = await together(lambda: good.step(1.0), lambda: bad.step(math.nan))
    for stepped in answers:
        assert not stepped.averaged
        assert "has a NaN or Inf" in stepped.reason


async def test_steps_that_cannot_be_are_refused(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    play = script(nursery, 1, "xx", 1.0, 2.0, rounds=1)
    with pytest.raises(LocalError, match="no snapshot region yet"):
        await play.seat.step(replace(Step(1, 1.0, 60.0), source="snapshot"))
    assert (await play.step()).averaged


async def test_the_trainers_of_a_machine_weigh_as_much_as_one_may(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    play = script(nursery, 1, "x", 1.0, rounds=1)
    other = play.run.sit("other", Region(N_ELEMS * 4))
    answers = await together(lambda: play.step(weight=MAX_WEIGHT), lambda: other.step(Step(1, MAX_WEIGHT, 60.0)))
    assert all(stepped.averaged for stepped in answers)
    assert play.lobby.standings[0].mass == MAX_WEIGHT


async def test_a_snapshot_is_averaged_instead_of_the_in_region(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    play = script(nursery, 1, "x", 1.0, rounds=1)
    np.frombuffer((await play.seat.open_snapshot()).view, np.float32)[:] = 7.0
    assert await play.seat.open_snapshot() is play.seat.snapshot
    await play.seat.step(Step(1, 1.0, 60.0, source="snapshot"))
    assert set(np.frombuffer(play.sessions.made[0].source, np.float32).tolist()) == {7.0}


async def test_the_shortest_timeout_of_all_trainers_counts(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    (daemon,) = await daemons(Swarm(nursery), 1)
    patient, hasty = await attach(daemon), await attach(daemon)
    answers = await together(lambda: patient.step(1.0), lambda: hasty.step(1.0, timeout_s=2.0))
    assert all(stepped.seconds <= 2.0 for stepped in answers)
    assert all("nobody else has announced this run" in stepped.reason for stepped in answers)
    (record,) = json.loads(daemon.runs.query(Query("rounds")))
    assert (record["averaged"], record["group"], record["reason"]) == (False, [], "nobody else has announced this run")


async def test_no_memory_for_a_result_gives_the_round_back(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = script(nursery, 2, "x")

    def nothing_left(n_bytes: int) -> memoryview:
        raise LocalError("4 KiB of memory are needed")

    monkeypatch.setattr("mpd.daemon.run.private", nothing_left)
    stepped = await play.step()
    assert not stepped.averaged
    assert "4 KiB of memory are needed" in stepped.reason
    assert play.sessions.refused == [bytes([1]) * 16]
    assert play.lobby.fell_back == 1


# ------------------------------------------------------------------------------------------------------------- our bugs


async def test_a_bug_costs_its_step_and_the_next_one_is_fine(
    nursery: trio.Nursery, autojump_clock: MockClock, bugs: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = script(nursery, 1, "++", 3.0, rounds=1)
    form = case.lobby.form
    monkeypatch.setattr(case.lobby, "form", lambda standing, deadline: standing("no cell") / 0)
    failed = await case.step()
    assert not failed.averaged
    assert "unexpected error" in failed.reason
    assert bugs == {"step": 1}
    monkeypatch.setattr(case.lobby, "form", form)
    assert (await case.step()).averaged
    assert case.values() == {3.0}


async def test_a_bug_while_a_result_is_published_leaves_the_old_one(
    nursery: trio.Nursery, autojump_clock: MockClock, bugs: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = script(nursery, 1, "++", 3.0, 4.0, rounds=1)
    publish = case.run.out.publish
    monkeypatch.setattr(case.run.out, "publish", lambda generation: generation / 0)
    assert not (await case.step()).averaged
    assert bugs == {"step": 1}
    monkeypatch.setattr(case.run.out, "publish", publish)
    assert (await case.step()).generation == 2


async def test_a_bug_beside_a_step_is_answered_and_the_run_goes_on(
    nursery: trio.Nursery, autojump_clock: MockClock, bugs: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = script(nursery, 1, "+", 3.0, rounds=1, is_served=False)
    form, serve = case.lobby.form, case.lobby.serve

    async def wait_for_others(standing: Callable[[Cell], Standing], deadline: float) -> Any:
        await trio.sleep_forever()

    async def fail() -> None:
        await trio.sleep(1)
        monkeypatch.setattr(case.lobby, "form", form)
        monkeypatch.setattr(case.lobby, "serve", serve)
        raise ValueError("a bug")

    monkeypatch.setattr(case.lobby, "form", wait_for_others)
    monkeypatch.setattr(case.lobby, "serve", fail)
    nursery.start_soon(supervise, "run", case.run.serve)
    await trio.lowlevel.checkpoint()
    failed = await case.step()
    assert (failed.seq, failed.averaged) == (1, False)
    assert "unexpected error" in failed.reason
    assert bugs == {"run": 1}
    assert (await case.step()).averaged


async def test_a_bug_beside_a_round_leaves_nobody_waiting_for_its_end(
    nursery: trio.Nursery, autojump_clock: MockClock, bugs: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = script(nursery, 1, "+", "hangs", rounds=1, is_served=False)
    serve = case.lobby.serve

    async def fail() -> None:
        await trio.sleep(1)
        assert case.run.shelf.is_late  # who asks for a state now waits for the end of the round
        monkeypatch.setattr(case.lobby, "serve", serve)
        raise ValueError("a bug")

    monkeypatch.setattr(case.lobby, "serve", fail)
    nursery.start_soon(supervise, "run", case.run.serve)
    assert not (await case.step()).averaged
    assert bugs == {"run": 1}
    assert not case.run.shelf.is_late


async def test_a_daemon_may_end_while_its_trainers_are_averaged_first(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is done by a thread, which nothing can interrupt; the step must not go on afterwards."""

    async def run_sync(function: Callable[..., Any], *args: Any) -> Any:
        with trio.CancelScope(shield=True):
            await trio.sleep(1.0)
        return function(*args)

    async with trio.open_nursery() as nursery:
        hosts = await daemons(Swarm(nursery), 2)
        trainers = [await attach(hosts[0], "a"), await attach(hosts[0], "b"), await attach(hosts[1])]
        await trio.sleep(2 * WINDOW_S)
        monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
        for trainer in trainers[:2]:
            nursery.start_soon(trainer.step, 1.0)
        await trio.sleep(0.5)
        nursery.cancel_scope.cancel()
    assert nursery.cancel_scope.cancelled_caught
