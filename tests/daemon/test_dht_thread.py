"""The bridge from trio to an asyncio loop in a thread: results, errors, cancellation, and nothing left behind."""

import asyncio
import threading

import pytest
import trio
import trio.testing

from mpd.daemon.dht_thread import open_loop_thread
from mpd.errors import LocalError, PeerError


async def add(a: int, b: int) -> int:
    await asyncio.get_running_loop().run_in_executor(None, int)
    return a + b


async def fail() -> None:
    raise PeerError("over there")


async def test_calls_return_and_raise_what_the_coroutine_does() -> None:
    async with open_loop_thread("test-loop") as thread:
        assert await thread.call(add, 1, b=2) == 3
        with pytest.raises(PeerError, match="over there"):
            await thread.call(fail)


async def test_many_calls_share_the_loop() -> None:
    sums: list[int] = []

    async with open_loop_thread("test-loop") as thread:

        async def one(i: int) -> None:
            sums.append(await thread.call(add, i, i))

        async with trio.open_nursery() as nursery:
            for i in range(50):
                nursery.start_soon(one, i)
    assert sorted(sums) == [2 * i for i in range(50)]


async def test_cancelling_here_cancels_there_and_waits_for_it() -> None:
    seen: list[str] = []
    running = trio.Event()
    token = trio.lowlevel.current_trio_token()

    async def hang() -> None:
        token.run_sync_soon(running.set)
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("ended")

    async with open_loop_thread("test-loop") as thread:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(thread.call, hang)
            await running.wait()
            nursery.cancel_scope.cancel()
        assert seen == ["ended"]
        assert await thread.call(add, 1, 1) == 2


async def test_a_result_that_beats_the_cancellation_is_kept() -> None:
    results: list[int] = []
    running = trio.Event()
    token = trio.lowlevel.current_trio_token()

    async def stubborn() -> int:
        token.run_sync_soon(running.set)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return 7
        return 0

    async with open_loop_thread("test-loop") as thread:

        async def call() -> None:
            results.append(await thread.call(stubborn))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await running.wait()
            nursery.cancel_scope.cancel()
    assert results == [7]


async def test_a_cancelled_caller_does_not_start_anything() -> None:
    started: list[int] = []

    async def start() -> None:
        started.append(1)

    async with open_loop_thread("test-loop") as thread:
        with trio.CancelScope() as scope:
            scope.cancel()
            await thread.call(start)
        await thread.call(add, 1, 1)
    assert scope.cancelled_caught
    assert not started


async def test_closing_ends_tasks_and_the_thread() -> None:
    ended: list[str] = []

    async def leave_a_task_behind() -> None:
        async def hang() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("task")

        tasks.append(asyncio.get_running_loop().create_task(hang()))
        await asyncio.get_running_loop().run_in_executor(None, int)

    tasks: list[asyncio.Task[None]] = []
    async with open_loop_thread("test-loop") as thread:
        await thread.call(leave_a_task_behind)
        assert "test-loop" in {each.name for each in threading.enumerate()}
    assert ended == ["task"]
    assert "test-loop" not in {each.name for each in threading.enumerate()}
    with pytest.raises(LocalError, match="closed"):
        await thread.call(add, 1, 1)


async def test_a_call_that_is_waiting_when_the_loop_closes_fails() -> None:
    running = trio.Event()
    token = trio.lowlevel.current_trio_token()

    async def hang() -> None:
        token.run_sync_soon(running.set)
        await asyncio.Event().wait()

    async with trio.open_nursery() as nursery, open_loop_thread("test-loop") as thread:

        async def call() -> None:
            with pytest.raises(LocalError, match="closed while"):
                await thread.call(hang)

        nursery.start_soon(call)
        await running.wait()
