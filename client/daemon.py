"""Where a training script starts: find the daemon of this machine, ask it things, open averagers.

Strategy: a `Daemon` keeps no connection. Every question opens one and every averager has its own, so nothing is lost
when the daemon is restarted, and a monitor that asks once a minute holds nothing in between.
"""

import json
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mpd import control
from mpd.errors import DaemonUnavailable, LocalError

from .averager import Averager, check_weight
from .connection import Connection
from .lifeline import Lifeline
from .tensors import register

EXAMINE_S = 20.0  # a daemon that examines itself asks others
LEAVE_S = 120.0  # a daemon that leaves finishes its round first


def connect(socket: str | os.PathLike[str] | None = None) -> "Daemon":
    """Return the daemon that listens at `socket`, by default the one of this machine and user.

    Raises DaemonUnavailable if none answers.
    """
    return Daemon(Path(socket) if socket else default_socket_path())


def default_socket_path() -> Path:
    """Return where this user's daemon listens: `MPD_SOCKET`, or `mpd/mpd.sock` under `XDG_RUNTIME_DIR`.

    Without either it is `mpd-UID/mpd.sock` under the temporary directory. Everybody may write there, so a folder of
    that name that is not ours alone raises LocalError.
    """
    if chosen := os.environ.get("MPD_SOCKET"):
        return Path(chosen)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "mpd" / "mpd.sock"
    folder = Path(tempfile.gettempdir()) / f"mpd-{os.geteuid()}"
    try:
        info = folder.lstat()
    except FileNotFoundError:
        return folder / "mpd.sock"
    if info.st_uid != os.geteuid() or not stat.S_ISDIR(info.st_mode) or stat.S_IMODE(info.st_mode) != 0o700:
        raise LocalError(
            f"{folder} must be a folder of yours with mode 700, and is not: "
            "remove it, or set MPD_SOCKET or XDG_RUNTIME_DIR"
        )
    return folder / "mpd.sock"


class Daemon:
    """The daemon at `path`. `peer` is its id in the swarm, `version` the mpd that it runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._averagers: list[Averager] = []
        connection = Connection(path)
        connection.close()
        self.peer = connection.peer
        self.version = connection.daemon_version

    def averager(
        self,
        run: str,
        tensors: Mapping[str, Any] | Iterable[Any],
        *,
        group_size: int = 16,
        rounds: int | str = 1,
        codec: str = "raw",
        aggregate: str = "mean",
        weight: float = 1.0,
        adopt: bool = False,
        check_finite: bool = True,
    ) -> Averager:
        """Take part in `run` with `tensors`, and return what averages them.

        All peers of a run choose the same `group_size`, `rounds`, `codec` and `aggregate`.

        Args:
            run: Its name; peers that name the same one meet.
            tensors: Torch tensors or numpy arrays of float16, bfloat16, float32 or float64: an iterable of them (like
                `model.parameters()`) or of pairs with their names (`model.named_parameters()`), or a mapping of names
                to them.
            group_size: How many peers should average at once, 2 to 48.
            rounds: Rounds per step: 1, or "exact" for the mean of the whole swarm.
            codec: How values travel: "raw" (as they are), "float16" or "zstd".
            aggregate: What becomes of the values of a group: "mean", or, where members may be bad, "clip" (centred
                clipping) or "trimmed" (coordinate-wise trimmed mean); see {ref}`robust-aggregation`. With
                `rounds="exact"` only "mean".
            weight: Of our values in the average, unless a step says otherwise: above 0, up to 1e8. With "clip" nobody
                counts for more than two members of median weight, with "trimmed" all members count alike.
            adopt: Move the parameters into the memory that is shared with the daemon (torch on the CPU), so that
                nothing is copied on the way in. Other views of their old memory lose touch with them, and processes
                forked later share them. They are moved once: after the connection was lost, they stay where they are
                and steps copy them.
            check_finite: Refuse to average NaN or infinity.

        Raises:
            LocalError: The tensors or terms cannot be averaged, or another peer serves the socket by now.
            DaemonUnavailable: The daemon is gone.
        """
        checked_weight, registered = check_weight(weight), register(tensors)
        request = control.Attach(run, tuple(each.spec for each in registered), group_size, rounds, codec, aggregate)
        lifeline = Lifeline(self.path, self.peer, request, registered, adopt)
        averager = Averager(lifeline, registered, checked_weight, check_finite)
        self._averagers.append(averager)
        return averager

    def status(self) -> dict[str, Any]:
        """Return what `mpd status --json` prints."""
        answer: dict[str, Any] = self._query(control.Query("status"))
        return answer

    def rounds(self, run: str | None = None, last: int = 20) -> list[dict[str, Any]]:
        """Return the `last` rounds, of `run` or of all runs, oldest first."""
        answer: list[dict[str, Any]] = self._query(control.Query("rounds", run or "", last))
        return answer

    def peers(self) -> list[dict[str, Any]]:
        """Return the peers that the daemon knows, with their links."""
        answer: list[dict[str, Any]] = self._query(control.Query("peers"))
        return answer

    def examine(self, bootstrap: Iterable[str] = ()) -> list[dict[str, Any]]:
        """Return what `mpd doctor` finds: a list of {check, verdict, says, advice}. Takes up to 10 s.

        The daemon looks at the addresses in `bootstrap` (HOST:PORT) too. Raises LocalError if it is being examined.
        """
        connection = Connection(self.path)
        try:
            answer = connection.request(control.Examine(tuple(bootstrap)), control.Answer, EXAMINE_S)
            findings: list[dict[str, Any]] = json.loads(answer.json)
            return findings
        finally:
            connection.close()

    def leave(self, timeout: float = LEAVE_S) -> None:
        """Let the daemon finish its round, say goodbye to its peers, and exit; return when it has gone.

        Raises DaemonUnavailable if it has not gone after `timeout` seconds.
        """
        connection = Connection(self.path)
        try:
            connection.request(control.Leave(), control.Leaving)
            if not connection.wait_closed(timeout):
                raise DaemonUnavailable(f"the daemon at {self.path} is leaving, but has not gone after {timeout:g} s")
        finally:
            connection.close()

    def close(self) -> None:
        """Close all averagers that were opened here. The daemon goes on."""
        while self._averagers:
            self._averagers.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _query(self, query: control.Query) -> Any:
        connection = Connection(self.path)
        try:
            return json.loads(connection.request(query, control.Answer).json)
        finally:
            connection.close()
