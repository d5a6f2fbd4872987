"""Whole daemons in this process: real sockets, real shared memory, real DHT threads, and nothing left when they end.

Questions are asked by the real client in worker threads. Time is real, so nothing is slept for: whatever takes a while
is asked for again until it is so.
"""

import contextlib
import gc
import os
import signal
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import trio
from swarm_helpers import fill_disk

import mpd
from mpd.client import Daemon, Outcome, connect
from mpd.config import DaemonConfig, NetConfig, RoundLimits
from mpd.daemon.app import run_daemon
from mpd.daemon.clients import lock_socket
from mpd.daemon.state import open_state_dir
from mpd.errors import Fatal
from mpd.ids import Endpoint, PeerId, show_peer

T = TypeVar("T")
PATIENCE_S = 20
ANY = Endpoint("127.0.0.1", 0)
HASTY = RoundLimits(window_s=2.0, roster_quiet_s=0.3)


@dataclass
class Running:
    """A daemon that is up: what it told when it was ready, and `over` once it has ended."""

    config: DaemonConfig
    listen: Endpoint
    announced: Endpoint
    peer: PeerId
    over: trio.Event = field(default_factory=trio.Event)

    async def status(self) -> Any:
        return await ask(lambda: connect(self.config.socket).status())

    async def leave(self) -> None:
        await ask(lambda: connect(self.config.socket).leave())


async def ask(question: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(question, abandon_on_cancel=True)


async def eventually(holds: Callable[[], T]) -> T:
    """Ask again and again until the answer is yes."""
    while not (answer := await ask(holds)):
        pass
    return answer


def config_in(folder: Path, listen: Endpoint = ANY, **net: Any) -> DaemonConfig:
    return DaemonConfig(folder / "run" / "mpd.sock", folder / "state", NetConfig(listen, **net), HASTY)


@contextlib.asynccontextmanager
async def daemon_of(config: DaemonConfig) -> AsyncIterator[Running]:
    """Run a daemon; if it is still up at the end of the block, it is told to leave."""
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            send, receive = trio.open_memory_channel[Running](1)

            def ready(listen: Endpoint, announced: Endpoint, peer: PeerId) -> None:
                send.send_nowait(Running(config, listen, announced, peer))

            async def run() -> None:
                await run_daemon(config, ready)
                daemon.over.set()

            nursery.start_soon(run)
            daemon = await receive.receive()
            yield daemon
            if not daemon.over.is_set():
                await daemon.leave()


def descriptors() -> list[str]:
    """Return what the open descriptors of this process are."""
    gc.collect()  # a client's view of shared memory lives as long as what refers to it
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(found)


def our_threads() -> set[str]:
    """Return the threads that are not those of trio, which keeps idle ones, or of a test."""
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if not name.startswith(("Trio", "MainThread", "ThreadPool"))}


# ------------------------------------------------------------------------------------------------------------ one alone


async def test_status_has_what_the_documentation_promises(tmp_path: Path) -> None:
    async with daemon_of(config_in(tmp_path)) as daemon:
        status = await daemon.status()
        assert status["peer_id"] == show_peer(daemon.peer)
        assert status["listen"] == status["announce"] == str(daemon.listen)
        assert status["dht"] == {"peers": 0, "bootstrap": [], "problem": ""}
        assert status["runs"] == []
        assert set(status["held"]) == {"resident_bytes", "descriptors", "regions", "threads", "tasks", "calls"}
        assert all(n > 0 for name, n in status["held"].items() if name not in ("regions", "calls"))
        assert status["version"] == mpd.__version__
        assert 0 <= status["uptime_s"] < PATIENCE_S
        assert status["reachable"] is True
        assert (status["links"], status["problem"]) == (0, "")
        assert (status["swarm"]["open"], status["swarm"]["role"]) == (True, "member")
        assert set(status["suites"]) == {"aes-256-gcm", "chacha20-poly1305"}
        assert {"links", "handshakes", "datagrams", "records", "trainers", "descriptors"} <= status["budgets"].keys()
        assert stat.S_IMODE(daemon.config.socket.stat().st_mode) == 0o600


async def test_a_run_shows_while_a_trainer_is_attached(tmp_path: Path) -> None:
    async with daemon_of(config_in(tmp_path)) as daemon:
        client = await ask(lambda: connect(daemon.config.socket))
        averager = await ask(lambda: client.averager("my-run", [np.zeros(4, np.float32)]))
        (run,) = (await daemon.status())["runs"]
        assert (run["name"], run["trainers"], run["rounds"], run["peers"], run["bytes"]) == ("my-run", 1, 0, 1, 16)
        assert {"shape", "key", "phase", "state"} <= run.keys()
        await ask(averager.close)
        await eventually(lambda: not client.status()["runs"])


def attach_and_leave(path: Path) -> None:
    client = connect(path)
    with client.averager("my-run", [np.zeros(4, np.float32)]) as averager:
        client.leave()
        assert not averager.step(timeout=0.1)


async def test_leaving_gives_everything_back(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    async with daemon_of(config) as daemon:  # the first one loads and caches things for good
        await daemon.leave()
    before = descriptors()
    async with daemon_of(config) as daemon:
        assert our_threads()
        await ask(lambda: attach_and_leave(config.socket))
        # By now a new daemon may start: nothing of the old one is in its way.
        with open_state_dir(config.state_dir), lock_socket(config.socket):
            assert not config.socket.exists()
        await daemon.over.wait()
    assert our_threads() == set()
    assert descriptors() == before
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.bind((daemon.listen.host, daemon.listen.port))
        udp.bind((daemon.listen.host, daemon.listen.port))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_daemon_in_peace(tmp_path: Path, number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    async with daemon_of(config_in(tmp_path)) as daemon:
        os.kill(os.getpid(), number)
        await daemon.over.wait()
    assert not daemon.config.socket.exists()
    assert signal.getsignal(number) is handler


async def test_a_second_signal_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    async with daemon_of(config_in(tmp_path)) as daemon:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        await daemon.over.wait()
    assert codes == [1]


async def test_who_leaves_lets_the_step_in_progress_end(tmp_path: Path) -> None:
    """The trainer gets its answer although the daemon is on its way out, and a new trainer is sent away."""
    async with daemon_of(config_in(tmp_path)) as daemon:
        client = await ask(lambda: connect(daemon.config.socket))
        averager = await ask(lambda: client.averager("my-run", [np.zeros(4, np.float32)]))
        with ThreadPoolExecutor(2) as threads:
            stepping = threads.submit(averager.step, timeout=1.0)
            await eventually(lambda: client.status()["runs"][0]["state"])
            leaving = threads.submit(client.leave)
            outcome = await ask(stepping.result)
            assert not outcome.averaged
            assert outcome.reason
            await ask(leaving.result)
        averager.close()


async def test_the_same_key_and_port_come_back(tmp_path: Path) -> None:
    async with daemon_of(config_in(tmp_path)) as first:
        pass
    async with daemon_of(config_in(tmp_path)) as second:
        assert (second.peer, second.listen) == (first.peer, first.listen)


async def test_a_state_directory_that_cannot_be_written_is_a_problem_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path)
    async with daemon_of(config):
        pass
    (config.state_dir / "announced").write_text("peer.example:1")
    monkeypatch.setattr("mpd.daemon.app._WRITE_AGAIN_S", 0.05)
    with monkeypatch.context() as patch:
        fill_disk(patch)
        async with daemon_of(config) as daemon:
            assert "cannot be written: No space left on device" in (await daemon.status())["problem"]
            assert (config.state_dir / "announced").read_text() == "peer.example:1"
            patch.undo()
            with trio.fail_after(PATIENCE_S):
                while (await daemon.status())["problem"]:
                    pass
            assert (config.state_dir / "announced").read_text() == str(daemon.announced)


async def test_an_outbound_only_daemon_announces_nothing(tmp_path: Path) -> None:
    async with daemon_of(config_in(tmp_path, outbound_only=True)) as daemon:
        status = await daemon.status()
        assert (status["announce"], status["reachable"]) == (None, False)
        assert daemon.announced.port == 0


# --------------------------------------------------------------------------------------------- what stands in the way


async def fails(config: DaemonConfig) -> str:
    """Return why a daemon does not start; it must not hold anything afterwards."""
    before = descriptors(), our_threads()
    with trio.fail_after(PATIENCE_S), pytest.raises(Fatal) as fatal:
        await run_daemon(config)
    assert (descriptors(), our_threads()) == before
    return str(fatal.value)


async def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = config_in(tmp_path, Endpoint(*taken.getsockname()))
        assert f"cannot listen on {config.net.listen}: Address already in use; stop what uses it" in await fails(config)
    async with daemon_of(config):  # the locks are free
        pass


async def test_a_second_daemon_is_sent_away_and_the_first_goes_on(tmp_path: Path) -> None:
    async with daemon_of(config_in(tmp_path)) as daemon:
        taken = daemon.config
        new_state = DaemonConfig(taken.socket, tmp_path / "other", taken.net)
        new_socket = DaemonConfig(tmp_path / "other.sock", taken.state_dir, taken.net)
        assert f"a daemon (pid {os.getpid()}) already serves {taken.socket}" in await fails(new_state)
        assert f"another daemon uses the state directory {taken.state_dir}" in await fails(new_socket)
        assert (await daemon.status())["peer_id"] == show_peer(daemon.peer)


async def test_a_broken_key_is_one_sentence(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    config.state_dir.mkdir()
    (config.state_dir / "key.pem").write_text("junk")
    assert "key.pem is not a private key" in await fails(config)


# ------------------------------------------------------------------------------------------------------------- together


async def test_two_that_know_each_other_s_address_meet_and_average(tmp_path: Path) -> None:
    """Each is the other's bootstrap. The one that listens everywhere is reachable once it has been dialled."""
    everywhere = Endpoint("0.0.0.0", 0)
    async with (
        daemon_of(config_in(tmp_path / "a")) as a,
        daemon_of(config_in(tmp_path / "b", everywhere, bootstrap=(a.listen,))) as b,
    ):
        assert b.announced == Endpoint("127.0.0.1", b.listen.port)
        status = await b.status()
        assert (status["listen"], status["announce"]) == (f"0.0.0.0:{b.listen.port}", str(b.announced))
        assert status["reachable"] is False
        clients = [await ask(lambda d=d: connect(d.config.socket)) for d in (a, b)]
        for client in clients:
            assert await eventually(lambda c=client: c.status()["dht"]["peers"]) == 1
        (bootstrap,) = (await b.status())["dht"]["bootstrap"]
        assert bootstrap == {"address": str(a.listen), "state": f"connected: {show_peer(a.peer)}"}

        vectors = [np.full(5, value, np.float32) for value in (1, 3)]
        outcomes = await both_step(clients, vectors)
        assert [outcome.reason for outcome in outcomes if not outcome.averaged] == []
        assert all((vector == 2).all() for vector in vectors)
        assert set(outcomes[0].contributors) == {show_peer(a.peer), show_peer(b.peer)}

        await eventually(lambda: clients[1].status()["reachable"])
        for client, other in zip(clients, (b, a), strict=True):
            (link,) = await ask(client.peers)
            assert link["peer"] == show_peer(other.peer)
            (entry,) = await ask(client.rounds)
            assert (entry["run"], entry["averaged"], len(entry["group"])) == ("my-run", True, 2)


async def both_step(clients: list[Daemon], vectors: list[Any]) -> list[Outcome]:
    """Attach a trainer to each daemon and step both at once."""

    def trainer(client: Daemon, vector: Any) -> Outcome:
        with client.averager("my-run", [vector]) as averager:
            return averager.step(timeout=15.0)

    outcomes: dict[int, Outcome] = {}

    async def train(index: int) -> None:
        outcomes[index] = await ask(lambda: trainer(clients[index], vectors[index]))

    async with trio.open_nursery() as nursery:
        for index in range(len(clients)):
            nursery.start_soon(train, index)
    return [outcomes[index] for index in range(len(clients))]
