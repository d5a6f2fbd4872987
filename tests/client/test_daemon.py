"""Finding the daemon, asking it, and closing everything that was opened."""

import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from client.stub import DaemonThread, Trainers

import mpd
from mpd.client import Daemon, connect, default_socket_path
from mpd.errors import DaemonUnavailable, LocalError
from mpd.ids import show_peer


def test_a_daemon_says_who_it_is(daemon: Daemon, trainers: Trainers) -> None:
    assert daemon.peer == show_peer(trainers.peer)
    assert daemon.version == mpd.__version__


def test_the_socket_may_be_text_or_come_from_the_environment(
    path: Path, server: DaemonThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert connect(str(path)).path == path
    monkeypatch.setenv("MPD_SOCKET", str(path))
    assert connect().path == path


def test_no_daemon_is_one_sentence(path: Path) -> None:
    with pytest.raises(DaemonUnavailable, match=re.escape(f"no daemon answers at {path}: start one with `mpd join`")):
        connect(path)


def test_questions_are_answered(daemon: Daemon) -> None:
    assert daemon.status() == {"what": "status", "run": "", "last": 20}
    assert daemon.peers() == {"what": "peers", "run": "", "last": 20}
    assert daemon.rounds() == {"what": "rounds", "run": "", "last": 20}
    assert daemon.rounds("digits", last=3) == {"what": "rounds", "run": "digits", "last": 3}


def test_leaving_returns_when_the_daemon_has_gone(path: Path, daemon: Daemon) -> None:
    daemon.leave()
    with pytest.raises(DaemonUnavailable, match="no daemon answers"):
        daemon.status()


def test_a_daemon_that_takes_too_long_to_leave_is_named(
    daemon: Daemon, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainers, "leave", lambda: None)
    with pytest.raises(DaemonUnavailable, match="is leaving, but has not gone after 0 s"):
        daemon.leave(timeout=0)


def test_closing_closes_the_averagers_and_may_be_done_twice(daemon: Daemon, trainers: Trainers) -> None:
    averagers = [daemon.averager(run, [np.ones(3)]) for run in ("one", "two")]
    daemon.close()
    daemon.close()
    assert all(seat.closed.wait(10) for seat in trainers.seats)
    for averager in averagers:
        with pytest.raises(LocalError, match="this averager is closed"):
            averager.step()


def test_terms_and_label_reach_the_daemon(daemon: Daemon, trainers: Trainers) -> None:
    daemon.averager("run", {"w": np.ones(3)}, group_size=4, rounds="exact", codec="zstd")
    assert trainers.seats[0].label.endswith(f"(pid {os.getpid()})")
    terms = trainers.terms[0]
    assert (terms.group_size, terms.rounds, terms.codec, terms.aggregate) == (4, "exact", "zstd", "mean")
    for aggregate in ("clip", "trimmed"):
        daemon.averager("run", {"w": np.ones(3)}, aggregate=aggregate)
        assert trainers.terms[-1].aggregate == aggregate


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        ({"group_size": 1}, "group_size is 1: 2 to 48 expected"),
        ({"rounds": 2}, "rounds is 2: 1 or 'exact' expected"),
        ({"codec": "gzip"}, "codec is 'gzip'"),
        ({"aggregate": "median"}, "aggregate is 'median'"),
        ({"aggregate": "clip", "rounds": "exact"}, "aggregate is 'clip' with rounds='exact'"),
        ({"weight": 0.0}, "weight is 0.0"),
        ({"weight": 1e9}, "weight is 1000000000.0: a positive number up to 1e\\+08 expected"),
    ],
)
def test_bad_terms_are_named(daemon: Daemon, terms: dict[str, object], sentence: str) -> None:
    with pytest.raises(LocalError, match=sentence):
        daemon.averager("run", [np.ones(3)], **terms)  # type: ignore[arg-type]


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without MPD_SOCKET and XDG_RUNTIME_DIR; returns what the folder in the temporary directory would be."""
    monkeypatch.delenv("MPD_SOCKET", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"mpd-{os.geteuid()}"


def test_the_usual_places(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_socket_path() == nowhere / "mpd.sock"
    nowhere.mkdir(mode=0o700)
    assert default_socket_path() == nowhere / "mpd.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_socket_path() == Path("/run/user/7/mpd/mpd.sock")
    monkeypatch.setenv("MPD_SOCKET", "/elsewhere/s")
    assert default_socket_path() == Path("/elsewhere/s")


@pytest.mark.parametrize("kind", ["open to others", "a link", "someone else's"])
def test_a_folder_that_others_could_have_made_is_refused(
    nowhere: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "a link":
        (nowhere.parent / "target").mkdir(mode=0o700)
        nowhere.symlink_to(nowhere.parent / "target")
    else:
        nowhere.mkdir(mode=0o755 if kind == "open to others" else 0o700)
    if kind == "someone else's":
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
        nowhere.rename(nowhere.parent / f"mpd-{me + 1}")
    with pytest.raises(LocalError, match="must be a folder of yours with mode 700"):
        default_socket_path()


def test_an_examination_is_passed_on(daemon: Daemon) -> None:
    found = daemon.examine(["192.0.2.1:1", "192.0.2.2:2"])
    assert found == [{"check": "bootstrap", "says": "192.0.2.1:1"}, {"check": "bootstrap", "says": "192.0.2.2:2"}]
