"""Who is linked to whom, who can reach whom, and everything that can happen to that.

`Peers` keeps the promises of that of the daemon: at most one link per pair as far as each end knows, `on_link_down`
last and once. Everything above it is real. The links are in `sim.wires`.
"""

import random
from collections.abc import Callable
from typing import Any

from sim import tasks
from sim.machine import Machine, Scheduler
from sim.tasks import Event
from sim.wires import Lane, Link

from mpd.daemon.links import LinkEvents
from mpd.daemon.peers import HANDSHAKE_S, Unreachable
from mpd.errors import PeerError
from mpd.ids import Endpoint, PeerId


class Peers:
    """All links of one machine, which can be dialled unless it is outbound-only."""

    def __init__(
        self, network: "Network", machine: Machine, index: int, own: PeerId, events: LinkEvents, inbound: bool
    ) -> None:
        self.machine, self.index, self.own, self.events = machine, index, own, events
        self.endpoint = Endpoint(f"192.0.2.{index + 1}", 4747 if inbound else 0)
        self.is_reachable = inbound
        self.made: dict[PeerId, Link] = {}
        self._network = network
        self._dialling: set[PeerId] = set()
        self._news = Event()

    def get(self, peer: PeerId) -> Link | None:
        return self.made.get(peer)

    def links(self) -> list[Link]:
        return list(self.made.values())

    async def link(self, peer: PeerId, endpoint: Endpoint | None) -> Link:
        """Return a link to `peer`, dialling it if need be. Raises Unreachable."""
        with tasks.move_on_after(HANDSHAKE_S):
            while not self._is_linked(peer):
                if endpoint is None or peer in self._dialling:
                    await self._news.wait()
                else:
                    self._dialling.add(peer)
                    try:
                        await self._network.dial(self, peer, endpoint)
                    finally:
                        self._dialling.discard(peer)
                        self._tell()
        if self._is_linked(peer):
            return self.made[peer]
        raise Unreachable("it did not answer" if endpoint else "it accepts no connections and did not call")

    def add(self, link: Link) -> None:
        """A link is up at this end."""
        old = self.made.get(link.peer)
        self.made[link.peer] = link
        if old is not None:
            old.close("it called again")
        self.machine.start(link.receive_records)
        self.events.on_link_up(link)  # type: ignore[arg-type]
        self._tell()

    def lose(self, link: Link, reason: str) -> None:
        """A link is over at this end."""
        self.events.on_link_down(link, reason)  # type: ignore[arg-type]
        if self.made.get(link.peer) is link:
            del self.made[link.peer]
        link._news.set()

    def _is_linked(self, peer: PeerId) -> bool:
        return peer in self.made and self.made[peer].up

    def _tell(self) -> None:
        self._news.set()
        self._news = Event()


class Network:
    """Who can reach whom. Places are numbered; a machine that restarts takes the place of the one before."""

    def __init__(self, scheduler: Scheduler, rng: random.Random) -> None:
        self.scheduler, self.rng = scheduler, rng
        self.window = rng.choice((0, 1, 4))
        self.at: dict[int, Peers] = {}  # who lives at each place now
        self.silent: set[int] = set()  # places where nothing even refuses a connection
        self.cuts: set[tuple[int, int]] = set()  # from, to
        self.stalled: list[Lane] = []
        self._left_behind: dict[int, list[Link]] = {}  # by the dead of each place, who did not say goodbye
        self.slow: dict[int, float] = {}  # place -> how much longer everything takes to and from there
        self.watch_record: Callable[[Link, Any], None] = lambda link, header: None
        self.blame: Callable[[Link, PeerError], None]
        self.base_s = rng.choice((0.001, 0.01, 0.05))
        self._pace: dict[tuple[int, int], float] = {}

    def delay_s(self, here: Peers, there: Peers) -> float:
        """Return how long the next thing takes from here to there."""
        pace = self._pace.setdefault((here.index, there.index), self.rng.choice((1.0, 1.0, 1.0, 4.0)))
        pace *= self.slow.get(here.index, 1.0) * self.slow.get(there.index, 1.0)
        return self.base_s * pace * self.rng.uniform(0.2, 2.0)

    @property
    def is_quick(self) -> bool:
        """True if an answer takes less than a tenth of a second."""
        return self.base_s <= 0.01 and not self.slow

    def round_s(self) -> float:
        """Return about how long a round takes."""
        return self.base_s * 20

    def is_cut(self, here: Peers, there: Peers) -> bool:
        return (here.index, there.index) in self.cuts

    async def dial(self, caller: Peers, peer: PeerId, endpoint: Endpoint) -> None:
        """Make a link from `caller` to whoever lives at `endpoint`. Raises Unreachable."""
        index = int(endpoint.host.rpartition(".")[2]) - 1
        place = (caller.index, index)
        await tasks.sleep(self.base_s * self.rng.uniform(0.5, 3))
        there = self.at.get(index)
        if {place, place[::-1]} & self.cuts or index in self.silent or (there and there.machine.is_frozen):
            await tasks.sleep(HANDSHAKE_S)
        if there is None or there.machine.is_over or there.own != peer:
            raise Unreachable(f"cannot be reached at {endpoint}: connection refused")
        if caller.own in there._dialling and there.own < caller.own:
            return  # two calls that cross: theirs goes through
        done = Event()
        there.machine.soon(lambda: self._answer(caller, there, done))
        await done.wait()

    def _answer(self, caller: Peers, there: Peers, done: Event) -> None:
        ends = [Link(self, a, b.own, b.endpoint if b.endpoint.port else None) for a, b in self._both(caller, there)]
        ends[0].far, ends[1].far = ends[1], ends[0]
        there.add(ends[1])

        def finish() -> None:
            if ends[1].up:
                caller.add(ends[0])
            else:
                ends[0].up = False
            done.set()

        if caller.machine.is_over:
            ends[1].close("the caller is gone")
        else:
            caller.machine.soon(finish)

    @staticmethod
    def _both(a: Peers, b: Peers) -> tuple[tuple[Peers, Peers], tuple[Peers, Peers]]:
        return (a, b), (b, a)

    # what goes wrong

    def die(self, index: int, *, silently: bool) -> None:
        """The machine at this place is gone; its links break, or just fall silent."""
        dead = self.at[index]
        dead.machine.end()
        if silently:
            self.silent.add(index)
        for link in dead.links():
            far = link.far
            link.up = False
            far.control.forget()
            far.data.forget()
            for lane in (link.control, link.data):
                lane.break_off(is_told=not silently)
            if silently:
                self._left_behind.setdefault(index, []).append(link)
                far.watch(self.scheduler.now, lambda: True)

    def move_in(self, peers: Peers) -> None:
        """A machine comes to life. The host answers again, so whoever still believes in its last life learns better."""
        self.at[peers.index] = peers
        self.silent.discard(peers.index)
        for link in self._left_behind.pop(peers.index, []):
            for lane in (link.control, link.data):
                lane.break_off(is_told=True)

    def reset(self, a: int, b: int) -> None:
        """The link between two places breaks, noticed at both ends behind what arrives."""
        link = next((link for link in self.at[a].links() if link.far.owner is self.at[b] and link.up), None)
        if link is not None:
            for lane in (link.control, link.data, link.far.control, link.far.data):
                lane.break_off(is_told=True)

    def cut(self, pairs: set[tuple[int, int]]) -> None:
        """Nothing gets from a to b any more, for these (a, b)."""
        self.cuts |= pairs
        for a, b in pairs:
            for link in self.at[a].links():
                if link.far.owner.index == b:
                    link.far.watch(self.scheduler.now, lambda pair=(a, b): pair in self.cuts)

    def heal(self, pairs: set[tuple[int, int]]) -> None:
        self.cuts -= pairs
        self._kick()

    def freeze(self, index: int) -> None:
        peers = self.at[index]
        peers.machine.freeze()
        for link in peers.links():
            link.far.watch(self.scheduler.now, lambda: peers.machine.is_frozen)

    def thaw(self, index: int, frozen_s: float) -> None:
        """Go on. Its own watch may look before the bytes that have arrived are read: then it ends the link."""
        peers = self.at[index]
        peers.machine.thaw()
        for link in peers.links():
            if link.is_watched and frozen_s > link.patience_s and self.rng.random() < 0.5:
                peers.machine.soon(lambda link=link: link.close("nothing was heard from it for a while"))
        self._kick()

    def _kick(self) -> None:
        stalled, self.stalled = self.stalled, []
        for lane in stalled:
            lane.kick()
