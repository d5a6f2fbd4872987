"""Whether others can call this machine: peers are asked to dial it, and only who was asked is believed.

A peer dials the address from which it sees us, at the port that we name, and says how that went. It answers in the
order in which it was asked, so an answer that is one too many was made up. What it says is still only its word: a
false "yes" costs us a shard that nobody reaches for one round, a false "no" makes us reduce nothing.
"""

from collections import deque
from dataclasses import dataclass, field

import trio

from mpd.errors import PeerError
from mpd.messages import DialBack, DialledBack

from .links import Link


@dataclass(eq=False)
class _Question:
    """One request to be dialled; `answer` stays None if the link ends before it is answered."""

    answer: DialledBack | None = None
    over: trio.Event = field(default_factory=trio.Event)


class DialBacks:
    """The questions that are out, by link."""

    def __init__(self) -> None:
        self._asked: dict[Link, deque[_Question]] = {}

    def ask(self, link: Link, port: int) -> "_Question":
        """Ask the peer to dial us at `port`, and do not wait for its answer."""
        question = _Question()
        if link.up:
            self._asked.setdefault(link, deque()).append(question)
            link.send(DialBack(port))
        else:
            question.over.set()
        return question

    async def ask_and_wait(self, link: Link, port: int) -> DialledBack | None:
        """Ask the peer to dial us at `port`; return its answer, None if the link ends first."""
        question = self.ask(link, port)
        await question.over.wait()
        return question.answer

    def on_answer(self, link: Link, answer: DialledBack) -> None:
        """Take an answer. Raises PeerError if nobody asked."""
        waiting = self._asked.get(link)
        if not waiting:
            raise PeerError("it says how dialling this machine went, which nobody had asked it")
        question = waiting.popleft()
        question.answer = answer
        question.over.set()

    def forget(self, link: Link) -> None:
        """The link is over: nobody will answer there."""
        for question in self._asked.pop(link, ()):
            question.over.set()
