"""`mpd swarm`: what it prints, what it asks the daemon, and what it says when it cannot.

The daemon beside the commands is a stub; the state directories are real.
"""

import json
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import mpd.client
from mpd.cli_swarm import swarm
from mpd.daemon.state import StateDir, make_state_dir, own_id
from mpd.daemon.swarm_store import SwarmStore
from mpd.errors import DaemonUnavailable, LocalError
from mpd.ids import Endpoint, PeerId, show_peer
from mpd.invites import Invite, parse_token
from mpd.revocations import Revocations

COMMANDS = ("create", "invite", "show", "revoke")
STRANGER = show_peer(b"x" * 20)


class StubDaemon:
    """The daemon of this machine, once `peer` is set."""

    def __init__(self) -> None:
        self.peer: str | None = None
        self.announce: str | None = "192.0.2.7:4747"
        self.sockets: list[Path | None] = []

    def __enter__(self) -> "StubDaemon":
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def status(self) -> dict[str, Any]:
        return {"announce": self.announce}


@pytest.fixture(autouse=True)
def daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StubDaemon:
    stub = StubDaemon()

    def connect(socket: Path | None) -> StubDaemon:
        stub.sockets.append(socket)
        if stub.peer is None:
            raise DaemonUnavailable("no daemon answers")
        return stub

    monkeypatch.setattr(mpd.client, "connect", connect)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("MPD_SOCKET", raising=False)
    return stub


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mpd"


@pytest.fixture
def owner(path: Path) -> PeerId:
    """This machine owns a swarm called lab."""
    assert run("create", "lab").exit_code == 0
    return own_id(StateDir(path).load_key())


def run(*arguments: str) -> Result:
    return CliRunner().invoke(swarm, arguments, prog_name="mpd swarm")


def failure(*arguments: str) -> str:
    """Return the one sentence that a command fails with."""
    result = run(*arguments)
    assert isinstance(result.exception, LocalError), result.output
    assert result.stdout == ""
    return str(result.exception)


def listed(path: Path) -> Revocations:
    return SwarmStore(path).news().revocations


def invited(*options: str) -> tuple[Invite, str]:
    """Return the invite that was printed, and what was said beside it."""
    result = run("invite", *options)
    assert result.exit_code == 0, result.exception
    (token,) = result.stdout.splitlines()
    assert f"mpd join --invite {token}\n" in result.stderr
    return parse_token(token).invite, result.stderr


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=["swarm", *COMMANDS])
def test_every_command_has_help_with_an_example(arguments: list[str]) -> None:
    result = run(*arguments, "--help")
    assert result.exit_code == 0
    example = result.stdout.partition("Example")[2]
    assert f"\n    mpd swarm {arguments[0] if arguments else 'create'}" in example


def test_the_commands_are_the_promised_ones() -> None:
    assert sorted(swarm.commands) == sorted(COMMANDS)


# -------------------------------------------------------------------------------------------------------------- create


def test_create_makes_a_swarm_and_says_where_its_key_is(path: Path) -> None:
    result = run("create", "lab")
    assert f"Swarm lab is made. Its root key is {path / 'swarm' / 'root.pem'}: keep a copy" in result.stdout
    assert "Next: `mpd join` here, then `mpd swarm invite` for each other machine." in result.stdout
    assert SwarmStore(path).root_key() is not None


def test_create_tells_to_restart_the_daemon_that_runs_here(daemon: StubDaemon, path: Path) -> None:
    daemon.peer = show_peer(own_id(make_state_dir(path).load_key()))
    assert "restart it with `mpd leave` and `mpd join`" in run("create", "lab", "--socket", "/run/s").stdout
    assert daemon.sockets == [Path("/run/s")]


def test_create_takes_no_notice_of_somebody_elses_daemon(daemon: StubDaemon) -> None:
    daemon.peer = STRANGER
    assert "Next: `mpd join` here" in run("create", "lab").stdout


def test_there_is_one_swarm_for_a_state_directory(owner: PeerId, path: Path, tmp_path: Path) -> None:
    root = SwarmStore(path).root()
    assert "exists already: this machine belongs to a swarm" in failure("create", "other")
    assert SwarmStore(path).root() == root
    assert run("create", "other", "--state-dir", str(tmp_path / "second")).exit_code == 0


def test_a_name_that_cannot_be_shown_is_refused(path: Path) -> None:
    assert "cannot be the name of a swarm" in failure("create", "\x1b[31m")
    assert not SwarmStore(path).exists()


# -------------------------------------------------------------------------------------------------------------- invite


def test_an_invite_leads_to_the_daemon_that_runs_here(daemon: StubDaemon, owner: PeerId) -> None:
    daemon.peer = show_peer(owner)
    before = time.time()
    invite, said = invited()
    assert invite.addresses == (Endpoint("192.0.2.7", 4747),)
    assert (invite.admitter, invite.uses, invite.role, invite.peer) == (owner, 1, "member", None)
    assert 0 <= invite.not_after_s - int(before) - 86400 <= 60
    assert said.startswith("Good for one machine during 1 day. There, type: mpd join")


def test_an_invite_says_what_the_flags_say(owner: PeerId) -> None:
    before = time.time()
    invite, said = invited(
        "--for", STRANGER, "--expires", "90m", "--uses", "3", "--role", "observer",
        "--address", "a.example:1", "--address", "[2001:db8::7]",
    )  # fmt: skip
    assert invite.addresses == (Endpoint("a.example", 1), Endpoint("2001:db8::7", 4747))
    assert (invite.peer, invite.uses, invite.role) == (b"x" * 20, 3, "observer")
    assert 0 <= invite.not_after_s - int(before) - 5400 <= 60
    assert "Good for 3 machines during 90 minutes." in said


@pytest.mark.parametrize(("expires", "words"), [("1s", "1 second"), ("90s", "90 seconds"), ("1m", "1 minute")])
def test_an_invite_says_how_long_it_is_good(owner: PeerId, expires: str, words: str) -> None:
    _, said = invited("--address", "a.example:1", "--expires", expires)
    assert f"Good for one machine during {words}." in said


def test_without_a_daemon_an_invite_leads_to_where_it_was(owner: PeerId, path: Path) -> None:
    assert "start `mpd join`, or give --address" in failure("invite")
    StateDir(path).remember_announced(Endpoint("192.0.2.9", 5))
    assert invited()[0].addresses == (Endpoint("192.0.2.9", 5),)


def test_the_daemon_of_another_state_directory_is_not_asked(daemon: StubDaemon, owner: PeerId) -> None:
    daemon.peer = STRANGER
    assert "it is not known where this machine can be reached" in failure("invite")


def test_a_daemon_that_accepts_no_connections_admits_nobody(daemon: StubDaemon, owner: PeerId) -> None:
    daemon.peer, daemon.announce = show_peer(owner), None
    assert "accepts no connections, so it can admit nobody" in failure("invite")


def test_an_invite_that_only_this_machine_can_use_comes_with_a_warning(daemon: StubDaemon, owner: PeerId) -> None:
    daemon.peer, daemon.announce = show_peer(owner), "127.0.0.1:4747"
    assert "warning: only this machine itself can reach 127.0.0.1:4747; see --address" in invited()[1]


def test_an_invite_to_another_admitter_leads_there(owner: PeerId, path: Path) -> None:
    assert "say so with --address" in failure("invite", "--at", STRANGER)
    SwarmStore(path).remember_admitter(PeerId(b"x" * 20), Endpoint("192.0.2.8", 1), Endpoint("192.0.2.8", 2))
    invite, _ = invited("--at", STRANGER)
    assert invite.admitter == b"x" * 20
    assert invite.addresses == (Endpoint("192.0.2.8", 1), Endpoint("192.0.2.8", 2))


@pytest.mark.parametrize("command", [["invite", "--address", "a.example:1"], ["show"], ["revoke", STRANGER]])
def test_where_nothing_has_run_there_is_nothing_to_do(command: list[str], path: Path) -> None:
    assert f"there is nothing in {path} yet: run `mpd join` or `mpd swarm create NAME` first" in failure(*command)
    assert not path.exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["invite"], "an open swarm needs no invites"),
        (["revoke", STRANGER], "nobody can be revoked in the open swarm"),
    ],
)
def test_the_open_swarm_has_no_owner(command: list[str], words: str, path: Path) -> None:
    make_state_dir(path).load_key()
    assert words in failure(*command)


@pytest.mark.parametrize(
    "arguments",
    [
        ["create"],
        ["invite", "--expires", "soon"],
        ["invite", "--expires", "0h"],
        ["invite", "--expires", "9999d"],
        ["invite", "--uses", "0"],
        ["invite", "--role", "boss"],
        ["invite", "--for", "somebody"],
        ["invite", "--at", "1"],
        ["invite", "--address", "a b"],
        ["revoke"],
        ["revoke", "somebody"],
        ["show", "more"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], owner: PeerId, path: Path) -> None:
    result = run(*arguments)
    assert result.exit_code == click.UsageError.exit_code
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert listed(path).seq == 1


# ---------------------------------------------------------------------------------------------------------------- show


def test_show_tells_an_owner_everything(owner: PeerId, path: Path) -> None:
    SwarmStore(path).remember_admitter(PeerId(b"x" * 20), Endpoint("192.0.2.8", 1))
    answer = json.loads(run("show", "--json").stdout)
    assert 0 <= 7 * 86400 - answer.pop("expires_in_s") < 60
    assert answer == {
        "name": "lab", "id": answer["id"], "open": False, "role": "admitter", "admits": True, "revoked": 0, "news": 1,
        "peer_id": show_peer(owner), "root_key": True, "warnings": [],
        "admitters": [{"peer": STRANGER, "addresses": ["192.0.2.8:1"]}],
    }  # fmt: skip
    text = run("show").stdout
    assert f"swarm        lab (private), id {answer['id']}\n" in text
    assert f"peer         {show_peer(owner)}, admitter, may admit others\n" in text
    assert "certificate  ends in " in text
    assert "root key     on this machine\n" in text
    assert f"admitter     {STRANGER} at 192.0.2.8:1\n" in text


def test_show_says_loudly_that_a_swarm_is_open(path: Path) -> None:
    make_state_dir(path).load_key()
    assert "OPEN swarm" in run("show").stdout
    assert "anyone who reaches a daemon can join" in run("show").stdout
    assert json.loads(run("show", "--json").stdout)["open"] is True


def test_show_warns_before_the_end(owner: PeerId, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 6.1 * 86400)
    assert "warning      the certificate ends in 21 hours: keep the daemon running to renew it\n" in run("show").stdout
    monkeypatch.setattr(time, "time", lambda: now_s + 8 * 86400)
    assert "certificate  has ended\n" in run("show").stdout


# -------------------------------------------------------------------------------------------------------------- revoke


def test_revoke_writes_the_list_for_the_daemon_to_see(owner: PeerId, path: Path) -> None:
    result = run("revoke", STRANGER)
    assert result.stdout.startswith(f"Peer {STRANGER} is revoked in swarm lab.\nA daemon that runs on {path} sees it")
    assert (listed(path).seq, listed(path).peers) == (2, {b"x" * 20})
    assert run("revoke", STRANGER).stdout == f"Peer {STRANGER} is revoked already.\n"
    assert listed(path).seq == 2


def test_revoke_needs_the_root_key_and_spares_this_machine(owner: PeerId, path: Path) -> None:
    assert "this is this machine itself" in failure("revoke", show_peer(owner))
    (path / "swarm" / "root.pem").unlink()
    assert "only the root key can revoke" in failure("revoke", STRANGER)
    assert listed(path).seq == 1
