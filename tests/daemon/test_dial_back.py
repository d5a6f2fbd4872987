"""Only who was asked is believed, as often as it was asked, and nobody waits for a link that has ended."""

from typing import Any

import pytest
import trio
import trio.testing

from mpd.daemon.dial_back import DialBacks
from mpd.errors import PeerError
from mpd.messages import DialBack, DialledBack


class Link:
    """As much of a link as questions need."""

    def __init__(self) -> None:
        self.up = True
        self.said: list[Any] = []

    def send(self, message: Any) -> None:
        self.said.append(message)


async def test_answers_go_to_their_questions_in_order(nursery: trio.Nursery) -> None:
    book, link, heard = DialBacks(), Link(), []

    async def ask(port: int) -> None:
        heard.append((port, await book.ask_and_wait(link, port)))  # type: ignore[arg-type]

    for port in (1, 2):
        nursery.start_soon(ask, port)
        await trio.testing.wait_all_tasks_blocked()
    assert link.said == [DialBack(1), DialBack(2)]
    for reached in (True, False):
        book.on_answer(link, DialledBack(reached))  # type: ignore[arg-type]
    await trio.testing.wait_all_tasks_blocked()
    assert sorted(heard, key=str) == [(1, DialledBack(True)), (2, DialledBack(False))]


async def test_one_answer_too_many_is_made_up() -> None:
    book, link, other = DialBacks(), Link(), Link()
    book.ask(link, 1)  # type: ignore[arg-type]
    with pytest.raises(PeerError, match="nobody had asked"):
        book.on_answer(other, DialledBack(True))  # type: ignore[arg-type]
    book.on_answer(link, DialledBack(True))  # type: ignore[arg-type]
    with pytest.raises(PeerError, match="nobody had asked"):
        book.on_answer(link, DialledBack(True))  # type: ignore[arg-type]


async def test_the_end_of_the_link_ends_the_wait(nursery: trio.Nursery) -> None:
    book, link = DialBacks(), Link()
    nursery.start_soon(trio.testing.wait_all_tasks_blocked)
    question = book.ask(link, 1)  # type: ignore[arg-type]
    book.forget(link)  # type: ignore[arg-type]
    await question.over.wait()
    assert question.answer is None
    link.up = False
    assert await book.ask_and_wait(link, 1) is None  # type: ignore[arg-type]
    with pytest.raises(PeerError):
        book.on_answer(link, DialledBack(True))  # type: ignore[arg-type]
