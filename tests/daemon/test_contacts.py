"""Calling peers, and remembering who is gone."""

from typing import Any

import pytest
import trio
from fake_peers import FakeDaemon, Swarm, terms
from trio.testing import MockClock

from mpd.daemon.contacts import FORGET_S, MAX_WAITING, TOLD_S, Contacts
from mpd.daemon.lobby import Lobby
from mpd.daemon.roster import Seen
from mpd.ids import Endpoint, PeerId
from mpd.messages import DialledBack, Goodbye, UnknownRound
from mpd.records import Place

pytestmark = pytest.mark.usefixtures("repeatable")

FORGIVE_S = 10.0


async def pass_time(seconds: float) -> None:
    await trio.sleep_until(trio.current_time() + seconds)


def seen(daemon: FakeDaemon, seq: int = 1) -> Seen:
    """Return what the record of `daemon` says."""
    endpoint: Endpoint = daemon.peers.endpoint
    host = endpoint.host if endpoint.port else ""
    return Seen(daemon.own, Place(host, endpoint.port, terms().digest), seq)


class Caller:
    """Contacts of one daemon, and what they reported."""

    def __init__(self, daemon: FakeDaemon, nursery: trio.Nursery) -> None:
        self.went: list[tuple[PeerId, str]] = []
        self.back: list[PeerId] = []
        self.daemon = daemon
        self.contacts = Contacts(
            daemon.peers, daemon.services.dials, lambda peer, why: self.went.append((peer, why)), self.back.append
        )
        self.contacts.nursery = nursery


def setup(nursery: trio.Nursery, *, inbound: bool = True) -> tuple[Swarm, Caller, FakeDaemon]:
    swarm = Swarm(nursery)
    caller = Caller(swarm.daemon(), nursery)
    return swarm, caller, swarm.daemon(inbound=inbound)


async def test_what_is_said_while_a_peer_is_being_called_arrives_in_order(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    _, caller, other = setup(nursery)
    caller.contacts.note(seen(other))
    said = [UnknownRound(bytes([i]) * 16) for i in range(3)]
    for message in said[:2]:
        caller.contacts.say(other.own, message)
    await pass_time(0.1)
    caller.contacts.say(other.own, said[2])
    link = caller.daemon.peers.get(other.own)
    assert link.said[-3:] == said
    assert caller.daemon.peers.dials == 1
    assert caller.went == []


async def test_who_cannot_be_reached_is_reported_once_and_gone(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm, caller, other = setup(nursery)
    swarm.hub.kill(other.own)
    caller.contacts.note(seen(other))
    assert caller.contacts.is_live(seen(other))
    for _ in range(3):
        caller.contacts.say(other.own, DialledBack(True))
    await pass_time(8)
    assert [peer for peer, _ in caller.went] == [other.own]
    assert "cannot be reached at" in caller.went[0][1]
    assert not caller.contacts.is_live(seen(other))
    assert caller.contacts.absences == dict(caller.went)


async def test_an_absent_peer_is_called_again_after_a_while_and_lives_once_it_answers(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm, caller, other = setup(nursery)
    swarm.hub.kill(other.own)
    caller.contacts.note(seen(other))
    caller.contacts.call(other.own)
    await pass_time(1)
    for _ in range(20):
        assert not caller.contacts.is_live(seen(other))
    assert caller.daemon.peers.dials == 1
    await pass_time(FORGIVE_S)
    assert not caller.contacts.is_live(seen(other))  # but this calls
    await pass_time(0.1)
    assert caller.daemon.peers.dials == 2
    swarm.hub.dead.clear()
    await pass_time(FORGIVE_S + 0.1)
    assert not caller.contacts.is_live(seen(other))
    await pass_time(0.1)
    assert caller.contacts.is_live(seen(other))


async def test_a_newer_record_is_worth_a_call_at_once(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm, caller, other = setup(nursery)
    swarm.hub.kill(other.own)
    caller.contacts.note(seen(other))
    caller.contacts.call(other.own)
    await pass_time(1)
    swarm.hub.dead.clear()
    assert not caller.contacts.is_live(seen(other, seq=2))
    await pass_time(0.1)
    assert caller.contacts.is_live(seen(other, seq=2))


async def test_who_speaks_to_us_is_back(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    _, caller, other = setup(nursery)
    caller.contacts.went(other.own, "gone")
    caller.contacts.came(other.own, other.peers.endpoint)
    assert caller.contacts.is_live(seen(other))
    assert caller.contacts.absences == {}


async def test_the_goodbye_is_the_reason_and_not_the_end_of_the_link(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm, caller, other = setup(nursery)
    caller.contacts.note(seen(other))
    caller.contacts.call(other.own)
    await pass_time(0.1)
    caller.contacts.went(other.own, "left: enough")
    assert not caller.contacts.is_live(seen(other))  # although the link is still up
    swarm.hub.cut(caller.daemon.own, other.own)
    await pass_time(0.1)
    caller.contacts.went(other.own, "it closed the connection")
    assert caller.contacts.absences == {other.own: "left: enough"}
    caller.contacts.went(other.own, "connection refused")
    assert caller.contacts.absences == {other.own: "connection refused"}


async def link_and_lose(swarm: Swarm, caller: Caller, other: FakeDaemon, why: str) -> None:
    """Let the two be linked, and the network part between them."""
    caller.contacts.note(seen(other))
    caller.contacts.call(other.own)
    await pass_time(0.1)
    if why != "silence":
        caller.contacts.went(other.own, why)
    swarm.hub.part([caller.daemon.own], [other.own])
    caller.contacts.went(other.own, "nothing was heard from it for 2.0 s")
    await pass_time(0.1)


async def test_who_was_lost_without_a_goodbye_is_called_until_it_is_back(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm, caller, other = setup(nursery)
    nursery.start_soon(caller.contacts.keep_calling)
    await link_and_lose(swarm, caller, other, "silence")
    await pass_time(20)
    assert caller.daemon.peers.dials >= 3
    assert caller.back == []
    swarm.hub.heal()
    await pass_time(12)  # a call that began before has to fail first
    assert caller.back == [other.own]
    assert caller.contacts.absences == {}
    assert caller.contacts.is_live(seen(other))


async def test_who_said_goodbye_is_not_called_after(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm, caller, other = setup(nursery)
    nursery.start_soon(caller.contacts.keep_calling)
    await link_and_lose(swarm, caller, other, "left: enough")
    swarm.hub.heal()
    await pass_time(60)
    assert caller.daemon.peers.dials == 1


async def test_who_calls_us_after_an_absence_is_back_too(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    swarm, caller, other = setup(nursery)
    nursery.start_soon(caller.contacts.keep_calling)
    await link_and_lose(swarm, caller, other, "silence")
    swarm.hub.heal()
    await other.peers.link(caller.daemon.own, caller.daemon.peers.endpoint)
    await pass_time(1)
    assert caller.back == [other.own]


async def test_what_is_known_of_those_who_stay_away_is_forgotten(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm, caller, other = setup(nursery)
    nursery.start_soon(caller.contacts.keep_calling)
    await link_and_lose(swarm, caller, other, "silence")
    await pass_time(FORGET_S + 2 * TOLD_S)
    dials = caller.daemon.peers.dials
    await pass_time(FORGET_S)
    assert caller.daemon.peers.dials == dials
    assert not any((caller.contacts._absent, caller.contacts._seqs, caller.contacts._endpoints))


async def test_however_many_addresses_are_published_only_so_many_are_dialled_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm, caller, _ = setup(nursery)
    others = [swarm.daemon() for _ in range(MAX_WAITING + 50)]
    for other in others:
        swarm.hub.silent.add(other.own)
        caller.contacts.note(seen(other))
        caller.contacts.say(other.own, Goodbye())
    await pass_time(1)
    dials = caller.daemon.services.dials
    assert dials.used == dials.limit == caller.daemon.peers.dials == 32
    await pass_time(5)
    assert caller.daemon.peers.dials == 64
    await pass_time(600)
    assert dials.used == 0
    assert len(caller.went) == MAX_WAITING
    assert caller.contacts._outbox == {}


async def test_a_forged_address_keeps_nobody_from_being_dialled_for_long(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm, caller, other = setup(nursery)
    for _ in range(64):
        forged = swarm.daemon()
        swarm.hub.silent.add(forged.own)
        caller.contacts.note(seen(forged))
        caller.contacts.call(forged.own)
    caller.contacts.note(seen(other))
    caller.contacts.call(other.own)
    await pass_time(11)
    assert caller.daemon.peers.get(other.own) is not None


async def test_absences_are_told_for_a_while_only(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    _, caller, other = setup(nursery)
    caller.contacts.went(other.own, "gone")
    await pass_time(TOLD_S + 1)
    assert caller.contacts.absences == {}


async def test_who_accepts_no_calls_is_waited_for(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    _, caller, other = setup(nursery, inbound=False)
    caller.contacts.note(seen(other))
    assert not caller.contacts.accepts_calls(other.own)
    message: Any = Goodbye()
    caller.contacts.say(other.own, message)
    await pass_time(1)
    await other.peers.link(caller.daemon.own, caller.daemon.peers.endpoint)
    await pass_time(0.1)
    assert caller.daemon.peers.get(other.own).said[-1:] == [message]
    assert caller.daemon.peers.dials == 0


async def test_nobody_is_called_while_there_is_no_nursery(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    _, caller, other = setup(nursery)
    caller.contacts.nursery = None
    caller.contacts.note(seen(other))
    caller.contacts.say(other.own, Goodbye())
    await pass_time(1)
    assert caller.daemon.peers.dials == 0


async def test_a_served_lobby_lends_its_nursery_and_takes_it_back(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm = Swarm(nursery)
    lobby = Lobby("run", terms(), swarm.daemon().services)
    with trio.move_on_after(1):
        nursery_seen = []
        async with trio.open_nursery() as inner:
            inner.start_soon(lobby.serve)
            await pass_time(0.5)
            nursery_seen.append(lobby._contacts.nursery)
    assert nursery_seen[0] is not None
    assert lobby._contacts.nursery is None


async def test_links_are_watched_while_somebody_waits_for_those_behind_them(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm, caller, one = setup(nursery)
    other = swarm.daemon()
    for daemon in (one, other):
        caller.contacts.note(seen(daemon))
        caller.contacts.call(daemon.own)
    await pass_time(0.1)
    links = [caller.daemon.peers.get(daemon.own) for daemon in (one, other)]
    links[1].awaited = 1  # by another run
    nobody = PeerId(b"n" * 20)
    for patience, awaited in (
        ({one.own: 0.5}, [1, 1]),
        ({one.own: 0.5, other.own: 3.0, nobody: 1.0}, [1, 2]),
        ({}, [0, 1]),
    ):
        caller.contacts.watch(patience)
        assert [link.awaited for link in links] == awaited
    assert [link.patience_s for link in links] == [0.5, 3.0]
