"""The processes of `mpd chaos`: who dies with whom, and what they are started with."""

import json
import os
import queue
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from client.test_chaos_plan import SETTINGS

from mpd.client import chaos_swarm
from mpd.client.chaos_swarm import Machine

# Starts a process as `mpd chaos` does, and lives on.
PARENT = """
import sys
from mpd.client.chaos_swarm import _spawn
_spawn(["-c", "import os, time; print(os.getpid(), os.getpgid(0), flush=True); time.sleep(600)"], stdout=sys.stdout)
sys.stdin.read()
"""
ENDS_AT_ONCE = "raise SystemExit(7)"
LIVES = "import time; print('up', flush=True); time.sleep(600)"
TALKS = """
import sys, time
print('{"machine": 2, "peer": "abc"}')
print('{"machine": 2, "step": 1}')
print('{"machine": 2, "st', end="", flush=True)
"""


@pytest.fixture
def records() -> "queue.SimpleQueue[dict[str, Any]]":
    return queue.SimpleQueue()


@pytest.fixture
def machine(tmp_path: Path, records: "queue.SimpleQueue[dict[str, Any]]") -> Machine:
    return Machine(2, tmp_path, SETTINGS, records)


class Spawned:
    """Runs `code` whatever should be started, and keeps what that was."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
        self.commands: list[list[str]] = []
        original = chaos_swarm._spawn

        def spawn(arguments: list[str], **streams: Any) -> "subprocess.Popen[bytes]":
            self.commands.append(arguments)
            return original(["-c", code], **streams)

        monkeypatch.setattr(chaos_swarm, "_spawn", spawn)


def test_a_process_dies_with_the_one_that_started_it_however_that_dies() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid, group = map(int, parent.stdout.readline().split())
        assert group == pid, "Ctrl-C would reach it too"
        parent.kill()
        assert parent.stdout.read() == b"", "nobody holds the other end of the pipe any more"


def test_nothing_of_ours_leads_into_another_swarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPD_INVITE", "mpdi1.xxxx")
    monkeypatch.setenv("MPD_SOCKET", "/run/mine.sock")
    environment = chaos_swarm._environment()
    assert not [name for name in environment if name.startswith("MPD_")]
    assert environment["PATH"] == os.environ["PATH"]


def test_a_daemon_that_is_killed_was_told_to_and_starts_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawned = Spawned(monkeypatch, LIVES)
    machine.bootstrap = ("127.0.0.1:1", "127.0.0.1:2")
    machine.start()
    machine.start()
    (command,) = spawned.commands
    assert command[:3] == ["-m", "mpd.cli", "join"]
    assert command[-3:] == ["--listen=127.0.0.1:0", "--bootstrap=127.0.0.1:1", "--bootstrap=127.0.0.1:2"]
    assert machine.is_up()
    machine.kill()
    assert not machine.is_up()
    assert machine.take_exits() == [(-signal.SIGKILL, True)]
    assert machine.take_exits() == []
    machine.start()
    assert machine.is_up()
    machine.freeze()
    machine.end(5.0)
    assert machine.take_exits() == [(-signal.SIGTERM, True)]


def test_a_daemon_that_ends_by_itself_is_noticed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    Spawned(monkeypatch, ENDS_AT_ONCE)
    machine.start()
    assert machine._daemon is not None
    machine._daemon.wait()
    machine.term()
    assert machine.take_exits() == [(7, False)]
    assert machine.listen() is None


def test_what_a_trainer_tells_is_passed_on_but_for_half_a_line(
    machine: Machine, records: "queue.SimpleQueue[dict[str, Any]]", monkeypatch: pytest.MonkeyPatch
) -> None:
    spawned = Spawned(monkeypatch, TALKS)
    machine.start_trainer()
    told = [records.get(timeout=20), records.get(timeout=20)]
    assert told == [{"machine": 2, "peer": "abc"}, {"machine": 2, "step": 1}]
    assert machine._trainer is not None
    machine._trainer.wait()
    assert machine.has_lost_trainer()
    machine.kill_trainer()
    assert not machine.has_lost_trainer()
    machine.start_trainer()
    machine.kill_trainer()
    first_steps = [command[5] for command in spawned.commands]
    assert first_steps == ["0", "1000000"], "no step has the number of another"
    assert json.loads(spawned.commands[0][4]) == SETTINGS.guest + 1
