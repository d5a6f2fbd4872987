"""The rendezvous as the DHT keeps it: real record stores, datagrams that get lost, come twice, late and out of order.

Every machine holds records for others in a real `RecordStore` that goes by its own wall clock. A publisher gives its
record to the few machines nearest to the key, repeats it after a third of its life and when somebody comes, and beats
itself with rising numbers; a reader asks the same machines and takes the newest record of each publisher that is valid
by its clock. Routing is left out: everybody knows everybody's address, as in any swarm that is smaller than a bucket.
"""

import hashlib
import itertools
import random
from collections.abc import Callable
from typing import Any

from sim import tasks
from sim.machine import Machine
from sim.network import Network
from sim.tasks import Event

from mpd.daemon.budgets import Budgets
from mpd.daemon.dht_records import RecordStore, WireRecord, valid
from mpd.daemon.rendezvous import Record, RendezvousStatus, check_announcement
from mpd.ids import PeerId

REPLICAS = 2
ANSWER_S = 0.5
SETTLE_S = (0.3, 2.0)  # after somebody came: publish again what it should hold


class Datagrams:
    """What every node shares. `loss` is the share of datagrams that get lost, `n` counts them."""

    def __init__(self, network: Network, rng: random.Random) -> None:
        self.network, self.rng = network, rng
        self.loss = rng.choice((0.0, 0.0, 0.02, 0.1))
        self.copies = rng.choice((0.0, 0.05))
        self.nodes: dict[int, Rendezvous] = {}
        self.calls = itertools.count()  # an answer to a machine's last life is none to this one
        self.n = 0

    def send(self, here: int, there: int, deliver: Callable[["Rendezvous"], None]) -> None:
        """Send a datagram, which `deliver` hands to whoever lives there when it arrives."""
        self.n += 1
        if (here, there) in self.network.cuts or self.rng.random() < self.loss:
            return
        for _ in range(1 + (self.rng.random() < self.copies)):
            delay_s = self.network.delay_s(self.network.at[here], self.network.at[there]) * self.rng.uniform(0.5, 2)
            self.network.scheduler.at(self.network.scheduler.now + delay_s, lambda: self._arrive(there, deliver))

    def _arrive(self, there: int, deliver: Callable[["Rendezvous"], None]) -> None:
        node = self.nodes.get(there)
        if node is not None and not node.machine.is_over:
            node.machine.happen(lambda: deliver(node))

    def joined(self, new: "Rendezvous") -> None:
        """A node has come to life: the others notice, and publish what it should hold."""
        self.nodes[new.index] = new
        for node in self.nodes.values():
            for after_s in SETTLE_S:
                node.machine.at(node.machine.clock() + after_s, lambda node=node: node.settle(new.index))


class Rendezvous:
    """One node. `wall_ms` is its wall clock."""

    def __init__(
        self, datagrams: Datagrams, machine: Machine, index: int, own: PeerId, wall_ms: Callable[[], int]
    ) -> None:
        self.machine, self.index, self.own = machine, index, own
        self._datagrams, self._wall_ms = datagrams, wall_ms
        self._key = own + bytes(12)  # 32 bytes stand for the public key; ids are told from it
        self._store = RecordStore(wall_ms, Budgets(), lambda key, record: True)
        self._published: dict[bytes, tuple[bytes, int, WireRecord]] = {}  # key -> value, life, record
        self._expiries: dict[bytes, int] = {}
        self._seqs = itertools.count(wall_ms())
        self._awaited: dict[int, Callable[[Any], None]] = {}

    # what the daemon uses

    async def announce(self, key: bytes, value: bytes, ttl_s: float) -> None:
        life_ms = int(check_announcement(key, value, ttl_s) * 1000)
        record = self._sign(key, value, life_ms)
        self._published[key] = value, life_ms, record
        self._renew_later(key, record, life_ms)
        await self._give(key, record)

    async def withdraw(self, key: bytes) -> None:
        published = self._published.pop(key, None)
        if published is not None:
            await self._give(key, self._sign(key, b"", published[1]))

    async def seek(self, key: bytes) -> tuple[Record, ...]:
        found: dict[bytes, WireRecord] = {}
        answers = await self._ask(self._near(key), lambda node: node._store.records(key))
        now_ms = self._wall_ms()
        for record in itertools.chain(self._store.records(key), *answers):
            if valid(record, now_ms) and record.seq > (
                found[record.public_key].seq if record.public_key in found else -1
            ):
                found[record.public_key] = record
        found.pop(self._key, None)
        if key in self._published:
            found[self._key] = self._published[key][2]
        return tuple(
            Record(PeerId(each[:20]), record.value, record.seq, (record.expires_at_ms - now_ms) / 1000)
            for each, record in sorted(found.items())
            if record.value
        )

    def snapshot(self) -> RendezvousStatus:
        """Everybody is a contact who can be reached both ways: routing is left out."""
        cuts, others = self._datagrams.network.cuts, set(self._datagrams.nodes) - {self.index}
        return RendezvousStatus(sum(not {(self.index, other), (other, self.index)} & cuts for other in others))

    # how it works

    def settle(self, index: int) -> None:
        """A node has come: give it what it should hold."""
        for key, (_, _, record) in self._published.items():
            if index in self._near(key):
                self._tell(index, key, record)

    def _near(self, key: bytes) -> list[int]:
        others = [index for index in self._datagrams.nodes if index != self.index]
        return sorted(others, key=lambda index: hashlib.sha256(key + bytes([index])).digest())[:REPLICAS]

    def _sign(self, key: bytes, value: bytes, life_ms: int) -> WireRecord:
        now_ms = self._wall_ms()
        self._expiries = {each: expiry for each, expiry in self._expiries.items() if expiry > now_ms}
        expires_at_ms = self._expiries[key] = max(now_ms + life_ms, self._expiries.get(key, 0) + 1)
        return WireRecord(self._key, next(self._seqs), expires_at_ms, value, bytes(64))

    def _renew_later(self, key: bytes, record: WireRecord, life_ms: int) -> None:
        due_s = life_ms / 3000 * self._datagrams.rng.uniform(0.9, 1.0)
        self.machine.at(self.machine.clock() + due_s, lambda: self._renew(key, record))

    def _renew(self, key: bytes, record: WireRecord) -> None:
        value, life_ms, current = self._published.get(key, (b"", 0, None))
        if current is record:
            new = self._sign(key, value, life_ms)
            self._published[key] = value, life_ms, new
            self._renew_later(key, new, life_ms)
            self._store.put(key, new)
            for index in self._near(key):
                self._tell(index, key, new)

    def _tell(self, index: int, key: bytes, record: WireRecord) -> None:
        self._datagrams.send(self.index, index, lambda node: node._store.put(key, record))

    async def _give(self, key: bytes, record: WireRecord) -> None:
        self._store.put(key, record)
        await self._ask(self._near(key), lambda node: node._store.put(key, record))

    async def _ask(self, whom: list[int], question: Callable[["Rendezvous"], Any]) -> list[Any]:
        """Return what those answer whose answers come in time."""
        answers: list[Any] = []
        numbers = []
        all_here = Event()

        def heard(number: int, answer: Any) -> None:
            if self._awaited.pop(number, None):
                answers.append(answer)
                if len(answers) == len(whom):
                    all_here.set()

        for index in whom:
            number = next(self._datagrams.calls)
            numbers.append(number)
            self._awaited[number] = lambda answer, number=number: heard(number, answer)
            self._datagrams.send(self.index, index, lambda node, number=number: self._answer(node, number, question))
        if whom:
            with tasks.move_on_after(ANSWER_S):
                await all_here.wait()
        for number in numbers:
            self._awaited.pop(number, None)
        return answers

    def _answer(self, node: "Rendezvous", number: int, question: Callable[["Rendezvous"], Any]) -> None:
        answer = question(node)
        self._datagrams.send(node.index, self.index, lambda me: me._hear(number, answer))

    def _hear(self, number: int, answer: Any) -> None:
        if (heard := self._awaited.get(number)) is not None:
            heard(answer)
