"""Whose sockets send how fast: reno on one host, cubic between hosts, bbr where packets are lost.

Strategy: a fake socket tells what the kernel would, and notes what it is told to use; the loopback shows that the
kernel understands us, and that its numbers are where we look for them.
"""

import contextlib
import socket
import struct
from typing import Any

import pytest
from daemon_helpers import tcp_pair

from mpd.daemon.congestion import EVEN, FOR_LOSSY_LINKS, LOOK_BYTES, ON_ONE_HOST, TRIAL_LOOKS, Congestion, choose

HERE, THERE = ("192.0.2.1", 1), ("192.0.2.2", 2)


class FakeSocket:
    """A connection between two hosts that has sent `segments`, `lost` of them in vain."""

    def __init__(self) -> None:
        self.segments = self.lost = 0
        self.chosen: list[bytes] = []
        self.info_bytes = 256

    def getpeername(self) -> tuple[str, int]:
        return THERE

    def getsockname(self) -> tuple[str, int]:
        return HERE

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_CONGESTION)
        self.chosen.append(value)

    def getsockopt(self, level: int, option: int, n_bytes: int) -> bytes:
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO)
        info = struct.pack("=100xI32xI116x", self.lost, self.segments)
        return info[: self.info_bytes]


class Sender:
    """Sends `LOOK_BYTES` at a time over a fake socket."""

    def __init__(self) -> None:
        self.sock = FakeSocket()
        self.sent = 0
        self.congestion = Congestion(self.sock)

    def send(self, loss: float, segments: int = 3000) -> list[bytes]:
        """Send once more and return what has been chosen since the beginning."""
        self.sent += LOOK_BYTES
        self.sock.segments += segments
        self.sock.lost += round(loss * segments)
        self.congestion.note_sent(self.sent)
        return self.sock.chosen


def test_between_hosts_streams_share_evenly() -> None:
    sock = FakeSocket()
    choose(sock)
    assert sock.chosen == [EVEN]


def test_on_one_host_nothing_is_paced_and_the_kernel_knows_what_we_look_for() -> None:
    near, far = tcp_pair()
    with contextlib.closing(near), contextlib.closing(far):
        choose(near)
        name = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
        assert name == ON_ONE_HOST
        before = struct.unpack_from("=136xI", near.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))[0]
        near.send(b"x")
        info = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        assert struct.unpack_from("=136xI", info)[0] == before + 1
        assert struct.unpack_from("=100xI", info)[0] == 0


def test_a_machine_without_it_keeps_its_own() -> None:
    class Refusing(FakeSocket):
        def setsockopt(self, level: int, option: int, value: bytes) -> None:
            raise FileNotFoundError(2, "no such congestion control")

    choose(Refusing())


def test_a_link_that_goes_on_losing_packets_gets_what_does_not_mind_and_another_trial_later() -> None:
    sender = Sender()
    assert sender.send(0.02) == []
    assert sender.send(0.02) == [FOR_LOSSY_LINKS]
    for _ in range(TRIAL_LOOKS - 1):
        assert sender.send(0.02) == [FOR_LOSSY_LINKS]
    assert sender.send(0.02) == [FOR_LOSSY_LINKS, EVEN]
    sender.send(0.02)
    assert sender.send(0.02) == [FOR_LOSSY_LINKS, EVEN, FOR_LOSSY_LINKS]


@pytest.mark.parametrize(
    ("losses", "segments"),
    [
        ([0.004] * 20, 3000),  # what cubic does to itself
        ([0.02, 0.0] * 10, 3000),  # bursts
        ([0.5] * 20, 5),  # too few to tell
    ],
)
def test_other_losses_change_nothing(losses: list[float], segments: int) -> None:
    sender = Sender()
    assert [sender.send(loss, segments) for loss in losses][-1] == []


def test_looks_are_rare() -> None:
    sender = Sender()
    sender.sock.info_bytes = 0
    looks = 0

    def count(level: int, option: int, n_bytes: int) -> bytes:
        nonlocal looks
        looks += 1
        return b""

    vars(sender.sock)["getsockopt"] = count
    for sent in range(0, 10 * LOOK_BYTES, LOOK_BYTES // 16):
        sender.congestion.note_sent(sent)
    assert looks == 9


def test_a_kernel_that_says_less_is_believed_to_lose_nothing() -> None:
    sender = Sender()
    sender.sock.info_bytes = 104
    assert [sender.send(0.5) for _ in range(5)][-1] == []


def test_a_connection_that_is_reset_meanwhile_is_no_error() -> None:
    near, far = tcp_pair()
    near.close()
    far.close()
    broken: Any = near
    Congestion(broken).note_sent(LOOK_BYTES)
