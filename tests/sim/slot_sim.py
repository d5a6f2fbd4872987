"""A slot without a network: real `Matchmaker` machines, a clock made of numbers, and faults as data.

Messages of one pair arrive in order, after delays that a seeded generator draws. Nothing else is simulated: what a
machine asks for is carried out, and a peer that cannot be reached is reported as gone.
"""

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from functools import partial

from mpd.errors import PeerError
from mpd.grouping import compose_begins
from mpd.ids import PeerId
from mpd.mass import enter
from mpd.matchmaking import Begun, MatchLimits, Matchmaker, Message, Sighting, State
from mpd.messages import Join

RUN, SLOT, DIGEST, NUMBER = "sim", b"s" * 20, b"d" * 32, 6
LIMITS = MatchLimits()


def peer(index: int) -> PeerId:
    """Ids in the order of their index; people see different first letters."""
    return PeerId(bytes([7 * index]) + bytes([index]) * 19)


def ticket(stamp: int, *, inbound: bool = True, time_left_s: float = 60.0, **changes: object) -> Join:
    fields: dict[str, object] = {
        "run": RUN,
        "slot": SLOT,
        "digest": DIGEST,
        "epoch": 1,
        "number": NUMBER,
        "stamp": stamp,
        "standing": enter(1.0, (0,)),
        "host": "192.0.2.1",
        "port": 4747 if inbound else 0,
        "inbound": inbound,
        "bandwidth": 0.0,
        "time_left_s": time_left_s,
    }
    return Join(**(fields | changes))  # type: ignore[arg-type]


class SlotSim:
    """`n` peers, of which those in `outbound` accept no connections."""

    def __init__(
        self,
        n: int,
        seed: int = 0,
        *,
        delay_s: Callable[[random.Random], float] = lambda rng: rng.uniform(0.001, 0.2),
        line_size: int = 0,
        outbound: frozenset[int] = frozenset(),
    ) -> None:
        self.rng = random.Random(seed)
        self.n, self.now, self.outbound = n, 0.0, outbound
        self.alive = set(range(n))
        self.frames: Counter[str] = Counter()
        self.sent_by: Counter[int] = Counter()
        self.ended_at: dict[int, float] = {}
        self._delay_s = delay_s
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._arrives: dict[tuple[int, int], float] = {}
        compose = partial(
            compose_begins,
            shape=(1,),
            n_peers=n,
            exact=True,
            rng=random.Random(seed),
            progress_s=2.0,
            payload_bytes=1 << 20,
        )
        self.machines = [Matchmaker(peer(i), SLOT, RUN, NUMBER, compose, LIMITS, line_size) for i in range(n)]

    # what happens

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._order), action))

    def sight(self, when: float, who: int, whom: int) -> None:
        """The DHT shows `whom` to `who`."""
        seen = Sighting(peer(whom), inbound=whom not in self.outbound, ready=False, stamp=0)
        self.at(when, lambda: self._feed(who, lambda machine: machine.on_sighted(self.now, seen)))

    def ready(self, when: float, who: int, stamp: int, time_left_s: float = 60.0) -> None:
        """The trainer of `who` asks."""
        mine = ticket(stamp, inbound=who not in self.outbound, time_left_s=time_left_s)
        self.at(when, lambda: self._feed(who, lambda machine: machine.on_ready(self.now, mine)))

    def kill(self, when: float, who: int) -> None:
        """`who` stops; each other peer notices within 0.3 s."""
        self.at(when, lambda: self._kill(who))

    def announce_all(self, spread_s: float = 0.0, sighting_s: float = 0.1) -> None:
        """Everybody announces itself within `spread_s`, and soon sees all who did so before."""
        times = sorted((self.rng.uniform(0, spread_s), i) for i in range(self.n))
        for rank, (when, who) in enumerate(times):
            for _, earlier in times[:rank]:
                self.sight(when + self.rng.uniform(0, sighting_s), who, earlier)

    def run(self, until: float = math.inf) -> None:
        """Let everything happen that happens before `until`."""
        while self._queue and self._queue[0][0] <= until:
            self.now, _, action = heapq.heappop(self._queue)
            action()
        self.now = max(self.now, until) if until < math.inf else self.now

    # what is asked

    def begun(self) -> dict[int, Begun]:
        """Each peer that holds a Begin, dead or alive."""
        return {i: m.verdict for i, m in enumerate(self.machines) if isinstance(m.verdict, Begun)}

    def groups(self) -> set[frozenset[int]]:
        """The groups that began, as those who hold their Begin."""
        holders: dict[bytes, set[int]] = {}
        for i, verdict in self.begun().items():
            holders.setdefault(verdict.begin.round_id, set()).add(i)
        return {frozenset(group) for group in holders.values()}

    def check(self) -> None:
        """Whatever happened, this must hold."""
        begins = {verdict.begin.round_id: verdict.begin for verdict in self.begun().values()}
        leaders = Counter(verdict.begin.round_id for verdict in self.begun().values() if verdict.leader)
        assert leaders == dict.fromkeys(begins, 1), "each Begin has exactly one leader"
        for i, verdict in self.begun().items():
            assert peer(i) in {member.peer for member in verdict.begin.members}
        for i in self.alive:
            machine = self.machines[i]
            assert machine.state in (State.EXPECTED, State.BEGUN, State.ALONE), f"{i} never ended: {machine.reason}"
            assert machine.wakeup is None

    def named_twice(self) -> set[bytes]:
        """Peers that are named in two Begins."""
        begins = {verdict.begin.round_id: verdict.begin for verdict in self.begun().values()}
        named = Counter(member.peer for begin in begins.values() for member in begin.members)
        return {who for who, times in named.items() if times > 1}

    # how it works

    def _feed(self, who: int, event: Callable[[Matchmaker], None]) -> None:
        if who not in self.alive:
            return
        machine = self.machines[who]
        event(machine)
        for send in machine.take_actions():
            self._send(who, send.peer, send.message)
        if machine.verdict is not None:
            self.ended_at.setdefault(who, self.now)
        if (wakeup := machine.wakeup) is not None:
            assert wakeup > self.now, "a wake-up that is due already would be a busy loop"
            self.at(wakeup, lambda: self._tick(who, wakeup))

    def _tick(self, who: int, wakeup: float) -> None:
        if self.machines[who].wakeup == wakeup:
            self._feed(who, lambda machine: machine.on_tick(self.now))

    def _send(self, sender: int, to: PeerId, message: Message) -> None:
        receiver = to[1]
        assert peer(receiver) == to, "nobody made up a peer here"
        assert receiver != sender, "nobody talks to itself"
        self.frames[type(message).__name__] += 1
        self.sent_by[sender] += 1
        when = max(self._arrives.get((sender, receiver), 0.0), self.now + self._delay_s(self.rng))
        self._arrives[sender, receiver] = when
        if {sender, receiver} <= self.outbound:
            self.at(when, lambda: self._gone(sender, receiver, "neither side accepts connections"))
        else:
            self.at(when, lambda: self._deliver(sender, receiver, message))

    def _deliver(self, sender: int, receiver: int, message: Message) -> None:
        if receiver not in self.alive:
            self._gone(sender, receiver, "cannot be reached")
        else:
            self._feed(receiver, lambda machine: self._say(machine, sender, message))

    def _say(self, machine: Matchmaker, sender: int, message: Message) -> None:
        try:
            machine.on_message(self.now, peer(sender), message)
        except PeerError as error:  # every machine here is correct
            raise AssertionError(f"{sender} was blamed for {message}") from error

    def _gone(self, who: int, whom: int, reason: str) -> None:
        self._feed(who, lambda machine: machine.on_gone(self.now, peer(whom), reason))

    def _kill(self, who: int) -> None:
        self.alive.discard(who)
        for other in self.alive:
            self.at(self.now + self.rng.uniform(0, 0.3), partial(self._gone, other, who, "its link broke"))
