"""Questions that wait: answered, lost, cancelled, answered by the wrong one, and never left behind."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from dht_swarm import ELSEWHERE, HERE, NOW_MS, Actor, Clock, open_trust, peer, request_in, turn

from mpd.daemon import dht_calls, dht_messages
from mpd.daemon.budgets import Budgets
from mpd.daemon.dht_calls import Call, Calls, then
from mpd.daemon.dht_gate import HEADER_BYTES, Gate

YOU = peer(2)
QUESTION = dht_messages.FindNode(peer(1), YOU, b"k" * 20)
ANSWER = dht_messages.Named(YOU, [])


class Line:
    """Calls whose datagrams are written down, and somebody who may answer them."""

    def __init__(self) -> None:
        self.wall = Clock(NOW_MS)
        self.refused: Counter[str] = Counter()
        self.sent: list[tuple[bytes, Any]] = []
        self.judged: list[tuple[Call, Any]] = []
        gate = Gate(open_trust(1), self.wall, lambda: 0.0, Budgets(), self.refused)
        self.calls = Calls(gate, lambda datagram, to: self.sent.append((datagram, to)), self._judge, self.refused)
        self.other = Actor(open_trust(2), self.wall)

    def _judge(self, call: Call, reply: Any) -> Any:
        self.judged.append((call, reply))
        return reply

    def answer(self, reply: Any, address: tuple[str, int] = HERE, index: int = -1) -> None:
        datagram = self.other.reply(self.sent[index][0], reply)
        self.calls.accept(datagram[HEADER_BYTES - 20 : HEADER_BYTES], memoryview(datagram)[HEADER_BYTES:], address)


def run(scene: Callable[[Line], Awaitable[None]]) -> None:
    async def play() -> None:
        line = Line()
        await asyncio.wait_for(scene(line), 5)
        line.calls.close()
        assert not line.calls.waiting
        assert not line.calls.expects(HERE)

    asyncio.run(play())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_calls, "REQUEST_TIMEOUT_S", 0.06)
    monkeypatch.setattr(dht_calls, "MIN_PATIENCE_S", 0.02)


def test_an_answer_reaches_who_asked() -> None:
    async def scene(line: Line) -> None:
        answer = line.calls.ask(HERE, YOU, QUESTION)
        assert line.calls.expects(HERE)
        assert not line.calls.expects(ELSEWHERE)
        line.answer(ANSWER)
        assert await answer == ANSWER
        assert not line.calls.expects(HERE)
        assert [(call.address, call.node_id, reply) for call, reply in line.judged] == [(HERE, YOU, ANSWER)]

    run(scene)


def test_a_reply_counts_once_and_only_from_the_address_that_was_asked() -> None:
    async def scene(line: Line) -> None:
        answer = line.calls.ask(HERE, YOU, QUESTION)
        line.answer(ANSWER, ELSEWHERE)
        assert not answer.done()
        line.answer(ANSWER)
        line.answer(ANSWER)
        assert await answer == ANSWER
        assert line.refused == {"reply from elsewhere": 1, "reply to no question": 1}

    run(scene)


@pytest.mark.parametrize(
    "reply", [7, None, [], [YOU], [b"short", []], dht_messages.Introduction(YOU, [b"x"] * 2), b"\xc1"]
)
def test_what_is_no_answer_to_the_question_is_none(reply: object) -> None:
    async def scene(line: Line) -> None:
        answer = line.calls.ask(HERE, YOU, QUESTION)
        line.answer(reply)
        assert await answer is None
        assert line.refused == {"reply": 1}

    run(scene)


@pytest.mark.usefixtures("quick")
def test_a_lost_question_is_asked_again_under_a_new_seal_and_then_given_up() -> None:
    async def scene(line: Line) -> None:
        asking = line.calls.ask(HERE, YOU, QUESTION)
        line.wall.now += 1
        assert await asking is None
        (first, _), (second, _) = line.sent
        assert first != second, "it would be taken for a replay"
        assert request_in(first) == request_in(second)
        assert first[HEADER_BYTES - 20 : HEADER_BYTES] == second[HEADER_BYTES - 20 : HEADER_BYTES]
        assert line.judged[0][1] is None

    run(scene)


@pytest.mark.usefixtures("quick")
def test_an_address_from_hearsay_is_asked_once() -> None:
    async def scene(line: Line) -> None:
        assert await line.calls.ask(HERE, YOU, QUESTION, repeat=False) is None
        assert len(line.sent) == 1

    run(scene)


@pytest.mark.usefixtures("quick")
def test_cancelled_questions_disturb_nobody() -> None:
    async def scene(line: Line) -> None:
        answered, unanswered = line.calls.ask(HERE, YOU, QUESTION), line.calls.ask(HERE, YOU, QUESTION)
        answered.cancel()
        unanswered.cancel()
        line.answer(ANSWER, index=0)
        await line.calls.ask(ELSEWHERE, YOU, QUESTION)
        assert not line.calls.waiting

    run(scene)


def test_closing_frees_who_waits() -> None:
    async def scene(line: Line) -> None:
        answer = line.calls.ask(HERE, YOU, QUESTION)
        line.calls.close()
        assert answer.cancelled()

    run(scene)


def test_patience_follows_the_slowest_recent_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_calls, "MIN_PATIENCE_S", 0.0)

    async def scene(line: Line) -> None:
        assert line.calls.patience_s == 0
        line.calls.ask(HERE, YOU, QUESTION)
        await turn()
        line.answer(ANSWER)
        assert 0 < line.calls.patience_s < 1

    run(scene)


def test_then_goes_on_with_a_value_or_another_future() -> None:
    async def play() -> None:
        loop = asyncio.get_running_loop()
        first, second = loop.create_future(), loop.create_future()
        value, future = then(first, lambda it: it + 1), then(first, lambda _: second)
        first.set_result(1)
        assert await value == 2
        assert not future.done()
        second.set_result(3)
        assert await future == 3
        gone = loop.create_future()
        after, cancelled = then(gone, lambda it: it), then(gone, lambda _: 1)
        cancelled.cancel()
        gone.cancel()
        assert await after is None
        await turn()
        assert cancelled.cancelled()

    asyncio.run(play())
