"""What the DHT tests share: swarms of real nodes on the loopback interface, and waiting for what they do.

These tests talk to real sockets in another thread, which no mock clock reaches, so `eventually` looks again every few
milliseconds and gives up after seconds.
"""

import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from mpd.daemon.dht import Dht, DhtConfig, open_dht
from mpd.ids import Endpoint, PeerId

PATIENCE_S = 30.0
LOOK_AGAIN_S = 0.01


def udp_socket(port: int = 0) -> socket.socket:
    """Return a non-blocking UDP socket, bound on the loopback interface."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind(("127.0.0.1", port))
    return sock


def endpoint_of(sock: socket.socket) -> Endpoint:
    return Endpoint(*sock.getsockname()[:2])


def peer(number: int) -> PeerId:
    """Return the id of peer `number`: spread over the id space, the same in every run."""
    return PeerId(random.Random(number).randbytes(20))


def config(number: int, sock: socket.socket, *bootstrap: Endpoint) -> DhtConfig:
    return DhtConfig(peer(number), sock, bootstrap, rng=random.Random(number))


@asynccontextmanager
async def open_swarm(n: int) -> AsyncIterator[list[Dht]]:
    """Run nodes `peer(0)` .. `peer(n - 1)`, bootstrapped by the first and started at once; nobody waits for them."""
    socks = [udp_socket() for _ in range(n)]
    first = endpoint_of(socks[0])
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_dht(config(i, sock, first))) for i, sock in enumerate(socks)]


async def eventually(holds: Callable[[], bool]) -> None:
    """Return as soon as `holds()` is true."""

    async def holds_now() -> bool:
        return holds()

    await eventually_async(holds_now)


async def eventually_async(holds: Callable[[], Awaitable[bool]]) -> None:
    """Return as soon as `await holds()` is true."""
    with trio.fail_after(PATIENCE_S):
        while not await holds():  # noqa: ASYNC110  # nobody sets an event when a stranger's state changes
            await trio.sleep_until(trio.current_time() + LOOK_AGAIN_S)


async def everyone_knows_everyone(swarm: list[Dht]) -> None:
    await eventually(lambda: all(dht.snapshot().peers == len(swarm) - 1 for dht in swarm))
