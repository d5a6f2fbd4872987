"""`mpd chaos`: a swarm on this machine, a plan of faults, and a judgement.

Strategy: one loop looks every few milliseconds at what is due, what the trainers have told and who has died; nothing in
it waits. First the swarm forms and runs without faults, then the plan is carried out, then it runs without faults
again: so what faults cost is a ratio within one run, on a machine in one mood. Rounds while the last fault is being got
over count for neither.
"""

import contextlib
import queue
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from mpd.errors import LocalError

from .chaos_judge import Happened, Record, Seen
from .chaos_plan import Fault, Settings, make_plan
from .chaos_report import show_fault, show_plan
from .chaos_swarm import Machine

_LOOK_S = 0.02
_LATE_S = 0.1
_FORM_S = 60.0  # for the swarm to form
_SETTLE_S = 20.0  # at most, for the last fault to be got over
_END_S = 3.0  # for a daemon to leave
_SLOW_CYCLE_S = 0.1
_SLOW_SHARE = 0.2
_N_BOOTSTRAPS = 3

Say = Callable[[str], None]


def run_chaos(settings: Settings, say: Say, stop: threading.Event) -> tuple[Seen, Path]:
    """Carry a plan out and return what was seen, and where the logs of the daemons are: the caller removes that folder.

    `say` gets a line for each thing that happens. With `stop` set it ends early. Raises LocalError if there never was a
    swarm.
    """
    plan = make_plan(settings)
    say(show_plan(settings, plan))
    home = Path(tempfile.mkdtemp(prefix="mpd-chaos-"))
    try:
        with _running(_Conductor(settings, home, say, stop)) as conductor:
            conductor.form()
            before = conductor.watch(settings.quiet_s)
            chaos = conductor.carry_out(plan)
            conductor.settle()
            after = conductor.watch(settings.quiet_s)
            seen = conductor.seen([before, after], chaos)
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise
    return seen, home


@contextlib.contextmanager
def _running(conductor: "_Conductor") -> Iterator["_Conductor"]:
    try:
        yield conductor
    finally:
        conductor.end()


class _Conductor:
    """The machines, and everything that is known about them."""

    def __init__(self, settings: Settings, home: Path, say: Say, stop: threading.Event) -> None:
        self._settings = settings
        self._home = home
        self._say = say
        self._stop = stop
        self._incoming: queue.SimpleQueue[Record] = queue.SimpleQueue()
        self._machines = {i: Machine(i, home, settings, self._incoming) for i in range(settings.peers)}
        self._addresses: tuple[str, ...] = ()
        self._visits = 0
        self._records: list[Record] = []
        self._names: dict[str, int] = {}
        self._happened: list[Happened] = []
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._is_calm = True  # no fault begins
        self._to_start: set[int] = set()
        self._slow: set[int] = set()
        self._ends: list[str] = []

    # --------------------------------------------------------------------------------------------------------- phases

    def form(self) -> None:
        """Start everything; return once all machines have been in one round. Raises LocalError if that never comes."""
        addresses: list[str] = []
        for i, machine in self._machines.items():
            machine.bootstrap = tuple(addresses[:1])
            machine.start()
            if i == 0:
                addresses.append(self._address(machine))
        addresses += [self._address(machine) for i, machine in self._machines.items() if i]
        for i, machine in self._machines.items():
            others = [address for j, address in enumerate(addresses) if j != i]
            machine.bootstrap = tuple(others[:_N_BOOTSTRAPS])
            machine.start_trainer()
        self._addresses = tuple(addresses[:_N_BOOTSTRAPS])
        if not self._until(self._all_have_met, _FORM_S) and not self._stop.is_set():
            told = {record["reason"] for record in self._records[-len(self._machines) :]}
            raise LocalError(f"the swarm has not formed within {_FORM_S:g} s: {'; '.join(told) or 'nobody stepped'}")

    def watch(self, seconds: float) -> tuple[float, float]:
        """Let the swarm run; return from when until when it did."""
        began = time.monotonic()
        self._until(lambda: False, seconds)
        return began, time.monotonic()

    def carry_out(self, plan: tuple[Fault, ...]) -> tuple[float, float]:
        """Do to the machines what the plan says; return from when until when."""
        self._is_calm = False
        self._plan_next(deque(plan), time.monotonic())
        span = self.watch(self._settings.chaos_s)
        self._is_calm = True
        return span

    def settle(self) -> None:
        """Wait until all machines are in one round again."""
        n_before = len(self._records)
        self._until(lambda: self._all_have_met(n_before), _SETTLE_S)

    def seen(self, quiet: list[tuple[float, float]], chaos: tuple[float, float]) -> Seen:
        """Return all that there is to judge."""
        self._collect()
        for i, machine in self._machines.items():
            if machine.log.exists() and "Traceback" in machine.log.read_text(errors="replace"):
                self._ends.append(f"the daemon of machine {i} logged a traceback: see {machine.log}")
        return Seen(self._settings, self._records, self._names, self._happened, quiet, chaos, self._ends)

    def end(self) -> None:
        """Leave nothing running."""
        for machine in self._machines.values():
            machine.kill_trainer()
        threads = [threading.Thread(target=machine.end, args=(_END_S,)) for machine in self._machines.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    # --------------------------------------------------------------------------------------------------------- faults

    def _plan_next(self, faults: deque[Fault], began: float) -> None:
        """Let the first of `faults` come at its time, and the others after it, as far apart as they are planned.

        Whoever is late, for example because nobody has read what we said, moves the rest of the plan: to catch up would
        be a fault that nobody has planned.
        """
        if not faults or self._is_calm:
            return
        due = began + faults[0].at_s

        def begin() -> None:
            late_s = time.monotonic() - due
            if not self._is_calm:
                self._begin(faults.popleft())
                self._plan_next(faults, began + (late_s if late_s > _LATE_S else 0.0))

        self._due.append((due, begin))

    def _begin(self, fault: Fault) -> None:
        self._say(show_fault(fault))
        machine = self._visitor() if fault.kind == "join" else self._machines[fault.target]
        begin, end = {
            "kill": (machine.kill, lambda: self._to_start.add(fault.target)),
            "term": (machine.term, lambda: self._to_start.add(fault.target)),
            "leave": (machine.leave, lambda: self._to_start.add(fault.target)),
            "freeze": (machine.freeze, machine.thaw),
            "slow": (lambda: self._slow.add(fault.target), lambda: self._speed_up(machine)),
            "trainer": (machine.kill_trainer, machine.start_trainer),
            "join": (lambda: None, lambda: self._see_off(machine)),
        }[fault.kind]
        now = time.monotonic()
        begin()
        self._happened.append(Happened(fault, now, now + fault.lasts_s))
        self._due.append((now + fault.lasts_s, end))

    def _visitor(self) -> Machine:
        """Start one more machine, with a new identity."""
        self._visits += 1
        home = self._home / f"visit{self._visits}"
        home.mkdir()
        machine = Machine(self._settings.guest, home, self._settings, self._incoming, lives=self._visits)
        machine.bootstrap = self._addresses
        machine.start()
        machine.start_trainer()
        self._machines[self._settings.guest] = machine
        return machine

    def _see_off(self, visitor: Machine) -> None:
        visitor.kill_trainer()
        visitor.term()

    def _speed_up(self, machine: Machine) -> None:
        self._slow.discard(machine.index)
        machine.thaw()

    # ------------------------------------------------------------------------------------------------------- the loop

    def _until(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Look after everything until `holds()`, `seconds` at most, or until a stop; return whether it holds."""
        deadline = time.monotonic() + seconds
        while not self._stop.is_set() and time.monotonic() < deadline:
            self._look()
            if holds():
                return True
            self._stop.wait(_LOOK_S)
        return False

    def _look(self) -> None:
        now = time.monotonic()
        due = [entry for entry in self._due if entry[0] <= now]
        self._due = [entry for entry in self._due if entry[0] > now]
        for _, act in sorted(due, key=lambda entry: entry[0]):
            act()
        for i in self._slow:
            machine = self._machines[i]
            if now % _SLOW_CYCLE_S < _SLOW_SHARE * _SLOW_CYCLE_S:
                machine.thaw()
            else:
                machine.freeze()
        for i in list(self._to_start):
            if not self._machines[i].is_up():  # else it is still leaving
                self._machines[i].start()
                self._to_start.discard(i)
        self._collect()

    def _collect(self) -> None:
        """Take in what trainers have told, and who has ended."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(self._incoming.get_nowait())
        for i, machine in self._machines.items():
            self._mourn(i, machine)

    def _take(self, record: Record) -> None:
        if "peer" in record:
            self._names[record["peer"]] = record["machine"]
        else:
            self._records.append(record)

    def _mourn(self, i: int, machine: Machine) -> None:
        """Note who has ended unasked, and start it again."""
        machine.is_up()
        for code, is_asked in machine.take_exits():
            if not is_asked:
                self._ends.append(f"the daemon of machine {i} ended by itself with exit code {code}: see {machine.log}")
                self._to_start.add(i)
        if machine.has_lost_trainer():
            self._ends.append(f"the trainer of machine {i} ended by itself")
            machine.start_trainer()

    def _all_have_met(self, since: int = 0) -> bool:
        """Return whether there was a round of all machines after the first `since` records."""
        everybody = (1 << self._settings.peers) - 1
        return any(
            record["averaged"]
            and not record["wrong"]
            and all(mask & everybody == everybody for mask, _ in record["sets"])
            for record in self._records[since:]
        )

    def _address(self, machine: Machine) -> str:
        found: list[str] = []

        def answers() -> bool:
            found.extend(filter(None, [machine.listen()]))
            return bool(found)

        if not self._until(answers, _FORM_S):
            raise LocalError(f"the daemon of machine {machine.index} does not answer: see {machine.log}")
        return found[0]
