"""`mpd swarm`: make a private swarm, invite machines, look at it, revoke.

These commands work on the state directory, whether a daemon runs on it or not; a running one is asked for the address
that it announces, and sees for itself what has changed. As in `cli.py`, other rooms are imported inside the commands.
"""

import json
import re
import secrets
import time
from pathlib import Path
from typing import Any

import click

from mpd.cli_options import ADDRESS, JSON, SOCKET, STATE_DIR, default_state_dir
from mpd.errors import DaemonUnavailable, LocalError
from mpd.ids import Endpoint, PeerId, parse_endpoint, parse_peer, show_peer

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"([0-9]{1,6})([smhd])", re.ASCII)
_MAX_EXPIRY_S = 365 * 86400
_SOON_S = 86400


class _Peer(click.ParamType[PeerId]):
    """A peer id as `mpd status` shows it."""

    name = "PEER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> PeerId:
        try:
            return parse_peer(value)
        except LocalError as error:
            self.fail(str(error), param, ctx)


class _Duration(click.ParamType[int]):
    """A number of seconds, minutes, hours or days: 90s, 30m, 24h, 7d."""

    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = _DURATION.fullmatch(value)
        seconds = int(found[1]) * _UNITS_S[found[2]] if found else 0
        if not 0 < seconds <= _MAX_EXPIRY_S:
            self.fail(f"{value!r} is not a duration up to a year: 90s, 30m, 24h or 7d, for example", param, ctx)
        return seconds


@click.group()
def swarm() -> None:
    """Make a private swarm, invite machines to it, and revoke them.

    \b
    Examples:
      mpd swarm create lab        on the first machine, before `mpd join`
      mpd swarm invite            there, once for each other machine; prints a token
      mpd join --invite TOKEN     on the other machine
    """


@swarm.command()
@click.argument("name")
@STATE_DIR
@SOCKET
def create(name: str, state_dir: Path | None, socket_path: Path | None) -> None:
    """Make a private swarm called NAME; this machine keeps its root key and admits the others.

    \b
    Example:
      mpd swarm create lab
    """
    from mpd.daemon.state import make_state_dir, own_id
    from mpd.daemon.swarm_owner import create_swarm
    from mpd.daemon.swarm_store import SwarmStore

    path = _path(state_dir)
    key = make_state_dir(path).load_key()
    store = SwarmStore(path)
    create_swarm(store, key, name, time.time(), secrets.token_bytes)
    click.echo(f"Swarm {name} is made. Its root key is {store.folder / 'root.pem'}: keep a copy in a safe place.")
    if _daemon_status(socket_path, own_id(key)) is not None:
        click.echo("The daemon here is still in the open swarm: restart it with `mpd leave` and `mpd join`.")
    else:
        click.echo("Next: `mpd join` here, then `mpd swarm invite` for each other machine.")


@swarm.command()
@click.option("--for", "peer", type=_Peer(), help="Let in this peer only.")
@click.option("--expires", type=_Duration(), default="24h", show_default=True, help="How long it may be used.")
@click.option("--uses", type=click.IntRange(1, 10_000), default=1, show_default=True, help="How many may use it.")
@click.option(
    "--role",
    type=click.Choice(["member", "observer", "admitter"]),
    default="member",
    show_default=True,
    help="An observer takes no part in rounds; an admitter may admit others, for which the root key is needed here.",
)
@click.option("--at", "admitter", type=_Peer(), help="Let another admitter redeem it; the root key is needed here.")
@click.option(
    "--address", "addresses", type=ADDRESS, multiple=True, help="Where the admitter is reached.  [default: announced]"
)
@STATE_DIR
@SOCKET
def invite(
    peer: PeerId | None,
    expires: int,
    uses: int,
    role: str,
    admitter: PeerId | None,
    addresses: tuple[Endpoint, ...],
    state_dir: Path | None,
    socket_path: Path | None,
) -> None:
    """Print an invite: a token with which another machine joins. Whoever has it can use it, so send it in private.

    \b
    Examples:
      mpd swarm invite
      mpd swarm invite --uses 20 --expires 7d
    """
    from mpd.daemon.state import StateDir
    from mpd.daemon.swarm_owner import InviteTerms, make_invite

    state = StateDir(_path(state_dir))
    ours = _load(state.path)
    where = addresses or _addresses_of(ours, admitter, socket_path, state.last_announced())
    terms = InviteTerms(role, uses, expires, peer, admitter)
    token = make_invite(ours, state.load_key(), terms, where, secrets.token_bytes(16), time.time())
    if all(address.is_loopback for address in where):
        click.echo(f"warning: only this machine itself can reach {where[0]}; see --address", err=True)
    people = "one machine" if uses == 1 else f"{uses} machines"
    click.echo(f"Good for {people} during {_in_words(expires)}. There, type: mpd join --invite {token}", err=True)
    click.echo(token)


@swarm.command()
@JSON
@STATE_DIR
def show(as_json: bool, state_dir: Path | None) -> None:
    """Show which swarm this machine is in, and what it may do there.

    \b
    Example:
      mpd swarm show --json
    """
    answer = _describe(_load(_path(state_dir)))
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    if answer["open"]:
        click.echo("This machine is in the OPEN swarm: its links are sealed, but anyone who reaches a daemon can join.")
        click.echo("For a private one: mpd swarm create NAME")
        return
    admits = ", may admit others" if answer["admits"] else ""
    for name, value in (
        ("swarm", f"{answer['name']} (private), id {answer['id']}"),
        ("peer", f"{answer['peer_id']}, {answer['role']}{admits}"),
        ("certificate", _ending(answer["expires_in_s"])),
        ("revoked", f"{answer['revoked']} (list {answer['news']})"),
        ("root key", "on this machine" if answer["root_key"] else "not on this machine"),
        *(("admitter", f"{each['peer']} at {', '.join(each['addresses'])}") for each in answer["admitters"]),
        *(("warning", warning) for warning in answer["warnings"]),
    ):
        click.echo(f"{name:<12} {value}")


@swarm.command()
@click.argument("peer", type=_Peer())
@STATE_DIR
def revoke(peer: PeerId, state_dir: Path | None) -> None:
    """Shut PEER out for good: its links are cut, and no daemon of the swarm talks to it again. Needs the root key here.

    \b
    Example:
      mpd swarm revoke 3q2w6yqzfq5kxh4d7n2m5s6t7u4v3w2x
    """
    from mpd.daemon.state import StateDir
    from mpd.daemon.swarm_owner import revoke as revoke_peer

    path = _path(state_dir)
    ours = _load(path)
    if ours.store is None:
        raise LocalError("nobody can be revoked in the open swarm: make a private one with `mpd swarm create NAME`")
    key = StateDir(path).load_key()
    if not revoke_peer(ours.store, key, peer, time.time(), secrets.token_bytes):
        click.echo(f"Peer {show_peer(peer)} is revoked already.")
        return
    click.echo(f"Peer {show_peer(peer)} is revoked in swarm {ours.name}.")
    click.echo(f"A daemon that runs on {path} sees it within 5 s and tells the others; without one, start `mpd join`.")


def _path(state_dir: Path | None) -> Path:
    return (state_dir or default_state_dir()).absolute()


def _load(path: Path) -> Any:
    """Return the `Swarm` of a state directory that has been used. Raises LocalError, Fatal."""
    from mpd.daemon.state import StateDir
    from mpd.daemon.swarm import load_swarm

    if not (path / "key.pem").exists():
        raise LocalError(f"there is nothing in {path} yet: run `mpd join` or `mpd swarm create NAME` first")
    return load_swarm(path, StateDir(path).load_key(), time.time, secrets.token_bytes)


def _daemon_status(socket_path: Path | None, own: PeerId) -> dict[str, Any] | None:
    """Return what the daemon with our key says about itself, if it runs."""
    from mpd.client import connect

    try:
        with connect(socket_path) as daemon:
            return daemon.status() if daemon.peer == show_peer(own) else None
    except (DaemonUnavailable, LocalError):
        return None


def _addresses_of(
    ours: Any, admitter: PeerId | None, socket_path: Path | None, last_announced: Endpoint | None
) -> tuple[Endpoint, ...]:
    """Return where the admitter of an invite can be dialled; nowhere in an open swarm. Raises LocalError if unknown."""
    if ours.store is None:
        return ()
    if admitter is not None and admitter != ours.own:
        known: tuple[Endpoint, ...] = ours.store.admitters().get(admitter, ())
        if not known:
            raise LocalError("it is not known where that admitter can be reached: say so with --address HOST:PORT")
        return known
    status = _daemon_status(socket_path, ours.own)
    if status is not None:
        if status["announce"] is None:
            raise LocalError("the daemon here accepts no connections, so it can admit nobody: start it without that")
        return (parse_endpoint(status["announce"]),)
    if last_announced is None:
        raise LocalError("it is not known where this machine can be reached: start `mpd join`, or give --address")
    return (last_announced,)


def _describe(ours: Any) -> dict[str, Any]:
    """Return what `mpd swarm show --json` prints."""
    admitters = {} if ours.store is None else ours.store.admitters()
    warnings = []
    if not ours.is_open and ours.not_after_s - ours.now_s() < _SOON_S:
        warnings.append(
            f"the certificate {_ending(ours.not_after_s - ours.now_s())}: keep the daemon running to renew it"
        )
    if ours.is_revoked_here():
        warnings.append("this machine, or the admitter that let it in, is revoked")
    return {
        **ours.status(),
        "peer_id": show_peer(ours.own),
        "root_key": ours.has_root_key(),
        "admitters": [
            {"peer": show_peer(peer), "addresses": [str(address) for address in addresses]}
            for peer, addresses in admitters.items()
        ],
        "warnings": warnings,
    }


def _ending(left_s: float) -> str:
    return f"ends in {_in_words(left_s)}" if left_s > 0 else "has ended"


def _in_words(seconds: float) -> str:
    for name, n_s in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * n_s or seconds == n_s:
            n = int(seconds // n_s)
            return f"{n} {name}{'s' * (n != 1)}"
    return f"{int(seconds)} second{'s' * (int(seconds) != 1)}"
