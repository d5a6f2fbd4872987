"""`mpd chaos` as a command: what it makes of its options, prints, and exits with. Nothing is started."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from client.test_chaos_judge import failure, rounds, see

import mpd.client.chaos
from mpd.cli import cli
from mpd.client.chaos_judge import Seen
from mpd.client.chaos_plan import KINDS, Settings
from mpd.errors import LocalError


class Stage:
    """What `run_chaos` was asked for, and what it answers."""

    def __init__(self, home: Path) -> None:
        self.settings: Settings | None = None
        self.seen: Seen = see(rounds(5.0, 20.0, 30.0))
        self.trouble: Exception | None = None
        self.home = home
        self.interrupts = False
        self.was_stopped = False

    def run(self, settings: Settings, say: Any, stop: Any) -> tuple[Seen, Path]:
        self.settings = settings
        say("machine 1: kill")
        if self.interrupts:
            signal.raise_signal(signal.SIGINT)
        self.was_stopped = stop.is_set()
        if self.trouble is not None:
            raise self.trouble
        self.home.mkdir()
        return self.seen, self.home


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stage = Stage(tmp_path / "home")
    monkeypatch.setattr(mpd.client.chaos, "run_chaos", stage.run)
    yield stage
    for number, handler in before.items():
        signal.signal(number, handler)


def chaos(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["chaos", *arguments])


def test_everything_has_a_default(stage: Stage) -> None:
    assert chaos().exit_code == 0
    chosen = stage.settings
    assert chosen is not None
    assert set(chosen.kinds) == set(KINDS)
    assert (chosen.peers, chosen.chaos_s, chosen.every_s, chosen.size_bytes) == (4, 60.0, (10.0, 10.0), 1 << 20)
    assert (chosen.train_s, chosen.timeout_s, chosen.quiet_s) == (0.5, 20.0, 6.0)
    first = chosen.seed
    chaos()
    assert stage.settings is not None
    assert stage.settings.seed != first


def test_everything_can_be_said(stage: Stage) -> None:
    options = "--peers 8 --faults kill,freeze --minutes 30 --every 0.5-2 --seed 7 --size 64KiB"
    timing = "--train 0 --timeout 5 --quiet 9"
    done = chaos(*options.split(), *timing.split())
    assert done.exit_code == 0
    assert stage.settings == Settings(8, ("kill", "freeze"), 1800.0, (0.5, 2.0), 7, 65536, 0.0, 5.0, 9.0)


@pytest.mark.parametrize(("minutes", "quiet_s"), [("0.1", 5.0), ("2", 12.0), ("600", 60.0)])
def test_the_phases_without_faults_grow_with_the_rest(stage: Stage, minutes: str, quiet_s: float) -> None:
    chaos("--minutes", minutes)
    assert stage.settings is not None
    assert stage.settings.quiet_s == pytest.approx(quiet_s)


def test_a_run_in_which_all_held_is_reported_and_leaves_nothing(stage: Stage) -> None:
    done = chaos()
    assert done.exit_code == 0
    assert "I5  held" in done.stdout
    assert "machine 1: kill" in done.stderr
    assert not stage.home.exists()


def test_a_broken_promise_is_exit_code_1_and_keeps_the_logs(stage: Stage) -> None:
    stage.seen = see([failure(0, 20.0, 1, wrong="the tensors have changed")])
    done = chaos("--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["held"] is False
    assert str(stage.home) in done.stderr
    assert stage.home.is_dir()


def test_ctrl_c_ends_it_early_with_a_report(stage: Stage) -> None:
    stage.interrupts = True
    done = chaos()
    assert stage.was_stopped
    assert done.exit_code == 0
    assert "I1  held" in done.stdout


def test_no_swarm_is_one_sentence(stage: Stage) -> None:
    stage.trouble = LocalError("the swarm has not formed within 60 s: nobody stepped")
    done = chaos()
    assert done.exit_code == 1
    assert done.stderr.endswith("mpd: the swarm has not formed within 60 s: nobody stepped\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--faults kill,flood", "'flood' is none of kill, "),
        ("--every soon", "'soon' is neither seconds nor a range of them"),
        ("--every 5-1", "'5-1' is neither seconds nor a range of them"),
        ("--every 0", "'0' is neither seconds nor a range of them"),
        ("--size much", "'much' is not a size up to 1GiB"),
        ("--size 0", "'0' is not a size up to 1GiB"),
        ("--size 2GiB", "'2GiB' is not a size up to 1GiB"),
        ("--peers 1", "1 is not in the range"),
        ("--peers 17", "17 is not in the range"),
        ("--minutes 0", "0.0 is not in the range"),
    ],
)
def test_wrong_usage_is_exit_code_2(stage: Stage, arguments: str, message: str) -> None:
    done = chaos(*arguments.split())
    assert done.exit_code == 2
    assert message in done.stderr
    assert stage.settings is None


def test_help_has_an_example() -> None:
    done = chaos("--help")
    assert done.exit_code == 0
    assert "mpd chaos --peers 8 --minutes 30 --every 30 --seed 7" in done.stdout
