"""Daemons and trainers that end in every state, and what those that are left see of it.

Strategy: three daemons, of which the first is the one that suffers. One that is to die in the middle of an exchange
is armed to; otherwise what its trainer is in the middle of is read from `mpd status` and from the bytes that have
moved, so a state is hit within the milliseconds that a question takes. Trainers that are to be killed are processes
that speak the local protocol and nothing else: they start fast, and contribute zeros. Of the others peer i
contributes 2^i, so each element of a result tells whose mean it is.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Score
from e2e_swarm import (
    ENVIRONMENT,
    PATIENCE_S,
    STEP_S,
    Array,
    Background,
    DaemonProcess,
    Swarm,
    averagers,
    eventually,
    moved_bytes,
    new_run,
    start_step,
    step_all,
    wait_for_company,
    wait_for_moved_bytes,
)

from mpd.client import Averager, Outcome
from mpd.errors import LocalError

SOAK = bool(os.environ.get("MPD_SOAK"))
N_DEATHS = 167 if SOAK else 3  # of a trainer in each of 6 states
N_RESTARTS = 25 if SOAK else 1  # in each state and for both kinds of tensors
RESTARTS = [("waiting", False), ("exchanging", True), *([("waiting", True), ("exchanging", False)] if SOAK else [])]
N_TERMS = 20 if SOAK else 1
DIE_IN_MID_EXCHANGE = "receive:2:kill"  # before it can have reduced all of its shard
N_ELEMS = 4 << 20  # 16 MiB: long enough under way to be caught there
SOON_S = 5.0  # for what takes a fraction of a second on a machine that has nothing else to do
LOOK_AGAIN_S = 0.001

pytestmark = pytest.mark.timeout(3600 if SOAK else 90)


@pytest.fixture(scope="module")
def three(swarm: Swarm) -> list[DaemonProcess]:
    return [swarm.new(armable=True).start().wait_ready(), *swarm.grow(2)]


@pytest.fixture
def daemons(swarm: Swarm, three: list[DaemonProcess]) -> list[DaemonProcess]:
    """Three daemons that know each other, whatever the test before did to one of them."""
    swarm.revive()
    eventually(lambda: all(d.status()["dht"]["peers"] == 2 for d in three), "all know all", swarm.log)
    return three


# ------------------------------------------------------------------------------------------ a daemon is killed (row 24)


class Loop:
    """A training loop in a thread: it steps until `is_over`, which is asked after each step. `outcomes` has all."""

    def __init__(
        self, averager: Averager, tensor: torch.Tensor, is_over: Callable[[list[Outcome]], bool], timeout: float
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.is_torn = False
        self._averager = averager
        self._tensor = tensor
        self._is_over = is_over
        self._timeout = timeout
        self._thread = Background(self._train)

    def join(self) -> list[Outcome]:
        return self._thread.join()

    def _train(self) -> list[Outcome]:
        while not (self.outcomes and self._is_over(self.outcomes)):
            before = self._tensor.clone()
            outcome = self._averager.step(timeout=self._timeout)
            # Each element is the mean of all, or none has changed.
            same = bool((self._tensor == (self._tensor[0] if outcome.averaged else before)).all())
            self.is_torn |= not same
            self.outcomes.append(outcome)
        return self.outcomes


def partner(loop: Loop, averager: Averager, tensor: torch.Tensor) -> Loop:
    """Return a loop that goes on until `loop` has averaged: its own may succeed in the round that the other loses."""
    return Loop(averager, tensor, lambda _: bool(loop.outcomes) and loop.outcomes[-1].averaged, 2.0)


@pytest.mark.parametrize(("busy", "adopt"), RESTARTS)
def test_a_daemon_that_is_killed_and_started_again_costs_one_step(
    daemons: list[DaemonProcess], busy: str, adopt: bool, score: Score
) -> None:
    pair, slowest_s = daemons[:2], 0.0
    for _ in range(N_RESTARTS):
        run, tensors = new_run(), [torch.full((N_ELEMS,), 2.0**i) for i in range(2)]
        place, view = tensors[0].data_ptr(), tensors[0].view(-1)
        with (
            averagers(pair[:1], run, [{"x": tensors[0]}], adopt=adopt) as (mine,),
            averagers(pair[1:], run, [{"x": tensors[1]}]) as (other,),
        ):
            if adopt:
                place, view = tensors[0].data_ptr(), tensors[0].view(-1)
            wait_for_company(pair, run)
            if busy == "exchanging":
                pair[0].arm(DIE_IN_MID_EXCHANGE)
            loop = Loop(mine, tensors[0], lambda seen: seen[-1].averaged, STEP_S)
            eventually(lambda run=run: pair[0].is_waiting(run), "the step has begun")  # type: ignore[misc]
            peer = pair[0].peer
            if busy == "exchanging":
                company = partner(loop, other, tensors[1])
                eventually(lambda: not pair[0].is_running(), "the daemon dies")
                pair[0].arm("")
            else:
                pair[0].kill()
            eventually(lambda loop=loop: bool(loop.outcomes), "the step returns")  # type: ignore[misc]
            pair[0].start().wait_ready()
            began = time.monotonic()
            eventually(lambda run=run: bool(pair[0].run_status(run)), "the trainer is back")  # type: ignore[misc]
            slowest_s = max(slowest_s, time.monotonic() - began)
            assert pair[0].peer == peer
            if busy == "waiting":
                company = partner(loop, other, tensors[1])
            outcomes = loop.join()
            company.join()
            assert not loop.is_torn
            assert not company.is_torn
        went_away = [outcome for outcome in outcomes if "went away" in outcome.reason]
        assert went_away == outcomes[:1], outcomes
        assert "others may have averaged" in went_away[0].reason
        assert outcomes[-1].averaged
        assert float(tensors[0][0]) == 1.5  # of 1 and 2: nobody has had the result of the round that was lost
        assert tensors[0].data_ptr() == place
        assert view[0] == tensors[0][0]
    score(24, "attached again within 2 s; one step lost; memory intact", seconds=round(slowest_s, 3), state=busy)
    assert slowest_s < SOON_S


def test_a_frozen_daemon_holds_up_no_step_for_long(daemons: list[DaemonProcess], score: Score) -> None:
    frozen, other = daemons[:2]
    run, vectors, took_s = new_run(), [np.full(1000, 2.0**i, np.float32) for i in range(2)], []
    with averagers([frozen, other], run, vectors) as attached:
        assert all(step_all(attached))
        vectors[0][:] = 1.0
        frozen.send(signal.SIGSTOP)
        try:
            for expected in ("has not answered in time", "has not answered for"):
                began = time.monotonic()
                outcome = attached[0].step(timeout=1.0)
                took_s.append(round(time.monotonic() - began, 2))
                assert not outcome.averaged
                assert expected in outcome.reason
                assert (vectors[0] == 1.0).all()
        finally:
            frozen.send(signal.SIGCONT)
        loops = [Background(lambda a=a: step_until_averaged(a)) for a in attached]  # type: ignore[misc]
        assert all(loop.join().averaged for loop in loops)
    score(24, "a frozen daemon: the step ends 2 s after its timeout of 1 s", seconds=took_s)
    assert max(took_s) < 3.0 + SOON_S


def step_until_averaged(averager: Averager) -> Outcome:
    while not (outcome := averager.step(timeout=STEP_S)):
        pass
    return outcome


def test_a_daemon_with_another_key_is_not_taken_for_the_old_one(swarm: Swarm, daemons: list[DaemonProcess]) -> None:
    daemon = swarm.new()
    try:
        daemon.start().wait_ready()
        tensor = np.ones(10, np.float32)
        with averagers([daemon], new_run(), [tensor]) as (averager,):
            before = daemon.peer
            daemon.kill()
            (daemon.state_dir / "key.pem").unlink()
            daemon.start().wait_ready()
            with pytest.raises(LocalError, match=f"is peer {daemon.peer} now, it was {before}"):
                averager.step()
            assert (tensor == 1.0).all()
    finally:
        daemon.kill()
        swarm.daemons.remove(daemon)


# ----------------------------------------------------------------------------------------- a trainer is killed (row 25)

TRAINER = """
import socket, sys, time
from mpd import control
from mpd.layout import TensorSpec

def say(message):
    sock.sendall(control.pack(message))

def hear():
    data, fds, _, _ = socket.recv_fds(sock, 65536, 8)
    kept.extend(fds)
    if not data:
        sys.exit()
    return control.LOCAL.decode(data[control.PREFIX_BYTES:])

kept, sock = [], socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
say(control.Hello(control.CONTROL_VERSION, "doomed"))
hear()
say(control.Attach(sys.argv[2], (TensorSpec("x", "float32", (int(sys.argv[3]),)),), 16, 1, "raw", "mean"))
hear()
print("attached", flush=True)
for _ in sys.stdin:
    say(control.Step(1, 1.0, 20.0))
    print(hear().averaged, flush=True)  # and the result is never released
"""


class Doomed:
    """A trainer process of a daemon, attached to `run` with zeros."""

    def __init__(self, daemon: DaemonProcess, run: str) -> None:
        command = [sys.executable, "-c", TRAINER, str(daemon.socket), run, str(N_ELEMS)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        assert self.hear() == "attached"

    def step(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("step\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def holdings(daemon: DaemonProcess) -> tuple[int, int, int]:
    """Return how many descriptors, descriptors of shared memory, and bytes of mapped shared memory the process has."""
    folder = Path(f"/proc/{daemon.pid}/fd")
    targets = []
    for fd in os.listdir(folder):
        try:
            targets.append(os.readlink(folder / fd))
        except FileNotFoundError:
            continue
    mapped = 0
    for line in Path(f"/proc/{daemon.pid}/maps").read_text().splitlines():
        if "/memfd:mpd" in line:
            begin, _, end = line.split()[0].partition("-")
            mapped += int(end, 16) - int(begin, 16)
    return len(targets), sum(target.startswith("/memfd:") for target in targets), mapped


def until_freed(daemon: DaemonProcess, base: tuple[int, int, int]) -> float:
    """Return how many seconds it took until the process holds no more than before."""
    began = time.monotonic()
    while any(now > before for now, before in zip(holdings(daemon), base, strict=True)):
        assert time.monotonic() < began + PATIENCE_S, (holdings(daemon), base, daemon.log())
        time.sleep(LOOK_AGAIN_S)
    return time.monotonic() - began


class Scene:
    """A run of three trainers, of which the first is in some state of a step: a `Doomed` one of the first daemon."""

    def __init__(self, daemons: list[DaemonProcess], run: str, others: list[Averager], vectors: list[Array]) -> None:
        self.trainer: Doomed | None = None
        self.n_matched = self.n_missed = 0  # groups that were seen to have begun, and those that were over by then
        self._daemons = daemons
        self._run = run
        self._others = others
        self._vectors = vectors
        self._steps: list[Background[Outcome]] = []

    def reach(self, state: str) -> None:
        """Return in the middle of `state`."""
        victim, n_bytes = self._daemons[0], 4 * N_ELEMS
        for i, vector in enumerate(self._vectors):
            vector[:] = 2.0**i
        if state == "no trainer":
            return
        self.trainer = Doomed(victim, self._run)
        wait_for_company(self._daemons, self._run)
        begin, whole = moved_bytes(victim), 4 * (1 - 1 / 3) * n_bytes
        if state == "idle":
            return
        if state != "waiting":
            self._steps = list(map(start_step, self._others))
        self.trainer.step()
        match state:
            case "waiting":
                eventually(lambda: victim.is_waiting(self._run), "the step has begun")
            case "matched":
                eventually(lambda: self._is_matched(victim, begin), "a group has begun")
            case "exchanging":
                wait_for_moved_bytes(victim, begin + whole / 2)
            case "committing":
                wait_for_moved_bytes(victim, begin + whole)
            case "copying back":
                self.trainer.hear()

    def finish(self, state: str) -> None:
        """Let the others finish their step, without the first daemon if it had begun nothing."""
        outcomes = [step.join() for step in self._steps or list(map(start_step, self._others))]
        self._steps = []
        assert all(outcomes), outcomes
        assert self._vectors[0].tobytes() == self._vectors[1].tobytes()
        # The mean of the two that are left, or of all three where the zeros had arrived.
        means = {1.5} if state in ("no trainer", "idle", "waiting") else {1.5, 1.0}
        assert set(np.unique(self._vectors[0]).tolist()) <= means

    def close(self) -> None:
        if self.trainer:
            self.trainer.kill()

    def _is_matched(self, victim: DaemonProcess, moved_before: int) -> bool:
        """A round may begin and end between two looks, now and then; then bytes tell that it has begun."""
        status = victim.run_status(self._run)
        is_seen = status is not None and (status["state"].startswith("averaging") or "are ready" in status["state"])
        is_over = not is_seen and moved_bytes(victim) > moved_before
        self.n_matched += is_seen
        self.n_missed += is_over
        return is_seen or is_over


@pytest.fixture
def scene(daemons: list[DaemonProcess]) -> Iterator[Scene]:
    run, vectors = new_run(), [np.full(N_ELEMS, 2.0**i, np.float32) for i in range(3)]
    with averagers(daemons[1:], run, vectors[1:]) as others:
        with averagers(daemons[:1], run, vectors[:1]) as mine:
            wait_for_company(daemons, run)
            assert all(step_all([*mine, *others]))  # from here on all are linked, and stay so
        scene = Scene(daemons, run, others, vectors[1:])
        yield scene
        scene.close()


TRAINER_STATES = ("idle", "waiting", "matched", "exchanging", "committing", "copying back")


def test_a_trainer_that_is_killed_is_gone_at_once_and_its_peers_finish(
    daemons: list[DaemonProcess], scene: Scene, score: Score
) -> None:
    victim, slowest_s = daemons[0], dict.fromkeys(TRAINER_STATES, 0.0)
    eventually(lambda: not victim.status()["runs"], "the run before has ended")
    base, pid = holdings(victim), victim.pid
    for state in TRAINER_STATES * N_DEATHS:
        scene.reach(state)
        scene.close()
        slowest_s[state] = max(slowest_s[state], until_freed(victim, base))
        scene.finish(state)
    assert scene.n_matched > scene.n_missed or not SOAK  # of a few tries, most may begin and end between two looks
    assert victim.is_running()
    assert victim.pid == pid
    assert "Traceback" not in victim.log()
    figures = {state: round(1e3 * seconds) for state, seconds in slowest_s.items()}
    score(25, "descriptors and memory back within 100 ms; peers finish", kills=6 * N_DEATHS, slowest_ms=figures)
    assert max(slowest_s.values()) < SOON_S


# ----------------------------------------------------------------------------------------------------- SIGTERM (row 29)

TERM_STATES = ("waiting", "matched", "exchanging", "copying back", *(("no trainer", "idle") if SOAK else ()))


def test_a_daemon_that_is_told_to_end_is_gone_from_everywhere_within_a_second(
    swarm: Swarm, daemons: list[DaemonProcess], scene: Scene, score: Score
) -> None:
    victim, others = daemons[0], daemons[1:]
    ended_s, forgotten_s = dict.fromkeys(TERM_STATES, 0.0), dict.fromkeys(TERM_STATES, 0.0)
    for state in TERM_STATES * N_TERMS:
        swarm.revive()
        eventually(lambda: all(d.status()["dht"]["peers"] == 2 for d in daemons), "all know all", swarm.log)
        scene.reach(state)
        began = time.monotonic()
        victim.send(signal.SIGTERM)
        code = victim.wait()
        ended_s[state] = max(ended_s[state], time.monotonic() - began)
        assert code == 0, victim.log()
        eventually(lambda: all(has_forgotten(d, victim) for d in others), "the others have heard of it", swarm.log)
        forgotten_s[state] = max(forgotten_s[state], time.monotonic() - began)
        scene.finish(state)
        scene.close()
        assert not victim.socket.exists()
        assert "Traceback" not in victim.log()
    assert scene.n_matched > scene.n_missed or not SOAK  # of a few tries, most may begin and end between two looks
    figures = {state: (round(ended_s[state], 2), round(forgotten_s[state], 2)) for state in TERM_STATES}
    score(29, "exit code 0, gone from DHT and groups within 1 s", tries=len(TERM_STATES) * N_TERMS, seconds=figures)
    assert max(forgotten_s.values()) < SOON_S


def has_forgotten(daemon: DaemonProcess, other: DaemonProcess) -> bool:
    """Return whether `daemon` counts `other` neither among the nodes of the DHT nor among its links."""
    client = daemon.connect()
    return client.status()["dht"]["peers"] == 1 and other.peer not in {peer["peer"] for peer in client.peers()}
