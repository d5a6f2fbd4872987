"""The command line of the advice: what it prints, and one sentence with exit code 2 for wrong input."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mpd.cli import cli
from mpd.cli_advise import WithAdvice, advise

ASK = ("--peers", "60", "--vector", "8MiB", "--bandwidth", "lognormal:200,0.5")


def test_it_recommends_with_reasons_and_alternatives() -> None:
    done = CliRunner().invoke(cli, ["advise", *ASK])
    assert done.exit_code == 0, done.output
    assert "Use group_size=" in done.output
    for word in (
        "s per step",
        "variance 0.0001",
        "limits it",
        "takes most of the time",
        "moshpit",
        "random",
        "allreduce",
    ):
        assert word in done.output


def test_json_has_everything() -> None:
    done = CliRunner().invoke(cli, ["advise", *ASK, "--json"])
    told = json.loads(done.output)
    assert told["question"]["download"] == "lognormal:200,0.5"
    assert {"group_size", "shape", "rounds_per_step", "step_s", "target_s", "target_bytes", "limit"} <= set(
        told["best"]
    )
    assert told["best"] in told["alternatives"]
    assert told["reasons"]


def test_a_command_with_advice_hands_its_arguments_over() -> None:
    @click.command(cls=WithAdvice)
    @click.option("--rounds", type=int)
    def simulate(rounds: int) -> None:
        click.echo(f"simulated {rounds}")

    assert "simulated 3" in CliRunner().invoke(simulate, ["--rounds", "3"]).output
    assert "Use group_size=" in CliRunner().invoke(simulate, ["--advise", *ASK]).output


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--vector", "400"), "400MiB"),
        (("--bandwidth", "-5"), "more than 0"),
        (("--bandwidth", "normal:3,4"), "no distribution"),
        (("--latency", "uniform:9,3"), "lower end"),
        (("--peers", "1"), "2 to"),
        (("--target", "0"), "between 0 and 1"),
        (("--fail", "1"), "probability"),
    ],
)
def test_wrong_input_is_one_sentence(wrong: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(advise, [*ASK, *wrong])
    assert done.exit_code == 2
    assert said in done.output
    assert "Traceback" not in done.output


def test_costs_are_read_from_a_calibration(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"costs": {"pair_s": 5.0}}))
    slow = json.loads(CliRunner().invoke(advise, [*ASK, "--json", "--costs", str(path)]).output)
    assert slow["best"]["limit"] == "processor"
    for wrong in ("no json", "[1]", '{"speed": 1}'):
        path.write_text(wrong)
        done = CliRunner().invoke(advise, [*ASK, "--costs", str(path)])
        assert done.exit_code == 2
        assert "expected" in done.output or "JSON" in done.output
