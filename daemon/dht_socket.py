"""The DHT's UDP socket on its loop: many datagrams per wake-up, and what a flood brings is not read at all.

asyncio's own datagram transport wakes the loop once per datagram and takes a buffer of 256 KiB for each, which is most
of what a worthless datagram costs here. This one reads until the socket is empty. Whom nobody listens to for a moment
the kernel drops meanwhile (`dht_filter.py`): reading even to throw away costs microseconds, twice a change of threads,
and the places in the receive buffer that answers to our own questions need. A flood that passes the filter is still a
wake-up every few microseconds, so wake-ups have a budget: few datagrams are answered at once, many wait a moment for
each other. Honest nodes hear a few hundred a second.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from .budgets import Budgets
from .dht_filter import Sieve, attach, count_dropped, detach
from .dht_gate import MAX_DATAGRAM_BYTES

PER_WAKE_UP = 128
PAUSE_S = 0.001
SIFT_S = 0.02  # the filter is exchanged so often at most: the kernel compiles it each time
RECEIVE_BUFFER_BYTES = 4 << 20  # asked for; the kernel gives what an administrator allows


def hand_on_all() -> Sieve | None:
    """Drop nothing."""
    return None


class DatagramSocket(asyncio.DatagramTransport):
    """Carries the datagrams of `protocol` over `sock` (bound, non-blocking), which it closes in the end.

    `unwanted` returns what need not be handed on now, the same object while that is unchanged; it is asked after each
    wake-up, and from then on as long as there is something. What the kernel drops is counted as refused by the budget
    `datagrams`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        protocol: asyncio.DatagramProtocol,
        budgets: Budgets,
        unwanted: Callable[[], Sieve | None] = hand_on_all,
    ) -> None:
        super().__init__({"sockname": sock.getsockname()})
        self._loop = loop
        self._sock = sock
        self._protocol = protocol
        self._budgets = budgets
        self._unwanted = unwanted
        self._told: Sieve | None = None  # what was unwanted when we asked last
        self._sieve: Sieve | None = None  # what the kernel drops now: that, less those whom we have asked since
        self._sifting: asyncio.TimerHandle | None = None  # until then the filter stays as it is
        self._n_dropped = count_dropped(sock)
        self._pause: asyncio.TimerHandle | None = None
        self._is_closing = False
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        protocol.connection_made(self)
        loop.add_reader(sock, self._read)

    def sendto(self, data: Any, addr: Any = None) -> None:
        """Send one datagram now. One that the kernel has no room for is lost, as any datagram may be."""
        if self._sieve is not None:
            self._spare(addr)
        try:
            self._sock.sendto(data, addr)
        except BlockingIOError:
            pass
        except OSError as error:
            self._protocol.error_received(error)

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._loop.remove_reader(self._sock)
            for timer in (self._pause, self._sifting):
                if timer is not None:
                    timer.cancel()
            self._sock.close()
            self._loop.call_soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        self.close()

    def _read(self) -> None:
        """Hand on what has come; then rest for a moment if this happens too often."""
        for _ in range(PER_WAKE_UP):
            try:
                datagram, address = self._sock.recvfrom(
                    MAX_DATAGRAM_BYTES + 1
                )  # longer ones are refused for their size
            except BlockingIOError:
                break
            except OSError as error:  # of something that we sent: nobody listens there
                self._protocol.error_received(error)
                continue
            self._protocol.datagram_received(datagram, address)
            if self._is_closing:
                return
        if self._sifting is None:
            self._sift()
        if not self._budgets.wake_ups.take(self._loop.time()):
            self._loop.remove_reader(self._sock)
            self._pause = self._loop.call_later(PAUSE_S, self._loop.add_reader, self._sock, self._read)

    def _sift(self) -> None:
        """Have the kernel drop what is unwanted now, and look again soon if there is anything."""
        self._sifting = None
        sieve = self._unwanted()
        if sieve is not self._told:
            self._told = sieve
            self._use(sieve)
        if sieve is not None:
            self._sifting = self._loop.call_later(SIFT_S, self._sift)

    def _use(self, sieve: Sieve | None) -> None:
        self._sieve = sieve if sieve is not None and attach(self._sock, sieve) else None
        if self._sieve is None:
            detach(self._sock)
        n_dropped = count_dropped(self._sock)
        self._budgets.datagrams.refused += (n_dropped - self._n_dropped) & 0xFFFFFFFF  # the kernel counts in 32 bits
        self._n_dropped = n_dropped

    def _spare(self, address: Any) -> None:
        """Listen to replies of the one to whom we are about to send something."""
        assert self._sieve is not None
        plain = (address[0].removeprefix("::ffff:"), address[1])
        if self._sieve.drops(plain, is_reply=True):
            self._use(Sieve(self._sieve.contacts, self._sieve.asked | {plain}, self._sieve.muted))
