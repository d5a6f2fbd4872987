"""Simulations as tables and CSV."""

import io

import pytest
from rich.console import Console

from mpd.paper import Row
from mpd.show_simulation import describe, show_paper_rows, show_results, to_csv
from mpd.simulate import Settings, simulate


def shown(show: object, what: object) -> str:
    text = io.StringIO()
    show(what, Console(file=text, width=200))  # type: ignore[operator]
    return text.getvalue()


def test_a_table_says_when_each_policy_gets_there() -> None:
    results = [simulate(Settings(36, policy, group_size=6, rounds=3, repeat=2)) for policy in ("moshpit", "gossip")]
    moshpit, gossip = (line for line in shown(show_results, results).splitlines() if line.startswith(("mosh", "goss")))
    assert moshpit.split()[:4] == ["moshpit", "5x5", "2.0", "2.0"]
    assert moshpit.split()[-1] == "100%"
    assert gossip.count("over 3") == 2


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (Settings(9, group_size=3), "9 peers, groups of 3"),
        (Settings(9, shape=(2, 4), absent=0.25), "9 peers, grid 2x4, 25% absent in each round"),
        (
            Settings(9, mid_round=0.1, churn=0.01),
            "9 peers, groups of 16, 10% lost in the middle of each, 1% replaced after each",
        ),
    ],
)
def test_what_is_simulated_is_said_in_a_line(settings: Settings, line: str) -> None:
    assert describe(settings) == line


def test_csv_begins_with_the_start() -> None:
    result = simulate(Settings(36, group_size=6, rounds=2, repeat=2))
    lines = to_csv([result]).splitlines()
    assert len(lines) == 1 + 3
    assert lines[1].startswith("moshpit,36,0.0,0.0,0.0,0,")
    assert float(lines[1].split(",")[6]) == pytest.approx(float(result.variance[0]))


def test_what_was_printed_stands_in_brackets() -> None:
    row = Row(512, (32, 32), 0.01, {"random": (6.6, 3.0)}, {"random": (6.61, 3.0), "moshpit": (5.2, 2.4)})
    text = shown(show_paper_rows, [row])
    assert "6.6 (6.6)" in text
    assert "5.2" in text
