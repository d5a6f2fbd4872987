"""One number for TCP and UDP: bound for both or for none, remembered, and announced as somebody could dial it."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from mpd.config import NetConfig
from mpd.daemon.ports import bound, own_address
from mpd.daemon.state import StateDir
from mpd.errors import Fatal
from mpd.ids import Endpoint

ANY = Endpoint("127.0.0.1", 0)
WILDCARD = Endpoint("0.0.0.0", 4747)
V6_WILDCARD = Endpoint("::", 4747)


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return StateDir(tmp_path)


@contextlib.contextmanager
def taken(kind: socket.SocketKind) -> Iterator[int]:
    """Yield a port that somebody has for one of the two protocols."""
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        yield sock.getsockname()[1]


def is_free(port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True


# --------------------------------------------------------------------------------------------------------------- bound


def test_both_protocols_have_one_number(state: StateDir) -> None:
    with bound(ANY, state) as (tcp, udp, listen):
        assert tcp.getsockname() == udp.getsockname() == ("127.0.0.1", listen.port)
        assert (tcp.type, udp.type) == (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        assert not tcp.getblocking()
        assert not udp.getblocking()
        socket.create_connection(("127.0.0.1", listen.port)).close()
    assert tcp.fileno() == udp.fileno() == -1
    assert is_free(listen.port)


def test_port_0_is_the_same_number_next_time(state: StateDir) -> None:
    with bound(ANY, state) as (_, _, first):
        pass
    with bound(ANY, state) as (_, _, second):
        assert second == first


def test_a_chosen_port_is_not_remembered(state: StateDir) -> None:
    with bound(ANY, state) as (_, _, listen):
        pass
    state.remember_port(1)
    with bound(listen, state) as (_, _, again):
        assert again == listen
    assert state.last_port() == 1


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_remembered_port_that_is_taken_is_replaced(state: StateDir, kind: socket.SocketKind) -> None:
    with taken(kind) as port:
        state.remember_port(port)
        with bound(ANY, state) as (_, _, listen):
            assert listen.port != port
            assert state.last_port() == listen.port


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_in_use_is_fatal_and_nothing_stays_bound(state: StateDir, kind: socket.SocketKind) -> None:
    with taken(kind) as port:
        with pytest.raises(Fatal) as fatal, bound(Endpoint("127.0.0.1", port), state):
            pass
        assert str(fatal.value) == (
            f"cannot listen on 127.0.0.1:{port}: Address already in use; "
            "stop what uses it, or choose another address with --listen HOST:PORT (port 0: any free one)"
        )
    assert is_free(port)


@pytest.mark.parametrize("host", ["192.0.2.7", "no-such-host.invalid"])
def test_an_address_that_is_not_ours_is_fatal(state: StateDir, host: str) -> None:
    for port in (0, 4747):
        with (
            pytest.raises(Fatal, match=rf"cannot listen on {host}:{port}: .*; choose another address"),
            bound(Endpoint(host, port), state),
        ):
            pass


def test_v6_is_bound_like_v4(state: StateDir) -> None:
    with bound(Endpoint("::1", 0), state) as (tcp, udp, listen):
        assert tcp.getsockname()[:2] == udp.getsockname()[:2] == ("::1", listen.port)


def test_a_machine_that_cannot_remember_listens_all_the_same(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "missing")
    with bound(ANY, state) as (_, _, listen):
        assert listen.port
    assert "cannot be written: No such file or directory" in state.problem


# --------------------------------------------------------------------------------------------------------- own_address


@pytest.mark.parametrize(
    ("net", "listen", "told"),
    [
        (NetConfig(), Endpoint("127.0.0.1", 5), (Endpoint("127.0.0.1", 5), True)),
        (NetConfig(), Endpoint("192.0.2.7", 5), (Endpoint("192.0.2.7", 5), True)),
        (NetConfig(announce=Endpoint("a.example", 6)), WILDCARD, (Endpoint("a.example", 6), True)),
        (NetConfig(announce=Endpoint("a.example", 0)), WILDCARD, (Endpoint("a.example", 4747), True)),
        (NetConfig(outbound_only=True), WILDCARD, (Endpoint("127.0.0.1", 0), False)),
        (NetConfig(announce=Endpoint("a.example", 6), outbound_only=True), WILDCARD, (Endpoint("127.0.0.1", 0), False)),
        (NetConfig(bootstrap=(Endpoint("127.0.0.1", 9),)), WILDCARD, (Endpoint("127.0.0.1", 4747), False)),
        (NetConfig(bootstrap=(Endpoint("::1", 9),)), V6_WILDCARD, (Endpoint("::1", 4747), False)),
        (NetConfig(bootstrap=(Endpoint("127.0.0.1", 9),)), V6_WILDCARD, (Endpoint("127.0.0.1", 4747), False)),
    ],
    ids=str,
)
async def test_what_others_are_told(net: NetConfig, listen: Endpoint, told: tuple[Endpoint, bool]) -> None:
    assert await own_address(net, listen) == told


@pytest.mark.parametrize("bootstrap", [(), (Endpoint("no-such-host.invalid", 1),), (Endpoint("::1", 1),)], ids=str)
async def test_a_wildcard_is_never_announced(bootstrap: tuple[Endpoint, ...]) -> None:
    address, is_reachable = await own_address(NetConfig(bootstrap=bootstrap), WILDCARD)
    assert not address.is_wildcard
    assert ":" not in address.host  # who listens on 0.0.0.0 has no ear for IPv6
    assert (address.port, is_reachable) == (4747, False)


async def test_a_resolver_that_hangs_does_not_hold_up_the_start(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*arguments: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(trio.socket, "getaddrinfo", never)
    began = trio.current_time()
    address, _ = await own_address(NetConfig(bootstrap=(Endpoint("slow.example", 1),)), WILDCARD)
    assert address == Endpoint("127.0.0.1", 4747)
    assert trio.current_time() - began < 10
