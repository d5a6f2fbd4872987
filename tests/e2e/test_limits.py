"""What a daemon costs that has nothing to do.

Speed is measured elsewhere, so limits are generous here; the figures themselves are printed at the end of the test run.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_swarm import DaemonProcess, Swarm

Record = Callable[[str, object], None]

MAX_START_S = 5.0
MAX_IDLE_MIB = 120.0
WATCHED_S = 3.0
MAX_IDLE_CPU = 0.10  # of one core


@pytest.fixture(scope="module")
def idle(swarm: Swarm) -> list[DaemonProcess]:
    return swarm.grow(2)


def test_a_daemon_answers_soon_after_its_start(idle: list[DaemonProcess], record_property: Record) -> None:
    started_s = min(daemon.started_s for daemon in idle)
    record_property("seconds to the first answer", f"{started_s:.2f}")
    assert started_s < MAX_START_S


def test_an_idle_daemon_is_small(idle: list[DaemonProcess], record_property: Record) -> None:
    pages = int(Path(f"/proc/{idle[1].pid}/statm").read_text().split()[1])
    resident_mib = pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    record_property("resident MiB", f"{resident_mib:.0f}")
    assert resident_mib < MAX_IDLE_MIB


def test_an_idle_daemon_needs_hardly_any_processor(idle: list[DaemonProcess], record_property: Record) -> None:
    before = cpu_s(idle[1].pid)
    time.sleep(WATCHED_S)
    share = (cpu_s(idle[1].pid) - before) / WATCHED_S
    record_property("idle share of a core", f"{share:.1%}")
    assert share < MAX_IDLE_CPU


def cpu_s(pid: int) -> float:
    """Return the processor time that the process has used, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
