"""Links in memory, with everything that can happen to TCP connections: delay, partitions, resets, silence, half-deaths.

A link has two lanes each way, control and data. A lane is first in first out; nothing is promised between lanes, and
nothing is duplicated, because no transport of ours duplicates: a record is sent once. What is on its way when a link
breaks arrives up to some seeded point and no further, separately in every lane. A path that is cut one way or both
ways loses nothing: what was sent waits, and arrives late if the path heals before either end has lost patience.

`Link` keeps the promises of that of the daemon. Who can reach whom, and what goes wrong, is for `sim.network` to say.
"""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sim import tasks
from sim.tasks import Event

from mpd.errors import PeerError
from mpd.identity import OPEN_SWARM, Member
from mpd.ids import Endpoint, PeerId
from mpd.wire import Kind, unpack_header

if TYPE_CHECKING:
    from sim.network import Network, Peers

IDLE_PATIENCE_S = 30.0
ROLE = "member"


class Lane:
    """One direction of one connection. `receive` is called with each thing on the receiving machine.

    Data is loaded from memory when one of `window` places is free, or with a window of 0 as late as can be.
    """

    def __init__(self, network: "Network", here: "Link", window: int, is_data: bool) -> None:
        self.waiting: deque[Any] = deque()
        self.flight: deque[Any] = deque()
        self._network, self._here, self._window, self._is_data = network, here, window, is_data
        self._is_moving = False
        self._is_over = False

    def put(self, item: Any) -> None:
        """Send something."""
        (self.waiting if self._is_data else self.flight).append(item)
        self._load(self._window)
        self.kick()

    def kick(self) -> None:
        """Let the next thing set out, if there is one and nothing is in its way."""
        if self._is_moving or not (self.flight or self.waiting or self._is_over):
            return
        here, there = self._here, self._here.far
        if self._network.is_cut(here.owner, there.owner) or (not self.flight and self.waiting and not here.is_awake()):
            self._network.stalled.append(self)
            return
        self._is_moving = True
        delay_s = self._network.delay_s(here.owner, there.owner)
        self._network.scheduler.at(self._network.scheduler.now + delay_s, self._arrive)

    def next(self) -> None:
        """The receiver is ready for more."""
        self._is_moving = False
        self._load(self._window)
        self.kick()

    def break_off(self, is_told: bool) -> None:
        """The connection ends: part of what the kernel has still arrives, and then the news, unless none comes."""
        self.waiting.clear()
        n_kept = self._network.rng.randint(0, len(self.flight))
        while len(self.flight) > n_kept:
            self.flight.pop()
        self._is_over = is_told
        self.kick()

    def forget(self) -> None:
        """Nobody reads this any more."""
        self.waiting.clear()
        self.flight.clear()
        self._is_over = False

    def drop(self, owner: object) -> None:
        """Forget the records of `owner` that were not loaded."""
        self.waiting = deque(item for item in self.waiting if item.owner is not owner)

    def _load(self, n: int) -> None:
        while len(self.flight) < n and self.waiting and self._here.is_awake():
            shipment = self.waiting.popleft()
            loaded = shipment.load()
            if loaded is not None:
                header, payload = loaded[0], bytes(loaded[1])
                shipment.sent(len(header) + len(payload))
                self.flight.append((header, payload))

    def _arrive(self) -> None:
        if self._network.is_cut(self._here.owner, self._here.far.owner):
            self._is_moving = False
            self.kick()
            return
        if not self.flight:
            self._load(1)
        there = self._here.far
        if self.flight:
            item = self.flight.popleft()
            there.owner.machine.happen(lambda: there.take(self, item))
        elif self._is_over:
            self._is_over = False
            there.owner.machine.happen(lambda: there.has_ended(self))
        else:
            self._is_moving = False
            self.kick()


class Link:
    """One end of a link; `far` is the other, `owner` the peers whose link this is."""

    far: "Link"

    def __init__(self, network: "Network", owner: "Peers", peer: PeerId, endpoint: Endpoint | None) -> None:
        self.owner, self.peer, self.endpoint = owner, peer, endpoint
        self.remote_host = "192.0.2.1"
        self.instance = b"i" * 16
        self.up = True
        self.patience_s = 2.0
        self.repairs_left = 3
        self.member = Member(peer, OPEN_SWARM, ROLE, None, 0.0, float("inf"))
        self.news = 0
        self.bytes_sent = self.bytes_received = 0
        self.goodput = 0.0
        self.control = Lane(network, self, 0, is_data=False)
        self.data = Lane(network, self, network.window, is_data=True)
        self._network = network
        self._busy = self._awaited = 0
        self._watched_since = 0.0
        self._arrived: deque[tuple[Lane, Any]] = deque()
        self._news = Event()
        self._n_open = 2  # lanes of the other end

    # what the daemon uses

    @property
    def is_watched(self) -> bool:
        """True if a round depends on this link, or a group that forms expects signs of life."""
        return self._busy > 0 or self._awaited > 0

    @property
    def busy(self) -> int:
        """How many rounds depend on this link."""
        return self._busy

    @busy.setter
    def busy(self, n_rounds: int) -> None:
        self._watch_from_now_on()
        self._busy = n_rounds

    @property
    def awaited(self) -> int:
        """How many groups that form expect signs of life."""
        return self._awaited

    @awaited.setter
    def awaited(self, n_lobbies: int) -> None:
        self._watch_from_now_on()
        self._awaited = n_lobbies

    def _watch_from_now_on(self) -> None:
        if not self.is_watched:
            self._watched_since = self._network.scheduler.now

    def send(self, message: Any) -> None:
        if self.up and self.is_alive():
            self.control.put(message)

    def ship(self, shipment: Any) -> None:
        if self.up and self.is_alive():
            self.data.put(shipment)

    def drop_shipments(self, owner: object) -> None:
        self.data.drop(owner)

    def unsent(self, owner: object) -> list[Any]:
        return [shipment for shipment in self.data.waiting if shipment.owner is owner]

    def detach(self, owner: object, chunk: int | None = None) -> None:
        """Records are copied when they are loaded, so there is nothing to make independent."""

    async def flush(self, within_s: float) -> None:
        await tasks.sleep(0)

    def close(self, reason: str) -> None:
        """End the link here; the other end finds out behind what still arrives there."""
        if self.up and self.is_alive():
            self.up = False
            for lane in (self.control, self.data):
                lane.break_off(is_told=True)
            for lane in (self.far.control, self.far.data):
                lane.forget()
            self.owner.machine.soon(lambda: self.owner.lose(self, reason))

    # what happens to it

    def is_alive(self) -> bool:
        return not self.owner.machine.is_over

    def is_awake(self) -> bool:
        return self.is_alive() and not self.owner.machine.is_frozen

    def take(self, lane: Lane, item: Any) -> None:
        """Something has arrived."""
        if not self.up:
            return
        if lane is self.far.data:
            self._arrived.append((lane, item))
            self._news.set()
            self._news = Event()
            return
        try:
            self.owner.events.on_message(self, item)  # type: ignore[arg-type]
        except PeerError as error:
            self._network.blame(self, error)
        lane.next()

    def has_ended(self, lane: Lane) -> None:
        """The other end is gone, and nothing more comes in this lane."""
        self._n_open -= 1
        if self.up and not self._n_open:
            self.up = False
            self.far.control.forget()
            self.far.data.forget()
            self.owner.lose(self, "it closed the connection")

    async def receive_records(self) -> None:
        """Take in the records that arrive, one after the other."""
        while self.up:
            while self._arrived:
                lane, (header, payload) = self._arrived[0]
                try:
                    await self._land(header, payload)
                except PeerError as error:
                    self._network.blame(self, error)
                self._arrived.popleft()
                lane.next()
            await self._news.wait()

    async def _land(self, packed: bytes, payload: bytes) -> None:
        header = unpack_header(packed)
        landing = await self.owner.events.landing(self, header)  # type: ignore[arg-type]
        if landing is None or not self.up:
            return
        if header.kind is not Kind.BYE:
            self._network.watch_record(self, header)
        if landing.view is not None:
            half = len(payload) // 2
            landing.view[:half] = payload[:half]
            landing.progress()
            if self._network.rng.random() < 0.2:
                await tasks.sleep(self._network.rng.uniform(0, 0.05))
                if not self.up:
                    landing.abandon()
                    return
            if landing.view is not None:
                landing.view[half:] = payload[half:]
        landing.complete(memoryview(bytearray(payload)))

    def watch(self, since: float, is_silent: Callable[[], bool]) -> None:
        """Nothing has come from the other end since then. End the link if that lasts."""
        machine = self.owner.machine

        def look() -> None:
            if not self.up or not is_silent():
                return
            now = self._network.scheduler.now
            silent_s = now - (max(since, self._watched_since) if self.is_watched else since)
            if silent_s > (self.patience_s if self.is_watched else IDLE_PATIENCE_S):
                self.close(f"nothing was heard from it for {silent_s:.1f} s")
            else:
                machine.at(machine.clock() + self.patience_s / 4, look)

        machine.at(machine.clock() + self.patience_s / 2, look)
