"""A bug costs its own share: what is contained, what passes, and what is told about it.

Strategy: the mechanism alone first; then one bug in each kind of share of a daemon, and a sibling that must not notice.
"""

import contextlib
import itertools
import logging

import pytest
import trio
from daemon_helpers import Recorder, swarm
from trio.testing import MockClock

from mpd.daemon.containment import MAX_PAUSE_S, UNEXPECTED, confine, contained, counts, problem, report, supervise
from mpd.daemon.links import Link
from mpd.messages import Ping, Quit

SLOT = b"s" * 20


pytestmark = pytest.mark.usefixtures("bugs")


def bug() -> None:
    raise ValueError("a bug")


# ------------------------------------------------------------------------------------------------------- the mechanism


def test_a_bug_ends_the_block_and_is_counted_and_told() -> None:
    steps = []
    with contained("round"):
        steps.append("before")
        bug()
        steps.append("after")
    assert steps == ["before"]
    assert counts() == {"round": 1}
    assert problem() == ("unexpected errors cost 1 round: the log has their tracebacks, please report them")


def test_nothing_unexpected_is_nothing_to_tell() -> None:
    with contained("round"):
        pass
    assert counts() == {}
    assert problem() == ""


def test_the_traceback_is_logged_once_for_each_place(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        with contained("round"):
            bug()
    with contained("link"):
        bug()
    assert [record.exc_info is not None for record in caplog.records] == [True, False, False, True]
    assert all(record.levelno == logging.ERROR and "a bug" in record.getMessage() for record in caplog.records)
    assert counts() == {"round": 3, "link": 1}
    assert "1 link, 3 rounds" in problem()


def test_an_error_without_traceback_can_be_reported(caplog: pytest.LogCaptureFixture) -> None:
    report("call", ValueError("never raised"))
    assert "never raised" in caplog.text


async def test_cancellation_passes() -> None:
    with trio.CancelScope() as scope:
        with contained("round"):
            scope.cancel()
            await trio.sleep_forever()
        raise AssertionError("the block should have been left by the cancellation")
    assert scope.cancelled_caught
    assert counts() == {}


async def test_cancellation_passes_and_the_bug_beside_it_does_not() -> None:
    """A nursery that is cancelled raises both in one group."""

    async def fail_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            bug()

    with trio.CancelScope() as scope:
        with contained("round"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail_when_cancelled)
                nursery.start_soon(trio.sleep_forever)
                await trio.lowlevel.checkpoint()
                scope.cancel()
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert counts() == {"round": 1}


async def test_siblings_of_a_confined_task_go_on(autojump_clock: MockClock) -> None:
    async def fail() -> None:
        bug()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(confine, "call", fail)
        await trio.sleep(1)
    assert counts() == {"call": 1}


async def test_supervised_work_begins_again_ever_later_until_it_is_done(autojump_clock: MockClock) -> None:
    begun: list[float] = []

    async def work(word: str) -> None:
        assert word == "argument"
        begun.append(trio.current_time())
        if len(begun) < 12:
            bug()

    await supervise("service", work, "argument")
    pauses = [late - early for early, late in itertools.pairwise(begun)]
    assert pauses == sorted(pauses)
    assert pauses[0] < 0.5
    assert pauses[-1] == pytest.approx(MAX_PAUSE_S)
    assert counts() == {"service": 11}


async def test_work_that_went_well_for_a_while_begins_again_soon(autojump_clock: MockClock) -> None:
    ends: list[float] = []

    async def work() -> None:
        await trio.sleep(10 * MAX_PAUSE_S)
        ends.append(trio.current_time())
        if len(ends) < 9:
            bug()

    await supervise("service", work)
    assert trio.current_time() == pytest.approx(9 * 10 * MAX_PAUSE_S, abs=8)


# ---------------------------------------------------------------------------------------------------- bugs in a daemon


class Faulty(Recorder):
    """A daemon with a bug: some message is more than it can take."""

    def on_message(self, link: Link, message: object) -> None:
        if isinstance(message, Quit):
            bug()
        super().on_message(link, message)


class FaultyFarewell(Recorder):
    """A daemon with a bug that shows when a link ends."""

    def on_link_down(self, link: Link, reason: str) -> None:
        super().on_link_down(link, reason)
        bug()


async def test_a_bug_in_what_a_message_does_costs_that_link() -> None:
    async with swarm(3) as (hurt, asker, other):
        hurt.peers._events = faulty = Faulty()
        link = await asker.peers.link(hurt.own, hurt.endpoint)
        sound = await other.peers.link(hurt.own, hurt.endpoint)
        link.send(Quit(SLOT))
        await faulty.until(lambda: faulty.reasons)
        assert faulty.reasons == [UNEXPECTED]
        assert counts() == {"link": 1}
        sound.send(Ping(answer=True))
        await sound.flush(1.0)
        assert sound.up
        again = await asker.peers.link(hurt.own, hurt.endpoint)
        assert again.up


async def test_a_bug_at_the_end_of_a_link_costs_that_link() -> None:
    async with swarm(2) as (hurt, asker):
        hurt.peers._events = faulty = FaultyFarewell()
        link = await asker.peers.link(hurt.own, hurt.endpoint)
        link.close("enough")
        await faulty.until(lambda: faulty.reasons)
        again = await asker.peers.link(hurt.own, hurt.endpoint)
        assert again.up
        assert set(counts()) == {"connection"}


async def test_a_bug_in_an_incoming_connection_costs_that_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with swarm(2) as (hurt, asker):
        receive = hurt.peers.door.receive
        visits = []

        async def fail_once(stream: trio.SocketStream) -> Link | None:
            visits.append(stream)
            if len(visits) == 1:
                bug()
            return await receive(stream)

        monkeypatch.setattr(hurt.peers.door, "receive", fail_once)
        with contextlib.suppress(Exception):
            await asker.peers.link(hurt.own, hurt.endpoint)
        link = await asker.peers.link(hurt.own, hurt.endpoint)
        assert link.up
        assert counts() == {"connection": 1}
