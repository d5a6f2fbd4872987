"""Bootstrap entries that answer, do not, or make no sense; and the file of known peers in every state of repair."""

import asyncio
import json
import random
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpd.daemon import dht_bootstrap
from mpd.daemon.dht_bootstrap import Bootstrap, KnownPeer, KnownPeers, load_known_peers, resolve, save_known_peers
from mpd.ids import Endpoint

ME, YOU = b"m" * 20, b"y" * 20
V4 = socket.AF_INET


# names


def test_a_numeric_address_is_itself() -> None:
    assert asyncio.run(resolve(Endpoint("192.0.2.7", 4747), V4)) == [("192.0.2.7", 4747)]


def test_a_name_is_resolved_in_a_thread_that_ends() -> None:
    assert asyncio.run(resolve(Endpoint("localhost", 4747), V4)) == [("127.0.0.1", 4747)]
    for thread in threading.enumerate():
        if thread.name == "mpd-resolve":
            thread.join(5)
            assert not thread.is_alive()


def test_a_v6_socket_asks_both_families() -> None:
    assert asyncio.run(resolve(Endpoint("192.0.2.7", 4747), socket.AF_INET6)) == [("192.0.2.7", 4747)]
    assert asyncio.run(resolve(Endpoint("2001:db8::7", 4747), socket.AF_INET6)) == [("2001:db8::7", 4747)]


@pytest.mark.parametrize(
    "entry",
    [
        Endpoint("no-such-host.invalid", 4747),
        Endpoint("0.0.0.0", 4747),
        Endpoint("2001:db8::7", 4747),
        Endpoint("127.0.0.1", 0),
    ],
)
def test_what_cannot_be_reached_is_an_os_error(entry: Endpoint) -> None:
    with pytest.raises(OSError, match=r".+"):
        asyncio.run(resolve(entry, V4))


# entries


class Net:
    """Who lives where. Everything asked is written down; `asked_enough` fires at the given number of questions."""

    def __init__(self, alive: dict[tuple[str, int], bytes], enough: int = 1) -> None:
        self.alive = alive
        self.asked: list[tuple[str, int]] = []
        self.enough = enough
        self.asked_enough = asyncio.Event()

    def ping(self, address: tuple[str, int]) -> "asyncio.Future[Any]":
        self.asked.append(address)
        if len(self.asked) >= self.enough:
            self.asked_enough.set()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        node_id = self.alive.get(address)
        answer.set_result(None if node_id is None else SimpleNamespace(sender=node_id))
        return answer


async def states_of(entries: list[Endpoint], net: Net) -> dict[str, str]:
    """Ask `entries` until each has a verdict."""
    settled = asyncio.Event()

    def changed() -> None:
        if len(bootstrap.states) == len(entries) and "not asked yet" not in bootstrap.states.values():
            settled.set()

    bootstrap = Bootstrap(ME, net.ping, changed, random.Random(1))
    tasks = [asyncio.ensure_future(bootstrap.keep_asking(entry, V4)) for entry in entries]
    await asyncio.wait_for(settled.wait(), 5)
    for task in tasks:
        task.cancel()
    return bootstrap.states


def test_every_entry_has_its_own_verdict() -> None:
    entries = [Endpoint("192.0.2.1", 1), Endpoint("192.0.2.2", 2), Endpoint("192.0.2.3", 3), Endpoint("2001:db8::7", 4)]

    async def run() -> dict[str, str]:
        return await states_of(entries, Net({("192.0.2.1", 1): YOU, ("192.0.2.2", 2): ME}))

    states = asyncio.run(run())
    assert states["192.0.2.1:1"] == "connected: pf4xs6lzpf4xs6lzpf4xs6lzpf4xs6lz"
    assert states["192.0.2.2:2"] == "this is our own address"
    assert states["192.0.2.3:3"] == "unreachable: no answer"
    assert states["[2001:db8::7]:4"].startswith("cannot resolve name: ")


def test_it_is_a_problem_only_when_every_entry_has_failed() -> None:
    async def run() -> Bootstrap:
        return Bootstrap(ME, Net({}).ping, lambda: None, random.Random(1))

    bootstrap = asyncio.run(run())
    assert bootstrap.problem == ""
    for states, is_problem in (
        (["not asked yet"], False),
        (["unreachable: no answer", "not asked yet"], False),
        (["unreachable: no answer", "connected: someone"], False),
        (["unreachable: no answer", "this is our own address"], False),
        (["unreachable: no answer", "cannot resolve name: no such host"], True),
    ):
        bootstrap.states = {str(i): state for i, state in enumerate(states)}
        assert bool(bootstrap.problem) == is_problem, states


def test_a_silent_entry_is_asked_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_bootstrap, "MIN_PAUSE_S", 0.001)
    monkeypatch.setattr(dht_bootstrap, "MAX_PAUSE_S", 0.004)
    entry = Endpoint("192.0.2.1", 1)

    async def run() -> list[str]:
        net = Net({}, enough=5)
        seen: list[str] = []
        done = asyncio.Event()

        def changed() -> None:
            seen.append(bootstrap.states[str(entry)])
            if seen[-1].startswith("connected"):
                done.set()

        bootstrap = Bootstrap(ME, net.ping, changed, random.Random(1))
        task = asyncio.ensure_future(bootstrap.keep_asking(entry, V4))
        await asyncio.wait_for(net.asked_enough.wait(), 5)
        net.alive["192.0.2.1", 1] = YOU
        await asyncio.wait_for(done.wait(), 5)
        task.cancel()
        return seen

    assert [state.partition(":")[0] for state in asyncio.run(run())] == ["not asked yet", "unreachable", "connected"]


def test_pauses_double_up_to_a_cap() -> None:
    async def run() -> list[float]:
        pauses: list[float] = []
        net = Net({})
        bootstrap = Bootstrap(ME, net.ping, lambda: None, random.Random(1))

        async def pause(pause_s: float) -> None:
            pauses.append(pause_s)
            if len(pauses) == 8:
                raise asyncio.CancelledError

        bootstrap._pause = pause  # type: ignore[method-assign]
        with pytest.raises(asyncio.CancelledError):
            await bootstrap.keep_asking(Endpoint("192.0.2.1", 1), V4)
        return pauses

    assert asyncio.run(run()) == [0.25, 0.5, 1, 2, 4, 8, 10, 10]


def test_losing_everybody_cuts_the_pause_short() -> None:
    async def run() -> int:
        net = Net({("192.0.2.1", 1): YOU}, enough=2)
        connected = asyncio.Event()
        bootstrap = Bootstrap(ME, net.ping, lambda: connected.set() if net.asked else None, random.Random(1))
        task = asyncio.ensure_future(bootstrap.keep_asking(Endpoint("192.0.2.1", 1), V4))
        await connected.wait()
        while not net.asked_enough.is_set():
            bootstrap.wake()
            await asyncio.wait([asyncio.ensure_future(asyncio.to_thread(int))])
        task.cancel()
        return len(net.asked)

    assert asyncio.run(asyncio.wait_for(run(), 5)) == 2


def test_known_peers_are_asked_until_somebody_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_bootstrap, "MIN_PAUSE_S", 0.001)
    peers: list[KnownPeer] = [("192.0.2.1", 1, YOU), ("192.0.2.2", 2, YOU)]

    async def run() -> list[tuple[str, int]]:
        net = Net({})
        bootstrap = Bootstrap(ME, net.ping, lambda: None, random.Random(1))
        await asyncio.wait_for(bootstrap.ask_known(peers, lambda: len(net.asked) // 6), 5)
        return net.asked

    assert asyncio.run(run()) == [("192.0.2.1", 1), ("192.0.2.2", 2)] * 3


# the file


def test_known_peers_come_back(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    assert load_known_peers(path) == []
    save_known_peers(path, [("192.0.2.1", 1, YOU), ("2001:db8::7", 65535, ME)])
    assert load_known_peers(path) == [("192.0.2.1", 1, YOU), ("2001:db8::7", 65535, ME)]
    assert [each.name for each in tmp_path.iterdir()] == ["peers.json"]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"{",
        b"\x80\x04K\x07.",
        b"7",
        b"{}x",
        b'{"a": 1}',
        b"[[]]",
        b"[7]",
        b"[" * 100_000,
        json.dumps([["192.0.2.1", "1", YOU.hex()]]).encode(),
        json.dumps([["192.0.2.1", 0, YOU.hex()]]).encode(),
        json.dumps([["192.0.2.1", True, YOU.hex()]]).encode(),
        json.dumps([["a.name.example", 1, YOU.hex()]]).encode(),
        json.dumps([[["192.0.2.1"], 1, YOU.hex()]]).encode(),
        json.dumps([["192.0.2.1", 1, "00"]]).encode(),
    ],
)
def test_a_junk_file_is_reported_and_harmless(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "peers.json"
    path.write_bytes(junk)
    problems: list[str] = []
    assert KnownPeers(path, problems.append).load() == []
    assert problems == [f"known peers not read: {path} is not a list of known peers"]


def test_an_unreadable_or_unwritable_file_is_reported_and_harmless(tmp_path: Path) -> None:
    problems: list[str] = []
    path = tmp_path / "a file" / "peers.json"
    path.parent.write_text("not a directory")
    known = KnownPeers(path, problems.append)
    assert known.load() == []
    asyncio.run(known.save([("192.0.2.1", 1, YOU)]))
    assert [problem.partition(":")[0] for problem in problems] == ["known peers not read", "known peers not saved"]
    path.parent.unlink()
    path.parent.mkdir()
    asyncio.run(known.save([("192.0.2.1", 1, YOU)]))
    assert problems[-1] == ""


def test_only_changes_are_written_and_nothing_never_is(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    known = KnownPeers(path, lambda problem: None)
    asyncio.run(known.save([("192.0.2.2", 2, ME), ("192.0.2.1", 1, YOU)]))
    path.write_text("untouched")
    asyncio.run(known.save([("192.0.2.1", 1, YOU), ("192.0.2.2", 2, ME)]))
    asyncio.run(known.save([]))
    assert path.read_text() == "untouched"
    asyncio.run(known.save([("192.0.2.1", 1, YOU)]))
    assert load_known_peers(path) == [("192.0.2.1", 1, YOU)]


def test_without_a_file_nothing_is_kept() -> None:
    known = KnownPeers(None, lambda problem: pytest.fail(problem))
    asyncio.run(known.save([("192.0.2.1", 1, YOU)]))
    assert known.load() == []


def test_what_need_not_be_written_any_more_is_no_problem(tmp_path: Path) -> None:
    path, problems = tmp_path / "folder" / "peers.json", list[str]()
    known, one, two = KnownPeers(path, problems.append), ("192.0.2.1", 1, YOU), ("192.0.2.2", 2, ME)
    path.parent.mkdir()
    asyncio.run(known.save([one]))
    path.parent.rename(tmp_path / "elsewhere")
    asyncio.run(known.save([one, two]))
    assert problems[-1].startswith("known peers not saved")
    asyncio.run(known.save([one]))
    assert problems[-1] == ""
