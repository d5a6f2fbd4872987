"""Accidents on demand: what is armed, when it strikes, and what the kernel then does to the sockets of peers.

Connections here are real ones over the loopback, because what a reset or a black hole does is the kernel's business. A
reset strikes every connection of the process, so these tests keep theirs to themselves.
"""

import contextlib
import os
import select
import signal
import socket
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon_helpers import tcp_pair
from hypothesis import given
from hypothesis import strategies as st

from mpd.daemon import faults
from mpd.daemon.faults import ACTIONS, POINTS, Fault, arm, is_cut_off, outlast, parse, status, strike
from mpd.errors import Fatal

HOLE_S = 0.4


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    """Nothing stays armed."""
    yield
    arm("")
    faults._cut_off_until = 0.0


# --------------------------------------------------------------------------------------------------- the specification


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", ()),
        ("send:3:kill", (Fault("send", 3, "kill", 0.0),)),
        (" send:3:kill , commit:1:freeze,", (Fault("send", 3, "kill", 0.0), Fault("commit", 1, "freeze", 0.0))),
        ("write-back:1:hole", (Fault("write-back", 1, "hole", 3.0),)),
        ("seek:1:delay:0.5", (Fault("seek", 1, "delay", 0.5),)),
    ],
)
def test_what_can_be_armed(spec: str, expected: tuple[Fault, ...]) -> None:
    assert parse(spec) == expected


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("kill", "POINT:TURN:ACTION"),
        ("send:kill", "POINT:TURN:ACTION"),
        ("send:1:kill:2:3", "POINT:TURN:ACTION"),
        ("sned:1:kill", "names no point of the protocol: announce, seek"),
        ("send:1:explode", "names no action: kill, freeze"),
        ("send:0:kill", "a number from 1 on"),
        ("send:-1:kill", "a number from 1 on"),
        ("send:many:kill", "a number from 1 on"),
        ("send:1:kill:3", "only hole and delay have one"),
        ("send:1:hole:soon", "seconds up to 3600"),
        ("send:1:hole:0", "seconds up to 3600"),
        ("send:1:hole:nan", "seconds up to 3600"),
        ("send:1:hole:inf", "seconds up to 3600"),
    ],
)
def test_what_is_wrong_is_said(spec: str, words: str) -> None:
    with pytest.raises(Fatal, match=words):
        parse(spec)


@given(st.text() | st.lists(st.sampled_from([*POINTS, *ACTIONS, ":", ",", "1", "0.5", " "])).map("".join))
def test_any_text_is_armed_or_refused(spec: str) -> None:
    with contextlib.suppress(Fatal):
        for fault in parse(spec):
            assert parse(str(fault)) == (fault,)


# ---------------------------------------------------------------------------------------------------------------- turns


def test_in_production_nothing_is_armed() -> None:
    assert not faults.armed
    assert status() == ""


def test_what_is_armed_strikes_in_its_turn_and_once(caplog: pytest.LogCaptureFixture) -> None:
    arm("send:3:error,commit:1:error")
    assert faults.armed
    assert "FAULTS ARE ARMED" in caplog.text
    assert "send:3:error" in status()
    strike("send")
    strike("receive")
    strike("send")
    with pytest.raises(RuntimeError, match="on purpose, at send"):
        strike("send")
    strike("send")
    with pytest.raises(RuntimeError, match="at commit"):
        strike("commit")
    assert status().endswith("none left")
    assert "fault: send:3:error" in caplog.text


def test_what_a_file_says_counts_from_when_it_changed(tmp_path: Path) -> None:
    orders = tmp_path / "faults"
    orders.write_text("")
    arm(f"@{orders}")
    strike("send")
    strike("send")
    (tmp_path / "new").write_text("send:2:error")
    (tmp_path / "new").rename(orders)
    strike("send")
    with pytest.raises(RuntimeError):
        strike("send")
    (tmp_path / "new").write_text("")
    (tmp_path / "new").rename(orders)
    strike("send")


def test_a_file_that_is_not_there_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match="cannot be read"):
        arm(f"@{tmp_path / 'none'}")


def test_what_is_not_armed_costs_nothing(record_property: Callable[[str, object], None]) -> None:
    n_times = 100_000
    seconds = timeit.timeit("if faults.armed: faults.strike('send')", globals={"faults": faults}, number=n_times)
    nanoseconds = seconds / n_times * 1e9
    record_property("ns_per_fault_point", round(nanoseconds, 1))
    assert nanoseconds < 10_000


# -------------------------------------------------------------------------------------------------------------- actions


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("freeze", signal.SIGSTOP)])
def test_a_process_kills_and_freezes_itself(
    action: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, what: sent.append((pid, what)))
    arm(f"send:1:{action}")
    strike("send")
    assert sent == [(os.getpid(), number)]


def test_a_delay_stops_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    arm("send:1:delay:7")
    strike("send")
    assert slept == [7.0]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = tcp_pair()
    with near, far:
        yield near, far


def is_readable(sock: socket.socket, within_s: float) -> bool:
    return bool(select.select([sock], [], [], within_s)[0])


def test_a_reset_ends_every_connection_and_no_listener(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    local, its_end = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener, local, its_end:
        n_descriptors = len(os.listdir("/proc/self/fd"))
        arm("send:1:reset")
        strike("send")
        for sock in (near, far):
            assert is_readable(sock, 5.0)
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        with socket.create_connection(listener.getsockname()):
            pass
        local.send(b"x")
        assert its_end.recv(10) == b"x"
        assert len(os.listdir("/proc/self/fd")) == n_descriptors


def test_in_a_black_hole_nothing_arrives_and_nothing_is_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    n_descriptors = len(os.listdir("/proc/self/fd"))
    before = set(threading.enumerate())
    arm(f"send:1:hole:{HOLE_S}")
    strike("send")
    assert is_cut_off()
    near.send(b"hello")
    assert not is_readable(far, HOLE_S / 4)
    assert is_readable(far, 5.0)  # the kernel has sent it again
    assert far.recv(10) == b"hello"
    assert not is_cut_off()
    assert not near.getblocking()  # the copies have not changed what is shared with them
    for thread in set(threading.enumerate()) - before:  # the one that has ended the hole
        thread.join(5.0)
    assert len(os.listdir("/proc/self/fd")) == n_descriptors


async def test_who_sends_waits_until_the_hole_is_over(pair: tuple[socket.socket, socket.socket]) -> None:
    arm(f"send:1:hole:{HOLE_S}")
    began = time.monotonic()
    strike("send")
    await outlast()
    assert not is_cut_off()
    assert time.monotonic() - began >= HOLE_S
    await outlast()
