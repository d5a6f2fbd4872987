"""The options that several commands share, and where a daemon keeps its state unless told otherwise."""

import os
from pathlib import Path
from typing import Any

import click

from mpd.config import DEFAULT_PORT
from mpd.errors import LocalError
from mpd.ids import Endpoint, parse_endpoint


class _Address(click.ParamType[Endpoint]):
    """HOST:PORT, checked while the command line is read."""

    name = "HOST:PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Endpoint:
        if isinstance(value, Endpoint):
            return value
        try:
            return parse_endpoint(value, DEFAULT_PORT)
        except LocalError as error:
            self.fail(str(error), param, ctx)


ADDRESS = _Address()
SOCKET = click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    envvar="MPD_SOCKET",
    help="The daemon's local socket.  [default: mpd/mpd.sock under XDG_RUNTIME_DIR]",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, whose keys stay as they are.")
STATE_DIR = click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the key, the swarm and the known peers are kept.  [default: mpd under XDG_STATE_HOME]",
)


def default_state_dir() -> Path:
    """Return the state directory of whoever runs this."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "mpd"
