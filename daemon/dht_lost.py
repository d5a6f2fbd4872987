"""Those whom this node has lost: contacts that fell silent, and known peers from last time that it has not met yet.

A network that parts takes contacts away from both sides, and once each side has filled up with its own nobody would ask
for the others any more. So who was lost is asked again by itself: at once often, then at pauses that are a quarter of
the time that has passed. A split of seconds is over within seconds, one of a day within a minute. Who said goodbye was
not lost, and who has been away for a day is forgotten.
"""

import asyncio
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

from .dht_calls import Answer
from .dht_gate import Address

MAX_LOST = 64
FORGET_S = 24 * 3600.0
MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
LOOK_S = 0.5


@dataclass(slots=True)
class _Missing:
    address: Address
    since: float
    due: float


class Lost:
    """At most `MAX_LOST` nodes that are looked for. `ping` asks who lives at an address, `clock` never goes back."""

    def __init__(self, ping: Callable[[Address], Answer], clock: Callable[[], float], rng: random.Random) -> None:
        self._ping = ping
        self._clock = clock
        self._rng = rng
        self._missing: dict[bytes, _Missing] = {}  # who was lost longest ago comes first

    @property
    def nodes(self) -> list[tuple[str, int, bytes]]:
        """Host, port and id of each, who was lost last first."""
        return [(*missing.address, node_id) for node_id, missing in reversed(self._missing.items())]

    def add(self, node_id: bytes, address: Address) -> None:
        """Look for a node that lived at `address`; whoever was lost longest ago makes room for it."""
        if node_id not in self._missing:
            now = self._clock()
            self._missing[node_id] = _Missing(address, now, now + MIN_PAUSE_S)
            if len(self._missing) > MAX_LOST:
                del self._missing[next(iter(self._missing))]

    def found(self, node_id: bytes) -> None:
        """The node has proved that it lives."""
        self._missing.pop(node_id, None)

    async def keep_asking(self) -> None:
        """Ask whose turn it is, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.ask_who_is_due()

    def ask_who_is_due(self) -> None:
        """Ask each node whose pause is over. Whoever answers becomes a contact by that."""
        now = self._clock()
        for node_id, missing in list(self._missing.items()):
            age = now - missing.since
            if age > FORGET_S:
                del self._missing[node_id]
            elif now >= missing.due:
                missing.due = now + min(max(age / 4, MIN_PAUSE_S), MAX_PAUSE_S) * self._rng.uniform(0.75, 1.25)
                self._ping(missing.address).add_done_callback(functools.partial(self._on_answer, node_id))

    def _on_answer(self, node_id: bytes, answer: Answer) -> None:
        if not answer.cancelled() and answer.result() is not None:
            self.found(node_id)  # or somebody else lives there now, and we have met it
