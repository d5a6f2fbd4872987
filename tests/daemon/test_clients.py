"""The local socket against trainers that behave, trainers that do not, and a second daemon.

Strategy: the server is real and so is its socket; what lies behind is a seat whose steps end when the test says so.
Clients are raw sockets, because the interesting ones send what no proper client would.
"""

import array
import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import mpd
from mpd import control
from mpd.daemon import clients
from mpd.daemon.budgets import Budget, Budgets, ByteGate, Descriptors, KeyedBudget
from mpd.daemon.clients import FRAME_S, HANDSHAKE_S, SEAT_DESCRIPTORS, SMALL_FRAME_BYTES, lock_socket, serve_clients
from mpd.daemon.memory import OutRegion, Region
from mpd.errors import Fatal, LocalError
from mpd.ids import PeerId, show_peer
from mpd.layout import TensorSpec

HELLO = control.Hello(control.CONTROL_VERSION, "train.py (pid 7)")
SOAK = bool(os.environ.get("MPD_SOAK"))
N_CONNECTIONS = 5000 if SOAK else 200
N_DESCRIPTOR_MESSAGES = 10_000 if SOAK else 50
ATTACH = control.Attach("run", (TensorSpec("w", "float32", (4,)),), 16, 1, "raw", "mean")


class Seat:
    """A seat whose step ends when `gate` opens, with `answer`."""

    def __init__(self) -> None:
        self.in_region = Region(16)
        self.out_region = OutRegion(16)
        self.memory = trio.Event()  # until it is set, snapshots are being made
        self.memory.set()
        self.gate = trio.Event()
        self.answer: control.Stepped | LocalError = control.Stepped(1, averaged=True, reason="all came", generation=1)
        self.calls: list[Any] = []
        self.closed = trio.Event()

    async def open_snapshot(self) -> Region:
        await self.memory.wait()
        return self.in_region

    async def step(self, request: control.Step) -> control.Stepped:
        self.calls.append(request)
        await self.gate.wait()
        if isinstance(self.answer, LocalError):
            raise self.answer
        return self.answer

    def release(self, seq: int) -> None:
        self.calls.append(control.Release(seq))

    def close(self) -> None:
        self.in_region.close()
        self.out_region.close()
        self.closed.set()


class Trainers:
    def __init__(self) -> None:
        self.peer = PeerId(b"p" * 20)
        self.seats: list[Seat] = []
        self.labels: list[str] = []
        self.left = trio.Event()
        self.memory = trio.Event()  # until it is set, regions are being made
        self.memory.set()
        self.dropped = 0

    async def attach(self, request: control.Attach, label: str) -> Seat:
        try:
            await self.memory.wait()
        except trio.Cancelled:
            self.dropped += 1
            raise
        if request.run == "taken":
            raise LocalError("group_size is 16 here, 8 there")
        self.labels.append(label)
        self.seats.append(Seat())
        return self.seats[-1]

    def query(self, query: control.Query) -> str:
        if query.what != "status":
            raise LocalError("ask for status, rounds or peers")
        return '{"version": 1}'

    async def examine(self, request: control.Examine) -> str:
        if request.bootstrap:
            raise LocalError("this daemon is being examined already")
        return "[]"

    def leave(self) -> None:
        self.left.set()


class Client:
    """A raw client. `say` sends, `hear` returns the next message, or None at the end."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock
        self.fds: list[int] = []

    async def say(self, *messages: Any) -> None:
        await self.raw(b"".join(control.pack(message) for message in messages))

    async def raw(self, data: bytes) -> None:
        while data:
            data = data[await self.sock.send(data) :]

    async def hear(self) -> Any:
        prefix = await self._read(control.PREFIX_BYTES)
        if prefix is None:
            return None
        body = await self._read(control.body_length(prefix))
        assert body is not None
        return control.LOCAL.decode(body)

    async def ask(self, message: Any) -> Any:
        await self.say(message)
        return await self.hear()

    async def attach(self) -> None:
        assert isinstance(await self.ask(HELLO), control.Welcome)
        assert isinstance(await self.ask(ATTACH), control.Attached)

    async def _read(self, n_bytes: int) -> bytes | None:
        data = b""
        while len(data) < n_bytes:
            try:
                part, ancillary, _, _ = await self.sock.recvmsg(n_bytes - len(data), 64)
            except ConnectionResetError:
                return None
            for _, _, raw in ancillary:
                self.fds += array.array("i", raw)
            if not part:
                return None
            data += part
        return data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mpd" / "mpd.sock"


@pytest.fixture
def trainers() -> Trainers:
    return Trainers()


@pytest.fixture
def budgets() -> Budgets:
    return Budgets()


@pytest.fixture
async def server(path: Path, trainers: Trainers, budgets: Budgets) -> AsyncIterator[None]:
    with contextlib.ExitStack() as farewells, lock_socket(path):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_clients, path, trainers, farewells, budgets)
            yield
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Client]:
    with trio.socket.socket(socket.AF_UNIX) as sock:
        await sock.connect(str(path))
        client = Client(sock)
        yield client
        for fd in client.fds:
            os.close(fd)


@pytest.fixture
async def client(path: Path, server: None) -> AsyncIterator[Client]:
    async with connected(path) as opened:
        yield opened


def is_refused(answer: Any, *words: str) -> bool:
    return isinstance(answer, control.Refused) and all(word in answer.message for word in words)


# -------------------------------------------------------------------------------------------------------- conversation


async def test_a_greeting_is_answered(client: Client, trainers: Trainers) -> None:
    assert await client.ask(HELLO) == control.Welcome(
        control.CONTROL_VERSION, show_peer(trainers.peer), mpd.__version__
    )


async def test_an_attachment_brings_both_regions(client: Client, trainers: Trainers) -> None:
    await client.attach()
    (seat,) = trainers.seats
    sizes = [os.fstat(fd).st_size for fd in client.fds]
    assert sizes == [16, 16 + control.OUT_HEADER_BYTES]
    os.pwrite(client.fds[0], b"abc", 0)
    assert bytes(seat.in_region.view[:3]) == b"abc"


async def test_a_snapshot_brings_one_region(client: Client) -> None:
    await client.attach()
    assert await client.ask(control.OpenSnapshot()) == control.SnapshotOpened(16)
    assert len(client.fds) == 3


async def test_a_label_cannot_play_tricks_on_a_terminal(client: Client, trainers: Trainers) -> None:
    await client.ask(control.Hello(control.CONTROL_VERSION, "\x1b[2Jevil\n" + "x" * 1000))
    await client.ask(ATTACH)
    assert trainers.labels == ["?[2Jevil?" + "x" * (clients.MAX_LABEL_CHARS - 9)]


async def test_a_step_is_answered_once_and_released(client: Client, trainers: Trainers) -> None:
    await client.attach()
    (seat,) = trainers.seats
    seat.gate.set()
    assert await client.ask(control.Step(1, 2.0, 30.0)) == seat.answer
    await client.say(control.Release(1))
    assert await client.ask(control.Query("status")) == control.Answer('{"version": 1}')
    assert seat.calls == [control.Step(1, 2.0, 30.0), control.Release(1)]


async def test_a_new_out_region_rides_along(client: Client, trainers: Trainers) -> None:
    await client.attach()
    (seat,) = trainers.seats
    seat.gate.set()
    seat.answer = control.Stepped(1, averaged=True, reason="", generation=1, new_out=True)
    seat.out_region.close()
    seat.out_region = OutRegion(16)
    seat.out_region.publish(77)
    await client.ask(control.Step(1, 1.0, 30.0))
    assert len(client.fds) == 3
    assert os.pread(client.fds[2], 8, 0) == struct.pack("<Q", 77)


async def test_a_cancelled_step_is_answered_and_the_next_one_runs(client: Client, trainers: Trainers) -> None:
    await client.attach()
    await client.say(control.Step(1, 1.0, 30.0), control.Cancel(1))
    assert await client.hear() == control.Stepped(1, averaged=False, reason="cancelled by the trainer")
    trainers.seats[0].gate.set()
    assert (await client.ask(control.Step(2, 1.0, 30.0))).averaged


async def test_a_late_cancel_does_not_hit_the_next_step(client: Client, trainers: Trainers) -> None:
    await client.attach()
    await client.say(control.Cancel(1), control.Step(2, 1.0, 30.0), control.Cancel(1), control.Query("status"))
    assert isinstance(await client.hear(), control.Answer)
    trainers.seats[0].gate.set()
    assert (await client.hear()).averaged


async def test_questions_are_answered_while_a_step_runs(client: Client, trainers: Trainers) -> None:
    await client.attach()
    await client.say(control.Step(1, 1.0, 30.0))
    assert await client.ask(control.Query("status")) == control.Answer('{"version": 1}')
    assert is_refused(await client.ask(control.Step(2, 1.0, 30.0)), "step 1 is still running: one at a time")
    trainers.seats[0].gate.set()
    assert await client.hear() == trainers.seats[0].answer


async def test_an_examination_is_answered_or_refused(client: Client, trainers: Trainers) -> None:
    await client.ask(HELLO)
    assert await client.ask(control.Examine()) == control.Answer("[]")
    assert is_refused(await client.ask(control.Examine(("192.0.2.1:1",))), "this daemon is being examined already")
    assert await client.ask(control.Query("status")) == control.Answer('{"version": 1}')


async def test_what_cannot_be_done_is_refused_and_the_connection_goes_on(client: Client, trainers: Trainers) -> None:
    await client.ask(HELLO)
    assert is_refused(await client.ask(control.Query("weather")), "ask for status, rounds or peers")
    assert is_refused(await client.ask(control.Step(1, 1.0, 1.0)), "attach first")
    assert is_refused(await client.ask(control.OpenSnapshot()), "attach first")
    assert is_refused(await client.ask(control.Release(1)), "attach first")
    assert is_refused(await client.ask(control.Leaving()), "a Leaving was not expected here")
    assert is_refused(await client.ask(HELLO), "a Hello was not expected here")
    taken = control.Attach("taken", ATTACH.tensors, 16, 1, "raw", "mean")
    assert is_refused(await client.ask(taken), "group_size is 16 here, 8 there")
    assert isinstance(await client.ask(ATTACH), control.Attached)
    assert is_refused(await client.ask(ATTACH), "attached already")
    trainers.seats[0].gate.set()
    trainers.seats[0].answer = LocalError("there is no snapshot")
    assert is_refused(await client.ask(control.Step(1, 1.0, 1.0)), "there is no snapshot")
    assert is_refused(await client.ask(control.Step(2, 1.0, 1.0)), "there is no snapshot")


async def test_leaving_is_answered_and_passed_on(client: Client, trainers: Trainers) -> None:
    await client.ask(HELLO)
    assert await client.ask(control.Leave()) == control.Leaving()
    assert trainers.left.is_set()


async def test_who_asked_the_daemon_to_leave_sees_the_end_when_all_is_over(path: Path, trainers: Trainers) -> None:
    with contextlib.ExitStack() as farewells, lock_socket(path):
        async with trio.open_nursery() as nursery, contextlib.AsyncExitStack() as clients:
            await nursery.start(serve_clients, path, trainers, farewells, Budgets())
            asks, bystander = [await clients.enter_async_context(connected(path)) for _ in range(2)]
            await asks.ask(HELLO)
            await bystander.ask(HELLO)
            assert await asks.ask(control.Leave()) == control.Leaving()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                assert await bystander.hear() is None
                with trio.move_on_after(0.01) as waiting:
                    await asks.hear()
                assert waiting.cancelled_caught
                farewells.close()
                assert await asks.hear() is None


async def test_frames_may_arrive_byte_by_byte(client: Client) -> None:
    for byte in control.pack(HELLO) + control.pack(control.Query("status")):
        await client.raw(bytes([byte]))
    assert isinstance(await client.hear(), control.Welcome)
    assert isinstance(await client.hear(), control.Answer)


@pytest.mark.parametrize("in_a_step", [False, True])
async def test_the_end_of_the_connection_frees_the_seat(
    path: Path, server: None, trainers: Trainers, in_a_step: bool
) -> None:
    async with connected(path) as client:
        await client.attach()
        if in_a_step:
            await client.say(control.Step(1, 1.0, 30.0))
    with trio.fail_after(5):
        await trainers.seats[0].closed.wait()


async def test_a_connection_that_is_reset_frees_the_seat(path: Path, server: None, trainers: Trainers) -> None:
    async with connected(path) as client:
        await client.attach()
        await client.say(control.Query("status"))
        await client.sock.recv(1)  # closing with the rest unread resets the connection
    with trio.fail_after(5):
        await trainers.seats[0].closed.wait()


# ------------------------------------------------------------------------------------------------------ hostile clients


async def goes_on(path: Path) -> bool:
    async with connected(path) as client:
        return isinstance(await client.ask(HELLO), control.Welcome)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "a frame of"),
        (bytes(4), "a frame of 0 bytes"),
        (struct.pack("<I", SMALL_FRAME_BYTES + 1), "at most 4096 expected here"),
        (struct.pack("<I", 0xFFFFFFFF), "a frame of 4294967295 bytes"),
        (b"\x01\0\0\0\xc1", "malformed message"),
        (b"\x20\0\0\0" + b"\x91" * 32, "malformed message"),
        (control.pack(ATTACH), "the first message must be hello"),
        (control.pack(control.Hello(2)), "speaks version 1 of the local protocol, its client version 2"),
    ],
)
async def test_a_bad_greeting_is_refused_and_ends_the_connection(
    path: Path, client: Client, data: bytes, words: str
) -> None:
    await client.raw(data)
    assert is_refused(await client.hear(), words)
    assert await client.hear() is None
    assert await goes_on(path)


def bent(message: Any, old: bytes, new: bytes) -> bytes:
    """Return `message` as a frame in which `old` is replaced by `new`, of the same length."""
    frame = control.pack(message)
    assert old in frame
    assert len(old) == len(new)
    return frame.replace(old, new)


@pytest.mark.parametrize(
    "data",
    [
        bent(control.Step(1, 1.0, 30.0), struct.pack(">d", 30.0), struct.pack(">d", float("inf"))),
        bent(control.Step(1, 8.0, 30.0), struct.pack(">d", 8.0), struct.pack(">d", -1.0)),
        bent(control.Step(1, 8.0, 30.0), struct.pack(">d", 8.0), struct.pack(">d", float("nan"))),
        bent(control.Step(1, 1.0, 30.0, "snapshot"), b"snapshot", b"someplac"),
        bent(control.Release(1), b"release", b"relapse"),
        struct.pack("<I", SMALL_FRAME_BYTES + 1),
    ],
    ids=["timeout", "negative weight", "nan weight", "source", "name", "length"],
)
async def test_a_bad_message_after_attaching_frees_the_seat(
    path: Path, client: Client, trainers: Trainers, data: bytes
) -> None:
    await client.attach()
    await client.raw(data)
    assert isinstance(await client.hear(), control.Refused)
    assert await client.hear() is None
    await trainers.seats[0].closed.wait()
    assert trainers.seats[0].calls == []
    assert await goes_on(path)


@pytest.mark.parametrize("greeted", [False, True])
async def test_descriptors_from_a_client_never_get_in(path: Path, client: Client, greeted: bool) -> None:
    if greeted:
        await client.ask(HELLO)
    before = len(os.listdir("/proc/self/fd"))
    flood = array.array("i", [client.sock.fileno()] * 253)
    await client.sock.sendmsg([control.pack(HELLO)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, flood)])
    assert is_refused(await client.hear(), "descriptors came along")
    assert await client.hear() is None
    assert len(os.listdir("/proc/self/fd")) == before - 1  # the server's end of this connection is closed
    assert await goes_on(path)


@pytest.mark.parametrize("start", [b"", control.pack(HELLO)[:9]])
async def test_a_client_that_does_not_greet_is_dropped(client: Client, start: bytes, autojump_clock: object) -> None:
    await client.raw(start)
    began = trio.current_time()
    await client.hear()
    assert await client.hear() is None
    assert trio.current_time() - began == pytest.approx(HANDSHAKE_S)


async def test_a_frame_that_trickles_is_refused(client: Client, trainers: Trainers, autojump_clock: object) -> None:
    await client.attach()
    await client.raw(control.pack(control.Cancel(1))[:5])
    began = trio.current_time()
    assert is_refused(await client.hear(), "a frame took longer than 5 s")
    assert trio.current_time() - began == pytest.approx(FRAME_S)
    await trainers.seats[0].closed.wait()


async def test_a_quiet_client_may_stay(client: Client, autojump_clock: object) -> None:
    await client.ask(HELLO)
    await trio.sleep(3600)
    assert isinstance(await client.ask(control.Query("status")), control.Answer)


async def test_a_client_that_does_not_read_is_cut_off(
    client: Client, trainers: Trainers, autojump_clock: object
) -> None:
    await client.attach()
    began = trio.current_time()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        await client.say(*[control.Query("status")] * 100_000)
    assert trio.current_time() - began == pytest.approx(FRAME_S)
    await trainers.seats[0].closed.wait()


async def test_what_the_kernel_refuses_ends_one_connection(
    path: Path, client: Client, trainers: Trainers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here: more descriptors on their way than one user may have, which its trainers can bring about at will."""

    async def fail(*args: Any) -> int:
        raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")

    await client.ask(HELLO)
    with monkeypatch.context() as patch:
        patch.setattr(trio._socket._SocketType, "sendmsg", fail)
        await client.say(ATTACH)
        assert await client.hear() is None
    await trainers.seats[0].closed.wait()
    process = f"the connection of process {os.getpid()} was ended"
    assert caplog.messages == [f"{process}: [Errno 109] Too many references: cannot splice"]
    assert await goes_on(path)


async def test_descriptors_survive_the_wait_for_room(nursery: trio.Nursery) -> None:
    """A run may close a region, and the kernel give its number to something secret, before the message gets out."""
    ours, theirs = trio.socket.socketpair()
    region, frames, receiver = Region(16), clients._Frames(ours, ByteGate(1)), Client(theirs)
    async with frames._sending:
        nursery.start_soon(frames.send, control.SnapshotOpened(16), [region.fd])
        await wait_all_tasks_blocked()
        number = region.fd
        region.close()
        secret = os.open("/dev/null", os.O_RDONLY)
        assert secret == number
    assert await receiver.hear() == control.SnapshotOpened(16)
    (fd,) = receiver.fds
    assert os.fstat(fd).st_size == 16
    for each in (fd, secret):
        os.close(each)
    ours.close()
    theirs.close()


async def test_another_user_is_not_even_read(path: Path, server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: me + 1)
        patch.setattr(clients._Frames, "receive", None)  # would raise if it were called
        async with connected(path) as client:
            await client.say(HELLO)
            assert await client.hear() is None
    assert await goes_on(path)


# ------------------------------------------------------------------------------------------------- while memory is made


async def test_questions_are_answered_while_memory_is_made(client: Client, trainers: Trainers) -> None:
    trainers.memory = trio.Event()
    await client.ask(HELLO)
    await client.say(ATTACH)
    assert await client.ask(control.Query("status")) == control.Answer('{"version": 1}')
    assert is_refused(await client.ask(ATTACH), "wait for the answer first")
    assert is_refused(await client.ask(control.Step(1, 1.0, 1.0)), "attach first")
    trainers.memory.set()
    assert isinstance(await client.hear(), control.Attached)
    trainers.seats[0].memory = trio.Event()
    await client.say(control.OpenSnapshot())
    assert is_refused(await client.ask(control.OpenSnapshot()), "wait for the answer first")
    trainers.seats[0].memory.set()
    assert isinstance(await client.hear(), control.SnapshotOpened)


async def test_a_trainer_that_dies_while_it_attaches_leaves_nothing(
    path: Path, server: None, trainers: Trainers, budgets: Budgets
) -> None:
    trainers.memory = trio.Event()
    async with connected(path) as client:
        await client.ask(HELLO)
        await client.say(ATTACH)
        await client.ask(control.Query("status"))
        assert (budgets.trainers.used, budgets.clients.used) == (1, 1)
    await until(lambda: not budgets.clients.used)
    assert (trainers.dropped, trainers.seats, budgets.trainers.used) == (1, [], 0)


async def test_a_trainer_that_dies_while_its_snapshot_is_made_frees_the_seat(
    path: Path, server: None, trainers: Trainers
) -> None:
    async with connected(path) as client:
        await client.attach()
        trainers.seats[0].memory = trio.Event()
        await client.say(control.OpenSnapshot())
        await client.ask(control.Query("status"))
    with trio.fail_after(5):
        await trainers.seats[0].closed.wait()


# ------------------------------------------------------------------------------------------------------------- budgets


async def greeted(path: Path, stack: contextlib.AsyncExitStack) -> Client:
    client = await stack.enter_async_context(connected(path))
    assert isinstance(await client.ask(HELLO), control.Welcome)
    return client


async def until(holds: Callable[[], bool]) -> None:
    """Return once the server has done its part."""
    with trio.fail_after(5):
        while not holds():
            await trio.lowlevel.checkpoint()


async def comes_free(path: Path) -> None:
    """Return once the server has seen the others go."""
    with trio.fail_after(5):
        while not await goes_on(path):
            pass


@pytest.mark.parametrize(
    ("budgets", "says"),
    [
        (Budgets(clients=Budget(4)), "4 connections are open already"),
        (Budgets(clients_per_process=KeyedBudget(4)), f"process {os.getpid()} has 4 connections open already"),
    ],
    ids=["in total", "of one process"],
)
async def test_more_connections_than_allowed_are_refused(path: Path, server: None, budgets: Budgets, says: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(4):
            await greeted(path, stack)
        late = await stack.enter_async_context(connected(path))
        assert is_refused(await late.hear(), says)
        assert await late.hear() is None
    await comes_free(path)
    assert budgets.clients.peak <= 5


@pytest.mark.parametrize("budgets", [Budgets(trainers=Budget(2), clients_per_process=KeyedBudget(2))])
async def test_questions_are_answered_while_every_trainers_place_is_taken(
    path: Path, server: None, budgets: Budgets, trainers: Trainers
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        attached = [await greeted(path, stack) for _ in range(2)]
        for client in attached:
            assert isinstance(await client.ask(ATTACH), control.Attached)
        late = await greeted(path, stack)
        assert is_refused(await late.ask(ATTACH), "2 trainers are attached to this daemon already")
        assert isinstance(await late.ask(control.Query("status")), control.Answer)
        attached[0].sock.close()
        await trainers.seats[0].closed.wait()
        with trio.fail_after(5):
            while is_refused(await late.ask(ATTACH)):
                pass
        assert len(trainers.seats) == 3
        assert (budgets.trainers.used, budgets.clients.used) == (2, 0)
    await comes_free(path)
    await until(lambda: not budgets.trainers.used)


class Few(Descriptors):
    """As if only so many more could be opened."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def has_room(self, n: int = 1) -> bool:
        return n <= self.left


@pytest.mark.parametrize(("left", "welcome"), [(0, False), (SEAT_DESCRIPTORS - 1, True)])
async def test_descriptors_that_run_out_are_told(path: Path, trainers: Trainers, left: int, welcome: bool) -> None:
    with lock_socket(path):
        async with trio.open_nursery() as nursery:
            budgets = Budgets(descriptors=Few(left))
            await nursery.start(serve_clients, path, trainers, contextlib.ExitStack(), budgets)
            async with connected(path) as client:
                answer = await (client.ask(HELLO) if welcome else client.hear())
                if welcome:
                    answer = await client.ask(ATTACH)
                assert is_refused(answer, "too many files and sockets open")
            assert budgets.trainers.used == 0
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("budgets", [Budgets(long_frames=ByteGate(1 << 20))])
async def test_long_frames_wait_for_each_other(
    path: Path, server: None, budgets: Budgets, autojump_clock: object
) -> None:
    long = control.Attach(
        "run", tuple(TensorSpec(f"{i:050}", "float32", (4,)) for i in range(200)), 16, 1, "raw", "mean"
    )
    async with contextlib.AsyncExitStack() as stack:
        slow, honest = [await greeted(path, stack) for _ in range(2)]
        began = trio.current_time()
        await slow.raw(struct.pack("<I", 1 << 20) + bytes(10_000))
        await wait_all_tasks_blocked()
        assert isinstance(await honest.ask(long), control.Attached)
        assert trio.current_time() - began == pytest.approx(FRAME_S)
        assert is_refused(await slow.hear(), "a frame took longer than 5 s")
        assert budgets.long_frames.used == 0


# -------------------------------------------------------------------------------------------------------------- floods


async def test_a_flood_of_connections_leaves_no_trace(path: Path, server: None, budgets: Budgets) -> None:
    before = len(os.listdir("/proc/self/fd"))

    async def call() -> None:
        with trio.move_on_after(10), contextlib.suppress(BlockingIOError):  # the kernel's queue is full
            async with connected(path) as client:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    await client.raw(b"\x07\0\0\0garbage")
                    await client.hear()

    for _ in range(N_CONNECTIONS // 100):
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(call)
    await comes_free(path)
    assert 0 < budgets.clients.peak <= budgets.clients.limit
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_a_flood_of_descriptors_leaves_no_trace(path: Path, server: None) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(N_DESCRIPTOR_MESSAGES):
        async with connected(path) as client:
            flood = array.array("i", [client.sock.fileno()] * 253)
            await client.sock.sendmsg([control.pack(HELLO)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, flood)])
            await client.hear()
    await comes_free(path)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


# -------------------------------------------------------------------------------------------------- the socket's place


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def is_there(path: Path) -> bool:
    return path.exists()


async def test_socket_and_folder_are_for_their_owner_alone(path: Path, server: None) -> None:
    assert [mode(each) for each in (path.parent, path, Path(f"{path}.lock"))] == [0o700, 0o600, 0o600]
    mask = os.umask(0o022)
    os.umask(mask)
    assert mask != 0o177


async def test_the_socket_goes_with_its_daemon(path: Path, trainers: Trainers) -> None:
    with lock_socket(path):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_clients, path, trainers, contextlib.ExitStack(), Budgets())
            assert is_there(path)
            nursery.cancel_scope.cancel()
    assert not is_there(path)


async def test_a_socket_left_by_a_killed_daemon_is_replaced(path: Path, trainers: Trainers) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    path.with_name("mpd.sock.lock").write_text("4242")
    with lock_socket(path):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_clients, path, trainers, contextlib.ExitStack(), Budgets())
            assert await goes_on(path)
            nursery.cancel_scope.cancel()


async def test_a_second_daemon_is_told_who_serves(path: Path, server: None) -> None:
    with pytest.raises(Fatal, match=rf"a daemon \(pid {os.getpid()}\) already serves {path}"), lock_socket(path):
        pass
    assert await goes_on(path)


def test_a_lock_is_free_again_after_its_block(path: Path) -> None:
    for _ in range(2):
        with lock_socket(path):
            assert path.with_name("mpd.sock.lock").read_text() == str(os.getpid())


def test_a_holder_that_cannot_sign_serves_all_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with (
        lock_socket(path),
        pytest.raises(Fatal, match=r"a daemon \(pid unknown\) already serves"),
        lock_socket(path),
    ):
        pass


def test_a_holder_that_has_not_signed_yet_is_unknown(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with path.with_name("mpd.sock.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Fatal, match=r"a daemon \(pid unknown\) already serves"), lock_socket(path):
            pass


@pytest.mark.parametrize("bits", [0o770, 0o707])
def test_a_folder_that_others_may_write_is_refused(path: Path, bits: int) -> None:
    path.parent.mkdir()
    path.parent.chmod(bits)
    with pytest.raises(Fatal, match="is in other users' hands: choose another --socket"), lock_socket(path):
        pass


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(Fatal, match=r"the socket cannot be made in .*/file: .*; choose another --socket"),
        lock_socket(tmp_path / "file" / "mpd.sock"),
    ):
        pass


def test_a_file_that_is_no_socket_is_not_removed(path: Path, trainers: Trainers) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_text("weights")
    with pytest.raises(Fatal, match="is there and is no socket"):
        trio.run(serve_clients, path, trainers, contextlib.ExitStack(), Budgets())
    assert path.read_text() == "weights"


async def test_a_path_that_is_too_long_is_one_sentence(tmp_path: Path, trainers: Trainers) -> None:
    with pytest.raises(Fatal, match=r"path too long.*choose another --socket"):
        await serve_clients(tmp_path / ("x" * 200), trainers, contextlib.ExitStack(), Budgets())


async def test_a_bug_in_an_answer_costs_that_connection(
    path: Path, client: Client, trainers: Trainers, bugs: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(path) as other:
        assert isinstance(await other.ask(HELLO), control.Welcome)
        await client.ask(HELLO)
        monkeypatch.setattr(trainers, "query", lambda query: 1 / 0)
        assert await client.ask(control.Query("status")) is None
        assert bugs == {"client connection": 1}
        monkeypatch.undo()
        assert isinstance(await other.ask(control.Query("status")), control.Answer)
