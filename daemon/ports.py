"""The one number that this daemon has for TCP and UDP, and the address that others are told.

A port is bound for both protocols or for none. What a wildcard listener announces is a guess, the local address of a
route, so it does not count as reachable until somebody has dialled it.
"""

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

import trio

from mpd.config import NetConfig
from mpd.errors import Fatal
from mpd.ids import Endpoint

from .state import StateDir

NOWHERE = Endpoint("127.0.0.1", 0)
_PORT_TRIES = 20  # a number that is free for TCP may be taken for UDP
_RESOLVE_S = 3.0  # how long the name of a bootstrap may hold up the start
# Addresses for documentation: nobody is there, and the route to them is the one to the rest of the world.
_ANYWHERE = (Endpoint("192.0.2.1", 9), Endpoint("2001:db8::1", 9))


@contextlib.contextmanager
def bound(wanted: Endpoint, state: StateDir) -> Iterator[tuple[socket.socket, socket.socket, Endpoint]]:
    """Bind one number for TCP and UDP, with port 0 the one of last time if it is free, for the length of the block.

    Yields the listening TCP socket, the UDP socket, both non-blocking, and where they are. Raises Fatal.
    """
    try:
        tcp, udp = _bind_first(wanted, [wanted.port] if wanted.port else [state.last_port(), *[0] * _PORT_TRIES])
    except OSError as error:
        advice = "stop what uses it, or choose" if error.errno == errno.EADDRINUSE else "choose"
        raise Fatal(
            f"cannot listen on {wanted}: {error.strerror}; "
            f"{advice} another address with --listen HOST:PORT (port 0: any free one)"
        ) from error
    with contextlib.closing(tcp), contextlib.closing(udp):
        listen = Endpoint(wanted.host, tcp.getsockname()[1])
        if wanted.port == 0:
            state.remember_port(listen.port)
        yield tcp, udp, listen


def why_not_free(wanted: Endpoint) -> tuple[str, str]:
    """Return why a daemon could not listen at `wanted` by TCP, and why not by UDP; nothing where it could."""
    troubles = []
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            family, _, _, _, address = socket.getaddrinfo(wanted.host, wanted.port, type=kind)[0]
            with socket.socket(family, kind) as sock:
                if kind == socket.SOCK_STREAM:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(address)
                if kind == socket.SOCK_STREAM:
                    sock.listen(1)  # of two that may reuse an address only one may listen there
            troubles.append("")
        except OSError as error:
            troubles.append(error.strerror or str(error))
    return troubles[0], troubles[1]


async def own_address(net: NetConfig, listen: Endpoint) -> tuple[Endpoint, bool]:
    """Return where others are told to dial us (port 0: nowhere), and whether we may take that for granted."""
    if net.outbound_only:
        return NOWHERE, False
    if net.announce is not None:
        return Endpoint(net.announce.host, net.announce.port or listen.port), True
    if not listen.is_wildcard:
        return listen, True
    for target in (*net.bootstrap, *_ANYWHERE):
        host = await _route_to(target, listen)
        if host is not None:
            return Endpoint(host, listen.port), False
    return Endpoint("127.0.0.1", listen.port), False


def _bind_first(wanted: Endpoint, ports: list[int]) -> tuple[socket.socket, socket.socket]:
    """Bind the first of `ports` that is free for both protocols. Raises the OSError of the last one if none is."""
    family, _, _, _, address = socket.getaddrinfo(wanted.host, 0, type=socket.SOCK_STREAM)[0]
    for port in ports[:-1]:
        with contextlib.suppress(OSError):
            return _bind(family, (address[0], port, *address[2:]))
    return _bind(family, (address[0], ports[-1], *address[2:]))


def _bind(family: int, address: tuple[Any, ...]) -> tuple[socket.socket, socket.socket]:
    with contextlib.ExitStack() as undo:
        tcp = undo.enter_context(contextlib.closing(socket.socket(family, socket.SOCK_STREAM)))
        udp = undo.enter_context(contextlib.closing(socket.socket(family, socket.SOCK_DGRAM)))
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tcp.bind(address)
        tcp.listen(128)
        udp.bind(tcp.getsockname())
        tcp.setblocking(False)
        udp.setblocking(False)
        undo.pop_all()
    return tcp, udp


async def _route_to(target: Endpoint, listen: Endpoint) -> str | None:
    """Return the local address from which packets to `target` would leave and which `listen` covers, or None."""
    family = socket.AF_UNSPEC if ":" in listen.host else socket.AF_INET
    with trio.move_on_after(_RESOLVE_S), contextlib.suppress(OSError):
        found = await trio.socket.getaddrinfo(target.host, target.port, family, socket.SOCK_DGRAM)
        # Connecting a datagram socket sends nothing; it only asks the kernel.
        with socket.socket(found[0][0], socket.SOCK_DGRAM) as probe:
            probe.connect(found[0][4])
            return str(probe.getsockname()[0])
    return None
