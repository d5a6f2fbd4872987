"""Bootstraps that say nothing are called, and what is found out is told once and forgotten when it is over."""

import itertools
import random

import pytest
import trio
from trio.testing import MockClock

from mpd.daemon.lookout import MAX_PAUSE_S, Lookout
from mpd.daemon.rendezvous import NO_ANSWER, MemoryBoard, MemoryRendezvous, RendezvousStatus
from mpd.ids import Endpoint, PeerId

SILENT, OTHER = "192.0.2.1:1", "192.0.2.2:2"


class Board(MemoryRendezvous):
    """A rendezvous that reports what a test says."""

    def __init__(self) -> None:
        super().__init__(MemoryBoard(trio.current_time), PeerId(bytes(20)))
        self.states: dict[str, str] = {}

    def snapshot(self) -> RendezvousStatus:
        return RendezvousStatus(0, tuple(self.states.items()))


class Prober:
    def __init__(self) -> None:
        self.called: list[tuple[str, float]] = []
        self.finding = "that daemon belongs to another swarm"

    async def __call__(self, endpoint: Endpoint) -> str:
        self.called.append((str(endpoint), trio.current_time()))
        await trio.sleep(0.1)
        return self.finding


async def test_only_silence_is_looked_into(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    board, prober = Board(), Prober()
    board.states = {SILENT: NO_ANSWER, OTHER: "connected: somebody"}
    lookout = Lookout(board, prober, random.Random(1))
    nursery.start_soon(lookout.run)
    assert lookout.bootstrap() == [(SILENT, NO_ANSWER), (OTHER, "connected: somebody")]
    await trio.sleep(1.5)
    assert [address for address, _ in prober.called] == [SILENT]
    assert lookout.bootstrap()[0] == (SILENT, f"{NO_ANSWER}; that daemon belongs to another swarm")
    assert lookout.bootstrap()[1] == (OTHER, "connected: somebody")
    nursery.cancel_scope.cancel()


async def test_pauses_grow_up_to_a_limit(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    board, prober = Board(), Prober()
    board.states = {SILENT: NO_ANSWER}
    nursery.start_soon(Lookout(board, prober, random.Random(1)).run)
    await trio.sleep(10 * MAX_PAUSE_S)
    times = [at for _, at in prober.called]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses[0] < 4
    assert all(0.7 * MAX_PAUSE_S <= pause <= 1.3 * MAX_PAUSE_S + 2 for pause in pauses[6:])
    assert 12 <= len(times) <= 22
    nursery.cancel_scope.cancel()


async def test_what_is_over_is_forgotten(
    autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    board, prober = Board(), Prober()
    board.states = {SILENT: NO_ANSWER}
    lookout = Lookout(board, prober, random.Random(1))
    nursery.start_soon(lookout.run)
    await trio.sleep(60)
    assert len([record for record in caplog.records if "another swarm" in record.getMessage()]) == 1
    board.states = {SILENT: "connected: somebody"}
    await trio.sleep(2)
    assert lookout.bootstrap() == [(SILENT, "connected: somebody")]
    prober.finding = "Connection refused"
    board.states = {SILENT: NO_ANSWER}
    await trio.sleep(2)
    assert lookout.bootstrap() == [(SILENT, f"{NO_ANSWER}; Connection refused")]
    nursery.cancel_scope.cancel()
