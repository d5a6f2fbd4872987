"""What outsiders and hostile members try against the DHT, one attack per test, each with its number.

The numbers are those of the threat model in docs/security.md; with MPD_SOAK=1 in the environment they are tried in
full, otherwise in a short form of the same test.
"""

import asyncio
import itertools
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from dht_swarm import (
    ELSEWHERE,
    HERE,
    NOW_MS,
    SOAK,
    Actor,
    Clock,
    PrivateSwarm,
    Stage,
    config,
    configs_of,
    endpoint_of,
    is_request,
    nodes_of,
    on_one_loop,
    open_trust,
    peer,
    play,
    public,
    size,
    turn,
    udp_socket,
    until,
)

from mpd.daemon import dht_calls
from mpd.daemon import dht_messages as m
from mpd.daemon.budgets import Budgets
from mpd.daemon.dht_gate import HEADER_BYTES, MAX_DATAGRAM_BYTES
from mpd.daemon.dht_limits import MAX_PER_PREFIX
from mpd.daemon.dht_lookup import look_up
from mpd.daemon.dht_node import DhtNode, start_node, wall_ms
from mpd.daemon.dht_records import RecordStore, WireRecord
from mpd.daemon.dht_routing import Crawl
from mpd.daemon.rendezvous import MAX_VALUE_BYTES, check_announcement
from mpd.errors import LocalError
from mpd.ids import Endpoint

pytestmark = pytest.mark.timeout(7200 if SOAK else 60)

KEY = b"k" * 20
MIB = 1 << 20


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody here is slow but this machine, which runs all nodes on one loop."""
    monkeypatch.setattr(dht_calls, "REQUEST_TIMEOUT_S", 20.0)
    monkeypatch.setattr(dht_calls, "MIN_PATIENCE_S", 5.0)


async def values(node: DhtNode, key: bytes = KEY) -> list[bytes]:
    return sorted(record.value for record in await node.seek(key))


def all_requests(you: Actor, me: bytes, key: bytes = KEY) -> list[Any]:
    return [
        m.Ping(you.id, me, you.trust.public_key, list(you.trust.chain())),
        m.FindNode(you.id, me, key),
        m.FindRecords(you.id, me, key, 0, b""),
        m.Store(you.id, me, key, 0, you.record(key)),
        m.Introduce(you.id, me, public(9)),
    ]


# ------------------------------------------------------------------------------------------------- malformed datagrams


def mutated(rng: random.Random, originals: list[bytes]) -> bytes:
    """Return a datagram's inside with a few bytes changed, cut, doubled or replaced by noise."""
    body = bytearray(rng.choice(originals))
    for _ in range(rng.randint(1, 6)):
        match rng.randrange(5):
            case 0 | 1:
                body[rng.randrange(min(len(body), 120))] = rng.randrange(256)
            case 2:
                del body[rng.randrange(len(body)) :]
            case 3:
                at = rng.randrange(len(body) + 1)
                body[at:at] = rng.randbytes(rng.randint(1, 40))
            case _:
                body += body[: rng.randrange(len(body) + 1)]
        if not body:
            body = bytearray(rng.randbytes(rng.randint(1, 60)))
    return bytes(body[: MAX_DATAGRAM_BYTES - HEADER_BYTES])


@pytest.mark.parametrize("is_sealed", [True, False], ids=["by a member", "by an outsider"])
def test_malformed_datagrams_end_nothing(is_sealed: bool) -> None:
    """10^6 of them: no loop exit, no unhandled exception, memory flat."""
    rng, n = random.Random(19), size(10_000, 500_000)

    async def scene(stage: Stage) -> None:
        you, them = stage.actor(1), stage.actor(2)
        contact = stage.meet(them, ELSEWHERE)
        requests = [each[HEADER_BYTES:] for each in map(you.ask, all_requests(you, stage.me.id))]
        record, node = you.record(KEY), (you.id, *HERE)
        replies = [
            m.encode(each)
            for each in (
                them.home(you.ping(), stage.OURS),
                m.Named(them.id, [node] * 3),
                m.Stored(them.id, [node], True, True),
                m.Page(them.id, [node], [record], 1, bytes(16)),
                m.Introduction(them.id, [b"certificate"]),
            )
        ]
        ask: list[Callable[[], Any]] = [
            lambda: stage.protocol.call_ping(contact),
            lambda: stage.protocol.call_find_node(contact, contact),
            lambda: stage.protocol.call_store(contact, KEY, 0, record),
            lambda: stage.protocol.call_find_records(contact, KEY, 0, b""),
            lambda: stage.protocol.call_introduce(contact, public(1)),
        ]
        tracemalloc.start()
        for i in range(n):
            if i == n // 2:
                middle = tracemalloc.get_traced_memory()[0]
            stage.steady.now += 0.01
            if rng.random() < 0.7:
                datagram = you._gate.seal(rng.randrange(2), rng.randbytes(20), mutated(rng, requests))
            else:
                rng.choice(ask)()
                message_id = list(stage.protocol.calls.waiting)[-1]
                datagram = them._gate.seal(1, message_id, mutated(rng, replies))
            if not is_sealed:
                datagram = mutated(rng, [datagram])
            stage.hear(datagram, ELSEWHERE if rng.random() < 0.5 else HERE)
            stage.wire.sent.clear()
            if i % 500 == 0:
                await turn()
                stage.protocol.calls.close()
                contact = stage.meet(them, ELSEWHERE) or contact
        growth = tracemalloc.get_traced_memory()[0] - middle
        tracemalloc.stop()
        assert stage.refused.total() > n / 3
        assert growth < 4 * MIB
        stage.hear(you.ping(), ("203.0.113.77", 1))
        assert any(not is_request(each) for each, _ in stage.wire.sent), "an honest question is answered"

    play(scene)


# ---------------------------------------------------------------------------------------------------------------- Sybil


def test_a_thousand_ids_at_one_address_are_three_contacts() -> None:
    async def scene(stage: Stage) -> None:
        for i in range(size(200, 1000)):
            stage.meet(stage.actor(i + 1), ("192.0.2.7", 1000 + i))
        assert len(list(stage.protocol.router.everyone())) == MAX_PER_PREFIX

    play(scene)


def test_forged_ids_are_no_contacts() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(1)
        for i in range(size(200, 1000)):
            forged = random.Random(i).randbytes(20)
            stage.protocol.ping(HERE)
            asked = stage.last_ping()
            stage.hear(you.reply(asked, msgspec.structs.replace(you.home(asked, stage.OURS), sender=forged)))
        assert stage.contacts == set()
        assert stage.refused["proof"] == size(200, 1000)

    play(scene)


def test_records_from_addresses_that_nobody_has_proved_to_live_at_are_not_held() -> None:
    """Or a single machine, which can write any sender on its datagrams, would fill the store past all crowds."""

    async def scene(stage: Stage) -> None:
        for i in range(200):
            you = stage.actor(i + 1)
            stage.hear(you.ask(m.Store(you.id, stage.me.id, b"k" * 20, 0, you.record(b"k" * 20))), (f"8.8.{i}.1", 9))
            assert stage.last_reply(m.Store) == m.Stored(stage.me.id, [], False, False)
            stage.wire.sent.clear()
            stage.steady.now += 0.1
        assert stage.budgets.records.used == 0
        stage.meet(you, ("8.8.0.1", 9))
        stage.hear(you.ask(m.Store(you.id, stage.me.id, b"k" * 20, 0, you.record(b"k" * 20))), ("8.8.0.1", 9))
        assert stage.last_reply(m.Store).held

    play(scene)


# -------------------------------------------------------------------------------------------------------------- eclipse


def hide_everything(node: DhtNode, accomplices: list[Any]) -> None:
    """Make `node` say that it holds what it is given, hold nothing, and name only its accomplices."""
    protocol, own_id = node.protocol, node.node.id
    honest = protocol._answer

    def answer(request: Any, message_id: bytes, address: Any) -> Any:
        named = [(each.node.id, *each._config.sock.getsockname()) for each in accomplices if each is not node]
        match request:
            case m.FindNode():
                return m.Named(own_id, named)
            case m.Store():
                return m.Stored(own_id, named, True, True)
            case m.FindRecords():
                return m.Page(own_id, named, [], 0, b"")
            case _:
                return honest(request, message_id, address)

    protocol._answer = answer


@pytest.mark.usefixtures("patient")
def test_nodes_gathered_around_a_key_hide_nothing() -> None:
    """8 of 32 nodes are hostile and nearest to the key itself: what the honest publish is found 100 times of 100."""

    async def test() -> None:
        near = sorted(range(1000), key=lambda i: int.from_bytes(peer(i), "big") ^ int.from_bytes(KEY, "big"))
        hostile, honest = near[:8], list(range(1000, 1024))
        async with nodes_of(configs_of([open_trust(i) for i in (*honest, *hostile)])) as nodes:
            liars, good = nodes[24:], nodes[:24]
            for liar in liars:
                hide_everything(liar, liars)
            for i, node in enumerate(good[:3]):
                await node.announce(KEY, b"%d" % i, 600)
            others = itertools.cycle(good[3:])
            found = [await values(next(others)) for _ in range(100)]
            assert found == [[b"0", b"1", b"2"]] * 100

    on_one_loop(test)


# -------------------------------------------------------------------------------------------------- forgery and replays


def forged(rng: random.Random, record: WireRecord) -> WireRecord:
    """Return the record with one thing changed that its signature should cover, or the signature itself."""
    other = public(rng.randrange(100, 1000))
    changes: list[dict[str, Any]] = [
        {"public_key": other},
        {"seq": record.seq + rng.randint(1, 1000)},
        {"expires_at_ms": record.expires_at_ms + rng.randint(1, 1000)},
        {"value": rng.randbytes(5)},
        {"value": b""},
        {"signature": rng.randbytes(64)},
    ]
    return msgspec.structs.replace(record, **rng.choice(changes))


def test_forged_records_are_not_held() -> None:
    """10,000 forged stores: none is accepted."""
    rng, n = random.Random(4), size(1000, 10_000)

    async def scene(stage: Stage) -> None:
        you, publisher = stage.actor(1), stage.actor(2)
        records = {bytes([i]) * 20: publisher.record(bytes([i]) * 20) for i in range(20)}
        for key, record in itertools.islice(records.items(), 10):
            assert stage.store.put(key, record)
        before = [stage.store.records(key) for key in records]
        for _ in range(n):
            key, record = rng.choice(list(records.items()))
            stage.steady.now += 0.01
            if rng.random() < 0.2:  # the true record under another key
                store = m.Store(you.id, stage.me.id, bytes([rng.randrange(20, 40)]) * 20, 0, record)
            else:
                store = m.Store(you.id, stage.me.id, key, rng.randrange(2), forged(rng, record))
            stage.hear(you.ask(store))
            assert not stage.last_reply(m.Store).held
            stage.wire.sent.clear()
        assert [stage.store.records(key) for key in records] == before
        assert stage.budgets.records.used == 10

    play(scene)


def test_old_records_come_back_never() -> None:
    """Every store ever made is played again in any order: nothing changes."""
    rng = random.Random(6)

    async def scene(stage: Stage) -> None:
        you, publishers = stage.actor(1), [stage.actor(i) for i in range(2, 7)]
        for publisher in publishers:
            stage.meet(publisher)
        captured = []
        for seq in range(1, size(10, 100)):
            for publisher in publishers:
                record = publisher.record(KEY, seq, b"" if rng.random() < 0.2 else rng.randbytes(5), life_s=60 + seq)
                captured.append(m.Store(you.id, stage.me.id, KEY, 0, record))
                stage.hear(you.ask(captured[-1]))
                assert stage.last_reply(m.Store).held
                stage.steady.now += 0.1
        held = stage.store.records(KEY)
        for store in rng.sample(captured, len(captured)):
            stage.steady.now += 0.1
            stage.hear(you.ask(store))
        assert stage.store.records(KEY) == held
        assert [record.seq for record in held] == [size(10, 100) - 1] * 5
        stage.wall.now += 3_700_000
        for store in captured:
            stage.steady.now += 0.1
            stage.hear(you.ask(store))
        assert stage.store.records(KEY) == []

    play(scene)


def test_a_captured_datagram_is_refused_every_time() -> None:
    rng = random.Random(7)

    async def scene(stage: Stage) -> None:
        you = stage.actor(1)
        stage.meet(you)
        captured = [you.ask(request) for request in all_requests(you, stage.me.id)]
        for datagram in captured:
            stage.hear(datagram)
        n_sent = len(stage.wire.sent)
        for _ in range(size(200, 20_000)):
            for datagram in captured:
                stage.hear(datagram, rng.choice([HERE, ELSEWHERE]))
        stage.wall.now += 60_000
        for datagram in captured:
            stage.hear(datagram)
        await turn()
        assert len(stage.wire.sent) == n_sent
        assert stage.refused == {"replay": 5 * size(200, 20_000), "time": 5}

    play(scene)


# -------------------------------------------------------------------------------------------------------- amplification


def n_bytes_back(stage: Stage, datagram: bytes, to: Any) -> int:
    before = len(stage.wire.sent)
    stage.hear(datagram, to)
    return sum(len(each) for each, address in stage.wire.sent[before:] if address == to)


def test_outsiders_get_no_byte_back() -> None:
    swarm = PrivateSwarm()

    async def scene(stage: Stage) -> None:
        outsider = Actor(open_trust(1), stage.wall)
        stage.meet(Actor(swarm.member(2), stage.wall), ELSEWHERE)
        for request in all_requests(outsider, stage.me.id):
            assert n_bytes_back(stage, outsider.ask(request), HERE) == 0
        await turn()
        assert HERE not in [to for _, to in stage.wire.sent]

    play(scene, trust=swarm.member(0))


def test_nothing_is_multiplied_by_more_than_three() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(1)
        for i in range(40):
            stage.meet(stage.actor(100 + i), (f"198.{i}.100.2", 4747))
        for i in range(100):
            assert stage.store.put(KEY, stage.actor(1000 + i).record(KEY, value=bytes(i)))
        for i, request in enumerate(all_requests(you, stage.me.id)):
            datagram, victim = you.ask(request), (f"203.0.{i}.1", 9)
            replied = n_bytes_back(stage, datagram, victim)
            await turn()
            in_all = sum(len(each) for each, to in stage.wire.sent if to == victim)
            assert 0 < replied <= in_all <= 3 * len(datagram), type(request).__name__

    play(scene)


# ------------------------------------------------------------------------------------------------------- CPU and memory


def cpu_s_each(work: Callable[[int], object], n: int) -> float:
    """Return the processor time of `work(i)`, the median of ten batches."""
    took = []
    for batch in range(10):
        began = time.process_time()
        for i in range(n // 10):
            work(batch * (n // 10) + i)
        took.append((time.process_time() - began) / (n // 10))
    return statistics.median(took)


@pytest.mark.parametrize("n_records", [0, 4000])
def test_a_newcomer_costs_the_same_however_much_is_held(n_records: int) -> None:
    """A ping from a new id sets off no hand-off: its answer and one question back, under 0.2 ms."""

    async def scene(stage: Stage) -> None:
        stage.store._believe = lambda key, record: True
        for i in range(n_records):
            key = random.Random(i).randbytes(20)
            assert stage.store.put(key, WireRecord(i.to_bytes(32, "big"), 1, NOW_MS + 60_000, b"v", bytes(64)))
        pings = [stage.actor(i + 1).ping() for i in range(300)]
        each_s = cpu_s_each(lambda i: stage.hear(pings[i], ("192.0.2.7", i + 1)), 300)
        await turn()
        assert {type(request) for request in stage.wire.requests()} == {m.Ping}
        assert len(stage.wire.sent) <= 2 * len(pings)
        assert each_s < 0.2e-3

    play(scene)


def test_a_value_that_is_too_large_is_refused_at_its_publisher() -> None:
    with pytest.raises(LocalError, match=r"1 to 878 bytes, this has 879"):
        check_announcement(KEY, bytes(MAX_VALUE_BYTES + 1), 60)

    async def scene(stage: Stage) -> None:
        you = stage.actor(1)
        record = you.proofs.sign_record(KEY, 2**62, NOW_MS + 60_000, bytes(MAX_VALUE_BYTES + 1))
        assert len(m.encode(record)) == 1001
        stage.hear(you.ask(m.Store(you.id, stage.me.id, KEY, 0, record)))
        assert not stage.last_reply(m.Store).held

    play(scene)


def test_a_flood_of_records_fills_a_bounded_store() -> None:
    """Any number of publishers, keys and lives: at most 10,000 records, 16 MiB, and growth under 32 MiB."""
    rng, n = random.Random(10), size(30_000, 3_000_000)
    clock, budgets = Clock(NOW_MS), Budgets()
    store = RecordStore(clock, budgets, lambda key, record: True)
    tracemalloc.start()
    for i in range(n):
        life_ms = rng.randint(1, 3_600_000)
        record = WireRecord(rng.randbytes(32), i, clock.now + life_ms, rng.randbytes(MAX_VALUE_BYTES), bytes(64))
        store.put(rng.randbytes(20), record)
    growth = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert budgets.records.used == 10_000
    assert budgets.record_bytes.used <= 16 * MIB
    assert growth < 32 * MIB
    one = WireRecord(bytes(32), 1, clock.now + 3_600_000, b"v", bytes(64))
    for i in range(1000):
        store.put(i.to_bytes(20, "big"), one)
    assert len(store._keys_of[bytes(32)]) == 64


# ------------------------------------------------------------------------------------------------------------ poisoning


@pytest.mark.usefixtures("patient")
def test_one_poisoner_among_twenty_holders_is_not_believed() -> None:
    """It changes, forges and hides: the honest value is returned 100 times of 100."""
    lies = itertools.cycle(range(4))

    async def test() -> None:
        async with nodes_of(configs_of([open_trust(i) for i in range(21)])) as nodes:
            seeker, *holders = nodes
            publisher = Actor(open_trust(100), wall_ms)
            true, old = publisher.record(KEY, 2, b"true", life_s=600), publisher.record(KEY, 1, b"old", life_s=500)
            for holder in holders[1:]:
                assert holder.storage.put(KEY, true)

            def lie(request: Any, message_id: bytes, address: Any) -> Any:
                if not isinstance(request, m.FindRecords):
                    return honest(request, message_id, address)
                replace = msgspec.structs.replace
                forgeries = [
                    [replace(true, value=b"poison")],
                    [replace(true, seq=2**60, value=b"")],
                    [old],
                    [],
                ]
                return m.Page(holders[0].node.id, [], forgeries[next(lies)], 0, b"")

            honest = holders[0].protocol._answer
            holders[0].protocol._answer = lie
            for _ in range(100):
                assert await values(seeker) == [b"true"]

    on_one_loop(test)


# ------------------------------------------------------------------------------------------------------ the DDoS cannon


def test_a_list_of_victims_costs_each_lookup_twenty_packets_at_most() -> None:
    rng = random.Random(12)
    victims = [(rng.randbytes(20), f"{rng.randint(11, 99)}.{i % 250}.{i // 250}.7", 9) for i in range(1000)]

    async def scene(stage: Stage) -> None:
        you = stage.actor(1)
        for i in range(8):  # enough for two crawls, all with the same bad friends
            stage.meet(Actor(open_trust(10 + i), stage.wall), (f"198.{i}.100.2", 4747))
        contacts = {(node.ip, node.port): node.id for node in stage.protocol.router.contacts.values()}
        stage.wire.sent.clear()
        lookup = asyncio.ensure_future(
            look_up(stage.protocol, KEY, 5, lambda node, salt: stage.protocol.call_find_records(node, KEY, salt, b""))
        )
        answered = 0
        while not lookup.done():
            await turn()
            for datagram, to in stage.wire.sent[answered:]:
                answered += 1
                if to in contacts:
                    some = rng.sample(victims, 16)
                    stage.hear(you.reply(datagram, m.Page(contacts[to], some, [], 0, b"")), to)
            if all(to not in contacts for _, to in stage.wire.sent[answered:]):
                await asyncio.wait([lookup], timeout=0.01)
        to_victims = [to for _, to in stage.wire.sent if to not in contacts]
        assert 0 < len(to_victims) <= 20

    play(scene)


@pytest.mark.parametrize(
    "host",
    ["224.0.0.1", "255.255.255.255", "0.0.0.0", "127.0.0.1", "192.168.1.1", "fe80::1", "::ffff:8.8.8.8", "a.example"],
)
def test_nobody_makes_us_send_to(host: str) -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(1)
        stage.meet(you)
        crawl = Crawl(
            stage.protocol,
            stage.protocol.source_node,
            5,
            5,
            lambda node: stage.protocol.call_find_node(node, stage.protocol.source_node),
        )
        finding = asyncio.ensure_future(crawl.find())
        await turn()
        stage.hear(you.reply(stage.last(), m.Named(you.id, [(peer(5), host, 9)])))
        await finding
        assert all(to == HERE for _, to in stage.wire.sent)

    play(scene)


# ------------------------------------------------------------------------------------------------------- the state file


def test_a_pickle_in_place_of_the_state_file_runs_no_code(tmp_path: Path) -> None:
    path, proof = tmp_path / "peers.json", tmp_path / "proof"
    path.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % bytes(proof))  # what unpickling this would run

    async def test() -> None:
        node = await start_node(replace(config(1, udp_socket()), known_peers_file=path))
        assert "known peers not read" in node.status.problem
        await node.close()
        assert not proof.exists()
        assert path.read_bytes().startswith(b"cos"), "it is left for whoever wants to look at it"

    on_one_loop(test)


# --------------------------------------------------------------------------------------------------------------- floods


def test_an_honest_lookup_survives_a_flood() -> None:
    """Noise, forged records, a member over quota: nothing is accepted, lookups are answered, memory is bounded."""
    rng, n = random.Random(15), size(40, 4000)  # bursts of 50: 5000 a second if there are 100 bursts a second

    async def test() -> None:
        async with nodes_of(configs_of([open_trust(i) for i in range(4)])) as nodes:
            await nodes[0].announce(KEY, b"honest", 600)
            greedy = Actor(open_trust(50), wall_ms)
            target = nodes[1]._config.sock.getsockname()
            true = greedy.record(KEY)
            tracemalloc.start()
            took = []
            with udp_socket() as noisy, udp_socket() as member:
                for _ in range(n):
                    for _ in range(25):
                        noisy.sendto(rng.randbytes(200), target)
                    for _ in range(25):
                        store = m.Store(greedy.id, nodes[1].node.id, KEY, 0, forged(rng, true))
                        member.sendto(greedy.ask(store), target)
                    began = asyncio.get_running_loop().time()
                    assert await values(nodes[2]) == [b"honest"]
                    assert await values(nodes[1]) == [b"honest"]
                    took.append(asyncio.get_running_loop().time() - began)
            growth = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            assert {record.value for record in nodes[1].storage.records(KEY)} == {b"honest"}
            assert nodes[1].refused["mac"] > 0
            assert nodes[1].refused["flood"] + nodes[1].refused["quota"] > 0
            assert growth < 32 * MIB
            assert statistics.median(took) < 0.5

    on_one_loop(test)


def test_noise_costs_less_than_a_tenth_of_a_millisecond() -> None:
    rng = random.Random(1)

    async def scene(stage: Stage) -> None:
        noise = [rng.randbytes(1200) for _ in range(2000)]
        each_s = cpu_s_each(lambda i: stage.hear(noise[i], (f"192.{i % 200}.2.7", 9)), 2000)
        assert stage.refused["mac"] == 2000
        assert each_s < 0.1e-3

    play(scene)


# ----------------------------------------------------------------------------------------------------------- bootstraps


def test_one_good_bootstrap_among_bad_ones_is_enough() -> None:
    """A name, a dead one, an IPv6 one, a hostile one, ourselves, and one twice: joined within 3 s."""

    async def test() -> None:
        loop = asyncio.get_running_loop()
        good, hostile = await start_node(config(1, udp_socket())), await start_node(config(2, udp_socket()))
        hostile.protocol._answer = lambda request, message_id, address: [b"junk", {}, 7]
        with udp_socket() as sock:
            dead = endpoint_of(sock)
        own = udp_socket()
        entries = (
            Endpoint("no.such.invalid", 4747),
            dead,
            Endpoint("2001:db8::7", 4747),
            endpoint_of(hostile._config.sock),
            endpoint_of(own),
            endpoint_of(good._config.sock),
            endpoint_of(good._config.sock),
        )
        began = loop.time()
        node = await start_node(config(3, own, *entries))
        await until(lambda: node.status.peers == 1)
        assert loop.time() - began < 3
        assert good.node.id in node.protocol.router.contacts
        await asyncio.gather(node.close(), good.close(), hostile.close())

    on_one_loop(test)
