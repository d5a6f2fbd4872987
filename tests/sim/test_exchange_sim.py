"""Random rounds under an adversary: agreement, exactness, liveness, cheap repair; and that broken rules are noticed.

MPD_SIM_SEEDS=N plays N rounds instead, MPD_SIM_SEEDS=A:B the seeds from A to B - 1.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
from sim.exchange_adversary import STORM, simulate
from sim.exchange_net import GARBAGE, Violation

from mpd.agreement import Agreement
from mpd.exchange import Ended

N_BLOCKS = 10
first, _, last = os.environ.get("MPD_SIM_SEEDS", "0:1600").rpartition(":")
SEEDS = range(int(first or 0), int(last))
BLOCKS = [SEEDS[block::N_BLOCKS] for block in range(min(N_BLOCKS, len(SEEDS)))]


@pytest.mark.timeout(0 if "MPD_SIM_SEEDS" in os.environ else 60)
@pytest.mark.parametrize("seeds", BLOCKS, ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_random_rounds_keep_every_promise(seeds: range) -> None:
    n_succeeded = 0
    for seed in seeds:
        run = simulate(seed)
        n_succeeded += any(member.ended is Ended.SUCCESS for member in run.net.members)
    # An adversary that lets nobody through would find nothing.
    assert n_succeeded > len(seeds) // 2 or len(seeds) < 10


def fence_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agreement, "_may_install", lambda self, epoch: epoch > self.plan.epoch)
    monkeypatch.setattr(Agreement, "_may_accept", lambda self: True)


def need_no_quorum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agreement, "_is_quorum_done", lambda self: True)


def say_done_after_promising(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agreement, "_may_accept", lambda self: True)


def free_inputs_at_done(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Agreement.conclude

    def conclude(self: Any) -> None:
        rule(self)
        if self.accepted >= 0:
            self._chunks._vault.input = GARBAGE

    monkeypatch.setattr(Agreement, "conclude", conclude)


@pytest.mark.parametrize(
    "break_rule",
    [need_no_quorum, fence_nothing, say_done_after_promising, free_inputs_at_done],
    ids=lambda f: f.__name__,
)
def test_a_broken_rule_is_noticed(
    break_rule: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rule(monkeypatch)
    with pytest.raises(Violation) as noticed:
        all(simulate(seed, kinds=STORM) for seed in range(600))
    assert "MPD_SIM_SEEDS" in "".join(noticed.value.__notes__)
