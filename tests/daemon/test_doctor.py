"""A daemon examines itself: whom it asks, how long it waits, and what becomes of the answers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from fake_peers import peer
from trio.testing import MockClock

from mpd.config import DaemonConfig, NetConfig
from mpd.daemon import doctor as doctor_module
from mpd.daemon.budgets import Budgets
from mpd.daemon.dial_back import DialBacks
from mpd.daemon.doctor import ANSWER_S, DISK_S, Doctor, Patient
from mpd.daemon.rendezvous import RendezvousStatus
from mpd.doctor import Bootstrap, Rounds
from mpd.errors import LocalError
from mpd.findings import OK, PROBLEM, WARNING, Disk, Finding
from mpd.ids import Endpoint, show_peer
from mpd.messages import DialBack, DialledBack

HERE = Endpoint("192.0.2.1", 4747)


class Link:
    """A peer that answers as it is told to; `answer` None: never."""

    def __init__(self, number: int, book: DialBacks, answer: bool | None, clock_ahead_s: float = 0.0) -> None:
        self.peer, self.remote_host, self.clock_ahead_s, self.up = (
            peer(number),
            f"192.0.2.{number}",
            clock_ahead_s,
            True,
        )
        self._book, self._answer = book, answer
        self.said: list[Any] = []

    def send(self, message: Any) -> None:
        self.said.append(message)
        if self._answer is not None:
            self._book.on_answer(self, DialledBack(self._answer, "192.0.2.1"))  # type: ignore[arg-type]


class Peers:
    """As much of `Peers` as an examination needs."""

    def __init__(self) -> None:
        self.endpoint, self.n_called = HERE, 0
        self.up: list[Link] = []
        self.called: list[Any] = []
        self.next: Link | None = None

    def links(self) -> list[Link]:
        return self.up

    async def link(self, wanted: Any, endpoint: Endpoint) -> None:
        self.called.append((wanted, endpoint))
        if self.next is not None:
            self.up.append(self.next)


class Ward:
    """One daemon on paper, and its doctor."""

    def __init__(self, tmp_path: Path) -> None:
        self.peers, self.book = Peers(), DialBacks()
        self.status = RendezvousStatus(peers=2, unasked=1)
        self.swarm = SimpleNamespace(
            status=lambda: {"open": True, "name": "", "role": "member", "expires_in_s": 0}, bootstrap=lambda: ()
        )
        self.problem = ""
        config = DaemonConfig(tmp_path / "mpd.sock", tmp_path, NetConfig(bootstrap=(Endpoint("192.0.2.9", 1),)))
        patient: Any = Patient(
            config=config,
            swarm=self.swarm,  # type: ignore[arg-type]
            budgets=Budgets(),
            rendezvous=SimpleNamespace(snapshot=lambda: self.status),  # type: ignore[arg-type]
            peers=self.peers,  # type: ignore[arg-type]
            dial_backs=self.book,
            wall_ms=lambda: 0,
            run_facts=lambda: [Rounds("run", 3, 3, 3)],
            held_bytes=lambda: 100,
            problem=lambda: self.problem,
        )
        self.doctor = Doctor(patient)


@pytest.fixture
def ward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ward:
    async def look_out(addresses: list[Endpoint], *others: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return [Bootstrap(str(address), True, True) for address in addresses], [(show_peer(peer(1)), 0.2)]

    async def run_sync(function: Any, *args: Any, abandon_on_cancel: bool = False) -> Any:
        await trio.lowlevel.checkpoint()
        return Disk(str(args[0]), True, "", 1 << 40, True)

    monkeypatch.setattr(doctor_module, "look_out", look_out)
    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    return Ward(tmp_path)


def only(findings: list[Finding], check: str) -> Finding:
    (finding,) = [each for each in findings if each.check == check]
    return finding


async def test_peers_are_asked_to_dial_back_one_of_each_host_first(ward: Ward, autojump_clock: MockClock) -> None:
    ward.peers.up = [Link(number, ward.book, True) for number in range(1, 6)]
    for link in ward.peers.up[:3]:
        link.remote_host = "192.0.2.50"
    finding = only(await ward.doctor.examine(), "reachable")
    assert (finding.verdict, finding.says) == (OK, f"3 peers dialled back at {HERE}")
    assert [bool(link.said) for link in ward.peers.up] == [True, False, False, True, True]
    assert ward.peers.up[0].said == [DialBack(4747)]


async def test_who_does_not_answer_is_not_waited_for(ward: Ward, autojump_clock: MockClock) -> None:
    ward.peers.up = [Link(1, ward.book, None), Link(2, ward.book, False)]
    began = trio.current_time()
    finding = only(await ward.doctor.examine(), "reachable")
    assert trio.current_time() - began <= ANSWER_S
    assert (finding.verdict, finding.says) == (PROBLEM, f"{show_peer(peer(2))[:8]}.. could not dial 192.0.2.1:4747")


async def test_with_nobody_linked_a_bootstrap_is_called(ward: Ward, autojump_clock: MockClock) -> None:
    ward.status = RendezvousStatus(
        2, (("192.0.2.8:1", "no answer"), ("192.0.2.9:1", f"connected: {show_peer(peer(3))}"))
    )
    ward.peers.next = Link(3, ward.book, True)
    finding = only(await ward.doctor.examine(), "reachable")
    assert ward.peers.called == [(peer(3), Endpoint("192.0.2.9", 1))]
    assert finding.verdict == OK


async def test_a_daemon_that_accepts_no_connections_asks_nobody(ward: Ward, autojump_clock: MockClock) -> None:
    ward.peers.endpoint = Endpoint("127.0.0.1", 0)
    ward.peers.up = [Link(1, ward.book, True)]
    assert only(await ward.doctor.examine(), "reachable").verdict == OK
    assert ward.peers.up[0].said == []


async def test_all_that_is_known_is_judged(ward: Ward, autojump_clock: MockClock) -> None:
    ward.status = RendezvousStatus(2, problem="clocks differ", clock="clocks differ")
    ward.problem = "the certificate cannot be renewed"
    findings = await ward.doctor.examine(["192.0.2.7:5"])
    assert [each.says for each in findings if each.check == "bootstrap"] == [
        "192.0.2.7:5 answers by TCP and UDP",
        "192.0.2.9:1 answers by TCP and UDP",
    ]
    assert only(findings, "swarm").says == "the certificate cannot be renewed"
    assert only(findings, "DHT").verdict == OK  # of the clock another finding tells
    assert only(findings, "rounds").verdict == OK
    assert only(findings, "limits").verdict in (OK, WARNING)


async def test_a_clock_that_was_looked_at_counts_before_an_old_link(ward: Ward, autojump_clock: MockClock) -> None:
    ward.peers.up = [Link(1, ward.book, True, clock_ahead_s=400.0)]
    assert only(await ward.doctor.examine(), "clock").says == "agrees with 1 peer within 0.2 s"
    ward.peers.up = [Link(2, ward.book, True, clock_ahead_s=400.0)]
    assert "is 400 s ahead of this machine's" in only(await ward.doctor.examine(), "clock").says


async def test_one_examination_at_a_time(ward: Ward, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    ward.peers.up = [Link(1, ward.book, None)]
    nursery.start_soon(ward.doctor.examine)
    await trio.sleep(1.0)
    with pytest.raises(LocalError, match="being examined already"):
        await ward.doctor.examine()
    await trio.sleep(ANSWER_S)
    ward.peers.up = []
    assert await ward.doctor.examine()
    with pytest.raises(LocalError):
        await ward.doctor.examine(["no port"])


async def test_a_disk_that_hangs_holds_nobody_up(
    ward: Ward, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(function: Any, *args: Any, abandon_on_cancel: bool = False) -> Any:
        assert abandon_on_cancel
        await trio.sleep_forever()

    monkeypatch.setattr(trio.to_thread, "run_sync", hang)
    finding = only(await ward.doctor.examine(), "disk")
    assert (finding.verdict, trio.current_time() > 0) == (PROBLEM, True)
    assert f"more than {DISK_S:g} s" in finding.says
