"""The DHT's UDP socket on its loop: many datagrams per wake-up, and a pause between wake-ups while it is flooded.

asyncio's own datagram transport wakes the loop once per datagram and takes a buffer of 256 KiB for each, which is most
of what a worthless datagram costs here. This one reads until the socket is empty. A flood is still a wake-up every few
microseconds, so wake-ups have a budget: few datagrams are answered at once, many wait a moment for each other, and
what the kernel cannot keep meanwhile it drops at no cost to anybody. Honest nodes hear a few hundred a second.
"""

import asyncio
import socket
from typing import Any

from .budgets import RateBudget
from .dht_gate import MAX_DATAGRAM_BYTES

PER_WAKE_UP = 128
PAUSE_S = 0.001
RECEIVE_BUFFER_BYTES = 4 << 20  # asked for; the kernel gives what an administrator allows


class DatagramSocket(asyncio.DatagramTransport):
    """Carries the datagrams of `protocol` over `sock` (bound, non-blocking), which it closes in the end."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        protocol: asyncio.DatagramProtocol,
        wake_ups: RateBudget,
    ) -> None:
        super().__init__({"sockname": sock.getsockname()})
        self._loop = loop
        self._sock = sock
        self._protocol = protocol
        self._wake_ups = wake_ups
        self._pause: asyncio.TimerHandle | None = None
        self._is_closing = False
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        protocol.connection_made(self)
        loop.add_reader(sock, self._read)

    def sendto(self, data: Any, addr: Any = None) -> None:
        """Send one datagram now. One that the kernel has no room for is lost, as any datagram may be."""
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
            if self._pause is not None:
                self._pause.cancel()
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
        if not self._wake_ups.take(self._loop.time()):
            self._loop.remove_reader(self._sock)
            self._pause = self._loop.call_later(PAUSE_S, self._loop.add_reader, self._sock, self._read)
