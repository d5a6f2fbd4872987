"""Fetching one state from several peers at once: who is asked for which chunk, and what becomes of those who fail.

Strategy: every source has a few chunks on order at any time, so fast ones deliver more by themselves. A chunk counts
once its hash is right; a source that sends anything else is dropped and named, as is one that falls silent. What a lost
source had on order goes back to the others, and what has arrived stays, whoever comes and goes. When nothing is left to
order, whoever is free is asked for what somebody else owes for long.

`Fetch` is a machine: it knows no clock and no link. It judges chunks, its owner keeps them.
"""

import collections
from dataclasses import dataclass, field

from mpd.ids import PeerId
from mpd.manifest import Manifest

ON_ORDER = 4  # chunks per source: enough for 40 MB/s over 100 ms, and little in front of a round on the same line
SILENT_S = 10.0  # a source that owes chunks and delivers nothing for so long is dropped
RESCUE_S = 1.0  # what one source owes for so long, another one may deliver


@dataclass
class _Source:
    heard_at: float
    owes: dict[int, float] = field(default_factory=dict)  # chunk: when it was ordered


class Fetch:
    """The chunks of `manifest` on their way here.

    `dropped` says which sources were given up and why, `delivered` how many chunks came from whom.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.dropped: dict[PeerId, str] = {}
        self.delivered: collections.Counter[PeerId] = collections.Counter()
        self._sources: dict[PeerId, _Source] = {}
        self._here = bytearray(manifest.n_chunks)
        self._n_missing = manifest.n_chunks
        self._next = 0  # chunks from here on were never ordered
        self._again: collections.deque[int] = collections.deque()  # ordered from somebody who was lost

    @property
    def is_done(self) -> bool:
        """True once every chunk has arrived."""
        return not self._n_missing

    @property
    def n_missing(self) -> int:
        """How many chunks have not arrived."""
        return self._n_missing

    @property
    def sources(self) -> tuple[PeerId, ...]:
        """Who delivers."""
        return tuple(self._sources)

    def add(self, now: float, peer: PeerId) -> None:
        """`peer` holds this state. Whoever was dropped stays so."""
        if peer not in self.dropped:
            self._sources.setdefault(peer, _Source(now))

    def lose(self, peer: PeerId) -> None:
        """`peer` is gone, or holds the state no more; it may come back."""
        source = self._sources.pop(peer, None)
        if source is not None:
            self._again.extend(chunk for chunk in source.owes if not self._here[chunk])

    def drop(self, peer: PeerId, why: str) -> None:
        """`peer` is of no use for good."""
        self.dropped.setdefault(peer, why)
        self.lose(peer)

    def have(self, chunk: int) -> None:
        """This chunk was here already."""
        if not self._here[chunk]:
            self._here[chunk] = 1
            self._n_missing -= 1

    def on_chunk(self, now: float, peer: PeerId, chunk: int, payload: bytes | bytearray | memoryview) -> bool:
        """`peer` has sent a chunk; return whether to keep it. Chunks that nobody ordered from it are nothing."""
        source = self._sources.get(peer)
        if source is None or chunk not in source.owes:
            return False
        del source.owes[chunk]
        if self._here[chunk]:
            source.heard_at = now
            return False
        if not self.manifest.matches(chunk, payload):
            self._again.append(chunk)
            self.drop(peer, f"what it sent as chunk {chunk} is something else")
            return False
        source.heard_at = now
        self.delivered[peer] += 1
        self.have(chunk)
        return True

    def on_tick(self, now: float) -> None:
        """Time has passed: drop who is silent, and let others have what one source owes for too long."""
        for peer, source in list(self._sources.items()):
            if source.owes and now - max(source.heard_at, min(source.owes.values())) >= SILENT_S:
                self.drop(peer, f"it delivered nothing for {SILENT_S:g} s")
            else:
                for chunk, since in list(source.owes.items()):
                    if now - since >= SILENT_S:  # it was lost with a connection: the source has gone on behind it
                        del source.owes[chunk]
                        self._again.append(chunk)

    def orders(self, now: float) -> list[tuple[PeerId, tuple[int, ...]]]:
        """Return what to ask for now, and of whom. It counts as asked."""
        made: dict[PeerId, list[int]] = {}
        progress = True
        while progress:  # one chunk each in turn, or the first would take what is left of a small state
            progress = False
            for peer, source in self._sources.items():
                chunk = self._pick(now, peer) if len(source.owes) < ON_ORDER else None
                if chunk is not None:
                    source.owes[chunk] = now
                    made.setdefault(peer, []).append(chunk)
                    progress = True
        return [(peer, tuple(chunks)) for peer, chunks in made.items()]

    def _pick(self, now: float, peer: PeerId) -> int | None:
        while self._again:
            chunk = self._again.popleft()
            if not self._here[chunk]:
                return chunk
        while self._next < len(self._here):
            chunk, self._next = self._next, self._next + 1
            if not self._here[chunk]:
                return chunk
        return self._rescue(now, peer)

    def _rescue(self, now: float, peer: PeerId) -> int | None:
        """Return a chunk that exactly one other source owes for long, the longest first."""
        owed = collections.Counter(chunk for source in self._sources.values() for chunk in source.owes)
        late = [
            (since, chunk)
            for other, source in self._sources.items()
            if other != peer
            for chunk, since in source.owes.items()
            if now - since >= RESCUE_S and owed[chunk] == 1 and not self._here[chunk]
        ]
        return min(late)[1] if late else None
