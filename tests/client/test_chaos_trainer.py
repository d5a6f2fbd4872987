"""A training process of `mpd chaos`: what it tells of each step, and what it finds wrong with its own tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client.stub import DaemonThread, Trainers

from mpd.client.averager import Averager
from mpd.client.chaos_oracle import Vectors
from mpd.client.chaos_trainer import Pause, do_step, main, train
from mpd.client.outcome import Outcome
from mpd.errors import DaemonUnavailable

N = 4


class StubAverager:
    """Does to the tensors what it is told to."""

    def __init__(self, step: Callable[[], Outcome]) -> None:
        self._step = step

    def step(self, timeout: float) -> Outcome:
        assert timeout == 9.0
        return self._step()


def one_step(vectors: Vectors, step: Callable[[], Outcome]) -> dict[str, Any]:
    told = do_step(StubAverager(step), vectors, 5, 9.0)  # type: ignore[arg-type]
    assert told["ended"] >= told["began"]
    assert told["step"] == 5
    return told


def test_a_result_is_read_and_hashed() -> None:
    vectors, other = Vectors(1, N, 64), Vectors(2, N, 64)
    other.fill(8)

    def step() -> Outcome:
        vectors.values[:] = (vectors.values + other.values) / 2
        vectors.steps[:] = (vectors.steps + other.steps) / 2
        return Outcome(averaged=True, reason="all were there", contributors=("b", "c"), missing={"d": "frozen"})

    told = one_step(vectors, step)
    assert told["averaged"]
    assert told["wrong"] == ""
    assert told["sets"] == ((0b110, 16), (0b110, N + 2))
    assert told["steps"] == ((1, 5), (2, 8))
    assert (told["contributors"], told["missing"]) == (("b", "c"), {"d": "frozen"})
    assert told["digest"] == one_step(vectors, step)["digest"]
    other.fill(9)
    assert told["digest"] != one_step(vectors, step)["digest"]


def test_a_result_that_is_no_mean_is_told() -> None:
    vectors = Vectors(1, N, 64)

    def step() -> Outcome:
        vectors.values[6] = 99.0
        return Outcome(averaged=True, reason="all were there")

    assert "the mean of nobody" in one_step(vectors, step)["wrong"]


@pytest.mark.parametrize("touches", [False, True])
def test_a_step_that_fails_leaves_the_tensors_alone_or_is_told(touches: bool) -> None:
    vectors = Vectors(1, N, 64)

    def step() -> Outcome:
        vectors.values[6] += touches
        return Outcome(averaged=False, reason="nobody came")

    told = one_step(vectors, step)
    assert not told["averaged"]
    assert told["reason"] == "nobody came"
    assert bool(told["wrong"]) == touches


def test_a_daemon_that_went_away_is_a_step_that_failed() -> None:
    def step() -> Outcome:
        raise DaemonUnavailable("it went away")

    told = one_step(Vectors(1, N, 64), step)
    assert not told["averaged"]
    assert told["reason"] == "DaemonUnavailable: it went away"


def test_it_trains_on_until_it_is_killed(
    path: Path,
    server: DaemonThread,
    trainers: Trainers,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stub's other peer contributes threes, so here every result is the mean of nobody."""
    trainers.plan.extend(["fail", "average"])
    pause = Pause(0.0, 9.0)
    original, n_left = Averager.step, 2

    def step(self: Averager, *arguments: Any, **options: Any) -> Outcome:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(Averager, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train(path, 1, N, 1000, 64, pause)
    hello, failed, averaged = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert hello["machine"] == 1
    assert len(hello["peer"]) == 32
    assert (failed["step"], failed["averaged"], failed["wrong"]) == (1001, False, "")
    assert (averaged["step"], averaged["averaged"]) == (1002, True)
    assert "the mean of nobody" in averaged["wrong"]


def test_the_command_line_says_all(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr("mpd.client.chaos_trainer.train", lambda *arguments: called.extend(arguments))
    monkeypatch.setattr("sys.argv", ["trainer", "/run/d1.sock", "1", "5", "2000000", "64", "0.5", "20"])
    main()
    assert called[:5] == [Path("/run/d1.sock"), 1, 5, 2_000_000, 64]
    assert (called[5].train_s, called[5].timeout_s) == (0.5, 20.0)
