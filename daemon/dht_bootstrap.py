"""Getting into a swarm and back into it: the bootstrap entries, and the peers known from last time.

Every entry has a task of its own, so a dead or nonsensical one delays nobody: resolve the name (again each time, off
the loop), ask whoever answers there for its id, and try again after a pause that doubles from 0.25 s to 10 s. An entry
that has answered is asked again every minute, which is how two halves of a split swarm find each other again.

Known peers are a JSON list of [host, port, id in hex], written to a temporary file that then takes the old one's place.
They are asked like bootstrap entries until the first one answers, and the others, like all whom this node has lost, at
growing pauses (`dht_lost.py`).
"""

import asyncio
import contextlib
import json
import logging
import os
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from mpd.ids import PEER_ID_BYTES, Endpoint, show_peer

from .dht_calls import Answer
from .dht_gate import Address
from .dht_limits import kind_of
from .rendezvous import NO_ANSWER

log = logging.getLogger(__name__)

MIN_PAUSE_S = 0.25
MAX_PAUSE_S = 10.0
ANSWERED_PAUSE_S = 60.0
MAX_ADDRESSES = 4  # of one name
MAX_KNOWN_PEERS = 64

_NOT_ASKED, _CONNECTED, _OWN = "not asked yet", "connected", "this is our own address"
_GOOD = (_NOT_ASKED, _CONNECTED, _OWN)

KnownPeer = tuple[str, int, bytes]


class Bootstrap:
    """The bootstrap entries and how each fares.

    `ping` asks who lives at an address (and who answers becomes a contact); `changed` is called after `states` changed.
    """

    def __init__(
        self,
        own_id: bytes,
        ping: Callable[[Address], Answer],
        changed: Callable[[], None],
        rng: random.Random,
    ) -> None:
        self.states: dict[str, str] = {}
        self._own_id = own_id
        self._ping = ping
        self._changed = changed
        self._rng = rng
        self._lonely = asyncio.Event()

    @property
    def problem(self) -> str:
        """A sentence if every entry has been asked and none led anywhere."""
        states = self.states.values()
        if not states or any(state.startswith(_GOOD) for state in states):
            return ""
        return (
            "no bootstrap address answers: check that a daemon of this swarm runs there, that UDP reaches it, and that "
            "this machine's clock is right"
        )

    def wake(self) -> None:
        """Ask everybody again now: the last live contact is gone."""
        self._lonely.set()
        self._lonely.clear()

    async def keep_asking(self, entry: Endpoint, family: socket.AddressFamily) -> None:
        """Ask `entry` for ever."""
        self._set_state(entry, _NOT_ASKED)
        pause_s = MIN_PAUSE_S
        while True:
            answered, sentence = await self._try(entry, family)
            self._set_state(entry, sentence)
            if answered:
                pause_s = MIN_PAUSE_S
                await self._pause(ANSWERED_PAUSE_S)
            else:
                await self._pause(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)

    async def ask_known(self, peers: list[KnownPeer], n_contacts: Callable[[], int]) -> None:
        """Ask `peers` again and again until there is a live contact."""
        pause_s = MIN_PAUSE_S
        while peers and not n_contacts():
            await asyncio.gather(*(self._ping((host, port)) for host, port, _ in peers))
            await self._pause(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    async def _try(self, entry: Endpoint, family: socket.AddressFamily) -> tuple[bool, str]:
        try:
            addresses = await resolve(entry, family)
        except OSError as error:
            return False, f"cannot resolve name: {error.strerror or error}"
        for address in addresses:
            reply = await self._ping(address)
            if reply is not None:
                is_own = reply.sender == self._own_id
                return True, _OWN if is_own else f"{_CONNECTED}: {show_peer(reply.sender)}"
        return False, NO_ANSWER

    async def _pause(self, pause_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s * self._rng.uniform(0.8, 1.2)):
                await self._lonely.wait()

    def _set_state(self, entry: Endpoint, sentence: str) -> None:
        if self.states.get(str(entry)) != sentence:
            log.info("dht: bootstrap %s: %s", entry, sentence)
            self.states[str(entry)] = sentence
            self._changed()


async def resolve(entry: Endpoint, family: socket.AddressFamily) -> list[Address]:
    """Return the numeric addresses of `entry` that a socket of `family` can reach. Raises OSError (gaierror) if none.

    A name is looked up in a thread of its own, not in the loop's executor, whose shutdown would wait for a slow server.
    """
    wanted = socket.AF_INET if family == socket.AF_INET else socket.AF_UNSPEC
    if entry.port == 0:
        raise OSError("port 0 stands for no port")
    if kind_of(entry.host) is not None:
        hosts = _look_up(entry.host, wanted, socket.AI_NUMERICHOST)
    else:
        hosts = await _in_thread(lambda: _look_up(entry.host, wanted))
    usable = [(host, entry.port) for host in dict.fromkeys(hosts) if kind_of(host) is not None]
    if not usable:
        raise OSError("no usable address")
    return usable[:MAX_ADDRESSES]


def _look_up(host: str, family: int, flags: int = 0) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, None, family, socket.SOCK_DGRAM, flags=flags)]


async def _in_thread(look_up: Callable[[], list[str]]) -> list[str]:
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[str]] = loop.create_future()

    def conclude(hosts: list[str], error: OSError | None) -> None:
        if found.done():
            return  # nobody waits any more
        if error is None:
            found.set_result(hosts)
        else:
            found.set_exception(error)

    def run() -> None:
        hosts: list[str] = []
        failure = None
        try:
            hosts = look_up()
        except OSError as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has closed in the meantime
            loop.call_soon_threadsafe(conclude, hosts, failure)

    threading.Thread(target=run, name="mpd-resolve", daemon=True).start()
    return await found


class KnownPeers:
    """The file of known peers, if any. Trouble with it harms nothing: `report` gets a sentence, "" once it is over."""

    def __init__(self, path: Path | None, report: Callable[[str], None]) -> None:
        self._path = path
        self._report = report
        self._saved: list[KnownPeer] = []

    def load(self) -> list[KnownPeer]:
        """Return the peers in the file; none if it is missing, unreadable or junk."""
        if self._path is not None:
            try:
                self._saved = load_known_peers(self._path)
            except (OSError, ValueError) as error:
                self._trouble(f"known peers not read: {error}")
        return self._saved

    async def save(self, peers: list[KnownPeer]) -> None:
        """Write the first `MAX_KNOWN_PEERS` of `peers` if they changed. None at all overwrite nothing."""
        kept = sorted(peers[:MAX_KNOWN_PEERS])
        if self._path is None or not kept:
            return
        if kept == self._saved:
            self._report("")  # what could not be written a while ago need not be any more
            return
        try:
            await asyncio.to_thread(save_known_peers, self._path, kept)  # fsync may take its time
            self._saved = kept
            self._report("")
        except OSError as error:
            self._trouble(f"known peers not saved: {error}")

    def _trouble(self, sentence: str) -> None:
        log.warning("dht: %s", sentence)
        self._report(sentence)


def load_known_peers(path: Path) -> list[KnownPeer]:
    """Return the peers in `path`; a missing file has none. Raises OSError if unreadable, ValueError if it is junk."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    try:
        entries = json.loads(text)
        peers = [(host, port, bytes.fromhex(node_id)) for host, port, node_id in entries][:MAX_KNOWN_PEERS]
        good = all(
            kind_of(h) is not None and type(p) is int and 0 < p < 65536 and len(i) == PEER_ID_BYTES for h, p, i in peers
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a list of known peers") from error
    if not good:
        raise ValueError(f"{path} is not a list of known peers")
    return peers


def save_known_peers(path: Path, peers: list[KnownPeer]) -> None:
    """Write `peers` to `path`, all or nothing. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
            json.dump([[host, port, node_id.hex()] for host, port, node_id in peers], file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
