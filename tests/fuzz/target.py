"""What a fuzz target is, and what targets share: reading choices from bytes, and seeds from hypothesis strategies."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from message_strategies import messages

from mpd.vocabulary import Vocabulary

MAX_CPU_S = 1.0
SEEDS_PER_KIND = 3


@dataclass(frozen=True, slots=True)
class Target:
    """One parser: whatever bytes `parse` gets, it returns, or raises one of `blame`, within MAX_CPU_S.

    `seeds` makes valid inputs, from which fuzzing starts; all of them are accepted. `max_bytes` bounds what is tried.
    """

    parse: Callable[[bytes], object]
    blame: tuple[type[Exception], ...]
    seeds: Callable[[], Iterable[bytes]]
    max_bytes: int = 2048

    def accepts(self, data: bytes) -> bool:
        """Return whether `data` is parsed (True) or refused as it should be (False); anything else is a finding."""
        began_s = time.process_time()
        try:
            self.parse(data)
            accepted = True
        except self.blame:
            accepted = False
        taken_s = time.process_time() - began_s
        assert taken_s < MAX_CPU_S, f"{len(data)} bytes took {taken_s:.1f} s of processor time"
        return accepted


class Choices:
    """Bytes as a sequence of decisions, for targets that drive a machine; after the end all are zero."""

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def __bool__(self) -> bool:
        return bool(self._rest)

    def take(self, n_bytes: int) -> bytes:
        """Return the next `n_bytes`, or what is left."""
        taken, self._rest = self._rest[:n_bytes], self._rest[n_bytes:]
        return bytes(taken)

    def number(self, below: int) -> int:
        """Return a number from 0 on, made of one byte."""
        return int.from_bytes(self.take(1)) % below

    def frame(self) -> bytes:
        """Return bytes whose number the next two bytes say."""
        return self.take(int.from_bytes(self.take(2)))


def frame(body: bytes) -> bytes:
    """Return `body` as `Choices.frame` reads it."""
    return len(body).to_bytes(2) + body


def examples(strategy: st.SearchStrategy[Any], n: int = SEEDS_PER_KIND) -> list[Any]:
    """Return `n` values of `strategy`, the same at every call."""
    found: list[Any] = []

    @settings(max_examples=n, derandomize=True, database=None, phases=[Phase.generate])
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def vocabulary_seeds(vocabulary: Vocabulary) -> list[bytes]:
    """Return valid bodies of all messages of `vocabulary`."""
    return [vocabulary.encode(m) for kind in vocabulary.types.values() for m in examples(messages(kind))]


def speaks(vocabulary: Vocabulary, blame: type[Exception]) -> Target:
    """Return the target of a vocabulary: what is understood means the same after having been passed on."""

    def parse(data: bytes) -> object:
        message = vocabulary.decode(data)
        passed_on = vocabulary.encode(message)
        assert vocabulary.encode(vocabulary.decode(passed_on)) == passed_on
        return message

    return Target(parse, (blame,), lambda: vocabulary_seeds(vocabulary))
