"""What the daemon's tests share: an order of tasks that is the same in every run, and that no bug hides.

What the daemon contains, because one bug must not end it, is a failure in a test, unless the test is about just that.
"""

import random
from collections import Counter
from collections.abc import Iterator

import pytest
import trio

from mpd.daemon import containment


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trio shuffle its tasks from a fixed seed, so that no test flakes."""
    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr(trio._core._run, "_r", random.Random(0))


@pytest.fixture(autouse=True)
def nothing_unexpected() -> Iterator[None]:
    """Let a test fail if anything unexpected was contained while it ran."""
    before = containment.counts()
    yield
    assert containment.counts() == before, "something unexpected was contained: see the log"


@pytest.fixture
def bugs(monkeypatch: pytest.MonkeyPatch) -> "Counter[str]":
    """For tests in which something unexpected happens: what is contained from now on, by what it cost."""
    counts: Counter[str] = Counter()
    monkeypatch.setattr(containment, "_counts", counts)
    monkeypatch.setattr(containment, "_places", set())
    return counts
