"""A machine on a very slow line, and one that stops in the middle of a round and comes back: the others go on.

Strategy: peer i contributes 2^i times a factor that is another one in every round, so each element of a result tells
whose values it is the mean of, and a value from an earlier round would be the mean of nobody. The slow line is a token
bucket in a network namespace; the frozen machine is a stopped process, whose sockets the kernel keeps open.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from e2e_swarm import (
    LOOK_AGAIN_S,
    Array,
    Background,
    DaemonProcess,
    Swarm,
    averagers,
    contributors_of,
    eventually,
    new_run,
    start_step,
    step_all,
    wait_for_company,
)
from netns import hosts_or_skip

from mpd.client import Averager, Outcome

SOAK = bool(os.environ.get("MPD_SOAK"))
MIB = 1 << 20
DEADLINE_S = 5.0
N_SLOW_GROUP = 8 if SOAK else 4
SLOW_ROUNDS = 12 if SOAK else 1
FAST_MBIT, SLOW_MBIT = 100, 1
N_FROZEN_GROUP = 4
WARM_ROUNDS = 3
FROZEN_MIB = 32
FROZEN_AT = 10  # of some 24 pieces that a member sends
FROZEN_S = 60.0 if SOAK else 1.0
DETECT_S = 2.0
SLACK = 1 if SOAK else 3  # the short form runs beside other tests
BACK_S = 40.0  # two looks into the rendezvous


class Values:
    """The vectors of a group, filled anew for each round."""

    def __init__(self, n: int, mib: int) -> None:
        self.vectors = [np.zeros(mib * MIB // 4, np.float32) for _ in range(n)]
        self._factor = 1.0

    def refill(self) -> None:
        """Have peer i contribute 2^i times the factor of this round; it is a power of 2, so that means stay exact."""
        self._factor = 1.0 if self._factor > 2.0**40 else self._factor * 2.0**10
        for i, vector in enumerate(self.vectors):
            vector[:] = self._factor * 2.0**i

    def sets(self, i: int) -> list[frozenset[int]]:
        """Return whose mean the elements of vector i are."""
        decoded: Array = self.vectors[i].astype(np.float64) / self._factor
        return contributors_of(decoded, len(self.vectors))


# -------------------------------------------------------------------------------------------------------- a slow line


@pytest.fixture
def daemons_on_lines() -> Iterator[Callable[[int], list[DaemonProcess]]]:
    """Start daemons on machines of their own; the last one has the slow line."""
    with contextlib.ExitStack() as stack:

        def start(n: int) -> list[DaemonProcess]:
            net = stack.enter_context(hosts_or_skip(n))
            swarm = stack.enter_context(Swarm())
            for host in net.hosts:
                net.limit(host, SLOW_MBIT if host is net.hosts[-1] else FAST_MBIT)
            first, *rest = net.hosts
            swarm.new("--listen", f"{first.address}:4747", enter=first.enter).start().wait_ready()
            for host in rest:
                options = ("--listen", f"{host.address}:4747", "--bootstrap", swarm[0].listen)
                swarm.new(*options, enter=host.enter).start()
            for daemon in swarm.daemons[1:]:
                daemon.wait_ready()
            return swarm.daemons

        yield start


@pytest.mark.timeout(0 if SOAK else 120)
def test_nobody_waits_for_the_peer_on_a_slow_line(
    daemons_on_lines: Callable[[int], list[DaemonProcess]], score: Callable[..., None]
) -> None:
    daemons = daemons_on_lines(N_SLOW_GROUP)
    slow, run, values = N_SLOW_GROUP - 1, new_run(), Values(N_SLOW_GROUP, 4)
    seconds: list[float] = []
    with averagers(daemons, run, values.vectors) as attached:
        wait_for_company(daemons, run)
        for _ in range(SLOW_ROUNDS):
            values.refill()
            outcomes = step_all(attached, timeout=DEADLINE_S)
            seconds.append(max(outcome.seconds for outcome in outcomes[:slow]))
            for i, outcome in enumerate(outcomes[:slow]):
                assert outcome.averaged, outcome
                assert values.vectors[i].tobytes() == values.vectors[0].tobytes()
            assert all(sets >= set(range(slow)) for sets in values.sets(0))
            assert frozenset(range(slow)) in values.sets(0)  # the slow one is not in every chunk
    assert max(seconds) <= DEADLINE_S
    score(
        5,
        f"{SLOW_MBIT} Mbit/s on 1 of {N_SLOW_GROUP}, others at {FAST_MBIT}: others finish within {DEADLINE_S:g} s",
        first_seconds=seconds[0],
        last_seconds=seconds[-1],
        max_seconds=max(seconds),
        rounds=SLOW_ROUNDS,
    )


# ---------------------------------------------------------------------------------------------------- a frozen machine


def freeze_in_mid_round(
    daemons: Sequence[DaemonProcess], attached: Sequence[Averager], victim: int
) -> tuple[list[Outcome], float, Background[Outcome]]:
    """Step, and let the victim's process stop at its `FROZEN_AT`th piece.

    Returns the others' outcomes, how many seconds after that they had the last of them, and the victim's step.
    """
    daemons[victim].arm(f"send:{FROZEN_AT}:freeze")
    steps = [start_step(averager) for averager in attached]
    stat = Path(f"/proc/{daemons[victim].pid}/stat")
    eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the victim has stopped")
    stopped = time.monotonic()
    outcomes = [step.join() for i, step in enumerate(steps) if i != victim]
    return outcomes, time.monotonic() - stopped, steps[victim]


@pytest.mark.timeout(0 if SOAK else 120)
def test_a_frozen_peer_is_noticed_and_comes_back_without_its_old_values(
    swarm: Swarm, score: Callable[..., None]
) -> None:
    daemons = swarm.grow(N_FROZEN_GROUP - 1)
    daemons.append(swarm.new("--bootstrap", daemons[0].listen, armable=True).start().wait_ready())
    victim, run, values = N_FROZEN_GROUP - 1, new_run(), Values(N_FROZEN_GROUP, FROZEN_MIB)
    others = range(victim)
    with averagers(daemons, run, values.vectors) as attached:
        wait_for_company(daemons, run)
        for _ in range(WARM_ROUNDS):
            values.refill()
            warm_s = max(outcome.seconds for outcome in step_all(attached))
        values.refill()
        outcomes, detected_s, step = freeze_in_mid_round(daemons, attached, victim)
        frozen = time.monotonic()
        assert all(outcome.averaged for outcome in outcomes), outcomes
        assert any(daemons[victim].peer in outcome.missing for outcome in outcomes), outcomes
        assert len({values.vectors[i].tobytes() for i in others}) == 1
        values.sets(0)  # or some element would be the mean of nobody
        without: list[float] = []
        while time.monotonic() - frozen < FROZEN_S or not without:
            values.refill()
            around = step_all(attached[:victim])
            assert all(outcome.averaged for outcome in around), around
            assert set(values.sets(0)) == {frozenset(others)}
            without.append(max(outcome.seconds for outcome in around))

        def knows_all(daemon: DaemonProcess) -> bool:
            status = daemon.run_status(run)
            return status is not None and status["peers"] == N_FROZEN_GROUP

        daemons[victim].send(signal.SIGCONT)
        thawed = time.monotonic()
        outcome = step.join()
        assert not outcome.averaged, outcome  # its round is long over, and it kept what it had
        assert (values.vectors[victim] == values.vectors[victim][0]).all()

        # A trainer that has given its daemon up for dead comes back with its next step, and is in the one after that.
        is_attached = daemons[victim].run_status(run) is not None
        assert is_attached or SOAK, "so short a freeze costs no trainer its daemon"
        while is_attached and time.monotonic() < thawed + BACK_S and not all(map(knows_all, daemons)):
            time.sleep(LOOK_AGAIN_S)
        n_steps = 0
        while not all(len(outcome.contributors) == N_FROZEN_GROUP for outcome in outcomes):
            assert n_steps < (1 if is_attached else 2), outcomes
            values.refill()
            outcomes = step_all(attached)
            n_steps += 1
        assert set(values.sets(0)) == {frozenset(range(N_FROZEN_GROUP))}
        back_s = time.monotonic() - thawed
    assert detected_s <= SLACK * DETECT_S + warm_s
    score(
        6,
        f"SIGSTOP for {FROZEN_S:g} s: noticed within {DETECT_S:g} s without progress, back by itself after SIGCONT",
        seconds=detected_s,
        fault_free_seconds=warm_s,
        rounds_meanwhile=len(without),
        slowest_meanwhile_seconds=max(without),
        back_seconds=back_s,
        back_steps=n_steps,
    )
