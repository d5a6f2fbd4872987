"""The rendezvous over UDP: a Kademlia node in a thread of its own, seen from trio.

    async with open_dht(DhtConfig(trust, sock, bootstrap)) as dht:
        await dht.announce(key, value, ttl_s=60)

It starts at once, whoever is reachable, and keeps looking for the swarm for as long as it is open; until it has found
one it serves its own records. `dht_node.py` has the node, `dht_gate.py` the gate that datagrams have to pass.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from mpd.errors import LocalError

from .dht_node import DhtConfig, DhtNode, start_node
from .dht_thread import LoopThread, open_loop_thread
from .rendezvous import Record, RendezvousStatus, check_announcement, check_key

__all__ = ["Dht", "DhtConfig", "open_dht"]


class Dht:
    """A `Rendezvous`. Made by `open_dht`, usable from any trio task until that block ends."""

    def __init__(self, thread: LoopThread, node: DhtNode) -> None:
        self._thread = thread
        self._node = node
        self._is_open = True

    async def announce(self, key: bytes, value: bytes, ttl_s: float) -> None:
        life_s = check_announcement(key, value, ttl_s)
        await self._opened().call(self._node.announce, bytes(key), bytes(value), life_s)

    async def withdraw(self, key: bytes) -> None:
        check_key(key)
        await self._opened().call(self._node.withdraw, bytes(key))

    async def seek(self, key: bytes) -> tuple[Record, ...]:
        check_key(key)
        return await self._opened().call(self._node.seek, bytes(key))

    def snapshot(self) -> RendezvousStatus:
        return replace(self._node.status, calls=len(self._node.protocol.calls.waiting))

    def refused(self) -> dict[str, int]:
        """Return how many datagrams were dropped so far, by reason, and under `own error` how often we failed."""
        return dict(self._node.refused)

    async def _close(self) -> None:
        self._is_open = False
        with trio.CancelScope(shield=True):  # bounded by the node itself
            await self._thread.call(self._node.close)

    def _opened(self) -> LoopThread:
        if not self._is_open:
            raise LocalError("this rendezvous is closed")
        return self._thread


@asynccontextmanager
async def open_dht(config: DhtConfig) -> AsyncIterator[Dht]:
    """Run a node on `config.sock` until the block ends; then its records are withdrawn and the socket is closed."""
    logging.getLogger("kademlia").setLevel(logging.WARNING)  # it logs a line per lookup
    async with open_loop_thread("mpd-dht") as thread:
        with trio.CancelScope(shield=True):  # opening waits for nobody
            dht = Dht(thread, await thread.call(start_node, config))
        try:
            yield dht
        finally:
            await dht._close()
