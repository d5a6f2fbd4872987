"""Whole rounds between real sessions, over real links on the loopback, in one trio run.

Strategy: member i brings 2**i, scaled a little from element to element, so the mean of a chunk tells who is in it, and
it can be computed exactly from the contributor set that the session reports. Faults happen at a given record, not at a
given time. Every test ends with the same questions: are the results those of their contributors, does everybody who
succeeded hold the same bytes, and is anything left behind on links or in memory?
"""

import contextlib
import functools
import gc
import math
import re
import socket
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trio
import trio.testing
import zstandard
from daemon_helpers import HANG_S, ROUND, Node, Parcel, Recorder, record, start_node

from mpd.codecs import codec_named
from mpd.daemon.links import MAX_REPAIRS, Landing, Link
from mpd.daemon.sessions import RoundResult, RoundSession, Sessions
from mpd.daemon.vault import RegionVault
from mpd.deadlines import PROGRESS
from mpd.exchange import Exchange
from mpd.layout import ITEM_BYTES, Segment
from mpd.messages import EXCHANGE, Begin, Commit, Done, Few, Member, Need, NewPlan, Scoped, UnknownRound, Want
from mpd.reduce import AccumulatorPool, as_array, bf16_from_f32, members_of
from mpd.schedule import chunks
from mpd.seal import NO_SEAL, TAG_BYTES
from mpd.wire import Header, Kind, unpack_header

UNSET = 0x5A
MIB = 1 << 20

Hook = Callable[[int, int, Header], None]  # receiver, sender, header of a record that is about to be received


def values_of(member: int, n_elems: int, dtype: str) -> bytearray:
    """Return what `member` brings: small integers, exact in every dtype, and so are their sums."""
    return to_bytes((1 << member) * (1 + np.arange(n_elems) % 3).astype(np.float32), dtype)


def mean_of(contributors: int, n_elems: int, dtype: str, codec: str) -> bytearray:
    """Return the mean over `contributors` as everybody must hold it."""
    members = members_of(contributors)
    wide = np.float64 if dtype == "float64" else np.float32
    sums = sum(1 << i for i in members) * (1 + np.arange(n_elems) % 3).astype(wide)
    mean = sums / wide(len(members))
    if codec == "float16" and ITEM_BYTES[dtype] > 2:
        mean = mean.astype(np.float16).astype(wide)
    return to_bytes(mean, dtype)


def to_bytes(values: npt.NDArray[Any], dtype: str) -> bytearray:
    memory = bytearray(values.size * ITEM_BYTES[dtype])
    if dtype == "bfloat16":
        bf16_from_f32(values.astype(np.float32), as_array(memory, dtype))
    else:
        as_array(memory, dtype)[:] = values
    return memory


class Hearing(Recorder):
    """A daemon as its links see it: sessions and nothing else."""

    sessions: Sessions
    on_begin: Callable[[Begin], None]
    hook: Callable[[Link, Header], None]

    def on_message(self, link: Link, message: Any) -> None:
        match message:
            case Scoped():
                self.sessions.on_scoped(link, message)
            case UnknownRound():
                self.sessions.on_unknown_round(link, message)
            case Begin():
                self.on_begin(message)
        super().on_message(link, message)

    def expects(self, link: Link, header: Header) -> bool:
        return self.sessions.expects(link, header)

    async def landing(self, link: Link, header: Header) -> Landing | None:
        self.note("header", header)
        self.hook(link, header)
        return await self.sessions.landing(link, header)

    def on_link_down(self, link: Link, reason: str) -> None:
        self.sessions.on_link_down(link, reason)
        super().on_link_down(link, reason)


class Played(Recorder):
    """A member that the test plays: it says what the test tells it to, and reads records once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_read = trio.Event()

    def expects(self, link: Link, header: Header) -> bool:
        return True

    async def landing(self, link: Link, header: Header) -> Landing | None:
        await self.may_read.wait()
        return await super().landing(link, header)


class Swarm:
    """Daemons 0 to n - 1 and one round of theirs, in which place and number of a member are the same."""

    def __init__(self, nursery: trio.Nursery, nodes: list[Node], n_elems: int, dtype: str, codec: str) -> None:
        self.nursery = nursery
        self.nodes = nodes
        self.n_elems, self.dtype, self.codec = n_elems, dtype, codec
        self.sessions: dict[int, RoundSession] = {}
        self.results: dict[int, RoundResult] = {}
        self.masks: dict[int, list[int]] = {}
        self.scopes: dict[int, trio.CancelScope] = {}  # of their tasks
        self.ended: set[int] = set()
        self.hook: Hook = lambda receiver, sender, header: None
        self.out = [bytearray([UNSET]) * (n_elems * ITEM_BYTES[dtype]) for _ in nodes]
        self.inputs = [values_of(i, n_elems, dtype) for i in range(len(nodes))]
        self._refs: list[weakref.ref[RoundSession]] = []
        number = {node.own: i for i, node in enumerate(nodes)}
        for i, node in enumerate(nodes):
            if isinstance(node.events, Played):
                continue
            node.events.sessions = Sessions(node.peers)
            node.events.on_begin = lambda begin, i=i: self.join(i, begin)
            node.events.hook = lambda link, header, i=i: self.hook(i, number.get(link.peer, -1), header)

    def begin(
        self,
        chunk_bytes: int = 64 * 1024,
        weights: Sequence[float] | None = None,
        fractions: Sequence[float] | None = None,
        timeout_s: float = 60.0,
        progress_s: float = 30.0,
    ) -> Begin:
        """Return the round's BEGIN. By default no timer strikes before a test hangs."""
        inbound = [node.endpoint.port != 0 for node in self.nodes]
        n, n_inbound = len(self.nodes), sum(inbound)
        members = tuple(
            Member(
                peer=node.own,
                host=node.endpoint.host,
                port=node.endpoint.port,
                inbound=inbound[i],
                weight=weights[i] if weights else 1.0,
                heads=1.0,
                fraction=fractions[i] if fractions else inbound[i] / n_inbound,
                stamp=i,
            )
            for i, node in enumerate(self.nodes)
        )
        return Begin(
            round_id=ROUND,
            run="run",
            slot=bytes(20),
            digest=bytes(32),
            epoch=0,
            number=0,
            members=members[:n],
            whole=True,
            chunk_bytes=chunk_bytes,
            timeout_s=timeout_s,
            progress_s=progress_s,
            left_out={},
        )

    def join(self, i: int, begin: Begin) -> RoundSession:
        """Let daemon `i` take part, unless it does already."""
        if i in self.sessions or i in self.ended:
            return self.sessions[i]
        plan = chunks([Segment(self.dtype, 0, self.n_elems)], [m.fraction for m in begin.members], begin.chunk_bytes)
        weights = [member.weight for member in begin.members]
        vault = RegionVault(plan, memoryview(self.inputs[i]), memoryview(self.out[i]), weights, i)
        vault.use(codec_named(self.codec), AccumulatorPool())
        self.sessions[i] = session = self.nodes[i].events.sessions.begin(begin, i, vault)
        self._refs.append(weakref.ref(session))
        self.nursery.start_soon(self._carry, i, session)
        return session

    async def _carry(self, i: int, session: RoundSession) -> None:
        sessions = self.nodes[i].events.sessions
        try:
            with trio.CancelScope() as self.scopes[i]:
                await session.run()
        finally:
            session.cancel("this daemon is leaving")
            sessions.end(session)
            self.results[i] = session.result()
            self.masks[i] = list(session.exchange.chunk_contributors)
            del self.sessions[i]
            self.ended.add(i)
            self.nodes[i].events.note("ended", i)

    async def until_ended(self, *members: int) -> None:
        for i in members:
            await self.nodes[i].events.until(lambda i=i: i in self.ended)

    async def run(self, begin: Begin | None = None, members: Sequence[int] | None = None) -> None:
        """Let `members`, or all, do the round to its end."""
        begin = begin or self.begin()
        members = range(len(self.nodes)) if members is None else members
        for i in members:
            self.join(i, begin)
        await self.until_ended(*members)

    def cut(self, member: int) -> None:
        """End all links of a member, as if its machine had lost its network."""
        for link in self.nodes[member].peers.links():
            link.close("cut by the test")

    def traffic(self, member: int, peer: int) -> tuple[int, int]:
        """Return the bytes that `member` has sent to `peer` and received from it."""
        link = self.nodes[member].peers.get(self.nodes[peer].own)
        return (link.bytes_sent, link.bytes_received) if link is not None else (0, 0)

    def plan_of(self, begin: Begin) -> tuple[Any, ...]:
        return chunks([Segment(self.dtype, 0, self.n_elems)], [m.fraction for m in begin.members], begin.chunk_bytes)

    def expect_success(self, *members: int, contributors: int | None = None) -> None:
        """These hold the same bytes, and every chunk is the mean of those who are said to be in it."""
        for i in members:
            result = self.results[i]
            assert result.success, (i, result.reason)
            assert self.masks[i] == self.masks[members[0]]
            assert self.out[i] == self.out[members[0]]
            if contributors is not None:
                assert result.contributors == contributors

    def expect_means(self, begin: Begin, member: int) -> None:
        item_bytes, memory = ITEM_BYTES[self.dtype], self.out[member]
        means = {mask: mean_of(mask, self.n_elems, self.dtype, self.codec) for mask in set(self.masks[member])}
        for chunk, mask in zip(self.plan_of(begin), self.masks[member], strict=True):
            assert chunk.n_bytes == chunk.n_elems * item_bytes
            assert memory[chunk.offset : chunk.end] == means[mask][chunk.offset : chunk.end], (chunk, bin(mask))

    def expect_nothing_left(self) -> None:
        """No round depends on any link, and nobody holds a session that is over."""
        for node in self.nodes:
            assert [status.rounds for status in node.peers.snapshot()] == [0] * len(node.peers.links())
        gc.collect()
        assert [ref() for ref in self._refs if ref() is not None] == []
        assert self.inputs == [values_of(i, self.n_elems, self.dtype) for i in range(len(self.nodes))]


@contextlib.asynccontextmanager
async def swarm(
    n: int,
    n_elems: int = 100_000,
    dtype: str = "float32",
    codec: str = "raw",
    outbound_only: Sequence[int] = (),
    played: Sequence[int] = (),
    sealed: bool = True,
) -> AsyncIterator[Swarm]:
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nodes = [
                await start_node(nursery, i, Played() if i in played else Hearing(), outbound_only=i in outbound_only)
                for i in range(n)
            ]
            for node in nodes:
                node.peers.suites = node.peers.suites if sealed else (NO_SEAL,)
            yield Swarm(nursery, nodes, n_elems, dtype, codec)
            nursery.cancel_scope.cancel()


def all_of(n: int) -> int:
    return (1 << n) - 1


@pytest.fixture
def jumping_clock() -> trio.testing.MockClock:
    """Time passes only while all sockets are quiet."""
    return trio.testing.MockClock(autojump_threshold=0.005)


# --------------------------------------------------------------------------------------------------- nothing goes wrong


@pytest.mark.parametrize(
    ("n", "n_elems", "dtype", "codec"),
    [
        (2, 1, "float32", "raw"),
        (2, 1_000_000, "float32", "raw"),
        (3, 5, "bfloat16", "raw"),
        (3, 200_000, "float64", "raw"),
        (3, 50_001, "float32", "float16"),
        (4, 1_000_003, "float32", "raw"),
        (4, 100_000, "float16", "float16"),
        (4, 70_000, "bfloat16", "zstd"),
        (5, 17, "float16", "raw"),
        (5, 123_457, "float32", "zstd"),
        (5, 300_000, "bfloat16", "float16"),
    ],
)
async def test_everybody_ends_with_the_exact_mean(n: int, n_elems: int, dtype: str, codec: str) -> None:
    async with swarm(n, n_elems, dtype, codec) as s:
        begin = s.begin()
        await s.run(begin)
        s.expect_success(*range(n), contributors=all_of(n))
        assert s.out[0] == mean_of(all_of(n), n_elems, dtype, codec)
        assert [s.results[i].missing for i in range(n)] == [{}] * n
        s.expect_nothing_left()


async def test_a_round_costs_little_more_than_it_must() -> None:
    """Each member sends and receives every shard but its own, once as pieces and once as results: 2 (1 - 1/n) V."""
    n, n_elems = 4, MIB
    async with swarm(n, n_elems) as s:
        await s.run()
        must = 2 * (1 - 1 / n) * n_elems * 4
        for result in s.results.values():
            assert must <= result.bytes_sent <= 1.01 * must
            assert must <= result.bytes_received <= 1.01 * must
        on_links = sum(link.bytes_sent for node in s.nodes for link in node.peers.links())
        assert n * must <= on_links <= 1.01 * n * must


async def test_links_and_sessions_serve_round_after_round() -> None:
    async with swarm(3, 10_000) as s:
        for _ in range(5):
            await s.run()
            s.expect_success(0, 1, 2, contributors=0b111)
            s.ended.clear()
            # A round id is used once; whoever ended a round drops what comes late for it.
            for node in s.nodes:
                node.events.sessions = Sessions(node.peers)
        assert [node.events.reasons for node in s.nodes] == [[], [], []]
        s.expect_nothing_left()


async def test_two_rounds_share_the_links_of_their_members() -> None:
    async with swarm(3) as s:
        begin = s.begin()
        other_out = [bytearray(len(out)) for out in s.out]
        other = Begin(**{name: getattr(begin, name) for name in Begin.__slots__} | {"round_id": b"o" * 16})
        others = []
        for i in range(3):
            s.join(i, begin)
            plan = s.plan_of(other)
            vault = RegionVault(plan, memoryview(s.inputs[i]), memoryview(other_out[i]), [1.0] * 3, i)
            vault.use(codec_named("raw"), AccumulatorPool())
            session = s.nodes[i].events.sessions.begin(other, i, vault)
            s.nursery.start_soon(session.run)
            others.append(session)
        await s.until_ended(0, 1, 2)
        for session in others:
            await session.gone.wait()
            assert session.result().success
        s.expect_success(0, 1, 2, contributors=0b111)
        assert other_out == s.out
        others.clear()


async def test_whoever_weighs_nothing_receives_the_mean_of_the_others() -> None:
    async with swarm(3) as s:
        begin = s.begin(weights=[1.0, 0.0, 1.0])
        await s.run(begin)
        s.expect_success(0, 1, 2, contributors=0b101)
        assert s.out[1] == mean_of(0b101, s.n_elems, s.dtype, s.codec)
        assert s.results[0].missing == {1: "weighs nothing in this round"}
        s.expect_nothing_left()


async def test_whoever_cannot_be_called_takes_part_and_reduces_nothing() -> None:
    async with swarm(4, outbound_only=[1, 3]) as s:
        begin = s.begin()
        await s.run(begin)
        s.expect_success(*range(4), contributors=0b1111)
        assert s.out[3] == mean_of(0b1111, s.n_elems, s.dtype, s.codec)
        assert s.nodes[1].peers.get(s.nodes[3].own) is None
        s.expect_nothing_left()


# ----------------------------------------------------------------------------------------------------- somebody is lost


def at_record(n: int, act: Callable[[], None], receiver: int, sender: int, kind: Kind) -> Hook:
    """Return a hook that calls `act` when `receiver` is about to read the n-th record of that kind from `sender`."""
    n_seen = 0

    def hook(its_receiver: int, its_sender: int, header: Header) -> None:
        nonlocal n_seen
        if (its_receiver, its_sender, header.kind) == (receiver, sender, kind):
            n_seen += 1
            if n_seen == n:
                act()

    return hook


@pytest.mark.parametrize("kind", [Kind.PIECE, Kind.CHUNK])
@pytest.mark.parametrize(("n_elems", "dtype", "codec"), [(400_000, "float32", "raw"), (400_000, "bfloat16", "zstd")])
@pytest.mark.parametrize("sealed", [True, False])
async def test_a_data_connection_that_is_cut_costs_the_round_nothing(
    kind: Kind, n_elems: int, dtype: str, codec: str, sealed: bool
) -> None:
    async with swarm(3, n_elems, dtype, codec, sealed=sealed) as s:
        begin = s.begin()

        def cut() -> None:
            link = s.nodes[0].peers.get(s.nodes[2].own)
            assert link is not None
            assert link._channel is not None
            link._channel._sock.shutdown(socket.SHUT_RDWR)

        s.hook = at_record(2, cut, receiver=0, sender=2, kind=kind)
        await s.run(begin)
        s.expect_success(0, 1, 2, contributors=0b111)
        s.expect_means(begin, 0)
        assert [node.events.reasons for node in s.nodes] == [[], [], []]
        s.expect_nothing_left()


async def test_each_round_brings_its_links_new_patience() -> None:
    async with swarm(2, 1000) as pair:
        links = [await pair.nodes[0].peers.link(pair.nodes[1].own, pair.nodes[1].endpoint)]
        await pair.nodes[1].events.until(lambda: pair.nodes[1].peers.links())
        links += pair.nodes[1].peers.links()
        for link in links:
            link.repairs_left = 0
        await pair.run()
        assert [link.repairs_left for link in links] == [MAX_REPAIRS] * 2


@pytest.mark.parametrize("n_th", [1, 2, 4])
@pytest.mark.parametrize("n", [3, 4, 5])
async def test_a_sender_that_is_cut_off_is_left_out_of_what_it_did_not_send(n: int, n_th: int) -> None:
    """It reduces nothing, so nothing has to be redone."""
    lost = n - 1
    async with swarm(n, 400_000) as s:
        begin = s.begin(fractions=[1 / lost] * lost + [0.0])
        s.hook = at_record(n_th, lambda: s.cut(lost), receiver=0, sender=lost, kind=Kind.PIECE)
        await s.run(begin)
        others = range(lost)
        s.expect_success(*others)
        s.expect_means(begin, 0)
        assert lost not in members_of(s.results[0].contributors)
        for i in others:
            assert set(s.results[i].missing) == {lost}
            assert s.results[i].missing[lost]
        assert not s.results[lost].success
        assert s.results[lost].reason
        s.expect_nothing_left()


@pytest.mark.parametrize("n_th", [1, 3])
@pytest.mark.parametrize("kind", [Kind.PIECE, Kind.CHUNK])
@pytest.mark.parametrize("n", [3, 4, 5])
async def test_a_reducer_that_is_cut_off_is_replaced(n: int, kind: Kind, n_th: int) -> None:
    """What one has of its shard is forwarded, what nobody has is redone; a group of 3 needs both that are left."""
    lost = 1
    async with swarm(n, 400_000) as s:
        begin = s.begin()
        s.hook = at_record(n_th, lambda: s.cut(lost), receiver=0, sender=lost, kind=kind)
        await s.run(begin)
        others = [i for i in range(n) if i != lost]
        s.expect_success(*others)
        s.expect_means(begin, others[0])
        if s.results[lost].success:  # it may have heard of everything before it was cut off
            assert s.out[lost] == s.out[0]
        s.expect_nothing_left()


@pytest.mark.parametrize("codec", ["raw", "zstd"])
async def test_a_lost_link_between_two_live_members_costs_neither_of_them(codec: str) -> None:
    async with swarm(4, 400_000, codec=codec) as s:
        begin = s.begin()

        def cut() -> None:
            link = s.nodes[0].peers.get(s.nodes[2].own)
            assert link is not None
            link.close("cut by the test")

        s.hook = at_record(2, cut, receiver=0, sender=2, kind=Kind.PIECE)
        await s.run(begin)
        s.expect_success(*range(4))
        s.expect_means(begin, 0)
        s.expect_nothing_left()


async def test_a_group_of_two_that_is_cut_apart_fails_at_once_and_keeps_the_inputs() -> None:
    async with swarm(2, 400_000) as s:
        s.hook = at_record(1, lambda: s.cut(1), receiver=0, sender=1, kind=Kind.PIECE)
        await s.run()
        for i in range(2):
            assert not s.results[i].success
            assert s.results[i].reason
            assert s.results[i].contributors == 0
        s.expect_nothing_left()


async def test_an_average_of_oneself_is_not_called_an_average() -> None:
    async with swarm(2, n_elems=1_000_000, outbound_only=[1]) as pair:
        begin = pair.begin(chunk_bytes=4 << 20, fractions=[1.0, 0.0])  # one chunk, longer than socket buffers
        pair.hook = at_record(1, lambda: pair.cut(1), receiver=0, sender=1, kind=Kind.PIECE)
        await pair.run(begin)
        assert pair.masks[0] == [0b01] * len(pair.masks[0])
        assert not pair.results[0].success
        assert pair.results[0].reason == "nobody else's values arrived"


async def test_a_member_that_cannot_be_reached_is_named_and_left_out() -> None:
    async with swarm(4) as s:
        begin = s.begin()
        s.nodes[3].events.sessions.refuse(ROUND)
        dead = Member(s.nodes[3].own, "127.0.0.1", 1, True, 1.0, 1.0, begin.members[3].fraction, 1)
        begin = Begin(**{f: getattr(begin, f) for f in Begin.__slots__} | {"members": (*begin.members[:3], dead)})
        await s.run(begin, [0, 1, 2])
        s.expect_success(0, 1, 2, contributors=0b0111)
        assert "Connection refused" in s.results[0].missing[3]
        s.expect_nothing_left()


async def test_a_member_that_gives_up_is_not_waited_for() -> None:
    async with swarm(4, 400_000) as s:
        s.hook = at_record(2, lambda: s.sessions[2].cancel("its trainer left"), receiver=2, sender=0, kind=Kind.PIECE)
        begin = s.begin()
        await s.run(begin)
        s.expect_success(0, 1, 3)
        s.expect_means(begin, 0)
        assert not s.results[2].success
        assert s.results[2].reason == "its trainer left"
        assert [node.events.reasons for node in s.nodes] == [[], [], [], []]  # the links serve other rounds
        s.expect_nothing_left()


async def test_a_round_that_is_cancelled_from_outside_lets_everything_go() -> None:
    async with swarm(3, 400_000) as s:
        begin = s.begin()
        s.hook = at_record(1, lambda: s.scopes[2].cancel(), receiver=2, sender=0, kind=Kind.PIECE)
        await s.run(begin)
        s.expect_success(0, 1)
        s.expect_means(begin, 0)
        assert s.results[2].reason == "this daemon is leaving"
        s.expect_nothing_left()


async def test_values_that_cannot_be_averaged_cost_only_whoever_has_them() -> None:
    async with swarm(4) as s:
        begin = s.begin()
        as_array(s.inputs[1], "float32")[:] = np.nan
        await s.run(begin)
        s.expect_success(0, 2, 3, contributors=0b1101)
        assert not s.results[1].success
        assert "own values cannot be averaged" in s.results[1].reason
        s.inputs[1] = values_of(1, s.n_elems, s.dtype)
        s.expect_nothing_left()


async def test_a_member_that_gives_up_before_it_has_links_says_so_and_keeps_nothing() -> None:
    async with swarm(3) as s:
        for other in (0, 2):
            await s.nodes[1].peers.link(s.nodes[other].own, s.nodes[other].endpoint)
        begin = s.begin()
        session = s.join(1, begin)
        session.cancel("this one has had enough")
        assert not session._waiting, "what it wanted to send keeps it, and its memory"
        await s.until_ended(1)
        await s.run(begin, [0, 2])
        s.expect_success(0, 2, contributors=0b101)
        del session
        s.expect_nothing_left()


async def test_a_round_that_nobody_else_begins_ends_in_time(jumping_clock: trio.testing.MockClock) -> None:
    async with swarm(3, 1000) as s:
        for node in s.nodes[1:]:
            node.events.on_begin = lambda begin: None
        await s.run(s.begin(timeout_s=7.0, progress_s=60.0), [0])
        assert not s.results[0].success
        assert trio.current_time() <= 7.5
        s.expect_nothing_left()


async def test_what_is_due_now_is_done_now_and_other_tasks_have_their_turn_in_between(
    jumping_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    due = math.inf
    done: list[float] = []
    turns_before: list[int] = []
    turns = 0

    def on_tick(exchange: Exchange, now: float) -> None:
        nonlocal due
        if due <= now:
            done.append(now)
            turns_before.append(turns)
            due = now if len(done) < 3 else math.inf

    def becomes_due(now: float) -> None:
        nonlocal due
        due = now

    async def take_turns() -> None:
        nonlocal turns
        while len(done) < 3:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with swarm(2, played=[1]) as pair:
        monkeypatch.setattr(Exchange, "wakeup", property(lambda exchange: due))
        monkeypatch.setattr(Exchange, "on_tick", on_tick)
        session = pair.join(0, pair.begin())
        await trio.sleep(5.03)  # between two ticks
        began = trio.current_time()
        session.feed(becomes_due)
        await take_turns()
        assert done == [began] * 3
        assert turns_before[0] < turns_before[2], "trio shuffles whose turn it is, but nobody has two turns in one go"
        session.cancel("that was all")


# -------------------------------------------------------------------------------------------------- who knows the round


async def test_each_member_keeps_its_own_deadline(jumping_clock: trio.testing.MockClock) -> None:
    async with swarm(2, played=[1]) as pair:
        pair.nodes[1].events.may_read.set()
        sessions, begin = pair.nodes[0].events.sessions, pair.begin(timeout_s=60.0)
        pair.nodes[0].events.sessions.begin = lambda *args: Sessions.begin(sessions, *args, trio.current_time() + 5.0)
        began = trio.current_time()
        await pair.run(begin, members=[0])
        assert trio.current_time() - began == pytest.approx(5.0, abs=0.2)
        assert not pair.results[0].success


async def test_whoever_missed_the_beginning_is_told_by_whoever_sends_to_it() -> None:
    async with swarm(4) as s:
        begin = s.begin()
        await s.run(begin, [0, 1, 3])
        await s.until_ended(2)
        s.expect_success(*range(4), contributors=0b1111)
        s.expect_nothing_left()


async def test_whoever_refuses_a_round_says_so_and_nobody_waits() -> None:
    async with swarm(4) as s:
        begin = s.begin()
        s.nodes[2].events.sessions.refuse(ROUND)
        await s.run(begin, [0, 1, 3])
        s.expect_success(0, 1, 3, contributors=0b1011)
        assert all("it left the round " in s.results[i].missing[2] for i in (0, 1, 3))
        assert [node.events.reasons for node in s.nodes] == [[], [], [], []]
        s.expect_nothing_left()


async def test_messages_that_come_before_the_beginning_are_kept_for_it() -> None:
    """Control is faster than data, and BEGIN comes from somebody else."""
    async with swarm(2, 4) as s:
        link = await s.nodes[0].peers.link(s.nodes[1].own, s.nodes[1].endpoint)
        link.send(Scoped(ROUND, EXCHANGE.encode(Few())))
        link.send(Scoped(ROUND, EXCHANGE.encode(Need(0, 0b10))))
        there = s.nodes[1].events
        await there.until(lambda: len(there.messages) == 2)
        await s.nodes[0].events.until(lambda: UnknownRound(ROUND) in s.nodes[0].events.messages)
        await s.run()
        s.expect_success(0, 1, contributors=0b11)
        s.expect_nothing_left()


async def test_a_goodbye_that_comes_before_the_beginning_counts() -> None:
    async with swarm(3) as s:
        begin = s.begin()
        for i in (0, 1):
            link = await s.nodes[2].peers.link(s.nodes[i].own, s.nodes[i].endpoint)
            link.ship(Parcel(b"", kind=Kind.BYE))
            await s.nodes[i].events.until(lambda i=i: [kind for kind, _ in s.nodes[i].events.log].count("header"))
        await s.run(begin, [0, 1])
        s.expect_success(0, 1, contributors=0b011)
        assert s.results[0].missing[2].endswith("it left the round 0.0 s after it began")
        s.expect_nothing_left()


@pytest.mark.parametrize("body", [b"junk", EXCHANGE.encode(Need(0, 1 << 40)), EXCHANGE.encode(Done(5, bytes(8)))])
async def test_a_bad_message_before_the_beginning_costs_its_sender_and_nothing_else(body: bytes) -> None:
    async with swarm(3) as s:
        begin = s.begin()
        link = await s.nodes[2].peers.link(s.nodes[0].own, s.nodes[0].endpoint)
        link.send(Scoped(ROUND, body))
        await s.nodes[0].events.until(lambda: s.nodes[0].events.messages)
        s.nodes[2].events.sessions.refuse(ROUND)
        await s.run(begin, [0, 1])
        s.expect_success(0, 1, contributors=0b011)
        s.expect_nothing_left()


async def test_messages_for_rounds_that_never_begin_do_not_crowd_out_those_of_others() -> None:
    async with swarm(3, 4) as s:
        flooding = await s.nodes[2].peers.link(s.nodes[1].own, s.nodes[1].endpoint)
        there, noticed = s.nodes[1].events, Scoped(ROUND, EXCHANGE.encode(Need(0, 1 << 40)))  # it costs the link
        flooding.send(noticed)
        for i in range(1000):
            flooding.send(Scoped(b"%016d" % i, EXCHANGE.encode(Few())))
        await there.until(lambda: len(there.messages) == 1001)
        link = await s.nodes[0].peers.link(s.nodes[1].own, s.nodes[1].endpoint)
        link.send(noticed)
        await there.until(lambda: len(there.messages) == 1002)
        session = s.join(1, s.begin())
        await there.until(lambda: there.reasons)
        await trio.testing.wait_all_tasks_blocked()
        assert ["members of this round expected" in reason for reason in there.reasons] == [True]
        assert s.nodes[2].events.reasons == []  # its own first message is what it crowded out
        session.cancel("enough")
        await s.until_ended(1)


async def test_what_came_before_the_beginning_is_forgotten_with_its_link() -> None:
    async with swarm(2, 4) as s:
        here, there = s.nodes
        link = await there.peers.link(here.own, here.endpoint)
        link.send(Scoped(ROUND, EXCHANGE.encode(Few())))
        await here.events.until(lambda: here.events.messages)
        ended = weakref.ref(here.peers.links()[0])
        link.close("enough")
        del link
        await here.events.until(lambda: here.events.reasons)
        await trio.testing.wait_all_tasks_blocked()
        gc.collect()
        assert ended() is None


async def test_nothing_follows_from_a_header_before_its_record_is_known_to_be_the_members() -> None:
    """Whoever is on the path can write a header: that must not make a member leave, or us turn one away."""
    async with swarm(3, 4) as s:
        session = s.join(0, s.begin())
        link = await s.nodes[0].peers.link(s.nodes[1].own, s.nodes[1].endpoint)
        sessions = s.nodes[0].events.sessions
        bye = await sessions.landing(link, unpack_header(record(0, kind=Kind.BYE)))
        sessions.refuse(b"n" * 16)
        stray = await sessions.landing(link, unpack_header(record(100, round_id=b"n" * 16)))
        early = await sessions.landing(link, unpack_header(record(0, kind=Kind.BYE, round_id=b"m" * 16)))
        for landing in (bye, stray, early):
            assert landing is not None
            landing.abandon()
        await until_quiet()
        assert session.left == set()
        assert not [what for kind, what in s.nodes[1].events.log if kind == "header" and what.kind is Kind.BYE]
        assert not sessions._held.get(link)
        bye.complete(memoryview(b""))
        early.complete(memoryview(b""))
        assert session.left == {1}
        assert len(sessions._held[link]) == 1
        session.cancel("enough")
        await s.until_ended(0)


async def test_late_records_of_a_round_that_is_over_are_answered_and_forgotten() -> None:
    async with swarm(2, 4) as s:
        await s.run()
        link = s.nodes[0].peers.get(s.nodes[1].own)
        assert link is not None
        n_bytes = len(s.out[1]) // 2
        before = bytes(s.out[1])
        for _ in range(3):
            link.ship(Parcel(b"\xff" * n_bytes, chunk=1))
        link.ship(Parcel(b"", kind=Kind.BYE))
        headers = [what for kind, what in s.nodes[1].events.log if kind == "header"]
        await s.nodes[1].events.until(
            lambda: len([1 for kind, _ in s.nodes[1].events.log if kind == "header"]) >= len(headers) + 4
        )
        assert bytes(s.out[1]) == before
        assert link.up
        s.expect_nothing_left()


async def test_records_of_an_unknown_round_wait_for_a_moment_and_are_dropped(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with swarm(2, 4) as s:
        link = await s.nodes[0].peers.link(s.nodes[1].own, s.nodes[1].endpoint)
        here, there = s.nodes[0].events, s.nodes[1].events
        link.ship(Parcel(b"x" * 100))
        await here.until(lambda: [what for kind, what in here.log if kind == "header" and what.kind is Kind.BYE])
        assert here.messages == [UnknownRound(ROUND)]
        assert there.reasons == []
        assert link.up


# ------------------------------------------------------------------------------------------------------ hostile members


def piece_header(s: Swarm, begin: Begin, **wrong: int) -> bytes:
    """Return the header of a right piece of chunk 0, but for what is `wrong`."""
    chunk = s.plan_of(begin)[0]
    fields = {"codec": 0, "member": chunk.owner, "n_bytes": chunk.n_bytes, "chunk": 0, **wrong}
    return record(fields.pop("n_bytes"), kind=Kind(fields.pop("kind", Kind.PIECE)), round_id=ROUND, **fields)


class Forged(Parcel):
    """Whatever bytes, in place of a record."""

    def __init__(self, head: bytes, payload: bytes = b"") -> None:
        super().__init__(payload)
        self._head = head

    def load(self) -> tuple[bytes, memoryview]:
        return self._head, self._payload


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"chunk": 10_000}, "chunk 10000 of a plan with"),
        ({"member": 2}, "it belongs to member 0"),
        ({"codec": 2}, "codec 2; this run uses raw"),
        ({"n_bytes": 4}, "4 bytes for chunk 0"),
        ({"n_bytes": 5 * MIB}, "bytes for chunk 0"),
        ({"version": 7}, "which I do not write"),
        ({"version": 2**32 - 1}, "version 4294967295"),
        ({"kind": Kind.CHUNK, "contributors": 1}, "which I am still writing"),
        ({"kind": Kind.HELLO, "n_bytes": 0}, "bytes for chunk 0"),
    ],
)
async def test_a_record_outside_the_plan_costs_its_sender_its_link_and_nobody_waits(
    wrong: dict[str, int], reason: str
) -> None:
    """Its body never comes, so it is the header that ends the link: within a round trip, and no limit has to pass."""
    async with swarm(4) as s:
        begin = s.begin()
        s.nodes[3].events.sessions.refuse(ROUND)
        for i in (1, 2):
            await s.nodes[3].peers.link(s.nodes[i].own, s.nodes[i].endpoint)
        link = await s.nodes[3].peers.link(s.nodes[0].own, s.nodes[0].endpoint)
        link.ship(Forged(piece_header(s, begin, **wrong)))
        await s.run(begin, [0, 1, 2])
        s.expect_success(0, 1, 2, contributors=0b0111)
        assert any(reason in why for why in s.nodes[0].events.reasons)
        assert reason in s.results[0].missing[3]
        s.expect_nothing_left()


async def test_a_decompression_bomb_costs_its_sender_its_link_and_nobody_waits() -> None:
    async with swarm(4, codec="zstd") as s:
        begin = s.begin()
        s.nodes[3].events.sessions.refuse(ROUND)
        for i in (1, 2):
            await s.nodes[3].peers.link(s.nodes[i].own, s.nodes[i].endpoint)
        link = await s.nodes[3].peers.link(s.nodes[0].own, s.nodes[0].endpoint)
        bomb = zstandard.compress(bytes(64 * MIB))
        link.ship(Forged(piece_header(s, begin, codec=2, n_bytes=len(bomb)), bomb))
        await s.run(begin, [0, 1, 2])
        s.expect_success(0, 1, 2, contributors=0b0111)
        await s.nodes[0].events.until(lambda: s.nodes[0].events.reasons)
        (reason,) = s.nodes[0].events.reasons
        assert re.search("zstd|frame", reason)
        assert reason in s.results[0].missing[3]
        s.expect_nothing_left()


async def test_a_result_that_is_not_finite_costs_its_sender_and_the_chunk_is_had_elsewhere() -> None:
    async with swarm(4) as s:
        begin = s.begin()

        def spoil() -> None:
            vault = s.sessions[1].vault
            for chunk in vault.chunks:
                if chunk.owner == 1:
                    as_array(vault.slot_view(chunk.index), "float32")[:] = np.inf

        s.hook = at_record(1, spoil, receiver=0, sender=1, kind=Kind.CHUNK)
        await s.run(begin)
        s.expect_success(0, 2, 3)
        s.expect_means(begin, 0)


async def test_a_message_that_no_member_may_send_costs_its_sender_and_nobody_waits() -> None:
    async with swarm(4) as s:
        begin = s.begin()
        s.nodes[3].events.sessions.refuse(ROUND)
        link = await s.nodes[3].peers.link(s.nodes[0].own, s.nodes[0].endpoint)
        session = s.join(0, begin)
        link.send(Scoped(ROUND, EXCHANGE.encode(Need(0, 1 << 50))))
        await s.nodes[0].events.until(lambda: s.nodes[0].events.reasons)
        assert 3 in session.left
        del session
        await s.run(begin, [0, 1, 2])
        s.expect_success(0, 1, 2, contributors=0b0111)
        s.expect_nothing_left()


async def test_strangers_have_no_say_in_a_round() -> None:
    """Somebody who is linked but no member sends pieces, results, goodbyes and messages."""
    async with swarm(3) as s:
        begin = s.begin()
        stranger = await start_node(s.nursery, 9, Recorder())
        plan = s.plan_of(begin)
        for i in range(3):
            link = await stranger.peers.link(s.nodes[i].own, s.nodes[i].endpoint)
            s.join(i, begin)
            for kind in (Kind.PIECE, Kind.CHUNK):
                link.ship(Forged(record(0, kind=kind, round_id=ROUND, chunk=0, member=plan[0].owner)))
            link.ship(Parcel(b"", kind=Kind.BYE))
            link.send(Scoped(ROUND, EXCHANGE.encode(Commit(3, ()))))
            link.send(UnknownRound(ROUND))
        await s.until_ended(0, 1, 2)
        s.expect_success(0, 1, 2, contributors=0b111)
        assert s.out[0] == mean_of(0b111, s.n_elems, s.dtype, s.codec)
        assert not any(isinstance(message, Begin) for message in stranger.events.messages)
        s.expect_nothing_left()


@pytest.mark.parametrize("progress_s", [1e-9, 3600.0])
async def test_a_leader_cannot_make_links_end_at_once_or_never(progress_s: float) -> None:
    async with swarm(3) as s:
        await s.run(s.begin(progress_s=progress_s))
        s.expect_success(0, 1, 2, contributors=0b111)
        for node in s.nodes:
            assert node.events.reasons == []
            assert all(PROGRESS.floor_s <= link.patience_s <= PROGRESS.cap_s for link in node.peers.links())


async def test_a_link_may_have_more_patience_than_the_round() -> None:
    async with swarm(3) as s:
        begin, joined = s.begin(progress_s=2.0), Sessions.begin
        patience = {s.nodes[1].own: 7.0, s.nodes[2].own: 0.5}
        s.nodes[0].events.sessions.begin = functools.partial(joined, s.nodes[0].events.sessions, patience=patience)
        await s.run(begin)
        links = {link.peer: link.patience_s for link in s.nodes[0].peers.links()}
        assert links == {s.nodes[1].own: 7.0, s.nodes[2].own: 2.0}


async def test_a_round_reports_how_its_members_delivered() -> None:
    async with swarm(3) as s:
        begin = s.begin(weights=[1.0, 1.0, 0.0])
        session = s.join(0, begin)
        await s.run(begin)
        chunks_of_0 = [chunk for chunk in s.plan_of(begin) if chunk.owner == 0]
        reports = session.reports()
        assert set(reports) == {s.nodes[1].own}  # the other one owes no pieces
        report = reports[s.nodes[1].own]
        assert (report.n_done, report.n_owed, report.n_members) == (len(chunks_of_0), len(chunks_of_0), 3)
        assert report.owed_bytes == sum(chunk.n_bytes for chunk in chunks_of_0)
        assert 0 < report.pause_s <= report.seconds <= session.result().seconds
        assert report.upload > 0


# --------------------------------------------------------------------------------------------------------------- memory


BIG = 4 * MIB  # four chunks of this do not fit into the buffers of a connection that nobody reads


def big_result(version: int, chunk: int, value: float) -> tuple[bytes, bytes]:
    """Return header and payload of a chunk of BIG bytes that member 1 owns."""
    head = record(BIG, chunk, Kind.CHUNK, version=version, member=1, contributors=0b011)
    return head, np.full(BIG // 4, value, np.float32).tobytes()


@contextlib.asynccontextmanager
async def played_round(n: int, n_chunks: int, sealed: bool = False) -> AsyncIterator[tuple[Swarm, list[Link]]]:
    """Let member 0 be in a round in which the test plays the others; yield also their links to it.

    Member 1 owns all chunks. Records travel in the clear, so that half of one can be sent, unless they are `sealed`.
    """
    async with swarm(n, n_chunks * BIG // 4, played=range(1, n), sealed=sealed) as s:
        links = [await s.nodes[i].peers.link(s.nodes[0].own, s.nodes[0].endpoint) for i in range(1, n)]
        session = s.join(0, s.begin(chunk_bytes=BIG, fractions=[0.0, 1.0, 0.0][:n]))
        yield s, links
        session.cancel("enough")
        await s.until_ended(0)


async def until_quiet() -> None:
    """Give everybody time to do what should not happen, too."""
    await trio.testing.wait_all_tasks_blocked(0.02)


async def until(holds: Callable[[], object]) -> None:
    while not holds():
        await trio.testing.wait_all_tasks_blocked(0.001)


async def test_results_are_received_straight_into_their_place() -> None:
    async with played_round(2, 1) as (s, (link,)):
        head, first = big_result(0, 0, 1.0)
        link.ship(Forged(head, first[: BIG // 2]))
        await until(lambda: s.out[0][: BIG // 2] == first[: BIG // 2])
        link.ship(Forged(b"", first[BIG // 2 :]))
        await until(lambda: s.out[0] == first)


async def test_a_sealed_result_is_not_in_its_place_before_it_has_opened() -> None:
    async with played_round(2, 1, sealed=True) as (s, (link,)):
        machine = s.sessions[0].exchange
        before, (head, payload) = bytes(s.out[0]), big_result(0, 0, 1.0)
        seen: list[bool] = []
        s.hook = lambda receiver, sender, header: seen.append(bytes(s.out[0]) == before)
        link.ship(Forged(head, payload))
        await until(lambda: s.traffic(0, 1)[1] > BIG // 2)
        seen.append(machine.holds(0, 0) or bytes(s.out[0]) == before)
        await until(lambda: machine.holds(0, 0))
        assert all(seen)
        assert len(seen) == 2
        assert s.out[0] == payload


async def test_a_result_that_is_held_is_touched_by_no_other_whether_it_opens_or_not() -> None:
    """Deciphering writes before it knows whether the record is genuine."""
    async with played_round(2, 2, sealed=True) as (s, (link,)):
        machine, here = s.sessions[0].exchange, s.nodes[0].events
        head, first = big_result(0, 0, 1.0)
        link.ship(Forged(head, first))
        await until(lambda: machine.holds(0, 0))
        link.ship(Forged(head, big_result(0, 0, 2.0)[1]))
        link.ship(Forged(record(0, round_id=b"n" * 16)))  # behind it, to know when it has come
        here.sessions.refuse(b"n" * 16)
        await here.until(lambda: [what for kind, what in here.log if kind == "header" and what.round_id == b"n" * 16])
        assert s.out[0][:BIG] == first
        await inject(link, head + bytes(BIG + TAG_BYTES))
        end = s.nodes[0].peers.get(s.nodes[1].own)
        assert end is not None
        await until(lambda: end.bad_records)
        assert s.out[0][:BIG] == first
        assert end.up


async def inject(link: Link, forged: bytes) -> None:
    """Put bytes on the data connection of an idle link, as somebody on the path can."""
    assert link._channel is not None
    sock, rest = link._channel._sock, memoryview(forged)
    while rest:
        try:
            rest = rest[sock.send(rest) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


async def test_a_newer_version_does_not_touch_the_one_that_is_held_until_it_is_whole() -> None:
    """Others may still want the older one, and a plan may go back to it."""
    async with played_round(3, 2) as (s, (link, _)):
        machine, here = s.sessions[0].exchange, s.nodes[0].events
        link.ship(Forged(*big_result(0, 0, 1.0)))
        await until(lambda: machine.holds(0, 0))
        first = bytes(s.out[0][:BIG])
        new_plan = Scoped(ROUND, EXCHANGE.encode(NewPlan(1, 0b011, ((0, 1, 1),), ())))
        link.send(new_plan)
        await here.until(lambda: new_plan in here.messages)
        head, second = big_result(1, 0, 2.0)
        link.ship(Forged(head, second[: BIG // 2]))
        n_bytes = len(head) + BIG // 2
        await until(lambda: s.traffic(0, 1)[1] == len(head) + BIG + n_bytes)
        assert s.out[0][:BIG] == first
        link.ship(Forged(b"", second[BIG // 2 :]))
        await until(lambda: machine.holds(0, 1))
        assert s.out[0][:BIG] == second


async def test_of_two_results_under_way_the_first_that_is_whole_counts() -> None:
    async with played_round(3, 2) as (s, (slow, quick)):
        machine = s.sessions[0].exchange
        head, first = big_result(0, 0, 1.0)
        slow.ship(Forged(head, first[: BIG // 2]))
        await until(lambda: s.out[0][: BIG // 2] == first[: BIG // 2])
        quick.ship(Forged(*big_result(0, 0, 2.0)))
        await until(lambda: machine.holds(0, 0))
        slow.ship(Forged(b"", first[BIG // 2 :]))
        await until(lambda: s.traffic(0, 1)[1] == len(head) + BIG)
        await until_quiet()
        assert s.out[0][:BIG] == big_result(0, 0, 2.0)[1]


async def test_a_result_that_is_being_sent_is_sent_to_its_end_although_a_newer_one_replaces_it() -> None:
    n_chunks = 5
    async with played_round(3, n_chunks + 1) as (s, (link, reader)):
        machine = s.sessions[0].exchange
        for chunk in range(n_chunks):
            link.ship(Forged(*big_result(0, chunk, 1.0)))
        await until(lambda: all(machine.holds(chunk, 0) for chunk in range(n_chunks)))
        reader.send(Scoped(ROUND, EXCHANGE.encode(Want(0, tuple((chunk, 0) for chunk in range(n_chunks))))))
        await until(lambda: s.traffic(0, 2)[0])
        await until_quiet()
        changes = tuple((chunk, 1, 1) for chunk in range(n_chunks))
        new_plan = Scoped(ROUND, EXCHANGE.encode(NewPlan(1, 0b011, changes, ())))
        link.send(new_plan)
        await s.nodes[0].events.until(lambda: new_plan in s.nodes[0].events.messages)
        for chunk in range(n_chunks):
            link.ship(Forged(*big_result(1, chunk, 2.0)))
        await until(lambda: all(machine.holds(chunk, 1) for chunk in range(n_chunks)))
        received = s.nodes[2].events
        received.may_read.set()
        await received.until(lambda: received.records)
        await until_quiet()
        assert len(received.records) < n_chunks
        for header, payload in received.records:
            assert header.version == 0
            assert payload == big_result(0, header.chunk, 1.0)[1]


async def test_a_piece_that_is_being_sent_is_sent_to_its_end_although_the_inputs_change() -> None:
    """A member of a group of two succeeds as soon as it holds everything, whatever the other has read."""
    n_chunks = 5
    async with played_round(2, n_chunks) as (s, (link,)):
        session, before = s.sessions[0], bytes(s.inputs[0])
        await until(lambda: s.traffic(0, 1)[0])
        await until_quiet()
        for chunk in range(n_chunks):
            link.ship(Forged(*big_result(0, chunk, 1.0)))
        await session.finished.wait()
        assert session.result().success
        s.inputs[0][:] = bytes(len(before))
        received = s.nodes[1].events
        received.may_read.set()
        await received.until(lambda: received.records)
        await until_quiet()
        pieces = [(header, payload) for header, payload in received.records if header.kind is Kind.PIECE]
        assert 0 < len(pieces) < n_chunks
        for header, payload in pieces:
            assert payload == before[header.chunk * BIG : (header.chunk + 1) * BIG]


async def test_the_memory_of_a_round_is_free_for_the_next_as_soon_as_it_is_finished() -> None:
    """Whoever succeeds may change its inputs, and a round that lingers can be ended to have its results changed."""
    async with swarm(3, 400_000) as s:
        begin = s.begin()

        async def spoil(i: int) -> None:
            session = s.join(i, begin)
            await session.finished.wait()
            result = session.result()
            assert result.success
            s.inputs[i][:] = b"\xff" * len(s.inputs[i])
            kept.append(bytes(s.out[i]))
            session.cancel("the memory is needed")
            s.out[i][:] = b"\xff" * len(s.out[i])

        kept: list[bytes] = []
        async with trio.open_nursery() as nursery:
            for i in range(3):
                nursery.start_soon(spoil, i)
        await s.until_ended(0, 1, 2)
        assert kept == [bytes(mean_of(0b111, s.n_elems, s.dtype, s.codec))] * 3


# ------------------------------------------------------------------------------------------------------------- our bugs


@pytest.mark.parametrize("method", ["add", "close", "store"])
async def test_a_bug_in_a_round_ends_it_for_this_member_and_keeps_its_links(
    method: str, bugs: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails honestly, the others go on without it, and the next round of the same links is fine."""
    async with swarm(4) as s:
        begin = s.begin()
        broken = s.join(3, begin).vault
        monkeypatch.setattr(broken, method, lambda *args: 1 / 0)
        await s.run(begin)
        assert not s.results[3].success
        assert "unexpected error" in s.results[3].reason
        assert set(bugs) == {"round"}
        s.expect_success(0, 1, 2)
        s.expect_means(begin, 0)
        assert all(link.up for node in s.nodes for link in node.peers.links())
        assert not any(status.rounds for node in s.nodes for status in node.peers.snapshot())


async def test_a_bug_that_comes_again_and_again_ends_a_round_too(
    bugs: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for the round hears that it is over, whatever else cannot be done."""
    async with swarm(3) as s:
        begin = s.begin()
        session = s.join(2, begin)
        monkeypatch.setattr(session, "_perform", lambda: 1 / 0)
        await s.run(begin)
        assert session.finished.is_set()
        assert session.gone.is_set()
        assert not s.results[2].success
        s.expect_success(0, 1)
