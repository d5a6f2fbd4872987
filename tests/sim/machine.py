"""Simulated time, and many machines that live in it, in one thread: each with a clock, and each with tasks.

A `Scheduler` is a queue of events, ordered by time and, where times are equal, by a seeded generator. Nothing else
moves, so a seed decides everything. A `Machine` is one life of one daemon. What happens on it happens one event at a
time; while it is frozen, events pile up, and they come in any order when it thaws; once it has ended, it never does
anything again. A `Task` is a coroutine on a machine; what it may wait for is in `sim.tasks`.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Coroutine, Generator
from typing import Any

Action = Callable[[], None]


class Cancelled(BaseException):
    """What a cancelled task finds instead of what it waited for."""


class Scheduler:
    """All that will happen, on all machines. `now` is in seconds and never goes back."""

    def __init__(self, rng: random.Random) -> None:
        self.now = 0.0
        self.rng = rng
        self.n_events = 0
        self._queue: list[tuple[float, float, int, Action]] = []
        self._order = itertools.count()

    def at(self, when: float, action: Action) -> None:
        """Let `action` happen at `when`, or now if that is past."""
        heapq.heappush(self._queue, (max(when, self.now), self.rng.random(), next(self._order), action))

    def run(self, until: float) -> None:
        """Let everything happen that happens before `until`."""
        while self._queue and self._queue[0][0] <= until:
            self.now, _, _, action = heapq.heappop(self._queue)
            self.n_events += 1
            action()
        self.now = max(self.now, until)


class Machine:
    """One life of a daemon. Its monotonic clock starts at `origin_s`; `looked_at` is called after each event."""

    def __init__(self, scheduler: Scheduler, origin_s: float, looked_at: Action) -> None:
        self.scheduler = scheduler
        self.tasks: dict[Task, None] = {}
        self.is_frozen = False
        self.is_over = False
        self.is_being_disposed = False
        self._origin_s = origin_s
        self._looked_at = looked_at
        self._late: list[Action] = []

    def clock(self) -> float:
        """Return this machine's monotonic time."""
        return self.scheduler.now + self._origin_s

    def at(self, when: float, action: Action) -> None:
        """Let `action` happen here at `when`, by this machine's clock."""
        self.scheduler.at(when - self._origin_s, lambda: self.happen(action))

    def soon(self, action: Action) -> None:
        """Let `action` happen here at this very time, after what happens now."""
        self.scheduler.at(self.scheduler.now, lambda: self.happen(action))

    def start(self, function: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> "Task":
        """Start a task that belongs to nobody."""
        return Task(self, function(*args), None, None)

    def freeze(self) -> None:
        """Nothing happens here until `thaw`."""
        self.is_frozen = True

    def thaw(self) -> None:
        """Let happen what has piled up, in any order."""
        self.is_frozen = False
        late, self._late = self._late, []
        for action in late:
            self.soon(action)

    def end(self) -> None:
        """Nothing happens here any more."""
        self.is_over = True

    def dispose(self) -> None:
        """Take the tasks apart: Python would do that at some time that no seed knows, and complain."""
        self.is_over = self.is_being_disposed = True
        for task in list(self.tasks):
            task.dispose()

    def happen(self, action: Action) -> None:
        """Let `action` happen here and now, or when this machine thaws."""
        if self.is_over:
            return
        if self.is_frozen:
            self._late.append(action)
            return
        before, running.machine = running.machine, self
        try:
            action()
            self._looked_at()
        finally:
            running.machine = before


class _Running:
    """What runs now: one machine, one task of it."""

    machine: Machine | None = None
    task: "Task | None" = None


running = _Running()


def here() -> Machine:
    """Return the machine on which this runs."""
    assert running.machine is not None, "this runs on a machine only"
    return running.machine


class Pause:
    """What a task waits for: an event, a time, or (neither) its turn."""

    __slots__ = ("event", "is_shielded", "until")

    def __init__(self, until: float | None, event: Any, is_shielded: bool = False) -> None:
        self.until, self.event, self.is_shielded = until, event, is_shielded

    def __await__(self) -> Generator["Pause", None, None]:
        if here().is_being_disposed:
            raise Cancelled
        yield self


class Task:
    """A coroutine of a machine."""

    def __init__(self, machine: Machine, coroutine: Coroutine[Any, Any, None], scope: Any, nursery: Any) -> None:
        self.machine, self.scope, self._coroutine, self._nursery = machine, scope, coroutine, nursery
        self._turn = 0
        self._is_shielded = False
        if machine.is_being_disposed:
            coroutine.close()
            return
        machine.tasks[self] = None
        self._resume_soon(cancel=False)

    def is_cancelled(self) -> bool:
        """True if what this task waits for next will be `Cancelled`."""
        return not self._is_shielded and is_cancelled(self.scope, self.machine.clock())

    def wake(self, turn: int) -> None:
        """What it waited for at that turn has come."""
        if turn == self._turn:
            self._resume_soon(cancel=False)

    def heed(self) -> None:
        """Something was cancelled: perhaps this task."""
        if self is not running.task and self.is_cancelled():  # who runs finds out when it waits next
            self._resume_soon(cancel=True)

    def dispose(self) -> None:
        """Run whatever cleans up, which nobody notices any more."""
        running.machine = self.machine
        while self in self.machine.tasks:
            self._go_on(cancel=True)
        running.machine = None

    def _resume_soon(self, *, cancel: bool) -> None:
        turn = self._turn
        self.machine.soon(lambda: self._resume(turn, cancel))

    def _resume(self, turn: int, cancel: bool) -> None:
        if turn == self._turn and self in self.machine.tasks:
            self._go_on(cancel)

    def _go_on(self, cancel: bool) -> None:
        before, running.task = running.task, self
        self._turn += 1
        try:
            pause: Pause = self._coroutine.throw(Cancelled()) if cancel else self._coroutine.send(None)
        except (StopIteration, Cancelled):
            self._is_done()
            return
        except BaseException:
            self._is_done()
            raise
        finally:
            running.task = before
        self._wait(pause)

    def _wait(self, pause: Pause) -> None:
        turn, machine = self._turn, self.machine
        self._is_shielded = pause.is_shielded
        if self.is_cancelled():
            self._resume_soon(cancel=True)
            return
        if pause.event is not None:
            pause.event.waiters.append((self, turn))
        elif pause.until is None:
            self._resume_soon(cancel=False)
        elif pause.until < math.inf:
            machine.at(pause.until, lambda: self._resume(turn, cancel=False))
        deadline = deadline_of(self.scope)
        if deadline < math.inf and not pause.is_shielded:
            machine.at(deadline, lambda: self._expire(turn))

    def _expire(self, turn: int) -> None:
        if turn == self._turn and self.is_cancelled():
            self._resume(turn, cancel=True)

    def _is_done(self) -> None:
        self.machine.tasks.pop(self, None)
        if self._nursery is not None:
            self._nursery.has_ended()


def is_cancelled(scope: Any, now: float) -> bool:
    """True if this cancel scope, or one around it that reaches inside, is cancelled or over."""
    while scope is not None:
        if scope.cancel_called or scope.deadline <= now:
            return True
        scope = None if scope.shield else scope.parent
    return False


def deadline_of(scope: Any) -> float:
    """Return when that will be at the latest."""
    earliest = math.inf
    while scope is not None:
        earliest = min(earliest, scope.deadline)
        scope = None if scope.shield else scope.parent
    return earliest
