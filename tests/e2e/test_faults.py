"""Processes that are killed in the middle of what they do: the others finish, agree, and say who is missing.

Strategy: peer i contributes 2^i, so every element of a result tells whose values it is the mean of (`contributors_of`).
A daemon is killed once it has moved a given part of its round's bytes. That is a race which the round may win: then it
proves nothing, and the test starts the daemon again and tries a vector of twice the size, until the kill has hit.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from e2e_swarm import (
    ENVIRONMENT,
    STEP_S,
    DaemonProcess,
    Swarm,
    averagers,
    contributors_of,
    eventually,
    moved_bytes,
    new_run,
    start_step,
    step_all,
    wait_for_company,
    wait_for_moved_bytes,
)

from mpd.client import Outcome

MIB = 1 << 20
SIZES_MIB = (64, 128, 256)
SMALL_ELEMS = 1000
TRAINER = Path(__file__).parent.parent / "e2e_trainer.py"


@pytest.fixture(scope="module")
def four(swarm: Swarm) -> list[DaemonProcess]:
    return swarm.grow(4)


@pytest.fixture
def daemons(swarm: Swarm, four: list[DaemonProcess]) -> list[DaemonProcess]:
    """Four daemons, all of them running whatever the test before did to them."""
    swarm.revive()
    return four


@pytest.fixture(autouse=True)
def nothing_in_dev_shm() -> Iterator[None]:
    """Whoever dies, and however: nothing stays behind in /dev/shm."""
    before = set(os.listdir("/dev/shm"))
    yield
    eventually(lambda: set(os.listdir("/dev/shm")) <= before, "what appeared in /dev/shm goes away")


class Round:
    """A round of 2^i among `daemons`, during which one of them is killed once it has moved a part of its bytes."""

    def __init__(self, daemons: list[DaemonProcess], victim: int, part: float, mib: int) -> None:
        n = len(daemons)
        self.vectors = [np.full(mib * MIB // 4, 2.0**i, np.float32) for i in range(n)]
        self.outcomes: dict[int, Outcome] = {}
        self.is_hit = False  # the victim was killed before it had its result
        run = new_run()
        with averagers(daemons, run, self.vectors) as attached:
            wait_for_company(daemons, run)
            goal = moved_bytes(daemons[victim]) + part * 4 * (1 - 1 / n) * mib * MIB
            steps = list(map(start_step, attached))
            eventually(
                lambda: steps[victim].is_done() or moved_bytes(daemons[victim]) >= goal, "the round is under way"
            )
            daemons[victim].kill()
            lost = steps[victim].join()
            self.is_hit = not lost.averaged and "went away" in lost.reason
            self.outcomes = {i: step.join() for i, step in enumerate(steps) if i != victim}


def hit(
    swarm: Swarm, daemons: list[DaemonProcess], victim: int, part: float, has_hit: Callable[[Round], bool]
) -> Round:
    """Return a round in which the kill came in time, as `has_hit` judges it."""
    for mib in SIZES_MIB:
        attempt = Round(daemons, victim, part, mib)
        if attempt.is_hit and has_hit(attempt):
            return attempt
        swarm.revive()
    raise AssertionError(f"even a round of {SIZES_MIB[-1]} MiB was over before the kill")


# ------------------------------------------------------------------------------------------------------ in mid-exchange


@pytest.mark.parametrize("part", [0.02, 0.1, 0.2, 0.4])
def test_three_of_four_finish_with_identical_bytes(swarm: Swarm, daemons: list[DaemonProcess], part: float) -> None:
    """The killed daemon is a sender whose pieces are missing, and a reducer whose results are."""
    victim, gone = 3, daemons[3].peer
    killed = hit(swarm, daemons, victim, part, lambda r: any(gone in o.missing for o in r.outcomes.values()))
    survivors = sorted(killed.outcomes)
    sets = contributors_of(killed.vectors[survivors[0]], len(daemons))
    in_every_chunk = frozenset.intersection(*sets)
    assert victim not in in_every_chunk
    for i in survivors:
        outcome = killed.outcomes[i]
        assert outcome.averaged, outcome
        assert outcome.seconds < STEP_S
        assert killed.vectors[i].tobytes() == killed.vectors[survivors[0]].tobytes()
        assert set(outcome.contributors) == {daemons[j].peer for j in in_every_chunk}
        assert outcome.missing[gone]
        assert gone not in outcome.confirmed


def test_a_peer_that_only_sends_is_killed(swarm: Swarm, daemons: list[DaemonProcess]) -> None:
    """An outbound-only peer reduces nothing: all that is lost with it is what it had not sent."""
    with Swarm() as other:
        sender = other.new("--bootstrap", daemons[0].listen, "--outbound-only").start().wait_ready()
        eventually(lambda: sender.status()["dht"]["peers"], "it finds another", sender.log)
        group = [*daemons[:3], sender]
        killed = hit(other, group, 3, 0.3, lambda r: any(sender.peer in o.missing for o in r.outcomes.values()))
        for i, outcome in killed.outcomes.items():
            assert outcome.averaged, outcome
            assert killed.vectors[i].tobytes() == killed.vectors[0].tobytes()
            assert set(outcome.contributors) == {daemon.peer for daemon in daemons[:3]}
        assert set(contributors_of(killed.vectors[0], 4)) <= {frozenset({0, 1, 2}), frozenset({0, 1, 2, 3})}


def test_the_survivor_of_a_pair_keeps_its_values_and_says_why(swarm: Swarm, daemons: list[DaemonProcess]) -> None:
    killed = hit(swarm, daemons[:2], 1, 0.2, lambda r: not r.outcomes[0].averaged)
    outcome = killed.outcomes[0]
    assert (killed.vectors[0] == 1.0).all()
    assert outcome.contributors == ()
    assert daemons[1].peer in outcome.missing
    assert outcome.reason.startswith("kept the old values: ")
    assert outcome.seconds < STEP_S


# -------------------------------------------------------------------------------------------------- a trainer is killed


@pytest.fixture
def trainer_of(daemons: list[DaemonProcess]) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    started = []

    def start(
        daemon: DaemonProcess, run: str, n_elems: int = SMALL_ELEMS, value: float = 8.0
    ) -> "subprocess.Popen[str]":
        command = [sys.executable, str(TRAINER), str(daemon.socket), run, str(n_elems), str(value)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=ENVIRONMENT
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "attached\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ask_for_a_step(trainer: "subprocess.Popen[str]") -> None:
    assert trainer.stdin is not None
    trainer.stdin.write("step\n")
    trainer.stdin.flush()


def test_a_trainer_is_killed_while_it_waits(
    daemons: list[DaemonProcess], trainer_of: Callable[..., "subprocess.Popen[str]"]
) -> None:
    """Its daemon forgets it and its memory at once, and the others do not wait for it."""
    run, vectors = new_run(), [np.full(SMALL_ELEMS, 2.0**i, np.float32) for i in range(3)]
    with averagers(daemons[:3], run, vectors) as attached:
        trainer = trainer_of(daemons[3], run)
        wait_for_company(daemons, run)
        ask_for_a_step(trainer)
        eventually(lambda: daemons[3].is_waiting(run), "its step has begun")
        trainer.kill()
        eventually(lambda: daemons[3].run_status(run) is None, "its daemon forgets the run", daemons[3].log)
        eventually(lambda: daemons[3].memory_regions() == 0, "its memory is given back")
        outcomes = step_all(attached)
    for outcome in outcomes:
        assert set(outcome.contributors) == {daemon.peer for daemon in daemons[:3]}, outcome
    assert_daemon_serves(daemons[3], daemons[0])


def test_a_trainer_is_killed_in_the_middle_of_a_round(
    daemons: list[DaemonProcess], trainer_of: Callable[..., "subprocess.Popen[str]"]
) -> None:
    for mib in SIZES_MIB:
        run, n_elems = new_run(), mib * MIB // 4
        vectors = [np.full(n_elems, 2.0**i, np.float32) for i in range(3)]
        with averagers(daemons[:3], run, vectors) as attached:
            trainer = trainer_of(daemons[3], run, n_elems)
            wait_for_company(daemons, run)
            goal = moved_bytes(daemons[3]) + MIB
            ask_for_a_step(trainer)
            steps = list(map(start_step, attached))
            wait_for_moved_bytes(daemons[3], goal)
            trainer.kill()
            outcomes = [step.join() for step in steps]
        eventually(lambda: daemons[3].memory_regions() == 0, "its memory is given back", daemons[3].log)
        assert all(outcomes), outcomes
        assert vectors[0].tobytes() == vectors[1].tobytes() == vectors[2].tobytes()
        sets = contributors_of(vectors[0], 4)
        assert all(subset >= {0, 1, 2} for subset in sets)
        if any(daemons[3].peer in outcome.missing for outcome in outcomes):
            break
    else:
        raise AssertionError(f"even a round of {SIZES_MIB[-1]} MiB was over before the kill")
    assert_daemon_serves(daemons[3], daemons[0])


def test_one_of_two_trainers_of_a_daemon_is_killed(
    daemons: list[DaemonProcess], trainer_of: Callable[..., "subprocess.Popen[str]"]
) -> None:
    run, vectors = new_run(), [np.full(SMALL_ELEMS, value, np.float32) for value in (1.0, 3.0)]
    with averagers(daemons[:2], run, vectors) as attached:
        trainer = trainer_of(daemons[0], run)
        wait_for_company(daemons[:2], run)
        steps = list(map(start_step, attached))
        trainer.kill()
        assert all(step.join().averaged for step in steps)
    assert (vectors[0] == 2.0).all()
    assert (vectors[1] == 2.0).all()


# --------------------------------------------------------------------------------------------------- a daemon is killed


def test_a_trainer_survives_its_daemon_and_reconnects_to_the_next_one(daemons: list[DaemonProcess]) -> None:
    run, vectors = new_run(), [np.full(SMALL_ELEMS, 2.0**i, np.float32) for i in range(2)]
    with averagers(daemons[:2], run, vectors) as (mine, other):
        wait_for_company(daemons[:2], run)
        step = start_step(mine)
        eventually(lambda: daemons[0].is_waiting(run), "the step has begun")
        daemons[0].kill()
        lost = step.join()
        assert not lost.averaged
        assert "went away" in lost.reason
        assert "mpd join" in mine.step(timeout=0.1).reason
        assert (vectors[0] == 1.0).all()
        peer, listen = daemons[0].peer, daemons[0].listen
        daemons[0].start().wait_ready()
        assert (daemons[0].peer, daemons[0].listen) == (peer, listen)
        pending = start_step(mine)
        eventually(lambda: other.step(timeout=STEP_S).averaged, "they meet again", daemons[0].log)
        assert pending.join().averaged
    assert (vectors[0] == 1.5).all()
    assert (vectors[1] == 1.5).all()


@pytest.mark.parametrize("adopt", [False, True], ids=["copied", "adopted"])
def test_parameters_survive_the_daemon_that_shared_their_memory(daemons: list[DaemonProcess], adopt: bool) -> None:
    tensor = torch.ones(SMALL_ELEMS)
    with averagers(daemons[:1], new_run(), [{"w": tensor}], adopt=adopt) as (averager,):
        daemons[0].kill()
        tensor += 1.0
        assert not averager.step(timeout=0.1)
        assert (tensor == 2.0).all()


def assert_daemon_serves(daemon: DaemonProcess, other: DaemonProcess) -> None:
    """The daemon is the one it was, and averages."""
    assert daemon.is_running()
    vectors = [np.full(SMALL_ELEMS, 2.0**i, np.float32) for i in range(2)]
    with averagers([daemon, other], new_run(), vectors) as attached:
        assert all(step_all(attached))
    assert "Traceback" not in daemon.log()
