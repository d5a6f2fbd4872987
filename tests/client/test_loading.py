"""A late joiner against the real server for the local socket: what `load_state` does to its tensors, and what not.

The stub's states are full of sevens; its only other peer averages threes.
"""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from client.stub import DaemonThread, Trainers

from mpd.client import Daemon, LoadedState
from mpd.client import averager as averager_module
from mpd.client.loading import loaded_state_of
from mpd.control import StateLoaded
from mpd.errors import DaemonUnavailable, LocalError
from mpd.manifest import MAX_METADATA_BYTES

ANSWER = StateLoaded(
    seq=4,
    loaded=True,
    reason="the vector after round 9, from 2 of 3 peers that offered one",
    number=9,
    metadata=b"epoch 7",
    sources=("a", "b"),
    dropped={"c": "what it sent as chunk 2 is something else"},
    seconds=1.5,
    bytes_received=100,
    generation=1,
)


def ones() -> np.ndarray:
    return np.ones(8, np.float32)


def test_all_that_concerns_a_trainer_is_told() -> None:
    loaded = dataclasses.asdict(loaded_state_of(ANSWER))
    answer = dataclasses.asdict(ANSWER)
    assert set(answer) - set(loaded) == {"seq", "generation"}
    assert all(answer[name] == value for name, value in loaded.items())


def test_it_is_true_if_it_loaded_and_reads_well() -> None:
    assert loaded_state_of(ANSWER)
    assert str(loaded_state_of(ANSWER)) == (
        "the vector after round 9, from 2 of 3 peers that offered one, in 1.50 s; "
        "dropped: c (what it sent as chunk 2 is something else)"
    )
    failed = LoadedState(loaded=False, reason="nobody was found who takes part in this run")
    assert not failed
    assert str(failed) == "nothing loaded: nobody was found who takes part in this run"


def test_the_tensors_hold_the_state_and_the_next_step_starts_from_it(daemon: Daemon, trainers: Trainers) -> None:
    array, weight = ones(), torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with daemon.averager("run", [array, weight]) as averager:
        loaded = averager.load_state()
        assert loaded
        assert (loaded.number, loaded.metadata, loaded.sources) == (12, b"epoch 7", ("you", "them"))
        assert set(array.tolist()) | set(weight.tolist()) == {7.0}
        trainers.plan.append("new out")
        assert averager.step()
        assert set(array.tolist()) == {5.0}
        assert averager.step()
        assert set(array.tolist()) == {4.0}
    assert trainers.seats[0].released[:2] == [1, 2]  # the last one may be on its way


def test_adopted_tensors_are_loaded_where_they_live(daemon: Daemon) -> None:
    weight = torch.nn.Parameter(torch.ones(5))
    with daemon.averager("run", [weight], adopt=True) as averager:
        place = weight.data_ptr()
        assert averager.load_state()
        assert weight.data_ptr() == place
        assert weight.tolist() == [7.0] * 5


@pytest.mark.parametrize(("plan", "reason"), [("fail", "nobody holds a state"), ("refuse", "this load is refused")])
def test_if_nothing_is_loaded_the_tensors_are_untouched(
    daemon: Daemon, trainers: Trainers, plan: str, reason: str
) -> None:
    array = ones()
    trainers.plan.append(plan)
    with daemon.averager("run", [array]) as averager:
        if plan == "refuse":
            with pytest.raises(LocalError, match=reason):
                averager.load_state()
        else:
            assert averager.load_state() == LoadedState(loaded=False, reason=reason)
        assert set(array.tolist()) == {1.0}
        assert averager.step()


def test_a_result_that_is_not_there_is_not_loaded(daemon: Daemon, trainers: Trainers) -> None:
    array = ones()
    trainers.plan.append("lie")
    with daemon.averager("run", [array]) as averager, pytest.raises(LocalError, match="please report this"):
        averager.load_state()
    assert set(array.tolist()) == {1.0}


def test_a_daemon_that_dies_meanwhile_leaves_the_tensors_alone(
    daemon: Daemon, trainers: Trainers, server: DaemonThread
) -> None:
    array = ones()
    trainers.plan.append("hang")
    averager = daemon.averager("run", [array])

    def kill() -> None:
        trainers.entered.wait()
        server.stop()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(DaemonUnavailable):
        averager.load_state()
    killer.join()
    assert set(array.tolist()) == {1.0}


def test_a_daemon_that_hangs_is_given_up(daemon: Daemon, trainers: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averager_module, "GRACE_S", 0.01)
    trainers.plan.append("hang")
    with daemon.averager("run", [ones()]) as averager:
        with pytest.raises(DaemonUnavailable, match="has not answered"):
            averager.load_state(timeout=0.01)
        assert averager.load_state()  # attached anew


def test_the_time_it_may_take_is_told(daemon: Daemon, trainers: Trainers) -> None:
    with daemon.averager("run", [ones()]) as averager:
        averager.load_state()
        averager.load_state(timeout=7)
        for wrong in (0, -1, float("inf"), float("nan")):
            with pytest.raises(LocalError, match="timeout"):
                averager.load_state(timeout=wrong)
    assert [load.timeout_s for load in trainers.seats[0].loads] == [averager_module.LOAD_S, 7.0]


def test_not_in_the_middle_of_a_step(daemon: Daemon) -> None:
    with daemon.averager("run", [ones()]) as averager:
        pending = averager.start()
        with pytest.raises(LocalError, match="still running"):
            averager.load_state()
        assert pending.wait()


def test_metadata_go_with_every_step_from_then_on(daemon: Daemon, trainers: Trainers) -> None:
    with daemon.averager("run", [ones()]) as averager:
        assert averager.metadata == b""
        averager.step()
        averager.metadata = largest = bytes(MAX_METADATA_BYTES)
        averager.step()
        averager.metadata = bytearray(b"epoch 7")
        averager.step()
        assert averager.metadata == b"epoch 7"
        for wrong in (bytes(MAX_METADATA_BYTES + 1), "text", None, 7):
            with pytest.raises(LocalError, match="at most 65536"):
                averager.metadata = wrong  # type: ignore[assignment]
        averager.step()
    assert [step.metadata for step in trainers.seats[0].steps] == [b"", largest, b"epoch 7", b"epoch 7"]
