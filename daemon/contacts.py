"""The peers of one run as people to call: where they are, whether they answered, and what we still have to tell them.

A record in the rendezvous outlives the peer that published it. So whoever could not be reached, or whose link ended, is
absent until it speaks up or a new call to it goes through.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from mpd.ids import Endpoint, PeerId

from .links import Link
from .peers import Peers, Unreachable
from .roster import Seen

_FORGIVE_S = 10.0  # after this an absent peer is called again


@dataclass(frozen=True, slots=True)
class _Absence:
    """A peer that is gone, what it had published by then, and why. `link` is still up after a goodbye."""

    seq: int
    since: float
    reason: str
    link: Link | None


class Contacts:
    """Calls peers and remembers how that went. `on_absent` hears of each peer that turns out to be gone."""

    def __init__(self, peers: Peers, on_absent: Callable[[PeerId, str], None]) -> None:
        self.nursery: trio.Nursery | None = None  # where calls are made; nobody is called while there is none
        self._peers = peers
        self._on_absent = on_absent
        self._watched: set[Link] = set()
        self._seqs: dict[PeerId, int] = {}
        self._endpoints: dict[PeerId, Endpoint | None] = {}
        self._absent: dict[PeerId, _Absence] = {}
        self._outbox: dict[PeerId, list[Any]] = {}  # what to say to peers that are being called
        self._calling: set[PeerId] = set()

    @property
    def absences(self) -> dict[PeerId, str]:
        """Who went or could not be reached lately, and why."""
        recently = trio.current_time() - 2 * _FORGIVE_S
        return {peer: absence.reason for peer, absence in self._absent.items() if absence.since > recently}

    def note(self, seen: Seen) -> None:
        """Remember where a peer says that it can be called."""
        self._seqs[seen.peer] = seen.seq
        self._endpoints[seen.peer] = seen.endpoint

    def came(self, peer: PeerId, endpoint: Endpoint | None) -> None:
        """The peer spoke to us."""
        self._absent.pop(peer, None)
        self._endpoints[peer] = endpoint

    def accepts_calls(self, peer: PeerId) -> bool:
        """Return True if the peer can be called, as far as we know."""
        return self._endpoints.get(peer) is not None

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
        if seen.seq > absence.seq or trio.current_time() - absence.since > _FORGIVE_S:
            self.note(seen)
            self.call(seen.peer)
        return False

    def went(self, peer: PeerId, reason: str) -> None:
        """The peer said goodbye, its link ended, or it cannot be reached."""
        before = self._absent.get(peer)
        if before is not None and before.link is not None:
            reason = before.reason  # the end of its link was announced
        seq = self._seqs.get(peer, -1)
        self._absent[peer] = _Absence(seq, trio.current_time(), reason, self._link(peer))
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
            self._calling.add(peer)
            self.nursery.start_soon(self._call, peer)

    def watch(self, patience: Mapping[PeerId, float]) -> None:
        """Expect a sign of life every so many seconds from these peers, and no longer from those named before."""
        links = {link for link in map(self._link, patience) if link is not None}
        for link in self._watched - links:
            link.awaited -= 1
        for link in links - self._watched:
            link.patience_s = patience[link.peer]
            link.awaited += 1
        self._watched = links

    async def _call(self, peer: PeerId) -> None:
        try:
            link = await self._peers.link(peer, self._endpoints.get(peer))
        except Unreachable as error:
            self.went(peer, str(error))
            return
        finally:
            self._calling.discard(peer)
        for message in self._outbox.pop(peer, []):
            link.send(message)

    def _link(self, peer: PeerId) -> Link | None:
        link = self._peers.get(peer)
        return link if link is not None and link.up else None
