"""The contact table against brute force, and the crawl against a swarm that is a dictionary."""

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kademlia.node import Node

from mpd.daemon.dht_limits import Neighbourhood
from mpd.daemon.dht_routing import MAX_ASKED, MAX_STRANGERS, ContactTable, Crawl, Strangers

ids = st.binary(min_size=20, max_size=20)


def node(node_id: bytes, port: int = 4747) -> Any:
    return Node(node_id, "127.0.0.1", port)


def node_ids(n: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(20) for _ in range(n)]


def table_of(own_id: bytes, others: list[bytes], ksize: int = 20) -> ContactTable:
    table = ContactTable(None, ksize, node(own_id))
    for other in others:
        table.add_contact(node(other))
    return table


# the table


@given(ids, st.lists(ids, max_size=60, unique=True), ids)
def test_the_nearest_are_the_nearest_of_all_contacts(own_id: bytes, others: list[bytes], target: bytes) -> None:
    table = table_of(own_id, others)
    known = sorted(table.contacts, key=lambda contact: int.from_bytes(contact, "big") ^ int.from_bytes(target, "big"))
    assert [near.id for near in table.find_neighbors(Node(target), 7)] == known[:7]


@given(ids, st.lists(ids, max_size=60))
def test_every_id_has_one_bucket(own_id: bytes, others: list[bytes]) -> None:
    table = table_of(own_id, others, ksize=2)
    assert table.buckets[0].range[0] == 0
    assert table.buckets[-1].range[1] == 2**160 - 1
    for left, right in zip(table.buckets, table.buckets[1:], strict=False):
        assert left.range[1] + 1 == right.range[0]
    for edge in (bound for bucket in table.buckets for bound in bucket.range):
        assert table.buckets[table.get_bucket_for(Node(edge.to_bytes(20, "big")))].has_in_range(
            Node(edge.to_bytes(20, "big"))
        )
    assert all(table.knows(other) for other in others[-2:])


def test_ids_made_to_split_buckets_do_not() -> None:
    own_id = b"\xff" * 20
    hostile = [(1 << bit).to_bytes(20, "big") for bit in range(159)] + [i.to_bytes(20, "big") for i in range(2, 999)]
    table = table_of(own_id, hostile)
    assert len(table.buckets) <= 161
    assert len(table.contacts) <= 40


def test_a_removed_contact_makes_room_for_one_that_waits() -> None:
    table = table_of(b"\xff" * 20, [bytes([i]) * 20 for i in range(5)], ksize=3)
    waiting = [i for i in range(5) if bytes([i]) * 20 not in table.contacts]
    assert len(waiting) == 2
    assert all(table.knows(bytes([i]) * 20) for i in waiting)
    table.remove_contact(node(next(iter(table.contacts))))
    assert len(table.contacts) == 3
    assert len(list(table.everyone())) == 4


def test_addresses_are_indexed() -> None:
    table = table_of(bytes(20), [b"a" * 20])
    assert table.homes == {("127.0.0.1", 4747): b"a" * 20}
    table.remove_contact(node(b"a" * 20))
    assert table.homes == {}


def test_an_excluded_node_is_not_named() -> None:
    others = node_ids(5)
    table = table_of(bytes(20), others)
    assert others[2] not in {near.id for near in table.find_neighbors(Node(others[0]), exclude=Node(others[2]))}


# the crawl


@dataclass
class Map:
    """A swarm as a dictionary: whom each node names. Nodes not in it never answer; `refuses` fail at once."""

    knows: dict[bytes, list[bytes]]
    refuses: set[bytes] = field(default_factory=set)
    asked: list[bytes] = field(default_factory=list)
    silent: list["asyncio.Future[Any]"] = field(default_factory=list)

    def ask(self, whom: Any) -> "asyncio.Future[Any]":
        loop = asyncio.get_running_loop()
        self.asked.append(whom.id)
        future: asyncio.Future[Any] = loop.create_future()
        if whom.id in self.refuses:
            loop.call_soon(future.set_result, None)
        elif whom.id in self.knows:
            named = [(other, "127.0.0.1", 4747) for other in self.knows[whom.id]]
            loop.call_soon(future.set_result, SimpleNamespace(nodes=named))
        else:
            self.silent.append(future)
        return future


def protocol_of(own: Any, contacts: list[bytes], patience_s: float, shunned: tuple[bytes, ...] = ()) -> Any:
    """Return what a crawl needs of a protocol. Only contacts have proved who they are."""
    table, silent = table_of(own.id, contacts), set[bytes]()
    return SimpleNamespace(
        router=table,
        source_node=own,
        patience_s=patience_s,
        shuns=shunned.__contains__,
        is_silent=silent.__contains__,
        keeps_waiting=silent.add,
        has_proved=lambda each: each.id in table.contacts,
        neighbourhood=Neighbourhood(True, ["127.0.0.1"]),
    )


def crawl(world: Map, start: list[bytes], target: bytes, ksize: int = 5, patience_s: float = 0.02) -> set[bytes]:
    async def run() -> set[bytes]:
        own = node(b"\x55" * 20)
        protocol = protocol_of(own, start, patience_s)
        answers = await Crawl(protocol, Node(target), ksize, 5, world.ask).find()
        return {answered.id for answered in answers}

    return asyncio.run(asyncio.wait_for(run(), 5))


def nearest(everyone: list[bytes], target: bytes, k: int) -> set[bytes]:
    return set(sorted(everyone, key=_distance(target))[:k])


def _distance(target: bytes) -> Callable[[bytes], int]:
    return lambda other: int.from_bytes(other, "big") ^ int.from_bytes(target, "big")


def test_nobody_is_known() -> None:
    assert crawl(Map({}), [], bytes(20)) == set()


@pytest.mark.parametrize("seed", range(10))
def test_the_nearest_answer_wherever_the_crawl_starts(seed: int) -> None:
    everyone = node_ids(60, seed)
    rng = random.Random(seed)
    target = rng.choice([*everyone, node_ids(1, seed + 1000)[0]])
    world = Map({each: sorted(everyone, key=_distance(target))[:8] + rng.sample(everyone, 4) for each in everyone})
    assert nearest(everyone, target, 5) <= crawl(world, everyone[:1], target)
    assert len(world.asked) == len(set(world.asked))


def test_a_known_neighbourhood_costs_one_question_each() -> None:
    everyone = node_ids(30)
    world = Map(dict.fromkeys(everyone, everyone))
    assert crawl(world, everyone, bytes(20)) == nearest(everyone, bytes(20), 5)
    assert len(world.asked) == 5


def test_silent_nodes_are_replaced_by_the_next_nearest() -> None:
    everyone = sorted(node_ids(30), key=_distance(bytes(20)))
    world = Map(dict.fromkeys(everyone[2:], everyone[:20]))
    assert crawl(world, everyone[:20], bytes(20)) == set(everyone[2:7])
    assert len(world.silent) == 2


def test_who_has_kept_one_crawl_waiting_holds_up_no_other() -> None:
    async def run() -> list[set[bytes]]:
        everyone = sorted(node_ids(30), key=_distance(bytes(20)))
        world = Map(dict.fromkeys(everyone[2:], everyone[:20]))
        protocol = protocol_of(node(b"\x55" * 20), everyone[:20], 0.001)
        found = []
        for protocol.patience_s in (0.001, math.inf):
            answers = await Crawl(protocol, Node(bytes(20)), 5, 5, world.ask).find()
            found.append({each.id for each in answers} - set(everyone[2:7]))
        assert world.asked.count(everyone[0]) == 2, "it is asked all the same"
        return found

    assert asyncio.run(run()) == [set(), set()]


def test_failed_nodes_are_replaced_by_the_next_nearest() -> None:
    everyone = sorted(node_ids(30), key=_distance(bytes(20)))
    world = Map({each: [] for each in everyone}, refuses=set(everyone[:3]))
    assert crawl(world, everyone[:20], bytes(20)) == set(everyone[3:8])


def test_the_only_node_is_waited_for() -> None:
    async def run() -> tuple[bool, int]:
        own, other = node(b"\x55" * 20), node_ids(1)
        world = Map({})
        protocol = protocol_of(own, other, 0.001)
        found = asyncio.ensure_future(Crawl(protocol, Node(bytes(20)), 5, 5, world.ask).find())
        done, _ = await asyncio.wait([found], timeout=0.05)
        world.silent[0].set_result(SimpleNamespace(nodes=[]))
        return bool(done), len(await found)

    assert asyncio.run(run()) == (False, 1)


def test_a_list_of_victims_is_not_worked_off() -> None:
    victims = node_ids(1000)
    world = Map({victims[0]: victims})
    crawl(world, victims[:1], bytes(20))
    assert len(world.asked) <= MAX_ASKED


def test_crawls_of_one_lookup_share_their_strangers() -> None:
    async def run() -> int:
        own, liars = node(b"\x55" * 20), node_ids(3)
        world = Map(dict.fromkeys(liars, node_ids(500, seed=7)), refuses=set(node_ids(500, seed=7)))
        protocol = protocol_of(own, liars, 1)
        strangers = Strangers(protocol.neighbourhood)
        targets = (bytes(20), b"\xff" * 20, b"\x77" * 20)
        await asyncio.gather(*(Crawl(protocol, Node(target), 5, 5, world.ask, strangers).find() for target in targets))
        return len(set(world.asked) - set(liars))

    assert asyncio.run(run()) == MAX_STRANGERS


def test_when_strangers_are_used_up_contacts_are_still_asked() -> None:
    target = bytes(20)
    everyone = sorted(node_ids(600), key=_distance(target))
    victims, contacts = everyone[:500], everyone[500:]
    world = Map(dict.fromkeys(contacts, victims), refuses=set(victims))
    assert set(contacts[:5]) <= crawl(world, contacts[:20], target)


def test_a_lookup_meets_few_strangers_of_one_network() -> None:
    strangers = Strangers(Neighbourhood(True))
    assert [strangers.take(f"192.0.2.{i}") for i in range(5)] == [True] * 3 + [False] * 2
    assert strangers.take("198.51.100.1")
    members = Strangers(Neighbourhood(False))
    assert [members.take("192.0.2.1") for _ in range(MAX_STRANGERS + 1)] == [True] * MAX_STRANGERS + [False]


def test_a_contact_is_asked_at_home_wherever_it_is_said_to_live() -> None:
    async def run() -> list[str]:
        own, others = node(b"\x55" * 20), node_ids(40)
        asked: list[str] = []

        def ask(whom: Any) -> "asyncio.Future[Any]":
            asked.append(whom.ip)
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            answer.set_result(SimpleNamespace(nodes=[(other, "127.6.6.6", 1) for other in others]))
            return answer

        await Crawl(protocol_of(own, others, 1), Node(bytes(20)), 5, 5, ask).find()
        return asked

    assert set(asyncio.run(run())) == {"127.0.0.1"}


def test_nodes_without_a_usable_address_and_ourselves_are_ignored() -> None:
    async def run() -> list[bytes]:
        own, other = node(b"\x55" * 20), node_ids(3)
        asked: list[bytes] = []

        def ask(whom: Any) -> "asyncio.Future[Any]":
            asked.append(whom.id)
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            named = [(own.id, "127.0.0.1", 1), (other[1], "a.name.example", 1), (other[2], "0.0.0.0", 1)]
            answer.set_result(SimpleNamespace(nodes=named))
            return answer

        protocol = protocol_of(own, other[:1], 1)
        await Crawl(protocol, Node(bytes(20)), 5, 5, ask).find()
        return [each for each in asked if each != other[0]]

    assert asyncio.run(run()) == []


def test_nodes_that_have_just_failed_are_not_asked_because_others_name_them() -> None:
    async def run() -> list[bytes]:
        own, others = node(b"\x55" * 20), node_ids(3)
        world = Map({others[0]: others, others[1]: others, others[2]: others})
        protocol = protocol_of(own, others[:1], 1, shunned=(others[1],))
        await Crawl(protocol, Node(bytes(20)), 5, 5, world.ask).find()
        return world.asked

    assert asyncio.run(run()) == [node_ids(3)[0], node_ids(3)[2]]


def test_a_cancelled_crawl_ignores_late_replies() -> None:
    async def run() -> int:
        own, others = node(b"\x55" * 20), node_ids(3)
        world = Map({})
        protocol = protocol_of(own, others, 1)
        found = asyncio.ensure_future(Crawl(protocol, Node(bytes(20)), 5, 5, world.ask).find())
        await asyncio.wait([found], timeout=0.01)
        found.cancel()
        await asyncio.wait([found])
        for late in world.silent:
            late.set_result(SimpleNamespace(nodes=[(node_ids(9)[8], "127.0.0.1", 1)]))
        await asyncio.wait([asyncio.ensure_future(asyncio.wait(world.silent))])
        return len(world.asked)

    assert asyncio.run(run()) == 3
