"""`mpd doctor`: look what is wrong, say what to do.

A daemon that runs is asked to examine itself, because it knows most and can ask its peers. Without one, what a daemon
would need is looked at from here. As in `cli.py`, other rooms are imported inside the command.
"""

import json
from pathlib import Path
from typing import Any

import click

from mpd import __version__
from mpd.cli_options import ADDRESS, JSON, SOCKET, STATE_DIR, default_state_dir
from mpd.config import DEFAULT_PORT
from mpd.doctor import Presence, judge_presence
from mpd.errors import DaemonUnavailable, LocalError
from mpd.findings import PROBLEM, Finding
from mpd.ids import Endpoint

_PROBLEM, _NO_DAEMON = 1, 3


@click.command()
@click.option(
    "--bootstrap", type=ADDRESS, multiple=True, help="An address to look at, besides those that the daemon has."
)
@click.option(
    "--listen",
    type=ADDRESS,
    default=f"0.0.0.0:{DEFAULT_PORT}",
    show_default=True,
    help="Where a daemon would listen, if none runs.",
)
@SOCKET
@STATE_DIR
@JSON
@click.pass_context
def doctor(
    ctx: click.Context,
    bootstrap: tuple[Endpoint, ...],
    listen: Endpoint,
    socket_path: Path | None,
    state_dir: Path | None,
    as_json: bool,
) -> None:
    """Look what is wrong on this machine and on the way to its peers, and say what to do. Changes nothing.

    \b
    Examples:
      mpd doctor
      mpd doctor --bootstrap 192.0.2.7:4747      before `mpd join` with that address

    With a daemon it examines itself and asks peers to dial back; without one, what a daemon would need is looked at.
    Takes up to ten seconds. Exit code 0: no problem (there may be warnings), 1: a problem, 3: no daemon at the socket
    that was named.
    """
    if not all(address.port for address in bootstrap):
        raise click.UsageError("--bootstrap needs the port that the daemon there listens on")
    presence, findings = _ask_the_daemon(socket_path, bootstrap)
    if not presence.is_there:
        findings = _check_up(Path(presence.socket) if presence.socket else None, state_dir, listen, bootstrap)
    findings = [judge_presence(presence), *findings]
    if as_json:
        listed = [{name: getattr(each, name) for name in Finding.__dataclass_fields__} for each in findings]
        click.echo(json.dumps({"daemon": presence.is_there, "findings": listed}, indent=2))
    else:
        from mpd.show import show_findings

        show_findings(findings)
    if presence.wanted and not presence.is_there:
        ctx.exit(_NO_DAEMON)
    if any(each.verdict == PROBLEM for each in findings):
        ctx.exit(_PROBLEM)


def _ask_the_daemon(socket_path: Path | None, bootstrap: tuple[Endpoint, ...]) -> tuple[Presence, list[Finding]]:
    """Return whether a daemon answers, and what it finds."""
    from mpd.client import connect
    from mpd.client.daemon import default_socket_path

    wanted = socket_path is not None
    try:
        path = (socket_path or default_socket_path()).absolute()
    except LocalError as error:
        return Presence("", False, trouble=str(error)), []
    try:
        with connect(path) as daemon:
            answer: list[dict[str, Any]] = daemon.examine(map(str, bootstrap))
    except DaemonUnavailable as error:
        return Presence(str(path), False, wanted, str(error) if wanted else ""), []
    presence = Presence(str(path), True, wanted, versions=(__version__, daemon.version))
    return presence, [Finding(**each) for each in answer]


def _check_up(
    socket_path: Path | None, state_dir: Path | None, listen: Endpoint, bootstrap: tuple[Endpoint, ...]
) -> list[Finding]:
    import trio

    from mpd.daemon.checkup import check_up

    path = (state_dir or default_state_dir()).absolute()
    return trio.run(check_up, socket_path, path, listen, bootstrap)
