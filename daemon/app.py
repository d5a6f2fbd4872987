"""The daemon as a whole: the only place that makes services and knows who needs whom.

Services nest, and the nesting is the order of shutdown: the local socket goes first, then the runs, then the links,
then the DHT, then the locks. SIGTERM, SIGINT and `mpd leave` all lead to the same goodbye; but `mpd leave` lets the
round in progress end first, a signal gives it up, and a second signal ends everything at once.
"""

import contextlib
import functools
import logging
import os
import random
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import trio

import mpd
from mpd.config import DaemonConfig
from mpd.ids import Endpoint, PeerId, show_peer

from .clients import lock_socket, serve_clients
from .dht import DhtConfig, open_dht
from .lobby import LobbyServices
from .logs import OnChange
from .peers import Peers
from .ports import bound, own_address
from .rendezvous import Rendezvous
from .runs import Runs, Switchboard
from .sessions import Sessions
from .state import PEERS, StateDir, open_state_dir, own_id

_GOODBYE_S = 0.3  # how long the goodbyes may take to get out
_LEAVE_S = 60.0  # how long `mpd leave` waits for the round in progress
_STATUS_LOG_S = 5.0

Ready = Callable[[Endpoint, Endpoint, PeerId], None]

_log = logging.getLogger("mpd")


async def run_daemon(config: DaemonConfig, ready: Ready = lambda listen, announced, peer: None) -> None:
    """Run a daemon until it is told to leave. Raises Fatal.

    `ready(listen, announced, peer)` is called once the socket answers: where the daemon listens, the address that
    others are told (port 0: none), and its id.
    """
    with (
        contextlib.ExitStack() as farewells,  # ends last: whoever asked us to leave may start the next daemon then
        open_state_dir(config.state_dir) as state,
        lock_socket(config.socket),
    ):
        own = own_id(state.load_key())
        with bound(config.net.listen, state) as (tcp, udp, listen):
            dht = DhtConfig(
                node_id=own,
                sock=udp,
                bootstrap=config.net.bootstrap,
                known_peers_file=state.path / PEERS,
                rng=random.SystemRandom(),
            )
            async with open_dht(dht) as rendezvous:
                await _Daemon(config, own, rendezvous, state, farewells).run(tcp, listen, ready)


class _Daemon:
    """The services of one daemon, from the DHT upwards."""

    def __init__(
        self,
        config: DaemonConfig,
        own: PeerId,
        rendezvous: Rendezvous,
        state: StateDir,
        farewells: contextlib.ExitStack,
    ) -> None:
        self._config = config
        self._own = own
        self._rendezvous = rendezvous
        self._state = state
        self._farewells = farewells
        self._began = trio.current_time()
        self._listen = config.net.listen
        self._patience = trio.CancelScope()  # for the round in progress

    async def run(self, tcp: socket.socket, listen: Endpoint, ready: Ready) -> None:
        self._listen = listen
        announced, is_reachable = await own_address(self._config.net, listen)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as background:
                peers, runs = self._wire(background)
                peers.endpoint, peers.is_reachable = announced, is_reachable
                background.start_soon(self._watch_signals, signals, runs.leaving)
                background.start_soon(self._log_changes)
                sock = trio.SocketListener(trio.socket.from_stdlib_socket(tcp))
                listeners = [] if self._config.net.outbound_only else [sock]
                async with trio.open_nursery() as links:
                    await links.start(peers.serve, listeners)
                    async with trio.open_nursery() as rounds:
                        await rounds.start(runs.serve)
                        async with trio.open_nursery() as intake:
                            await intake.start(serve_clients, self._config.socket, runs, self._farewells)
                            _log.info("peer %s listens on %s", show_peer(self._own), listen)
                            ready(listen, announced, self._own)
                            await runs.leaving.wait()
                            # Trainers hear the outcome of the step in progress before their socket closes.
                            self._patience.deadline = trio.current_time() + _LEAVE_S
                            with self._patience:
                                await runs.wait_idle()
                            intake.cancel_scope.cancel()
                        rounds.cancel_scope.cancel()
                    await peers.say_goodbye("its daemon was told to leave", _GOODBYE_S)
                    links.cancel_scope.cancel()
                background.cancel_scope.cancel()

    def _wire(self, background: trio.Nursery) -> tuple[Peers, Runs]:
        """Make the services and tell them about each other."""
        switchboard = Switchboard(background, _log.info)
        peers = Peers(self._own, secrets.token_bytes(16), switchboard, secrets.token_bytes)
        sessions = Sessions(peers)
        services = LobbyServices(
            own=self._own,
            peers=peers,
            rendezvous=self._rendezvous,
            limits=self._config.limits,
            rng=random.SystemRandom(),
            wall_ms=lambda: time.time_ns() // 1_000_000,
            refuse=sessions.refuse,
            warn=_log.warning,
        )
        runs = Runs(services, sessions)
        runs.status = functools.partial(self._status, peers)
        switchboard.runs, switchboard.sessions, switchboard.peers = runs, sessions, peers
        return peers, runs

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
        while True:
            status = self._rendezvous.snapshot()
            found.say(f"{status.peers or 'no'} other node{'s' * (status.peers != 1)} known")
            trouble.say(status.problem)
            await trio.sleep(_STATUS_LOG_S)

    def _status(self, peers: Peers) -> dict[str, Any]:
        dht = self._rendezvous.snapshot()
        return {
            "peer_id": show_peer(self._own),
            "listen": str(self._listen),
            "announce": str(peers.endpoint) if peers.endpoint.port else None,
            "reachable": peers.is_reachable,
            "socket": str(self._config.socket),
            "dht": {
                "peers": dht.peers,
                "bootstrap": [{"address": address, "state": state} for address, state in dht.bootstrap],
                "problem": dht.problem,
            },
            "links": len(peers.links()),
            "sealed": False,
            "problem": self._state.problem,
            "version": mpd.__version__,
            "uptime_s": round(trio.current_time() - self._began, 3),
        }
