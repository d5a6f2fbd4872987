"""A swarm of DHT nodes without sockets and without waiting: one asyncio loop whose clock jumps to whatever comes next.

Strategy: the nodes are the real ones, from `start_node` upwards. Only the loop is ours: it carries datagrams itself,
each after a delay drawn from a seed, and whenever nothing is left to do it sets its clock to the next timer. So five
minutes of sixty nodes take as long as their cryptography, and the same seed gives the same run.
"""

import asyncio
import random
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from mpd.daemon.dht_gate import Address

DELAY_S = (0.01, 0.05)  # one way
EPOCH_MS = 1_800_000_000_000


class FakeSocket:
    """As much of a bound UDP socket as a node looks at."""

    family = socket.AF_INET

    def __init__(self, port: int) -> None:
        self._address = ("127.0.0.1", port)

    def getsockname(self) -> Address:
        return self._address


class _Transport:
    """Hands datagrams to the loop."""

    def __init__(self, loop: "VirtualLoop", address: Address) -> None:
        self._loop = loop
        self._address = address
        self._is_open = True

    def get_extra_info(self, name: str) -> Address:
        return self._address

    def sendto(self, datagram: bytes, address: Address) -> None:
        self._loop.deliver(datagram, self._address, address)

    def is_closing(self) -> bool:
        return not self._is_open

    def close(self) -> None:
        self._is_open = False


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop and a network. Addresses in `dead` neither send nor receive; `is_cut(a, b)`: a's to b are lost."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.dead: set[Address] = set()
        self.is_cut: Callable[[Address, Address], bool] = lambda sender, receiver: False
        self._virtual_s = 0.0
        self._rng = random.Random(seed)
        self._protocols: dict[Address, Any] = {}

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

    async def create_datagram_endpoint(self, protocol_factory: Any, *args: Any, **kwargs: Any) -> Any:
        address = kwargs["sock"].getsockname()
        transport, protocol = _Transport(self, address), protocol_factory()
        protocol.connection_made(transport)
        self._protocols[address] = protocol
        return transport, protocol

    def deliver(self, datagram: bytes, sender: Address, receiver: Address) -> None:
        """Let `receiver` hear the datagram in a moment, if both live and nothing is between them."""
        if not self.dead & {sender, receiver} and not self.is_cut(sender, receiver):
            self.call_later(self._rng.uniform(*DELAY_S), self._hand_over, datagram, sender, receiver)

    def _hand_over(self, datagram: bytes, sender: Address, receiver: Address) -> None:
        protocol = self._protocols.get(receiver)
        if protocol is not None and receiver not in self.dead and not protocol.transport.is_closing():
            protocol.datagram_received(datagram, sender)


def run_virtual(test: Callable[[VirtualLoop], Coroutine[Any, Any, None]], seed: int = 1) -> None:
    """Run `test(loop)` to its end."""
    loop = VirtualLoop(seed)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(test(loop))
