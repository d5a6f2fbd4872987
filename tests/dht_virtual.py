"""A swarm of DHT nodes without sockets and without waiting: one asyncio loop whose clock jumps to whatever comes next.

Strategy: the nodes are the real ones, from `start_node` upwards. Only the loop is ours: it carries datagrams itself,
each after a delay drawn from a seed, and whenever nothing is left to do it sets its clock to the next timer. So five
minutes of sixty nodes take as long as their cryptography, and the same seed gives the same run.
"""

import asyncio
import random
import socket
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from mpd.daemon.dht_gate import Address

DELAY_S = (0.01, 0.05)  # one way
EPOCH_MS = 1_800_000_000_000


class FakeSocket:
    """As much of a bound UDP socket as a node uses. What comes for it lies in `received`."""

    family = socket.AF_INET

    def __init__(self, loop: "VirtualLoop", port: int) -> None:
        self.received: deque[tuple[bytes, Address]] = deque()
        self._loop = loop
        self._address = ("127.0.0.1", port)
        loop.sockets[self._address] = self

    def getsockname(self) -> Address:
        return self._address

    def setsockopt(self, *args: int) -> None:
        """There is no kernel to ask for anything."""

    def getsockopt(self, *args: int) -> bytes:
        return b""

    def sendto(self, datagram: bytes, address: Address) -> None:
        self._loop.deliver(datagram, self._address, address)

    def recvfrom(self, n_bytes: int) -> tuple[bytes, Address]:
        if not self.received:
            raise BlockingIOError
        return self.received.popleft()

    def close(self) -> None:
        self._loop.sockets.pop(self._address, None)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop and a network. Addresses in `dead` neither send nor receive; `is_cut(a, b)`: a's to b are lost."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.dead: set[Address] = set()
        self.is_cut: Callable[[Address, Address], bool] = lambda sender, receiver: False
        self._virtual_s = 0.0
        self._rng = random.Random(seed)
        self.sockets: dict[Address, FakeSocket] = {}
        self._readers: dict[FakeSocket, Callable[[], None]] = {}

    def time(self) -> float:
        return self._virtual_s

    def wall_ms(self) -> int:
        """Return milliseconds since 1970, as far as the nodes are told."""
        return EPOCH_MS + int(self._virtual_s * 1000)

    async def pass_time(self, seconds: float) -> None:
        """Let this much time pass for the nodes."""
        over = self.create_future()
        self.call_later(seconds, over.set_result, None)
        await over

    def _run_once(self) -> None:
        timers: Any = self._scheduled  # type: ignore[attr-defined]
        if not self._ready and timers:  # type: ignore[attr-defined]
            self._virtual_s = max(self._virtual_s, timers[0].when())
        super()._run_once()  # type: ignore[misc]

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
        self._readers[fd] = callback
        if fd.received:
            self.call_soon(self._read, fd)

    def remove_reader(self, fd: Any) -> bool:
        return self._readers.pop(fd, None) is not None

    def deliver(self, datagram: bytes, sender: Address, receiver: Address) -> None:
        """Let `receiver` hear the datagram in a moment, if both live and nothing is between them."""
        if not self.dead & {sender, receiver} and not self.is_cut(sender, receiver):
            self.call_later(self._rng.uniform(*DELAY_S), self._hand_over, datagram, sender, receiver)

    def _hand_over(self, datagram: bytes, sender: Address, receiver: Address) -> None:
        sock = self.sockets.get(receiver)
        if sock is not None and receiver not in self.dead:
            sock.received.append((datagram, sender))
            self._read(sock)

    def _read(self, sock: FakeSocket) -> None:
        reader = self._readers.get(sock)
        if reader is not None:
            reader()


def run_virtual(
    test: Callable[[VirtualLoop], Coroutine[Any, Any, None]],
    seed: int = 1,
    make_loop: Callable[[int], VirtualLoop] = VirtualLoop,
) -> None:
    """Run `test(loop)` to its end, on the loop that `make_loop` returns for `seed`."""
    loop = make_loop(seed)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(test(loop))
