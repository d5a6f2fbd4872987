"""One blocking conversation with the daemon over its Unix socket.

Strategy: every wait has an end, and a daemon that has gone is one error, `DaemonUnavailable`, however the kernel puts
it. Bytes and descriptors are collected as they come: a frame may arrive in pieces, and a poll that finds half a frame
keeps it for later.
"""

import array
import contextlib
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

from mpd import control
from mpd.errors import DaemonUnavailable, LocalError

ANSWER_S = 10.0  # for whatever the daemon can answer at once
_READ_BYTES = 1 << 16
_MAX_DESCRIPTORS = 4
_ANCILLARY_BYTES = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)

Reply = TypeVar("Reply")


class Connection:
    """A greeted connection to the daemon at `path`; `peer` and `daemon_version` are what it said of itself.

    Raises DaemonUnavailable if nobody answers within `greeting_s`, LocalError if the daemon refuses.
    """

    def __init__(self, path: Path, greeting_s: float = ANSWER_S) -> None:
        self._path = path
        self._buffer = bytearray()
        self._descriptors: list[int] = []
        self._pid = os.getpid()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(greeting_s)
            label = f"{os.path.basename(sys.argv[0]) or 'python'} (pid {self._pid})"
            welcome = self.request(control.Hello(control.CONTROL_VERSION, label), control.Welcome, greeting_s)
        except BaseException:
            self.close()
            raise
        self.peer = welcome.peer
        self.daemon_version = welcome.daemon_version

    def request(self, message: object, expected: type[Reply], timeout_s: float = ANSWER_S) -> Reply:
        """Send `message` and return the answer of type `expected`.

        Raises LocalError if it is refused, DaemonUnavailable if the daemon is gone or does not answer in time.
        """
        self.send(message)
        answer = self.receive(timeout_s)
        if answer is None:
            self.close()
            raise DaemonUnavailable(
                f"the daemon at {self._path} has not answered for {timeout_s:.3g} s: it hangs or is overloaded; "
                "see its log"
            )
        if isinstance(answer, control.Refused):
            raise LocalError(answer.message)
        if not isinstance(answer, expected):
            self.close()
            raise LocalError(
                f"the daemon answered with a {type(answer).__name__}, a {expected.__name__} was expected: "
                "install the same mpd for daemon and trainer"
            )
        return answer

    def send(self, message: object) -> None:
        """Send one message. Raises DaemonUnavailable."""
        frame = control.pack(message)
        try:
            self._sock.settimeout(ANSWER_S)
            self._sock.sendall(frame)
        except OSError as error:
            raise self._gone() from error

    def receive(self, timeout_s: float) -> Any | None:
        """Return the next message, or None if it is not there within `timeout_s`. Raises DaemonUnavailable."""
        deadline = time.monotonic() + timeout_s
        while (message := self._next_message()) is None:
            try:
                self._sock.settimeout(max(0.0, deadline - time.monotonic()))
                data, ancillary, _, _ = self._sock.recvmsg(_READ_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, TimeoutError):
                return None
            except OSError as error:
                raise self._gone() from error
            for level, kind, raw in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self._descriptors += array.array("i", raw[: len(raw) - len(raw) % 4])
            if not data:
                raise self._gone()
            self._buffer += data
        return message

    def take_descriptor(self) -> int:
        """Return the next descriptor that came, in the order of the messages; the caller closes it."""
        if not self._descriptors:
            raise LocalError("the daemon sent no shared memory: install the same mpd for daemon and trainer")
        return self._descriptors.pop(0)

    @property
    def is_open(self) -> bool:
        """True unless one of the two ends has closed, or something came that nobody asked for."""
        try:
            self._sock.settimeout(0)
            self._sock.recv(1, socket.MSG_PEEK)
        except OSError as error:
            return isinstance(error, BlockingIOError)
        return False

    def wait_closed(self, timeout_s: float) -> bool:
        """Wait until the daemon closes the connection; return False if it has not after `timeout_s`."""
        try:
            return self.receive(timeout_s) is not None
        except DaemonUnavailable:
            return True

    def close(self) -> None:
        """End the conversation. A forked child only lets go of its copy."""
        if self._pid == os.getpid():
            # Children that were forked hold copies of the socket; without this the daemon would wait for them.
            with contextlib.suppress(OSError):  # not connected, or the other side was faster
                self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _connect(self, patience_s: float) -> None:
        try:
            # With a timeout of its own Python would not wait for room in a crowded queue; the kernel does.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(patience_s))
            self._sock.connect(str(self._path))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise DaemonUnavailable(f"no daemon answers at {self._path}: start one with `mpd join`") from error
        except OSError as error:
            raise DaemonUnavailable(
                f"no daemon can be reached at {self._path} ({error}): start one with `mpd join`, "
                "or name its socket with MPD_SOCKET"
            ) from error

    def _next_message(self) -> Any | None:
        prefix = control.PREFIX_BYTES
        if len(self._buffer) < prefix:
            return None
        end = prefix + control.body_length(bytes(self._buffer[:prefix]))
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[prefix:end])
        del self._buffer[:end]
        return control.LOCAL.decode(body)

    def _gone(self) -> DaemonUnavailable:
        self.close()
        return DaemonUnavailable(f"the daemon at {self._path} went away: start it with `mpd join`")


def _timeval(seconds: float) -> bytes:
    whole, micros = divmod(max(1, int(seconds * 1e6)), 1_000_000)  # 0 would be for ever
    return struct.pack("ll", whole, micros)
