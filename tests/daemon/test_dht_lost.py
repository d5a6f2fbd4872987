"""Looking for lost nodes: how often, for how long, and for how many."""

import asyncio
import random
from typing import Any

import pytest
from dht_swarm import Clock, turn

from mpd.daemon.dht_lost import FORGET_S, MAX_LOST, MAX_PAUSE_S, Lost

A = ("192.0.2.1", 4747)


class Net:
    """Writes down who is asked when; `lives` answer."""

    def __init__(self) -> None:
        self.clock = Clock(0.0)
        self.asked: list[tuple[float, Any]] = []
        self.lives: set[Any] = set()
        self.lost = Lost(self.ping, self.clock, random.Random(1))

    def ping(self, address: Any) -> Any:
        self.asked.append((self.clock.now, address))
        answer = asyncio.get_running_loop().create_future()
        answer.set_result("home" if address in self.lives else None)
        return answer

    async def pass_time(self, seconds: float, step_s: float = 0.5) -> None:
        for _ in range(int(seconds / step_s)):
            self.clock.now += step_s
            self.lost.ask_who_is_due()
            await turn()


def test_a_lost_node_is_asked_at_pauses_that_grow_with_its_absence() -> None:
    async def test() -> None:
        net = Net()
        net.lost.add(b"a" * 20, A)
        await net.pass_time(20)
        assert 8 <= len(net.asked) <= 20
        last = [when for when, _ in net.asked][-1]
        assert 20 - last <= 1.25 * 20 / 4 + 1
        await net.pass_time(3600, step_s=5)
        pauses = [b[0] - a[0] for a, b in zip(net.asked[-10:], net.asked[-9:], strict=False)]
        assert all(0.7 * MAX_PAUSE_S <= pause <= 1.3 * MAX_PAUSE_S + 5 for pause in pauses)

    asyncio.run(test())


@pytest.mark.parametrize("how", ["it answers", "it comes by itself"])
def test_who_is_found_is_not_looked_for(how: str) -> None:
    async def test() -> None:
        net = Net()
        net.lost.add(b"a" * 20, A)
        assert net.lost.nodes == [(*A, b"a" * 20)]
        if how == "it answers":
            net.lives.add(A)
            await net.pass_time(2)
            assert len(net.asked) == 1
        else:
            net.lost.found(b"a" * 20)
        await net.pass_time(10)
        assert net.lost.nodes == []
        assert len(net.asked) <= 1

    asyncio.run(test())


def test_who_stays_away_for_a_day_is_forgotten() -> None:
    async def test() -> None:
        net = Net()
        net.lost.add(b"a" * 20, A)
        net.clock.now = FORGET_S + 1
        net.lost.ask_who_is_due()
        assert net.lost.nodes == []
        assert net.asked == []

    asyncio.run(test())


def test_whoever_was_lost_longest_ago_makes_room() -> None:
    net = Net()
    ids = [number.to_bytes(20, "big") for number in range(MAX_LOST + 3)]
    for node_id in ids:
        net.lost.add(node_id, A)
        net.lost.add(node_id, A)
    assert [node_id for _, _, node_id in net.lost.nodes] == ids[3:][::-1]


def test_it_asks_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpd.daemon.dht_lost.LOOK_S", 0.001)

    async def test() -> None:
        net = Net()
        net.lost.add(b"a" * 20, A)
        net.clock.now = 1.5
        asking = asyncio.create_task(net.lost.keep_asking())
        async with asyncio.timeout(5):
            while not net.asked:
                await turn()
        asking.cancel()

    asyncio.run(test())
