"""Wall clocks that are wrong, or jump in the middle of a round: rounds go by monotonic time and do not notice.

Only records in the rendezvous go by wall clocks. They tolerate half a minute; whoever is further off is not found, and
nobody else is hurt by that.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
from sim.faults import Fault
from sim.peer import LIMITS
from sim.world import World, simulated

from mpd.config import RoundLimits

N = 4
SEEDS = range(3)


def played(seed: int, off_s: float = 0.0, faults: tuple[Fault, ...] = ()) -> World:
    """A plain swarm of four, in which the clock of machine 0 is `off_s` off."""
    world = World(seed, faults, n=N)
    world.rounds, world.group_size, world.outbound, world.timeouts_s = 1, 16, set(), (20.0,)
    world.clock_off_s = {index: off_s if index == 0 else 0.0 for index in range(N)}
    world.limits = replace(LIMITS, record_ttl_s=RoundLimits().record_ttl_s)
    world.think_s, world.datagrams.loss, world.load_share = 0.1, 0.0, 0.0
    world.network.base_s = 0.01  # on slow lines somebody may be left out of a mean for being late, whatever its clock
    with simulated():
        try:
            world.play()
        finally:
            world.dispose()
    return world


def company(world: World) -> list[int]:
    """How many peers stood in the last mean that each machine was given."""
    return [len(world.oracle.last[index].contributors) if index in world.oracle.last else 0 for index in range(N)]


@pytest.mark.parametrize("off_s", [10.0, -10.0, 29.0, -29.0])
def test_clocks_that_are_seconds_off_change_nothing(off_s: float, score: Callable[..., None]) -> None:
    for seed in SEEDS:
        world = played(seed, off_s)
        assert company(world) == [N] * N
        assert world.oracle.n_kept <= played(seed).oracle.n_kept  # somebody may be late for the very first round
    score(22, "rounds unaffected", off_s=off_s, averaged=world.oracle.n_averaged, kept=world.oracle.n_kept)


@pytest.mark.parametrize("off_s", [7200.0, -7200.0])
def test_a_clock_that_is_hours_off_costs_only_its_own_machine(off_s: float, score: Callable[..., None]) -> None:
    for seed in SEEDS:
        world = played(seed, off_s)
        assert company(world) == [0, N - 1, N - 1, N - 1]
        assert "nobody else" in world.oracle.last_kept[0].reason
    score(22, "hours off: not found, nobody else is hurt", off_s=off_s, others_in_mean=company(world)[1])


@pytest.mark.parametrize("jump_s", [10.0, -10.0, 7200.0, -7200.0])
def test_a_clock_that_jumps_in_the_middle_of_a_round_changes_nothing(jump_s: float, score: Callable[..., None]) -> None:
    n_rounds = 0
    for seed in SEEDS:
        world = played(seed, faults=tuple(Fault(at_s, "clock", (0,), jump_s, aimed=True) for at_s in (2.0, 5.0)))
        assert len(world.struck) == 2
        for book in world.oracle.books.values():
            lives = [live for each in book.lives.values() for live in each]
            assert all(live.result or not live.ended_s for live in lives)
            n_rounds += 1
        assert company(world) == [N] * N
    score(22, "rounds unaffected by a jump in their midst", jump_s=jump_s, rounds=n_rounds)
