"""Rounds over links as they are: slow, far away, lossy, or one of them slower than the others.

Every peer is a daemon in a network namespace of its own (tests/netns.py), whose link is limited in both directions;
distance and losses come from tests/far.py. What counts is the share of the time that the necessary bytes need:
2 (1 - 1/n) vectors each way, through the link of each member, headers of TCP/IP included; plus three round trips where
there is a distance: one and a half until the group has begun, one for pieces and results, half of one for the last
word. Such a round waits for its links, so a busy machine disturbs it less than others, but it does: all packets of all
"machines" pass through two cores. Packets are larger than on an Ethernet, so that there are fewer of them.
"""

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import facts
from rounds import Column, measure_round
from swarm import Place, children, start_mpd

sys.path.insert(0, str(Path(__file__).parent.parent))

from far import MTU, SUBNET, Far
from netns import Net, NetnsUnavailable

from mpd.daemon.congestion import ON_ONE_HOST
from mpd.schedule import fractions

TCP_IP_BYTES = 52  # of a packet: IPv4, TCP and its timestamps
ETHERNET_BYTES = 14
ROUND_TRIPS = 3
ONE_BY_ONE_MBIT = 100.0  # on faster links, single packets would be more than two cores pass
LEARNING_ROUNDS = 4  # until windows and shards have settled: bandwidths are believed after three measurements


@dataclass(frozen=True)
class Case:
    """`n` peers with `mib` MiB each on links of `mbit`; the last one has `slowest` of that."""

    name: str
    n: int
    mib: int
    mbit: float
    rtt_s: float = 0.0
    loss: float = 0.0
    slowest: float = 1.0

    @property
    def mbits(self) -> list[float]:
        return [self.mbit] * (self.n - 1) + [self.mbit * self.slowest]

    def bound_s(self) -> float:
        """Return the seconds that the necessary bytes take, with the best shards, and the round trips."""
        framing = 0 if self.rtt_s or self.loss else ETHERNET_BYTES
        wire_bytes = self.mib * facts.MIB * (MTU + framing) / (MTU - TCP_IP_BYTES)
        bytes_per_s = [mbit * 1e6 / 8 for mbit in self.mbits]
        shares = fractions(bytes_per_s)
        longest = max((1 + (self.n - 2) * share) / rate for share, rate in zip(shares, bytes_per_s, strict=True))
        return wire_bytes * longest + ROUND_TRIPS * self.rtt_s


CASES = (
    Case("4 peers, 100 Mbit/s", 4, 16, 100),
    Case("8 peers, 100 Mbit/s", 8, 16, 100),
    Case("4 peers, 1 Gbit/s", 4, 64, 1000),
    Case("4 peers, 100 Mbit/s, 20 ms", 4, 16, 100, rtt_s=0.02),
    Case("4 peers, 100 Mbit/s, 100 ms", 4, 16, 100, rtt_s=0.1),
    Case("4 peers, 100 Mbit/s, 200 ms", 4, 16, 100, rtt_s=0.2),
    Case("8 peers, 100 Mbit/s, 100 ms", 8, 16, 100, rtt_s=0.1),
    Case("8 peers, 100 Mbit/s, one of 10", 8, 16, 100, slowest=0.1),
    Case("4 peers, 100 Mbit/s, 20 ms, 0.1% lost", 4, 16, 100, rtt_s=0.02, loss=0.001),
)
QUICK = ("4 peers, 100 Mbit/s", "4 peers, 100 Mbit/s, 100 ms")


@contextlib.contextmanager
def unpaced() -> Iterator[tuple[Place, str]]:
    """Yield a place whose loopback uses the congestion control that mpd asks for there, and its name.

    Gloo cannot be told: it takes the default of its network namespace. Where there can be none, it has the machine's.
    """
    with contextlib.ExitStack() as stack:
        try:
            host = stack.enter_context(Net(1)).hosts[0]
            host.run("sh", "-c", f"echo {ON_ONE_HOST.decode()} > {facts.CONGESTION}")
        except NetnsUnavailable:
            yield Place(), Path(facts.CONGESTION).read_text().strip()
        else:
            yield Place(host.enter), ON_ONE_HOST.decode()


def over_links(case: Case, n_rounds: int) -> dict[str, Any]:
    """Measure one case; a machine that allows no network namespaces gets the reason in place of figures."""
    facts_of_case = {**asdict(case), "bound_s": case.bound_s()}
    with contextlib.ExitStack() as stack:
        try:
            places = _places(case, stack)
        except NetnsUnavailable as reason:
            return {**facts_of_case, "skipped": str(reason)}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpd-")))
        started = stack.enter_context(children())
        peers = start_mpd(folder / "links", case.n, started, places=places)
        column = Column("mpd", peers, "numpy")
        n_elems = case.mib * facts.MIB // 4
        peers.ask("open", run=case.name, variant=column.variant, n_elems=n_elems, group_size=case.n)
        learning = [measure_round(peers, case.name) for _ in range(LEARNING_ROUNDS)]
        # Whoever is far slower than the majority has only a part of its values in the mean, and gets all of it.
        is_uneven = case.slowest < 1
        column.rounds += [measure_round(peers, case.name, last_may_lack=is_uneven) for _ in range(n_rounds)]
    summary = column.summary()
    shares = [facts_of_case["bound_s"] / seconds for seconds in column.seconds()]
    return {
        **facts_of_case,
        **summary,
        "share": statistics.median(shares) if shares else None,
        "share_min": min(shares, default=None),
        "share_max": max(shares, default=None),
        "learning": learning,
        "each": column.rounds,
    }


def _places(case: Case, stack: contextlib.ExitStack) -> list[Place]:
    net = stack.enter_context(Net(case.n))
    if case.rtt_s or case.loss:
        stack.enter_context(Far(net, case.rtt_s, case.mbits, case.loss))
        return [Place(host.enter, f"{SUBNET}.{number}") for number, host in enumerate(net.hosts, 1)]
    for host, mbit in zip(net.hosts, case.mbits, strict=True):
        net.resize_packets(host, MTU, singly=case.mbit <= ONE_BY_ONE_MBIT)
        net.limit(host, mbit)
    return [Place(host.enter, host.address) for host in net.hosts]
