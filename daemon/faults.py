"""Accidents on demand: named points in every protocol state at which a test, or `mpd chaos`, lets something go wrong.

Strategy: whoever passes a point says so only while faults are armed, so a daemon in production pays for one look at a
module variable; nothing here is constructed, handed around or decided by anybody else, because what is armed concerns
the process, as its log does. Faults work on the process and its sockets as the kernel knows them (a RST is sent by
disconnecting the socket, a black hole is a packet filter that drops everything), so no service is aware of them.

A specification is `POINT:TURN:ACTION` or `POINT:TURN:ACTION:SECONDS`, several separated by commas: at the TURN-th time
that POINT is passed since it was armed, ACTION happens, once. `@FILE` reads the specification from a file whenever that
changes, so that one daemon serves many experiments.
"""

import contextlib
import ctypes
import logging
import os
import signal
import socket
import stat
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import trio

from mpd.errors import Fatal

POINTS = {
    "announce": "a record is about to be published in the DHT",
    "seek": "records are about to be looked up in the DHT",
    "handshake": "a connection to or from a peer is open, and nothing has been said on it",
    "propose": "a peer is about to ask a leader for a place, or a leader to grant one",
    "begin": "a leader is about to send BEGIN, or a member to act on it",
    "send": "a piece of the vector is about to be sent to its reducer",
    "receive": "a piece or a result has arrived, and nothing has followed from it",
    "reduce": "all pieces of a chunk are in, and its mean is about to be computed",
    "return": "a result is about to be sent",
    "repair": "a message of a repair (NEED, PREPARE, PROMISE, PLAN, WANT, ASK, FEW) is about to be sent",
    "commit": "DONE or COMMIT is about to be sent",
    "write-back": "the result is complete, and about to be published to the trainers",
}
ACTIONS = {
    "kill": "SIGKILL",
    "freeze": "SIGSTOP; somebody else has to send SIGCONT",
    "reset": "every connection with a peer is reset",
    "hole": "for SECONDS (3) nothing passes on any connection with a peer nor in the DHT, and nothing is closed",
    "delay": "the thread that passes the point does nothing for SECONDS (1)",
    "error": "an unexpected exception is raised at the point",
}
_DEFAULT_S = {"hole": 3.0, "delay": 1.0}

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_RETURN_0 = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # the classic BPF program "drop"
_DROP_ALL = struct.pack("HxxxxxxP" if struct.calcsize("P") == 8 else "HxxP", 1, ctypes.addressof(_RETURN_0))
_UNSPECIFIED = struct.pack("H14x", socket.AF_UNSPEC)

_log = logging.getLogger("mpd")


@dataclass(frozen=True, slots=True)
class Fault:
    """One accident that will happen."""

    point: str
    turn: int
    action: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.point}:{self.turn}:{self.action}" + f":{self.seconds:g}" * (self.action in _DEFAULT_S)


def parse(spec: str) -> tuple[Fault, ...]:
    """Return the faults that `spec` lists; none if it is empty. Raises Fatal with what is wrong with it."""
    return tuple(_parse_one(part.strip()) for part in spec.split(",") if part.strip())


def _parse_one(text: str) -> Fault:
    parts = text.split(":")
    if not 3 <= len(parts) <= 4:
        raise Fatal(f"the fault {text!r} is none: POINT:TURN:ACTION or POINT:TURN:ACTION:SECONDS expected")
    point, turn, action = parts[:3]
    if point not in POINTS:
        raise Fatal(f"the fault {text!r} names no point of the protocol: {', '.join(POINTS)} expected")
    if action not in ACTIONS:
        raise Fatal(f"the fault {text!r} names no action: {', '.join(ACTIONS)} expected")
    if not turn.isdecimal() or not 0 < int(turn) < 10**9:
        raise Fatal(f"the fault {text!r} has no turn: a number from 1 on expected")
    if len(parts) == 4 and action not in _DEFAULT_S:
        raise Fatal(f"the fault {text!r} has a duration: only {' and '.join(_DEFAULT_S)} have one")
    seconds = _DEFAULT_S.get(action, 0.0)
    if len(parts) == 4:
        with contextlib.suppress(ValueError):
            seconds = float(parts[3])
            if 0 < seconds <= 3600:
                return Fault(point, int(turn), action, seconds)
        raise Fatal(f"the fault {text!r} has no duration: a number of seconds up to 3600 expected")
    return Fault(point, int(turn), action, seconds)


class _Table:
    """What is armed, and how often each point was passed since."""

    def __init__(self, spec: str) -> None:
        self._file = Path(spec[1:]) if spec.startswith("@") else None
        self._seen: tuple[int, int] | None = None  # inode and time of the file when it was read
        self._lock = threading.Lock()  # the DHT has a thread of its own
        self._passed: Counter[str] = Counter()
        self._faults: list[Fault] = []
        if self._file is None:
            self._faults = list(parse(spec))
        else:
            self._look_again(self._file)

    def pass_point(self, point: str) -> Fault | None:
        """Count that `point` is passed; return the fault whose turn has come."""
        with self._lock:
            if self._file is not None:
                self._look_again(self._file)
            self._passed[point] += 1
            for fault in self._faults:
                if (fault.point, fault.turn) == (point, self._passed[point]):
                    self._faults.remove(fault)
                    return fault
        return None

    def describe(self) -> str:
        with self._lock:
            return ", ".join(map(str, self._faults)) or "none left"

    def _look_again(self, file: Path) -> None:
        try:
            info = file.stat()
            if self._seen != (info.st_ino, info.st_mtime_ns):
                self._faults, self._passed = list(parse(file.read_text(encoding="utf-8"))), Counter()
                self._seen = info.st_ino, info.st_mtime_ns
        except (OSError, UnicodeDecodeError) as error:
            raise Fatal(f"the faults to arm cannot be read from {file}: {error}") from error


armed = False
"""Whether anything may strike: look here before calling `strike`, `outlast` or `is_cut_off`."""

_table = _Table("")
_cut_off_until = 0.0


def arm(spec: str) -> None:
    """Arm what `spec` says, or nothing if it is empty; what was armed before is forgotten. Raises Fatal."""
    global armed, _table
    _table, armed = _Table(spec), bool(spec)
    if armed:
        _log.warning("FAULTS ARE ARMED (%s): this daemon will fail on purpose", _table.describe())


def status() -> str:
    """Return what is armed in one sentence; empty if nothing is."""
    return f"faults are armed, this daemon fails on purpose: {_table.describe()}" if armed else ""


def strike(point: str) -> None:
    """Pass `point`; if that is when something is to go wrong, let it. `error` raises RuntimeError."""
    fault = _table.pass_point(point)
    if fault is None:
        return
    _log.warning("fault: %s", fault)
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "reset":
            _reset_all()
        case "hole":
            _cut_off(fault.seconds)
        case "delay":
            time.sleep(fault.seconds)
        case "error":
            raise RuntimeError(f"an error on purpose, at {point}")


# ------------------------------------------------------------------------------------------------------ the black hole


def is_cut_off() -> bool:
    """Return whether this daemon is in a black hole: what it would send now is lost."""
    return time.monotonic() < _cut_off_until


async def outlast() -> None:
    """Wait, before anything is sent on a connection, until nothing swallows it."""
    if is_cut_off():
        await trio.sleep(_cut_off_until - time.monotonic())


def _cut_off(seconds: float) -> None:
    """Have the kernel drop what comes in, for all sockets of peers that are open now; nobody opens one meanwhile.

    What goes out is for those who send: they ask `outlast` or `is_cut_off`.
    """
    global _cut_off_until
    _cut_off_until = time.monotonic() + seconds
    filtered = _peer_sockets()
    for sock in filtered:
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _DROP_ALL)

    def let_pass() -> None:
        for sock in filtered:
            with sock, contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, struct.pack("i", 0))

    timer = threading.Timer(seconds, let_pass)
    timer.daemon = True
    timer.start()


# ------------------------------------------------------------------------------------------------------------- the RST


def _reset_all() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for sock in _peer_sockets():
        with sock:
            if sock.type == socket.SOCK_STREAM and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                libc.connect(sock.fileno(), _UNSPECIFIED, len(_UNSPECIFIED))  # tcp_disconnect: a RST, ECONNRESET here


def _peer_sockets() -> list[socket.socket]:
    """Return a second descriptor of every internet socket of this process. Whoever closes it closes nothing else.

    Not by `socket.dup`, which would make the connection itself blocking.
    """
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            if stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                sock = socket.socket(fileno=os.dup(int(name)))
                if sock.family in (socket.AF_INET, socket.AF_INET6):
                    found.append(sock)
                else:
                    sock.close()
    return found
