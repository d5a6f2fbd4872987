"""The daemon's end of the local socket: who may speak, what may be said when, and what follows when someone is gone.

Strategy: one task reads each connection, and a step runs beside it, so that `Cancel`, `Release` and the end of the
connection are seen while the step waits for peers. One connection is one attachment; its end is the whole clean-up.
Nothing is read from another user's process, root's included. Every frame has a limit that fits the moment: a few
kilobytes before the greeting and once attached, so only `Attach` may be long. What cannot be understood is refused and
ends the connection; what is understood and cannot be done is refused, and the connection goes on. Connections that ask
and connections that train have budgets of their own, so `mpd status` is answered while every trainer's place is taken;
and no process has enough of either to keep others out. A trainer that harms itself harms nobody else.
"""

import array
import contextlib
import fcntl
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import trio

import mpd
from mpd import control
from mpd.errors import Fatal, LocalError
from mpd.ids import PeerId, show_peer
from mpd.manifest import MAX_METADATA_BYTES

from .budgets import Budgets, ByteGate
from .containment import contained
from .memory import OutRegion, Region

HANDSHAKE_S = 5.0  # from the connection to the end of `Hello`
FRAME_S = 5.0  # from the first to the last byte of any other message, in both directions
SMALL_FRAME_BYTES = 4096
SEAT_DESCRIPTORS = 8  # of a trainer, with a snapshot, in a run of its own: each region has two
MAX_LABEL_CHARS = 200
_READ_BYTES = 1 << 16
_QUICK_FRAME_BYTES = 1 << 18  # 10 ms to decode: what other trainers may have to wait
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

_log = logging.getLogger("mpd")

_Reply = tuple[object, list[int]]  # a message, and the descriptors beside it


class Seat(Protocol):
    """One attached trainer."""

    in_region: Region

    @property
    def out_region(self) -> OutRegion:
        """Where results are published now."""

    async def open_snapshot(self) -> Region:
        """Return the second region of a trainer whose parameters live in the first. Raises LocalError."""

    async def step(self, request: control.Step) -> control.Stepped:
        """Average what lies in the region that `request` names. Cancelled: nothing is published. Raises LocalError."""

    async def load_state(self, request: control.LoadState) -> tuple[control.StateLoaded, OutRegion | None]:
        """Get the run's vector from other peers; the region, if any, holds it. Raises LocalError."""

    def release(self, seq: int) -> None:
        """Note that the trainer has copied the result of step `seq`."""

    def close(self) -> None:
        """The trainer has detached, or died."""


class Trainers(Protocol):
    """What the daemon does for those who connect."""

    peer: PeerId

    async def attach(self, request: control.Attach, label: str) -> Seat:
        """Return a seat in the run that `request` names. Raises LocalError with what the trainer should know.

        Cancelled: there is no seat, and nothing was kept for it.
        """

    def query(self, query: control.Query) -> str:
        """Return the answer as a JSON text. Raises LocalError if the question makes no sense."""

    async def examine(self, request: control.Examine) -> str:
        """Return what `mpd doctor` finds, as a JSON text. Takes up to 10 s. Raises LocalError if one is under way."""

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
        ensure_safe(folder)
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
        with contextlib.suppress(OSError):  # a full disk: then the next one that comes cannot be told who we are
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode("ascii"), 0)
        yield
    finally:
        os.close(fd)


async def serve_clients(
    socket_path: Path,
    trainers: Trainers,
    farewells: contextlib.ExitStack,
    budgets: Budgets,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve trainers and `mpd` commands until cancelled. The caller holds `lock_socket(socket_path)`. Raises Fatal.

    Whoever asked the daemon to leave sees its connection end when the caller closes `farewells`.
    """

    async def serve(stream: trio.SocketStream) -> None:
        pid, uid, _ = _CREDENTIALS.unpack(
            stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if uid != os.geteuid():
            return
        with contained("client connection"), contextlib.ExitStack() as place:
            try:
                await _serve_connection(stream.socket, pid, _Serving(trainers, farewells, budgets, place))
            except* OSError as errors:  # of this connection alone, whatever the kernel comes up with
                _log.warning("the connection of process %d was ended: %s", pid, errors.exceptions[0])

    with _listening(socket_path) as listener:
        task_status.started()
        await trio.serve_listeners(serve, [trio.SocketListener(listener)])


def ensure_safe(folder: Path) -> None:
    """Raise Fatal if other users could put something of theirs into `folder`."""
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


@dataclass(frozen=True)
class _Serving:
    """What serves one connection. `place` gives back in the end whatever the connection has taken from the budgets."""

    trainers: Trainers
    farewells: contextlib.ExitStack
    budgets: Budgets
    place: contextlib.ExitStack

    def take_place(self, pid: int) -> None:
        """Let process `pid` (0: of another container) in to ask. Raises LocalError if there is no room."""
        clients, per_process = self.budgets.clients, self.budgets.clients_per_process
        if not self.budgets.descriptors.has_room():
            raise LocalError("this daemon has too many files and sockets open: close some connections")
        if not clients.take():
            raise LocalError(f"{clients.limit} connections are open already: close some")
        self.place.callback(clients.give)
        if pid:
            if not per_process.take(pid):
                raise LocalError(f"process {pid} has {per_process.limit} connections open already: close some")
            self.place.callback(per_process.give, pid)

    async def take_seat(self, request: control.Attach, label: str) -> Seat:
        """Attach a trainer, in exchange for the place it had. Raises LocalError."""
        trainers = self.budgets.trainers
        if not self.budgets.descriptors.has_room(SEAT_DESCRIPTORS):
            raise LocalError("this daemon has too many files and sockets open: detach another trainer first")
        if not trainers.take():
            raise LocalError(f"{trainers.limit} trainers are attached to this daemon already: detach one first")
        with contextlib.ExitStack() as seat_place:
            seat_place.callback(trainers.give)
            seat = await self.trainers.attach(request, label)
            self.place.close()
            self.place.push(seat_place.pop_all())
        return seat


async def _serve_connection(sock: trio.socket.SocketType, pid: int, serving: _Serving) -> None:
    frames = _Frames(sock, serving.budgets.long_frames)
    try:
        serving.take_place(pid)
        with trio.fail_after(HANDSHAKE_S):
            label = await _greet(frames, serving.trainers)
    except trio.TooSlowError:
        return
    except LocalError as error:
        await frames.send(control.Refused(str(error)))
        return
    session = _Session(frames, serving, label)
    try:
        async with trio.open_nursery() as nursery:
            await session.listen(nursery)
            nursery.cancel_scope.cancel()
    finally:
        session.close()


async def _greet(frames: "_Frames", trainers: Trainers) -> str:
    """Return the label of a trainer that says hello. Raises LocalError if it says anything else."""
    hello = await frames.receive()
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

    def __init__(self, frames: "_Frames", serving: _Serving, label: str) -> None:
        self._frames = frames
        self._serving = serving
        self._label = label
        self._seat: Seat | None = None
        self._is_making = False
        self._running: tuple[int, trio.CancelScope] | None = None

    async def listen(self, nursery: trio.Nursery) -> None:
        """Answer messages until the connection ends; what takes long runs in `nursery`."""
        self._frames.limit_bytes = control.MAX_FRAME_BYTES
        while True:
            try:
                message = await self._frames.receive()
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
        trainers = self._serving.trainers
        match message:
            case control.Attach():
                self._begin_making(partial(self._attach, message), nursery)
            case control.OpenSnapshot():
                self._begin_making(self._open_snapshot, nursery)
            case control.Step():
                self._begin_step(message, partial(self._step, self._attached(), message), nursery)
            case control.LoadState():
                self._begin_step(message, partial(self._load_state, self._attached(), message), nursery)
            case control.Release():
                self._attached().release(message.seq)
            case control.Cancel():
                if self._running and self._running[0] == message.seq:
                    self._running[1].cancel()
            case control.Query():
                await self._frames.send(control.Answer(trainers.query(message)))
            case control.Examine():
                await self._frames.send(control.Answer(await trainers.examine(message)))
            case control.Leave():
                self._serving.farewells.callback(self._frames.keep_open())
                await self._frames.send(control.Leaving())
                trainers.leave()
            case _:
                raise LocalError(f"a {type(message).__name__} was not expected here")

    def _attached(self) -> Seat:
        if self._seat is None:
            raise LocalError("this connection is not attached to a run yet: attach first")
        return self._seat

    def _begin_making(self, make: Callable[[], Awaitable[_Reply]], nursery: trio.Nursery) -> None:
        """Memory takes its time, and a trainer may die meanwhile."""
        if self._is_making:
            raise LocalError("memory is being set up for this connection: wait for the answer first")
        self._is_making = True
        nursery.start_soon(self._make, make)

    async def _make(self, make: Callable[[], Awaitable[_Reply]]) -> None:
        reply: _Reply
        try:
            reply = await make()
        except LocalError as error:
            reply = control.Refused(str(error)), []
        self._is_making = False  # before the reply: whoever has read it may go on
        await self._frames.send(*reply)

    async def _attach(self, request: control.Attach) -> _Reply:
        if self._seat:
            raise LocalError("this connection is attached already: open another one for another run")
        self._seat = seat = await self._serving.take_seat(request, self._label)
        self._frames.limit_bytes = SMALL_FRAME_BYTES + MAX_METADATA_BYTES
        sizes = seat.in_region.n_bytes, seat.out_region.n_bytes + control.OUT_HEADER_BYTES
        return control.Attached(*sizes), [seat.in_region.fd, seat.out_region.fd]

    async def _open_snapshot(self) -> _Reply:
        region = await self._attached().open_snapshot()
        return control.SnapshotOpened(region.n_bytes), [region.fd]

    def _begin_step(
        self, request: control.Step | control.LoadState, take: Callable[[], Awaitable[_Reply]], nursery: trio.Nursery
    ) -> None:
        if self._running:
            raise LocalError(f"step {self._running[0]} is still running: one at a time")
        self._running = (request.seq, trio.CancelScope())
        nursery.start_soon(self._take_step, request, take, self._running[1])

    async def _step(self, seat: Seat, request: control.Step) -> _Reply:
        stepped = await seat.step(request)
        return stepped, [seat.out_region.fd] if stepped.new_out else []

    async def _load_state(self, seat: Seat, request: control.LoadState) -> _Reply:
        loaded, region = await seat.load_state(request)
        return loaded, [region.fd] if region is not None else []

    async def _take_step(
        self,
        request: control.Step | control.LoadState,
        take: Callable[[], Awaitable[_Reply]],
        scope: trio.CancelScope,
    ) -> None:
        cancelled = control.Stepped if isinstance(request, control.Step) else control.StateLoaded
        reply: _Reply = cancelled(request.seq, False, "cancelled by the trainer"), []
        try:
            with scope:
                reply = await take()
        except LocalError as error:
            reply = control.Refused(str(error)), []
        self._running = None  # before the reply: whoever has read it may ask for the next step
        with trio.CancelScope(shield=True):  # what is done is told, even if the daemon leaves now
            await self._frames.send(*reply)


class _Frames:
    """Whole messages over one accepted socket. Descriptors go out; none ever comes in.

    A frame may have `limit_bytes`. Long ones share `room`, so that many senders take no more memory than one may.
    """

    def __init__(self, sock: trio.socket.SocketType, room: ByteGate) -> None:
        self.limit_bytes = SMALL_FRAME_BYTES
        self._sock = sock
        self._room = room
        self._sending = trio.Lock()

    async def receive(self) -> Any | None:
        """Return the next message, or None once the other side is gone.

        Raises LocalError if what comes is no message, is too long, or trickles in.
        """
        try:
            prefix = await self._read(1)
            with trio.fail_after(FRAME_S):
                n_bytes = control.body_length(prefix + await self._read(control.PREFIX_BYTES - 1))
            if n_bytes > self.limit_bytes:
                raise LocalError(f"a frame of {n_bytes} bytes was announced: at most {self.limit_bytes} expected here")
            if n_bytes <= SMALL_FRAME_BYTES:
                return await self._receive_body(n_bytes)
            await self._room.take(n_bytes)
            try:
                return await self._receive_body(n_bytes)
            finally:
                self._room.give(n_bytes)
        except (EOFError, ConnectionResetError):
            return None
        except trio.TooSlowError:
            raise LocalError(f"a frame took longer than {FRAME_S:.0f} s") from None

    async def send(self, message: object, fds: Sequence[int] = ()) -> None:
        """Send `message` with `fds` beside it, which may be closed from now on.

        Someone who does not read it within `FRAME_S` is cut off. Someone who is gone is noticed by `receive`, not here.
        """
        rest = memoryview(control.pack(message))
        with contextlib.ExitStack() as copies:
            own = array.array("i")
            for fd in fds:  # while we wait for room, the run may close its regions and the kernel give away the numbers
                own.append(os.dup(fd))
                copies.callback(os.close, own[-1])
            beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, own)] if own else []
            with trio.move_on_after(FRAME_S) as patience:
                async with self._sending:
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        while rest:
                            rest, beside = rest[await self._sock.sendmsg([rest], beside) :], []
        if patience.cancelled_caught:
            with contextlib.suppress(OSError):  # gone by now
                self._sock.shutdown(socket.SHUT_RDWR)

    def keep_open(self) -> Callable[[], None]:
        """Keep the connection open for the other side beyond our end, until what is returned is called."""
        return self._sock.dup().close

    async def _receive_body(self, n_bytes: int) -> Any:
        with trio.fail_after(FRAME_S):
            body = await self._read(n_bytes)
        if n_bytes <= _QUICK_FRAME_BYTES:
            return control.LOCAL.decode(body)
        return await trio.to_thread.run_sync(control.LOCAL.decode, body)

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
