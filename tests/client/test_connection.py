"""A connection against a daemon that the test plays by hand, byte by byte."""

import array
import os
import queue
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpd import control
from mpd.client.connection import Connection
from mpd.errors import DaemonUnavailable, LocalError

WELCOME = control.pack(control.Welcome(control.CONTROL_VERSION, "peer", "1.2.3"))
ANSWER = control.pack(control.Answer("[]"))


class Played:
    """Both ends of one greeted connection."""

    def __init__(self, path: Path, first: bytes = WELCOME) -> None:
        accepted: queue.Queue[socket.socket] = queue.Queue()

        def accept() -> None:
            sock, _ = listener.accept()
            accepted.put(sock)
            sock.sendall(first)

        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            thread = threading.Thread(target=accept)
            thread.start()
            try:
                self.ours = Connection(path)
            except LocalError:
                accepted.get().close()
                raise
            finally:
                thread.join()
            self.theirs = accepted.get()

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def played(path: Path) -> Iterator[Played]:
    both = Played(path)
    yield both
    both.close()


def test_a_greeting_tells_who_the_daemon_is_and_who_we_are(played: Played) -> None:
    assert (played.ours.peer, played.ours.daemon_version) == ("peer", "1.2.3")
    frame = played.theirs.recv(1000)
    hello = control.LOCAL.decode(frame[control.PREFIX_BYTES :])
    assert hello.version == control.CONTROL_VERSION
    assert hello.label.endswith(f"(pid {os.getpid()})")


def test_frames_arrive_whole_in_pieces_and_several_at_once(played: Played) -> None:
    for byte in ANSWER[:-1]:
        played.theirs.send(bytes([byte]))
        assert played.ours.receive(0) is None
    played.theirs.send(ANSWER[-1:] + ANSWER + WELCOME[:3])
    assert [played.ours.receive(1), played.ours.receive(0)] == [control.Answer("[]")] * 2
    assert played.ours.receive(0) is None
    played.theirs.send(WELCOME[3:])
    assert played.ours.receive(1) == control.Welcome(control.CONTROL_VERSION, "peer", "1.2.3")


def test_descriptors_keep_the_order_of_their_messages(played: Played) -> None:
    pipes = [os.pipe() for _ in range(2)]
    for index, (reader, _) in enumerate(pipes):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reader]))]
        played.theirs.sendmsg([control.pack(control.SnapshotOpened(index))], rights)
    assert [played.ours.receive(1).n_bytes, played.ours.receive(1).n_bytes] == [0, 1]
    for index, (reader, writer) in enumerate(pipes):
        os.write(writer, bytes([index]))
        taken = played.ours.take_descriptor()
        assert os.read(taken, 1) == bytes([index])
        assert not os.get_inheritable(taken)
        for fd in (taken, reader, writer):
            os.close(fd)
    with pytest.raises(LocalError, match="the daemon sent no shared memory"):
        played.ours.take_descriptor()


def test_closing_closes_descriptors_that_nobody_took(played: Played) -> None:
    reader, writer = os.pipe()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writer]))]
    played.theirs.sendmsg([ANSWER], rights)
    played.ours.receive(1)
    played.ours.close()
    played.ours.close()
    os.close(writer)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_connection_is_open_until_someone_closes(played: Played) -> None:
    assert played.ours.is_open
    played.theirs.close()
    assert not played.ours.is_open
    played.ours.close()
    assert not played.ours.is_open


@pytest.mark.parametrize("half", [b"", ANSWER[:7]])
def test_the_end_of_the_daemon_is_one_error(played: Played, path: Path, half: bytes) -> None:
    played.theirs.sendall(half)
    played.theirs.close()
    with pytest.raises(DaemonUnavailable, match=f"the daemon at {path} went away"):
        played.ours.receive(1)
    with pytest.raises(DaemonUnavailable, match=f"the daemon at {path} went away"):
        played.ours.send(control.Leave())


def test_a_request_that_is_refused_says_why(played: Played) -> None:
    played.theirs.sendall(control.pack(control.Refused("too many tensors")))
    with pytest.raises(LocalError, match="too many tensors"):
        played.ours.request(control.Query("status"), control.Answer)
    assert played.ours.is_open


def test_a_wrong_answer_ends_the_connection(played: Played) -> None:
    played.theirs.sendall(control.pack(control.Leaving()))
    with pytest.raises(LocalError, match="answered with a Leaving, a Answer was expected"):
        played.ours.request(control.Query("status"), control.Answer)
    assert not played.ours.is_open


def test_a_daemon_that_does_not_answer_is_given_up(played: Played) -> None:
    with pytest.raises(DaemonUnavailable, match=r"has not answered for 0\.01 s: it hangs or is overloaded"):
        played.ours.request(control.Query("status"), control.Answer, timeout_s=0.01)
    assert not played.ours.is_open


@pytest.mark.parametrize("junk", [bytes(4), b"\xff" * 4, b"\x03\0\0\0abc"])
def test_junk_from_the_daemon_is_named(path: Path, junk: bytes) -> None:
    with pytest.raises(LocalError, match=r"frame of|malformed message"):
        Played(path, junk)


def test_waiting_for_the_end(played: Played) -> None:
    assert not played.ours.wait_closed(0)
    played.theirs.close()
    assert played.ours.wait_closed(1)


def make_nothing(path: Path) -> None:
    assert not path.exists()


def make_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


@pytest.mark.parametrize("make", [make_nothing, make_stale])
def test_no_daemon_is_said_with_what_to_do(path: Path, make: object) -> None:
    make(path)  # type: ignore[operator]
    with pytest.raises(DaemonUnavailable, match=f"no daemon answers at {path}: start one with `mpd join`"):
        Connection(path)


def test_a_path_that_can_be_no_socket_is_said_with_why(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnavailable, match="path too long"):
        Connection(tmp_path / ("x" * 200))


def test_a_crowded_queue_is_waited_for(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)  # room for one
        first.connect(str(path))
        with pytest.raises(DaemonUnavailable, match="no daemon can be reached"):
            Connection(path, 0.05)

        def accept() -> None:
            for _ in range(2):
                sock, _ = listener.accept()
                with sock:
                    if sock.recv(1):
                        sock.sendall(WELCOME)

        first.close()
        thread = threading.Thread(target=accept)
        thread.start()
        Connection(path).close()
        thread.join()


def test_a_daemon_that_says_nothing_is_given_up(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(DaemonUnavailable, match=f"the daemon at {path} has not answered for 0.01 s"):
            Connection(path, 0.01)
