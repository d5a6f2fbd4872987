"""Getting a run's vector from the peers that hold it: ask around, choose, fetch, and go on when somebody fails.

Strategy: everybody who is known to take part is asked, and whoever comes later too; `mpd.election` chooses what most of
them hold, and `mpd.fetch` gets it from all of those at once, straight into a fresh out region, which the trainer gets
like a result. This daemon has a voice too: what it holds, or has kept on disk, is an offer like any other, and costs no
transfer. If nobody holds the chosen state any more, the next one is chosen; all within the time that the trainer gave.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import trio

from mpd.control import LoadState, StateLoaded
from mpd.election import Choice, Offer, elect
from mpd.errors import LocalError, PeerError
from mpd.fetch import Fetch
from mpd.ids import Endpoint, PeerId, show_peer
from mpd.manifest import Manifest, chunk_span, n_chunks, page_bytes
from mpd.state_messages import NoState, StateAsk, StateGone, StateHashes, StateList, StateOffer, StateWant
from mpd.wire import Header, Kind

from .containment import UNEXPECTED, report
from .links import Landing, Link
from .memory import OutRegion
from .shelf import HeldState, Shelf
from .state_desk import StateDesk

ELECT_S = 1.5  # how long others may take to answer once somebody has offered
SETTLE_S = 1.0  # how long to go on looking when everybody that is known has nothing
ASK_S = 0.5  # how often to look for peers that were not asked
LOOK_S = 5.0  # the same while somebody delivers
ANSWER_S = 10.0  # how long a peer may take to be reached and to answer
SOON_S = 60.0  # and for the answer that it has promised for the end of its round
ASK_AGAIN_S = 3.0  # and to ask those who had nothing
LATE_ASK_S = 10.0  # the same while a state is being fetched
HASHES_S = 5.0  # how long one page of hashes may take
RESUME_S = 4.0  # how long to look for somebody who holds the rest
MAX_ASKED = 16  # peers; more would not change the choice
_TICK_S = 0.25


class Neighbours(Protocol):
    """What is needed of the lobby."""

    async def find_peers(self) -> dict[PeerId, Endpoint | None]:
        """Return the other peers of this run, and where each can be dialled."""


class Linking(Protocol):
    """What is needed of `Peers`."""

    def get(self, peer: PeerId) -> Link | None:
        """Return the live link to `peer`."""

    async def link(self, peer: PeerId, endpoint: Endpoint | None) -> Link:
        """Return a link to `peer`, made if need be. Raises PeerError."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Whom a load can turn to. `window_s`: how long to look for anybody at all."""

    own: PeerId
    lobby: Neighbours
    peers: Linking
    desk: StateDesk
    window_s: float


class _Vanished(Exception):
    """Nobody holds the chosen state any more."""


class Loading:
    """One wish of a trainer for the vector of the run `run_name`."""

    def __init__(self, run_name: str, shelf: Shelf, around: Surroundings, request: LoadState) -> None:
        self.run_name = run_name
        self._own = around.own
        self._terms = shelf.terms
        self._shelf = shelf
        self._around = around
        self._request = request
        self._began = self._looks_since = trio.current_time()  # the trainer's time runs from now on
        self._offers: dict[PeerId, Offer] = {}
        self._links: dict[PeerId, Link] = {}  # to those who have offered something
        self._asked: dict[PeerId, float] = {}  # when, for the last time
        self._waiting: dict[PeerId, float] = {}  # for whose answer, and until when
        self._first_offer_at: float | None = None
        self._has_looked = False
        self._choice: Choice | None = None
        self._fetch: Fetch | None = None
        self._region: OutRegion | None = None
        self._here: HeldState | None = None  # what this daemon held when the load began
        self._pages: dict[int, bytes] = {}
        self._paging: PeerId | None = None  # who sends hashes
        self._refusals: dict[PeerId, str] = {}
        self._dropped: dict[PeerId, str] = {}
        self._reason = "nobody was found who takes part in this run"
        self._bytes = 0
        self._changed = trio.Event()

    async def run(self) -> tuple[StateLoaded, HeldState | None]:
        """Load; return the answer for the trainer, and the state. Bounded by the time that the trainer gave."""
        state: HeldState | None = None
        self._looks_since = trio.current_time()
        deadline = self._began + self._request.timeout_s
        try:
            with self._around.desk.hearing(self), trio.move_on_at(deadline) as patience:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._ask_around, nursery)
                    state = await self._load()
                    nursery.cancel_scope.cancel()
            if patience.cancelled_caught:
                self._reason = f"it took longer than {self._request.timeout_s:g} s: {self._progress()}"
        except* LocalError as group:
            self._reason = str(group.exceptions[0])
        except* Exception as group:  # noqa: BLE001  # a bug costs the load
            report("load", group)
            self._reason = UNEXPECTED
        finally:
            if self._region is not None:
                self._region.close()
                self._shelf.unreserve()
        return self._answer(state), state

    # ----------------------------------------------------------------------------------------------------- from links

    def on_message(self, link: Link, message: Any) -> None:
        """A peer answered. What was not asked for is nothing."""
        peer = link.peer
        match message:
            case StateOffer() if message.run == self.run_name and peer in self._asked:
                self._waiting.pop(peer, None)
                if peer not in self._dropped:
                    self._offer(peer, Offer(message.manifest, message.round_id, message.number, message.metadata))
                    self._links[peer] = link
            case NoState() if message.run == self.run_name and peer in self._asked:
                if not message.soon:
                    self._withdraw(peer, message.reason[:200])
                elif peer in self._waiting:
                    self._waiting[peer] = self._asked[peer] + SOON_S
            case StateHashes() if self._choice is not None and message.manifest == self._choice.manifest:
                if peer == self._paging:
                    self._pages[message.first] = message.hashes
            case StateGone() if self._choice is not None and message.manifest == self._choice.manifest:
                self._withdraw(peer, message.reason[:200])
        self._wake()

    def on_link_down(self, link: Link, reason: str) -> None:
        """A link has ended."""
        if self._links.get(link.peer) is link or link.peer in self._waiting:
            self._withdraw(link.peer, reason)
            self._wake()

    def landing(self, link: Link, header: Header) -> Landing | None:
        """A chunk is on its way; None: it is not ours."""
        fetch = self._fetch
        if header.kind is not Kind.STATE or fetch is None or header.round_id != fetch.manifest.digest[:16]:
            return None
        return _Arrival(self, link, header.chunk)

    def on_chunk(self, link: Link, chunk: int, payload: memoryview) -> None:
        """A chunk has arrived, from whom it says."""
        fetch, region = self._fetch, self._region
        if fetch is None or region is None:
            return
        if fetch.on_chunk(trio.current_time(), link.peer, chunk, payload):
            begin, end = chunk_span(chunk, fetch.manifest.n_bytes)
            region.view[begin:end] = payload
            self._bytes += len(payload)
        self._wake()

    # ------------------------------------------------------------------------------------------------------ asking

    async def _ask_around(self, nursery: trio.Nursery) -> None:
        while True:
            for peer, endpoint in (await self._around.lobby.find_peers()).items():
                if self._may_ask(peer):
                    self._asked[peer] = trio.current_time()
                    self._waiting[peer] = trio.current_time() + ANSWER_S
                    nursery.start_soon(self._ask, peer, endpoint)
            self._has_looked = True
            self._wake()
            await trio.sleep(LOOK_S if self._fetch is not None and self._fetch.sources else ASK_S)

    def _may_ask(self, peer: PeerId) -> bool:
        if peer not in self._asked:
            return len(self._asked) < MAX_ASKED
        offer, fetch = self._offers.get(peer), self._fetch
        if peer in self._dropped or peer in self._waiting or (offer is not None and fetch is None):
            return False
        if fetch is not None and offer is not None and offer.manifest == fetch.manifest.digest:
            return False
        pause_s = LATE_ASK_S if fetch is not None and fetch.sources else ASK_AGAIN_S
        return trio.current_time() - self._asked[peer] > pause_s

    async def _ask(self, peer: PeerId, endpoint: Endpoint | None) -> None:
        try:
            link = self._around.peers.get(peer) or await self._around.peers.link(peer, endpoint)
        except PeerError as error:
            self._withdraw(peer, str(error))
            self._wake()
        else:
            round_id = self._choice.round_id if self._choice is not None else b""
            link.send(StateAsk(self.run_name, self._terms.digest, round_id))

    def _offer(self, peer: PeerId, offer: Offer) -> None:
        self._offers[peer] = offer
        self._refusals.pop(peer, None)
        if self._first_offer_at is None:
            self._first_offer_at = trio.current_time()

    def _withdraw(self, peer: PeerId, why: str) -> None:
        """`peer` has nothing for us now."""
        self._waiting.pop(peer, None)
        self._refusals[peer] = why
        self._offers.pop(peer, None)
        self._links.pop(peer, None)
        if self._fetch is not None:
            self._fetch.lose(peer)

    # ----------------------------------------------------------------------------------------------------- choosing

    async def _load(self) -> HeldState | None:
        await self._look_here()
        while True:
            self._choice = await self._choose()
            if self._choice is None:
                return None
            try:
                return await self._get(self._choice)
            except _Vanished:
                self._looks_since = trio.current_time()
                self._first_offer_at = self._looks_since if self._offers else None

    async def _look_here(self) -> None:
        """Make an offer of our own, if this daemon holds or has kept anything."""
        shelf, keeper = self._shelf, self._around.desk.keeper
        if shelf.is_empty and keeper is not None:
            await keeper.restore(self.run_name, shelf)
        if not shelf.is_empty and not shelf.is_late:
            state = self._here = await shelf.state()
            manifest = state.manifest
            self._offer(self._own, Offer(manifest.digest, manifest.round_id, manifest.number, state.metadata))

    async def _choose(self) -> Choice | None:
        """Wait until everybody has answered who will; return what most of them hold, None if nobody holds anything."""
        while True:
            now = trio.current_time()
            for peer in [peer for peer, until in self._waiting.items() if now >= until]:
                self._withdraw(peer, "it did not answer")
            if self._offers:
                assert self._first_offer_at is not None
                if (self._has_looked and not self._waiting) or now >= self._first_offer_at + ELECT_S:
                    return elect(self._offers)
            elif self._has_looked and not self._waiting and now >= self._looks_since + self._search_s:
                self._reason = self._nobody()
                return None
            await self._pause(_TICK_S)

    @property
    def _search_s(self) -> float:
        return SETTLE_S if self._asked else self._around.window_s

    # ----------------------------------------------------------------------------------------------------- fetching

    async def _get(self, choice: Choice) -> HeldState:
        here = self._here
        n_others = len(choice.holders) - (self._own in choice.holders)
        if here is not None and here.manifest.digest == choice.manifest:
            if not here.is_open:
                self._withdraw(self._own, "it has made room for a newer one")
                raise _Vanished
            self._reason = f"the vector after round {choice.number}, which this daemon holds itself"
            self._reason += f", like {n_others} of the others" if n_others else ""
            return here
        if self._region is None:
            self._shelf.reserve()
            try:
                self._region = await OutRegion.make(self._terms.layout.n_bytes)
            except BaseException:
                self._shelf.unreserve()
                raise
        if self._fetch is None or self._fetch.manifest.digest != choice.manifest:
            self._fetch = Fetch(await self._manifest(choice))
        await self._fetch_all(self._fetch)
        self._reason = f"the vector after round {choice.number}, from {len(self._fetch.delivered)} of "
        self._reason += f"{choice.n_offers} peers that offered one"
        region, self._region = self._region, None
        region.publish(1)
        return self._shelf.adopt(region, self._fetch.manifest, choice.metadata)

    async def _manifest(self, choice: Choice) -> Manifest:
        """Return the hashes of the chosen state: one peer sends them, and they are what was chosen or nothing."""
        n_bytes = self._terms.layout.n_bytes
        for peer in choice.holders:
            link = self._links.get(peer)
            if link is None:
                continue
            hashes = await self._hashes(choice, peer, link)
            if hashes is None:
                continue
            manifest = Manifest(self._terms.digest, choice.round_id, choice.number, n_bytes, hashes)
            if manifest.digest == choice.manifest:
                return manifest
            self._drop(peer, "its hashes are not those of the state that it offered")
        raise _Vanished

    async def _hashes(self, choice: Choice, peer: PeerId, link: Link) -> bytes | None:
        """Return all hashes as `peer` sends them; None if it does not."""
        n_bytes, hashes = self._terms.layout.n_bytes, bytearray()
        self._paging = peer
        try:
            while (first := len(hashes) // 32) < n_chunks(n_bytes):
                self._pages.clear()
                link.send(StateList(choice.manifest, first))
                with trio.move_on_after(HASHES_S):
                    while first not in self._pages and peer in self._offers:
                        await self._pause(_TICK_S)
                if len(self._pages.get(first, b"")) != page_bytes(first, n_bytes):
                    if peer in self._offers:
                        self._drop(peer, "it did not send the hashes of the state that it offered")
                    return None
                hashes += self._pages[first]
        finally:
            self._paging = None
        return bytes(hashes)

    async def _fetch_all(self, fetch: Fetch) -> None:
        """Fetch until nothing is missing. Raises _Vanished if nobody holds the rest for a while."""
        alone_since: float | None = None
        while not fetch.is_done:
            now = trio.current_time()
            for peer, offer in self._offers.items():
                if offer.manifest == fetch.manifest.digest and peer != self._own:
                    fetch.add(now, peer)
            fetch.on_tick(now)
            for peer, why in fetch.dropped.items():
                if peer not in self._dropped:
                    self._drop(peer, why)
            for peer, chunks in fetch.orders(now):
                self._links[peer].send(StateWant(fetch.manifest.digest, chunks))
            if fetch.sources:
                alone_since = None
            elif alone_since is None:
                alone_since = now
            elif now - alone_since > RESUME_S:
                raise _Vanished
            await self._pause(_TICK_S)

    def _drop(self, peer: PeerId, why: str) -> None:
        """`peer` is believed no more in this load."""
        self._withdraw(peer, why)
        self._dropped[peer] = why

    # ------------------------------------------------------------------------------------------------------- answers

    def _nobody(self) -> str:
        """Return why there is nothing to load."""
        if self._fetch is not None:
            return f"nobody holds the state any more: {self._progress()}"
        if not self._refusals:
            return self._reason
        peer, why = next(iter(self._refusals.items()))
        return f"none of {len(self._asked)} peers asked holds a state of this run; {show_peer(peer)}: {why}"

    def _progress(self) -> str:
        fetch = self._fetch
        if fetch is None:
            return self._reason
        n = fetch.manifest.n_chunks
        return f"{n - fetch.n_missing} of {n} chunks have come, from {len(fetch.delivered)} peers"

    def _answer(self, state: HeldState | None) -> StateLoaded:
        seconds = trio.current_time() - self._began
        fetch = self._fetch
        dropped = {show_peer(peer): why for peer, why in self._dropped.items()}
        if state is None:
            return StateLoaded(self._request.seq, False, self._reason, dropped=dropped, seconds=seconds)
        fetched = fetch is not None and state.manifest is fetch.manifest
        return StateLoaded(
            seq=self._request.seq,
            loaded=True,
            reason=self._reason,
            number=state.manifest.number,
            metadata=state.metadata,
            sources=tuple(sorted(map(show_peer, fetch.delivered))) if fetched and fetch is not None else (),
            dropped=dropped,
            seconds=seconds,
            bytes_received=self._bytes,
            generation=state.region.generation,
        )

    async def _pause(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class _Arrival:
    """One chunk on its way in. It is judged before it is put anywhere, so two for one place do no harm."""

    view: memoryview | None = None

    def __init__(self, loading: Loading, link: Link, chunk: int) -> None:
        self._loading = loading
        self._link = link
        self._chunk = chunk

    def progress(self) -> None:
        pass

    def complete(self, payload: memoryview) -> None:
        self._loading.on_chunk(self._link, self._chunk, payload)

    def abandon(self) -> None:
        pass
