"""The contract of `Rendezvous`, held against both implementations, and what only the in-memory twin can do."""

from collections.abc import AsyncIterator, Sequence

import pytest
import trio
import trio.testing
from dht_swarm import eventually_async, everyone_knows_everyone, open_swarm, peer

from mpd.daemon.rendezvous import MAX_VALUE_BYTES, MemoryBoard, MemoryRendezvous, Record, Rendezvous
from mpd.errors import LocalError

N_PEERS = 4
KEY = b"k" * 20
OTHER_KEY = b"o" * 20


@pytest.fixture(params=["memory", "dht"])
async def swarm(request: pytest.FixtureRequest) -> AsyncIterator[Sequence[Rendezvous]]:
    if request.param == "memory":
        board = MemoryBoard(trio.current_time)
        yield [MemoryRendezvous(board, peer(i)) for i in range(N_PEERS)]
    else:
        async with open_swarm(N_PEERS) as nodes:
            await everyone_knows_everyone(nodes)
            yield nodes


def values(records: tuple[Record, ...]) -> set[bytes]:
    return {record.value for record in records}


async def test_nobody_has_announced_anything(swarm: Sequence[Rendezvous]) -> None:
    assert await swarm[0].seek(KEY) == ()


async def test_everyone_finds_what_everyone_announced(swarm: Sequence[Rendezvous]) -> None:
    for i, rendezvous in enumerate(swarm):
        await rendezvous.announce(KEY, b"from %d" % i, 60)
    for rendezvous in swarm:
        found = await rendezvous.seek(KEY)
        assert [(record.publisher, record.value) for record in found] == sorted(
            (peer(i), b"from %d" % i) for i in range(N_PEERS)
        )
        assert all(0 < record.expires_in_s <= 60 for record in found)


async def test_keys_are_apart(swarm: Sequence[Rendezvous]) -> None:
    await swarm[0].announce(KEY, b"here", 60)
    assert await swarm[1].seek(OTHER_KEY) == ()


async def test_a_later_announcement_replaces_the_earlier_one(swarm: Sequence[Rendezvous]) -> None:
    await swarm[0].announce(KEY, b"old", 60)
    (old,) = await swarm[1].seek(KEY)
    await swarm[0].announce(KEY, b"new", 60)
    (new,) = await swarm[1].seek(KEY)
    assert new.value == b"new"
    assert new.seq > old.seq


async def test_what_is_withdrawn_is_gone_and_may_come_back(swarm: Sequence[Rendezvous]) -> None:
    await swarm[0].announce(KEY, b"mine", 60)
    await swarm[1].announce(KEY, b"yours", 60)
    await swarm[0].withdraw(KEY)
    assert [values(await rendezvous.seek(KEY)) for rendezvous in swarm] == [{b"yours"}] * N_PEERS
    await swarm[0].announce(KEY, b"again", 60)
    assert values(await swarm[2].seek(KEY)) == {b"again", b"yours"}


async def test_withdrawing_nothing_is_fine(swarm: Sequence[Rendezvous]) -> None:
    await swarm[1].announce(KEY, b"yours", 60)
    await swarm[0].withdraw(KEY)
    assert values(await swarm[0].seek(KEY)) == {b"yours"}


async def test_a_value_of_the_greatest_size_arrives(swarm: Sequence[Rendezvous]) -> None:
    for rendezvous in swarm:
        await rendezvous.announce(KEY, bytes(MAX_VALUE_BYTES), 60)
    assert [record.value for record in await swarm[0].seek(KEY)] == [bytes(MAX_VALUE_BYTES)] * N_PEERS


async def test_a_long_life_is_cut_to_an_hour(swarm: Sequence[Rendezvous]) -> None:
    await swarm[0].announce(KEY, b"v", 1e9)
    (record,) = await swarm[1].seek(KEY)
    assert 3500 < record.expires_in_s <= 3600


async def test_the_status_counts_the_others(swarm: Sequence[Rendezvous]) -> None:
    assert [rendezvous.snapshot().peers for rendezvous in swarm] == [N_PEERS - 1] * N_PEERS
    assert [rendezvous.snapshot().problem for rendezvous in swarm] == [""] * N_PEERS


@pytest.mark.parametrize(
    ("key", "value", "ttl_s", "says"),
    [
        (b"short", b"v", 60, "20 bytes"),
        (bytes(21), b"v", 60, "20 bytes"),
        (KEY, b"", 60, "1 to 878 bytes"),
        (KEY, bytes(879), 60, "1 to 878 bytes"),
        (KEY, b"v", 0, "positive"),
        (KEY, b"v", float("nan"), "positive"),
        (KEY, b"v", float("inf"), "positive"),
    ],
)
async def test_an_impossible_announcement_is_refused(
    swarm: Sequence[Rendezvous], key: bytes, value: bytes, ttl_s: float, says: str
) -> None:
    with pytest.raises(LocalError, match=says):
        await swarm[0].announce(key, value, ttl_s)
    assert await swarm[0].seek(KEY) == ()


async def test_a_bad_key_is_refused_everywhere(swarm: Sequence[Rendezvous]) -> None:
    with pytest.raises(LocalError, match="20 bytes"):
        await swarm[0].seek(b"short")
    with pytest.raises(LocalError, match="20 bytes"):
        await swarm[0].withdraw(b"short")


async def test_a_cancelled_call_harms_nothing(swarm: Sequence[Rendezvous]) -> None:
    await swarm[0].announce(KEY, b"v", 60)
    for _ in range(20):
        with trio.CancelScope() as scope:
            scope.cancel()
            await swarm[1].seek(KEY)
    with trio.CancelScope() as scope:
        scope.cancel()
        await swarm[1].announce(KEY, b"maybe", 60)

    async def found() -> bool:
        return b"v" in values(await swarm[1].seek(KEY))

    await eventually_async(found)


# the twin alone


async def test_records_of_the_dead_expire(autojump_clock: trio.testing.MockClock) -> None:
    board = MemoryBoard(trio.current_time)
    dead, alive = MemoryRendezvous(board, peer(0)), MemoryRendezvous(board, peer(1))
    await dead.announce(KEY, b"v", 10)
    await trio.sleep(100)
    assert values(await alive.seek(KEY)) == {b"v"}
    dead.die()
    await trio.sleep(4)
    (record,) = await alive.seek(KEY)
    assert record.expires_in_s == 6
    await trio.sleep(6)
    assert await alive.seek(KEY) == ()
    assert alive.snapshot().peers == 0


async def test_a_closed_twin_is_gone_at_once() -> None:
    board = MemoryBoard(trio.current_time)
    closed, open_one = MemoryRendezvous(board, peer(0)), MemoryRendezvous(board, peer(1))
    await closed.announce(KEY, b"v", 10)
    closed.close()
    assert await open_one.seek(KEY) == ()
    with pytest.raises(LocalError, match="closed"):
        await closed.seek(KEY)


async def test_the_delay_comes_before_the_effect() -> None:
    gate = trio.Event()
    board = MemoryBoard(trio.current_time)
    slow, quick = MemoryRendezvous(board, peer(0), delay=gate.wait), MemoryRendezvous(board, peer(1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(slow.announce, KEY, b"v", 10)
        await trio.testing.wait_all_tasks_blocked()
        assert await quick.seek(KEY) == ()
        gate.set()
    assert values(await quick.seek(KEY)) == {b"v"}
