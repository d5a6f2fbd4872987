"""Two terms under one name: who is told what, and for how long it is remembered."""

from typing import Any

import pytest
import trio
from fake_peers import FakeDaemon, Swarm, specs, terms
from trio.testing import MockClock

from mpd.daemon.contacts import Contacts
from mpd.daemon.roster import Seen
from mpd.daemon.strangers import Strangers
from mpd.errors import PeerError
from mpd.layout import Terms
from mpd.messages import RunTerms
from mpd.records import Place

pytestmark = pytest.mark.usefixtures("repeatable")


async def pair(nursery: trio.Nursery, mine: Terms) -> tuple[Strangers, FakeDaemon, Any]:
    """Return the strangers of one daemon, another daemon, and the link to it."""
    swarm = Swarm(nursery)
    one, other = swarm.daemon(), swarm.daemon()
    contacts = Contacts(one.peers, one.services.dials, lambda peer, why: None)
    contacts.nursery = nursery
    link = await one.peers.link(other.own, other.peers.endpoint)
    await trio.testing.wait_all_tasks_blocked()
    link.said.clear()
    return Strangers("run", mine, contacts), other, link


def seen(daemon: FakeDaemon, theirs: Terms) -> Seen:
    return Seen(daemon.own, Place("192.0.2.1", daemon.peers.endpoint.port, theirs.digest), 1)


def said_terms(theirs: Terms, answer_me: bool) -> RunTerms:
    return RunTerms(
        "run", theirs.layout.specs, theirs.group_size, theirs.rounds, theirs.codec, theirs.aggregate, answer_me
    )


async def test_a_stranger_hears_our_terms_once(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    strangers, other, link = await pair(nursery, terms(8))
    for _ in range(3):
        strangers.review({other.own: seen(other, terms(16))})
    assert link.said == [said_terms(terms(8), answer_me=True)]
    strangers.review({other.own: seen(other, terms(32))})  # it has come back with others
    assert len(link.said) == 2


async def test_the_answer_names_the_difference_in_our_words(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    strangers, other, link = await pair(nursery, terms(8))
    assert strangers.on_terms(link, said_terms(terms(16), answer_me=False)) == "group_size is 8 here, 16 there"
    assert strangers.differences == {other.own: "group_size is 8 here, 16 there"}
    assert strangers.on_terms(link, said_terms(terms(16), answer_me=False)) is None  # no news
    assert link.said == []
    tensors = specs(4, "layer.bias")
    assert strangers.on_terms(link, said_terms(terms(8, tensors=tensors), answer_me=False)) == (
        "tensor 0 is 'w' here, 'layer.bias' there"
    )


async def test_who_asks_for_an_answer_gets_one_that_asks_for_none(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    strangers, _, link = await pair(nursery, terms(8, "exact"))
    strangers.on_terms(link, said_terms(terms(8), answer_me=True))
    assert link.said == [said_terms(terms(8, "exact"), answer_me=False)]


async def test_equal_terms_are_no_difference(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    strangers, _, link = await pair(nursery, terms(8))
    assert strangers.on_terms(link, said_terms(terms(8), answer_me=False)) is None
    assert strangers.differences == {}


async def test_a_stranger_that_has_gone_is_forgotten_and_told_again_when_it_returns(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    strangers, other, link = await pair(nursery, terms(8))
    roster = {other.own: seen(other, terms(16))}
    for forget in (lambda: strangers.review({}), lambda: strangers.lose(other.own)):
        strangers.review(roster)
        strangers.on_terms(link, said_terms(terms(16), answer_me=False))
        assert other.own in strangers.differences
        forget()
        assert strangers.differences == {}
    strangers.review(roster)
    assert len(link.said) == 3


@pytest.mark.parametrize(
    "changes", [{"group_size": 1}, {"rounds": 7}, {"codec": "?"}, {"aggregate": "?"}, {"tensors": ()}]
)
async def test_impossible_terms_are_the_peers_fault(
    changes: dict[str, Any], nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    strangers, _, link = await pair(nursery, terms(8))
    fields = {"tensors": specs(), "group_size": 8, "rounds": 1, "codec": "raw", "aggregate": "mean"} | changes
    with pytest.raises(PeerError, match="impossible terms"):
        strangers.on_terms(link, RunTerms("run", answer_me=True, **fields))
    assert link.said == []
