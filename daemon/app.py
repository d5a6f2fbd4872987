"""The daemon as a whole: the only place that makes services and knows who needs whom.

Services nest, and the nesting is the order of shutdown: the local socket goes first, then the runs, then the links,
then the DHT, then the locks. SIGTERM, SIGINT and `mpd leave` all lead to the same goodbye; but `mpd leave` lets the
round in progress end first, a signal gives it up, and a second signal ends everything at once.
"""

import contextlib
import logging
import os
import random
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import trio

import mpd
from mpd.config import DaemonConfig
from mpd.ids import Endpoint, PeerId, show_peer
from mpd.seal import NO_SEAL

from . import faults
from .admission import Admitter, Applicant, join_with_invite
from .budgets import Budgets, raise_descriptor_limit
from .clients import lock_socket, serve_clients
from .containment import counts, supervise
from .containment import problem as problem_of_bugs
from .dht import DhtConfig, open_dht
from .doctor import Doctor, Patient
from .keeping import FOLDER, Keeper
from .lobby import LobbyServices
from .logs import OnChange
from .lookout import Lookout
from .news import NewsDesk
from .peers import Peers
from .ports import bound, own_address
from .process import count_held, keep_memory_private
from .rendezvous import Rendezvous
from .renewal import Renewal
from .runs import Runs, Switchboard
from .sessions import Sessions
from .state import PEERS, StateDir, open_state_dir
from .swarm import Swarm, load_swarm

_GOODBYE_S = 0.3  # how long the goodbyes may take to get out
_LEAVE_S = 60.0  # how long `mpd leave` waits for the round in progress
_STATUS_LOG_S = 5.0
_WRITE_AGAIN_S = 2.0  # how soon a disk that was full, or could not be written, is tried again

Ready = Callable[[Endpoint, Endpoint, PeerId], None]

_log = logging.getLogger("mpd")


async def run_daemon(config: DaemonConfig, ready: Ready = lambda listen, announced, peer: None) -> None:
    """Run a daemon until it is told to leave. Raises Fatal, and LocalError if it was invited in vain.

    `ready(listen, announced, peer)` is called once the socket answers: where the daemon listens, the address that
    others are told (port 0: none), and its id.
    """
    faults.arm(config.faults)
    keep_memory_private()
    raise_descriptor_limit()
    with (
        contextlib.ExitStack() as farewells,  # ends last: whoever asked us to leave may start the next daemon then
        open_state_dir(config.state_dir) as state,
        lock_socket(config.socket),
    ):
        key = state.load_key()
        applicant = Applicant(key, time.time, secrets.token_bytes)
        if config.invite:
            _log.info("%s", await join_with_invite(state.path, applicant, config.invite))
        swarm = load_swarm(state.path, key, time.time, secrets.token_bytes)
        budgets = Budgets()
        with bound(config.net.listen, state) as (tcp, udp, listen):
            dht = DhtConfig(
                trust=swarm,
                sock=udp,
                bootstrap=tuple(dict.fromkeys((*config.net.bootstrap, *swarm.bootstrap()))),
                known_peers_file=state.path / PEERS,
                budgets=budgets,
                rng=random.SystemRandom(),
            )
            async with open_dht(dht) as rendezvous, trio.open_nursery() as background:
                daemon = _Daemon(config, state, _Identity(swarm, applicant), budgets, rendezvous, background)
                await daemon.run(tcp, listen, ready, farewells)


@dataclass(frozen=True, slots=True)
class _Identity:
    """Who we are, and what asks admitters in our name."""

    swarm: Swarm
    applicant: Applicant


class _Daemon:
    """The services of one daemon, from the DHT upwards."""

    def __init__(
        self,
        config: DaemonConfig,
        state: StateDir,
        identity: _Identity,
        budgets: Budgets,
        rendezvous: Rendezvous,
        background: trio.Nursery,
    ) -> None:
        self._config = config
        self._state = state
        self._swarm = identity.swarm
        self._budgets = budgets
        self._rendezvous = rendezvous
        self._began = trio.current_time()
        self._listen = config.net.listen
        self._patience = trio.CancelScope()  # for the round in progress
        self._background = background
        rng = random.SystemRandom()
        switchboard = Switchboard(background, _log.info)
        self._peers = Peers(self._swarm, secrets.token_bytes(16), switchboard, secrets.token_bytes, _wall_ms, budgets)
        if config.net.plain_data:
            self._peers.suites = (NO_SEAL,)
        self._peers.door.admission = Admitter(self._swarm, time.time, budgets.admissions).serve
        self._lookout = Lookout(rendezvous, self._peers.probe, rng)
        self._news = NewsDesk(self._swarm, self._peers, rendezvous, rng)
        self._renewal = Renewal(self._swarm, self._news.admitters, identity.applicant, rng)
        sessions = Sessions(self._peers)
        services = LobbyServices(
            own=self._swarm.own,
            peers=self._peers,
            rendezvous=rendezvous,
            limits=config.limits,
            rng=rng,
            wall_ms=_wall_ms,
            dials=budgets.dials,
            refuse=sessions.refuse,
            warn=_log.warning,
        )
        self._runs = Runs(services, sessions)
        self._runs.status = self._status
        self._runs.role = lambda: self._swarm.role
        patient = Patient(
            config=config,
            swarm=self._swarm,
            budgets=budgets,
            rendezvous=rendezvous,
            peers=self._peers,
            dial_backs=switchboard.dial_backs,
            wall_ms=_wall_ms,
            run_facts=self._runs.rounds_facts,
            held_bytes=lambda: self._runs.held_bytes,
            problem=lambda: "; ".join(filter(None, (self._news.problem, self._renewal.problem))),
        )
        self._runs.look_into = Doctor(patient).examine
        self._runs.desk.budgets = budgets
        if config.keep_state:
            self._runs.desk.keeper = Keeper(state.path / FOLDER, time.time)
        switchboard.runs, switchboard.sessions, switchboard.peers = self._runs, sessions, self._peers
        switchboard.news = self._news

    async def run(self, tcp: socket.socket, listen: Endpoint, ready: Ready, farewells: contextlib.ExitStack) -> None:
        self._listen = listen
        peers, runs = self._peers, self._runs
        announced, is_certain = await own_address(self._config.net, listen)
        peers.endpoint, peers.is_reachable = announced, is_certain
        if announced.port:
            self._state.remember_announced(announced)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            self._background.start_soon(self._watch_signals, signals, runs.leaving)
            self._background.start_soon(supervise, "report of changes", self._log_changes)
            self._background.start_soon(supervise, "state that is written again", self._write_again)
            sock = trio.SocketListener(trio.socket.from_stdlib_socket(tcp))
            listeners = [] if self._config.net.outbound_only else [sock]
            async with trio.open_nursery() as links:
                await links.start(peers.serve, listeners)
                for service in (self._lookout.run, self._news.run, self._renewal.run):
                    links.start_soon(supervise, "service", service)
                async with trio.open_nursery() as rounds:
                    await rounds.start(runs.serve)
                    async with trio.open_nursery() as intake:
                        await intake.start(serve_clients, self._config.socket, runs, farewells, self._budgets)
                        self._introduce()
                        ready(listen, announced, self._swarm.own)
                        await runs.leaving.wait()
                        # Trainers hear the outcome of the step in progress before their socket closes.
                        self._patience.deadline = trio.current_time() + _LEAVE_S
                        with self._patience:
                            await runs.wait_idle()
                        intake.cancel_scope.cancel()
                    rounds.cancel_scope.cancel()
                await peers.say_goodbye("its daemon was told to leave", _GOODBYE_S)
                links.cancel_scope.cancel()
            self._background.cancel_scope.cancel()

    def _introduce(self) -> None:
        swarm = self._swarm
        _log.info("peer %s listens on %s", show_peer(swarm.own), self._listen)
        if swarm.is_open:
            _log.warning("this is an open swarm: anyone who reaches it can take part and read its averages")
        else:
            _log.info("swarm %s, as %s", swarm.name, swarm.role)
        if self._config.net.plain_data:
            _log.warning("tensors travel in the clear: this is for measuring on one machine only")

    async def _watch_signals(self, signals: AsyncIterator[int], leaving: trio.Event) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if self._patience.cancel_called:
                _log.warning("%s again: ending at once", name)
                os._exit(1)
            _log.info("%s: leaving", name)
            self._patience.cancel()
            leaving.set()

    async def _log_changes(self) -> None:
        found, trouble = OnChange(_log, "DHT"), OnChange(_log, "DHT")
        ours = OnChange(_log, "swarm")
        while True:
            status = self._rendezvous.snapshot()
            found.say(f"{status.peers or 'no'} other node{'s' * (status.peers != 1)} known")
            trouble.say(status.problem)
            ours.say(self._problem())
            await trio.sleep(_STATUS_LOG_S)

    async def _write_again(self) -> None:
        while True:
            await trio.sleep(_WRITE_AGAIN_S)
            if self._state.problem:
                await trio.to_thread.run_sync(self._state.retry)

    def _problem(self) -> str:
        """Return what the owner of this machine should know, in sentences."""
        kept = self._runs.desk.keeper.problem if self._runs.desk.keeper is not None else ""
        causes = (self._state, self._news, self._renewal)
        sentences = (faults.status(), problem_of_bugs(), *(cause.problem for cause in causes), kept)
        return "; ".join(filter(None, sentences))

    def _status(self) -> dict[str, Any]:
        dht, peers = self._rendezvous.snapshot(), self._peers
        return {
            "peer_id": show_peer(self._swarm.own),
            "swarm": self._swarm.status(),
            "listen": str(self._listen),
            "announce": str(peers.endpoint) if peers.endpoint.port else None,
            "reachable": peers.is_reachable,
            "socket": str(self._config.socket),
            "dht": {
                "peers": dht.peers,
                "bootstrap": [{"address": address, "state": state} for address, state in self._lookout.bootstrap()],
                "problem": dht.problem,
            },
            "links": len(peers.links()),
            "suites": list(peers.suites),
            "budgets": self._budgets.snapshot(),
            "held": {**count_held(), "tasks": trio.lowlevel.current_statistics().tasks_living, "calls": dht.calls},
            "unexpected": counts(),
            "problem": self._problem(),
            "version": mpd.__version__,
            "uptime_s": round(trio.current_time() - self._began, 3),
        }


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
