"""All runs of a daemon: who may attach, what is asked about them, and where messages of peers go."""

import contextlib
import gc
import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import trio
from fake_peers import FakeDaemon, Swarm, peer, specs
from trio.testing import MockClock

from mpd.control import Attach, Query, Step, Stepped
from mpd.daemon.memory import OutRegion, Region
from mpd.daemon.run import TrainerSeat
from mpd.errors import LocalError, PeerError
from mpd.grid import roster_key
from mpd.ids import show_peer
from mpd.layout import TensorSpec
from mpd.mass import enter
from mpd.messages import (
    Begin,
    DataAccept,
    Declined,
    DialBack,
    DialledBack,
    Goodbye,
    Hello,
    Here,
    Join,
    Joined,
    Member,
    Quit,
    RunTerms,
    Scoped,
    UnknownRound,
)

pytestmark = pytest.mark.usefixtures("repeatable")


async def attach(daemon: FakeDaemon, run: str = "run", n_elems: int = 4, **terms: Any) -> TrainerSeat:
    fields = {"group_size": 16, "rounds": 1, "codec": "raw", "aggregate": "mean"} | terms
    return await daemon.runs.attach(Attach(run, specs(n_elems, "layer.weight"), **fields), "trainer")


async def step(seat: TrainerSeat, value: float) -> Stepped:
    np.frombuffer(seat.in_region.view, np.float32)[:] = value
    return await seat.step(Step(1, 1.0, 30.0))


async def daemons(swarm: Swarm, n: int) -> list[FakeDaemon]:
    made = [swarm.daemon() for _ in range(n)]
    for daemon in made:
        await swarm.nursery.start(daemon.runs.serve)
    return made


async def together(seats: list[TrainerSeat], values: list[float]) -> list[Stepped]:
    answers: dict[int, Stepped] = {}

    async def take(index: int) -> None:
        answers[index] = await step(seats[index], values[index])

    async with trio.open_nursery() as nursery:
        for index in range(len(seats)):
            nursery.start_soon(take, index)
    return [answers[index] for index in range(len(seats))]


def result(seat: TrainerSeat) -> set[float]:
    return set(np.frombuffer(seat.out_region.view, np.float32).tolist())


async def pass_time(seconds: float) -> None:
    await trio.sleep_until(trio.current_time() + seconds)


def ask(daemon: FakeDaemon, what: str, **more: Any) -> Any:
    return json.loads(daemon.runs.query(Query(what, **more)))


# ----------------------------------------------------------------------------------------------------------- attaching


async def test_two_runs_are_apart(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    one, other = await daemons(Swarm(nursery), 2)
    seats = [await attach(one, "a"), await attach(other, "a"), await attach(one, "b", 8), await attach(other, "b", 8)]
    answers = await together(seats, [1, 3, 10, 30])
    assert all(stepped.averaged and len(stepped.peers) == 2 for stepped in answers)
    assert [result(seat) for seat in seats] == [{2.0}, {2.0}, {20.0}, {20.0}]
    seats[0].close()
    await pass_time(1)
    assert (one.runs.of_name("a"), other.runs.of_name("a") is None) == (None, False)
    assert all(stepped.averaged for stepped in await together(seats[2:], [1, 2]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_elems": 8}, r"tensor 'layer.weight' is float32\[8\] here, float32\[4\] there"),
        ({"group_size": 8}, "group_size is 8 here, 16 there"),
        ({"rounds": "exact"}, "rounds is exact here, 1 there"),
        ({"codec": "float16"}, "codec is float16 here, raw there"),
    ],
)
async def test_other_terms_under_a_name_in_use_are_refused(
    changes: dict[str, Any], says: str, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    (daemon,) = await daemons(Swarm(nursery), 1)
    first = await attach(daemon)
    with pytest.raises(LocalError, match=f"'run' is in use on this daemon with other terms: {says}"):
        await attach(daemon, **changes)
    assert len(ask(daemon, "status")["runs"]) == 1
    first.close()
    await pass_time(1)
    await attach(daemon, **changes)


@pytest.mark.parametrize("name", ["", "x" * 257, "a\nb", "\x00"])
async def test_a_name_that_nobody_can_read_is_refused(
    name: str, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    (daemon,) = await daemons(Swarm(nursery), 1)
    with pytest.raises(LocalError, match="1 to 256 printable characters"):
        await attach(daemon, name)


@pytest.mark.parametrize("changes", [{"group_size": 1}, {"rounds": 2}, {"codec": "gzip"}, {"aggregate": "median"}])
async def test_impossible_terms_are_refused(
    changes: dict[str, Any], nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    (daemon,) = await daemons(Swarm(nursery), 1)
    with pytest.raises(LocalError, match=next(iter(changes))):
        await attach(daemon, **changes)
    assert ask(daemon, "status")["runs"] == []


async def test_a_daemon_that_is_leaving_takes_nobody(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    with pytest.raises(LocalError, match="leaving"):
        await attach(swarm.daemon())  # not being served
    (daemon,) = await daemons(swarm, 1)
    daemon.runs.leave()
    with pytest.raises(LocalError, match="leaving"):
        await attach(daemon)


async def test_whoever_attaches_as_the_last_trainer_leaves_gets_a_run_that_works(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    look_up_s = 0.1
    one, other = await daemons(Swarm(nursery, look_up_s=lambda: look_up_s), 2)
    seats = [await attach(one), await attach(other)]
    await together(seats, [1, 3])
    look_up_s = 0.25
    seats[0].close()
    await pass_time(0.01)  # the run that ends is taking its announcements back
    look_up_s = 0.01
    again = await attach(one)
    await pass_time(1)
    assert one.own in {record.publisher for record in await other.rendezvous.seek(roster_key("run"))}
    assert [stepped.averaged for stepped in await together([again, seats[1]], [5, 7])] == [True, True]
    assert result(again) == result(seats[1]) == {6.0}
    again.close()
    await pass_time(1)
    assert one.runs.of_name("run") is None
    assert one.rendezvous._records == {}


async def test_a_trainer_that_leaves_before_its_run_has_started(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    (daemon,) = await daemons(Swarm(nursery), 1)
    (await attach(daemon)).close()
    await pass_time(1)
    assert daemon.runs.of_name("run") is None
    assert daemon.rendezvous._records == {}


async def test_trainers_that_attach_at_once_share_a_run(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    (daemon,) = await daemons(Swarm(nursery), 1)
    seats: list[TrainerSeat] = []

    async def take() -> None:
        seats.append(await attach(daemon))

    async with trio.open_nursery() as trainers:
        for _ in range(3):
            trainers.start_soon(take)
    assert len({seat.out_region for seat in seats}) == 1
    assert len({seat.in_region for seat in seats}) == 3


async def test_a_run_that_ends_while_someone_attaches_begins_anew(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (daemon,) = await daemons(Swarm(nursery), 1)
    first = await attach(daemon)
    make = Region.make

    async def make_slowly(n_bytes: int) -> Region:
        first.close()
        return await make(n_bytes)

    monkeypatch.setattr(Region, "make", make_slowly)
    seat = await attach(daemon)
    assert seat.out_region is not first.out_region
    assert seat.out_region.view.nbytes == 16
    assert [run["trainers"] for run in ask(daemon, "status")["runs"]] == [1]


@pytest.mark.parametrize("moment", [Region, OutRegion])
@pytest.mark.parametrize("end", ["cancelled", "no memory"])
async def test_an_attachment_that_does_not_come_about_leaves_nothing(
    moment: type[Region], end: str, nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (daemon,) = await daemons(Swarm(nursery), 1)
    gc.collect()  # of what other tests left open
    before = os.listdir("/proc/self/fd")

    async def fail(n_bytes: int) -> Region:
        scope.cancel()
        await trio.lowlevel.checkpoint()
        raise AssertionError("went on after it was cancelled")

    async def refuse(n_bytes: int) -> Region:
        raise LocalError("no memory")

    with trio.CancelScope() as scope, monkeypatch.context() as patch:
        patch.setattr(moment, "make", fail if end == "cancelled" else refuse)
        with contextlib.suppress(LocalError):
            await attach(daemon)
    assert os.listdir("/proc/self/fd") == before
    assert ask(daemon, "status")["runs"] == []
    assert (await attach(daemon)).in_region.n_bytes == 16


async def test_many_tensors_are_worked_out_elsewhere(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = []

    async def run_sync(function: Callable[[], Any]) -> Any:
        elsewhere.append(function)
        return function()

    (daemon,) = await daemons(Swarm(nursery), 1)
    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    tensors = tuple(TensorSpec(f"w{i}", "float32", (1,)) for i in range(5001))
    for some in (tensors[:-1], tensors):
        seat = await daemon.runs.attach(Attach(f"{len(some)} tensors", some, 16, 1, "raw", "mean"), "trainer")
        assert seat.in_region.n_bytes == len(some) * 4
    assert len(elsewhere) == 1


async def test_leaving_waits_for_the_step_in_progress(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    (daemon,) = await daemons(Swarm(nursery), 1)
    seat = await attach(daemon)
    with trio.fail_after(0.1):
        await daemon.runs.wait_idle()
    began = trio.current_time()
    async with trio.open_nursery() as steps:
        steps.start_soon(step, seat, 1.0)
        await pass_time(0.5)
        daemon.runs.leave()
        await daemon.runs.wait_idle()
    assert trio.current_time() - began == pytest.approx(5.0, abs=0.3)


# ----------------------------------------------------------------------------------------------------------- questions


async def test_the_status_describes_each_run(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    one, other = await daemons(Swarm(nursery), 2)
    one.runs.status = lambda: {"peer_id": show_peer(one.own), "version": "1"}
    seats = [await attach(one), await attach(other)]
    await attach(one)
    (before,) = ask(one, "status")["runs"]
    assert (before["shape"], before["key"], before["phase"]) == ([], [], 0)
    await together(seats, [1, 2])
    status = ask(one, "status")
    assert set(status) == {"peer_id", "version", "runs"}
    (run,) = status["runs"]
    assert {"name", "shape", "key", "phase", "peers", "trainers", "rounds"} <= set(run)
    assert (run["name"], run["shape"], run["key"], run["phase"]) == ("run", [1], [0], 0)
    assert (run["peers"], run["trainers"], run["rounds"], run["bytes"], run["tensors"]) == (2, 2, 1, 16, 1)
    assert run["other_terms"] == {}


async def test_the_status_names_peers_with_other_terms(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    one, other = await daemons(Swarm(nursery), 2)
    await attach(one, n_elems=4)
    await attach(other, n_elems=8)
    await pass_time(2)
    (run,) = ask(one, "status")["runs"]
    assert run["other_terms"] == {show_peer(other.own): "tensor 'layer.weight' is float32[4] here, float32[8] there"}


async def test_rounds_are_told_by_run_newest_last_and_outlive_their_run(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one, other = await daemons(Swarm(nursery), 2)
    seats = {name: [await attach(one, name), await attach(other, name)] for name in "ab"}
    for name in "aab":
        await together(seats[name], [1, 2])
    assert [record["run"] for record in ask(one, "rounds")] == ["a", "a", "b"]
    assert [record["run"] for record in ask(one, "rounds", last=2)] == ["a", "b"]
    assert [record["run"] for record in ask(one, "rounds", run="b")] == ["b"]
    assert ask(one, "rounds", last=0) == ask(one, "rounds", run="c") == []
    seats["a"][0].close()
    await pass_time(1)
    assert [record["run"] for record in ask(one, "rounds")] == ["a", "a", "b"]
    (record,) = ask(one, "rounds", run="a", last=1)
    assert {"group", "contributors", "seconds", "bytes_sent", "bytes_received", "reason"} <= set(record)


async def test_peers_and_nonsense_can_be_asked_for(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    (daemon,) = await daemons(Swarm(nursery), 1)
    assert ask(daemon, "peers") == []
    with pytest.raises(LocalError, match="status, rounds or peers expected"):
        ask(daemon, "weather")


# ---------------------------------------------------------------------------------------------------- the switchboard


async def linked(nursery: trio.Nursery, *, n: int = 2) -> tuple[FakeDaemon, FakeDaemon, Any, Any]:
    """Return two daemons in one run, and the link of the second to the first and back."""
    one, other = await daemons(Swarm(nursery), n)
    await attach(one)
    await attach(other)
    await pass_time(2.5)
    return one, other, other.peers.get(one.own), one.peers.get(other.own)


JOIN = Join("nobody's", b"s" * 20, b"d" * 32, 1, 0, 0, enter(1, (0,)), "192.0.2.1", 1, True, 0.0, 10.0)
MEMBERS = tuple(Member(peer(i), "192.0.2.1", 1, True, 1.0, 1.0, 0.5, 1) for i in range(2))
BEGIN = Begin(b"r" * 16, "nobody's", b"s" * 20, b"d" * 32, 1, 0, MEMBERS, True, 4096, 30.0, 2.0, {})


@pytest.mark.parametrize("message", [JOIN, Here("nobody's", b"s" * 20, 0, True, 1)])
async def test_who_looks_for_a_run_that_is_not_here_hears_so(
    message: Any, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    _, _, there, back = await linked(nursery)
    there.send(message)
    await pass_time(0.1)
    if isinstance(message, Join):
        assert back.said[-1] == Declined(b"s" * 20, "busy", "no trainer here takes part in that run")
    else:
        assert back.said[-1] == Quit(b"s" * 20)
    assert back.up


async def test_a_begin_for_a_run_that_is_not_here_is_refused(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    one, _, there, back = await linked(nursery)
    there.send(BEGIN)
    await pass_time(0.1)
    assert b"r" * 16 in one.sessions._ended
    there.send(Scoped(b"r" * 16, b"late"))
    await pass_time(0.1)
    assert UnknownRound(b"r" * 16) not in back.said


@pytest.mark.parametrize(
    "message",
    [
        JOIN,
        Here("run", b"s" * 20, 0, True, 0),
        Joined(b"s" * 20, 0),
        BEGIN,
        Scoped(b"r" * 16, b"done"),
    ],
)
async def test_an_observer_takes_no_part_in_rounds_and_leads_none(
    message: Any, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one, _, _, back = await linked(nursery)
    back.member = replace(back.member, role="observer")
    with pytest.raises(PeerError, match=f"it is an observer, .* and said {type(message).__name__}$"):
        one.switchboard.on_message(back, message)
    one.switchboard.on_message(back, Quit(b"s" * 20))


@pytest.mark.parametrize(
    "message",
    [
        Hello(2, b"i" * 16, "192.0.2.1", 1),
        DataAccept(b"c" * 16, bytes(32), "aes-256-gcm"),
    ],
)
async def test_what_may_not_be_said_on_a_link_ends_it(
    message: Any, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one, _, there, back = await linked(nursery)
    with pytest.raises(PeerError, match=f"it said {type(message).__name__} on a link that is already made"):
        one.switchboard.on_message(back, message)
    there.send(message)
    await pass_time(0.1)
    assert not there.up


async def test_other_messages_for_nobody_are_dropped(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    _, _, there, back = await linked(nursery)
    n_said = len(back.said)
    there.send(Quit(b"s" * 20))
    there.send(RunTerms("nobody's", specs(), 16, 1, "raw", "mean", answer_me=True))
    await pass_time(0.1)
    assert there.up
    assert len(back.said) == n_said


async def test_goodbyes_and_broken_links_reach_every_run(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    one, other, there, _ = await linked(nursery)
    await attach(one, "second")
    await attach(other, "second")
    await pass_time(3)
    lobbies = [one.runs._runs[name].lobby for name in ("run", "second")]
    assert all(lobby.company == [other.own] for lobby in lobbies)
    there.send(Goodbye("x" * 5000))
    await pass_time(0.1)
    assert all(lobby.company == [] for lobby in lobbies)
    assert all(lobby._contacts.absences == {other.own: f"left: {'x' * 200}"} for lobby in lobbies)


async def test_a_link_that_was_replaced_costs_nobody_its_place(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one, other, _, back = await linked(nursery)
    fresh = object()
    one.peers.made[other.own] = fresh
    one.switchboard.on_link_down(back, "it called again")
    assert one.runs._runs["run"].lobby.company == [other.own]
    one.peers.made[other.own] = back
    one.switchboard.on_link_down(back, "it is gone")
    assert one.runs._runs["run"].lobby.company == []


async def test_a_daemon_that_does_not_know_whether_it_can_be_dialled_asks(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    one, other = await daemons(swarm, 2)
    one.peers.is_reachable = False
    await attach(one)
    await attach(other)
    await pass_time(2)
    assert DialBack(one.peers.endpoint.port) in one.peers.get(other.own).said
    assert DialledBack(False, "192.0.2.1") in other.peers.get(one.own).said or one.peers.is_reachable
    assert any("reachable from outside" in line for line in one.heard)


async def pass_over(*of_no_interest: Any) -> None:
    pass


@pytest.mark.parametrize(("reached", "says"), [(True, "reachable from outside at"), (False, "not reachable")])
async def test_the_answer_to_a_dial_back_is_believed(
    reached: bool, says: str, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one, other, there, _ = await linked(nursery)
    one.peers.is_reachable = False
    other.switchboard._dial_back = pass_over  # type: ignore[method-assign]  # the daemon there says nothing itself
    one.switchboard.dial_backs.ask(there.far, 4747)
    there.send(DialledBack(reached, "evil.example"))
    await pass_time(0.1)
    assert one.peers.is_reachable is reached
    assert one.heard[-1].startswith(says)
    assert "evil" not in one.heard[-1]


async def test_an_answer_that_nobody_asked_for_ends_the_link_and_the_log_names_its_sender(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one, other, there, _ = await linked(nursery)
    one.peers.is_reachable = False
    there.send(DialledBack(True, "evil.example"))
    await pass_time(0.1)
    assert not one.peers.is_reachable
    assert "which nobody had asked" in there.reason
    assert any(show_peer(other.own) in line and "which nobody had asked" in line for line in one.heard)
