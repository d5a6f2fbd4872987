"""A lifeline against daemons that end, come back, hang, and are not who they were."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
import trio
from client.stub import DaemonThread, Trainers

from mpd import control
from mpd.client import lifeline as lifeline_module
from mpd.client.lifeline import Lifeline
from mpd.client.tensors import register
from mpd.errors import DaemonUnavailable, LocalError
from mpd.ids import PeerId, show_peer

PATIENCE_S = 10.0


def tie(path: Path, trainers: Trainers, *tensors: torch.Tensor, adopt: bool = False) -> Lifeline:
    registered = register(tensors)
    request = control.Attach("run", tuple(each.spec for each in registered), 16, 1, "raw", "mean")
    return Lifeline(path, show_peer(trainers.peer), request, registered, adopt)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.ones(5)


@pytest.fixture
def adopted(path: Path, server: DaemonThread, weight: torch.Tensor) -> Iterator[Lifeline]:
    """A lifeline whose tensor lives in the region of a daemon that has died."""
    line = tie(path, server.trainers, weight, adopt=True)
    server.stop()
    yield line
    line.attachment.close()


class Clock(SimpleNamespace):
    """Time in which sleeping is instant, and something may happen during the first sleep."""

    def __init__(self, meanwhile: object = None) -> None:
        super().__init__(now_s=0.0, meanwhile=meanwhile, sleeps=0)

    def monotonic(self) -> float:
        return float(self.now_s)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.sleeps += 1
        if callable(self.meanwhile) and self.sleeps == 1:
            self.meanwhile()


def test_an_attachment_that_holds_is_kept(path: Path, server: DaemonThread, weight: torch.Tensor) -> None:
    line = tie(path, server.trainers, weight)
    before = line.attachment
    line.ensure(PATIENCE_S, PATIENCE_S, waits=True)
    assert line.attachment is before
    before.close()


def test_a_daemon_that_is_being_restarted_is_waited_for(
    path: Path, adopted: Lifeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DaemonThread(path, Trainers(3.0), starts=False) as back:
        clock = Clock(back.start)
        monkeypatch.setattr(lifeline_module, "time", clock)
        adopted.ensure(PATIENCE_S, PATIENCE_S, waits=True)
        assert clock.sleeps == 1
        assert adopted.attachment.is_open
        assert [terms.group_size for terms in back.trainers.terms] == [16]


def test_an_outage_is_waited_for_once(path: Path, adopted: Lifeline, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(lifeline_module, "time", clock)
    for waits, waited_s in ((False, 0.0), (True, lifeline_module.RETURN_S), (True, 0.0)):
        began_s = clock.now_s
        with pytest.raises(DaemonUnavailable, match="no daemon answers"):
            adopted.ensure(PATIENCE_S, PATIENCE_S, waits)
        assert abs(clock.now_s - began_s - waited_s) < 0.1
    trainers = Trainers(3.0)
    with DaemonThread(path, trainers):
        adopted.ensure(PATIENCE_S, PATIENCE_S, waits=False)
    began_s = clock.now_s
    with pytest.raises(DaemonUnavailable):
        adopted.ensure(0.5, PATIENCE_S, waits=True)  # the next outage, and less time than it might take
    assert 0.4 < clock.now_s - began_s <= 0.5


def test_a_daemon_that_says_nothing_costs_a_moment(
    path: Path, adopted: Lifeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifeline_module, "GREETING_S", 0.01)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        for _ in range(3):  # the queue is full soon
            began_s = time.monotonic()
            with pytest.raises(DaemonUnavailable):
                adopted.ensure(PATIENCE_S, PATIENCE_S, waits=False)
            assert time.monotonic() - began_s < PATIENCE_S / 2


def test_memory_that_takes_too_long_is_given_up(path: Path, adopted: Lifeline) -> None:
    class Slow(Trainers):
        async def attach(self, request: control.Attach, label: str) -> NoReturn:
            await trio.sleep_forever()

    with DaemonThread(path, Slow()), pytest.raises(DaemonUnavailable, match=r"has not answered for 0\.05 s"):
        adopted.ensure(PATIENCE_S, 0.05, waits=False)


def test_another_peer_at_the_socket_is_refused(path: Path, adopted: Lifeline, weight: torch.Tensor) -> None:
    other = Trainers(3.0)
    other.peer = PeerId(bytes(20))
    with (
        DaemonThread(path, other),
        pytest.raises(LocalError, match=f"is peer {show_peer(other.peer)} now, it was .*: if that is meant, connect"),
    ):
        adopted.ensure(PATIENCE_S, PATIENCE_S, waits=True)
    assert other.seats == []
    with DaemonThread(path, Trainers(3.0)):
        adopted.ensure(PATIENCE_S, PATIENCE_S, waits=True)
        assert adopted.attachment.is_open


def test_a_daemon_that_refuses_says_why(path: Path, adopted: Lifeline) -> None:
    class Refusing(Trainers):
        async def attach(self, request: control.Attach, label: str) -> NoReturn:
            raise LocalError("run 'run' is in use on this daemon with other terms: group_size is 8 here, 16 there")

    with DaemonThread(path, Refusing()), pytest.raises(LocalError, match="group_size is 8 here"):
        adopted.ensure(PATIENCE_S, PATIENCE_S, waits=True)


def test_adopted_tensors_are_not_moved_twice(path: Path, adopted: Lifeline, weight: torch.Tensor) -> None:
    place, view = weight.data_ptr(), weight.view(-1)
    weight += 1
    trainers = Trainers(3.0)
    with DaemonThread(path, trainers):
        adopted.ensure(PATIENCE_S, PATIENCE_S, waits=True)
        assert not adopted.is_shared
        assert adopted.misplaced() is None
        for train_on in (False, True):
            source, windows = adopted.hand_over(train_on, PATIENCE_S)
            assert source == "in"
            assert windows[0].tolist() == [2.0] * 5
        adopted.attachment.close()
    assert trainers.seats[0].snapshots == []
    assert weight.data_ptr() == place
    view += 1
    assert weight.tolist() == [3.0] * 5
