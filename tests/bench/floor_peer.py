"""The floor under any step: the same bytes between the same number of processes, and nothing else.

A bare butterfly in one thread per peer: pieces to whoever reduces them, sums, results to everybody, over one TCP
connection per pair, in chunks that stay in the cache. No group to be found, nobody who may fail, no protocol: what
comes next on a connection is known beforehand. What is left is the memory traffic that no implementation on this
machine can avoid: the kernel's two copies of each byte, the reduction, sealing and opening, and the copies that a
variant has.

Variants: "plain" and "sealed", each "adopt" (one copy: the result back) or "copies" (the vector in, the result back).
"""

import selectors
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from peer import serve

from mpd.seal import AES_GCM, RANDOM_BYTES, TAG_BYTES, derive

CHUNK_BYTES = 1 << 20
Vector = npt.NDArray[np.float32]


class Pair:
    """The connection to one other peer: what is still to be sent, and where what comes is to lie."""

    def __init__(self, sock: socket.socket, dialled: bool) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")  # as mpd does on one host
        sock.setblocking(False)
        self.sock = sock
        i2a, a2i = derive(bytes(RANDOM_BYTES), bytes(RANDOM_BYTES), bytes(32), AES_GCM)
        self._tx, self._rx = (i2a, a2i) if dialled else (a2i, i2a)
        self._tx_stage = memoryview(bytearray(CHUNK_BYTES + TAG_BYTES))
        self._rx_stage = memoryview(bytearray(CHUNK_BYTES + TAG_BYTES))
        self.outgoing: deque[memoryview] = deque()
        self._sending = memoryview(b"")
        self._got = 0

    def send(self, is_sealed: bool) -> bool:
        """Send as much as the kernel takes; return whether nothing is left."""
        while self._sending or self.outgoing:
            if not self._sending:
                self._sending = self.outgoing.popleft()
                if is_sealed:
                    n = self._tx.seal_into(b"", self._sending, self._tx_stage[: len(self._sending) + TAG_BYTES])
                    self._sending = self._tx_stage[:n]
            try:
                self._sending = self._sending[self.sock.send(self._sending) :]
            except BlockingIOError:
                return False
        return True

    def receive(self, target: memoryview, is_piece: bool, is_sealed: bool) -> memoryview | None:
        """Receive the next record, a piece beside and a result to `target`; return it once it is complete."""
        stage = self._rx_stage[: len(target) + (TAG_BYTES if is_sealed else 0)]
        into = stage if is_sealed or is_piece else target
        while self._got < len(into):
            try:
                n = self.sock.recv_into(into[self._got :])
            except BlockingIOError:
                return None
            if not n:
                raise ConnectionError("another peer has ended")
            self._got += n
        self._got = 0
        if is_sealed:
            into = stage[:-TAG_BYTES] if is_piece else target
            self._rx.open_into(b"", stage, into)
        return into


class Floor:
    """One peer of `n`; all of them meet in `folder`."""

    def __init__(self, rank: int, n: int, folder: Path) -> None:
        self._rank, self._n = rank, n
        self._pairs = meet(rank, n, folder)
        self._runs: dict[str, tuple[str, Vector, Vector, Vector]] = {}  # variant, vector, what is sent, result

    def open(self, run: str, variant: str, n_elems: int, group_size: int) -> None:
        vector = np.zeros(n_elems, np.float32)
        self._runs[run] = (
            variant,
            vector,
            np.zeros_like(vector) if "copies" in variant else vector,
            np.zeros_like(vector),
        )

    def fill(self, run: str, value: float) -> None:
        self._runs[run][1].fill(value)

    def step(self, run: str) -> dict[str, Any]:
        variant, vector, source, result = self._runs[run]
        if source is not vector:
            np.copyto(source, vector)
        self._butterfly(source, result, "sealed" in variant)
        np.copyto(vector, result)
        return {}

    def ends(self, run: str) -> tuple[float, float]:
        vector = self._runs[run][1]
        return float(vector[0]), float(vector[-1])

    def train(self, run: str, at: float, seconds: float, average: bool) -> dict[str, Any]:
        raise NotImplementedError("only mpd averages while its trainer trains")

    def close(self, run: str) -> None:
        del self._runs[run]

    def _butterfly(self, source: Vector, result: Vector, is_sealed: bool) -> None:
        mine = self._chunks(source, self._rank)
        sums = [np.array(source[chunk]) for chunk in mine]
        waiting = [self._n - 1] * len(mine)
        incoming: dict[int, Iterator[tuple[int, slice]]] = {}
        expected: dict[int, tuple[int, slice] | None] = {}
        with selectors.DefaultSelector() as selector:
            for other, pair in self._pairs.items():
                pair.outgoing.extend(_bytes_of(source[chunk]) for chunk in self._chunks(source, other))
                # From each peer come its pieces of my shard, in order, and then the results of its own.
                incoming[other] = iter([*enumerate(mine), *((-1, chunk) for chunk in self._chunks(source, other))])
                expected[other] = next(incoming[other], None)
                selector.register(pair.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, other)

            def close(number: int) -> None:
                mean = result[mine[number]]
                np.divide(sums[number], self._n, out=mean)
                for other, pair in self._pairs.items():
                    pair.outgoing.append(_bytes_of(mean))
                    selector.modify(pair.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, other)

            while selector.get_map():
                for key, ready in selector.select():
                    other, pair = key.data, self._pairs[key.data]
                    if ready & selectors.EVENT_READ and (record := expected[other]) is not None:
                        number, chunk = record
                        payload = pair.receive(_bytes_of(result[chunk]), number >= 0, is_sealed)
                        if payload is not None:
                            expected[other] = next(incoming[other], None)
                            if number >= 0:
                                sums[number] += np.frombuffer(payload, np.float32)
                                waiting[number] -= 1
                                if not waiting[number]:
                                    close(number)
                    is_sent = pair.send(is_sealed)
                    wants = (selectors.EVENT_READ if expected[other] is not None else 0) | (
                        0 if is_sent else selectors.EVENT_WRITE
                    )
                    if wants:
                        selector.modify(pair.sock, wants, other)
                    elif not any(waiting):  # else results are still to be sent
                        selector.unregister(pair.sock)
                    else:
                        selector.modify(pair.sock, selectors.EVENT_READ, other)

    def _chunks(self, vector: Vector, owner: int) -> list[slice]:
        """Return the chunks of one peer's shard."""
        size, per_chunk = len(vector), CHUNK_BYTES // vector.itemsize
        begin, end = (size * rank // self._n for rank in (owner, owner + 1))
        return [slice(at, min(at + per_chunk, end)) for at in range(begin, end, per_chunk)]


def meet(rank: int, n: int, folder: Path) -> dict[int, Pair]:
    """Connect to every other peer: the higher rank dials."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        port_file = folder / f"floor{rank}"
        port_file.with_suffix(".new").write_text(str(door.getsockname()[1]))
        port_file.with_suffix(".new").rename(port_file)
        pairs = {}
        for other in range(rank):
            while not (folder / f"floor{other}").exists():
                time.sleep(0.01)
            sock = socket.create_connection(("127.0.0.1", int((folder / f"floor{other}").read_text())))
            sock.sendall(bytes([rank]))
            pairs[other] = Pair(sock, dialled=True)
        for _ in range(rank + 1, n):
            sock = door.accept()[0]
            other = sock.recv(1)[0]
            pairs[other] = Pair(sock, dialled=False)
    return pairs


def _bytes_of(values: Vector) -> memoryview:
    return memoryview(values).cast("B")


if __name__ == "__main__":
    serve(Floor(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
