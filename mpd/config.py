"""Every number that someone may want to change, in small frozen groups with units.

Only `cli.py` reads flags and the environment; everything below it gets the group that concerns it. What is measured at
run time (goodput, arrival times) is not configuration and does not live here.
"""

from dataclasses import dataclass, field
from pathlib import Path

from mpd.ids import Endpoint

DEFAULT_PORT = 4747


@dataclass(frozen=True, slots=True)
class NetConfig:
    """Where this daemon listens and what it tells others.

    `announce` is the address that others are told; None means: derive it from the listening socket. An `outbound_only`
    daemon accepts no connection, so it dials everyone and reduces nothing. With `plain_data`, tensors travel in the
    clear between daemons that all say so; it exists to measure what sealing costs, and only where nobody can listen.
    """

    listen: Endpoint = field(default_factory=lambda: Endpoint("0.0.0.0", DEFAULT_PORT))
    announce: Endpoint | None = None
    bootstrap: tuple[Endpoint, ...] = ()
    outbound_only: bool = False
    plain_data: bool = False

    def __post_init__(self) -> None:
        if self.plain_data and not self.listen.is_loopback:
            raise ValueError(f"tensors may travel in the clear on a loopback address only, not on {self.listen}")


@dataclass(frozen=True, slots=True)
class RoundLimits:
    """Durations that bound a step until measurements replace them; all on the monotonic clock.

    `window_s`: how long a leader waits for announced peers. `progress_s`: how long a peer may deliver nothing while
    others wait for it. `step_s`: the longest a step takes unless its trainer says otherwise. `roster_quiet_s`: how long
    the roster of a new run must stay unchanged before its shape is fixed.
    """

    window_s: float = 5.0
    progress_s: float = 2.0
    step_s: float = 60.0
    roster_quiet_s: float = 1.0
    record_ttl_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("window_s", "progress_s", "step_s", "roster_quiet_s", "record_ttl_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number of seconds")


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """Everything `mpd join` decides, read once.

    `invite` is the token to become a member with, or empty; `faults` is what is to go wrong on purpose. With
    `keep_state`, the last committed vector of each run is kept in the state directory.
    """

    socket: Path
    state_dir: Path
    net: NetConfig = field(default_factory=NetConfig)
    limits: RoundLimits = field(default_factory=RoundLimits)
    faults: str = ""  # see mpd.daemon.faults; for tests
    invite: str = field(default="", repr=False)  # a token lets its bearer in: it appears in no log
    keep_state: bool = False
