"""The peers of one run as people to call: where they are, whether they answered, and what we still have to tell them.

A record in the rendezvous outlives the peer that published it. So whoever could not be reached, or whose link ended, is
absent until it speaks up or a new call to it goes through. Who was linked and went without a goodbye may be behind a
network that has parted: it is called again by itself, at pauses that grow with its absence, so that both sides are one
soon after the network is. Records and links are as many as others like to make, calls are not: see `MAX_WAITING`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from mpd.ids import Endpoint, PeerId

from .budgets import ByteGate
from .containment import confine
from .links import Link
from .peers import Peers, Unreachable
from .roster import Seen

TOLD_S = 20.0  # how long an absence is spoken of
FORGET_S = 600.0  # who was away for so long is called when it has published something new, and not before
MAX_WAITING = 512  # calls that wait for their turn; more are not worth making, whoever published those addresses
_FORGIVE_S = 10.0  # between two calls of a peer that we have never met, or that said goodbye
_RETRY_S = (2.0, 6.0)  # between two calls of one that was lost: a quarter of its absence, within these bounds
_MAX_RETRY_S = 30.0  # and a tenth of it, up to this, once that is more
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class _Absence:
    """A peer that is gone: since when, what it had published by then, when it was called last, and why.

    `link` is still up after a goodbye; `is_lost` is true of a peer that was linked and said none.
    """

    began: float
    seq: int
    tried: float
    reason: str
    link: Link | None
    is_lost: bool

    def is_due(self, now: float) -> bool:
        """Return whether it is time for another call."""
        if not self.is_lost:
            return now - self.tried > _FORGIVE_S
        age, (shortest, longest) = now - self.began, _RETRY_S
        return now - self.tried >= min(max(age / 10, min(max(age / 4, shortest), longest)), _MAX_RETRY_S)


class Contacts:
    """Calls peers and remembers how that went.

    `on_absent` hears of each peer that turns out to be gone, `on_back` of each that is linked again after that.
    `dials` is shared by all runs of the daemon: so many calls are under way at once.
    """

    def __init__(
        self,
        peers: Peers,
        dials: ByteGate,
        on_absent: Callable[[PeerId, str], None],
        on_back: Callable[[PeerId], None] = lambda peer: None,
    ) -> None:
        self.nursery: trio.Nursery | None = None  # where calls are made; nobody is called while there is none
        self._peers = peers
        self._dials = dials
        self._on_absent = on_absent
        self._on_back = on_back
        self._watched: set[Link] = set()
        self._seqs: dict[PeerId, int] = {}
        self._endpoints: dict[PeerId, Endpoint | None] = {}
        self._absent: dict[PeerId, _Absence] = {}
        self._outbox: dict[PeerId, list[Any]] = {}  # what to say to peers that are being called
        self._calling: set[PeerId] = set()

    @property
    def absences(self) -> dict[PeerId, str]:
        """Who went or could not be reached lately, and why."""
        recently = trio.current_time() - TOLD_S
        return {peer: absence.reason for peer, absence in self._absent.items() if absence.tried > recently}

    def note(self, seen: Seen) -> None:
        """Remember where a peer says that it can be called."""
        self._seqs[seen.peer] = seen.seq
        self._endpoints[seen.peer] = seen.endpoint

    def came(self, peer: PeerId, endpoint: Endpoint | None) -> None:
        """The peer spoke to us."""
        self._endpoints[peer] = endpoint
        if self._absent.pop(peer, None) is not None:
            self._on_back(peer)

    def accepts_calls(self, peer: PeerId) -> bool:
        """Return True if the peer can be called, as far as we know."""
        return self._endpoints.get(peer) is not None

    def is_linked(self, peer: PeerId) -> bool:
        """Return True if there is a link to the peer now."""
        return self._link(peer) is not None

    def is_live(self, seen: Seen) -> bool:
        """Return False if the peer of this record is known to be gone.

        It is called again after a while, or if it has published something that we had not seen. Nobody waits for the
        outcome: if it is back, there is a link the next time.
        """
        absence = self._absent.get(seen.peer)
        if absence is None:
            return True
        link = self._link(seen.peer)
        if link is not None:
            return link is not absence.link
        if seen.seq > absence.seq or absence.is_due(trio.current_time()):
            self.note(seen)
            self.call(seen.peer)
        return False

    def went(self, peer: PeerId, reason: str) -> None:
        """The peer said goodbye, its link ended, or it cannot be reached."""
        before, link, now = self._absent.get(peer), self._link(peer), trio.current_time()
        has_ended = link is None and self._peers.get(peer) is not None and peer in self._endpoints
        is_lost = before.is_lost if before is not None else has_ended
        if before is not None and before.link is not None:
            reason = before.reason  # the end of its link was announced
        began = before.began if before is not None else now
        self._absent[peer] = _Absence(began, self._seqs.get(peer, -1), now, reason, link, is_lost)
        self._outbox.pop(peer, None)
        self._on_absent(peer, reason)

    def say(self, peer: PeerId, message: Any) -> None:
        """Send `message`, calling the peer first if need be."""
        link = self._link(peer)
        if link is not None:
            link.send(message)
        elif self.nursery is not None:
            self._outbox.setdefault(peer, []).append(message)
            self.call(peer)

    def call(self, peer: PeerId) -> None:
        """Make sure that there is a link, in the background."""
        if self._link(peer) is None and self.nursery is not None and peer not in self._calling:
            if len(self._calling) >= MAX_WAITING:
                self._outbox.pop(peer, None)
                return
            self._calling.add(peer)
            self.nursery.start_soon(confine, "call", self._call, peer)

    def watch(self, patience: Mapping[PeerId, float]) -> None:
        """Expect a sign of life every so many seconds from these peers, and no longer from those named before."""
        links = {link for link in map(self._link, patience) if link is not None}
        for link in self._watched - links:
            link.awaited -= 1
        for link in links - self._watched:
            link.patience_s = patience[link.peer]
            link.awaited += 1
        self._watched = links

    async def keep_calling(self) -> None:
        """Call those who were lost without a goodbye, until cancelled."""
        while True:
            await trio.sleep(_LOOK_S)
            now = trio.current_time()
            for peer, absence in list(self._absent.items()):
                if now - absence.began > FORGET_S and now - absence.tried > TOLD_S:
                    for known in (self._absent, self._seqs, self._endpoints):
                        known.pop(peer, None)
                elif self._link(peer) not in (None, absence.link):
                    del self._absent[peer]
                    self._on_back(peer)
                elif absence.is_lost and absence.is_due(now) and self._endpoints.get(peer) is not None:
                    self.call(peer)

    async def _call(self, peer: PeerId) -> None:
        try:
            link = await self._reach(peer)
        except Unreachable as error:
            self.went(peer, str(error))
            return
        finally:
            self._calling.discard(peer)
        for message in self._outbox.pop(peer, []):
            link.send(message)

    async def _reach(self, peer: PeerId) -> Link:
        endpoint = self._endpoints.get(peer)
        if endpoint is None:
            return await self._peers.link(peer, None)  # we wait for its call, which costs nothing
        await self._dials.take(1)
        try:
            return await self._peers.link(peer, endpoint)
        finally:
            self._dials.give(1)

    def _link(self, peer: PeerId) -> Link | None:
        link = self._peers.get(peer)
        return link if link is not None and link.up else None
