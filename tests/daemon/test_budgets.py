"""Limits that hold, give back what was given back, and can be looked at."""

import json
import os
import resource
from collections.abc import Iterator

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from mpd.daemon import budgets
from mpd.daemon.budgets import (
    RESERVED_DESCRIPTORS,
    WANTED_DESCRIPTORS,
    Budget,
    Budgets,
    ByteGate,
    Descriptors,
    KeyedBudget,
    RateBudget,
    raise_descriptor_limit,
)


def test_a_budget_gives_its_limit_and_no_more() -> None:
    budget = Budget(3)
    assert [budget.take() for _ in range(5)] == [True, True, True, False, False]
    budget.give(2)
    assert (budget.used, budget.peak, budget.refused) == (1, 3, 2)
    assert not budget.take(3)  # all or nothing
    assert budget.take(2)


def test_nobody_gives_back_what_was_not_taken() -> None:
    with pytest.raises(AssertionError):
        Budget(3).give()
    with pytest.raises(KeyError):
        KeyedBudget(3).give("a")


def test_each_key_has_a_budget_and_is_forgotten_with_its_last_thing() -> None:
    budget = KeyedBudget(2)
    assert [budget.take(key) for key in "aabaab"] == [True, True, True, False, False, True]
    assert (budget.used, budget.peak, budget.refused) == (2, 2, 2)
    for key in "aabb":
        budget.give(key)
    assert budget.used == 0
    assert budget._used == {}


def test_a_rate_allows_its_burst_and_then_its_pace() -> None:
    rate = RateBudget(per_s=50, burst=100)
    assert sum(rate.take(0.1, "a") for _ in range(1000)) == 100
    assert (rate.used, rate.peak, rate.refused) == (100, 100, 900)
    assert sum(rate.take(0.1 + ms / 1000, "a") for ms in range(1, 2001)) == 100  # 2 s at 50/s
    assert rate.take(0.1, "b")


@given(st.lists(st.floats(0, 0.5), max_size=200))
def test_no_pattern_of_asking_gets_more_than_the_rate(pauses: list[float]) -> None:
    rate, now, granted = RateBudget(per_s=10, burst=5), 0.0, 0
    for pause in pauses:
        now += pause
        granted += rate.take(now)
    assert granted <= 5 + 10 * now + 1e-6


def test_a_rate_remembers_a_bounded_number_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "MAX_RATE_KEYS", 10)
    rate = RateBudget(per_s=1, burst=1)
    for key in range(1000):
        assert rate.take(0.0, key)
        assert not rate.take(0.0, key)
    assert len(rate._buckets) == 10


# -------------------------------------------------------------------------------------------------------- the byte gate


async def test_the_gate_makes_those_wait_for_whom_there_is_no_room(autojump_clock: MockClock) -> None:
    gate = ByteGate(100)
    passed: dict[int, float] = {}

    async def take(n: int, hold_s: float) -> None:
        await gate.take(n)
        passed[n] = round(trio.current_time() - began, 3)
        await trio.sleep(hold_s)
        gate.give(n)

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, 70, 1.0)
        await wait_all_tasks_blocked()
        nursery.start_soon(take, 60, 1.0)
        await wait_all_tasks_blocked()
        nursery.start_soon(take, 20, 1.0)  # would fit, and waits its turn: a crowd of small ones starves nobody
    assert passed == {70: 0, 60: 1, 20: 1}
    assert (gate.used, gate.peak, gate.refused) == (0, 80, 2)


async def test_more_than_the_limit_passes_alone(autojump_clock: MockClock) -> None:
    gate = ByteGate(100)
    await gate.take(1)
    with trio.move_on_after(1) as waiting:
        await gate.take(1000)
    assert waiting.cancelled_caught
    gate.give(1)
    await gate.take(1000)
    assert gate.used == 1000


async def test_whoever_stops_waiting_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    gate = ByteGate(100)
    await gate.take(60)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gate.take, 30)
        await wait_all_tasks_blocked()
        with trio.move_on_after(1):
            await gate.take(70)
        assert gate.used == 90
    with trio.CancelScope() as scope:
        scope.cancel()
        await gate.take(1)
    assert gate.used == 90


async def test_a_wait_that_ends_and_is_cancelled_at_once_takes_all_or_nothing() -> None:
    gate, got = ByteGate(100), []
    await gate.take(100)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def take() -> None:
                await gate.take(50)
                got.append(50)

            nursery.start_soon(take)
            await wait_all_tasks_blocked()
            gate.give(100)
            scope.cancel()
    assert gate.used == sum(got)


async def test_one_who_gives_up_at_the_front_lets_those_behind_pass(autojump_clock: MockClock) -> None:
    gate, passed = ByteGate(100), trio.Event()
    await gate.take(60)

    async def take() -> None:
        await gate.take(40)
        passed.set()

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(1):
            nursery.start_soon(take)
            await gate.take(50)
        with trio.fail_after(1):
            await passed.wait()


# ---------------------------------------------------------------------------------------------------------- descriptors


@pytest.fixture
def soft_limit() -> Iterator[None]:
    """Whatever the test does to the limit of this process is undone."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_descriptors_are_counted_where_they_are() -> None:
    descriptors = Descriptors()
    before = descriptors.used
    opened = [os.dup(0) for _ in range(10)]
    assert descriptors.used == before + 10
    for fd in opened:
        os.close(fd)
    assert (descriptors.used, descriptors.peak) == (before, before + 10)


def test_kernels_that_do_not_tell_the_number_are_asked_for_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Descriptors().used
    monkeypatch.setattr(os, "stat", lambda path: os.stat_result((0,) * 10))
    assert Descriptors().used == told


def test_a_reserve_stays_for_the_daemon_itself(soft_limit: None) -> None:
    descriptors = Descriptors()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors.used + RESERVED_DESCRIPTORS + 5, hard))
    assert descriptors.has_room(5)
    assert not descriptors.has_room(6)
    assert descriptors.refused == 1


@pytest.mark.parametrize(("soft", "expected"), [(1024, WANTED_DESCRIPTORS), (5000, 5000)])
def test_a_small_limit_is_raised_and_a_large_one_kept(soft_limit: None, soft: int, expected: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard), hard))
    raise_descriptor_limit()
    assert Descriptors().limit == min(expected, hard)


# --------------------------------------------------------------------------------------------------------- all of them


def test_the_snapshot_shows_every_budget_as_json() -> None:
    own = Budgets()
    own.links.take(7)
    own.links.give(3)
    own.handshakes_per_address.take("192.0.2.1")
    own.datagrams.take(0.0)
    shown = json.loads(json.dumps(own.snapshot()))
    assert shown["links"] == {"limit": 256, "used": 4, "peak": 7, "refused": 0}
    assert shown["handshakes_per_address"] == {"limit": 8, "used": 1, "peak": 1, "refused": 0}
    assert set(shown) == set(vars(own))
    assert Budgets().links.used == 0  # no two daemons share one
