"""The part of trio that the daemon's glue uses, on the time of `sim.machine`.

A daemon above its sockets (lobby, run, sessions) is coroutines that wait for events, times and each other. Here those
coroutines run unchanged. trio itself could not be used: it has one clock for the whole process, and a task of it can be
neither frozen nor dropped in the middle of a line. `installed` puts this module in the place of trio in the modules
that it is given.
"""

import contextlib
import math
from collections.abc import Callable, Coroutine, Iterator
from types import ModuleType
from typing import Any

from sim.machine import Cancelled, Pause, Task, here, is_cancelled, running


class Event:
    """Something that happens once."""

    def __init__(self) -> None:
        self.waiters: list[tuple[Task, int]] = []
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        waiters, self.waiters = self.waiters, []
        for task, turn in waiters:
            task.wake(turn)

    async def wait(self) -> None:
        await Pause(None, None if self._is_set else self)


class CancelScope:
    """What is inside ends early when it is cancelled, or at its deadline."""

    def __init__(self, *, deadline: float = math.inf, shield: bool = False) -> None:
        self.deadline, self.shield = deadline, shield
        self.cancel_called = False
        self.cancelled_caught = False
        self.parent: CancelScope | None = None

    def cancel(self) -> None:
        self.cancel_called = True
        for task in list(here().tasks):
            task.heed()

    def __enter__(self) -> "CancelScope":
        assert running.task is not None
        self.parent, running.task.scope = running.task.scope, self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        assert running.task is not None
        running.task.scope = self.parent
        if not isinstance(error, Cancelled) or here().is_being_disposed:
            return False
        now = here().clock()
        # What is cancelled further out goes on to there, unless this scope keeps that out.
        goes_on = not self.shield and is_cancelled(self.parent, now)
        self.cancelled_caught = (self.cancel_called or self.deadline <= now) and not goes_on
        return self.cancelled_caught


class Nursery:
    """Tasks that end before the block does."""

    def __init__(self) -> None:
        self.cancel_scope = CancelScope()
        self._n_children = 0
        self._ended = Event()

    def start_soon(self, function: Callable[..., Coroutine[Any, Any, None]], *args: Any, name: object = None) -> None:
        self._n_children += 1
        Task(here(), function(*args), self.cancel_scope, self)

    def has_ended(self) -> None:
        """One of the tasks is through."""
        self._n_children -= 1
        self._ended.set()
        self._ended = Event()

    async def __aenter__(self) -> "Nursery":
        self.cancel_scope.__enter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if error is not None:
            self.cancel_scope.cancel()
        while self._n_children and not here().is_being_disposed:
            await Pause(None, self._ended, is_shielded=True)
        is_over = error is None and is_cancelled(self.cancel_scope.parent, here().clock())
        passes = self.cancel_scope.__exit__(kind, error, trace)
        if is_over and not here().is_being_disposed:  # as with trio, who waited for tasks that were cancelled is, too
            raise Cancelled
        return passes


class Lock:
    """One task at a time."""

    def __init__(self) -> None:
        self._is_held = False
        self._released = Event()

    async def acquire(self) -> None:
        while self._is_held:
            await self._released.wait()
        self._is_held = True

    def release(self) -> None:
        self._is_held = False
        self._released.set()
        self._released = Event()

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *error: object) -> None:
        self.release()


def open_nursery() -> Nursery:
    return Nursery()


def current_time() -> float:
    return here().clock()


def move_on_at(deadline: float) -> CancelScope:
    return CancelScope(deadline=deadline)


def move_on_after(seconds: float) -> CancelScope:
    return CancelScope(deadline=current_time() + seconds)


async def sleep(seconds: float) -> None:
    await Pause(current_time() + seconds, None)


async def sleep_until(when: float) -> None:
    await Pause(when, None)


async def sleep_forever() -> None:
    await Pause(math.inf, None)


class lowlevel:  # a module of trio
    @staticmethod
    async def checkpoint() -> None:
        await Pause(None, None)

    @staticmethod
    async def checkpoint_if_cancelled() -> None:
        assert running.task is not None
        if is_cancelled(running.task.scope, current_time()):
            await Pause(None, None)


class to_thread:  # a module of trio
    @staticmethod
    async def run_sync(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Let a thread do it, at some time; the task finds out a little later."""
        rng = here().scheduler.rng
        await lowlevel.checkpoint_if_cancelled()
        await Pause(current_time() + rng.uniform(0, 0.01), None, is_shielded=True)
        result = function(*args)
        await Pause(current_time() + rng.uniform(0, 0.01), None, is_shielded=True)
        return result


@contextlib.contextmanager
def installed(shim: ModuleType, *modules: ModuleType) -> Iterator[None]:
    """Let `shim` (this module) be trio for `modules`."""
    before = [module.trio for module in modules]
    for module in modules:
        module.trio = shim  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, trio in zip(modules, before, strict=True):
            module.trio = trio  # type: ignore[attr-defined]
