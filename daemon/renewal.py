"""Renewal: a certificate lasts a week, and half a week before its end the daemon asks for the next one.

Strategy: an admitter signs its own, and one that has the root key its right to admit as well; everybody else asks the
admitters that are known, one after the other, until one gives something that lasts longer. What fails is tried again,
less and less often, and people hear of it when a day is left.
"""

import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import trio

from mpd.errors import MpdError, PeerError
from mpd.ids import Endpoint, PeerId, show_peer

from .swarm import Swarm

CHECK_S = 60.0  # how often it is asked whether something is due, and the first pause after a failure
MAX_PAUSE_S = 3600.0
WARN_S = 86400.0  # before the end of a certificate

InThread = Callable[..., Awaitable[Any]]

_log = logging.getLogger("mpd")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An admitter, where it may be dialled, and whether it says that it has the root key."""

    peer: PeerId
    endpoint: Endpoint
    is_root: bool

    def __str__(self) -> str:
        return f"admitter {show_peer(self.peer)} at {self.endpoint}"


class Renewer(Protocol):
    """What is needed of `Applicant`."""

    async def renew(self, swarm: Swarm, admitter: PeerId, address: Endpoint) -> tuple[bytes, ...]:
        """Return a new chain. Raises PeerError or LocalError."""


class Renewal:
    """Keeps the certificate of `swarm` fresh while `run` runs. `admitters` returns whom to ask, the best first."""

    def __init__(
        self,
        swarm: Swarm,
        admitters: Callable[[], Awaitable[list[Candidate]]],
        renewer: Renewer,
        rng: random.Random,
        in_thread: InThread = trio.to_thread.run_sync,
    ) -> None:
        self._swarm = swarm
        self._admitters = admitters
        self._renewer = renewer
        self._rng = rng
        self._failure = ""
        self._owed: dict[str, Callable[[], None]] = {}  # what the disk has not taken yet
        self._troubles = Troubles(in_thread)

    @property
    def problem(self) -> str:
        """What the owner of this machine should know, in sentences; empty if all is well."""
        return "; ".join([*self._warnings(), *self._troubles])

    def _warnings(self) -> Iterator[str]:
        swarm = self._swarm
        now_s = swarm.now_s()
        if not swarm.is_open and swarm.not_after_s < now_s + WARN_S:
            end = _ends(swarm.not_after_s - now_s)
            yield f"this machine's certificate {end}: {self._failure or 'it is about to be renewed'}"
        if 0 < swarm.admits_until_s < now_s + WARN_S:
            end = _ends(swarm.admits_until_s - now_s)
            yield f"this machine's right to admit others {end}: only a daemon with the root key can renew it"

    async def run(self) -> None:
        """Work until cancelled."""
        pause_s = CHECK_S
        while True:
            if not self._is_due() or await self._renew():
                pause_s, self._failure = CHECK_S, ""
            else:
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
            await self._write()
            await trio.sleep(pause_s * self._rng.uniform(0.75, 1.25))

    def _is_due(self) -> bool:
        return self._swarm.leaf_is_due() or self._swarm.admitter_is_due()

    async def _renew(self) -> bool:
        """Get what is due, from this machine or from admitters; return whether all of it has come."""
        self._failure = "no admitter was found that could renew it"
        try:
            chain = await self._troubles.attempt("root key", self._swarm.renewed_here)
            if chain is not None:
                await self._adopt(chain, "this machine")
        except PeerError as error:
            self._failure = f"this machine cannot renew it: {error}"
        for helper in await self._helpers():
            if not self._is_due():
                break
            try:
                await self._adopt(await self._renewer.renew(self._swarm, helper.peer, helper.endpoint), str(helper))
                if self._swarm.store is not None:
                    self._owed["helper"] = partial(self._swarm.store.remember_admitter, helper.peer, helper.endpoint)
                    await self._write()
            except MpdError as error:
                self._failure = f"{helper} did not renew it: {error}"
                _log.debug("renewal: %s", self._failure)
        return not self._is_due()

    async def _helpers(self) -> list[Candidate]:
        """Return whom to ask: only the root can renew a right to admit, so those who have its key come first."""
        if self._swarm.is_open or not self._is_due():
            return []
        found = sorted(await self._admitters(), key=lambda each: not each.is_root)
        return found if self._swarm.leaf_is_due() else [each for each in found if each.is_root]

    async def _adopt(self, chain: tuple[bytes, ...], source: str) -> None:
        """Use `chain` from now on, on disk too. Raises PeerError if it is no gain."""
        swarm = self._swarm
        if not swarm.adopt(chain):
            raise PeerError("the new certificate would not last longer than the present one")
        if swarm.store is not None:
            self._owed["certificate"] = partial(swarm.store.save_chain, chain)
            await self._write()
            _log.info("the certificate of this machine was renewed by %s", source)

    async def _write(self) -> None:
        """Put on disk what we go by. A disk that is full now may have room in a minute; a restart needs the files."""
        for what, work in list(self._owed.items()):
            if await self._troubles.attempt(what, _done, work):
                del self._owed[what]


class Troubles:
    """What went wrong on the disk, one sentence for each kind of work, until it goes well again."""

    def __init__(self, in_thread: InThread) -> None:
        self._in_thread = in_thread
        self._sentences: dict[str, str] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._sentences.values()))

    async def attempt(self, what: str, fn: Callable[..., Any], *args: Any) -> Any:
        """Return what `fn(*args)` returns, which may block; None if it fails, and then that is remembered."""
        try:
            done = await self._in_thread(fn, *args)
        except MpdError as error:
            if self._sentences.get(what) != str(error):
                _log.warning("%s", error)
            self._sentences[what] = str(error)
            return None
        self._sentences.pop(what, None)
        return done


def _done(work: Callable[[], None]) -> bool:
    work()
    return True


def _ends(left_s: float) -> str:
    return f"ends in {left_s / 3600:.0f} h" if left_s > 0 else "has ended"
