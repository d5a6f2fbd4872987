"""The fault matrix: every point of the protocol x role of the victim x action, on real daemons, with an exact judge.

Strategy: an `Arena` is a swarm of five daemons, the last of which accepts no connections, with one run that lives as
long as the arena. A cell arms one daemon, the victim, through the file that it was told to read its faults from, lets
everybody step, and judges. Peer i contributes 2^i, so every element of a result tells whose values it is the mean of.
After the cell the victim is revived or continued, and steps are taken until all five stand in one result again; that
is part of the judgement, and it makes the arena fit for the next cell.

Who leads is the peer that asks first, so the victim asks first if it is to lead and later if not. `member` and
`reducer` are both followers that reduce a shard; the first is struck at its first occasion, the second in the middle of
the work on its shard. A repair needs something to be repaired: in those cells another reducer is killed first.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from e2e_swarm import Background, DaemonProcess, Swarm, contributors_of, eventually, new_run, wait_for_company

from mpd.client import Averager, Outcome
from mpd.daemon.faults import POINTS
from mpd.errors import DaemonUnavailable

ROLES = ("leader", "member", "reducer", "outbound-only")
ACTIONS = ("kill", "freeze", "reset", "hole", "error")
HALF_WAY = {"send": 9, "receive": 12, "reduce": 3, "return": 12}  # when half of a shard's work is done
UNLINKED = ("announce", "seek", "handshake")  # points that a trainer's first moments pass
WHILE_MATCHING = (*UNLINKED, "propose", "begin")  # as long as there is no group, none of its rules holds

N_PEERS = 5
OUTBOUND = 4
VECTOR_BYTES = 4 << 20  # six chunks in each of four shards
DEADLINE_S = 5.0
LATE_S = 1.0  # a survivor has its outcome this long after the deadline at the latest
HOLE_S = 3.0
_WHOLE_AGAIN_S = 40.0


@dataclass(frozen=True)
class Cell:
    """One accident: what happens to whom, and when."""

    point: str
    role: str
    action: str

    def __str__(self) -> str:
        return f"{self.point}-{self.role}-{self.action}"

    @property
    def turn(self) -> int:
        """At which passing of the point it happens."""
        return HALF_WAY.get(self.point, 1) if self.role in ("reducer", "outbound-only") else 1

    @property
    def spec(self) -> str:
        """What the victim is armed with."""
        return f"{self.point}:{self.turn}:{self.action}" + f":{HOLE_S:g}" * (self.action == "hole")

    @property
    def is_impossible(self) -> str:
        """Why this cannot happen by definition; empty if it can."""
        if self.role == "outbound-only" and self.point in ("reduce", "return"):
            return "a peer that accepts no connections owns no shard, so it neither reduces nor returns anything"
        return ""


def all_cells() -> list[Cell]:
    """Return the whole matrix."""
    return [Cell(point, role, action) for point in POINTS for role in ROLES for action in ACTIONS]


@dataclass
class Result:
    """How a cell went: `averaged` of so many `survivors` did; the `slowest_s` of them had its outcome after that long.

    `victim` says what its own step came to: "averaged", "kept" (the old values) or "lost" (its daemon). `objections`
    are what is not as it must be, `account` is for whoever looks into one.
    """

    cell: Cell
    struck: bool = False
    slowest_s: float = 0.0
    averaged: int = 0
    survivors: int = 0
    victim: str = ""
    whole_again_s: float = 0.0
    objections: list[str] = field(default_factory=list)
    account: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return what is kept of it."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("cell", "account")}
        return {**asdict(self.cell), **kept}


class Arena:
    """Five daemons, their trainers and one run; at most one cell at a time."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.run = new_run()
        self.vectors = [np.zeros(VECTOR_BYTES // 4, np.float32) for _ in range(N_PEERS)]
        self._averagers: dict[int, Averager] = {}
        self._n_cells = 0

    def start(self) -> None:
        """Start the daemons and attach the trainers."""
        first = self.swarm.new(armable=True).start().wait_ready()
        for i in range(1, N_PEERS):
            outbound = ("--outbound-only",) if i == OUTBOUND else ()
            self.swarm.new("--bootstrap", first.listen, *outbound, armable=True).start()
        for daemon in self.daemons:
            daemon.wait_ready()
        self._averagers = {i: self._attach(i) for i in range(N_PEERS)}
        wait_for_company(self.daemons, self.run)
        self._make_whole(set())

    @property
    def daemons(self) -> list[DaemonProcess]:
        return self.swarm.daemons

    def close(self) -> None:
        """Detach the trainers."""
        for i in range(N_PEERS):
            self._detach(i)

    # ----------------------------------------------------------------------------------------------------- one cell

    def play(self, cell: Cell) -> Result:
        """Let `cell` happen and judge it."""
        self._n_cells += 1
        inbound = self._n_cells % OUTBOUND
        victim = OUTBOUND if cell.role == "outbound-only" else inbound
        spare = (inbound + 1) % OUTBOUND if cell.point == "repair" else None
        first = victim if cell.role == "leader" else (inbound + 2) % OUTBOUND
        result = Result(cell)
        for daemon in self.daemons:
            daemon.mark_log()
        self._fill()
        self._prepare(cell, victim)
        if spare is not None:
            self.daemons[spare].arm("return:1:kill")
        steps: dict[int, Background[_Step]] = {}

        def begin(i: int, has_begun: Callable[[], bool], what: str) -> None:
            steps[i] = Background(lambda: self._step(i))
            eventually(lambda: has_begun() or steps[i].is_done(), what, self.swarm.log)

        if cell.point in UNLINKED:
            begin(victim, lambda: self._has_struck(cell, victim), "the victim has its accident")
        else:
            begin(first, lambda: self.daemons[first].is_waiting(self.run), "the first one waits for others")
        for i in range(N_PEERS):
            if i not in steps:
                begin(i, lambda: True, "")
        survivors = [i for i in range(N_PEERS) if i not in (victim, spare)]
        done = {i: steps[i].join() for i in survivors}
        if cell.action == "freeze":
            eventually(lambda: self._thaw(victim) or steps[victim].is_done(), "the victim goes on", self.swarm.log)
        own = steps[victim].join()
        result.struck = self._has_struck(cell, victim)
        dead = {victim} if cell.action == "kill" and result.struck else set()
        dead |= {spare} if spare is not None else set()
        for i in dead:
            self.daemons[i].wait()
        self._judge(result, done, own, victim)
        if result.struck is bool(cell.is_impossible):
            result.objections.append(f"struck: {result.struck}, impossible: {cell.is_impossible or 'no'}")
        for i in range(N_PEERS):
            self.daemons[i].arm("")
            if i not in dead and not self.daemons[i].is_running():
                result.objections.append(f"daemon {i} has ended")
        if cell.action == "freeze":
            self._thaw(victim)  # in case it has struck later than anybody could see
        began = time.monotonic()
        self._make_whole(dead, result)
        result.account += self.swarm.log()
        result.whole_again_s = round(time.monotonic() - began, 2)
        return result

    def calm_round(self) -> list[Outcome]:
        """Let everybody step while nothing goes wrong; return the outcomes."""
        steps = self._step_all()
        assert all(step.is_whole for step in steps), steps
        return [step.outcome for step in steps if step.outcome is not None]

    def kill_at_return(self, victim: int, turn: int) -> tuple[Result, list[Outcome]]:
        """Kill a reducer when it is about to send its `turn`-th result; return the judgement and survivors' outcomes.

        The values that the step has left stay until the next one; daemons are revived by `mend`.
        """
        result = Result(Cell("return", "reducer", "kill"))
        self.daemons[victim].arm(f"return:{turn}:kill")
        done = dict(enumerate(self._step_all()))
        self.daemons[victim].wait()
        own = done.pop(victim)
        self._judge(result, done, own, victim)
        return result, [step.outcome for step in done.values() if step.outcome is not None]

    def mend(self, victim: int) -> None:
        """Revive a daemon that was killed, and wait until everybody stands in one result again."""
        self.daemons[victim].arm("")
        self._make_whole({victim})

    def _prepare(self, cell: Cell, victim: int) -> None:
        """Arm the victim, and detach its trainer if the point is one of its first moments."""
        daemon = self.daemons[victim]
        if cell.point in UNLINKED:
            self._detach(victim)
        if cell.point == "handshake":  # its links have to be made anew
            daemon.kill()
            daemon.start().wait_ready()
            daemon.mark_log()
        self.daemons[victim].arm(cell.spec)

    def _has_struck(self, cell: Cell, victim: int) -> bool:
        return f"fault: {cell.spec}" in self.daemons[victim].log()

    def _thaw(self, victim: int) -> None:
        self.daemons[victim].send(signal.SIGCONT)

    def _judge(self, result: Result, done: "dict[int, _Step]", own: "_Step", victim: int) -> None:
        """Note whatever is not as it must be."""
        say = result.objections.append
        result.survivors = len(done)
        agreed: tuple[bytes, tuple[str, ...]] | None = None
        for i, step in [*sorted(done.items()), (victim, own)]:
            vector, who = self.vectors[i], "the victim" if i == victim else f"survivor {i}"
            averaged = step.outcome is not None and step.outcome.averaged
            if i != victim:
                result.slowest_s = max(result.slowest_s, round(step.seconds, 2))
                result.averaged += averaged
                if step.seconds > DEADLINE_S + LATE_S:
                    say(f"{who} had its outcome after {step.seconds:.2f} s")
                if step.outcome is None:
                    say(f"{who} lost its daemon: {step.error}")
                elif not averaged and result.cell.point not in WHILE_MATCHING:
                    say(f"{who} did not average though most of its group lived: {step.outcome.reason}")
            else:
                result.victim = "lost" if step.outcome is None else "averaged" if averaged else "kept"
            if step.outcome is not None:
                result.account += f"{who}: {step.outcome.reason} {step.outcome.missing}\n"
            if not averaged:
                if not (vector == 2.0**i).all():
                    say(f"{who} did not average and its tensors have changed")
                continue
            assert step.outcome is not None
            try:
                sets = contributors_of(vector, N_PEERS)
            except AssertionError as error:
                say(f"{who} holds torn values: {error}")
                continue
            named = tuple(sorted(self.daemons[j].peer for j in frozenset.intersection(*sets)))
            if named != tuple(sorted(step.outcome.contributors)):
                say(f"{who} names {step.outcome.contributors}, its values are those of {named}")
            if any(len(one) < 2 for one in sets):
                say(f"{who} calls its own values an average")
            found = vector.tobytes(), named
            agreed = agreed or found
            if found != agreed:
                say(f"{who} holds other bytes or names other peers than the rest")

    # ----------------------------------------------------------------------------------------------------- machinery

    def _fill(self) -> None:
        for i, vector in enumerate(self.vectors):
            vector[:] = 2.0**i

    def _attach(self, i: int) -> Averager:
        return self.daemons[i].connect().averager(self.run, {"x": self.vectors[i]})

    def _detach(self, i: int) -> None:
        if (averager := self._averagers.pop(i, None)) is not None:
            averager.close()

    def _step(self, i: int) -> "_Step":
        """Let trainer `i` step, which attaches first if it has to."""
        began = time.monotonic()
        try:
            if i not in self._averagers:
                self._averagers[i] = self._attach(i)
            outcome = self._averagers[i].step(timeout=DEADLINE_S)
        except DaemonUnavailable as error:
            self._detach(i)
            return _Step(None, time.monotonic() - began, str(error))
        return _Step(outcome, time.monotonic() - began, "")

    def _step_all(self) -> "list[_Step]":
        self._fill()
        return [step.join() for step in [Background(lambda i=i: self._step(i)) for i in range(N_PEERS)]]

    def _make_whole(self, dead: set[int], result: Result | None = None) -> None:
        """Start again whoever died, and step until everybody stands in one result."""
        self.swarm.revive()
        for i in dead:
            self._detach(i)
        deadline = time.monotonic() + _WHOLE_AGAIN_S
        steps = self._step_all()
        while not all(step.is_whole for step in steps):
            if time.monotonic() > deadline:
                message = f"not whole again: {steps}"
                assert result is not None, f"{message}\n{self.swarm.log()}"
                result.objections.append(message)
                return
            steps = self._step_all()


@dataclass(frozen=True)
class _Step:
    """What became of one trainer's step; no `outcome` if its daemon went away."""

    outcome: Outcome | None
    seconds: float
    error: str

    @property
    def is_whole(self) -> bool:
        """Whether everybody stands in its result."""
        return self.outcome is not None and len(self.outcome.contributors) == N_PEERS


@contextlib.contextmanager
def arena() -> Iterator[Arena]:
    """Start an arena, and end it."""
    with Swarm() as swarm:
        own = Arena(swarm)
        try:
            own.start()
            yield own
        finally:
            own.close()


def play_all(cells: Sequence[Cell], n_arenas: int) -> dict[Cell, Result]:
    """Play `cells`, several at a time, each in an arena of its own."""
    waiting, results = iter(cells), {}

    def work() -> None:
        with arena() as own:
            for cell in waiting:
                results[cell] = own.play(cell)

    for worker in [Background(work) for _ in range(n_arenas)]:
        worker.wait()
    return results
