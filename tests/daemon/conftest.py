"""What the daemon's tests share: an order of tasks that is the same in every run."""

import random

import pytest
import trio


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trio shuffle its tasks from a fixed seed, so that no test flakes."""
    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr(trio._core._run, "_r", random.Random(0))
