"""Keeping our own records published.

Publishing and finding are one movement: crawl towards the key and ask the nearest nodes to hold a record. Their answers
name nodes nearer to the key, so no separate lookup goes first.

Holders never pass records on. We repeat our own after a third of their life, and soon after our routing table has
changed if somebody who should hold one does not. So a record is found shortly after any number of nodes joined at
once, and is gone one life after its publisher. Sequence number and expiry of what we publish under a key always rise,
even when the life of the new record is shorter, because holders refuse anything else.
"""

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from kademlia.node import Node

from .dht_lookup import look_up, salts_of
from .dht_messages import location
from .dht_proof import Proofs
from .dht_protocol import GuardedProtocol
from .dht_records import WireRecord


@dataclass
class _Own:
    """What we say under one key, as it is published now, who holds it so, and when it is due again."""

    value: bytes
    life_ms: int
    record: WireRecord
    holders: set[bytes] = field(default_factory=set)
    timer: asyncio.TimerHandle | None = None


class Publisher:
    """Our records. `clock` returns milliseconds since 1970, and `spawn` runs something in the background."""

    def __init__(
        self,
        protocol: GuardedProtocol,
        proofs: Proofs,
        clock: Callable[[], int],
        replicas: int,
        rng: random.Random,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._protocol = protocol
        self._proofs = proofs
        self._clock = clock
        self._replicas = replicas
        self._rng = rng
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._own: dict[bytes, _Own] = {}
        self._seqs = itertools.count(clock())  # a restarted publisher has to beat what it published in its last life
        self._expiries: dict[bytes, int] = {}  # the last one under each key

    def record(self, key: bytes) -> WireRecord | None:
        """Return what we say under `key`."""
        own = self._own.get(key)
        return None if own is None else own.record

    async def announce(self, key: bytes, value: bytes, life_s: float) -> None:
        """Publish our record under `key`, and keep it published from now on."""
        self._forget(key)
        life_ms = int(life_s * 1000)
        own = self._own[key] = _Own(value, life_ms, self._sign(key, value, life_ms))
        self._renew_later(key, own)
        await self._publish(key, own)

    async def withdraw(self, key: bytes) -> None:
        """Replace our record under `key` by a tombstone that outlives it."""
        own = self._forget(key)
        if own is None:
            return
        tombstone = self._sign(key, b"", own.life_ms)
        self._protocol.storage.put(key, tombstone)
        told = await self._store(key, tombstone)
        contacts = self._protocol.router.contacts
        others = [contacts[holder] for holder in own.holders - told if holder in contacts]
        if others:
            answers = [self._protocol.call_store(node, key, 0, tombstone) for node in others]
            await asyncio.wait(answers, timeout=self._protocol.patience_s)

    async def withdraw_all(self) -> None:
        await asyncio.gather(*(self.withdraw(key) for key in list(self._own)))

    def contacts_changed(self) -> None:
        """Somebody came or went."""
        for own in self._own.values():
            own.holders &= self._protocol.router.contacts.keys()

    def settle(self) -> None:
        """Publish again what somebody who should hold it does not."""
        for key, own in self._own.items():
            places = (Node(location(key, salt)) for salt in salts_of(self._protocol, self._replicas))
            near = (node.id for place in places for node in self._protocol.router.find_neighbors(place, self._replicas))
            if not own.holders.issuperset(near):
                self._spawn(self._publish(key, own))

    async def _publish(self, key: bytes, own: _Own) -> None:
        if self._own.get(key) is not own:
            return  # withdrawn or replaced since this was decided
        self._protocol.storage.put(key, own.record)
        record = own.record
        held = await self._store(key, record)
        if own.record is record:
            own.holders |= held

    async def _renew(self, key: bytes, own: _Own) -> None:
        if self._own.get(key) is own:
            own.record, own.holders = self._sign(key, own.value, own.life_ms), set()
            self._renew_later(key, own)
            await self._publish(key, own)

    def _renew_later(self, key: bytes, own: _Own) -> None:
        """A record has just been signed. Only that counts: however often it is handed out, it ages."""
        due_s = own.life_ms / 3000 * self._rng.uniform(0.9, 1.0)
        own.timer = self._loop.call_later(due_s, lambda: self._spawn(self._renew(key, own)))

    async def _store(self, key: bytes, record: WireRecord) -> set[bytes]:
        """Have the nearest nodes hold `record`. Return the ids of those that do."""
        answers = await look_up(
            self._protocol, key, self._replicas, lambda node, salt: self._protocol.call_store(node, key, salt, record)
        )
        return {node.id for node, reply in answers if reply.held}

    def _sign(self, key: bytes, value: bytes, life_ms: int) -> WireRecord:
        now_ms = self._clock()
        self._expiries = {each: expiry for each, expiry in self._expiries.items() if expiry > now_ms}
        expires_at_ms = self._expiries[key] = max(now_ms + life_ms, self._expiries.get(key, 0) + 1)
        return self._proofs.sign_record(key, next(self._seqs), expires_at_ms, value)

    def _forget(self, key: bytes) -> _Own | None:
        own = self._own.pop(key, None)
        if own is not None and own.timer is not None:
            own.timer.cancel()
        return own
