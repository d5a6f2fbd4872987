"""Late joiners: whole daemons without sockets, one of which comes when the others have averaged.

What a load takes is seconds of the test's clock; a link takes a hundredth of one for each chunk.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from fake_peers import Swarm
from state_swarm import N_CHUNKS, N_ELEMS, Host, another_trainer, host, small_chunks_and_no_threads, together
from trio.testing import MockClock

from mpd.daemon import loading, state_desk
from mpd.daemon.containment import UNEXPECTED
from mpd.daemon.loading import ANSWER_S, MAX_ASKED, SETTLE_S, SOON_S
from mpd.daemon.memory import OutRegion
from mpd.daemon.shelf import _hashes
from mpd.ids import show_peer
from mpd.manifest import Manifest
from mpd.state_messages import NoState, StateAsk, StateHashes, StateOffer


@pytest.fixture(autouse=True)
def small(repeatable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks_and_no_threads(monkeypatch)


def name(host: Host) -> str:
    return show_peer(host.daemon.own)


async def averaged(swarm: Swarm, n: int, metadata: bytes = b"", steps: int = 1) -> list[Host]:
    """Return hosts that have averaged: 2.0 for three of them, all in the same bytes."""
    hosts = [await host(swarm) for _ in range(n)]
    for _ in range(steps):
        answers = await together(hosts, 1.0, 2.0, 3.0, metadata=metadata)
        assert all(answer.averaged for answer in answers)
    return hosts


def slow_swarm(nursery: trio.Nursery) -> Swarm:
    return Swarm(nursery, delay_s=lambda: 0.01)


def on_chunks(monkeypatch: pytest.MonkeyPatch, hook: Callable[[int], None]) -> None:
    """Call `hook` with the number of chunks that have left, whenever one does."""
    sent = state_desk._Parcel.sent
    count = 0

    def watched(parcel: Any, n_bytes: int) -> None:
        nonlocal count
        count += 1
        hook(count)
        sent(parcel, n_bytes)

    monkeypatch.setattr(state_desk._Parcel, "sent", watched)


async def test_who_comes_late_gets_what_the_others_hold_from_all_of_them(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = slow_swarm(nursery)
    hosts = await averaged(swarm, 3, b"step 1", steps=2)
    late = await host(swarm)
    loaded = await late.load()
    assert loaded.loaded, loaded.reason
    assert late.values() == {2.0}
    assert (loaded.number, loaded.metadata) == (2, b"step 1")
    assert set(loaded.sources) == {name(each) for each in hosts}
    assert loaded.bytes_received == 4 * N_ELEMS
    assert loaded.dropped == {}
    assert loaded.seconds < 2
    assert loaded.reason == "the vector after round 2, from 3 of 3 peers that offered one"
    for each in hosts:  # all hold the same, and none of them has copied it
        assert each.held[0].manifest == late.held[0].manifest
        assert each.held[0].region is each.run.out


async def test_rounds_go_on_and_the_late_one_is_part_of_them(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = slow_swarm(nursery)
    hosts = await averaged(swarm, 3)
    late = await host(swarm)
    assert (await late.load()).number == 1
    region = late.loaded
    answers = await together([*hosts, late], 1.0, 2.0, 3.0, 6.0)
    assert all(len(answer.contributors) == 4 for answer in answers)
    assert answers[3].new_out  # what it has mapped is its loaded state
    assert late.seat.out_region is not region
    assert {each.run.shelf.age for each in [*hosts, late]} == {2}
    assert late.values() == {2.0}  # a state is never written again
    again = await host(swarm)
    assert (await again.load()).number == 2
    assert again.values() == {3.0}


async def test_joiners_in_a_row_get_what_is_newest_then(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """Those who have loaded and want nothing more keep no newer state from being held."""
    swarm = slow_swarm(nursery)
    hosts = await averaged(swarm, 3)
    for number in range(1, 5):
        late = await host(swarm)
        loaded = await late.load()
        assert (loaded.number, len(loaded.sources)) == (number, 3)
        late.seat.close()
        await trio.sleep(2)
        assert all(answer.averaged for answer in await together(hosts, 1.0, 2.0, 3.0))


async def test_nobody_waits_for_a_trainer_that_loads(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = slow_swarm(nursery)
    hosts = await averaged(swarm, 3)
    late = await host(swarm)
    await trio.sleep(20)  # now it is one of them for everybody
    swarm.hub.delay_s = lambda: 0.1
    async with trio.open_nursery() as load:
        load.start_soon(late.load)
        await trio.sleep(1)
        began = trio.current_time()
        answers = await together(hosts, 1.0, 2.0, 3.0)
        assert trio.current_time() - began < swarm.limits.window_s
        assert all(len(answer.contributors) == 3 for answer in answers)
    answers = await together([*hosts, late], 1.0, 2.0, 3.0, 6.0)  # and then it is one of them again
    assert all(len(answer.contributors) == 4 for answer in answers)


async def test_a_source_that_dies_half_way_does_not_matter(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = slow_swarm(nursery)
    hosts = await averaged(swarm, 3)
    late = await host(swarm)
    on_chunks(monkeypatch, lambda n: swarm.hub.kill(hosts[0].daemon.own) if n == N_CHUNKS // 2 else None)
    loaded = await late.load()
    assert loaded.loaded, loaded.reason
    assert late.values() == {2.0}
    assert loaded.bytes_received == 4 * N_ELEMS  # nothing of what had come was fetched again
    assert loaded.seconds < 3


async def test_a_source_that_falls_silent_is_left_behind(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = slow_swarm(nursery)
    hosts = await averaged(swarm, 3)
    late = await host(swarm)
    ship = state_desk._Service.run

    async def stuck(service: Any) -> None:
        if service._desk is hosts[1].daemon.runs.desk:
            await trio.sleep_forever()
        await ship(service)

    monkeypatch.setattr(state_desk._Service, "run", stuck)
    loaded = await late.load()
    assert loaded.loaded, loaded.reason
    assert late.values() == {2.0}
    assert name(hosts[1]) not in loaded.sources
    assert loaded.seconds < 4  # what it owed was asked of the others long before it was given up


async def test_a_chunk_that_lies_costs_its_sender_the_load_and_nobody_else_anything(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = slow_swarm(nursery)
    hosts = await averaged(swarm, 3)
    late = await host(swarm)
    await hosts[2].run.shelf.state()
    hosts[2].held[0].region.view[:] = bytes(4 * N_ELEMS)  # what it had offered was right
    loaded = await late.load()
    assert loaded.loaded, loaded.reason
    assert late.values() == {2.0}
    assert list(loaded.dropped) == [name(hosts[2])]
    assert "is something else" in loaded.dropped[name(hosts[2])]
    assert set(loaded.sources) == {name(each) for each in hosts[:2]}


def pretend(liar: Host, value: float, number: int) -> None:
    """Let `liar` hold another vector than the rest."""
    region = OutRegion(4 * N_ELEMS)
    region.view[:] = bytes([int(value)]) * (4 * N_ELEMS)
    shelf = liar.run.shelf
    vector = Manifest(shelf.terms.digest, b"x" * 16, number, 4 * N_ELEMS, b"".join(_hashes(region.view)))
    shelf.reserve()
    shelf.adopt(region, vector, b"poison")


async def test_one_peer_alone_does_not_decide_however_new_it_claims_to_be(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = slow_swarm(nursery)
    hosts = await averaged(swarm, 3, b"honest")
    late = await host(swarm)
    pretend(hosts[0], 9, 1 << 40)
    loaded = await late.load()
    assert loaded.loaded, loaded.reason
    assert (late.values(), loaded.number, loaded.metadata) == ({2.0}, 1, b"honest")
    assert set(loaded.sources) == {name(each) for each in hosts[1:]}
    assert loaded.reason.endswith("from 2 of 3 peers that offered one")


async def test_if_the_chosen_state_vanishes_another_one_is_loaded(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = slow_swarm(nursery)
    hosts = await averaged(swarm, 3)
    late = await host(swarm)
    pretend(hosts[0], 0, 7)

    def kill(n: int) -> None:
        if n == N_CHUNKS // 2:
            for each in hosts[1:]:
                swarm.hub.kill(each.daemon.own)

    on_chunks(monkeypatch, kill)
    loaded = await late.load()
    assert loaded.loaded, loaded.reason
    assert (loaded.number, loaded.sources) == (7, (name(hosts[0]),))
    assert late.loaded is not None
    assert not any(late.loaded.view)


async def test_if_everybody_dies_the_reason_says_how_far_it_came(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = slow_swarm(nursery)
    hosts = await averaged(swarm, 3)
    late = await host(swarm)
    used = late.daemon.runs.desk.budgets.states.used

    def kill(n: int) -> None:
        if n == 10:
            for each in hosts:
                swarm.hub.kill(each.daemon.own)

    on_chunks(monkeypatch, kill)
    loaded = await late.load()
    assert not loaded.loaded
    assert loaded.reason.startswith("nobody holds the state any more: ")
    assert f"of {N_CHUNKS} chunks have come" in loaded.reason
    assert loaded.seconds < 12
    assert late.daemon.runs.desk.budgets.states.used == used


async def test_before_the_first_step_of_a_run_there_is_nothing_and_that_is_said_soon(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = slow_swarm(nursery)
    hosts = [await host(swarm) for _ in range(2)]
    await trio.sleep(1)  # to have found each other
    loaded = await hosts[0].load()
    assert not loaded.loaded
    assert loaded.reason.startswith("none of 1 peers asked holds a state of this run; ")
    assert SETTLE_S <= loaded.seconds < SETTLE_S + 1


async def test_a_peer_that_never_answers_is_not_waited_for_for_ever(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = slow_swarm(nursery)
    mute, late = await host(swarm), await host(swarm)
    mute.daemon.runs.desk._on_ask = lambda link, ask: None  # type: ignore[method-assign]
    loaded = await late.load()
    assert not loaded.loaded
    assert loaded.reason.endswith(f"{name(mute)}: it did not answer")
    assert loaded.seconds < ANSWER_S + 3
    mute.daemon.runs.desk._on_ask = lambda link, ask: link.send(NoState("run", "", soon=True))  # type: ignore[method-assign]
    loaded = await late.load(timeout_s=600.0)
    assert loaded.reason.endswith("it did not answer")
    assert SOON_S <= loaded.seconds < SOON_S + 3


async def test_who_is_alone_is_told_so_after_a_window(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = slow_swarm(nursery)
    loaded = await (await host(swarm)).load()
    assert not loaded.loaded
    assert loaded.reason == "nobody was found who takes part in this run"
    assert swarm.limits.window_s <= loaded.seconds < swarm.limits.window_s + 1


async def test_who_asks_in_the_middle_of_a_round_gets_its_result(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery, delay_s=lambda: 0.4)
    hosts = await averaged(swarm, 3)
    late = await host(swarm)
    await trio.sleep(1)
    async with trio.open_nursery() as steps:
        began = [each.daemon.sessions.begin for each in hosts]
        started = trio.Event()

        def begin(*args: Any) -> Any:
            started.set()
            return began[0](*args)

        hosts[0].daemon.sessions.begin = begin  # type: ignore[method-assign]
        steps.start_soon(together, hosts, 4.0, 5.0, 6.0)
        await started.wait()
        loaded = await late.load()
    assert loaded.loaded, loaded.reason
    assert (loaded.number, late.values()) == (2, {5.0})
    said = [message for link in hosts[0].daemon.peers.links() for message in link.said]
    assert [message.soon for message in said if isinstance(message, NoState)] == [True]


async def test_a_load_ends_when_its_time_is_over(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = slow_swarm(nursery)
    await averaged(swarm, 3)
    late = await host(swarm)
    swarm.hub.delay_s = lambda: 0.5
    loaded = await late.load(timeout_s=5.0)
    assert not loaded.loaded
    assert loaded.reason.startswith("it took longer than 5 s: ")
    assert 5 <= loaded.seconds < 5.1
    assert late.held == ()
    assert late.daemon.runs.desk.budgets.states.used == 0


async def test_the_second_trainer_of_a_machine_finds_the_state_there(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = slow_swarm(nursery)
    hosts = await averaged(swarm, 3)
    second = await another_trainer(hosts[0])
    loaded = await second.load()
    assert loaded.loaded, loaded.reason
    assert second.values() == {2.0}
    assert (loaded.bytes_received, loaded.sources) == (0, ())
    assert loaded.reason == "the vector after round 1, which this daemon holds itself, like 2 of the others"
    second.seat.release(second.seq)


async def test_a_state_that_a_trainer_still_reads_is_not_written_over(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = slow_swarm(nursery)
    hosts = await averaged(swarm, 2)
    second = await another_trainer(hosts[0])
    assert (await second.load()).loaded
    before = bytes(second.loaded.view)  # type: ignore[union-attr]
    region = memoryview(second.loaded.view)  # type: ignore[union-attr]
    await trio.sleep(60)  # nobody holds it any more, but this trainer
    assert (await together([hosts[0], hosts[1]], 7.0, 9.0))[0].averaged
    assert bytes(region) == before


async def test_the_time_of_a_load_runs_while_another_trainer_loads(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def find_nothing(self: loading.Loading) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(loading.Loading, "_load", find_nothing)
    only = await host(slow_swarm(nursery))
    began, ended = trio.current_time(), {}

    async def load(timeout_s: float) -> None:
        trainer = await another_trainer(only)
        answer = await trainer.load(timeout_s)
        assert not answer.loaded
        assert answer.seconds == pytest.approx(timeout_s)
        ended[timeout_s] = trio.current_time() - began, answer.reason

    async with trio.open_nursery() as loads:
        loads.start_soon(load, 20.0)
        await trio.testing.wait_all_tasks_blocked()
        loads.start_soon(load, 2.0)
        loads.start_soon(load, 30.0)
    assert {timeout_s: seconds for timeout_s, (seconds, _) in ended.items()} == pytest.approx({2: 2, 20: 20, 30: 30})
    assert "another trainer of this machine loads" in ended[2.0][1]
    assert "it took longer than 30 s: nobody was found" in ended[30.0][1]


async def test_only_so_many_peers_are_asked(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = slow_swarm(nursery)
    hosts = [await host(swarm) for _ in range(MAX_ASKED + 4)]
    await trio.sleep(2)
    assert not (await hosts[0].load()).loaded
    said = [message for link in hosts[0].daemon.peers.links() for message in link.said]
    assert len([message for message in said if isinstance(message, StateAsk)]) == MAX_ASKED


async def test_what_nobody_asked_for_is_nothing(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """Offers, hashes and chunks that come out of nowhere take no memory, end no link, and change no result."""
    swarm = slow_swarm(nursery)
    hosts = await averaged(swarm, 2)
    stranger = swarm.daemon()
    await swarm.nursery.start(stranger.runs.serve)
    late = await host(swarm)
    link = await stranger.peers.link(late.daemon.own, late.daemon.peers.endpoint)
    poison = StateOffer("run", b"m" * 32, b"r" * 16, 1 << 50, b"poison")
    link.send(poison)
    link.send(StateHashes(b"m" * 32, 0, bytes(32)))
    link.send(NoState("run", "no", soon=True))
    loaded = await late.load()
    link.send(poison)
    assert loaded.loaded
    assert loaded.number == 1
    assert link.up
    assert len(hosts) == 2


async def test_a_trainer_takes_its_wish_back(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = slow_swarm(nursery)
    await averaged(swarm, 2)
    late = await host(swarm)
    swarm.hub.delay_s = lambda: 0.5
    with trio.move_on_after(8):
        await late.load()
    desk = late.daemon.runs.desk
    assert (desk._loaders, desk.budgets.states.used, late.held) == ([], 0, ())


async def test_a_bug_costs_the_load_and_the_next_one_is_fine(
    nursery: trio.Nursery, autojump_clock: MockClock, bugs: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = slow_swarm(nursery)
    await averaged(swarm, 2)
    late = await host(swarm)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "elect", lambda offers: offers / 0)
        failed = await late.load()
    assert (failed.loaded, failed.reason) == (False, UNEXPECTED)
    assert bugs == {"load": 1}
    assert (await late.load()).loaded
