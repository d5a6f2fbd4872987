"""The command line of the simulator: what it prints, and one sentence with exit code 2 or 1 for wrong use."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mpd.cli import cli

SMALL = ("--peers", "64", "--group-size", "8", "--rounds", "4", "--repeat", "2")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["simulate", *arguments])


def test_all_policies_are_compared_in_a_table() -> None:
    done = run(*SMALL)
    assert done.exit_code == 0, done.output
    for name in ("moshpit", "paper-grid", "random", "allreduce", "gossip", "chebyshev", "pushsum", "pairs"):
        assert name in done.output


def test_json_has_a_result_for_each_policy_and_the_seed_decides_it() -> None:
    found = json.loads(run(*SMALL, "--policy", "moshpit,random", "--json").output)
    assert [each["policy"] for each in found] == ["moshpit", "random"]
    assert found[0]["shape"] == [7, 7]
    assert found[0]["peers"] == 64
    again = run(*SMALL, "--policy", "random", "--seed", "0", "--json").output
    assert json.loads(again) == found[1:]
    assert run(*SMALL, "--policy", "random", "--seed", "5", "--json").output != again


def test_csv_has_a_line_for_each_policy_and_round() -> None:
    rows = list(csv.DictReader(io.StringIO(run(*SMALL, "--policy", "moshpit,random", "--csv").output)))
    assert [(row["policy"], row["round"]) for row in rows] == [
        (p, str(t)) for p in ("moshpit", "random") for t in range(5)
    ]
    assert float(rows[2]["variance"]) < 1e-25  # a grid of two axes is exact after two rounds


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_picture_is_written_in_the_format_of_its_suffix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plot{suffix}"
    done = run(*SMALL, "--policy", "moshpit,random", "--plot", str(path))
    assert done.exit_code == 0, done.output
    begin = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(begin)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peers", "0"), "0 peers: 1 to 1048576 expected"),
        (("--policy", "best"), "'best' is no policy"),
        (("--shape", "3by3"), "'3by3' is not a shape"),
        (("--peers", "100", "--shape", "8x8", "--policy", "paper-grid"), "no cell of its own"),
        (("--group-size", "1"), "groups of 1: at least 2 expected"),
        (("--fail", "1.5"), "1.5 is not in the range"),
        (("--target", "nan"), "a positive number expected"),
        (("--plot", "plot.txt"), "must end in one of .png, .svg, .pdf"),
        (("--plot", "nowhere/plot.png"), "cannot be written"),
        (("--csv", "--json"), "one of them at a time"),
        (("--advise", "--peers", "50", "--vector", "400"), "a size with its unit expected"),
    ],
)
def test_wrong_use_is_one_sentence(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_a_picture_that_cannot_be_written_is_said_in_a_sentence() -> None:
    done = run(
        *SMALL, "--policy", "moshpit", "--plot", "/dev/full.png" if not Path("/proc").is_dir() else "/proc/x.png"
    )
    assert done.exit_code == 1
    assert "cannot be written" in done.output
    assert "Traceback" not in done.output


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run(*SMALL, "--plot", str(tmp_path / "plot.png"))
    assert done.exit_code == 1
    assert "pip install 'mpd[plot]'" in done.output


def test_with_advise_it_counts_seconds_and_recommends_a_group_size() -> None:
    done = run("--advise", "--peers", "60", "--vector", "8MiB", "--bandwidth", "lognormal:200,0.5")
    assert done.exit_code == 0, done.output
    assert "Use group_size=" in done.output
