"""A man in the middle: a relay in front of one daemon that hears everything and may change what it carries.

Strategy: the daemon announces the relay's address as its own, so every connection that other daemons make to it passes
here. Each direction is a thread that copies bytes. Sealed data connections are cut at the borders of their records
(header in clear, body, tag), so that an attack can be told in records: it gets each one with its number, and returns
what to send in its place, or None to reset the connection. All that has passed is kept for whoever looks for secrets in
it, unless the relay is told to forget: a minute of rounds is many gigabytes. Datagrams go past the relay: on the
loopback, a node of the DHT notices that somebody sits in between.
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self

from mpd.wire import DATA_GREETING_BYTES, DATA_MAGIC, HEADER_BYTES

TAG_BYTES = 16
_READ_BYTES = 1 << 20
_LENGTH = struct.Struct("<8xI")  # where a record's header says how long its body is

Attack = Callable[[str, int, bytes], Iterable[bytes] | None]
"""Gets "in" (towards the daemon) or "out", the number of the record on that connection, and the record."""


def pass_on(direction: str, number: int, record: bytes) -> Iterable[bytes]:
    """Change nothing."""
    return (record,)


class Relay:
    """Listens at `address` for TCP; set `target` to the daemon's own port once it is known.

    `heard` holds all that has passed, or nothing if the relay `forgets`.
    """

    def __init__(self, attack: Attack = pass_on, *, forgets: bool = False) -> None:
        self.target = 0
        self.attack = attack
        self.forgets = forgets
        self.data_connections = 0
        self.heard: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = {self._listener}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closed = True
        _shut(*self._open)
        for thread in self._threads:
            thread.join()
        for sock in self._open:
            sock.close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open.add(sock)
            self._start(self._serve, near, far)

    def _serve(self, near: socket.socket, far: socket.socket) -> None:
        """Look at the first bytes, then copy in both directions."""
        first = near.recv(DATA_GREETING_BYTES, socket.MSG_PEEK)
        while first and DATA_MAGIC.startswith(first[:4]) and len(first) < DATA_GREETING_BYTES:
            first = near.recv(DATA_GREETING_BYTES, socket.MSG_PEEK)
        if first[:4] == DATA_MAGIC:
            self.data_connections += 1
            far.sendall(self._hear(near.recv(DATA_GREETING_BYTES)))
            copy = self._copy_records
        else:
            copy = self._copy
        other = self._start(copy, near, far, "in")
        try:
            copy(far, near, "out")
        finally:
            other.join()
            near.close()
            far.close()
            self._open -= {near, far}

    def _copy(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        try:
            while received := source.recv(_READ_BYTES):
                sink.sendall(self._hear(received))
        finally:
            _shut(source, sink)

    def _copy_records(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        try:
            for number, record in enumerate(_records(source)):
                self._hear(record)
                instead = self.attack(direction, number, record)
                if instead is None:
                    _reset(source, sink)
                    return
                for piece in instead:
                    sink.sendall(piece)
        finally:
            _shut(source, sink)

    def _hear(self, received: bytes) -> bytes:
        if not self.forgets:
            with self._lock:
                self.heard.append(received)
        return received

    def _start(self, work: Callable[..., None], *args: object) -> threading.Thread:
        def run() -> None:
            try:
                work(*args)
            except OSError:
                if not self._is_closed and work == self._accept:
                    raise

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread


def _records(source: socket.socket) -> Iterator[bytes]:
    """Yield sealed records, whole; what is left when the connection ends comes last."""
    held = b""
    while True:
        while len(held) < HEADER_BYTES or len(held) < _n_bytes(held):
            received = source.recv(_READ_BYTES)
            if not received:
                if held:
                    yield held
                return
            held += received
        n_bytes = _n_bytes(held)
        yield held[:n_bytes]
        held = held[n_bytes:]


def _n_bytes(held: bytes) -> int:
    return HEADER_BYTES + int(_LENGTH.unpack_from(held)[0]) + TAG_BYTES


def _reset(*socks: socket.socket) -> None:
    """Have connections end with RST once they are closed, and wake up whoever reads them."""
    for sock in socks:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.shutdown(socket.SHUT_RD)


def _shut(*socks: socket.socket) -> None:
    for sock in socks:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
