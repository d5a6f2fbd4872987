"""The network between daemons parts and heals: real daemons in namespaces of their own, whose packets vanish.

Strategy: the trainers of all daemons do one step after the other, as fast as they can, before, during and after the
cut; everything is judged by what they noted. Peer i contributes 2^i, so every element of a result tells whose mean it
is. Nobody is told of a cut: there is no error, only silence (`netns.py`).
"""

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from conftest import Score
from dht_swarm import SOAK, size
from e2e_swarm import (
    DaemonProcess,
    Swarm,
    averagers,
    contributors_of,
    eventually,
    start_step,
    step_all,
    wait_for_company,
)
from netns import Host, Net, hosts_or_skip

from mpd.client import Averager, Outcome

PORT = 4747
D_S = 5.0  # a round's deadline, as the goals mean it
MERGED_S = 10.0
SLACK = size(3, 1)  # the short form runs beside other tests
CUT_S = size(7, 20)
MIB = 1 << 20
RUN = "partition"


def start_on(swarm: Swarm, hosts: Sequence[Host]) -> list[DaemonProcess]:
    """Start a daemon on each of the hosts; the first is the bootstrap of the others."""
    first = f"{hosts[0].address}:{PORT}"
    return [
        swarm.new(
            "--listen",
            f"{host.address}:{PORT}",
            *(("--bootstrap", first) if host is not hosts[0] else ()),
            enter=host.enter,
        ).start()
        for host in hosts
    ]


@dataclass(frozen=True)
class Step:
    """One step of one trainer: seconds since the start of the test, the outcome, and whose means its elements are."""

    began: float
    ended: float
    outcome: Outcome
    sets: frozenset[frozenset[int]]


@dataclass
class Scene:
    """A swarm whose network parts between its `sides`, in the way that `part` does it."""

    name: str
    hosts: list[Host]
    sides: list[set[int]]
    part: Callable[["Scene", Net], None]
    daemons: list[DaemonProcess] = field(default_factory=list)
    steps: list[list[Step]] = field(default_factory=list)
    healed: float = float("inf")
    cut: float = float("inf")

    def of(self, members: set[int]) -> list[Host]:
        return [self.hosts[i] for i in sorted(members)]

    def work(self, i: int, averager: Averager, vector: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> None:
        """Step until the network is whole again and everybody in one round, which is the last one of all of them."""
        n, is_whole = len(self.hosts), False
        while not is_whole:
            vector[:] = 2.0**i
            began = time.monotonic()
            outcome = averager.step(timeout=2 * D_S)
            ended = time.monotonic()
            self.steps[i].append(Step(began, ended, outcome, frozenset(contributors_of(vector, n))))
            is_whole = ended > self.healed and len(outcome.contributors) == n
            assert ended < self.healed + 60, f"{self.name}: never whole again: {outcome}"


def halves(scene: Scene, net: Net) -> None:
    net.part(*map(scene.of, scene.sides))


def one_way(scene: Scene, net: Net) -> None:
    """What the first side says is lost; it hears the others."""
    net.cut(*map(scene.of, scene.sides))


def test_sides_go_on_alone_and_are_one_swarm_again_after_the_cut(score: Score) -> None:
    """Halves, one way, and a bridge: one peer that reaches both sides. Three swarms at once, to save time."""
    with hosts_or_skip(13) as net, Swarm() as swarm:
        scenes = [
            Scene("halves", net.hosts[:4], [{0, 1}, {2, 3}], halves),
            Scene("one way", net.hosts[4:8], [{0, 1}, {2, 3}], one_way),
            Scene("bridge", net.hosts[8:13], [{0, 1}, {3, 4}], halves),
        ]
        n_elems = size(MIB // 8, MIB)
        try:
            with contextlib.ExitStack() as stack:
                threads = []
                for host in net.hosts:
                    net.limit(host, 100)
                for scene in scenes:
                    scene.daemons = start_on(swarm, scene.hosts)
                    for daemon in scene.daemons:
                        daemon.wait_ready()
                for scene in scenes:
                    vectors = [np.zeros(n_elems, np.float32) for _ in scene.hosts]
                    attached = stack.enter_context(averagers(scene.daemons, RUN, vectors))
                    wait_for_company(scene.daemons, RUN)
                    scene.steps = [[] for _ in scene.hosts]
                    for i, (averager, vector) in enumerate(zip(attached, vectors, strict=True)):
                        threads.append(threading.Thread(target=scene.work, args=(i, averager, vector)))
                for thread in threads:
                    thread.start()
                eventually(lambda: all(steps for scene in scenes for steps in scene.steps), "everybody has averaged")
                for scene in scenes:
                    scene.part(scene, net)
                    scene.cut = time.monotonic()
                time.sleep(CUT_S)
                for scene in scenes:
                    scene.healed = time.monotonic()
                net.heal()
                for thread in threads:
                    thread.join()
            for scene in scenes:
                judge(scene, score)
        except BaseException:
            sys.stderr.write(swarm.log())
            raise


def judge(scene: Scene, score: Score) -> None:
    """Check what the trainers of one swarm have noted."""
    names = [daemon.peer for daemon in scene.daemons]
    for i, steps in enumerate(scene.steps):
        for step in steps:
            if step.outcome.averaged:
                told = frozenset(map(names.index, step.outcome.contributors))
                assert told == frozenset.intersection(*step.sets), step
            else:
                assert step.sets == {frozenset({i})}, step  # its own values, all of them
    in_flight = [
        (i, step)
        for i, steps in enumerate(scene.steps)
        for step in steps
        if step.began < scene.cut and step.ended > scene.cut + 0.5 and step.outcome.averaged
    ]
    for (i, one), (j, other) in itertools.combinations(in_flight, 2):
        is_one_round = one.outcome.peers == other.outcome.peers and i != j and set(one.outcome.peers) == set(names)
        assert not is_one_round or one.sets == other.sets  # whoever succeeds has the same
        on_both = any(i in a and j in b for a in scene.sides for b in scene.sides if a is not b)
        assert not (scene.name == "halves" and is_one_round and on_both)
    went_on = {}
    for side in scene.sides:
        first = [
            min(step.ended for step in scene.steps[i] if step.outcome.averaged and step.ended > scene.cut + 0.5)
            for i in sorted(side)
        ]
        went_on["+".join(map(str, sorted(side)))] = round(max(first) - scene.cut, 2)
    whole = max(steps[-1].ended for steps in scene.steps) - scene.healed
    score(
        4,
        f"{scene.name}: sides go on in <= {2 * D_S:g} s; merged in <= 10 s after heal",
        cut_s=CUT_S,
        went_on_s=went_on,
        merged_s=round(whole, 2),
        steps=sum(map(len, scene.steps)),
        failed=sum(not step.outcome.averaged for steps in scene.steps for step in steps),
        form="full" if SOAK else "short",
    )
    assert max(went_on.values()) <= SLACK * 2 * D_S
    assert whole <= SLACK * MERGED_S


# --------------------------------------------------------------------------------------------- half-open connections


@pytest.fixture(scope="module")
def three() -> Iterator[tuple[Net, list[DaemonProcess]]]:
    """Three daemons behind slow lines, so that a transfer takes seconds."""
    with hosts_or_skip(3) as net, Swarm() as swarm:
        daemons = start_on(swarm, net.hosts)
        for daemon in daemons:
            daemon.wait_ready()
        for host in net.hosts:
            net.limit(host, 60)
        yield net, daemons
        sys.stderr.write(swarm.log())


def sockets(host: Host, other: Host) -> int:
    """Return how many TCP connections of `host` to `other` some process holds open."""
    lines = host.run("ss", "-Htnp", "dst", other.address).splitlines()
    return sum("users:" in line for line in lines)


@pytest.mark.parametrize("how", ["black hole", "reset"])
def test_a_connection_that_is_half_open_is_noticed_and_its_descriptors_go(
    three: tuple[Net, list[DaemonProcess]], how: str, score: Score
) -> None:
    net, daemons = three
    run, n_elems = f"half-open {how}", MIB
    vectors = [np.full(n_elems, 2.0**i, np.float32) for i in range(3)]
    with averagers(daemons, run, vectors) as attached:
        wait_for_company(daemons, run)
        first, last = net.hosts[0], net.hosts[2]
        steps = [start_step(averager) for averager in attached]
        eventually(lambda: moved(daemons[0]) > MIB, "the transfer is under way")
        before = sockets(first, last)
        assert before >= 2
        began = time.monotonic()
        if how == "black hole":
            net.part([first], [last])
            eventually(lambda: sockets(first, last) == 0 == sockets(last, first), "both let go of their sockets")
        else:
            old = first.run("ss", "-Htn", "dst", last.address).split()
            first.run("ss", "-K", "dst", last.address)
            eventually(
                lambda: not set(ports_of(old)) & set(ports_of(first.run("ss", "-Htnp", "dst", last.address).split())),
                "it has let go of the sockets that were killed",
            )
        noticed = time.monotonic() - began
        outcomes = [step.join() for step in steps]
        ended = time.monotonic() - began
        net.heal()
        for i, vector in enumerate(vectors):
            assert outcomes[i].averaged or (vector == 2.0**i).all()
        good = [vector.tobytes() for vector, outcome in zip(vectors, outcomes, strict=True) if outcome.averaged]
        assert len(set(good)) <= 1
        eventually(lambda: all(len(o.contributors) == 3 for o in step_all(attached)), "all three average again")
        score(
            7,
            f"{how}: noticed in <= 10 s, descriptors freed",
            noticed_s=round(noticed, 2),
            round_ended_s=round(ended, 2),
            averaged=[outcome.averaged for outcome in outcomes],
            whole_again_s=round(time.monotonic() - began, 2),
        )
        assert noticed <= 10.0


def moved(daemon: DaemonProcess) -> int:
    return sum(link["bytes_sent"] + link["bytes_received"] for link in daemon.connect().peers())


def ports_of(words: list[str]) -> list[str]:
    """Return the addresses with ports in what `ss` prints."""
    return [word for word in words if word.count(":") == 1 and word.rpartition(":")[2].isdigit()]
