"""The daemon's end of the local socket: who may speak, what may be said when, and what follows when someone is gone.

Strategy: one task reads each connection, and a step runs beside it, so that `Cancel`, `Release` and the end of the
connection are seen while the step waits for peers. One connection is one attachment; its end is the whole clean-up.
Nothing is read from another user's process. Every frame has a limit that fits the moment: a few kilobytes before the
greeting and once attached, so only `Attach` may be long. What cannot be understood is refused and ends the connection;
what is understood and cannot be done is refused, and the connection goes on.
"""

import array
import contextlib
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import trio

import mpd
from mpd import control
from mpd.errors import Fatal, LocalError
from mpd.ids import PeerId, show_peer

from .memory import OutRegion, Region

HANDSHAKE_S = 5.0  # from the connection to the end of `Hello`
FRAME_S = 5.0  # from the first to the last byte of any other message
SMALL_FRAME_BYTES = 4096
MAX_CONNECTIONS = 64
MAX_LABEL_CHARS = 200
_READ_BYTES = 1 << 16
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Seat(Protocol):
    """One attached trainer."""

    in_region: Region

    @property
    def out_region(self) -> OutRegion:
        """Where results are published now."""

    def open_snapshot(self) -> Region:
        """Return the second region of a trainer whose parameters live in the first. Raises LocalError."""

    async def step(self, request: control.Step) -> control.Stepped:
        """Average what lies in the region that `request` names. Cancelled: nothing is published. Raises LocalError."""

    def release(self, seq: int) -> None:
        """Note that the trainer has copied the result of step `seq`."""

    def close(self) -> None:
        """The trainer has detached, or died."""


class Trainers(Protocol):
    """What the daemon does for those who connect."""

    peer: PeerId

    def attach(self, request: control.Attach, label: str) -> Seat:
        """Return a seat in the run that `request` names. Raises LocalError with what the trainer should know."""

    def query(self, query: control.Query) -> str:
        """Return the answer as a JSON text. Raises LocalError if the question makes no sense."""

    def leave(self) -> None:
        """Begin to shut the daemon down, and return at once."""


@contextlib.contextmanager
def lock_socket(socket_path: Path) -> Iterator[None]:
    """Own `socket_path` until the end of the block; what lies there then is nobody's. Raises Fatal if it is taken.

    The lock is a file beside the socket. It is never removed: another daemon may be waiting for just this inode.
    """
    folder = socket_path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _ensure_safe(folder)
        fd = os.open(f"{socket_path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Fatal(f"the socket cannot be made in {folder}: {error.strerror}; choose another --socket") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace") or "unknown"
            raise Fatal(
                f"a daemon (pid {holder}) already serves {socket_path}: use it, or choose another --socket"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode("ascii"), 0)
        yield
    finally:
        os.close(fd)


async def serve_clients(
    socket_path: Path,
    trainers: Trainers,
    farewells: contextlib.ExitStack,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve trainers and `mpd` commands until cancelled. The caller holds `lock_socket(socket_path)`. Raises Fatal.

    Whoever asked the daemon to leave sees its connection end when the caller closes `farewells`.
    """
    with _listening(socket_path) as listener:
        async with trio.open_nursery() as connections:

            async def serve(stream: trio.SocketStream) -> None:
                frames = _Frames(stream.socket)
                if not _is_ours(stream.socket):
                    return
                if len(connections.child_tasks) > MAX_CONNECTIONS:
                    await frames.send(control.Refused(f"{MAX_CONNECTIONS} connections are open already: close some"))
                else:
                    await _serve_connection(frames, trainers, farewells)

            task_status.started()
            await trio.serve_listeners(serve, [trio.SocketListener(listener)], handler_nursery=connections)


def _ensure_safe(folder: Path) -> None:
    info = folder.stat()
    others_may_write = info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX
    if info.st_uid not in (os.geteuid(), 0) or others_may_write:
        raise Fatal(f"{folder} is in other users' hands: choose another --socket, or make it yours (chmod 700)")


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[trio.socket.SocketType]:
    """Bind `path` for this user alone, and remove it in the end."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with trio.socket.from_stdlib_socket(sock) as listener:
        mask = os.umask(0o177)
        try:
            if path.exists() and not path.is_socket():
                raise Fatal(f"{path} is there and is no socket: choose another --socket")
            path.unlink(missing_ok=True)  # left behind by a daemon that was killed: its lock is ours now
            sock.bind(str(path))
            sock.listen()
        except OSError as error:
            raise Fatal(f"the socket cannot be made at {path}: {error}; choose another --socket") from error
        finally:
            os.umask(mask)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _is_ours(sock: trio.socket.SocketType) -> bool:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    return bool(uid == os.geteuid())


async def _serve_connection(frames: "_Frames", trainers: Trainers, farewells: contextlib.ExitStack) -> None:
    try:
        with trio.fail_after(HANDSHAKE_S):
            label = await _greet(frames, trainers)
    except trio.TooSlowError:
        return
    except LocalError as error:
        await frames.send(control.Refused(str(error)))
        return
    session = _Session(frames, trainers, label, farewells)
    try:
        async with trio.open_nursery() as nursery:
            await session.listen(nursery)
            nursery.cancel_scope.cancel()
    finally:
        session.close()


async def _greet(frames: "_Frames", trainers: Trainers) -> str:
    """Return the label of a trainer that says hello. Raises LocalError if it says anything else."""
    hello = await frames.receive(SMALL_FRAME_BYTES)
    if not isinstance(hello, control.Hello):
        raise LocalError("the first message must be hello")
    if hello.version != control.CONTROL_VERSION:
        raise LocalError(
            f"this daemon (mpd {mpd.__version__}) speaks version {control.CONTROL_VERSION} of the local protocol, "
            f"its client version {hello.version}: install the same mpd for both, and start the daemon again"
        )
    await frames.send(control.Welcome(control.CONTROL_VERSION, show_peer(trainers.peer), mpd.__version__))
    return "".join(c if c.isprintable() else "?" for c in hello.label[:MAX_LABEL_CHARS])


class _Session:
    """What one connection has asked for so far: at most one seat, and on it at most one step at a time."""

    def __init__(self, frames: "_Frames", trainers: Trainers, label: str, farewells: contextlib.ExitStack) -> None:
        self._frames = frames
        self._trainers = trainers
        self._label = label
        self._farewells = farewells
        self._seat: Seat | None = None
        self._running: tuple[int, trio.CancelScope] | None = None

    async def listen(self, nursery: trio.Nursery) -> None:
        """Answer messages until the connection ends; steps run in `nursery`."""
        while True:
            try:
                message = await self._frames.receive(SMALL_FRAME_BYTES if self._seat else control.MAX_FRAME_BYTES)
            except LocalError as error:
                await self._frames.send(control.Refused(str(error)))
                return
            if message is None:
                return
            try:
                await self._answer(message, nursery)
            except LocalError as error:
                await self._frames.send(control.Refused(str(error)))

    def close(self) -> None:
        if self._seat:
            self._seat.close()

    async def _answer(self, message: object, nursery: trio.Nursery) -> None:
        match message:
            case control.Attach():
                await self._attach(message)
            case control.OpenSnapshot():
                region = self._attached().open_snapshot()
                await self._frames.send(control.SnapshotOpened(region.n_bytes), [region.fd])
            case control.Step():
                self._begin(message, nursery)
            case control.Release():
                self._attached().release(message.seq)
            case control.Cancel():
                if self._running and self._running[0] == message.seq:
                    self._running[1].cancel()
            case control.Query():
                await self._frames.send(control.Answer(self._trainers.query(message)))
            case control.Leave():
                self._farewells.callback(self._frames.keep_open())
                await self._frames.send(control.Leaving())
                self._trainers.leave()
            case _:
                raise LocalError(f"a {type(message).__name__} was not expected here")

    async def _attach(self, request: control.Attach) -> None:
        if self._seat:
            raise LocalError("this connection is attached already: open another one for another run")
        self._seat = seat = self._trainers.attach(request, self._label)
        reply = control.Attached(seat.in_region.n_bytes, seat.out_region.n_bytes + control.OUT_HEADER_BYTES)
        await self._frames.send(reply, [seat.in_region.fd, seat.out_region.fd])

    def _attached(self) -> Seat:
        if self._seat is None:
            raise LocalError("this connection is not attached to a run yet: attach first")
        return self._seat

    def _begin(self, request: control.Step, nursery: trio.Nursery) -> None:
        seat = self._attached()
        if self._running:
            raise LocalError(f"step {self._running[0]} is still running: one at a time")
        self._running = (request.seq, trio.CancelScope())
        nursery.start_soon(self._step, seat, request, self._running[1])

    async def _step(self, seat: Seat, request: control.Step, scope: trio.CancelScope) -> None:
        reply: object = control.Stepped(request.seq, averaged=False, reason="cancelled by the trainer")
        fds: list[int] = []
        try:
            with scope:
                stepped = await seat.step(request)
                reply, fds = stepped, [seat.out_region.fd] if stepped.new_out else []
        except LocalError as error:
            reply = control.Refused(str(error))
        self._running = None  # before the reply: whoever has read it may ask for the next step
        with trio.move_on_after(FRAME_S, shield=True):  # what is done is told, even if the daemon leaves now
            await self._frames.send(reply, fds)


class _Frames:
    """Whole messages over one accepted socket. Descriptors go out; none ever comes in."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._sending = trio.Lock()

    async def receive(self, limit_bytes: int) -> Any | None:
        """Return the next message, or None once the other side is gone.

        Raises LocalError if what comes is no message, is longer than `limit_bytes`, or trickles in.
        """
        try:
            prefix = await self._read(1)
            with trio.fail_after(FRAME_S):
                n_bytes = control.body_length(prefix + await self._read(control.PREFIX_BYTES - 1))
                if n_bytes > limit_bytes:
                    raise LocalError(f"a frame of {n_bytes} bytes was announced: at most {limit_bytes} expected here")
                return control.LOCAL.decode(await self._read(n_bytes))
        except (EOFError, ConnectionResetError):
            return None
        except trio.TooSlowError:
            raise LocalError(f"a frame took longer than {FRAME_S:.0f} s") from None

    async def send(self, message: object, fds: Sequence[int] = ()) -> None:
        """Send `message` with `fds` beside it. Someone who is gone is noticed by `receive`, not here."""
        rest = memoryview(control.pack(message))
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        async with self._sending:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while rest:
                    rest, beside = rest[await self._sock.sendmsg([rest], beside) :], []

    def keep_open(self) -> Callable[[], None]:
        """Keep the connection open for the other side beyond our end, until what is returned is called."""
        return self._sock.dup().close

    async def _read(self, n_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < n_bytes:
            # With no room for them the kernel drops descriptors that come along, and tells.
            part, _, flags, _ = await self._sock.recvmsg(min(n_bytes - len(data), _READ_BYTES))
            if flags & socket.MSG_CTRUNC:
                raise LocalError("descriptors came along: only the daemon sends those")
            if not part:
                raise EOFError
            data += part
        return bytes(data)
