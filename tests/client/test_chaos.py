"""The conductor of `mpd chaos` with machines of paper: what it does to them, when, and what it makes of the rest."""

import itertools
import queue
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from client.test_chaos_plan import SETTINGS

import mpd.client.chaos
from mpd.client.chaos import run_chaos
from mpd.client.chaos_plan import Fault, Settings
from mpd.errors import LocalError

SHORT = replace(SETTINGS, peers=3, chaos_s=0.5, every_s=(0.1, 0.1), quiet_s=0.05)


class PaperMachine:
    """Notes what is done to it. Its trainers report one round of all at once."""

    made: ClassVar[list["PaperMachine"]] = []
    meets = True

    def __init__(
        self, index: int, home: Path, settings: Settings, records: "queue.SimpleQueue[Any]", lives: int = 0
    ) -> None:
        self.index, self.bootstrap, self.lives = index, (), lives
        self.log = home / f"d{index}.log"
        self.done: list[str] = []
        self._everybody = (1 << settings.peers) - 1
        self._records = records
        self._is_up = False
        self._exits: list[tuple[int, bool]] = []
        self.made.append(self)

    def start(self) -> None:
        self.done.append("start")
        self._is_up = True

    def is_up(self) -> bool:
        return self._is_up

    def take_exits(self) -> list[tuple[int, bool]]:
        exits, self._exits = self._exits, []
        return exits

    def crash(self) -> None:
        self._is_up = False
        self._exits.append((7, False))

    def listen(self) -> str | None:
        return f"127.0.0.1:{self.index}" if self._is_up else None

    def start_trainer(self) -> None:
        self.done.append("start_trainer")
        self._records.put({"machine": self.index, "peer": f"peer {self.index}"})
        told = {"machine": self.index, "averaged": self.meets, "wrong": "", "reason": "nobody came"}
        self._records.put(told | {"sets": [[self._everybody, 1]]})

    def has_lost_trainer(self) -> bool:
        return False

    def kill(self) -> None:
        self.done.append("kill")
        self._is_up = False

    def term(self) -> None:
        self.done.append("term")
        self._is_up = False

    def leave(self) -> None:
        self.done.append("leave")
        self._is_up = False

    def freeze(self) -> None:
        self.done.append("freeze")

    def thaw(self) -> None:
        self.done.append("thaw")

    def kill_trainer(self) -> None:
        self.done.append("kill_trainer")

    def end(self, patience_s: float) -> None:
        self.done.append("end")


@pytest.fixture(autouse=True)
def machines(monkeypatch: pytest.MonkeyPatch) -> list[PaperMachine]:
    made: list[PaperMachine] = []
    monkeypatch.setattr(PaperMachine, "made", made)
    monkeypatch.setattr(mpd.client.chaos, "Machine", PaperMachine)
    monkeypatch.setattr(mpd.client.chaos, "_SETTLE_S", 0.05)  # there is one round in all
    return made


def do(monkeypatch: pytest.MonkeyPatch, *plan: Fault, settings: Settings = SHORT) -> Any:
    """Carry `plan` out; return what was seen and what was said."""
    said: list[str] = []
    monkeypatch.setattr(mpd.client.chaos, "make_plan", lambda settings: plan)
    seen, home = run_chaos(settings, said.append, threading.Event())
    assert home.is_dir()
    if not any(home.iterdir()):
        home.rmdir()
    return seen, said


WHAT_HAPPENS = {
    "kill": ["kill", "start"],
    "term": ["term", "start"],
    "leave": ["leave", "start"],
    "freeze": ["freeze", "thaw"],
    "trainer": ["kill_trainer", "start_trainer"],
}


@pytest.mark.parametrize("kind", WHAT_HAPPENS)
def test_each_fault_is_done_and_undone(
    kind: str, machines: list[PaperMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(0.05, kind, 1, 0.1)
    seen, said = do(monkeypatch, fault)
    assert machines[1].done == ["start", "start_trainer", *WHAT_HAPPENS[kind], "kill_trainer", "end"]
    assert machines[0].done == ["start", "start_trainer", "kill_trainer", "end"]
    (happened,) = seen.happened
    assert happened.fault == fault
    assert happened.ended - happened.began == pytest.approx(0.1)
    assert seen.chaos[0] < happened.began < seen.chaos[1]
    assert said[-1] == f"  0:00.1  machine 1: {kind} for 0.1 s"
    assert seen.ends == []


def test_a_slow_machine_runs_now_and_then_and_then_always(
    machines: list[PaperMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    do(monkeypatch, Fault(0.05, "slow", 2, 0.3))
    assert {"freeze", "thaw"} <= set(machines[2].done)
    assert machines[2].done[-3:] == ["thaw", "kill_trainer", "end"]


def test_each_guest_is_a_machine_of_its_own_that_leaves_again(
    machines: list[PaperMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, _ = do(monkeypatch, Fault(0.05, "join", 3, 0.1), Fault(0.3, "join", 3, 0.1))
    guests = machines[3:]
    assert [(guest.index, guest.lives) for guest in guests] == [(3, 1), (3, 2)]
    assert guests[0].log.parent != guests[1].log.parent
    assert guests[0].bootstrap == ("127.0.0.1:0", "127.0.0.1:1", "127.0.0.1:2")
    assert guests[0].done == ["start", "start_trainer", "kill_trainer", "term"]
    assert seen.names == {f"peer {i}": i for i in range(4)}


def test_machines_know_others_to_find_the_swarm_by(
    machines: list[PaperMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    do(monkeypatch)
    assert machines[0].bootstrap == ("127.0.0.1:1", "127.0.0.1:2")
    assert machines[2].bootstrap == ("127.0.0.1:0", "127.0.0.1:1")


def test_a_daemon_that_ends_by_itself_is_blamed_and_started_again(
    machines: list[PaperMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PaperMachine, "freeze", PaperMachine.crash)
    seen, _ = do(monkeypatch, Fault(0.05, "freeze", 1, 0.1))
    (sentence,) = seen.ends
    assert sentence.startswith("the daemon of machine 1 ended by itself with exit code 7")
    assert machines[1].done.count("start") == 2


def test_a_traceback_in_a_log_is_blamed(machines: list[PaperMachine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PaperMachine, "freeze", lambda self: self.log.write_text("Traceback (most recent call last):\n")
    )
    seen, _ = do(monkeypatch, Fault(0.05, "freeze", 1, 0.1))
    (sentence,) = seen.ends
    assert sentence.startswith("the daemon of machine 1 logged a traceback")
    machines[1].log.unlink()
    machines[1].log.parent.rmdir()


def test_a_swarm_that_never_forms_says_why_and_leaves_nothing(
    machines: list[PaperMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpd.client.chaos, "_FORM_S", 0.1)
    monkeypatch.setattr(PaperMachine, "meets", False)
    with pytest.raises(LocalError, match=r"has not formed within 0.1 s: nobody came"):
        do(monkeypatch)
    assert all(machine.done[-1] == "end" for machine in machines)
    assert not machines[0].log.parent.exists()


def test_what_is_late_moves_the_rest_of_the_plan_and_nothing_comes_after_its_time(
    machines: list[PaperMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tuple(Fault(0.05 * i, "trainer", i % 3, 0.01) for i in range(1, 10))
    monkeypatch.setattr(mpd.client.chaos, "make_plan", lambda settings: plan)
    real, late_s = time.monotonic, 0.0
    monkeypatch.setattr(mpd.client.chaos.time, "monotonic", lambda: real() + late_s)

    def say(line: str) -> None:
        nonlocal late_s
        if "machine 2" in line:  # the second one is read late
            late_s = 0.25

    seen, home = run_chaos(SHORT, say, threading.Event())
    home.rmdir()
    began = [happened.began for happened in seen.happened]
    assert 3 <= len(began) < len(plan)
    assert min(after - before for before, after in itertools.pairwise(began)) > mpd.client.chaos._LOOK_S / 2
    assert max(began) < seen.chaos[1]


def test_it_ends_early_when_told_to(machines: list[PaperMachine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpd.client.chaos, "make_plan", lambda settings: (Fault(0.0, "kill", 1, 9.0),))
    stop = threading.Event()
    monkeypatch.setattr(PaperMachine, "kill", lambda self: stop.set())
    seen, home = run_chaos(replace(SHORT, chaos_s=3600.0), lambda line: None, stop)
    home.rmdir()
    assert len(seen.happened) == 1
    assert seen.chaos[1] - seen.chaos[0] < 60
    assert all(machine.done[-1] == "end" for machine in machines)
