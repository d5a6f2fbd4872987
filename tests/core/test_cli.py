"""The command line: what it prints, what it exits with, and that nobody ever sees a traceback who did not ask.

The daemon behind the commands is a stub, and `mpd join` runs a stub too: what those two really do has tests of its own.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import mpd.client
import mpd.daemon.app
from mpd import __version__
from mpd.cli import cli
from mpd.config import DaemonConfig, NetConfig
from mpd.errors import DaemonUnavailable, Fatal, LocalError
from mpd.ids import Endpoint, PeerId

ASKING = ("status", "rounds", "peers", "leave")
COMMANDS = ("advise", "join", *ASKING, "chaos", "swarm", "doctor", "simulate")
STATUS = {
    "peer_id": "a" * 32, "listen": "127.0.0.1:4747", "announce": "127.0.0.1:4747", "reachable": True, "links": 0,
    "suites": ["aes-256-gcm"], "swarm": {"open": True}, "budgets": {},
    "dht": {"peers": 0, "bootstrap": [], "problem": ""}, "runs": [], "problem": "", "version": "0.1.0", "uptime_s": 1.0,
}  # fmt: skip
ANSWERS: dict[str, Any] = {"status": STATUS, "rounds": [], "peers": []}


class StubDaemon:
    """Answers what it is asked, or raises what it is told to."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.trouble: BaseException | None = None

    def __enter__(self) -> "StubDaemon":
        return self

    def __exit__(self, *raised: object) -> None:
        self.asked.append("closed")

    def status(self) -> Any:
        return self._answer("status")

    def rounds(self, run: str | None, last: int) -> Any:
        self.asked += [run, last]
        return self._answer("rounds")

    def peers(self) -> Any:
        return self._answer("peers")

    def leave(self) -> None:
        self._answer("leave")

    def _answer(self, what: str) -> Any:
        self.asked.append(what)
        if self.trouble is not None:
            raise self.trouble
        return ANSWERS.get(what)


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> StubDaemon:
    stub = StubDaemon()

    def connect(socket: Path | None) -> StubDaemon:
        stub.asked.append(socket)
        return stub

    monkeypatch.setattr(mpd.client, "connect", connect)
    return stub


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[DaemonConfig]:
    """What `mpd join` would have run, instead of running it."""
    configs: list[DaemonConfig] = []

    async def run_daemon(config: DaemonConfig, ready: Callable[[Endpoint, Endpoint, PeerId], None]) -> None:
        configs.append(config)
        listen = config.net.listen
        nowhere = Endpoint("127.0.0.1", 0)
        ready(listen, nowhere if config.net.outbound_only else config.net.announce or listen, PeerId(bytes(20)))

    monkeypatch.setattr(mpd.daemon.app, "run_daemon", run_daemon)
    monkeypatch.delenv("MPD_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return configs


def run(*arguments: str, **environment: str) -> Result:
    """Run one command, which may set up logging as if the process were its own."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = []
    try:
        return CliRunner().invoke(cli, arguments, prog_name="mpd", env=environment)
    finally:
        root.handlers = handlers
        root.setLevel(level)


def failed_in_one_sentence(result: Result, code: int, *words: str) -> bool:
    lines = result.stderr.splitlines()
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("mpd: ")
    return all(word in lines[0] for word in words)


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=["mpd", *COMMANDS])
def test_every_command_has_help_with_an_example(arguments: list[str]) -> None:
    for flag in ("--help", "-h"):
        result = run(*arguments, flag)
        assert result.exit_code == 0
        example = result.stdout.partition("Example")[2]
        assert f"\n    mpd {arguments[0] if arguments else 'join'}" in example


def test_the_commands_are_the_promised_ones() -> None:
    assert sorted(cli.commands) == sorted(COMMANDS)


def test_the_version_is_told() -> None:
    for flag in ("--version", "-V"):
        result = run(flag)
        assert (result.exit_code, result.stdout) == (0, f"mpd, version {__version__}\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_completion(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mpd.cli"],
        env={**os.environ, "_MPD_COMPLETE": f"{shell}_source", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert f"_MPD_COMPLETE={shell}_complete" in done.stdout


def test_help_loads_no_other_room() -> None:
    code = """
import sys
from mpd.cli import main
sys.argv = ["mpd", "--help"]
try:
    main()
finally:
    print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "mpd.cli" in loaded
    assert not loaded & {"trio", "numpy", "msgspec", "rich", "mpd.client", "mpd.daemon"}


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("what", ANSWERS)
def test_json_is_the_answer_as_it_came(daemon: StubDaemon, what: str) -> None:
    result = run(what, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == ANSWERS[what]
    assert daemon.asked[-1] == "closed"


@pytest.mark.parametrize(
    ("what", "words"),
    [("status", "No trainer is attached"), ("rounds", "No round has begun yet"), ("peers", "No link is open")],
)
def test_without_json_there_is_text_for_people(daemon: StubDaemon, what: str, words: str) -> None:
    result = run(what)
    assert result.exit_code == 0
    assert words in result.stdout


def test_rounds_passes_its_choice_on(daemon: StubDaemon) -> None:
    assert run("rounds", "--run", "my-run", "--last", "5", "--json").exit_code == 0
    assert daemon.asked == [None, "my-run", 5, "rounds", "closed"]
    daemon.asked.clear()
    assert run("rounds", "--json").exit_code == 0
    assert daemon.asked == [None, None, 20, "rounds", "closed"]


def test_leave_says_that_the_daemon_has_gone(daemon: StubDaemon) -> None:
    result = run("leave")
    assert (result.exit_code, result.stdout) == (0, "The daemon has left the swarm.\n")
    assert daemon.asked == [None, "leave", "closed"]


@pytest.mark.parametrize("what", ASKING)
def test_the_socket_comes_from_the_flag_or_the_environment(daemon: StubDaemon, what: str) -> None:
    run(what, "--socket", "/run/a.sock", MPD_SOCKET="/run/b.sock")
    assert daemon.asked[0] == Path("/run/a.sock")
    daemon.asked.clear()
    run(what, MPD_SOCKET="/run/b.sock")
    assert daemon.asked[0] == Path("/run/b.sock")


# ------------------------------------------------------------------------------------------------------------- trouble


@pytest.mark.parametrize("what", ASKING)
def test_no_daemon_is_exit_code_3(what: str, tmp_path: Path) -> None:
    result = run(what, "--socket", str(tmp_path / "mpd.sock"))
    assert failed_in_one_sentence(result, 3, "no daemon answers at", "start one with `mpd join`")


@pytest.mark.parametrize(
    ("trouble", "code", "words"),
    [
        (LocalError("this daemon speaks another version"), 1, "this daemon speaks another version"),
        (DaemonUnavailable("it went away"), 3, "it went away"),
        (
            PermissionError(13, "Permission denied", "/run/mpd.sock"),
            1,
            "the machine refused: [Errno 13] Permission denied",
        ),
        (OSError(5, "Input/output error"), 1, "the machine refused: [Errno 5] Input/output error"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (KeyError("peer_id"), 1, "a bug in mpd: KeyError('peer_id')"),
        (
            ExceptionGroup("two", [ExceptionGroup("one", [Fatal("the port is taken")]), ValueError()]),
            1,
            "the port is taken",
        ),
        (BaseExceptionGroup("one", [KeyboardInterrupt()]), 1, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("what", ASKING)
def test_trouble_is_one_sentence(daemon: StubDaemon, what: str, trouble: BaseException, code: int, words: str) -> None:
    daemon.trouble = trouble
    assert failed_in_one_sentence(run(what), code, words)


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["status", "--yaml"],
        ["rounds", "--last", "0"],
        ["rounds", "--last", "many"],
        ["join", "now"],
        ["join", "--listen", "a b:1"],
        ["join", "--listen", "127.0.0.1:65536"],
        ["join", "--bootstrap", "http://192.0.2.7:4747"],
        ["join", "--bootstrap", "192.0.2.7:0"],
        ["join", "--announce", ""],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], daemon: StubDaemon, joined: list[DaemonConfig]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert (daemon.asked, joined) == ([], [])


def test_a_reader_that_has_had_enough_is_no_error_of_ours(daemon: StubDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def echo(text: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(click, "echo", echo)
    result = run("rounds", "--json")
    assert (result.exit_code, result.stderr) == (1, "")


# ---------------------------------------------------------------------------------------------------------------- join


def test_join_has_the_documented_defaults(joined: list[DaemonConfig], tmp_path: Path) -> None:
    assert run("join").exit_code == 0
    assert joined == [DaemonConfig(tmp_path / "runtime/mpd/mpd.sock", tmp_path / "state/mpd", NetConfig())]


def test_join_takes_what_is_to_go_wrong_from_the_environment(joined: list[DaemonConfig]) -> None:
    assert run("join", MPD_FAULT="send:3:kill").exit_code == 0
    assert joined[0].faults == "send:3:kill"


def test_join_keeps_its_state_at_home(joined: list[DaemonConfig]) -> None:
    assert run("join", XDG_STATE_HOME="", HOME="/home/someone").exit_code == 0
    assert joined[0].state_dir == Path("/home/someone/.local/state/mpd")


def test_join_reads_its_flags(joined: list[DaemonConfig], tmp_path: Path) -> None:
    result = run(
        "join", "--listen", "[::]:0", "--announce", "peer.example:1", "--bootstrap", "192.0.2.7", "--bootstrap",
        "[2001:db8::7]:9", "--outbound-only", "--socket", "/run/s", "--state-dir", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0
    bootstrap = (Endpoint("192.0.2.7", 4747), Endpoint("2001:db8::7", 9))
    net = NetConfig(Endpoint("::", 0), Endpoint("peer.example", 1), bootstrap, outbound_only=True)
    assert joined == [DaemonConfig(Path("/run/s"), tmp_path, net)]


def test_relative_paths_mean_where_the_command_was_typed(
    joined: list[DaemonConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("join", "--socket", "s", "--state-dir", "d").exit_code == 0
    assert (joined[0].socket, joined[0].state_dir) == (tmp_path / "s", tmp_path / "d")


@pytest.mark.parametrize(
    ("flags", "printed"),
    [
        (["--listen", "127.0.0.1:4747"], "others on this machine join with: mpd join --bootstrap 127.0.0.1:4747"),
        (["--listen", "192.0.2.7:5"], "others join with: mpd join --bootstrap 192.0.2.7:5"),
        (["--listen", "0.0.0.0:5", "--announce", "a.example:6"], "others join with: mpd join --bootstrap a.example:6"),
        (["--outbound-only"], "accepts no connections; others join through another peer"),
    ],
)
def test_join_prints_what_others_bootstrap_from(joined: list[DaemonConfig], flags: list[str], printed: str) -> None:
    result = run("join", *flags)
    assert result.stdout.startswith(f"peer {'a' * 32} ")
    assert result.stdout.endswith(f"{printed}\n")
    assert result.stderr == ""


def test_an_invite_is_read_and_appears_nowhere(joined: list[DaemonConfig]) -> None:
    result = run("join", "--invite", "mpdi1.secret")
    assert joined[0].invite == "mpdi1.secret"
    assert "secret" not in repr(joined[0]) + result.output


def test_tensors_travel_in_the_clear_only_where_nobody_listens(joined: list[DaemonConfig]) -> None:
    assert run("join", "--plain-on-loopback", "--listen", "127.0.0.1:0").exit_code == 0
    assert joined[0].net.plain_data
    result = run("join", "--plain-on-loopback")
    assert result.exit_code == 2
    assert "needs --listen with a loopback address, not 0.0.0.0:4747" in result.stderr


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (Fatal("cannot listen on 127.0.0.1:4747: taken"), "cannot listen on 127.0.0.1:4747: taken"),
        (ExceptionGroup("nursery", [ZeroDivisionError("by zero")]), "a bug in mpd: ZeroDivisionError('by zero')"),
        (OSError(28, "No space left on device"), "the machine refused: [Errno 28] No space left on device"),
    ],
    ids=["fatal", "bug", "full disk"],
)
@pytest.mark.parametrize("flags", [[], ["--verbose"]], ids=["quiet", "verbose"])
def test_a_daemon_that_fails_shows_a_traceback_only_if_asked(
    joined: list[DaemonConfig], monkeypatch: pytest.MonkeyPatch, trouble: Exception, words: str, flags: list[str]
) -> None:
    async def run_daemon(config: DaemonConfig, ready: object) -> None:
        raise trouble

    monkeypatch.setattr(mpd.daemon.app, "run_daemon", run_daemon)
    result = run("join", *flags)
    if not flags:
        assert failed_in_one_sentence(result, 1, words)
    else:
        assert result.exit_code == 1
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith(f"mpd: {words}")


def test_a_daemon_whose_greeting_nobody_takes_goes_on() -> None:
    """The disk is full to which its output goes, or its reader has gone."""
    greet = (
        "from mpd.cli import _greet\nfrom mpd.ids import Endpoint, PeerId\n"
        "_greet(*2 * [Endpoint('192.0.2.1', 1)], PeerId(bytes(20)))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", greet], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")
