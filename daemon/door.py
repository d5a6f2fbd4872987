"""The door of a daemon: who may stand there, for how long, and where each one goes.

A connection has a few seconds to show what it is, and there are only so many places for those that have not yet, in
total and for one address. Whoever has not said a byte gives up its place to a newcomer, so that idle sockets keep
nobody out. The first byte is looked at and left where it is; whoever begins with anything unknown is closed without an
answer, before anything was allocated or computed for it.
"""

import contextlib
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import trio

from mpd.errors import PeerError
from mpd.ids import Endpoint
from mpd.wire import DATA_MAGIC, GREETING_BYTES

from .budgets import Budgets
from .channels import DataDoor, Stages
from .handshake import ADMISSION_GREETING, HANDSHAKE_S, receive_exactly
from .links import Link

_TLS_MAGIC = b"\x16"  # the first byte of every TLS connection

AnswerCall = Callable[[trio.SocketStream], Awaitable[Link | None]]


@dataclass(eq=False)
class _Visitor:
    """A connection that has not shown what it is. `payer` is the address whose budget it uses, None: nobody's."""

    payer: str | None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    has_spoken: bool = False


class Door:
    """Where all connections to this daemon arrive; `answer_call` serves those that begin with TLS."""

    def __init__(self, budgets: Budgets, answer_call: AnswerCall) -> None:
        self.data = DataDoor(Stages(budgets.in_flight))
        self.admission: Callable[[trio.SocketStream], Awaitable[None]] | None = None  # serves those who want to join
        self.is_exempt: Callable[[str], bool] = is_loopback  # addresses without a limit of their own
        self._budgets = budgets
        self._answer_call = answer_call
        self._visitors: dict[_Visitor, None] = {}  # those that came first stand first

    async def receive(self, stream: trio.SocketStream) -> Link | None:
        """Serve an incoming connection, which the caller closes, unless this returns the link that was made of it."""
        with (
            contextlib.suppress(PeerError, OSError, trio.BrokenResourceError),
            self._place(stream.socket.getpeername()[0]) as visitor,
        ):
            if visitor is None:
                return None
            first = await stream.socket.recv(1, socket.MSG_PEEK)
            visitor.has_spoken = True
            if first == _TLS_MAGIC:
                return await self._answer_call(stream)
            if first == DATA_MAGIC[:1]:
                await self._serve_greeting(stream)
        return None

    async def _serve_greeting(self, stream: trio.SocketStream) -> None:
        greeting = await receive_exactly(stream, GREETING_BYTES)
        if greeting.startswith(DATA_MAGIC):
            await self.data.serve(stream, greeting)
        elif greeting == ADMISSION_GREETING and self.admission is not None:
            await self.admission(stream)

    @contextlib.contextmanager
    def _place(self, host: str) -> Iterator[_Visitor | None]:
        """Hold a place for a connection from `host`, None if there is none; the block is cancelled when time is up."""
        visitor = _Visitor(None if self.is_exempt(host) else _subscriber(host))
        if not self._enter(visitor):
            yield None
            return
        visitor.scope.deadline = trio.current_time() + HANDSHAKE_S
        try:
            with visitor.scope:
                yield visitor
        finally:
            self._leave(visitor)

    def _enter(self, visitor: _Visitor) -> bool:
        budgets = self._budgets
        if not budgets.descriptors.has_room():  # first: to count them may fail, and then nothing was taken
            return False
        if visitor.payer is not None and not budgets.handshakes_per_address.take(visitor.payer):
            return False
        if budgets.handshakes.take() or self._replace_silent():
            self._visitors[visitor] = None
            return True
        if visitor.payer is not None:
            budgets.handshakes_per_address.give(visitor.payer)
        return False

    def _replace_silent(self) -> bool:
        """Send away whoever has been silent for the longest time, and take its place."""
        silent = next((visitor for visitor in self._visitors if not visitor.has_spoken), None)
        if silent is None:
            return False
        silent.scope.cancel()
        self._leave(silent)
        return self._budgets.handshakes.take()

    def _leave(self, visitor: _Visitor) -> None:
        if visitor in self._visitors:
            del self._visitors[visitor]
            self._budgets.handshakes.give()
            if visitor.payer is not None:
                self._budgets.handshakes_per_address.give(visitor.payer)


def is_loopback(host: str) -> bool:
    """Return True if `host`, a numeric address, is this machine's own."""
    return Endpoint(_subscriber(host), 0).is_loopback


def _subscriber(host: str) -> str:
    """Return what stands for one customer of a provider: an IPv4 address, or the first 64 bits of an IPv6 one."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return host if address.is_loopback else str(ipaddress.ip_address(int(address) >> 64 << 64))
