"""What the end-to-end tests of one module share: its swarm, and what is shown of it.

A test that fails shows what the daemons logged while it ran. Figures that a test measured (`record_property`) are
printed at the end of the run, because nobody can judge them from a test that passes.
"""

import sys
from collections.abc import Iterator

import pytest
from e2e_swarm import Swarm


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    """The daemons of this module. None runs at first; see `Swarm.grow`."""
    with Swarm() as own:
        yield own


@pytest.fixture(autouse=True)
def logs(swarm: Swarm) -> Iterator[None]:
    """Have pytest show the daemons' logs, if it shows anything."""
    for daemon in swarm.daemons:
        daemon.mark_log()
    yield
    sys.stderr.write(swarm.log())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    figures = [
        f"{report.nodeid.rpartition('::')[2]}: {name} {value}"
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
    ]
    if figures:
        terminalreporter.section("figures")
        for figure in figures:
            terminalreporter.write_line(figure)
