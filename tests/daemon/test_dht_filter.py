"""The filter in a real kernel, on real sockets: what it drops is what the sieve says, of either version of IP."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mpd.daemon.dht_filter import MAX_INSTRUCTIONS, MAX_MUTED, Sieve, attach, count_dropped, detach
from mpd.daemon.dht_gate import KIND_AT, REPLY, REQUEST

NOBODY: frozenset[tuple[str, int]] = frozenset()


@contextmanager
def sockets(family: socket.AddressFamily, *hosts: str) -> Iterator[list[socket.socket]]:
    """Yield a UDP socket on each of `hosts`; the first one takes datagrams of both versions if it is of IPv6."""
    made = []
    try:
        for host in hosts:
            made.append(sock := socket.socket(family if not made or ":" in host else socket.AF_INET, socket.SOCK_DGRAM))
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind((host, 0))
            sock.setblocking(False)
        yield made
    finally:
        for sock in made:
            sock.close()


def hears(ours: socket.socket, other: socket.socket, kind: int = REQUEST) -> bool:
    """Return whether a datagram from `other` gets to `ours`; on the loopback it has come, or not, when it was sent."""
    datagram = bytes([*bytes(KIND_AT), kind, *bytes(30)])
    other.sendto(datagram, ("::1" if other.family == socket.AF_INET6 else "127.0.0.1", ours.getsockname()[1]))
    try:
        return ours.recv(100) == datagram
    except BlockingIOError:
        return False


def address_of(sock: socket.socket) -> tuple[str, int]:
    host, port = sock.getsockname()[:2]
    return host, port


def assert_sieved(ours: socket.socket, others: list[socket.socket], sieve: Sieve) -> None:
    assert attach(ours, sieve)
    for other in others:
        for kind in REQUEST, REPLY:
            assert hears(ours, other, kind) != sieve.drops(address_of(other), kind == REPLY)


V4 = (socket.AF_INET, "127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2", "127.0.0.3")
DUAL = (socket.AF_INET6, "::", "127.0.0.1", "127.0.0.2", "127.0.0.2", "127.0.0.3", "::1", "::1")


@pytest.mark.parametrize("which", [V4, DUAL], ids=["v4", "both"])
def test_the_kernel_drops_what_the_sieve_says(which: tuple[socket.AddressFamily, str]) -> None:
    with sockets(*which) as (ours, *others):
        spared = [NOBODY, *(frozenset({address_of(other)}) for other in others), frozenset(map(address_of, others[1:]))]
        muted = [None, frozenset({"127.0.0.2"}), frozenset({"127.0.0.3", "::/64"}), frozenset({"192.0.2.1"})]
        for each in spared:
            for sources in muted:
                assert_sieved(ours, others, Sieve(each, NOBODY, sources))
                assert_sieved(ours, others, Sieve(NOBODY, each, sources))
                assert_sieved(ours, others, Sieve(spared[1], each, sources))
        assert Sieve(NOBODY, NOBODY, frozenset({"127.0.0.2"})).drops(("127.0.0.2", 1), is_reply=True)
        assert Sieve(NOBODY, NOBODY, frozenset({"::/64"})).drops(("::1", 1), is_reply=True)
        detach(ours)
        assert all(hears(ours, other) for other in others)


def test_of_a_v6_customer_all_addresses_are_muted() -> None:
    sieve = Sieve(NOBODY, NOBODY, frozenset({"2001:db8:0:7::/64"}))
    assert sieve.drops(("2001:db8:0:7:1:2:3:4", 1), is_reply=False)
    assert not sieve.drops(("2001:db8:0:8::1", 1), is_reply=False)


def test_what_is_dropped_is_counted() -> None:
    with sockets(socket.AF_INET, "127.0.0.1", "127.0.0.1") as (ours, other):
        assert attach(ours, Sieve(NOBODY, NOBODY, None))
        assert not any(hears(ours, other) for _ in range(7))
        assert count_dropped(ours) == 7


def test_hundreds_are_spared_and_thousands_are_too_many() -> None:
    def crowd(n: int) -> frozenset[tuple[str, int]]:
        return frozenset((f"10.0.{i // 256}.{i % 256}", 4747) for i in range(n))

    with sockets(socket.AF_INET, "127.0.0.1", "127.0.0.1") as (ours, other):
        assert_sieved(ours, [other], Sieve(crowd(MAX_INSTRUCTIONS // 5 - 10) | {address_of(other)}, NOBODY, None))
        assert not attach(ours, Sieve(crowd(MAX_INSTRUCTIONS), NOBODY, None))
        muted = frozenset(f"10.0.{i // 256}.{i % 256}" for i in range(1000))
        assert_sieved(ours, [other], Sieve(NOBODY, NOBODY, muted))
        n_instructions = len(Sieve(NOBODY, NOBODY, muted).program() or b"") // 8
        assert n_instructions < 4 * MAX_MUTED


def test_to_detach_what_was_never_attached_is_nothing() -> None:
    with sockets(socket.AF_INET, "127.0.0.1", "127.0.0.1") as (ours, other):
        detach(ours)
        assert hears(ours, other)


def test_where_there_are_no_filters_everything_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(socket.socket):
        def setsockopt(self, *args: object) -> None:  # type: ignore[override]
            raise OSError("no such option")

        def getsockopt(self, *args: object) -> bytes:  # type: ignore[override]
            raise OSError("no such option")

    with Refusing(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        assert not attach(sock, Sieve(NOBODY, NOBODY, None))
        detach(sock)
        assert count_dropped(sock) == 0
    monkeypatch.setattr("sys.platform", "darwin")
    with sockets(socket.AF_INET, "127.0.0.1", "127.0.0.1") as (ours, other):
        assert not attach(ours, Sieve(NOBODY, NOBODY, None))
        assert hears(ours, other)
