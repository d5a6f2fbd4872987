"""Every round that was not perfect says why, peer by peer: through whole daemons, one test for each cause.

A peer is missing because it was not in the group (it was unreachable, its trainer had not asked, it left, it uses other
terms, the leader left it out or did not know of it), because it was lost on the way (its link ended, it left the round,
it was silent, it sent what cannot be used: those are told by the exchange and tested with it), or because there was no
group at all. What is told must be the same in the outcome of the step and in `mpd rounds`.
"""

import itertools
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio
from fake_peers import FakeDaemon, Swarm, peer, specs
from trio.testing import MockClock

from mpd.control import Attach, Query, Step, Stepped
from mpd.daemon.history import HISTORY_ROUNDS, History, left_out
from mpd.daemon.run import TrainerSeat
from mpd.daemon.sessions import RoundResult
from mpd.ids import RoundId, show_peer
from mpd.matchmaking import Begun
from mpd.messages import Begin, Goodbye, Member

pytestmark = pytest.mark.usefixtures("repeatable")

N_ELEMS = 4096


@pytest.fixture(autouse=True)
def inline_threads(repeatable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock clock cannot see what a thread does, so there is none."""

    async def run_sync(function: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)


async def daemons(swarm: Swarm, n: int) -> list[FakeDaemon]:
    made = [swarm.daemon() for _ in range(n)]
    for daemon in made:
        await swarm.nursery.start(daemon.runs.serve)
    return made


async def attach(daemon: FakeDaemon, label: str = "trainer", **terms: Any) -> TrainerSeat:
    fields = {"group_size": 16, "rounds": 1, "codec": "raw", "aggregate": "mean"} | terms
    return await daemon.runs.attach(Attach("run", specs(N_ELEMS), **fields), label)


async def step(seat: TrainerSeat, timeout_s: float = 30.0) -> Stepped:
    np.frombuffer(seat.in_region.view, np.float32)[:] = 1.0
    return await seat.step(Step(1, 1.0, timeout_s))


async def together(seats: list[TrainerSeat], timeout_s: float = 30.0) -> list[Stepped]:
    answers: dict[int, Stepped] = {}

    async def take(index: int) -> None:
        answers[index] = await step(seats[index], timeout_s)

    async with trio.open_nursery() as nursery:
        for index in range(len(seats)):
            nursery.start_soon(take, index)
    return [answers[index] for index in range(len(seats))]


async def pass_time(seconds: float) -> None:
    await trio.sleep_until(trio.current_time() + seconds)


def rounds(daemon: FakeDaemon) -> list[dict[str, Any]]:
    """Return what `mpd rounds --json` prints."""
    found: list[dict[str, Any]] = json.loads(daemon.runs.query(Query("rounds")))
    return found


def status(daemon: FakeDaemon) -> dict[str, Any]:
    """Return what `mpd status --json` says about the run."""
    (run,) = json.loads(daemon.runs.query(Query("status")))["runs"]
    return dict(run)


def cause(daemon: FakeDaemon, stepped: Stepped, of: FakeDaemon) -> str:
    """Return why a peer was missing from the last round: the same wherever it is told."""
    name = show_peer(of.own)
    record = rounds(daemon)[-1]
    assert not record["perfect"]
    assert record["missing"][name] == stepped.missing[name]
    assert status(daemon)["last_imperfect"] == record
    return str(stepped.missing[name])


def on_begin(daemon: FakeDaemon, then: Callable[[], None]) -> None:
    """Call `then` as soon as a round begins on `daemon`."""
    begin = daemon.sessions.begin

    def watched(*args: Any) -> Any:
        session = begin(*args)
        then()
        return session

    daemon.sessions.begin = watched  # type: ignore[method-assign]


# -------------------------------------------------------------------------------------------------- lost on the way


async def test_a_perfect_round_says_nothing(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    hosts = await daemons(Swarm(nursery), 3)
    await together([await attach(daemon) for daemon in hosts])
    for daemon in hosts:
        (record,) = rounds(daemon)
        assert (record["perfect"], record["missing"], record["notes"], record["reason"]) == (True, {}, [], "")
        assert status(daemon)["last_imperfect"] is None


async def test_a_link_that_ended_in_the_round(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery, delay_s=lambda: 0.01)
    hosts = await daemons(swarm, 3)
    seats = [await attach(daemon) for daemon in hosts]
    on_begin(hosts[2], lambda: swarm.hub.kill(hosts[2].own))
    answers = await together(seats, timeout_s=8.0)
    for i in (0, 1):
        assert answers[i].averaged
        assert "s into the round: it closed the connection" in cause(hosts[i], answers[i], hosts[2])
    notes = [note for i in (0, 1) for note in rounds(hosts[i])[-1]["notes"]]
    assert any("were reduced again by others: its link ended" in note for note in notes)
    failed = rounds(hosts[2])[-1]
    assert (failed["averaged"], failed["reason"]) == (False, "no link to any other member is left")
    assert all("its link ended 0.0 s into the round" in failed["missing"][show_peer(hosts[i].own)] for i in (0, 1))


async def test_a_trainer_that_cancels_in_the_round_has_left_it(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery, delay_s=lambda: 0.01)
    hosts = await daemons(swarm, 3)
    seats = [await attach(daemon) for daemon in hosts]
    scope = trio.CancelScope()
    on_begin(hosts[2], scope.cancel)
    answers: dict[int, Stepped] = {}

    async def take(i: int) -> None:
        answers[i] = await step(seats[i], timeout_s=8.0)

    async with trio.open_nursery() as steps:
        for i in (0, 1):
            steps.start_soon(take, i)
        with scope:
            await step(seats[2])
    for i in (0, 1):
        assert "it left the round 0.0 s after it began" in cause(hosts[i], answers[i], hosts[2])
    record = rounds(hosts[2])[-1]
    assert (record["averaged"], record["reason"]) == (False, "cancelled by the trainer")
    assert sorted(record["group"]) == sorted(show_peer(daemon.own) for daemon in hosts)


async def test_a_data_connection_that_was_replaced_is_noted(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    hosts = await daemons(Swarm(nursery, delay_s=lambda: 0.05), 2)
    seats = [await attach(daemon) for daemon in hosts]

    async def break_it() -> None:
        await pass_time(0.01)
        link = hosts[0].peers.get(hosts[1].own)
        link.repairs_left, link.repair_cause = link.repairs_left - 2, "connection reset by peer"

    on_begin(hosts[0], lambda: nursery.start_soon(break_it))
    await together(seats)
    record = rounds(hosts[0])[-1]
    assert (record["averaged"], record["perfect"], record["missing"]) == (True, False, {})
    (note,) = record["notes"]
    assert note.startswith("the data connection to ")
    assert note.endswith(".. was replaced 2 times: connection reset by peer")


# ------------------------------------------------------------------------------------------------- not in the group


async def test_a_trainer_that_had_not_asked(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """The leader says so itself, the others have it from the leader."""
    hosts = await daemons(Swarm(nursery), 3)
    seats = [await attach(daemon) for daemon in hosts]
    await pass_time(3)
    answers = await together(seats[:2])
    told = sorted(cause(hosts[i], answers[i], hosts[2]) for i in (0, 1))
    sentence = "its trainer had not asked for a step when the window ended"
    assert told == [sentence, f"the leader left it out: {sentence}"]


async def test_a_trainer_of_this_machine_that_had_not_asked(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    one, other = await daemons(Swarm(nursery), 2)
    busy, _, far = await attach(one, "gpu 0"), await attach(one, "gpu 1"), await attach(other)
    answers = await together([busy, far])
    missing = {"trainer gpu 1": "had not asked for a step when the window ended"}
    assert rounds(one)[-1]["missing"] == answers[0].missing == missing
    assert not rounds(one)[-1]["perfect"]
    assert rounds(other)[-1]["perfect"]


async def test_a_peer_that_cannot_be_reached(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    hosts = await daemons(swarm, 2)
    seats = [await attach(daemon) for daemon in hosts]
    swarm.hub.dead.add(hosts[1].own)
    stepped = await step(seats[0])
    assert not stepped.averaged
    assert "connection refused" in cause(hosts[0], stepped, hosts[1])
    assert rounds(hosts[0])[-1]["group"] == []


async def test_a_peer_that_said_goodbye(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    hosts = await daemons(Swarm(nursery), 2)
    seats = [await attach(daemon) for daemon in hosts]
    await together(seats)
    seats[0].release(1)
    hosts[1].peers.get(hosts[0].own).send(Goodbye("its daemon was told to leave"))
    await pass_time(0.1)
    assert status(hosts[0])["absent"] == {show_peer(hosts[1].own): "left: its daemon was told to leave"}
    stepped = await step(seats[0])
    assert cause(hosts[0], stepped, hosts[1]) == "left: its daemon was told to leave"


async def test_a_peer_with_other_terms(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    hosts = await daemons(Swarm(nursery), 2)
    seats = [await attach(hosts[0]), await attach(hosts[1], group_size=8)]
    answers = await together(seats)
    assert cause(hosts[0], answers[0], hosts[1]) == "group_size is 16 here, 8 there"


async def test_nobody_else(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """Being alone for long fills no history."""
    (daemon,) = await daemons(Swarm(nursery), 1)
    seat = await attach(daemon)
    for _ in range(5):
        stepped = await step(seat)
    (record,) = rounds(daemon)
    assert (record["reason"], record["times"], record["missing"]) == ("nobody else has announced this run", 5, {})
    assert record["reason"] in stepped.reason


async def test_a_step_that_is_cancelled_before_a_group_begins(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    hosts = await daemons(Swarm(nursery), 2)
    seats = [await attach(daemon) for daemon in hosts]
    await pass_time(3)
    with trio.move_on_after(0.5):
        await step(seats[0])
    await pass_time(0.1)
    assert (rounds(hosts[0])[-1]["reason"], rounds(hosts[0])[-1]["group"]) == ("cancelled by the trainer", [])


def begun(leader: bool, left: dict[bytes, str]) -> Begun:
    members = tuple(Member(peer(i), "192.0.2.1", 1, True, 1.0, 1.0, 0.5, i) for i in range(2))
    return Begun(Begin(b"r" * 16, "run", b"s" * 20, b"d" * 32, 1, 0, members, True, 4096, 30.0, 2.0, left), leader)


def test_the_word_of_a_leader_is_told_as_its_word() -> None:
    left: dict[bytes, str] = {bytes(peer(5)): "weighs \x1b[31m1e9"}
    assert left_out(begun(True, left), []) == {show_peer(peer(5)): "weighs \x1b[31m1e9"}
    assert left_out(begun(False, left), [peer(6)]) == {
        show_peer(peer(5)): "the leader left it out: weighs ?[31m1e9",
        show_peer(peer(6)): "was announced here, and the leader of the group began without it",
    }


async def test_whom_the_leader_did_not_know_of_is_overlooked(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    hosts = await daemons(Swarm(nursery), 2)
    seats = [await attach(daemon) for daemon in hosts]
    await pass_time(3)
    await together(seats)
    lobbies = [daemon.runs._runs["run"].lobby for daemon in hosts]
    assert [lobby.overlooked for lobby in lobbies] == [[], []]
    for lobby in lobbies:
        assert lobby._begun is not None
        lobby._begun.company.add(peer(9))  # known to one of them from the rendezvous alone
    assert sorted(lobby.overlooked for lobby in lobbies) == [[], [peer(9)]]


# ---------------------------------------------------------------------------------------------- what happens just now


async def test_the_status_says_what_is_waited_for(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery, delay_s=lambda: 0.05)
    hosts = await daemons(swarm, 2)
    first = await attach(hosts[0], "gpu 0")
    assert status(hosts[0])["state"] == "looking for other peers of this run"
    second, far = await attach(hosts[0], "gpu 1"), await attach(hosts[1])
    await pass_time(3)
    assert status(hosts[0])["state"] == "idle: no trainer has asked for a step"
    seen: list[str] = []
    on_begin(hosts[0], lambda: nursery.start_soon(look))

    async def look() -> None:
        await pass_time(0.01)
        seen.append(status(hosts[0])["state"])

    async with trio.open_nursery() as steps:
        steps.start_soon(step, first)
        await pass_time(0.5)
        assert status(hosts[0])["state"] == "waiting for 1 of 2 trainers of this machine to ask: gpu 1"
        steps.start_soon(step, second)
        await pass_time(0.5)
        assert status(hosts[0])["state"].startswith("waiting for 1 of 2 announced peers: ")
        steps.start_soon(step, far)
    assert seen == ["averaging with 1 other peer, waiting for 2 of 2 chunks"]
    assert status(hosts[0])["state"] == "idle: no trainer has asked for a step"


# ------------------------------------------------------------------------------------------------------- the records


def ended(seconds: float, **fields: Any) -> RoundResult:
    usual = {"reason": "", "contributors": 0b11, "confirmed": 0b11, "missing": {}, "bytes_sent": 1, "bytes_received": 1}
    return RoundResult(**{"success": True, "seconds": seconds, **usual, **fields})


def play(history: History, *results: RoundResult) -> list[dict[str, Any]]:
    numbers = itertools.count()
    for result in results:
        session: Any = SimpleNamespace(
            members=(peer(0), peer(1)),
            round_id=RoundId(b"r" * 16),
            begin=SimpleNamespace(number=next(numbers), epoch=1),
        )
        history.add_round(session, result, {})
    return list(history.records)


def test_a_round_that_ended_late_names_who_came_last() -> None:
    records = play(History("run", lambda: 0.0), *[ended(0.1)] * 6, ended(2.0, last_delivery=(1, 1.9)), ended(0.5))
    late = records[6]
    assert (late["averaged"], late["perfect"]) == (True, False)
    (note,) = late["notes"]
    assert note.startswith("ended late, after 2.0 s; a round of this run usually takes 0.10 s; ")
    assert note.endswith(".. was the last to deliver, after 1.9 s")
    assert [record["perfect"] for record in records if record is not late] == [True] * 7  # half a second is no matter


def test_a_round_may_be_imperfect_although_nobody_is_missing() -> None:
    history = History("run", lambda: 0.0)
    play(history, ended(0.1, notes=("the data connection to somebody was replaced once: it broke",)))
    assert history.last_imperfect is not None
    assert history.last_imperfect["missing"] == {}


def test_the_history_is_bounded_and_counts_the_same_step_once() -> None:
    times = itertools.count()
    history = History("run", lambda: float(next(times)))
    for number in range(2 * HISTORY_ROUNDS):
        history.add_step(number, 1, f"reason {number}", {}, 1.0)
    assert len(history.records) == HISTORY_ROUNDS
    for _ in range(3):
        history.add_step(7, 1, "alone", {}, 1.0)
    history.add_step(7, 1, "alone", {"x": "late"}, 1.0)
    assert [record["times"] for record in history.records][-2:] == [3, 1]
    assert history.n_added == 2 * HISTORY_ROUNDS + 4
