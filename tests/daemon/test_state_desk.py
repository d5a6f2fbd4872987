"""Serving states: what peers may ask for, how much of it at once, and that rounds come first."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.lowlevel
from fake_peers import FakeLink, Swarm
from state_swarm import N_CHUNKS, Host, host, small_chunks_and_no_threads, together
from trio.testing import MockClock

from mpd.daemon.budgets import Budget
from mpd.daemon.shelf import HOLD_S, Shelf
from mpd.daemon.state_desk import GIVE_WAY_S, IDLE_S, _Service
from mpd.identity import OPEN_SWARM, Member
from mpd.manifest import chunk_hash
from mpd.state_messages import MAX_WANTED, NoState, StateAsk, StateGone, StateHashes, StateList, StateOffer, StateWant
from mpd.wire import Header, Kind


@pytest.fixture(autouse=True)
def small(repeatable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks_and_no_threads(monkeypatch)


class Joiner:
    """A peer that the test plays: it says what it is told to and keeps what comes."""

    def __init__(self, link: FakeLink) -> None:
        self.link = link
        self.heard: list[Any] = []
        self.chunks: list[tuple[float, Header, bytes]] = []

    def on_link_up(self, link: Any) -> None:
        pass

    def on_link_down(self, link: Any, reason: str) -> None:
        pass

    def on_message(self, link: Any, message: Any) -> None:
        self.heard.append(message)

    async def landing(self, link: Any, header: Header) -> "Joiner":
        self._header = header
        return self

    view = None

    def complete(self, payload: memoryview) -> None:
        self.chunks.append((trio.current_time(), self._header, bytes(payload)))

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]


async def setting(nursery: trio.Nursery, n: int = 2, delay_s: float = 0.01) -> tuple[list[Host], Joiner]:
    """Return hosts that have averaged once, and a joiner with a link to the first."""
    swarm = Swarm(nursery, delay_s=lambda: delay_s)
    hosts = [await host(swarm) for _ in range(n)]
    await together(hosts, 1.0, 3.0)
    return hosts, await join(swarm, hosts[0])


async def join(swarm: Swarm, source: Host) -> Joiner:
    daemon = swarm.daemon()
    link = await daemon.peers.link(source.daemon.own, source.daemon.peers.endpoint)
    joiner = Joiner(link)
    daemon.peers.events = joiner
    return joiner


async def offered(joiner: Joiner, source: Host) -> StateOffer:
    joiner.link.send(StateAsk("run", source.run.terms.digest))
    await trio.sleep(1)
    offer = joiner.of(StateOffer)[-1]
    assert isinstance(offer, StateOffer)
    return offer


async def test_who_asks_is_offered_and_gets_hashes_and_chunks(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    (source, _), joiner = await setting(nursery)
    offer = await offered(joiner, source)
    assert (offer.run, offer.number, offer.metadata) == ("run", 1, b"")
    joiner.link.send(StateList(offer.manifest, 0))
    joiner.link.send(StateWant(offer.manifest, (N_CHUNKS - 1, 0)))
    await trio.sleep(1)
    (page,) = joiner.of(StateHashes)
    assert (page.first, len(page.hashes)) == (0, 32 * N_CHUNKS)
    assert [header.chunk for _, header, _ in joiner.chunks] == [N_CHUNKS - 1, 0]
    for _, header, payload in joiner.chunks:
        assert header == Header(Kind.STATE, 0, 0, header.chunk, len(payload), 0, offer.manifest[:16], 0)  # type: ignore[arg-type]
        assert chunk_hash(payload) == page.hashes[32 * header.chunk : 32 * header.chunk + 32]


@pytest.mark.parametrize(("run", "terms", "why"), [("other", None, "no trainer"), ("run", bytes(32), "other terms")])
async def test_who_asks_in_vain_is_told_why(
    run: str, terms: bytes | None, why: str, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    (source, _), joiner = await setting(nursery)
    joiner.link.send(StateAsk(run, terms or source.run.terms.digest))
    await trio.sleep(1)
    (answer,) = joiner.of(NoState)
    assert why in answer.reason
    assert not answer.soon


async def test_one_question_is_answered_once_however_often_it_is_asked(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    (source, _), joiner = await setting(nursery, delay_s=0)
    source.run.shelf.begin_write()  # so that the answer takes its time
    source.run.shelf.commit = None
    for _ in range(1000):
        joiner.link.send(StateAsk("run", source.run.terms.digest))
    await trio.sleep(1)
    assert [message.soon for message in joiner.heard] == [True]


@pytest.mark.parametrize(
    "excess",
    [
        lambda m: [StateWant(m, (N_CHUNKS,))],
        lambda m: [StateWant(m, (0, 1 << 19))],
        lambda m: [StateWant(m, tuple(range(MAX_WANTED)))] * 2,
        lambda m: [StateList(m, N_CHUNKS)],
    ],
)
async def test_who_wants_what_cannot_be_loses_its_link(
    excess: Any, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    (source, _), joiner = await setting(nursery)
    offer = await offered(joiner, source)
    for message in excess(offer.manifest):
        joiner.link.send(message)
    await trio.sleep(1)
    assert not joiner.link.up
    assert "chunk" in joiner.link.reason
    await trio.sleep(1)
    assert source.daemon.runs.desk.budgets.joiners.used == 0
    assert source.held[0].readers == 0


async def test_an_observer_may_ask_for_no_state(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    (source, _), joiner = await setting(nursery)
    joiner.link.far.member = Member(joiner.link.far.peer, OPEN_SWARM, "observer", None, 0.0, math.inf)
    joiner.link.send(StateAsk("run", source.run.terms.digest))
    await trio.sleep(1)
    assert "is an observer" in joiner.link.reason


async def test_what_is_not_held_is_said_to_be_gone(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    (source, _), joiner = await setting(nursery)
    joiner.link.send(StateWant(b"x" * 32, (0,)))
    joiner.link.send(StateList(b"x" * 32, 0))
    offer = await offered(joiner, source)
    await trio.sleep(HOLD_S + 10)
    joiner.link.send(StateWant(offer.manifest, (0,)))
    await trio.sleep(1)
    assert [gone.manifest for gone in joiner.of(StateGone)] == [b"x" * 32, b"x" * 32, offer.manifest]
    assert joiner.chunks == []


async def test_the_end_of_the_run_ends_the_service(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    (source, _), joiner = await setting(nursery)
    offer = await offered(joiner, source)
    joiner.link.send(StateWant(offer.manifest, tuple(range(8))))
    await trio.sleep(0.035)
    desk = source.daemon.runs.desk
    source.seat.close()
    await trio.sleep(1)
    assert 0 < len(joiner.chunks) < 8
    assert joiner.of(StateGone)
    assert (desk.budgets.joiners.used, desk.budgets.states.used) == (0, 0)


async def test_who_wants_nothing_more_is_forgotten(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    (source, _), joiner = await setting(nursery)
    offer = await offered(joiner, source)
    joiner.link.send(StateWant(offer.manifest, (0,)))
    await trio.sleep(1)
    budget = source.daemon.runs.desk.budgets.joiners
    assert budget.used == 1
    await trio.sleep(IDLE_S + 1)
    assert budget.used == 0
    await trio.sleep(HOLD_S + 10)
    assert source.held == ()
    offer = await offered(joiner, source)
    joiner.link.send(StateWant(offer.manifest, (3,)))
    await trio.sleep(1)
    assert len(joiner.chunks) == 2


async def test_only_so_many_joiners_are_served(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery, delay_s=lambda: 0.01)
    hosts = [await host(swarm) for _ in range(2)]
    await together(hosts, 1.0, 3.0)
    desk = hosts[0].daemon.runs.desk
    desk.budgets = replace(desk.budgets, joiners=Budget(2))
    joiners = [await join(swarm, hosts[0]) for _ in range(3)]
    for joiner in joiners:
        offer = await offered(joiner, hosts[0])
        joiner.link.send(StateWant(offer.manifest, (0,)))
    await trio.sleep(1)
    assert [len(joiner.chunks) for joiner in joiners] == [1, 1, 0]
    assert "as many joiners as it may" in joiners[2].of(StateGone)[0].reason
    assert desk.budgets.joiners.refused == 1


async def test_while_a_round_is_under_way_a_chunk_waits_for_it_but_not_for_ever(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    (source, _), joiner = await setting(nursery, delay_s=0.001)
    offer = await offered(joiner, source)
    round_ends = trio.Event()
    source.daemon.runs.desk._quiet = round_ends.wait
    began = trio.current_time()
    joiner.link.send(StateWant(offer.manifest, (0, 1, 2, 3)))
    await trio.sleep(2.5 * GIVE_WAY_S)
    times = [at - began for at, _, _ in joiner.chunks]
    assert times == pytest.approx([GIVE_WAY_S, 2 * GIVE_WAY_S], abs=0.02)
    round_ends.set()
    await trio.sleep(0.02)
    assert len(joiner.chunks) == 4


async def test_a_round_is_under_way_until_its_result_is_there(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    (source, other), _ = await setting(nursery, delay_s=0.2)
    ended: list[float] = []

    begin = source.daemon.sessions.begin

    async def watch() -> None:
        await source.daemon.sessions.wait_quiet()
        ended.append(trio.current_time())

    def watched(*args: Any) -> Any:
        session = begin(*args)
        nursery.start_soon(watch)
        return session

    source.daemon.sessions.begin = watched  # type: ignore[method-assign]
    async with trio.open_nursery() as steps:
        steps.start_soon(other.step, 3.0)
        await source.step(1.0)  # the other's result may come a message later
        await trio.lowlevel.checkpoint()
        assert ended == [trio.current_time()]


async def test_a_bug_while_serving_costs_one_answer_one_joiner_or_one_look_and_not_the_daemon(
    nursery: trio.Nursery, autojump_clock: MockClock, bugs: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*args: Any) -> None:
        raise ValueError("a bug")

    (source, other), joiner = await setting(nursery)
    with monkeypatch.context() as patch:
        patch.setattr(Shelf, "state", bug)
        patch.setattr(Shelf, "expire", bug)
        joiner.link.send(StateAsk("run", source.run.terms.digest))
        await trio.sleep(6)
    offer = await offered(joiner, source)  # the next one gets its answer
    with monkeypatch.context() as patch:
        patch.setattr(_Service, "_send", bug)
        joiner.link.send(StateWant(offer.manifest, (0,)))
        await trio.sleep(1)
    joiner.link.send(StateWant(offer.manifest, (1,)))
    await trio.sleep(1)
    assert [header.chunk for _, header, _ in joiner.chunks] == [1]
    assert bugs == {"answer about a state": 1, "states for others": 2, "joiner": 1}
    assert all(answer.averaged for answer in await together([source, other], 1.0, 3.0))
