"""`mpd doctor`: whom it asks, what it prints, what it exits with. What is found has tests of its own."""

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

import mpd.client
import mpd.daemon.checkup
from mpd import __version__
from mpd.cli import cli
from mpd.errors import DaemonUnavailable
from mpd.findings import NOT_CHECKED, OK, PROBLEM, WARNING, Finding
from mpd.ids import Endpoint
from mpd.show import show_findings

FINE = Finding("disk", OK, "all is well")
WORSE = Finding("limits", WARNING, "it is tight", "wait")
BAD = Finding("reachable", PROBLEM, "ab12.. could not dial 203.0.113.5:4747", "open TCP and UDP port 4747")


class StubDaemon:
    def __init__(self, findings: list[Finding], version: str = __version__) -> None:
        self.findings = findings
        self.version = version
        self.asked: list[str] = []

    def __enter__(self) -> "StubDaemon":
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def examine(self, bootstrap: Iterable[str]) -> list[dict[str, Any]]:
        self.asked += bootstrap
        return [{name: getattr(each, name) for name in Finding.__dataclass_fields__} for each in self.findings]


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> StubDaemon:
    stub = StubDaemon([FINE])
    monkeypatch.setattr(mpd.client, "connect", lambda socket: stub)
    return stub


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What is looked at where no daemon runs; one problem is found."""
    asked: list[Any] = []

    async def check_up(*arguments: Any) -> list[Finding]:
        asked.append(arguments)
        return [BAD] if Endpoint("192.0.2.7", 1) in arguments[3] else [FINE]

    def connect(socket: Path) -> None:
        raise DaemonUnavailable(f"no daemon answers at {socket}")

    monkeypatch.setattr(mpd.client, "connect", connect)
    monkeypatch.setattr(mpd.daemon.checkup, "check_up", check_up)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("MPD_SOCKET", raising=False)
    return asked


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["doctor", *arguments], prog_name="mpd")


def findings(result: Result) -> list[tuple[str, str]]:
    return [(each["check"], each["verdict"]) for each in json.loads(result.stdout)["findings"]]


@pytest.mark.parametrize(
    ("found", "code"), [([FINE], 0), ([FINE, WORSE], 0), ([FINE, WORSE, BAD], 1)], ids=["ok", "warning", "problem"]
)
def test_only_a_problem_is_a_failure(daemon: StubDaemon, found: list[Finding], code: int) -> None:
    daemon.findings = found
    result = run("--json")
    assert result.exit_code == code
    assert findings(result) == [("daemon", OK), *((each.check, each.verdict) for each in found)]
    assert json.loads(result.stdout)["daemon"] is True
    assert run().exit_code == code


def test_a_daemon_is_told_which_addresses_to_look_at(daemon: StubDaemon) -> None:
    run("--bootstrap", "192.0.2.7:4747", "--bootstrap", "[2001:db8::1]:5")
    assert daemon.asked == ["192.0.2.7:4747", "[2001:db8::1]:5"]


def test_another_version_is_a_warning(daemon: StubDaemon) -> None:
    daemon.version = "0.0.1"
    assert findings(run("--json"))[0] == ("daemon", WARNING)


def test_without_a_daemon_this_machine_is_looked_at(looked_at: list[Any], tmp_path: Path) -> None:
    result = run("--json")
    assert (result.exit_code, findings(result)) == (0, [("daemon", NOT_CHECKED), ("disk", OK)])
    socket, state_dir, listen, bootstrap = looked_at[0]
    assert (socket, state_dir) == (tmp_path / "runtime/mpd/mpd.sock", tmp_path / "state/mpd")
    assert (listen, bootstrap) == (Endpoint("0.0.0.0", 4747), ())
    result = run("--json", "--bootstrap", "192.0.2.7:1", "--listen", "127.0.0.1:5", "--state-dir", "/s")
    assert result.exit_code == 1
    assert looked_at[1][1:] == (Path("/s"), Endpoint("127.0.0.1", 5), (Endpoint("192.0.2.7", 1),))


def test_a_socket_that_was_named_must_have_a_daemon(looked_at: list[Any], tmp_path: Path) -> None:
    result = run("--json", "--socket", str(tmp_path / "no.sock"))
    assert (result.exit_code, findings(result)[0]) == (3, ("daemon", PROBLEM))
    assert len(looked_at) == 1


def test_a_folder_in_other_hands_is_a_finding(
    looked_at: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    (tmp_path / f"mpd-{os.geteuid()}").mkdir(mode=0o755)
    result = run("--json")
    assert (result.exit_code, findings(result)[0]) == (1, ("daemon", PROBLEM))
    assert looked_at[0][0] is None


def test_an_address_needs_a_port(daemon: StubDaemon) -> None:
    assert run("--bootstrap", "192.0.2.7:0").exit_code == 2


def test_findings_fit_a_terminal_of_80_columns() -> None:
    out = io.StringIO()
    show_findings([FINE, WORSE, BAD, Finding("clock", NOT_CHECKED, "\x1b[31mnobody")], Console(width=80, file=out))
    assert [line.rstrip() for line in out.getvalue().splitlines()] == [
        "ok           disk       all is well",
        "warning      limits     it is tight",
        "                        -> wait",
        "problem      reachable  ab12.. could not dial 203.0.113.5:4747",
        "                        -> open TCP and UDP port 4747",
        "not checked  clock      ?[31mnobody",
        "",
        "1 problem, 1 warning, 1 ok, 1 not checked",
    ]
