"""Where peers ask for states: what this daemon holds of each run, and chunk after chunk for those who load it.

Strategy: a joiner must not cost a round anything that its members would notice. What is served is held beside the
rounds (`shelf.py`), chunks leave one at a time per joiner, so at most one stands in front of a round's records on the
same link, and while a round is under way here each of them waits a quarter of a second, or until the round is over.
Everything is bounded: joiners at once, chunks on order, states held, and the time for which anybody is waited for.
"""

import collections
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import trio

from mpd.errors import LocalError, PeerError
from mpd.ids import RoundId
from mpd.state_messages import (
    MAX_WANTED,
    NoState,
    StateAsk,
    StateGone,
    StateHashes,
    StateList,
    StateOffer,
    StateWant,
)
from mpd.wire import HEADER_BYTES, Header, Kind, pack_header

from .budgets import Budgets
from .containment import confine
from .keeping import Keeper
from .links import Landing, Link
from .shelf import HeldState, Shelf

GIVE_WAY_S = 0.25  # how long a chunk waits for a round that is under way
_EXPIRE_S = 5.0
IDLE_S = 30.0  # how long a joiner that wants nothing is waited for
_UNCONFIRMED = 8  # chunks that are sent again if a data connection is lost: who has them on order wants no others yet

Message = StateAsk | StateOffer | NoState | StateList | StateHashes | StateWant | StateGone
MESSAGES = (StateAsk, StateOffer, NoState, StateList, StateHashes, StateWant, StateGone)


class Loader(Protocol):
    """A load under way."""

    run_name: str

    def on_message(self, link: Link, message: Any) -> None:
        """A peer answered. Raises PeerError."""

    def on_link_down(self, link: Link, reason: str) -> None:
        """A link has ended."""

    def landing(self, link: Link, header: Header) -> Landing | None:
        """A chunk is on its way; None: to somebody else."""


class StateDesk:
    """All states of this daemon, and all loads. `quiet` waits until no round is under way here."""

    def __init__(self, quiet: Callable[[], Awaitable[None]]) -> None:
        self.budgets = Budgets()
        self.keeper: Keeper | None = None
        self._quiet = quiet
        self._shelves: dict[str, Shelf] = {}
        self._loaders: list[Loader] = []
        self._asking: set[tuple[Link, str]] = set()
        self._services: dict[tuple[Link, bytes], _Service] = {}
        self._nursery: trio.Nursery | None = None

    async def serve(self) -> None:
        """Serve others until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while True:
                await trio.sleep(_EXPIRE_S)
                for shelf in self._shelves.values():
                    shelf.expire()

    def open(self, run: str, shelf: Shelf) -> None:
        """This daemon takes part in `run` from now on."""
        self._shelves[run] = shelf

    def close(self, run: str, shelf: Shelf) -> None:
        """It does so no more."""
        if self._shelves.get(run) is shelf:
            del self._shelves[run]

    @contextmanager
    def hearing(self, loader: Loader) -> Iterator[None]:
        """Let `loader` hear what peers answer."""
        self._loaders.append(loader)
        try:
            yield
        finally:
            self._loaders.remove(loader)

    # ----------------------------------------------------------------------------------------------------- from links

    def on_message(self, link: Link, message: Message) -> None:
        """A peer says something about states. Raises PeerError if it may not say that."""
        match message:
            case StateAsk():
                self._on_ask(link, message)
            case StateList():
                self._on_list(link, message)
            case StateWant():
                self._on_want(link, message)
            case _:
                for loader in self._loaders:
                    loader.on_message(link, message)

    def on_link_down(self, link: Link, reason: str) -> None:
        """A link has ended: whom it led to is served no more, and serves no more."""
        for (other, _), service in list(self._services.items()):
            if other is link:
                service.scope.cancel()
        for loader in list(self._loaders):
            loader.on_link_down(link, reason)

    def landing(self, link: Link, header: Header) -> Landing | None:
        """A chunk is on its way; None if nobody has ordered it."""
        landings = (loader.landing(link, header) for loader in self._loaders)
        return next((landing for landing in landings if landing is not None), None)

    # -------------------------------------------------------------------------------------------------------- serving

    async def give_way(self) -> None:
        """Let a round that is under way have the line for a moment."""
        with trio.move_on_after(GIVE_WAY_S):
            await self._quiet()

    def _on_ask(self, link: Link, ask: StateAsk) -> None:
        shelf = self._shelves.get(ask.run)
        if shelf is None or self._nursery is None:
            link.send(NoState(ask.run, "no trainer there takes part in the run"))
        elif shelf.terms.digest != ask.digest:
            link.send(NoState(ask.run, "it uses this run's name with other terms"))
        elif (link, ask.run) not in self._asking:  # else the answer is on its way
            self._asking.add((link, ask.run))
            self._nursery.start_soon(confine, "answer about a state", self._answer, link, ask, shelf)

    async def _answer(self, link: Link, ask: StateAsk, shelf: Shelf) -> None:
        try:
            if shelf.is_late:
                link.send(NoState(ask.run, "a round is under way there", soon=True))
            if shelf.is_empty and self.keeper is not None:
                await self.keeper.restore(ask.run, shelf)
            state = await shelf.state(ask.round_id)
        except LocalError as error:
            link.send(NoState(ask.run, str(error)))
        else:
            manifest = state.manifest
            link.send(StateOffer(ask.run, manifest.digest, manifest.round_id, manifest.number, state.metadata))
        finally:
            self._asking.discard((link, ask.run))

    def _on_list(self, link: Link, message: StateList) -> None:
        state = self._find(message.manifest)
        if state is None:
            link.send(StateGone(message.manifest, "it holds this state no more"))
        elif message.first >= state.manifest.n_chunks:
            raise PeerError(f"it asks for the hash of chunk {message.first} of {state.manifest.n_chunks}")
        else:
            state.used_at = trio.current_time()
            link.send(StateHashes(message.manifest, message.first, state.manifest.page(message.first)))

    def _on_want(self, link: Link, message: StateWant) -> None:
        key = (link, message.manifest)
        service = self._services.get(key)
        if service is None:
            state = self._find(message.manifest)
            if state is None or self._nursery is None:
                link.send(StateGone(message.manifest, "it holds this state no more"))
                return
            if not self.budgets.joiners.take():
                link.send(StateGone(message.manifest, "it serves as many joiners as it may"))
                return
            service = self._services[key] = _Service(self, link, state)
            self._nursery.start_soon(confine, "joiner", self._carry, key, service)
        service.want(message.chunks)

    async def _carry(self, key: tuple[Link, bytes], service: "_Service") -> None:
        try:
            with service.scope:
                await service.run()
        finally:
            del self._services[key]
            self.budgets.joiners.give()

    def _find(self, manifest: bytes) -> HeldState | None:
        found = (shelf.find(manifest) for shelf in self._shelves.values())
        return next((state for state in found if state is not None), None)


class _Service:
    """One joiner on one link, being served one state."""

    def __init__(self, desk: StateDesk, link: Link, state: HeldState) -> None:
        self.scope = trio.CancelScope()
        self._desk = desk
        self._link = link
        self._state = state
        self._wanted: collections.deque[int] = collections.deque()
        self._news = trio.Event()
        self._sent: collections.deque[_Parcel] = collections.deque()

    def want(self, chunks: tuple[int, ...]) -> None:
        """The joiner orders. Raises PeerError if it orders more than it may, or what does not exist."""
        if len(self._wanted) + len(chunks) > MAX_WANTED:
            raise PeerError(f"it wants more than {MAX_WANTED} chunks of a state at once")
        if max(chunks) >= self._state.manifest.n_chunks:
            raise PeerError(f"it wants chunk {max(chunks)} of a state of {self._state.manifest.n_chunks} chunks")
        self._wanted.extend(chunks)
        self._news.set()

    async def run(self) -> None:
        """Send what is wanted until nothing is for a while, or the state is gone."""
        state = self._state
        try:
            while await self._is_wanted():
                if not state.is_open:  # it made room for a newer one while nothing was wanted of it
                    self._link.send(StateGone(state.manifest.digest, "it holds this state no more"))
                    return
                state.readers += 1
                try:
                    await self._send(self._wanted.popleft())
                finally:
                    state.readers -= 1
                    state.used_at = trio.current_time()
        finally:
            for parcel in self._sent:
                self._link.drop_shipments(parcel)

    async def _send(self, chunk: int) -> None:
        """Send one chunk once it may go, and wait until it has left."""
        await self._desk.give_way()
        parcel = _Parcel(self._state, chunk)
        self._sent.append(parcel)
        self._link.ship(parcel)
        await parcel.has_left.wait()
        if len(self._sent) > _UNCONFIRMED:
            self._link.drop_shipments(self._sent.popleft())

    async def _is_wanted(self) -> bool:
        with trio.move_on_after(IDLE_S):
            while not self._wanted:
                self._news = trio.Event()
                await self._news.wait()
        return bool(self._wanted)


class _Parcel:
    """One chunk of a state on its way out."""

    def __init__(self, state: HeldState, chunk: int) -> None:
        self.owner: object = self  # it is dropped by itself
        self.chunk = chunk
        self.has_left = trio.Event()
        self._state = state

    def load(self) -> tuple[bytes, memoryview] | None:
        if not self._state.is_open:
            self.has_left.set()
            return None
        manifest, payload = self._state.manifest, self._state.chunk(self.chunk)
        header = Header(Kind.STATE, 0, 0, self.chunk, len(payload), 0, RoundId(manifest.digest[:16]), 0)
        return pack_header(header), payload

    def n_bytes(self) -> int:
        return HEADER_BYTES + len(self._state.chunk(self.chunk))

    def sent(self, n_bytes: int) -> None:
        self.has_left.set()
