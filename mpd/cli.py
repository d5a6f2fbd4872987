"""The command line: reads flags and the environment, calls one room, prints for people or as JSON.

Nothing below this file reads the environment. The other rooms are imported inside the commands, so that `mpd --help`
and shell completion answer at once. Whatever goes wrong becomes one sentence on stderr and an exit code: 1 failed,
2 wrong usage, 3 no daemon at that socket.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from mpd import __version__
from mpd.cli_advise import advise
from mpd.cli_chaos import chaos
from mpd.cli_doctor import doctor
from mpd.cli_options import ADDRESS, JSON, SOCKET, STATE_DIR, default_state_dir
from mpd.cli_simulate import simulate
from mpd.cli_swarm import swarm
from mpd.config import DEFAULT_PORT, DaemonConfig, NetConfig
from mpd.errors import DaemonUnavailable, MpdError
from mpd.ids import Endpoint, PeerId, show_peer

_FAILED, _NO_DAEMON = 1, 3


class _Commands(click.Group):
    """The commands, and what becomes of anything that goes wrong in one of them."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click deals with these
        except (Exception, BaseExceptionGroup, KeyboardInterrupt) as error:
            logging.getLogger("mpd").debug("in full:", exc_info=True)
            sentence, code = _explain(error)
            click.echo(f"mpd: {sentence}", err=True)
            ctx.exit(code)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog='Shell completion: eval "$(_MPD_COMPLETE=bash_source mpd)" (or zsh_source, fish_source).',
)
@click.version_option(__version__, "-V", "--version", prog_name="mpd")
def cli() -> None:
    """Train one model on machines that come and go: one daemon per machine averages it.

    \b
    Examples:
      mpd join                                the first machine; prints its address
      mpd join --bootstrap 192.0.2.7:4747     every other machine
      mpd status                              what is going on, and why
    """


cli.add_command(swarm)
cli.add_command(doctor)
cli.add_command(chaos)
cli.add_command(advise)
cli.add_command(simulate)


@cli.command()
@click.option("--bootstrap", type=ADDRESS, multiple=True, help="A daemon of the swarm to find the others through.")
@click.option(
    "--listen",
    type=ADDRESS,
    default=f"0.0.0.0:{DEFAULT_PORT}",
    show_default=True,
    help="Where other daemons reach this one, by TCP and UDP; [::]:PORT for both IPv6 and IPv4. "
    "Port 0: a free one, the same every time.",
)
@click.option("--announce", type=ADDRESS, help="The address to tell others, if it is not the one listened on.")
@click.option("--outbound-only", is_flag=True, help="Accept no connections: dial everyone, reduce nothing.")
@click.option(
    "--invite",
    default="",
    metavar="TOKEN",
    envvar="MPD_INVITE",
    help="Become a member of a private swarm; needed once. See `mpd swarm`.",
)
@click.option(
    "--plain-on-loopback",
    is_flag=True,
    help="Do not seal tensors, to measure what sealing costs. All peers must say so and listen on loopback.",
)
@click.option(
    "--keep-state",
    is_flag=True,
    help="Keep the last averaged vector of each run in the state directory, saved once a minute at most.",
)
@SOCKET
@STATE_DIR
@click.option("-v", "--verbose", is_flag=True, help="Log everything, tracebacks included.")
@click.option(
    "--fault",
    "faults",
    default="",
    metavar="POINT:TURN:ACTION",
    envvar="MPD_FAULT",
    help="Fail on purpose at a point of the protocol, for tests of what becomes of the others.",
)
def join(
    bootstrap: tuple[Endpoint, ...],
    listen: Endpoint,
    announce: Endpoint | None,
    outbound_only: bool,
    invite: str,
    plain_on_loopback: bool,
    keep_state: bool,
    socket_path: Path | None,
    state_dir: Path | None,
    verbose: bool,
    faults: str,
) -> None:
    """Run this machine's daemon in the foreground, until Ctrl+C, SIGTERM or `mpd leave`.

    \b
    Examples:
      mpd join
      mpd join --bootstrap 192.0.2.7:4747
      mpd join --invite mpdi1.xxxx

    Without an invite this makes or joins an open swarm: sealed, but anyone who reaches a daemon can take part.
    """
    import trio

    from mpd.client.daemon import default_socket_path
    from mpd.daemon.app import run_daemon
    from mpd.daemon.logs import setup

    if not all(address.port for address in bootstrap):
        raise click.UsageError("--bootstrap needs the port that the daemon there listens on")
    if plain_on_loopback and not listen.is_loopback:
        raise click.UsageError(f"--plain-on-loopback needs --listen with a loopback address, not {listen}")
    config = DaemonConfig(
        socket=(socket_path or default_socket_path()).absolute(),
        state_dir=(state_dir or default_state_dir()).absolute(),
        net=NetConfig(listen, announce, bootstrap, outbound_only, plain_on_loopback),
        faults=faults,
        invite=invite,
        keep_state=keep_state,
    )
    setup(verbose)
    trio.run(run_daemon, config, _greet)


@cli.command()
@SOCKET
@JSON
def status(socket_path: Path | None, as_json: bool) -> None:
    """Show what this machine's daemon is doing, and why.

    \b
    Example:
      mpd status --json
    """
    from mpd.client import connect

    with connect(socket_path) as daemon:
        answer = daemon.status()
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        from mpd.show import show_status

        show_status(answer)


@cli.command()
@click.option("--run", "run", default="", help="Only the rounds of this run.")
@click.option("--last", type=click.IntRange(min=1), default=20, show_default=True, help="How many, the newest last.")
@JSON
@SOCKET
def rounds(run: str, last: int, as_json: bool, socket_path: Path | None) -> None:
    """Show the last rounds: who took part, how long it took, and what went wrong.

    \b
    Example:
      mpd rounds --run my-run --last 5
    """
    from mpd.client import connect

    with connect(socket_path) as daemon:
        answer = daemon.rounds(run or None, last)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        from mpd.show import show_rounds

        show_rounds(answer)


@cli.command()
@JSON
@SOCKET
def peers(as_json: bool, socket_path: Path | None) -> None:
    """Show the peers that this machine's daemon is linked to.

    \b
    Example:
      mpd peers
    """
    from mpd.client import connect

    with connect(socket_path) as daemon:
        answer = daemon.peers()
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        from mpd.show import show_peers

        show_peers(answer)


@cli.command()
@SOCKET
def leave(socket_path: Path | None) -> None:
    """Let the daemon finish its round, say goodbye to its peers, and exit.

    \b
    Example:
      mpd leave
    """
    from mpd.client import connect

    with connect(socket_path) as daemon:
        daemon.leave()
    click.echo("The daemon has left the swarm.")


def _greet(listen: Endpoint, announced: Endpoint, peer: PeerId) -> None:
    """Tell the person who started the daemon how the others find it."""
    if not announced.port:
        how = "is up and accepts no connections; others join through another peer"
    elif announced.is_loopback:
        how = f"is up; others on this machine join with: mpd join --bootstrap {announced}"
    else:
        how = f"is up; others join with: mpd join --bootstrap {announced}"
    try:
        click.echo(f"peer {show_peer(peer)} {how}")
    except OSError:  # a full disk, a reader that has gone: no reason for a daemon to end, nor to fail when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: BaseException) -> tuple[str, int]:
    """Return the sentence and the exit code that `error` becomes."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    match error:
        case DaemonUnavailable():
            return str(error), _NO_DAEMON
        case MpdError():
            return str(error), _FAILED
        case KeyboardInterrupt():
            return "interrupted", _FAILED
        case OSError():
            return f"the machine refused: {error}", _FAILED
        case _:
            return f"a bug in mpd: {error!r}; `mpd join --verbose` shows where", _FAILED


def main() -> None:
    """Entry point of the `mpd` command."""
    cli(prog_name="mpd")


if __name__ == "__main__":
    main()
