"""Steps against the real server for the local socket, with a swarm that has one other peer, of threes.

Strategy: with weight 1 the average of x and 3 is (x + 3) / 2, which is exact for the small integers used here in every
dtype. What else can happen to a step is asked of the stub by `plan`; what the daemon saw of it is in the stub's seats.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from client.stub import DaemonThread, Trainers

from mpd.client import Averager, Daemon, connect
from mpd.client import averager as averager_module
from mpd.client.attachment import Attachment
from mpd.errors import LocalError

ODD = [1, 5, -7, 9, 11, 1, 3, 5]
AVERAGE = [2, 4, -2, 6, 7, 2, 3, 4]


def odd_array(dtype: str = "float32") -> np.ndarray:
    return np.array(ODD, dtype)


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(ODD, dtype=torch.float32))


# --------------------------------------------------------------------------------------------------------------- steps


def test_a_step_averages_a_mixture_of_everything(daemon: Daemon) -> None:
    wide = np.zeros((8, 3))
    wide[:, 1] = ODD
    tensors: dict[str, Any] = {
        "half": odd_array("float16"),
        "scalar": np.array(5.0),
        "strided": wide[:, 1],
        "bfloat": torch.tensor(ODD, dtype=torch.bfloat16),
        "empty": np.ones((3, 0)),
        "parameter": parameter(),
        "torch scalar": torch.tensor(5.0, dtype=torch.float16),
        "transposed": torch.tensor(ODD, dtype=torch.float64).view(2, 4).T,
        "torch empty": torch.ones(0, dtype=torch.bfloat16),
        "double": odd_array("float64"),
    }
    with daemon.averager("run", tensors) as averager:
        outcome = averager.step()
    assert outcome
    assert outcome.contributors == ("me", "you")
    for name in ("half", "strided", "bfloat", "parameter", "double"):
        assert tensors[name].tolist() == AVERAGE, name
    assert tensors["transposed"].T.flatten().tolist() == AVERAGE
    assert float(tensors["scalar"]) == float(tensors["torch scalar"]) == 4
    assert wide[:, [0, 2]].any() == 0


def test_a_failed_step_leaves_the_tensors_alone(daemon: Daemon, trainers: Trainers) -> None:
    trainers.plan.append("fail")
    array, weight = odd_array(), parameter()
    with daemon.averager("run", [array, weight]) as averager:
        outcome = averager.step()
        assert not outcome
        assert outcome.reason == "nobody else came"
        assert array.tolist() == weight.tolist() == ODD
        assert trainers.seats[0].released == []
        assert averager.step()
    assert array.tolist() == weight.tolist() == AVERAGE


def test_a_step_sends_weight_and_timeout_and_releases_the_result(daemon: Daemon, trainers: Trainers) -> None:
    with daemon.averager("run", [odd_array()], weight=2) as averager:
        averager.step()
        averager.step(weight=0.5, timeout=7)
    (seat,) = trainers.seats
    assert seat.closed.wait(10)
    assert [(step.weight, step.source) for step in seat.steps] == [(2, "in"), (0.5, "in")]
    for step, timeout_s in zip(seat.steps, (60, 7), strict=True):
        assert timeout_s - 5 < step.timeout_s <= timeout_s  # what is left when the values have been copied
    assert seat.released == [step.seq for step in seat.steps]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"weight": 0}, "weight is 0: a positive number up to 1e+08 expected"),
        ({"weight": 1e9}, "weight is 1000000000.0: a positive number up to 1e+08 expected"),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"weight": float("inf")}, "weight is inf"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": float("inf")}, "timeout is inf"),
    ],
)
def test_a_bad_argument_is_named(
    daemon: Daemon, trainers: Trainers, arguments: dict[str, float], sentence: str
) -> None:
    with daemon.averager("run", [odd_array()]) as averager:
        for ask in (averager.step, averager.start):
            with pytest.raises(LocalError, match=re.escape(sentence)):
                ask(**arguments)
        assert trainers.seats[0].steps == []
        assert averager.step()


@pytest.mark.parametrize("adopt", [False, True])
def test_values_that_are_not_finite_are_never_sent(daemon: Daemon, trainers: Trainers, adopt: bool) -> None:
    good, bad = parameter(), parameter()
    with daemon.averager("run", {"good": good, "bad": bad}, adopt=adopt) as averager:
        bad.data[3] = float("nan")
        with pytest.raises(LocalError, match="tensor 'bad' holds NaN or infinity: nothing was sent"):
            averager.step()
        assert trainers.seats[0].steps == []
        bad.data[3] = 9
        assert averager.step()
    assert bad.tolist() == AVERAGE


def test_values_that_are_not_finite_are_sent_on_request(daemon: Daemon) -> None:
    array = odd_array()
    array[0] = np.inf
    with daemon.averager("run", [array], check_finite=False) as averager:
        assert averager.step()
    assert array.tolist() == [np.inf, *AVERAGE[1:]]


def test_a_tensor_that_changed_since_it_was_registered_is_named(daemon: Daemon, trainers: Trainers) -> None:
    values = torch.ones(4)
    with daemon.averager("run", {"values": values}) as averager:
        values.resize_(9)
        with pytest.raises(LocalError, match="tensor 'values' was registered as"):
            averager.step()
    assert trainers.seats[0].steps == []


def test_a_refused_step_says_why_and_the_next_one_goes_on(daemon: Daemon, trainers: Trainers) -> None:
    trainers.plan.append("refuse")
    array = odd_array()
    with daemon.averager("run", [array]) as averager:
        with pytest.raises(LocalError, match="this step is refused"):
            averager.step()
        assert array.tolist() == ODD
        assert averager.step()
    assert array.tolist() == AVERAGE


def test_a_result_that_is_not_the_announced_one_is_not_taken(daemon: Daemon, trainers: Trainers) -> None:
    trainers.plan.append("lie")
    array = odd_array()
    with daemon.averager("run", [array]) as averager:
        with pytest.raises(LocalError, match="result 1 was announced and the shared memory holds result 2"):
            averager.step()
        assert array.tolist() == ODD
        assert averager.step()


def test_a_new_out_region_is_followed(daemon: Daemon, trainers: Trainers) -> None:
    trainers.plan.extend(["average", "new out", "average"])
    array, weight = odd_array(), parameter()
    with daemon.averager("run", [array, weight]) as averager:
        for _ in range(3):
            array[:], weight.data[:] = ODD, torch.tensor(ODD)
            assert averager.step()
            assert array.tolist() == weight.tolist() == AVERAGE


# -------------------------------------------------------------------------------------------------- start, wait, cancel


@pytest.mark.parametrize("adopt", [False, True])
def test_what_is_trained_meanwhile_survives(
    daemon: Daemon, server: DaemonThread, trainers: Trainers, adopt: bool
) -> None:
    trainers.plan.append("wait")
    weight = parameter()
    with daemon.averager("run", [weight], adopt=adopt) as averager:
        pending = averager.start()
        weight.data += 100
        server.call(trainers.gate.set)
        outcome = pending.wait()
        assert outcome
        assert weight.tolist() == [value + 100 for value in AVERAGE]
        assert pending.wait() is outcome
        assert pending.done()
        pending.cancel()
        assert weight.tolist() == [value + 100 for value in AVERAGE]
    (seat,) = trainers.seats
    assert seat.closed.wait(10)
    assert [step.source for step in seat.steps] == ["snapshot" if adopt else "in"]
    assert len(seat.released) == 1


def test_polling_and_short_waits_do_not_disturb_a_step(
    daemon: Daemon, server: DaemonThread, trainers: Trainers
) -> None:
    trainers.plan.append("wait")
    array = odd_array()
    with daemon.averager("run", [array]) as averager:
        pending = averager.start()
        assert not pending.done()
        with pytest.raises(TimeoutError, match="step 1 has not ended within 0 s: wait again, or cancel"):
            pending.wait(timeout=0)
        server.call(trainers.gate.set)
        while not pending.done():
            pass
        assert array.tolist() == ODD
        assert pending.wait(timeout=0)
    assert array.tolist() == AVERAGE


def test_one_step_at_a_time(daemon: Daemon, trainers: Trainers) -> None:
    trainers.plan.append("hang")
    with daemon.averager("run", [odd_array()]) as averager, averager.start():
        for ask in (averager.step, averager.start):
            with pytest.raises(LocalError, match="step 1 is still running: wait"):
                ask()


def test_a_cancelled_step_leaves_the_tensors_alone(daemon: Daemon, trainers: Trainers) -> None:
    trainers.plan.append("hang")
    array = odd_array()
    with daemon.averager("run", [array]) as averager:
        with averager.start() as pending:
            array += 1
        assert not pending.wait()
        assert pending.wait().reason == "cancelled by the trainer"
        assert array.tolist() == [value + 1 for value in ODD]
        assert averager.step()
    assert len(trainers.seats) == 1


def test_a_result_that_was_there_already_is_not_applied_after_a_cancel(daemon: Daemon, trainers: Trainers) -> None:
    array = odd_array()
    with daemon.averager("run", [array]) as averager:
        pending = averager.start()
        while not pending.done():
            pass
        pending.cancel()
        assert array.tolist() == ODD
        assert pending.wait().reason == "cancelled after the others had averaged"
        assert averager.step()
    (seat,) = trainers.seats
    assert seat.closed.wait(10)
    assert seat.released == [1, 2]


def test_tensors_that_change_shape_during_a_step_are_left_alone(daemon: Daemon, trainers: Trainers) -> None:
    first, second = torch.ones(2), torch.ones(3)
    with daemon.averager("run", [first, second]) as averager:
        pending = averager.start()
        second.resize_(5)
        for _ in range(2):
            with pytest.raises(LocalError, match=r"tensor 'tensors\[1\]' was registered as"):
                pending.wait()
    assert first.tolist() == [1, 1]
    assert trainers.seats[0].closed.wait(10)
    assert trainers.seats[0].released == [1]


def interrupt(*_: object) -> Any:
    raise KeyboardInterrupt


def test_an_interrupted_step_leaves_the_averager_usable(
    daemon: Daemon, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers.plan.append("hang")
    array = odd_array()
    with daemon.averager("run", [array]) as averager:
        with monkeypatch.context() as patch:
            patch.setattr(Attachment, "receive_stepped", interrupt)
            with pytest.raises(KeyboardInterrupt):
                averager.step()
        assert array.tolist() == ODD
        assert trainers.seats[0].closed.wait(10)
        assert averager.step()
    assert array.tolist() == AVERAGE


def test_a_write_back_that_was_interrupted_is_not_undone_by_a_cancel(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = odd_array()
    with daemon.averager("run", [array]) as averager:
        pending = averager.start()
        with monkeypatch.context() as patch:
            patch.setattr(averager_module, "outcome_of", interrupt)
            with pytest.raises(KeyboardInterrupt):
                pending.wait()
        pending.cancel()
        assert pending.wait()
        assert array.tolist() == AVERAGE
        assert averager.step()


# --------------------------------------------------------------------------------------------------------------- adopt


def test_adopted_parameters_live_in_the_in_region(daemon: Daemon, trainers: Trainers) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    before = [each.tolist() for each in model.parameters()]
    with daemon.averager("run", model.parameters(), adopt=True) as averager:
        assert [each.tolist() for each in model.parameters()] == before
        shared = np.frombuffer(trainers.seats[0].in_region.view, np.float32)
        for each in model.parameters():
            each.data.fill_(5)
        assert (shared == 5).all()
        assert averager.step()
        assert (shared == 4).all()
        assert all((each == 4).all() for each in model.parameters())
    model(torch.ones(5)).sum().backward()
    assert all(each.grad is not None for each in model.parameters())


def test_an_adopted_step_copies_nothing_in(daemon: Daemon, trainers: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = parameter()
    with daemon.averager("run", [weight], adopt=True) as averager:
        monkeypatch.setattr("mpd.client.torch_tensors.TorchTensor.store", interrupt)
        assert averager.step()
    assert weight.tolist() == AVERAGE


def test_a_snapshot_region_is_opened_once(daemon: Daemon, trainers: Trainers) -> None:
    with daemon.averager("run", [parameter()], adopt=True) as averager:
        assert trainers.seats[0].snapshots == []
        assert averager.start().wait()
        assert averager.start().wait()
    assert len(trainers.seats[0].snapshots) == 1


def test_a_parameter_that_left_the_shared_memory_is_named(daemon: Daemon, trainers: Trainers) -> None:
    weight = parameter()
    with daemon.averager("run", {"weight": weight}, adopt=True) as averager:
        weight.data = weight.data.clone()
        with pytest.raises(LocalError, match="tensor 'weight' has left the shared memory that it was adopted into"):
            averager.step()
    assert trainers.seats[0].steps == []


@pytest.mark.parametrize("make", [odd_array, lambda: torch.ones(2, 3).T])
def test_what_cannot_be_adopted_is_refused_before_anything_happens(
    daemon: Daemon, trainers: Trainers, make: Callable[[], Any]
) -> None:
    weight = parameter()
    place = weight.data_ptr()
    with pytest.raises(LocalError, match="cannot be adopted"):
        daemon.averager("run", [weight, make()], adopt=True)
    assert weight.data_ptr() == place
    assert trainers.seats == []


# ------------------------------------------------------------------------------------------------------- daemon is gone


@pytest.mark.parametrize("adopt", [False, True])
def test_a_daemon_that_dies_costs_one_step(
    path: Path, daemon: Daemon, server: DaemonThread, trainers: Trainers, adopt: bool
) -> None:
    trainers.plan.append("hang")
    weight = parameter()
    averager = daemon.averager("run", [weight], adopt=adopt)
    pending = averager.start()
    weight.data += 2
    trainers.entered.wait()
    server.stop()
    outcome = pending.wait()
    assert not outcome
    assert pending.wait() is outcome
    assert outcome.reason == (
        f"kept the old values: in step 1 the daemon at {path} went away: start it with `mpd join`; "
        "others may have averaged"
    )
    assert weight.tolist() == [value + 2 for value in ODD]
    weight.data -= 2
    with DaemonThread(path, Trainers(3.0)):
        assert averager.step()
        assert weight.tolist() == AVERAGE
        pending = averager.start()
        weight.data += 100
        assert pending.wait()
        averager.close()
    assert weight.tolist() == [(value + 3) / 2 + 100 for value in AVERAGE]


@pytest.mark.parametrize("adopt", [False, True])
def test_training_goes_on_while_the_daemon_is_away(
    path: Path, daemon: Daemon, server: DaemonThread, adopt: bool
) -> None:
    weight = parameter()
    averager = daemon.averager("run", [weight], adopt=adopt)
    server.stop()
    away = f"no daemon answers at {path}: start one with `mpd join`; others may have averaged"
    for seq in (1, 3):
        outcome = averager.step(timeout=0.1)
        assert not outcome
        assert outcome.reason == f"kept the old values: in step {seq} {away}"
        pending = averager.start()
        assert pending.done()
        assert not pending.wait()
        pending.cancel()
        assert pending.wait().reason == f"kept the old values: in step {seq + 1} {away}"
    assert weight.tolist() == ODD
    averager.close()


def test_averagers_of_one_daemon_find_the_next_one_each_by_itself(
    path: Path, daemon: Daemon, server: DaemonThread
) -> None:
    arrays = [odd_array(), odd_array("float64")]
    first, second = (daemon.averager(f"run {i}", [array]) for i, array in enumerate(arrays))
    pending = first.start()
    server.stop()
    with DaemonThread(path, Trainers(3.0)):
        assert second.step()
        pending.wait()  # averaged or not: the daemon may have been faster than its end
        arrays[0][:] = ODD
        assert first.step()
        daemon.close()
    assert arrays[0].tolist() == arrays[1].tolist() == AVERAGE


@pytest.mark.parametrize("adopt", [False, True])
def test_a_daemon_restarted_between_steps_costs_nothing(
    path: Path, daemon: Daemon, server: DaemonThread, adopt: bool
) -> None:
    weight = parameter()
    averager = daemon.averager("run", [weight], adopt=adopt)
    server.stop()
    with DaemonThread(path, Trainers(3.0)):
        assert averager.step()
        averager.close()
    assert weight.tolist() == AVERAGE


def test_a_daemon_that_hangs_is_given_up(daemon: Daemon, trainers: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averager_module, "GRACE_S", 0.0)
    trainers.plan.append("hang")
    array = odd_array()
    with daemon.averager("run", [array]) as averager:
        outcome = averager.step(timeout=0.001)
        assert not outcome
        assert "in step 1 the daemon has not answered in time: it hangs or is overloaded" in outcome.reason
        assert array.tolist() == ODD
        assert trainers.seats[0].closed.wait(10)
        monkeypatch.undo()
        assert averager.step()


def test_cancelling_a_step_of_a_daemon_that_died_is_quiet(
    daemon: Daemon, server: DaemonThread, trainers: Trainers
) -> None:
    trainers.plan.append("hang")
    averager = daemon.averager("run", [odd_array()])
    pending = averager.start()
    server.stop()
    pending.cancel()
    assert "went away" in pending.wait().reason


# ----------------------------------------------------------------------------------------------------- close and forks


def test_closing_detaches_and_may_be_done_twice(daemon: Daemon, trainers: Trainers) -> None:
    trainers.plan.append("hang")
    array = odd_array()
    averager = daemon.averager("run", [array])
    pending = averager.start()
    averager.close()
    averager.close()
    assert trainers.seats[0].closed.wait(10)
    with pytest.raises(LocalError, match="the averager was closed during step 1: its result is lost"):
        pending.wait()
    pending.cancel()
    for ask in (averager.step, averager.start):
        with pytest.raises(LocalError, match="this averager is closed: open a new one"):
            ask()
    assert array.tolist() == ODD


def test_a_result_that_arrived_before_the_close_is_not_read_after_it(daemon: Daemon) -> None:
    """The daemon may write the next result there as soon as we have detached."""
    array = odd_array()
    averager = daemon.averager("run", [array])
    pending = averager.start()
    while not pending.done():
        pass
    averager.close()
    with pytest.raises(LocalError, match="the averager was closed during step 1"):
        pending.wait()
    assert array.tolist() == ODD


def in_child(work: Callable[[], None]) -> bool:
    """Run `work` in a forked child; return True if it raised nothing."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_child_cannot_use_its_parents_averager_nor_end_it(daemon: Daemon, trainers: Trainers) -> None:
    array = odd_array()

    def misuse(averager: Averager) -> None:
        with pytest.raises(LocalError, match=f"belongs to process {os.getppid()} and was used in its child"):
            averager.step()
        averager.close()

    with daemon.averager("run", [array]) as averager:
        assert in_child(lambda: misuse(averager))
        assert averager.step()
    assert len(trainers.seats) == 1
    assert trainers.seats[0].closed.wait(10)


def test_closing_detaches_although_a_child_holds_the_socket(path: Path, server: DaemonThread) -> None:
    reader, writer = os.pipe()
    with connect(path) as daemon:
        averager = daemon.averager("run", [odd_array()])
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)  # until the parent closes its end
            os._exit(0)
        averager.close()
        assert server.trainers.seats[0].closed.wait(10)
    os.close(writer)
    os.close(reader)
    os.waitpid(child, 0)
