"""Who lives where: which nodes this one counts on, and how it finds out that they are gone.

A node becomes a contact once it has proved to us who it is, never because a datagram claims to be from it: an unknown
sender is asked first. It leaves after two failures in a row, with a signed goodbye, or when its membership is revoked.
A known id at a new address moves there only when the old address no longer answers.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from kademlia.node import Node

from .dht_calls import Answer
from .dht_gate import Address
from .dht_limits import MAX_PER_PREFIX, Neighbourhood
from .dht_proof import Memory
from .dht_routing import ContactTable

SHUN_S = 10.0  # how long a node that did not answer is not asked again just because others still name it
MAX_SHUNNED = 1000
MAX_CHECKS = 64  # unknown senders being asked at one time
MAX_HOMES = 4096


class Contacts:
    """The contacts of one node, in `table`. `ping(node, repeat)` asks a node to prove who it is.

    `on_change` is called after the table gained or lost a contact, before it `on_lost(node)` with one that fell silent.
    """

    def __init__(
        self,
        table: ContactTable,
        neighbourhood: Neighbourhood,
        ping: Callable[[Any, bool], Answer],
        refused: Counter[str],
        on_change: Callable[[], None],
    ) -> None:
        self.on_lost: Callable[[Any], None] = lambda node: None
        self.table = table
        self._own_id: bytes = table.node.id
        self._neighbourhood = neighbourhood
        self._ping = ping
        self._refused = refused
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._homes: Memory[bytes, Address] = Memory(MAX_HOMES)  # where who proved to live, contact or not
        self._heard_at: dict[bytes, float] = {}
        self._failed_at: dict[bytes, float] = {}
        self._shunned_until: dict[bytes, float] = {}
        self._silent: Memory[bytes, bool] = Memory(MAX_HOMES)
        self._checks: dict[bytes, asyncio.Task[None]] = {}
        self._is_open = True

    def at(self, address: Address) -> bytes | None:
        """Return the id of the contact that lives at `address`."""
        return self.table.homes.get(address)

    def has_proved(self, node: Any) -> bool:
        """Return whether this node has proved that it lives there."""
        return self._homes.get(node.id) == (node.ip, node.port)

    def silent_for(self, node: Any) -> float:
        """Return for how many seconds nothing was heard from a contact."""
        return self._loop.time() - self._heard_at.get(node.id, 0.0)

    def shuns(self, node_id: bytes) -> bool:
        """True if this node has just failed to answer us and has not been heard of since."""
        return self._shunned_until.get(node_id, 0.0) > self._loop.time()

    def is_silent(self, node_id: bytes) -> bool:
        """True if this node has kept somebody waiting and has not answered anything since."""
        return self._silent.get(node_id) is not None

    def keeps_waiting(self, node_id: bytes) -> None:
        """A question to this node has waited for long enough."""
        self._silent.put(node_id, True)

    def welcome(self, node: Any) -> None:
        """Take note of the sender of a request."""
        known = self.table.contacts.get(node.id)
        if known is not None and known.same_home_as(node):
            self._heard_at[node.id] = self._loop.time()
        elif known is not None or not (self.table.knows(node.id) or self.has_proved(node)):
            self._start_check(node.id, self._meet(node, repeat=False))

    def proved(self, node: Any) -> None:
        """A node has proved that it lives there."""
        if node.id == self._own_id:
            return
        self._homes.put(node.id, (node.ip, node.port))
        self._silent.drop(node.id)
        self._shunned_until.pop(node.id, None)
        known = self.table.contacts.get(node.id)
        if known is not None and not known.same_home_as(node):
            self._start_check(node.id, self._meet(node, repeat=True))
        elif known is not None or self._is_room_for(node):
            self._failed_at.pop(node.id, None)
            if known is None and not self.table.knows(node.id):
                self._neighbourhood.learn(node.ip)
                self.table.add_contact(node)
                self._on_change()
            if node.id in self.table.contacts:  # who waits behind a full bucket may drop out of it unseen
                self._heard_at[node.id] = self._loop.time()

    def heard(self, node: Any) -> None:
        """A node has answered."""
        self._silent.drop(node.id)
        self._shunned_until.pop(node.id, None)
        known = self.table.contacts.get(node.id)
        if known is not None and known.same_home_as(node):
            self._failed_at.pop(node.id, None)
            self._heard_at[node.id] = self._loop.time()

    def failed(self, node: Any, sent_at: float) -> None:
        """A node has not answered what was sent at `sent_at`."""
        known = self.table.contacts.get(node.id)
        if known is None:
            self._shun(node.id)
            self._homes.drop(node.id)
        elif not known.same_home_as(node):
            return  # nobody lost but where somebody said that it lives
        elif node.id not in self._failed_at:
            self._failed_at[node.id] = self._loop.time()
            self._start_check(node.id, self._meet(known, repeat=True))
        elif sent_at >= self._failed_at[node.id]:  # requests of one burst are one failure
            self._shun(node.id)
            self.on_lost(known)
            self.forget(node.id)

    def left(self, node: Any) -> None:
        """A node has said goodbye."""
        known = self.table.contacts.get(node.id)
        if known is not None and known.same_home_as(node):
            self.forget(node.id)

    def forget(self, node_id: bytes) -> None:
        """Count on this node no longer."""
        self._homes.drop(node_id)
        self._failed_at.pop(node_id, None)
        self._heard_at.pop(node_id, None)
        was_contact = node_id in self.table.contacts
        if self.table.knows(node_id):
            self.table.remove_contact(Node(node_id))
        if was_contact:
            self._on_change()

    async def close(self) -> None:
        """End all checks, and begin no more."""
        self._is_open = False
        checks = list(self._checks.values())
        for check in checks:
            check.cancel()
        await asyncio.gather(*checks, return_exceptions=True)

    def _is_room_for(self, node: Any) -> bool:
        crowd = self._neighbourhood.crowd_of(node.ip)
        if crowd is None:
            return True
        crowds = [self._neighbourhood.crowd_of(other.ip) for other in self.table.everyone() if other.id != node.id]
        if crowds.count(crowd) < MAX_PER_PREFIX:
            return True
        self._refused["crowd"] += 1
        return False

    async def _meet(self, node: Any, repeat: bool) -> None:
        known = self.table.contacts.get(node.id)
        if known is not None and not known.same_home_as(node):
            if await self._ping(known, True) is not None:
                return  # the one we know still lives where we know it
            self.forget(node.id)
        await self._ping(node, repeat)

    def _start_check(self, node_id: bytes, check: Coroutine[Any, Any, None]) -> None:
        is_needed = node_id not in self._checks and node_id != self._own_id
        if not (is_needed and self._is_open and len(self._checks) < MAX_CHECKS):
            check.close()
            return
        self._checks[node_id] = task = self._loop.create_task(check)
        task.add_done_callback(lambda _: self._checks.pop(node_id))

    def _shun(self, node_id: bytes) -> None:
        if len(self._shunned_until) >= MAX_SHUNNED:
            self._shunned_until.clear()
        self._shunned_until[node_id] = self._loop.time() + SHUN_S
