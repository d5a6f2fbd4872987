"""What every test shares: how hypothesis searches, and what is shown of the figures that tests measured.

By default each property is tried with the same examples on every run, so a red test is red for everybody. `make fuzz`
searches afresh instead, as long as MPD_FUZZ_EXAMPLES says, and keeps what it finds in `.hypothesis/`.

Figures (`record_property`, `score`) are printed at the end of the run, because nobody can judge them from a test that
passes. A row of the scorecard in docs/reliability.md is one line of JSON.
"""

import json
import os
from collections.abc import Callable, Generator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,  # a busy machine is not a bug
    print_blob=True,
)
settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("MPD_FUZZ_EXAMPLES", "10000")),
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")

Score = Callable[..., None]  # score(row, goal, **figures)


@pytest.fixture
def score(record_property: Callable[[str, object], None]) -> Score:
    """Note what was measured for a row of the scorecard: `score(6, "detected within 2 s", seconds=1.2)`."""

    def note(row: int, goal: str, **figures: object) -> None:
        record_property("scorecard", json.dumps({"row": row, "goal": goal, **figures}, default=float))  # numpy's too

    return note


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep figures as text: a process that runs tests tells them to another one, which knows no numpy."""
    report = yield
    report.user_properties = [(name, str(value)) for name, value in report.user_properties]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    figures, rows = [], []
    for report in terminalreporter.getreports("passed"):
        test = report.nodeid.rpartition("::")[2]
        for name, value in report.user_properties:
            if name == "scorecard":
                noted = json.loads(value)
                rows.append({"row": noted["row"], "test": test, **noted})
            else:
                figures.append(f"{test}: {name} {value}")
    for title, lines in {
        "figures": figures,
        "scorecard": [json.dumps(row) for row in sorted(rows, key=lambda row: row["row"])],
    }.items():
        if lines:
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.write_line(line)
