"""What is held for others: never written again, never copied, made beside the rounds, and given back."""

import pytest
import trio
import trio.lowlevel
from fake_peers import terms
from state_swarm import CHUNK_BYTES, inline, small_chunks_and_no_threads
from trio.testing import MockClock

from mpd.daemon import shelf as shelf_module
from mpd.daemon.budgets import Budget
from mpd.daemon.memory import OutRegion
from mpd.daemon.shelf import BUSY_S, HOLD_S, MAX_HELD, Commit, HeldState, Shelf
from mpd.errors import LocalError
from mpd.layout import TensorSpec
from mpd.manifest import Manifest, chunk_hash

N_BYTES = 3 * CHUNK_BYTES
TERMS = terms(tensors=(TensorSpec("w", "float32", (N_BYTES // 4,)),))


@pytest.fixture(autouse=True)
def small(repeatable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks_and_no_threads(monkeypatch)


@pytest.fixture
def budget() -> Budget:
    return Budget(8)


@pytest.fixture
def shelf(budget: Budget) -> Shelf:
    return Shelf(TERMS, OutRegion(N_BYTES), budget)


def average(shelf: Shelf, number: int) -> OutRegion:
    """Do what a step does: write a result full of `number`, and publish it. Return where."""
    shelf.begin_write()
    shelf.out.view[:] = bytes([number]) * N_BYTES
    shelf.publish(Commit(bytes([number]) * 16, number, b"meta %d" % number))
    return shelf.out


async def test_a_state_is_the_committed_region_itself(shelf: Shelf, autojump_clock: MockClock) -> None:
    region = average(shelf, 1)
    state = await shelf.state()
    assert state.region is region is shelf.out
    hashes = 3 * chunk_hash(b"\1" * CHUNK_BYTES)
    assert state.manifest == Manifest(TERMS.digest, b"\1" * 16, 1, N_BYTES, hashes)
    assert state.metadata == b"meta 1"
    assert bytes(state.chunk(2)) == b"\1" * CHUNK_BYTES
    assert await shelf.state() is state
    assert shelf.find(state.manifest.digest) is state


async def test_a_round_leaves_it_alone_and_takes_no_time_for_that(shelf: Shelf, autojump_clock: MockClock) -> None:
    first = average(shelf, 1)
    state = await shelf.state()
    second = average(shelf, 2)  # without a single await
    assert second is not first
    assert set(state.region.view) == {1}
    newer = await shelf.state()
    assert newer.region is second
    assert await shelf.state(round_id=b"\1" * 16) is state  # whoever has begun with it can go on
    third = average(shelf, 3)
    assert third not in (first, second)
    assert len({id(each.region) for each in shelf.held}) == 2


async def test_who_asks_during_a_round_gets_the_next_result(
    shelf: Shelf, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    average(shelf, 1)
    shelf.begin_write()
    assert shelf.is_late
    got: list[HeldState] = []

    async def ask() -> None:
        got.append(await shelf.state())

    nursery.start_soon(ask)
    nursery.start_soon(ask)
    await trio.sleep(5)
    assert got == []
    average(shelf, 2)
    await trio.lowlevel.checkpoint()
    average(shelf, 3)  # the next one begins before anything was hashed
    await trio.sleep(1)
    assert [state.manifest.number for state in got] == [2, 3]
    assert [set(state.region.view) for state in got] == [{2}, {3}]


async def test_a_round_that_fails_leaves_what_was_held_and_else_nothing(
    shelf: Shelf, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    with pytest.raises(LocalError, match="no round has ended well"):
        await shelf.state()
    average(shelf, 1)
    state = await shelf.state()
    average(shelf, 2)
    shelf.begin_write()
    shelf.end_write()
    assert await shelf.state() is state
    await trio.sleep(HOLD_S + 1)
    shelf.expire()
    assert shelf.is_empty
    with pytest.raises(LocalError):
        await shelf.state()


async def test_nobody_asks_so_it_is_given_back(shelf: Shelf, budget: Budget, autojump_clock: MockClock) -> None:
    average(shelf, 1)
    state = await shelf.state()
    state.readers += 1
    await trio.sleep(HOLD_S + 1)
    shelf.expire()
    assert shelf.held == (state,)  # being read
    state.readers -= 1
    shelf.expire()
    assert (shelf.held, budget.used, state.is_open) == ((), 0, False)
    assert shelf.out is state.region  # the run's again
    assert set(shelf.out.view) == {1}
    assert (await shelf.state()).manifest == state.manifest


async def test_two_are_held_at_most_and_the_idle_one_goes_first(
    shelf: Shelf, budget: Budget, autojump_clock: MockClock
) -> None:
    for number in (1, 2):
        average(shelf, number)
        (await shelf.state()).readers += 1
    average(shelf, 3)
    assert (await shelf.state()).manifest.number == 2  # the best of what may be held
    shelf.held[0].readers -= 1
    for _ in range(3):  # the other one was used a moment ago, and may be again; asking alone does not make it so
        assert (await shelf.state()).manifest.number == 2
        await trio.sleep(BUSY_S / 3)
    assert (await shelf.state()).manifest.number == 3
    assert [state.manifest.number for state in shelf.held] == [2, 3]
    assert budget.used == MAX_HELD == budget.peak


async def test_no_budget_no_state(budget: Budget, autojump_clock: MockClock) -> None:
    shelf = Shelf(TERMS, OutRegion(N_BYTES), Budget(0))
    average(shelf, 1)
    with pytest.raises(LocalError, match="as many states as it may"):
        await shelf.state()
    with pytest.raises(LocalError, match="as many states as it may"):
        shelf.reserve()


async def test_no_memory_no_state_and_the_run_goes_on(
    shelf: Shelf, budget: Budget, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(n_bytes: int) -> OutRegion:
        raise LocalError(f"{n_bytes} bytes are not there")

    average(shelf, 1)
    monkeypatch.setattr(OutRegion, "make", refuse)
    with pytest.raises(LocalError, match="are not there"):
        await shelf.state()
    assert budget.used == 0
    assert average(shelf, 2) is shelf.out


async def test_the_end_of_the_run_frees_everything_at_once(
    shelf: Shelf, budget: Budget, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    average(shelf, 1)
    first = await shelf.state()
    average(shelf, 2)
    await shelf.state()
    refused: list[str] = []

    async def ask() -> None:
        with pytest.raises(LocalError) as caught:
            await shelf.state()
        refused.append(str(caught.value))

    average(shelf, 3)
    await trio.sleep(BUSY_S)
    shelf.begin_write()
    nursery.start_soon(ask)
    await trio.sleep(1)
    shelf.close()
    await trio.sleep(1)
    assert refused == ["no round has ended well there yet, or the last one did not"]
    assert (budget.used, shelf.held, first.is_open) == (0, (), False)
    assert first.region.view.nbytes == 0


async def test_the_run_may_end_while_hashes_are_made(
    shelf: Shelf, budget: Budget, nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(function: object, *args: object) -> object:
        await trio.sleep(5)
        return await inline(function, *args)

    average(shelf, 1)
    monkeypatch.setattr(trio.to_thread, "run_sync", slow)
    done = trio.Event()

    async def ask() -> None:
        with pytest.raises(LocalError, match="has ended"):
            await shelf.state()
        done.set()

    nursery.start_soon(ask)
    await trio.sleep(1)
    shelf.close()
    await done.wait()
    assert (budget.used, shelf.held) == (0, ())


async def test_what_was_loaded_is_held_like_the_rest(shelf: Shelf, budget: Budget, autojump_clock: MockClock) -> None:
    average(shelf, 1)
    region = OutRegion(N_BYTES)
    shelf.reserve()
    loaded = shelf.adopt(region, Manifest(TERMS.digest, b"f" * 16, 40, N_BYTES, bytes(96)), b"")
    assert await shelf.state() is loaded  # it is newer than our own
    assert shelf.age == 40
    average(shelf, 41)
    assert (await shelf.state()).manifest.number == 41
    await trio.sleep(BUSY_S)
    shelf.reserve()  # the idle one goes
    assert [state.manifest.number for state in shelf.held] == [41]
    shelf.unreserve()
    assert budget.used == 1


async def test_a_trainer_that_reads_slowly_keeps_its_region_too(shelf: Shelf, autojump_clock: MockClock) -> None:
    region = average(shelf, 1)
    state = await shelf.state()
    assert shelf.turn()
    assert shelf.out is not region
    assert not shelf.turn()
    average(shelf, 2)
    other = await shelf.state()
    shelf.replace(OutRegion(N_BYTES))  # the run has taken a fresh one meanwhile
    assert (set(state.region.view), set(other.region.view)) == ({1}, {2})
    assert shelf.commit is None


async def test_waiting_for_something_newer(shelf: Shelf, nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    heard: list[int] = []

    async def wait(number: int) -> None:
        await shelf.wait_newer(number)
        heard.append(number)

    for number in (-1, 1, 2):
        nursery.start_soon(wait, number)
    await trio.sleep(1)
    average(shelf, 1)
    await trio.sleep(1)
    assert heard == [-1]
    average(shelf, 2)
    await trio.sleep(1)
    assert heard == [-1, 1]


def test_hashes_are_those_of_the_chunks() -> None:
    assert shelf_module._hashes(memoryview(bytes(CHUNK_BYTES + 1))) == [
        chunk_hash(bytes(CHUNK_BYTES)),
        chunk_hash(b"\0"),
    ]
