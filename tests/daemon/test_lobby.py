"""Lobbies of many daemons in one process: how they find each other, settle a grid, and move on it together."""

import contextlib
import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import trio
from daemon_helpers import checkpoints
from fake_peers import FakeDaemon, Swarm, specs, terms
from trio.testing import MockClock

from mpd.config import RoundLimits
from mpd.daemon.lobby import Lobby
from mpd.daemon.rendezvous import MemoryBoard
from mpd.daemon.runs import Switchboard
from mpd.daemon.state_desk import StateDesk
from mpd.deadlines import MIN_SAMPLES, PROGRESS, WINDOW
from mpd.elastic import CycleCount
from mpd.errors import PeerError
from mpd.grid import Cell, axis_of, line_of, on_grid, slot, table
from mpd.ids import PeerId, show_peer
from mpd.layout import Terms
from mpd.mass import Shares, Standing, after, certificate, enter
from mpd.matchmaking import Alone, Begun
from mpd.messages import MAX_ROUND_S, Begin, Declined, Goodbye, Here, Join, Quit, RunTerms
from mpd.records import RECORDS, Place

pytestmark = pytest.mark.usefixtures("repeatable")

WINDOW_S = RoundLimits().window_s
RUN = "run"


class OneRun:
    """What the switchboard needs to know of runs: here there is one."""

    def __init__(self, lobby: Lobby) -> None:
        self._lobby = lobby
        self.desk = StateDesk(trio.sleep_forever)
        self.is_over = False

    def of_name(self, name: str) -> Lobby | None:
        return self._lobby if name == self._lobby.run and not self.is_over else None

    def of_slot(self, slot: bytes) -> Lobby | None:
        return self._lobby if self._lobby.stands_in(slot) and not self.is_over else None

    def forget(self, peer: PeerId, slot: bytes) -> None:
        self._lobby.forget(peer, slot)

    def on_gone(self, peer: PeerId, reason: str) -> None:
        self._lobby.on_gone(peer, reason)


@dataclass
class Member:
    """A daemon with one lobby that is being served."""

    swarm: Swarm
    daemon: FakeDaemon
    lobby: Lobby
    scope: trio.CancelScope
    run: OneRun

    @property
    def own(self) -> PeerId:
        return self.daemon.own

    async def ask(self, timeout_s: float = 60.0) -> Begun | Alone:
        """Do what a step does first."""
        return await self.lobby.form(lambda cell: enter(1.0, cell), trio.current_time() + timeout_s)

    def detach(self) -> None:
        """The last trainer of the run leaves, the daemon stays."""
        self.run.is_over = True
        self.scope.cancel()

    async def leave(self) -> None:
        """The daemon leaves with a goodbye; its records stay, as if the rendezvous were slow."""
        for link in self.daemon.peers.links():
            link.send(Goodbye("enough"))
        await sleep(0.05)
        self.die()

    def die(self, *, silently: bool = False) -> None:
        """The process is gone; its records stay for their time to live."""
        self.swarm.hub.kill(self.own, silently=silently)
        self.daemon.rendezvous.die()
        self.scope.cancel()


def attach(swarm: Swarm, run_terms: Terms | None = None, *, inbound: bool = True) -> Member:
    daemon = swarm.daemon(inbound=inbound)
    lobby = Lobby(RUN, run_terms or terms(), daemon.services)
    run = OneRun(lobby)
    daemon.switchboard.runs = run  # type: ignore[assignment]
    scope = trio.CancelScope()

    async def serve() -> None:
        with scope, contextlib.suppress(ExceptionGroup):  # a dead rendezvous refuses everything
            await lobby.serve()

    swarm.nursery.start_soon(serve)
    return Member(swarm, daemon, lobby, scope, run)


async def settled(swarm: Swarm, n: int, run_terms: Terms | None = None) -> list[Member]:
    """Return `n` members whose run has its shape, and who all know each other."""
    members = [attach(swarm, run_terms) for _ in range(n)]
    await sleep(2.5)
    assert len({member.lobby.record for member in members} - {None}) == 1
    return members


async def sleep(seconds: float) -> None:
    await trio.sleep_until(trio.current_time() + seconds)


async def all_ask(members: list[Member], timeout_s: float = 60.0) -> list[Begun | Alone]:
    verdicts: dict[int, Begun | Alone] = {}

    async def ask(index: int) -> None:
        verdicts[index] = await members[index].ask(timeout_s)

    async with trio.open_nursery() as nursery:
        for index in range(len(members)):
            nursery.start_soon(ask, index)
    return [verdicts[index] for index in range(len(members))]


def group(verdict: Begun | Alone) -> set[PeerId]:
    assert isinstance(verdict, Begun), verdict
    return {PeerId(member.peer) for member in verdict.begin.members}


def ids(members: list[Member]) -> set[PeerId]:
    return {member.own for member in members}


# ---------------------------------------------------------------------------------------------------------- cold start


async def test_members_that_only_their_leader_had_met_keep_each_other_company(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    members = await settled(Swarm(nursery), 4)
    for member in members:
        post = member.lobby._post
        assert post is not None
        post.company = {min(ids(members))} - {member.own}
    assert [group(verdict) for verdict in await all_ask(members)] == [ids(members)] * 4
    for member in members:
        assert set(member.lobby.company) == ids(members) - {member.own}


@pytest.mark.parametrize("group_size", [3, 16])
@pytest.mark.parametrize("n", range(2, 13))
async def test_a_cold_start_settles_one_shape_and_the_first_groups_are_full(
    n: int, group_size: int, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    rng = random.Random(100 * n + group_size)
    swarm = Swarm(nursery, delay_s=lambda: rng.uniform(0.001, 0.05), look_up_s=lambda: rng.uniform(0.01, 0.2))
    members: list[Member] = []
    verdicts: dict[PeerId, Begun | Alone] = {}

    async def come_and_ask(after_s: float) -> None:
        await sleep(after_s)
        members.append(attach(swarm, terms(group_size)))
        me = members[-1]
        verdicts[me.own] = await me.ask()

    began = trio.current_time()
    async with trio.open_nursery() as trainers:
        for _ in range(n):
            trainers.start_soon(come_and_ask, rng.uniform(0, 0.7))
    assert trio.current_time() - began < 5.0
    (record,) = {member.lobby.record for member in members}
    assert record is not None
    assert record.n_peers == n
    assert (len(record.shape) == 1) == (n <= group_size + 2)
    cells = Counter(member.lobby.last_cell for member in members)
    assert all(on_grid(cell, record.shape) for cell in cells)
    assert len(cells) == math.prod(record.shape)
    for member in members:
        axis = axis_of(0, record.shape)
        line = line_of(member.lobby.last_cell, axis)
        mates = {other.own for other in members if line_of(other.lobby.last_cell, axis) == line}
        assert group(verdicts[member.own]) == mates


async def test_who_comes_while_the_roster_is_not_quiet_is_in_the_record(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    members = []
    for _ in range(5):
        members.append(attach(swarm))
        await sleep(0.8)
    await sleep(2)
    assert {member.lobby.record.n_peers for member in members if member.lobby.record} == {5}


async def test_the_shape_outlives_the_peer_that_wrote_it(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 5)
    members[0].die()
    await sleep(100)
    late = attach(swarm)
    await sleep(3)
    assert late.lobby.record == members[1].lobby.record
    assert group((await all_ask([*members[1:], late]))[-1]) == ids([*members[1:], late])


async def test_a_lone_lobby_gives_up_after_one_window_and_then_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    lone = attach(swarm)
    began = trio.current_time()
    first = await lone.ask()
    assert first == Alone("nobody else has announced this run", {})
    assert trio.current_time() - began == pytest.approx(WINDOW_S, abs=0.2)
    began = trio.current_time()
    assert await lone.ask() == first
    assert trio.current_time() - began < 0.01


async def test_company_that_comes_later_is_noticed_by_a_lone_lobby(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    lone = attach(swarm)
    await lone.ask()
    await lone.ask()
    other = attach(swarm)
    await sleep(3)
    began = trio.current_time()
    assert [group(verdict) for verdict in await all_ask([lone, other])] == [ids([lone, other])] * 2
    assert trio.current_time() - began < 1.5


async def test_a_deserted_member_of_a_run_with_a_shape_waits_once_and_meets_the_next_newcomer(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    lone, other = await settled(swarm, 2)
    other.die()
    began = trio.current_time()
    assert isinstance(await lone.ask(), Alone)
    assert trio.current_time() - began == pytest.approx(WINDOW_S, abs=0.2)
    began = trio.current_time()
    assert isinstance(await lone.ask(), Alone)
    assert trio.current_time() - began < 0.01
    late = attach(swarm)
    await sleep(3)
    assert [group(verdict) for verdict in await all_ask([lone, late])] == [ids([lone, late])] * 2


async def test_a_step_that_is_too_short_for_a_shape_says_so(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    one, other = attach(swarm), attach(swarm)
    verdict = await one.ask(timeout_s=0.5)
    assert isinstance(verdict, Alone)
    assert "have not agreed on its shape yet" in verdict.reason
    assert other.own in verdict.missing


# -------------------------------------------------------------------------------------------------------- late joiners


@pytest.mark.parametrize("rounds", [1, "exact"])
@pytest.mark.parametrize(("n", "group_size"), [(4, 16), (9, 3)])
async def test_a_late_joiner_is_in_a_group_within_two_rounds(
    n: int, group_size: int, rounds: int | str, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    rng = random.Random(n)
    swarm = Swarm(nursery, delay_s=lambda: rng.uniform(0.001, 0.02), look_up_s=lambda: rng.uniform(0.01, 0.1))
    run_terms = terms(group_size, rounds)
    members = await settled(swarm, n, run_terms)
    assert all(isinstance(verdict, Begun) for verdict in await all_ask(members))
    late = attach(swarm, run_terms)
    await sleep(2)
    d = len(late.lobby.shape)
    assert d == (1 if group_size == 16 else 2)
    for _ in range(2):
        if rounds == "exact":
            late.lobby.start_cycle()
            while members[0].lobby.number < late.lobby.number:
                await all_ask(members)
        verdicts = await all_ask([*members, late])
        if isinstance(verdicts[-1], Begun):
            break
    assert len(group(verdicts[-1])) > 1
    assert group(verdicts[-1]) <= ids([*members, late])


@pytest.mark.parametrize("rounds", [1, "exact"])
async def test_a_peer_whose_trainer_paused_finds_its_line_again(
    rounds: int | str, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 9, terms(3, rounds))
    paused, going = members[0], members[1:]
    await fall_behind(paused, going)
    await sleep(15)  # it looks who is there even while its trainer asks for nothing
    if rounds == "exact":
        for member in members:
            member.lobby.start_cycle()
    began = trio.current_time()
    verdicts = await all_ask(members)
    assert isinstance(verdicts[0], Begun)
    assert trio.current_time() - began < WINDOW_S


async def test_a_window_is_learnt_and_a_peer_whose_trainer_pauses_costs_no_more_than_that(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    members = await settled(Swarm(nursery), 3)
    *asking, pausing = members
    waited_s = []
    for n_known in range(MIN_SAMPLES + 1):
        began = trio.current_time()
        assert group((await all_ask(asking))[0]) == ids(asking)
        waited_s.append(trio.current_time() - began)
        for member in members if n_known else ():
            assert not any(link.awaited for link in member.daemon.peers.links())
        assert all(group(verdict) == ids(members) for verdict in await all_ask(members))
    assert waited_s[0] == pytest.approx(WINDOW.first_s, abs=0.1)
    assert waited_s[-1] == pytest.approx(WINDOW.floor_s, abs=0.1)
    assert min(member.lobby.pace.window_s([pausing.own]) for member in asking) == WINDOW.floor_s


async def test_links_are_watched_while_a_group_forms(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    first, *others = await settled(Swarm(nursery), 3)
    nursery.start_soon(first.ask)
    await sleep(0.3)
    links = first.daemon.peers.links()
    assert [(link.awaited, link.patience_s) for link in links] == [(1, PROGRESS.first_s)] * 2
    await all_ask(others)
    await sleep(0.3)
    assert [link.awaited for link in links] == [0, 0]


@pytest.mark.parametrize("rounds", [1, "exact"])
async def test_a_step_that_begins_behind_its_line_catches_up_with_it(
    rounds: int | str, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 9, terms(3, rounds))
    paused, going = members[0], members[1:]
    await fall_behind(paused, going)
    began = trio.current_time()
    verdicts = await all_ask(members)
    assert isinstance(verdicts[0], Begun)
    assert trio.current_time() - began < WINDOW_S
    assert {member.lobby.number for member in members} == {paused.lobby.number}


async def test_a_single_record_from_a_later_round_does_not_tear_a_line_apart(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 9, terms(3))
    lobby = members[0].lobby
    assert lobby._post is not None
    assert lobby.company
    ahead = Place("192.0.2.9", 9, lobby.terms.digest, lobby.number + 2, lobby.cell)
    await swarm.daemon().rendezvous.announce(lobby._post.slot, RECORDS.encode(ahead), 3600)
    await sleep(12)
    assert lobby.number == 0
    assert all(isinstance(verdict, Begun) for verdict in await all_ask(members))


async def test_who_is_a_little_ahead_waits_and_who_is_far_ahead_comes_back(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 9, terms(3))
    await all_ask(members)
    early = members[0].lobby
    for number, then in ((2, 2), (42, 1)):
        early.number = number - 1
        early.start_cycle()
        await sleep(1)
        assert isinstance(await members[0].ask(), Alone)
        assert early.number == then


async def fall_behind(paused: Member, going: list[Member]) -> None:
    while any(member.lobby.number < paused.lobby.number + 2 for member in going):
        await all_ask(going)


# ------------------------------------------------------------------------------------------------- a network that parts


Notes = list[tuple[float, set[PeerId]]]  # when a group began, and who was in it
MERGED_S = 13.0  # a call that was made just before the network was whole again has to fail first


async def step_for_ever(member: Member, pause_s: float, met: Notes) -> None:
    """Do one step after the other, with rounds of `pause_s`; note who was in each, and when it began."""
    is_exact = member.lobby.terms.rounds == "exact"
    while True:
        if is_exact:
            await member.lobby.begin_cycle(trio.current_time() + 20.0)
        for _ in range(max(1, len(member.lobby.shape)) if is_exact else 1):
            verdict = await member.ask(20.0)
            if isinstance(verdict, Begun):
                met.append((trio.current_time(), group(verdict)))
            await sleep(pause_s)


@pytest.mark.parametrize(("n", "group_size", "n_left"), [(6, 16, 2), (6, 16, 1), (10, 4, 5), (12, 4, 2)])
async def test_each_side_goes_on_alone_and_both_together_once_they_can(
    n: int, group_size: int, n_left: int, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    rng = random.Random(n)
    swarm = Swarm(nursery, delay_s=lambda: rng.uniform(0.001, 0.02), look_up_s=lambda: rng.uniform(0.01, 0.1))
    members = await settled(swarm, n, terms(group_size))
    met: list[Notes] = [[] for _ in members]
    for i, (member, notes) in enumerate(zip(members, met, strict=True)):
        nursery.start_soon(step_for_ever, member, 0.3 if i < n_left else 0.7, notes)  # one side gets far ahead
    await sleep(10)
    sides = ids(members[:n_left]), ids(members[n_left:])
    swarm.hub.part(*sides)
    parted = trio.current_time()
    await sleep(20)
    swarm.hub.heal()
    healed = trio.current_time()
    for i, notes in enumerate(met):
        during = [who for when, who in notes if parted < when < healed]
        assert all(who <= sides[i >= n_left] for who in during)
        if len(sides[i >= n_left]) > 1 and len(members[0].lobby.shape) == 1:
            assert min(when for when, _ in notes if when > parted) < parted + 2 * WINDOW_S
    await sleep(20)
    assert max(met_across(met, sides, healed)) < healed + MERGED_S
    sizes = {len(who) for notes in met for when, who in notes if when > healed + MERGED_S + 2}
    if len(members[0].lobby.shape) == 1:
        assert sizes == {n}
    nursery.cancel_scope.cancel()


def met_across(met: list[Notes], sides: tuple[set[PeerId], set[PeerId]], healed: float) -> list[float]:
    """Return when each member of the smaller side first met somebody from the other one again."""
    n_smaller = min(map(len, sides))
    smaller = met[:n_smaller] if len(sides[0]) == n_smaller else met[-n_smaller:]
    return [
        min(when for when, who in notes if when > healed and who & sides[0] and who & sides[1]) for notes in smaller
    ]


@pytest.mark.parametrize(
    ("n", "n_left", "group_size", "rounds"), [(4, 2, 16, 1), (12, 5, 2, 1), (12, 4, 4, 1), (12, 5, 2, "exact")]
)
async def test_two_halves_that_began_apart_settle_on_one_shape_when_they_meet(
    n: int, n_left: int, group_size: int, rounds: int | str, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    rng = random.Random(n)
    swarm = Swarm(nursery, delay_s=lambda: rng.uniform(0.001, 0.02), look_up_s=lambda: rng.uniform(0.01, 0.1))
    left = [attach(swarm, terms(group_size, rounds)) for _ in range(n_left)]
    board, swarm.board = swarm.board, MemoryBoard(trio.current_time)
    right = [attach(swarm, terms(group_size, rounds)) for _ in range(n - n_left)]
    sides, members = (ids(left), ids(right)), [*left, *right]
    swarm.hub.part(*sides)
    met: list[Notes] = [[] for _ in members]
    await sleep(3)
    for member, notes in zip(members, met, strict=True):
        nursery.start_soon(step_for_ever, member, 0.3 if member in left else 0.7, notes)
    await sleep(20)
    assert [len({member.lobby.record for member in side} - {None}) for side in (left, right)] == [1, 1]
    healed = trio.current_time()
    swarm.hub.heal()
    board.members += swarm.board.members
    swarm.board.members = board.members
    await sleep(20)
    assert all(who <= sides[0] or who <= sides[1] for notes in met for when, who in notes if when < healed)
    if rounds == 1:  # an exact step goes over when its cycle is over, and that may have waited for whoever has gone
        assert max(met_across(met, sides, healed)) < healed + MERGED_S
    await sleep(WINDOW_S)
    records = {member.lobby.record for member in members}
    assert len(records) == 1 or len(members[0].lobby.shape) == 1  # on a single line any will do
    assert {record.n_peers for record in records if record is not None} == {max(n_left, n - n_left)}
    nursery.cancel_scope.cancel()


# ------------------------------------------------------------------------------------------------------- who has gone


@pytest.mark.parametrize("silently", [False, True])
@pytest.mark.parametrize(("n", "group_size"), [(4, 16), (9, 3)])
async def test_a_dead_peer_is_out_of_the_next_group_at_once(
    n: int, group_size: int, silently: bool, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, n, terms(group_size))
    await all_ask(members)
    members[-1].die(silently=silently)
    survivors = members[:-1]
    for _ in range(8):  # also when the dead peer's record is looked at again
        began = trio.current_time()
        verdicts = await all_ask(survivors)
        assert all(isinstance(verdict, Begun) for verdict in verdicts)
        assert all(members[-1].own not in group(verdict) for verdict in verdicts)
        assert trio.current_time() - began <= 1.6
        await sleep(5)


async def test_a_line_waits_once_for_a_frozen_peer_and_takes_it_back_when_it_thaws(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = await settled(Swarm(nursery), 4)
    await all_ask(members)
    frozen, others = members[-1], members[:-1]
    kept: list[tuple[Any, Any]] = []
    with monkeypatch.context() as patch:
        patch.setattr(frozen.lobby, "on_message", lambda link, message: kept.append((link, message)))
        durations = []
        for _ in range(4):
            began = trio.current_time()
            assert all(group(verdict) == ids(others) for verdict in await all_ask(others))
            durations.append(trio.current_time() - began)
    assert durations[0] == pytest.approx(WINDOW_S, abs=0.5)
    assert max(durations[1:]) < 0.5
    for link, message in kept:
        frozen.lobby.on_message(link, message)
    assert all(group(verdict) == ids(members) for verdict in await all_ask(members))


@pytest.mark.parametrize(("n", "group_size"), [(4, 16), (9, 3)])
async def test_a_peer_that_said_goodbye_is_out_of_the_next_group_at_once(
    n: int, group_size: int, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, n, terms(group_size))
    await all_ask(members)
    await members[-1].leave()
    began = trio.current_time()
    verdicts = await all_ask(members[:-1])
    assert all(isinstance(verdict, Begun) and members[-1].own not in group(verdict) for verdict in verdicts)
    assert trio.current_time() - began <= 1.6


async def test_a_peer_that_left_is_named_with_its_own_reason(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    stays, leaves = await settled(swarm, 2)
    await all_ask([stays, leaves])
    await leaves.leave()
    verdict = await stays.ask()
    assert isinstance(verdict, Alone)
    assert verdict.missing == {leaves.own: "left: enough"}


async def test_absences_are_not_told_for_ever(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    stays, leaves = await settled(swarm, 2)
    await leaves.leave()
    await sleep(120)
    first = await stays.ask()
    assert isinstance(first, Alone)
    assert leaves.own in first.missing  # news since the last step
    assert await stays.ask() == Alone("nobody else has announced this run", {})


@pytest.mark.parametrize(("n", "group_size"), [(4, 16), (9, 3)])
async def test_nobody_waits_for_a_daemon_whose_last_trainer_has_left(
    n: int, group_size: int, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, n, terms(group_size))
    await all_ask(members)
    members[-1].detach()
    await sleep(0.1)
    assert all(members[-1].own not in member.lobby.company for member in members)
    for _ in range(4):
        began = trio.current_time()
        verdicts = await all_ask(members[:-1])
        assert all(isinstance(verdict, Begun) and members[-1].own not in group(verdict) for verdict in verdicts)
        assert trio.current_time() - began <= 1.6


@pytest.mark.parametrize(("n", "group_size"), [(4, 16), (9, 3)])
async def test_nobody_waits_for_who_steps_aside_until_it_comes_back(
    n: int, group_size: int, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, n, terms(group_size))
    await all_ask(members)
    aside, others = members[0], members[1:]
    aside.lobby.step_aside()
    await sleep(1)
    for _ in range(2):
        began = trio.current_time()
        verdicts = await all_ask(others)
        assert all(isinstance(verdict, Begun) for verdict in verdicts)
        assert not any(aside.own in group(verdict) for verdict in verdicts)
        assert trio.current_time() - began < swarm.limits.window_s
    aside.lobby.come_back()
    aside.lobby.come_back()  # once is enough
    await sleep(15)
    met = [group(verdict) for _ in range(2) for verdict in await all_ask(members)]
    assert any(aside.own in each for each in met)
    aside.lobby.step_aside()
    await sleep(1)
    assert all(isinstance(verdict, Begun) for verdict in await all_ask(members))  # whoever asks is back


async def test_a_run_that_begins_again_after_a_bug_stands_afresh(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    members = await settled(Swarm(nursery), 3)
    await all_ask(members)
    members[0].scope.cancel()
    await sleep(1)
    nursery.start_soon(members[0].lobby.serve)
    await sleep(1)
    verdicts = await all_ask(members)
    assert all(isinstance(verdict, Begun) and len(group(verdict)) == 3 for verdict in verdicts)


async def test_a_peer_that_comes_back_is_in_the_group_again(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 3)
    for other in members[1:]:
        swarm.hub.cut(members[0].own, other.own)
    await sleep(25)
    assert [group(verdict) for verdict in await all_ask(members)] == [ids(members)] * 3


# --------------------------------------------------------------------------------------------------------------- terms


async def test_two_terms_under_one_name_never_meet_and_both_sides_say_why(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    small = [attach(swarm, terms(tensors=specs(4, "layer.weight"))) for _ in range(2)]
    large = [attach(swarm, terms(tensors=specs(8, "layer.weight"))) for _ in range(2)]
    verdicts = await all_ask([*small, *large])
    assert [group(verdict) for verdict in verdicts] == [ids(small)] * 2 + [ids(large)] * 2
    await sleep(12)
    for member in small:
        assert member.lobby.differences == dict.fromkeys(
            ids(large), "tensor 'layer.weight' is float32[4] here, float32[8] there"
        )
    for member in large:
        assert member.lobby.differences == dict.fromkeys(
            ids(small), "tensor 'layer.weight' is float32[8] here, float32[4] there"
        )
        assert sum("we shall not meet" in line for line in member.daemon.heard) == 2


async def test_who_is_alone_with_its_terms_hears_the_difference(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    odd, other = attach(swarm, terms(8)), attach(swarm, terms(16))
    verdict = await odd.ask()
    assert isinstance(verdict, Alone)
    assert verdict.missing == {other.own: "group_size is 8 here, 16 there"}
    assert verdict.reason.endswith(f"{show_peer(other.own)} uses other terms: group_size is 8 here, 16 there")


async def test_a_difference_is_told_again_after_a_cut_and_forgotten_when_the_stranger_has_gone(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    one, other = attach(swarm, terms(8)), attach(swarm, terms(16))
    await sleep(1)
    assert other.own in one.lobby.differences
    swarm.hub.cut(one.own, other.own)
    await sleep(0.05)
    assert one.lobby.differences == {}
    await sleep(25)
    assert one.own in other.lobby.differences
    assert other.own in one.lobby.differences
    other.detach()
    await sleep(25)
    assert one.lobby.differences == {}


async def test_impossible_terms_end_the_link(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    one, other = await settled(swarm, 2)
    link = other.daemon.peers.get(one.own)
    link.send(RunTerms(RUN, specs() * 2, 16, 1, "raw", "mean", answer_me=True))
    await sleep(0.05)
    assert not link.up
    assert "impossible terms" in link.reason


# --------------------------------------------------------------------------------------------------------- the grid


class Meetings:
    """A fault-free exchange: whoever brings the last value of a round releases everybody with the weighted mean."""

    def __init__(self) -> None:
        self._values: dict[bytes, dict[bytes, float]] = {}
        self._full: dict[bytes, trio.Event] = {}

    async def average(self, begin: Begin, me: PeerId, value: float) -> float:
        values = self._values.setdefault(begin.round_id, {})
        full = self._full.setdefault(begin.round_id, trio.Event())
        values[me] = value
        if len(values) == len(begin.members):
            full.set()
        await full.wait()
        weights = {member.peer: member.weight for member in begin.members}
        return math.fsum(weights[peer] * values[peer] for peer in values) / math.fsum(weights.values())


async def cycle(member: Member, meetings: Meetings, value: float, weight: float) -> tuple[float, bool, int]:
    """Do an exact cycle as a run does; return the value, whether it is certified, and of how many peers."""
    lobby = member.lobby
    lobby.start_cycle()
    standing: Standing | None = None
    certified, heads = False, 0
    for _ in range(len(lobby.shape)):

        def bring(cell: Cell, standing: Standing | None = standing) -> Standing:
            return replace(standing, cell=cell) if standing else enter(weight, cell)

        verdict = await lobby.form(bring, trio.current_time() + 30)
        assert isinstance(verdict, Begun)
        begin = verdict.begin
        value = await meetings.average(begin, member.own, value)
        record = lobby.record
        assert record is not None
        shares = Shares(
            number=begin.number,
            shape=record.shape,
            weights=tuple(m.weight for m in begin.members),
            heads=tuple(m.heads for m in begin.members),
            whole=begin.whole,
        )
        everyone = (1 << len(begin.members)) - 1
        certified, heads = certificate(shares, everyone)
        place = [m.peer for m in begin.members].index(member.own)
        standing = after(standing or bring(lobby.last_cell), place, shares, everyone, begin.round_id, record.n_peers)
        assert standing.cell == lobby.cell
        assert lobby.number == begin.number + 1
    return value, certified, heads


@pytest.mark.parametrize("n", [6, 7, 9, 12])
async def test_every_cycle_on_a_grid_of_two_axes_is_exact(
    n: int, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    rng = random.Random(n)
    swarm = Swarm(nursery, delay_s=lambda: rng.uniform(0.001, 0.02), look_up_s=lambda: rng.uniform(0.01, 0.1))
    members = await settled(swarm, n, terms(3, "exact"))
    assert len(members[0].lobby.shape) == 2
    meetings = Meetings()
    for _ in range(6):
        values = [rng.gauss(0, 1) for _ in members]
        weights = [rng.uniform(0.1, 5) for _ in members]
        mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)
        results: list[tuple[float, bool, int]] = []

        async def average(index: int, values: list[float] = values, weights: list[float] = weights) -> None:
            await sleep(rng.uniform(0, 0.5))
            results.append(await cycle(members[index], meetings, values[index], weights[index]))  # noqa: B023

        async with trio.open_nursery() as trainers:
            for index in range(n):
                trainers.start_soon(average, index)
        assert all(certified and heads == n for _, certified, heads in results)
        assert [value for value, _, _ in results] == pytest.approx([mean] * n, abs=1e-12)
        assert len({member.lobby.number for member in members}) == 1
        shape = members[0].lobby.shape
        assert len({member.lobby.cell for member in members}) == math.prod(shape)


async def test_after_a_failed_round_a_peer_keeps_its_old_cell_and_goes_on_with_the_others(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 9, terms(3))
    for _ in range(6):
        before = members[0].lobby.cell
        verdicts = await all_ask(members)
        assert all(isinstance(verdict, Begun) for verdict in verdicts)
        members[0].lobby.fall_back()
        assert members[0].lobby.cell == before
        assert len({member.lobby.number for member in members}) == 1
        await sleep(0.5)  # its line may have one more member than it is made for: first let them see each other


async def test_a_grid_at_rest_looks_for_nobody_and_makes_no_new_links(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    n_lookups = 0

    def look_up_s() -> float:
        nonlocal n_lookups
        n_lookups += 1
        return 0.01

    swarm = Swarm(nursery, delay_s=lambda: 0.001, look_up_s=look_up_s)
    members = await settled(swarm, 8, terms(4))  # two in each of four cells
    for _ in range(4):
        assert all(isinstance(verdict, Begun) for verdict in await all_ask(members))
    cells, links = [member.lobby.cell for member in members], [member.daemon.peers.links() for member in members]
    assert [len(known) for known in links[1:]] < [7] * 7  # only the one that wrote the shape has called everybody
    n_lookups, began = 0, trio.current_time()
    for _ in range(10):
        verdicts = await all_ask(members)
        assert [len(group(verdict)) for verdict in verdicts] == [4] * 8
    assert trio.current_time() - began < 0.5  # nobody waits for a timer
    assert n_lookups == 0
    assert [member.lobby.cell for member in members] == cells
    assert [member.daemon.peers.links() for member in members] == links


async def test_whoever_comes_when_its_line_has_gone_on_does_not_wait_for_it(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    members = await settled(Swarm(nursery), 8, terms(4))
    for _ in range(4):
        await all_ask(members)
    late, others = members[0], members[1:]
    number = late.lobby.number
    assert all(isinstance(verdict, Begun) for verdict in await all_ask(others))
    began = trio.current_time()
    verdict = await late.ask()
    assert isinstance(verdict, Alone)
    assert verdict.reason == "the round of its line began without it"
    assert trio.current_time() - began < 0.5
    assert late.lobby.number == number + 1
    assert all(isinstance(verdict, Begun) for verdict in await all_ask(members))


async def test_on_a_single_line_a_late_word_makes_nobody_expected_in_the_next_rounds(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one, other = await settled(Swarm(nursery), 2)
    await all_ask([one, other])
    link, begun = other.daemon.peers.get(one.own), one.lobby._begun
    assert link is not None
    assert begun is not None
    link.send(Here(RUN, begun.slot, begun.number, ready=False, stamp=0))
    await sleep(0.1)
    one.lobby._stand()
    assert one.lobby._post is not None
    assert not one.lobby._post.pending


async def test_a_mate_that_does_not_come_costs_the_certificate_and_little_time(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    members = await settled(Swarm(nursery), 8, terms(4))
    for _ in range(4):
        verdicts = await all_ask(members)
    assert members[0].lobby.number == 4  # the next round is the first one of a cycle
    idle, others = members[0], members[1:]
    began = trio.current_time()
    verdicts = await all_ask(others)
    begins = [verdict.begin for verdict in verdicts if isinstance(verdict, Begun)]
    assert len(begins) == len(others)
    short = [begin for begin in begins if len(begin.members) == 3]
    assert all(begin.whole for begin in begins if begin not in short)
    assert len(short) == 3
    assert all(idle.own in begin.left_out and not begin.whole for begin in short)
    assert trio.current_time() - began < WINDOW_S + 0.5


async def test_a_lookup_where_we_stood_does_not_keep_us_from_looking_where_we_stand(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    slow_s = 0.0
    swarm = Swarm(nursery, look_up_s=lambda: slow_s)
    members = await settled(swarm, 9, terms(3))
    slow_s = 1000.0
    await sleep(11)  # all look again, and would do so for a long time
    slow_s = 0.0
    for _ in range(3):
        assert all(isinstance(verdict, Begun) for verdict in await all_ask(members))


async def test_who_has_seen_a_line_that_is_too_long_expects_one_more_everywhere_for_a_cycle(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    members = await settled(Swarm(nursery), 9, terms(4, "exact"))
    record = members[0].lobby.record
    assert record is not None
    sizes = table(9, record.shape)

    def more(member: Member) -> int:
        """By how much more than the grid says this one expects where it stands."""
        axis = axis_of(member.lobby.number, record.shape)
        line = line_of(member.lobby.cell, axis)
        return member.lobby._waits.expected(record, member.lobby.number, member.lobby.cell)[1] - sizes.expected(
            axis, line
        )

    short, long = sorted(((0,), (1,)), key=lambda line: sizes.expected(0, line))
    mover = next(member for member in members if line_of(member.lobby.cell, 0) == long)
    for member in members:
        member.lobby.shaping._elastic.note(0.0, CycleCount(9, True, 5))  # a cycle that has counted all
    mover.lobby._go_to(0, (mover.lobby.cell[0], *short))
    await sleep(0.5)
    verdicts = await all_ask(members)
    assert [more(member) for member in members] == [int(len(group(verdict)) == 5) for verdict in verdicts]
    assert len({len(group(verdict)) for verdict in verdicts}) == 2
    for member in members:
        member.lobby.number += 2
    assert not any(map(more, members))


async def test_whoever_stands_again_where_it_stood_is_known_there_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    slow_s = 0.0
    members = await settled(Swarm(nursery, look_up_s=lambda: slow_s), 4)
    slow_s = 5.0
    members[0].lobby.step_aside()
    await sleep(0.1)
    members[0].lobby.come_back()
    await sleep(0.1)
    assert [group(verdict) for verdict in await all_ask(members)] == [ids(members)] * 4


async def test_in_later_rounds_of_a_cycle_lines_wait_for_those_that_earlier_ones_have_delayed(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    (member, *_) = await settled(Swarm(nursery), 9, terms(4, "exact"))
    post = member.lobby._post
    assert post is not None
    first = member.lobby._waits.limits(0, 2, post.company)
    second = member.lobby._waits.limits(1, 2, post.company)
    assert second.quick_s == 2 * first.quick_s
    assert second.settle_s == 2 * first.settle_s
    assert second.window_s == first.window_s + first.settle_s


async def test_a_cycle_goes_on_after_a_round_without_a_group_and_the_next_one_begins_at_its_first_phase(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 9, terms(3, "exact"))
    lobby = members[0].lobby
    lobby.start_cycle()
    assert lobby.number == 0
    assert isinstance(await members[0].ask(), Alone)
    assert lobby.number == 1
    lobby.start_cycle()
    assert lobby.number == 2


async def test_in_one_line_every_round_begins_a_cycle(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 3, terms(16, "exact"))
    assert isinstance(await members[0].ask(), Alone)
    members[0].lobby.start_cycle()
    assert members[0].lobby.number == 0
    assert [group(verdict) for verdict in await all_ask(members)] == [ids(members)] * 3


async def test_whoever_hurries_through_slots_is_announced_in_those_of_the_cell_where_it_ends_and_nowhere_else(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery, look_up_s=lambda: 0.1)
    members = await settled(swarm, 9, terms(3))
    lobby = members[0].lobby
    for step, after_s in enumerate((0.05, 0, 0.15, 0, 0.05)):  # in the middle of announcements, and before any
        lobby._go_to(lobby.number + 1, (step % 2, 1 - step % 2))
        await sleep(after_s)
    await sleep(2)
    rendezvous = members[0].daemon.rendezvous
    places = [RECORDS.decode(record.value) for record in rendezvous._records.values()]
    stands = [place for place in places if isinstance(place, Place) and place.cell]
    assert {place.cell for place in stands} == {lobby.cell}
    assert lobby.record is not None
    slots = {slot(RUN, lobby.record, phase, line_of(lobby.cell, phase)) for phase in range(2)}
    assert lobby._roster._stands.keys() <= slots


# ------------------------------------------------------------------------------------------------------- cancellation


async def test_a_cancelled_form_leaves_the_lobby_usable(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 3)
    with trio.move_on_after(1.5) as scope:
        await members[0].ask()
    assert scope.cancelled_caught
    began = trio.current_time()
    assert [group(verdict) for verdict in await all_ask(members)] == [ids(members)] * 3
    assert trio.current_time() - began < 0.5


async def test_nobody_waits_for_a_peer_whose_trainer_cancelled(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 3)
    verdicts: list[Begun | Alone] = []

    async def ask(member: Member) -> None:
        verdicts.append(await member.ask())

    began = trio.current_time()
    async with trio.open_nursery() as trainers:
        with trio.move_on_after(1):
            async with trio.open_nursery() as impatient:
                impatient.start_soon(members[0].ask)
                await sleep(0.2)
                trainers.start_soon(ask, members[1])
                await sleep(0.2)
        trainers.start_soon(ask, members[2])
    assert [group(verdict) for verdict in verdicts] == [ids(members[1:])] * 2
    assert trio.current_time() - began < 2.5


async def test_cancelled_before_there_is_a_shape(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    one, other = attach(swarm), attach(swarm)
    with trio.move_on_after(0.3) as scope:
        await one.ask()
    assert scope.cancelled_caught
    assert [group(verdict) for verdict in await all_ask([one, other])] == [ids([one, other])] * 2


async def test_a_trainer_that_cancels_just_as_the_group_begins_leaves_the_round(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 9, terms(3))
    scopes: dict[PeerId, trio.CancelScope] = {}
    on_message = Lobby.on_message
    begins: dict[PeerId, tuple[Begin, Cell]] = {}

    def cancel_at_begin(lobby: Lobby, link: Any, message: Any) -> None:
        if isinstance(message, Begin) and len(begins) < 4:
            begins[lobby.own] = message, lobby.cell
            scopes[lobby.own].cancel()
        on_message(lobby, link, message)

    monkeypatch.setattr(Lobby, "on_message", cancel_at_begin)

    async def ask(member: Member) -> None:
        with trio.CancelScope() as scopes[member.own]:
            await member.ask()

    async with trio.open_nursery() as trainers:
        for member in members:
            trainers.start_soon(ask, member)
    caught = [member for member in members if member.own in begins and scopes[member.own].cancelled_caught]
    assert caught  # whoever was about to wake up anyway has its group
    for member in caught:
        begin, cell = begins[member.own]
        assert member.daemon.refused == [begin.round_id]
        assert (member.lobby.cell, member.lobby.number) == (cell, 1)
    verdicts = await all_ask(members)  # with so many in their old cells, some may find nobody in their line
    assert sum(isinstance(verdict, Begun) for verdict in verdicts) >= 4


# ------------------------------------------------------------------------------------------------------------ traffic


@pytest.mark.parametrize(("n", "group_size"), [(3, 16), (9, 3)])
async def test_an_idle_lobby_hardly_asks_the_rendezvous(
    n: int, group_size: int, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, n, terms(group_size))
    await all_ask(members)
    await sleep(5)
    before = [member.daemon.calls for member in members]
    await sleep(60)
    calls = [member.daemon.calls - count for member, count in zip(members, before, strict=True)]
    assert max(calls) <= 20
    assert min(calls) >= 6  # it does look


async def test_a_lone_lobby_does_not_hurry_for_ever(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    lone = attach(swarm)
    await sleep(20)
    before = lone.daemon.calls
    await sleep(60)
    assert 30 <= lone.daemon.calls - before <= 130


async def test_a_warm_round_on_a_grid_costs_few_calls(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 9, terms(3))
    await all_ask(members)
    await sleep(1)
    before = members[0].daemon.calls
    for _ in range(5):
        await all_ask(members)
        await sleep(0.5)
    assert members[0].daemon.calls - before <= 5 * 4


async def test_who_was_lost_is_called_again_and_ever_more_rarely(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    one, other = await settled(swarm, 2)
    other.die()
    counts = [one.daemon.peers.dials]
    for _ in range(20):
        await sleep(60)
        counts.append(one.daemon.peers.dials)
    per_minute = [after - before for before, after in itertools.pairwise(counts)]
    assert 8 <= per_minute[0] <= 16
    assert max(per_minute[5:]) <= 3
    assert sum(per_minute[11:]) == 0  # its record has expired as well


# ----------------------------------------------------------------------------------------------------- what peers say


async def test_a_join_for_a_slot_that_we_have_left_is_declined(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    one, other = await settled(swarm, 2)
    link = other.daemon.peers.get(one.own)
    join = Join(RUN, b"?" * 20, other.lobby.terms.digest, 1, 5, 0, enter(1, (0,)), "192.0.2.1", 2, True, 0.0, 10.0)
    link.send(join)
    await sleep(0.05)
    answers = [message for message in link.far.said if isinstance(message, Declined)]
    assert answers == [Declined(b"?" * 20, "other_number", "the next round here is 0")]


async def test_whoever_stands_where_we_are_not_hears_so_and_is_no_company(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    one, other = await settled(swarm, 2)
    link = other.daemon.peers.get(one.own)
    link.send(Here(RUN, b"?" * 20, 0, True, 1))
    await sleep(0.05)
    assert link.far.said[-1] == Quit(b"?" * 20)
    assert one.lobby._post is not None
    link.send(Quit(one.lobby._post.slot))
    link.send(Here(RUN, one.lobby._post.slot, 1 << 40, True, 1))
    await sleep(0.05)
    assert one.lobby.company == []


async def test_whoever_waits_where_the_others_have_left_follows_them_and_knows_who_is_there(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one, other = await settled(Swarm(nursery), 2)
    assert one.lobby.record is not None
    successor = replace(one.lobby.record, epoch=2)
    there = slot(RUN, successor, 0, line_of(one.lobby.cell, 0))
    here = Here(RUN, there, 0, ready=False, stamp=0, epoch=2)
    link = other.daemon.peers.get(one.own)
    assert link is not None

    async with trio.open_nursery() as steps:
        steps.start_soon(one.ask)
        await sleep(0.1)
        link.send(here)
        link.send(Quit(there))
        link.send(here)
        await sleep(0.1)
        assert (one.lobby.record.epoch, one.lobby._company._heard) == (
            1,
            {other.own: here},
        )  # it has to read the record
        one.lobby.shaping.successor = successor
        await sleep(0.5)
        assert one.lobby.record == successor
        assert one.lobby.company == [other.own]
        assert Quit(there) not in link.far.said
        steps.cancel_scope.cancel()


async def test_whoever_says_where_it_stands_and_leaves_before_we_come_is_not_waited_for(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one, other = await settled(Swarm(nursery), 2)
    link = other.daemon.peers.get(one.own)
    assert link is not None
    link.send(Here(RUN, b"?" * 20, 0, ready=True, stamp=1, epoch=7))
    link.send(Quit(b"?" * 20))
    await sleep(0.1)
    assert not one.lobby._company._heard
    link.send(Here(RUN, b"?" * 20, 0, ready=True, stamp=1, epoch=7))
    await sleep(0.1)
    link.send(Quit(b"!" * 20))
    await sleep(0.1)
    assert set(one.lobby._company._heard) == {other.own}
    other.die()
    await sleep(0.1)
    assert not one.lobby._company._heard


async def test_a_begin_that_comes_too_late_is_refused(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 2)
    one, other = members
    begin = (await all_ask(members))[0]
    assert isinstance(begin, Begun)
    late = replace(begin.begin, round_id=b"l" * 16)
    other.daemon.peers.get(one.own).send(late)
    await sleep(0.05)
    assert one.daemon.refused == [b"l" * 16]


async def test_a_ticket_for_an_hour_is_good_for_a_group_at_any_time(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """What is added to a clock and taken away again is rounded, and no ticket may say more than an hour."""
    one, other = await settled(Swarm(nursery), 2)
    await trio.sleep_until(2.0**12 - 100 - 2.0**-41)
    leader, follower = sorted((one, other), key=lambda member: member.own)
    async with trio.open_nursery() as trainers:
        trainers.start_soon(leader.ask, 7200.0)
        await checkpoints(5)
        post = leader.lobby._post
        assert post is not None
        now = trio.current_time()
        assert now + MAX_ROUND_S - now > MAX_ROUND_S
        ticket = follower.lobby._ticket(post, enter(1.0, follower.lobby.cell), MAX_ROUND_S)
        late = replace(ticket, stamp=1 << 61, time_left_s=MAX_ROUND_S)
        leader.lobby.on_message(leader.daemon.peers.get(follower.own), late)
        verdict = post.matchmaker.verdict
        assert isinstance(verdict, Begun)
        assert verdict.begin.timeout_s < MAX_ROUND_S
        trainers.cancel_scope.cancel()


async def test_no_leader_has_us_keep_everybody_s_vector(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """A robust rule keeps the pieces of its shard: with all of the vector as its shard, that of every member."""
    one, other = await settled(Swarm(nursery), 2)
    begin = (await all_ask([one, other]))[0]
    assert isinstance(begin, Begun)
    one.lobby.terms = replace(one.lobby.terms, aggregate="clip")
    first = begin.begin.members[0]
    members = [replace(first, peer=bytes([i]) * 20 if i else one.own, fraction=float(i == 0)) for i in range(6)]
    greedy = replace(begin.begin, round_id=b"g" * 16, members=tuple(members))
    with pytest.raises(PeerError, match="reduces 100% for 6 members"):
        one.lobby.on_message(one.daemon.peers.get(other.own), greedy)


async def test_no_leader_makes_itself_count_for_everybody(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    one, other = await settled(Swarm(nursery), 2)
    begin = (await all_ask([one, other]))[0]
    assert isinstance(begin, Begun)
    members = tuple(replace(member, weight=1e9) for member in begin.begin.members)
    with pytest.raises(PeerError, match=r"weighs 1e\+09: at most 1e\+08 expected"):
        one.lobby.on_message(one.daemon.peers.get(other.own), replace(begin.begin, round_id=b"h" * 16, members=members))


async def test_a_plan_of_tiny_chunks_is_no_plan(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """For a vector of 1 GiB its books would stop the whole daemon for seconds."""
    one, other = await settled(Swarm(nursery), 2)
    begin = (await all_ask([one, other]))[0]
    assert isinstance(begin, Begun)
    tiny = replace(begin.begin, round_id=b"t" * 16, chunk_bytes=4096)
    with pytest.raises(PeerError, match="in chunks of 4096 bytes: 65536 or more expected"):
        one.lobby.on_message(one.daemon.peers.get(other.own), tiny)


async def test_a_begin_that_comes_twice_is_not_refused(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 2)
    one, other = members
    verdict = (await all_ask(members))[0]
    assert isinstance(verdict, Begun)
    other.daemon.peers.get(one.own).send(verdict.begin)
    await sleep(0.05)
    assert one.daemon.refused == []


async def test_a_record_with_an_absurd_number_moves_nobody(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm = Swarm(nursery)
    members = await settled(swarm, 9, terms(3))
    victim = members[0].lobby
    assert victim._post is not None
    liar = swarm.daemon()
    absurd = Place("192.0.2.9", 9, victim.terms.digest, (1 << 62) - 1, victim.cell)
    await liar.rendezvous.announce(victim._post.slot, RECORDS.encode(absurd), 3600)
    await sleep(12)
    assert isinstance(await members[0].ask(), Alone)
    assert victim.number < 1000


async def test_only_outbound_peers_meet_those_who_can_be_dialled(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    members = [attach(swarm), attach(swarm, inbound=False), attach(swarm, inbound=False)]
    verdicts = await all_ask(members)
    assert [group(verdict) for verdict in verdicts] == [ids(members)] * 3
    begin = verdicts[0]
    assert isinstance(begin, Begun)
    assert {m.peer for m in begin.begin.members if m.fraction > 0} == {members[0].own}


async def test_messages_of_other_kinds_are_no_business_of_a_lobby(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    one, other = await settled(swarm, 2)
    assert isinstance(one.daemon.switchboard, Switchboard)
    link = one.daemon.peers.get(other.own)
    slot = one.lobby._post.slot if one.lobby._post else b""
    with pytest.raises(PeerError):
        one.lobby.on_message(link, Here("another run", slot, 0, False, 0))


async def test_a_step_does_not_wait_for_slow_lookups_when_its_time_is_up(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    look_up_s = [0.01]
    swarm = Swarm(nursery, look_up_s=lambda: look_up_s[0])
    members = await settled(swarm, 6, terms(group_size=2, rounds="exact"))
    assert len(members[0].lobby.shape) == 2
    look_up_s[0] = 3.0  # nodes are gone, and each phase is looked up after the other
    began = trio.current_time()
    verdict = await members[0].ask(timeout_s=4.0)
    assert isinstance(verdict, Alone)
    assert trio.current_time() - began <= 4.0 + 0.5
