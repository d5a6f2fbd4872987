"""The options that commands share: an address is checked while it is read, and state lies where the system says."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mpd.cli_options import ADDRESS, JSON, SOCKET, STATE_DIR, default_state_dir
from mpd.ids import Endpoint


@click.command()
@click.option("--address", type=ADDRESS, default=Endpoint("192.0.2.1", 1))
@SOCKET
@STATE_DIR
@JSON
def command(address: Endpoint, socket_path: Path | None, state_dir: Path | None, as_json: bool) -> None:
    click.echo(repr((address, socket_path, state_dir, as_json)))


def said(*arguments: str, **environment: str) -> str:
    result = CliRunner().invoke(command, arguments, env={"MPD_SOCKET": None, **environment})
    return result.stdout if result.exit_code == 0 else result.stderr


def test_nothing_is_decided_unless_said() -> None:
    assert said() == f"{(Endpoint('192.0.2.1', 1), None, None, False)!r}\n"


def test_everything_can_be_said() -> None:
    shown = said("--address", "[2001:db8::1]", "--socket", "/run/s", "--state-dir", "/var/s", "--json")
    assert shown == f"{(Endpoint('2001:db8::1', 4747), Path('/run/s'), Path('/var/s'), True)!r}\n"


def test_the_socket_may_come_from_the_environment() -> None:
    assert "/run/other" in said(MPD_SOCKET="/run/other")


def test_what_is_no_address_is_refused_by_name() -> None:
    assert "'a b:1' is not an address" in said("--address", "a b:1")


def test_state_lies_where_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert default_state_dir() == Path("/somewhere/mpd")
    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_state_dir() == Path("/home/someone/.local/state/mpd")
