"""`mpd chaos` as a user runs it: real daemons and trainers, broken on purpose; and nothing is left of it afterwards.

Strategy: the command judges with its own oracle, whose parts have tests of their own; here its exit code and report are
looked at. Every process that it starts carries the path of its temporary folder in its arguments, so what is left can
be found. The short forms run for seconds with a fault every other; MPD_SOAK=1 runs the full ones.
"""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_swarm import ENVIRONMENT, MPD, eventually

SOAK = os.environ.get("MPD_SOAK") == "1"
CHURN_S = 3600 if SOAK else 12
LONGEST_GAP_S = 30.0
KEPT = 0.98

pytestmark = pytest.mark.timeout(0 if SOAK else 60)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the command under test puts everything; its path is short, because sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="mpd-") as name:
        yield Path(name)


def start(folder: Path, *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*MPD, "chaos", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, "TMPDIR": str(folder)},
    )


def report(process: "subprocess.Popen[str]", folder: Path) -> Any:
    """Return what the command reports in the end, having left nothing behind."""
    out, err = process.communicate()
    assert process.returncode == 0, f"{out}\n{err}"
    assert left_of(folder) == []
    assert list(folder.iterdir()) == []
    return json.loads(out)


def left_of(folder: Path) -> list[int]:
    """Return the processes that were started with paths in this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return found


def test_chaos_costs_little_and_breaks_no_promise(folder: Path, score: Callable[..., None]) -> None:
    full = "--peers 8 --minutes 30 --every 30 --seed 1 --json"
    short = "--peers 4 --minutes 0.17 --every 2 --quiet 3 --seed 1 --json"
    found = report(start(folder, *(full if SOAK else short).split()), folder)
    assert found["held"]
    assert len(found["faults"]) == (60 if SOAK else 5)
    assert found["longest_gap_s"] < LONGEST_GAP_S
    assert found["good_rounds"] >= len(found["faults"])
    score(
        2,
        "98 % of the fault-free rounds with a fault every 30 s, no gap of 30 s",
        minutes=found["minutes"],
        peers=found["peers"],
        faults=len(found["faults"]),
        kept=found["kept"],
        longest_gap_s=found["longest_gap_s"],
    )
    if SOAK:
        assert found["kept"] >= KEPT


def test_churn_never_stops_the_rounds(folder: Path, score: Callable[..., None]) -> None:
    """Ctrl-C ends it, with a report about what there was."""
    options = "--peers 4 --faults kill,join --every 0.5-2 --minutes 1440 --quiet 1 --seed 3 --json"
    process = start(folder, *options.split())
    assert process.stderr is not None
    assert "seed 3" in process.stderr.readline()
    assert "machine" in process.stderr.readline(), "the first fault"
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=CHURN_S)  # somebody has to read what it says, or it waits for that
    process.send_signal(signal.SIGINT)
    found = report(process, folder)
    assert found["held"]
    assert len(found["faults"]) > CHURN_S / 4
    assert found["longest_gap_s"] <= LONGEST_GAP_S
    score(
        3,
        "daemons killed and spawned every 0.5 to 2 s: no gap of 30 s, every result exact",
        minutes=found["minutes"],
        kills=sum(fault["kind"] == "kill" for fault in found["faults"]),
        good_rounds=found["good_rounds"],
        results=found["results"],
        longest_gap_s=found["longest_gap_s"],
    )


def test_when_it_is_killed_itself_nothing_stays(folder: Path) -> None:
    process = start(folder, "--peers=2", "--minutes=10")
    try:
        eventually(lambda: len(left_of(folder)) == 4, "two daemons and two trainers run")
    finally:
        process.kill()
        process.communicate()
    eventually(lambda: left_of(folder) == [], "what it started is gone too")
