"""DHT swarms in which nodes die, come, and are cut off from each other: what is alive is found, what is dead is not.

The nodes are real, their network and their clock are not (`dht_virtual.py`): latencies below are those of a network
with 20 to 100 ms a round trip, with every timeout that the dead cost.
"""

import asyncio
import itertools
import math
import random
import time
from collections.abc import Callable

from conftest import Score
from dht_swarm import SOAK, open_trust, peer, size
from dht_virtual import FakeSocket, VirtualLoop, run_virtual

from mpd.daemon.dht_gate import Address
from mpd.daemon.dht_node import DhtConfig, DhtNode, start_node
from mpd.ids import Endpoint

TTL_S = 60.0  # of what daemons announce
GOAL_TTL_S = 120.0
SETTLED_S = 4  # after this, whoever has just come is known to those around it


class Swarm:
    """Nodes by number. Node i publishes its number under a key of its own, and lives at port 1000 + i."""

    def __init__(self, loop: VirtualLoop, seed: int) -> None:
        self.loop = loop
        self.rng = random.Random(seed)
        self.live: dict[int, DhtNode] = {}
        self.dead: dict[int, tuple[float, DhtNode]] = {}
        self.latencies: list[float] = []
        self.n_sought = self.n_found = 0
        self.numbers = itertools.count()

    async def add(self) -> int:
        """Start a node that knows three live ones, and have it publish."""
        number = next(self.numbers)
        known = self.rng.sample(sorted(self.live), min(3, len(self.live)))
        boots = tuple(Endpoint("127.0.0.1", 1000 + i) for i in known)
        sock = FakeSocket(self.loop, 1000 + number)
        node = await start_node(
            DhtConfig(
                open_trust(number),
                sock,  # type: ignore[arg-type]
                boots,
                wall_ms=self.loop.wall_ms,
                rng=random.Random(number),
            )
        )
        self.live[number] = node
        return number

    async def publish(self, number: int) -> None:
        await self.live[number].announce(key_of(number), b"%d" % number, TTL_S)

    def kill(self, number: int) -> None:
        """The machine is gone, without a word."""
        self.loop.dead.add(address_of(number))
        self.dead[number] = self.loop.time(), self.live.pop(number)

    async def seek(self, number: int) -> bool:
        """Return whether a random node finds the record of another; note how long that took."""
        asker = self.rng.choice([i for i in self.live if i != number])
        began = self.loop.time()
        found = await self.live[asker].seek(key_of(number))
        self.latencies.append(self.loop.time() - began)
        return any(record.publisher == peer(number) for record in found)

    async def check(self, numbers: list[int]) -> None:
        for number in numbers:
            if number in self.live:
                self.n_sought += 1
                self.n_found += await self.seek(number)

    async def close(self) -> None:
        for node in [*self.live.values(), *(node for _, node in self.dead.values())]:
            await node.close()


def key_of(number: int) -> bytes:
    return peer(10_000 + number)


def address_of(number: int) -> Address:
    return "127.0.0.1", 1000 + number


def p95(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def test_with_thirty_percent_churn_all_that_lives_is_found_and_the_dead_are_gone(score: Score) -> None:
    """64 nodes, 30 % killed at once, then for a while one killed and one new every second."""
    n_nodes, churn_s = size(20, 64), size(12, 300)
    began = time.process_time()

    async def test(loop: VirtualLoop) -> None:
        swarm = Swarm(loop, seed=1)
        for _ in range(n_nodes):
            await swarm.add()
        await loop.pass_time(5)
        await asyncio.gather(*(swarm.publish(number) for number in list(swarm.live)))
        await loop.pass_time(5)
        assert all([await swarm.seek(number) for number in list(swarm.live)])
        before = p95(swarm.latencies)
        swarm.latencies.clear()
        newcomers: list[int] = []
        for number in swarm.rng.sample(sorted(swarm.live), round(0.3 * n_nodes)):
            swarm.kill(number)
        await swarm.check(list(swarm.live)[:: size(2, 1)])  # at once, with the dead in every table
        for second in range(churn_s):
            swarm.kill(swarm.rng.choice(sorted(swarm.live)))
            newcomers.append(await swarm.add())
            await swarm.publish(newcomers[-1])
            await loop.pass_time(1)
            settled = sorted(swarm.live.keys() - set(newcomers[-SETTLED_S:]))
            await swarm.check(swarm.rng.sample(settled, 4))
            if second == churn_s // 2:
                last = loop.time()
                early = [number for number, (when, _) in swarm.dead.items() if when <= last]
        await loop.pass_time(SETTLED_S)
        await swarm.check(sorted(swarm.live))
        await loop.pass_time(max(0.0, last + TTL_S + 1 - loop.time()))
        ghosts = [number for number in early[:: size(3, 1)] if await swarm.seek(number)]
        score(
            16,
            "100 % of live records found; p95 lookup < 1 s; dead publishers gone <= 120 s",
            form="full" if SOAK else f"{churn_s} s of churn",
            sought=swarm.n_sought,
            found=swarm.n_found,
            p95_s=round(p95(swarm.latencies), 3),
            p95_without_churn_s=round(before, 3),
            dead_gone_s=TTL_S + 1,
            cpu_s=round(time.process_time() - began, 1),
        )
        assert swarm.n_found == swarm.n_sought
        assert p95(swarm.latencies) < 1.0
        assert ghosts == []
        assert TTL_S + 1 <= GOAL_TTL_S
        await swarm.close()

    run_virtual(test)


def test_records_are_renewed_however_often_others_come_and_go() -> None:
    """To give a newcomer a record, or somebody else because a holder has gone, must not put off its renewal."""

    async def test(loop: VirtualLoop) -> None:
        swarm = Swarm(loop, seed=3)
        for _ in range(3):
            await swarm.add()
        await loop.pass_time(5)
        await swarm.publish(0)
        guest = await swarm.add()
        while loop.time() < 2 * TTL_S:
            swarm.kill(guest)
            guest = await swarm.add()
            await loop.pass_time(5)
            assert await swarm.live[guest].seek(key_of(0)), loop.time()
        await swarm.close()

    run_virtual(test)


def sides(left: set[int]) -> Callable[[Address, Address], bool]:
    return lambda a, b: (a[1] - 1000 in left) is not (b[1] - 1000 in left)


def end_bootstrapping(node: DhtNode) -> None:
    """Let a node ask its bootstraps no more."""
    for task in list(node._tasks):
        if "Bootstrap.keep_asking" in repr(task.get_coro()):
            task.cancel()


def test_two_halves_that_have_forgotten_each_other_meet_again(score: Score) -> None:
    """Longer apart than any record lives, without any bootstrap that anybody still asks."""

    async def test(loop: VirtualLoop) -> None:
        swarm = Swarm(loop, seed=2)
        for _ in range(8):
            await swarm.add()
        await loop.pass_time(5)
        await asyncio.gather(*(swarm.publish(number) for number in list(swarm.live)))
        for node in swarm.live.values():
            end_bootstrapping(node)
        left = {0, 1, 2, 3}
        for cut_s, soon_s in ((20.0, 8.0), (size(130, 600), 70.0)):
            loop.is_cut = sides(left)
            await loop.pass_time(cut_s)
            if cut_s > 2 * TTL_S:
                assert all(node.status.peers == 3 for node in swarm.live.values())
                assert not await swarm.live[0].seek(key_of(7))
            loop.is_cut = lambda a, b: False
            healed = loop.time()
            while not all([await node.seek(key_of(n)) for node in swarm.live.values() for n in swarm.live]):
                await loop.pass_time(0.1)
                assert loop.time() - healed < soon_s
            score(4, "DHT: whole again by itself", cut_s=cut_s, seconds=round(loop.time() - healed, 2), nodes=8)
        await swarm.close()

    run_virtual(test)
