"""Who we are linked to: dialling, accepting, and at most one link per peer.

A connection proves what it is with its first bytes: TLS is a call from a member, and a data greeting carries a handle
that was agreed on a control connection moments before. Two peers that dial each other at once would end with two links,
or, each giving way to the other, with none; so whoever is being called does not dial, and of two calls that cross the
smaller id's goes through once it has got as far as a connection. A peer that calls although we believe to be linked has
lost that link, so the new one replaces it, but only once it is complete; that is also how a link gets new TLS keys
once a day. Whoever is no member any more loses its link.
"""

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from mpd.errors import PeerError
from mpd.ids import Endpoint, PeerId, show_peer
from mpd.messages import PEER_VERSION, Goodbye, Hello

from . import faults
from .budgets import Budgets
from .channels import Sealing, own_suites, tune
from .containment import UNEXPECTED, confine, contained, report
from .door import Door
from .handshake import CROSSED, HANDSHAKE_S, CallBook, Calls, Met, answer, call, probe, refuse, why
from .links import Link, LinkEvents
from .tls import Membership, Tls, Unwelcome, leaf_of, wrap_server

RECHECK_S = 30.0  # how often it is asked whether those we are linked to are still members
MAX_LINK_AGE_S = 24 * 3600.0  # then an idle link is made anew: whoever steals its TLS keys reads one day at most
_CROSSED_S = 1.0  # a crossing call that has not made the link by then has failed
_FAREWELL_S = 0.3  # how long a link that is cut may take to say why


class Unreachable(PeerError):
    """The peer could not be dialled, or somebody else answered."""


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One live link, for `mpd peers`."""

    peer: str
    role: str
    address: str
    goodput: float
    bytes_sent: int
    bytes_received: int
    rounds: int


@dataclass(frozen=True, slots=True)
class _Held:
    """A live link, with what its end of it proved and when."""

    link: Link
    leaf: bytes
    is_caller: bool  # we are
    since: float


class Peers:
    """All links of this daemon.

    Args:
        instance: 16 bytes, new with every start of the daemon.
        wall_ms: milliseconds since 1970, for dates in certificates and for finding clocks that are wrong.
    """

    def __init__(
        self,
        membership: Membership,
        instance: bytes,
        events: LinkEvents,
        random_bytes: Callable[[int], bytes],
        wall_ms: Callable[[], int],
        budgets: Budgets,
    ) -> None:
        self.endpoint = Endpoint("127.0.0.1", 0)  # where others are told to dial us; port 0: nowhere
        self.is_reachable = False  # whether that has been seen to work, or need not be doubted
        self.suites = own_suites()  # what data is sealed with
        self.door = Door(budgets, self._answer_call)
        self._membership = membership
        self._instance = instance
        self._events = events
        self._random_bytes = random_bytes
        self._wall_ms = wall_ms
        self._budgets = budgets
        self._held: dict[PeerId, _Held] = {}
        self._calls = CallBook()
        self._nursery: trio.Nursery | None = None

    def get(self, peer: PeerId) -> Link | None:
        """Return the live link to `peer`, if there is one."""
        held = self._held.get(peer)
        return held.link if held is not None else None

    def links(self) -> list[Link]:
        """Return all live links."""
        return [held.link for held in self._held.values()]

    @property
    def n_called(self) -> int:
        """How many of the links were made by the peer: it could reach us."""
        return sum(not held.is_caller for held in self._held.values())

    def snapshot(self) -> tuple[PeerStatus, ...]:
        """Return what `mpd peers` shows."""
        return tuple(
            PeerStatus(
                peer=show_peer(link.peer),
                role=link.member.role,
                address=str(link.endpoint) if link.endpoint else "outbound only",
                goodput=link.goodput,
                bytes_sent=link.bytes_sent,
                bytes_received=link.bytes_received,
                rounds=link.busy,
            )
            for link in sorted(self.links(), key=lambda link: link.peer)
        )

    # ------------------------------------------------------------------------------------------------------- lifetime

    async def serve(
        self, listeners: list[trio.SocketListener], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept connections and carry links until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                if listeners:
                    await nursery.start(trio.serve_listeners, self._accept, listeners)
                task_status.started()
                while True:
                    await trio.sleep(RECHECK_S)
                    self.recheck()
            finally:
                self._nursery = None

    async def say_goodbye(self, reason: str, within_s: float) -> None:
        """Tell every peer that we leave, and give the messages a moment to get out."""
        async with trio.open_nursery() as nursery:
            for link in self.links():
                link.send(Goodbye(reason))
                nursery.start_soon(link.flush, within_s)

    def cut(self, is_doomed: Callable[[Link], bool], reason: str) -> None:
        """End every link of which `is_doomed` is true; the peer is told `reason`."""
        for link in self.links():
            if is_doomed(link):
                self._start(self._cut, link, reason)

    def recheck(self) -> None:
        """Cut the links to whoever is no member any more; make old links anew. To be called after a revocation too."""
        for held in list(self._held.values()):
            reason = self._no_member(held)
            if reason:
                self._start(self._cut, held.link, reason)
            elif held.is_caller and not held.link.busy and trio.current_time() - held.since > MAX_LINK_AGE_S:
                self._start(self._call_again, held.link)

    def _start(self, action: Callable[..., Awaitable[None]], *args: Any) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(confine, "link", action, *args)

    async def _cut(self, link: Link, reason: str) -> None:
        link.send(Goodbye(reason))
        await link.flush(_FAREWELL_S)
        link.close(reason)

    async def _call_again(self, link: Link) -> None:
        """Make a link anew; should that fail, there is still the old one."""
        with self._calls.calls_with(link.peer) as calls, contextlib.suppress(Unreachable):
            if link.endpoint is not None and calls.dialling is None and not calls.answering:
                with trio.move_on_after(HANDSHAKE_S):
                    await self._dial(link.peer, link.endpoint, calls)

    def _no_member(self, held: _Held) -> str:
        """Return why the peer may not be linked to any more, or nothing."""
        if self._wall_ms() / 1000 > held.link.member.not_after_s:
            return "the certificate with which this link was made has expired"
        try:
            self._membership.check(held.leaf)
        except PeerError as error:
            return str(error)
        return ""

    # ------------------------------------------------------------------------------------------------------- dialling

    async def link(self, peer: PeerId, endpoint: Endpoint | None) -> Link:
        """Return a live link to `peer`, dialling `endpoint` if there is none. Raises Unreachable with the cause."""
        if peer == self._membership.own:
            raise Unreachable("it has our own key: two daemons must not share a state directory")
        with self._calls.calls_with(peer) as calls, trio.move_on_after(HANDSHAKE_S):
            while not self._is_linked(peer):
                if endpoint is None or calls.dialling is not None or calls.answering:
                    await calls.news.wait()
                else:
                    await self._dial(peer, endpoint, calls)
        if self._is_linked(peer):
            return self._held[peer].link
        if endpoint is None:
            raise Unreachable(f"accepts no connections and did not call within {HANDSHAKE_S:g} s")
        raise Unreachable(f"did not answer at {endpoint} within {HANDSHAKE_S:g} s")

    def _is_linked(self, peer: PeerId) -> bool:
        link = self.get(peer)
        return link is not None and link.up

    async def _dial(self, peer: PeerId, endpoint: Endpoint, calls: Calls) -> None:
        """Call the peer, or return early because it calls us. Raises Unreachable."""
        if self._nursery is None:
            raise Unreachable("this daemon is not running")
        if not self._has_room():
            raise Unreachable(f"this daemon has as many links as it may have: {self._budgets.links.limit}")
        try:
            with trio.CancelScope() as calls.dialling:
                if not await self._call(peer, endpoint, calls):
                    with trio.move_on_after(_CROSSED_S):
                        await calls.news.wait()
        except (OSError, PeerError, trio.BrokenResourceError) as error:
            raise Unreachable(f"cannot be reached at {endpoint}: {why(error)}") from error
        except Exception as error:
            report("call", error)
            raise Unreachable(UNEXPECTED) from error
        finally:
            calls.dialling, calls.connected = None, False
            calls.tell()

    async def _call(self, peer: PeerId, endpoint: Endpoint, calls: Calls) -> bool:
        """Make a link. Returns False if the peer says that its own call is on its way."""
        if faults.armed:
            await faults.outlast()
        stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
        calls.connected = True
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(trio.aclose_forcefully, stream)
            if faults.armed:
                faults.strike("handshake")
                await faults.outlast()
            tune(stream.socket)
            met = await call(stream, self._membership, peer, self._hello)
            if met is None:
                return False
            link = await self._establish(met, is_caller=True)
            undo.pop_all()
        if self._nursery is None:
            link.close("this daemon is leaving")
            await self._carry(link)
        else:
            self._nursery.start_soon(confine, "link", self._carry, link)
        return True

    async def probe(self, endpoint: Endpoint) -> str:
        """Return in a sentence who, if anybody, answers at `endpoint`, and why there is no contact."""
        return await probe(endpoint, self._membership, self._wall_ms)

    async def can_dial(self, endpoint: Endpoint) -> bool:
        """Return True if something accepts connections there. Only a peer that is linked from that host may ask."""
        if not any(link.remote_host == endpoint.host for link in self.links()) or not self._budgets.dial_backs.take():
            return False
        try:
            with trio.move_on_after(HANDSHAKE_S), contextlib.suppress(OSError):
                stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
                await trio.aclose_forcefully(stream)
                return True
            return False
        finally:
            self._budgets.dial_backs.give()

    # ------------------------------------------------------------------------------------------------------ accepting

    async def _accept(self, stream: trio.SocketStream) -> None:
        """Serve one incoming connection. trio closes `stream` when this returns."""
        with contained("connection"):
            link = await self.door.receive(stream)
            if link is not None:
                await self._carry(link)

    async def _answer_call(self, stream: trio.SocketStream) -> Link | None:
        if faults.armed:
            faults.strike("handshake")
            await faults.outlast()
        tune(stream.socket)
        try:
            connection, member = await wrap_server(stream, self._membership)
        except Unwelcome as error:
            await refuse(error.tls, str(error))
            return None
        if member.peer == self._membership.own:
            return None
        if not self._has_room():
            await refuse(connection, f"it has as many links as it may have: {self._budgets.links.limit}")
            return None
        with self._calls.calls_with(member.peer) as calls:
            if calls.dialling is not None:
                if calls.connected and self._membership.own < member.peer:
                    await refuse(connection, CROSSED)
                    return None
                calls.dialling.cancel()
            calls.answering += 1
            try:
                link = await self._establish(await answer(connection, member, self._hello), is_caller=False)
                self.is_reachable = self.endpoint.port != 0
                return link
            finally:
                calls.answering -= 1
                calls.tell()

    # ------------------------------------------------------------------------------------------------------- together

    def _hello(self, connection: Tls) -> Hello:
        return Hello(
            version=PEER_VERSION,
            instance=self._instance,
            host=self.endpoint.host,
            port=self.endpoint.port,
            seen_host=connection.transport_stream.socket.getpeername()[0],
            news=self._membership.news_seq,
            wall_ms=self._wall_ms(),
        )

    def _has_room(self) -> bool:
        return self._budgets.links.used < self._budgets.links.limit

    async def _establish(self, met: Met, *, is_caller: bool) -> Link:
        """Make a link of an acquaintance; the caller carries it. Raises PeerError."""
        if not self._budgets.links.take():
            raise PeerError("no room is left for another link")
        try:
            link = self._link_to(met, is_caller)
            await link.establish()
        except BaseException:
            self._budgets.links.give()
            raise
        old = self.get(link.peer)
        held = self._held[link.peer] = _Held(link, leaf_of(met.tls), is_caller, trio.current_time())
        if old is not None:
            old.close("made anew" if is_caller else "it called again")
        if reason := self._no_member(held):  # any more: that has come while the link was made
            link.close(reason)
        return link

    def _link_to(self, met: Met, is_caller: bool) -> Link:
        own, peer, hello = self._membership.own, met.member.peer, met.hello
        link = Link(
            peer=peer,
            instance=hello.instance,
            endpoint=Endpoint(hello.host, hello.port) if hello.port else None,
            control=met.tls,
            sealing=Sealing(
                swarm_id=self._membership.swarm_id,
                initiator=own if is_caller else peer,
                acceptor=peer if is_caller else own,
                is_initiator=is_caller,
                suites=self.suites,
                random_bytes=self._random_bytes,
            ),
            door=self.door.data,
            remote=met.tls.transport_stream.socket.getpeername()[:2],
        )
        link.member, link.news = met.member, hello.news
        link.clock_ahead_s = (hello.wall_ms - self._wall_ms()) / 1000
        return link

    async def _carry(self, link: Link) -> None:
        try:
            await link.run(self._events)
        finally:
            self._budgets.links.give()
            if self.get(link.peer) is link:
                del self._held[link.peer]
