"""Who becomes a contact and who stays one, on a stage where the test is the network."""

import asyncio
from typing import Any

import pytest
from dht_swarm import ELSEWHERE, HERE, PrivateSwarm, Stage, is_request, play, turn

from mpd.daemon import dht_calls, dht_contacts
from mpd.daemon.dht_messages import FindNode, Ping

KEY = b"k" * 20


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_calls, "REQUEST_TIMEOUT_S", 0.06)
    monkeypatch.setattr(dht_calls, "MIN_PATIENCE_S", 0.02)


def test_a_stranger_is_a_contact_once_it_has_proved_its_key() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(1)
        for _ in range(3):
            stage.hear(you.ask(FindNode(you.id, stage.me.id, KEY)))
            await turn()
        assert not stage.contacts
        assert [type(each) for each in stage.wire.requests()] == [Ping], "one question, whatever it says"
        stage.prove(you)
        assert stage.contacts == {you.id}
        assert stage.protocol.contacts.at(HERE) == you.id

    play(scene)


def test_who_knows_us_and_is_known_to_us_is_not_asked_again() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(1)
        stage.meet(you)
        for _ in range(3):
            stage.hear(you.ping())
            await turn()
        assert len(stage.wire.requests()) == 1

    play(scene)


def test_many_strangers_are_not_all_asked_at_once() -> None:
    async def scene(stage: Stage) -> None:
        for i in range(300):
            stage.hear(stage.actor(i + 1).ping())
        await turn()
        assert len(stage.wire.requests()) == dht_contacts.MAX_CHECKS

    play(scene)


@pytest.mark.usefixtures("quick")
def test_a_stranger_that_does_not_answer_is_asked_once() -> None:
    async def scene(stage: Stage) -> None:
        stage.hear(stage.actor(1).ping())
        await stage.protocol.ping(ELSEWHERE)
        await stage.protocol.ping(ELSEWHERE)
        assert [to for each, to in stage.wire.sent if is_request(each)].count(HERE) == 1

    play(scene)


def test_of_nodes_that_wait_behind_a_full_bucket_nothing_is_kept_for_ever() -> None:
    """Whoever can make itself any number of keys makes them pass through there."""

    async def scene(stage: Stage) -> None:
        for i in range(400):
            stage.meet(stage.actor(i + 1), ("10.0.0.1", 1000 + i))
        assert len(stage.protocol.contacts._heard_at) == len(stage.contacts) < 300

    play(scene)


def test_we_are_not_our_own_contact() -> None:
    async def scene(stage: Stage) -> None:
        answer = stage.protocol.ping(HERE)
        asked = stage.last_ping()
        stage.hear(stage.me.reply(asked, stage.me.home(asked, HERE)))
        stage.hear(stage.me.ping())
        await turn()
        assert (await answer).sender == stage.me.id
        assert not stage.contacts

    play(scene)


@pytest.mark.usefixtures("quick")
def test_a_contact_leaves_after_two_failures_in_a_row() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(1)
        contact = stage.meet(you)
        target: Any = contact

        def find() -> Any:
            return stage.protocol.call_find_node(contact, target)

        await asyncio.wait([find() for _ in range(3)])
        assert stage.contacts == {you.id}, "requests of one burst are one failure"
        await turn()
        stage.prove(you)
        await find()
        assert stage.contacts == {you.id}, "it had answered in between"
        assert not stage.protocol.shuns(you.id)
        while stage.contacts:
            await stage.protocol.ping(ELSEWHERE)
        assert stage.protocol.shuns(you.id)

    play(scene)


@pytest.mark.usefixtures("quick")
def test_who_kept_somebody_waiting_is_silent_until_it_answers() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(1)
        contact = stage.meet(you)
        stage.protocol.keeps_waiting(you.id)
        stage.protocol.contacts.welcome(contact)
        assert stage.protocol.is_silent(you.id), "it can send, but does it answer?"
        stage.protocol.contacts.heard(contact)
        assert not stage.protocol.is_silent(you.id)
        stage.protocol.keeps_waiting(you.id)
        stage.protocol.contacts.proved(contact)
        assert not stage.protocol.is_silent(you.id)

    play(scene)


@pytest.mark.usefixtures("quick")
def test_nobody_lives_less_because_somebody_says_it_lives_elsewhere() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(1)
        contact = stage.meet(you)
        elsewhere = type(contact)(you.id, *ELSEWHERE)
        for _ in range(3):
            assert await stage.protocol.call_ping(elsewhere) is None
        assert stage.contacts == {you.id}
        assert stage.protocol.has_proved(contact)

    play(scene)


@pytest.mark.usefixtures("quick")
def test_a_known_id_moves_when_its_old_address_is_silent() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(1)
        stage.meet(you)
        stage.hear(you.ping(), ELSEWHERE)
        while ELSEWHERE not in [to for each, to in stage.wire.sent if is_request(each)]:
            await stage.protocol.ping(("192.0.2.3", 1))
            await turn()
        asked = next(each for each, to in stage.wire.sent if is_request(each) and to == ELSEWHERE)
        stage.hear(you.reply(asked, you.home(asked, stage.OURS)), ELSEWHERE)
        assert stage.protocol.contacts.at(ELSEWHERE) == you.id
        assert stage.protocol.contacts.at(HERE) is None

    play(scene)


def test_a_known_id_stays_while_its_old_address_answers() -> None:
    async def scene(stage: Stage) -> None:
        you = stage.actor(1)
        stage.meet(you)
        stage.hear(you.ping(), ELSEWHERE)
        await turn()
        stage.prove(you, HERE)
        await turn()
        assert stage.protocol.contacts.at(HERE) == you.id

    play(scene)


def test_a_goodbye_counts_only_from_the_contact_itself() -> None:
    async def scene(stage: Stage) -> None:
        you, other = stage.actor(1), stage.actor(2)
        stage.meet(you)
        stage.hear(other.leave())
        stage.hear(you.leave(), ELSEWHERE)
        assert stage.contacts == {you.id}
        stage.wall.now += 1
        stage.hear(you.leave())
        assert not stage.contacts
        assert len(stage.wire.sent) == 1, "a goodbye has no reply"

    play(scene)


def test_few_contacts_of_one_network_and_any_number_of_members() -> None:
    async def scene(stage: Stage) -> None:
        for i in range(10):
            stage.meet(stage.actor(i + 1), ("192.0.2.7", 1000 + i))
        stage.meet(stage.actor(50), ELSEWHERE)
        assert len(stage.contacts) == 4
        assert stage.refused["crowd"] == 7
        stage.protocol.contacts.forget(stage.actor(1).id)
        stage.meet(stage.actor(20), ("192.0.2.20", 1))
        assert stage.actor(20).id in stage.contacts

    play(scene)
    swarm = PrivateSwarm()

    async def members(stage: Stage) -> None:
        for i in range(10):
            member = type(stage.me)(swarm.member(i + 1), stage.wall)
            stage.meet(member, ("192.0.2.7", 1000 + i))
        assert len(stage.contacts) == 10

    play(members, trust=swarm.member(0))


def test_what_is_remembered_of_the_dead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_contacts, "MAX_SHUNNED", 5)

    async def scene(stage: Stage) -> None:
        for i in range(100):
            node = type(stage.protocol.source_node)(i.to_bytes(20, "big"), *HERE)
            stage.protocol.contacts.failed(node, 0.0)
        assert len(stage.protocol.contacts._shunned_until) <= 5

    play(scene)


@pytest.mark.usefixtures("quick")
def test_nothing_is_checked_after_the_end() -> None:
    async def scene(stage: Stage) -> None:
        contact = stage.meet(stage.actor(1))
        await stage.protocol.contacts.close()
        stage.hear(stage.actor(2).ping(), ELSEWHERE)
        assert await stage.protocol.call_ping(contact) is None
        assert asyncio.all_tasks() == {asyncio.current_task()}

    play(scene)
