"""A daemon for client tests: the real server for the local socket, in a thread, with stand-ins behind it.

Strategy: seats really average. The other peers of the swarm are numbers: a peer `3.0` contributes a vector full of
threes with weight 1. What a step does besides is data: each one takes the next word from `Trainers.plan`.
"""

import collections
import contextlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import trio

from mpd import control
from mpd.daemon.budgets import Budgets
from mpd.daemon.clients import lock_socket, serve_clients
from mpd.daemon.memory import OutRegion, Region
from mpd.errors import LocalError
from mpd.ids import PeerId
from mpd.layout import Layout, Segment, Terms

T = TypeVar("T")


class Seat:
    """One attached trainer and its averages."""

    def __init__(
        self, trainers: "Trainers", layout: Layout, label: str, in_region: Region, out_region: OutRegion
    ) -> None:
        self.label = label
        self.layout = layout
        self.in_region = in_region
        self.out_region = out_region
        self.snapshots: list[Region] = []
        self.steps: list[control.Step] = []
        self.loads: list[control.LoadState] = []
        self.loaded: OutRegion | None = None
        self.released: list[int] = []
        self.closed = threading.Event()
        self._trainers = trainers
        self._generation = 0

    async def open_snapshot(self) -> Region:
        self.snapshots.append(await Region.make(self.layout.n_bytes))
        return self.snapshots[-1]

    async def step(self, request: control.Step) -> control.Stepped:
        trainers = self._trainers
        self.steps.append(request)
        what = trainers.plan.popleft() if trainers.plan else "average"
        trainers.entered.set()
        if what == "wait":
            await trainers.gate.wait()
        elif what == "hang":
            await trio.sleep_forever()
        elif what == "refuse":
            raise LocalError("this step is refused")
        elif what == "fail":
            return control.Stepped(request.seq, averaged=False, reason="nobody else came")
        if what == "new out":
            self.out_region.close()
            self.out_region = OutRegion(self.layout.n_bytes)
        source = self.in_region if request.source == "in" else self.snapshots[-1]
        for segment in self.layout.segments:
            self._average(segment, source.view, request.weight)
        self._generation += 1
        self.out_region.publish(self._generation + (what == "lie"))
        return control.Stepped(
            request.seq,
            averaged=True,
            reason="all were there",
            contributors=("me", "you"),
            missing={"them": "came too late"},
            rounds=1,
            generation=self._generation,
            new_out=what == "new out",
        )

    async def load_state(self, request: control.LoadState) -> tuple[control.StateLoaded, OutRegion | None]:
        trainers = self._trainers
        self.loads.append(request)
        what = trainers.plan.popleft() if trainers.plan else "load"
        trainers.entered.set()
        if what == "hang":
            await trio.sleep_forever()
        elif what == "refuse":
            raise LocalError("this load is refused")
        elif what == "fail":
            return control.StateLoaded(request.seq, loaded=False, reason="nobody holds a state"), None
        self.loaded = region = OutRegion(self.layout.n_bytes)
        for segment in self.layout.segments:
            write(region.view, segment, np.full(segment.n_elems, 7.0))
        region.publish(1 + (what == "lie"))
        return (
            control.StateLoaded(
                request.seq,
                loaded=True,
                reason="from two",
                number=12,
                metadata=b"epoch 7",
                sources=("you", "them"),
                generation=1,
            ),
            region,
        )

    def release(self, seq: int) -> None:
        self.released.append(seq)

    def close(self) -> None:
        for region in (self.in_region, self.out_region, *self.snapshots, self.loaded):
            if region is not None:
                region.close()
        self.closed.set()

    def _average(self, segment: Segment, source: memoryview, weight: float) -> None:
        total = read(source, segment) * weight
        for value in self._trainers.others:
            total += value
        write(self.out_region.view, segment, total / (weight + len(self._trainers.others)))


class Trainers:
    """What the server serves. `others` are the other peers, `plan` what the next steps do."""

    def __init__(self, *others: float) -> None:
        self.peer = PeerId(bytes(range(20)))
        self.others = others
        self.plan: collections.deque[str] = collections.deque()
        self.seats: list[Seat] = []
        self.terms: list[Terms] = []  # of each seat
        self.entered = threading.Event()  # a step has begun
        self.gate = trio.Event()  # ends a step that waits
        self.left = trio.Event()

    async def attach(self, request: control.Attach, label: str) -> Seat:
        terms = Terms(Layout(request.tensors), request.group_size, request.rounds, request.codec, request.aggregate)
        if request.run == "taken":
            raise LocalError("run 'taken' has other terms: group_size is 16 here, 8 there")
        self.terms.append(terms)
        n_bytes = terms.layout.n_bytes
        regions = await Region.make(n_bytes), await OutRegion.make(n_bytes)
        self.seats.append(Seat(self, terms.layout, label, *regions))
        return self.seats[-1]

    def query(self, query: control.Query) -> str:
        if query.what not in ("status", "rounds", "peers"):
            raise LocalError(f"{query.what!r} is no question")
        return json.dumps({"what": query.what, "run": query.run, "last": query.last})

    async def examine(self, request: control.Examine) -> str:
        return json.dumps([{"check": "bootstrap", "says": address} for address in request.bootstrap])

    def leave(self) -> None:
        self.left.set()


class DaemonThread:
    """`serve_clients` at `path`, in a thread of its own, from `start` until `stop` or the end of the block.

    Entering the block starts it, unless it is told otherwise.
    """

    def __init__(self, path: Path, trainers: Trainers, starts: bool = True) -> None:
        self.trainers = trainers
        self._starts = starts
        self._path = path
        self._started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function` in the daemon's thread."""
        return trio.from_thread.run_sync(function, *args, trio_token=self._token)

    def stop(self) -> None:
        """Stop like a daemon that dies: connections just end."""
        with contextlib.suppress(trio.RunFinishedError):
            self.call(self._scope.cancel)
        self._thread.join()

    def start(self) -> None:
        """Return once the socket answers."""
        self._thread.start()
        assert self._started.wait(10)

    def __enter__(self) -> Self:
        if self._starts:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with contextlib.ExitStack() as farewells, lock_socket(self._path), trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_clients, self._path, self.trainers, farewells, Budgets())
                self._started.set()
                await self.trainers.left.wait()
                nursery.cancel_scope.cancel()


def read(region: memoryview, segment: Segment) -> np.ndarray:
    """Return the values of `segment` as float64."""
    raw = np.frombuffer(region, np.uint8, segment.n_bytes, segment.offset)
    if segment.dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view(segment.dtype).astype(np.float64)


def write(region: memoryview, segment: Segment, values: np.ndarray) -> None:
    """Write `values` as `segment`, whose dtype must be able to hold them exactly (bfloat16 is cut off)."""
    raw = np.frombuffer(region, np.uint8, segment.n_bytes, segment.offset)
    if segment.dtype == "bfloat16":
        raw.view(np.uint16)[:] = values.astype(np.float32).view(np.uint32) >> 16
    else:
        raw.view(segment.dtype)[:] = values
