"""The room that blocks: what a training process imports.

Importing it loads the standard library and mpd only: msgspec comes with the first connection, numpy and torch with the
first tensor of theirs. All calls block, none starts a thread or touches a signal.

    with connect() as daemon:
        averager = daemon.averager("my-run", model.parameters())
        outcome = averager.step(weight=len(batch))
"""

from mpd.errors import DaemonUnavailable, LocalError, MpdError

from .averager import Averager, Pending
from .daemon import Daemon, connect, default_socket_path
from .loading import LoadedState
from .outcome import Outcome

__all__ = [
    "connect",
    "default_socket_path",
    "Daemon",
    "Averager",
    "Pending",
    "Outcome",
    "LoadedState",
    "MpdError",
    "LocalError",
    "DaemonUnavailable",
]
