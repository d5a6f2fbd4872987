"""A UDP socket on a loop: what arrives is handed on, many datagrams at a time, and a flood does not own the loop."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest
from dht_swarm import on_one_loop, turn, udp_socket, until

from mpd.daemon import dht_socket
from mpd.daemon.budgets import Budgets, RateBudget
from mpd.daemon.dht_filter import Sieve
from mpd.daemon.dht_gate import KIND_AT, MAX_DATAGRAM_BYTES, REPLY
from mpd.daemon.dht_socket import PER_WAKE_UP, DatagramSocket, hand_on_all

NEVER_FULL = 1_000_000


class Ear(asyncio.DatagramProtocol):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.heard: list[tuple[bytes, Any]] = []
        self.errors: list[Exception] = []
        self.is_lost = False
        self.on_datagram: Callable[[], None] = lambda: None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.heard.append((data, addr))
        self.on_datagram()

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True


def open_socket(
    wake_ups: RateBudget | None = None, unwanted: Callable[[], Sieve | None] = hand_on_all
) -> tuple[Ear, DatagramSocket, socket.socket]:
    """Return an ear, its socket, and another socket that is connected to it."""
    ear, sock, other = Ear(), udp_socket(), udp_socket()
    other.connect(sock.getsockname())
    budgets = Budgets(wake_ups=wake_ups or RateBudget(NEVER_FULL, NEVER_FULL))
    return ear, DatagramSocket(asyncio.get_running_loop(), sock, ear, budgets, unwanted), other


def test_datagrams_are_carried_both_ways() -> None:
    async def test() -> None:
        ear, ours, other = open_socket()
        assert ear.transport is ours
        other.send(b"question")
        await until(lambda: bool(ear.heard))
        assert ear.heard == [(b"question", other.getsockname())]
        ours.sendto(b"answer", other.getsockname())
        assert await asyncio.get_running_loop().sock_recv(other, 100) == b"answer"
        assert ours.get_extra_info("sockname") != other.getsockname()
        ours.close()
        other.close()

    on_one_loop(test)


def test_many_datagrams_are_read_in_one_wake_up() -> None:
    async def test() -> None:
        ear, ours, other = open_socket()
        per_turn: list[int] = []
        for i in range(PER_WAKE_UP + 5):
            other.send(b"%d" % i)
        while len(ear.heard) < PER_WAKE_UP + 5:
            turned = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(turned.set_result, None)
            await turned
            per_turn.append(len(ear.heard))
        assert sorted(set(per_turn) - {0}) == [PER_WAKE_UP, PER_WAKE_UP + 5]
        assert [data for data, _ in ear.heard] == [b"%d" % i for i in range(PER_WAKE_UP + 5)]
        ours.close()
        other.close()

    on_one_loop(test)


def test_without_a_wake_up_left_datagrams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_socket, "PAUSE_S", 3600.0)

    async def test() -> None:
        ear, ours, other = open_socket(RateBudget(1e-9, 2))
        for i in range(3):
            other.send(b"%d" % i)
            await until(lambda wanted=i + 1: len(ear.heard) == wanted)  # type: ignore[misc]
        other.send(b"late")
        await turn()
        assert len(ear.heard) == 3
        assert ours._pause is not None
        ours.close()
        assert ours._pause.cancelled()
        other.close()

    on_one_loop(test)


def test_reading_goes_on_after_a_pause() -> None:
    async def test() -> None:
        ear, ours, other = open_socket(RateBudget(1e-9, 1))
        for i in range(5):
            other.send(b"%d" % i)
            await until(lambda wanted=i + 1: len(ear.heard) == wanted)  # type: ignore[misc]
        ours.close()
        other.close()

    on_one_loop(test)


NOBODY_HEARD = Sieve(frozenset(), frozenset(), None)


def test_what_nobody_wants_is_not_read_and_is_counted() -> None:
    """Neither is it kept: what was sent meanwhile does not come afterwards."""
    unwanted: list[Sieve | None] = [NOBODY_HEARD]

    async def test() -> None:
        ear, ours, other = open_socket(unwanted=lambda: unwanted[0])
        other.send(b"wanted until now")
        await until(lambda: bool(ear.heard))
        for _ in range(5):
            other.send(b"unwanted")
        unwanted[0] = None
        await until(lambda: ours._sifting is None)
        assert ours._budgets.datagrams.refused == 5
        other.send(b"wanted again")
        await until(lambda: len(ear.heard) == 2)
        assert ear.heard[1][0] == b"wanted again"
        ours.close()
        other.close()

    on_one_loop(test)


def test_whoever_is_asked_meanwhile_is_heard_until_it_is_over() -> None:
    """The filter stands as long as it is the same object, whatever was let through since."""

    n_looks = 0

    def unwanted() -> Sieve:
        nonlocal n_looks
        n_looks += 1
        return NOBODY_HEARD

    async def test() -> None:
        ear, ours, other = open_socket(unwanted=unwanted)
        other.send(b"wanted until now")
        await until(lambda: bool(ear.heard))
        ours.sendto(b"question", other.getsockname())
        await until(lambda: n_looks >= 3)
        other.send(bytes([*bytes(KIND_AT), REPLY, 0]))
        await until(lambda: len(ear.heard) == 2)
        ours.close()
        other.close()

    on_one_loop(test)


def test_the_filter_is_exchanged_rarely_however_often_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    attached: list[Sieve] = []
    monkeypatch.setattr(dht_socket, "attach", lambda sock, sieve: not attached.append(sieve))
    monkeypatch.setattr(dht_socket, "SIFT_S", 3600.0)

    async def test() -> None:
        ear, ours, other = open_socket(unwanted=lambda: Sieve(frozenset(), frozenset(), None))
        for i in range(10):
            other.send(b"%d" % i)
            await until(lambda wanted=i + 1: len(ear.heard) == wanted)  # type: ignore[misc]
        assert len(attached) == 1
        ours.close()
        assert ours._sifting is not None
        assert ours._sifting.cancelled()
        other.close()

    on_one_loop(test)


def test_what_is_too_long_arrives_too_long() -> None:
    async def test() -> None:
        ear, ours, other = open_socket()
        other.send(bytes(5000))
        await until(lambda: bool(ear.heard))
        assert len(ear.heard[0][0]) == MAX_DATAGRAM_BYTES + 1
        ours.close()
        other.close()

    on_one_loop(test)


def test_errors_are_told_and_end_nothing() -> None:
    async def test() -> None:
        ear, ours, other = open_socket()
        ours.sendto(bytes(70_000), other.getsockname())
        assert [type(error) for error in ear.errors] == [OSError]
        other.send(b"still here")
        await until(lambda: bool(ear.heard))
        ours.close()
        other.close()

    on_one_loop(test)


def test_a_listener_that_fails_does_not_stop_the_reading() -> None:
    async def test() -> None:
        failures: list[Any] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
        ear, ours, other = open_socket()

        def fail() -> None:
            ear.on_datagram = lambda: None
            raise RuntimeError("a bug")

        ear.on_datagram = fail
        other.send(b"first")
        other.send(b"second")
        await until(lambda: len(ear.heard) == 2)
        assert [str(failure) for failure in failures] == ["a bug"]
        ours.close()
        other.close()

    on_one_loop(test)


def test_closing_in_the_middle_of_a_wake_up_ends_it() -> None:
    async def test() -> None:
        ear, ours, other = open_socket()
        ear.on_datagram = ours.close
        other.send(b"first")
        other.send(b"second")
        await until(lambda: ear.is_lost)
        assert [data for data, _ in ear.heard] == [b"first"]
        assert ours.is_closing()
        ours.close()
        other.close()

    on_one_loop(test)
