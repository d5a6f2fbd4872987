"""What client tests share: a daemon in a thread whose swarm has one other peer, of threes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from client.stub import DaemonThread, Trainers

from mpd.client import Daemon, connect


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mpd.sock"


@pytest.fixture
def trainers() -> Trainers:
    return Trainers(3.0)


@pytest.fixture
def server(path: Path, trainers: Trainers) -> Iterator[DaemonThread]:
    with DaemonThread(path, trainers) as thread:
        yield thread


@pytest.fixture
def daemon(path: Path, server: DaemonThread) -> Iterator[Daemon]:
    with connect(path) as connected:
        yield connected
