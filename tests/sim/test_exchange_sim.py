"""Random rounds under an adversary: agreement, exactness, liveness, cheap repair.

MPD_SIM_SEEDS=N plays N rounds instead, MPD_SIM_SEEDS=A:B the seeds from A to B - 1.
"""

import os

import pytest
from sim.exchange_adversary import simulate

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
