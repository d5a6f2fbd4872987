"""How fast the kernel sends on a connection between peers: its congestion control, chosen by what the link is like.

In a round every member sends to every other at once, and all is well when these streams share the links evenly, because
a chunk is complete when the last piece of it has come. cubic and reno share evenly. bbr does not: it paces even the
loopback, and where several of its streams meet in a short queue some fall back to a crawl for seconds
(docs/performance.md has the figures). On the other hand cubic takes every loss for a full queue, and crawls where
packets are simply lost. So a stream begins with cubic, whatever the machine's default is, goes over to bbr when it
turns out to lose more than cubic itself would, and tries cubic again some time later. Both may be chosen for each
socket, at any time, if the machine has them; else its own choice stands. A local link is always reno's: what is lost
there is time.
"""

import math
import socket
import struct
from typing import Any

ON_ONE_HOST = b"reno"
EVEN = b"cubic"
FOR_LOSSY_LINKS = b"bbr"
LOOK_BYTES = 4 << 20  # sent between two looks at what was lost
MIN_SEGMENTS = 200  # fewer tell nothing
MAX_LOSS = 0.01  # cubic at a full queue loses less than this, also while it starts
LOSSY_LOOKS = 2  # one after the other; a single one may have been other traffic
TRIAL_LOOKS = 32  # then cubic is tried again: links change

# struct tcp_info of linux/tcp.h, as of Linux 4.19: tcpi_total_retrans and tcpi_segs_out.
_TOTAL_RETRANS = struct.Struct("=100xI")
_SEGS_OUT = struct.Struct("=136xI")
_INFO_BYTES = 140


def choose(sock: Any) -> None:
    """Set the congestion control for the beginning of a connection; a machine that has not got it keeps its own."""
    _set(sock, ON_ONE_HOST if _is_local(sock) else EVEN)


class Congestion:
    """Watches what a connection loses, and changes its congestion control if that is called for."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._look_at = math.inf if _is_local(sock) else LOOK_BYTES
        self._segments = self._lost = 0
        self._n_lossy = 0
        self._trial = 0  # looks until cubic is tried again

    def note_sent(self, bytes_sent: int) -> None:
        """So many bytes have been sent on the connection so far."""
        if bytes_sent >= self._look_at:
            self._look_at = bytes_sent + LOOK_BYTES
            self._look()

    def _look(self) -> None:
        info = _tcp_info(self._sock)
        if len(info) < _INFO_BYTES:
            return
        (segments,), (lost,) = _SEGS_OUT.unpack_from(info), _TOTAL_RETRANS.unpack_from(info)
        n_segments, n_lost = segments - self._segments, lost - self._lost
        if n_segments < MIN_SEGMENTS:
            return
        self._segments, self._lost = segments, lost
        if self._trial:
            self._trial -= 1
            if not self._trial:
                _set(self._sock, EVEN)
            return
        self._n_lossy = self._n_lossy + 1 if n_lost > MAX_LOSS * n_segments else 0
        if self._n_lossy == LOSSY_LOOKS:
            self._n_lossy, self._trial = 0, TRIAL_LOOKS
            _set(self._sock, FOR_LOSSY_LINKS)


def _is_local(sock: Any) -> bool:
    try:
        return bool(sock.getpeername()[0] == sock.getsockname()[0])
    except OSError:  # it has just been reset
        return True


def _tcp_info(sock: Any) -> bytes:
    """Return what the kernel says about the connection; nothing if it does not."""
    try:
        return bytes(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
    except OSError:
        return b""


def _set(sock: Any, name: bytes) -> None:
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
    except OSError:
        return  # not on this machine, or not for everybody
