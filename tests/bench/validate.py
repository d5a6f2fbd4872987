"""Hold the event model of mpd/timeline.py to what real daemons take.

    python tests/bench/validate.py                         # everything; about forty minutes
    python tests/bench/validate.py --cases loopback        # no network namespaces
    python tests/bench/validate.py --calibrate             # only the constants of this machine, as JSON

What the model is told about this machine comes from groups of two and four (and, for what messages cost, of seven, in
one group and on a grid, and for lines of four) that are measured right before and right after each case; what it is
asked about is larger: 8 to 32 daemons. On loopback the cores are what all peers share; in network namespaces with token
buckets each peer has a line of its own, too. A figure is the time from the common beginning to the last peer's result,
the median of a few rounds. The costs are fitted once, to all measurements of the small swarm; the machine's mood, how
much longer the small groups took around a case than over the whole run, scales them for that case. Everything is
printed side by side with its ratio, and kept as JSON, whatever it says.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import facts
import numpy as np
from rich.console import Console
from rich.table import Table
from swarm import HERE, MPD, BenchError, Child, Peers, children, ready

from mpd.client import connect
from mpd.costs import FITTED, Costs, Sample, fit_costs
from mpd.errors import DaemonUnavailable
from mpd.grid import fit
from mpd.pricing import Peers as Machines
from mpd.pricing import Work
from mpd.quantities import BYTES_PER_S
from mpd.schedule import chunk_bytes_for
from mpd.timeline import Timeline

sys.path.append(str(HERE.parent))
from far import MTU
from netns import Host, Net, NetnsUnavailable

MIB = 1 << 20
START_S = 120.0
HEAD_START_S = 0.05
WARM_UP_ROUNDS = 4  # a daemon has learnt its bandwidth after three
TINY_BYTES = 1024
CALIBRATION = (
    (2, TINY_BYTES),
    (4, TINY_BYTES),
    (7, TINY_BYTES),
    (2, 4 * MIB),
    (4, 4 * MIB),
    (2, 16 * MIB),
    (4, 16 * MIB),
)
GRID_PEERS, GRID_GROUP = 7, 2  # a grid of 2 x 2 cells; the DHT of seven nodes already has two places for each key
CALIBRATION_ROUNDS = 7
N_CALIBRATIONS = 3  # before the first case
LINE_PEERS, LINE_MBIT, LINE_BYTES = 4, 100.0, 8 * MIB
N_CORES = len(os.sched_getaffinity(0))
WITHIN = 0.2
LOOPBACK_BYTES_PER_S = 1e12  # no line at all
console = Console(width=None if Console().is_terminal else 130)


@dataclass(frozen=True)
class Case:
    """What the model is asked about: `mbit` are the lines of the peers, nothing for loopback."""

    n: int
    group_size: int
    vector_bytes: int
    mbit: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        lines = "loopback"
        if self.mbit:
            counts = {rate: self.mbit.count(rate) for rate in sorted(set(self.mbit), reverse=True)}
            lines = ", ".join(f"{count} at {rate:g} Mbit/s" for rate, count in counts.items())
        shape = "x".join(map(str, fit(self.n, self.group_size)))
        grid = "one group" if shape == "1" else f"grid {shape}"
        return f"{self.n} peers, {grid}, {self.vector_bytes / MIB:g} MiB, {lines}"


LOOPBACK = (
    Case(8, 8, 4 * MIB),
    Case(8, 8, 16 * MIB),
    Case(16, 16, 16 * MIB),
    Case(16, 4, 8 * MIB),
    Case(32, 8, 4 * MIB),
    Case(32, 8, 8 * MIB),
)
LINES = (
    Case(8, 8, 8 * MIB, (100.0,) * 8),
    Case(8, 8, 16 * MIB, (200.0,) * 8),
    Case(8, 8, 8 * MIB, (100.0,) * 6 + (40.0,) * 2),
    Case(8, 8, 8 * MIB, (100.0,) * 7 + (10.0,)),
    Case(16, 16, 4 * MIB, (50.0,) * 16),
    Case(16, 4, 8 * MIB, (50.0,) * 16),
)
# Chosen when the model was finished, so that it can be said to have foreseen something.
UNSEEN = (
    Case(12, 12, 12 * MIB),
    Case(20, 8, 2 * MIB),
    Case(24, 4, 6 * MIB),
    Case(10, 10, 8 * MIB, (80.0,) * 7 + (30.0,) * 3),
    Case(12, 4, 4 * MIB, (60.0,) * 12),
    Case(20, 20, 2 * MIB, (40.0,) * 20),
)
CASES = {"loopback": LOOPBACK, "lines": LINES, "unseen": UNSEEN}


# --------------------------------------------------------------------------------------------------------- real swarms


def start(folder: Path, n: int, started: list[Child], hosts: Sequence[Host] = ()) -> Peers:
    """Start `n` daemons, on `hosts` if there are some, and one trainer each, which speaks to its daemon's socket."""
    folder.mkdir(exist_ok=True)
    sockets = [folder / f"{index}.sock" for index in range(n)]

    def join(index: int, *options: str) -> Child:
        enter = hosts[index].enter if hosts else ()
        address = hosts[index].address if hosts else "127.0.0.1"
        command = [*enter, MPD, "join", "--listen", f"{address}:0", "--socket", sockets[index]]
        child = Child(f"daemon{index}", [*command, "--state-dir", folder / f"state{index}", *options], folder, started)
        prefer(child.pid)
        return child

    daemons = [join(0)]
    listen = answer(sockets[0], daemons[0])["listen"]
    daemons += [join(index, "--bootstrap", listen) for index in range(1, n)]
    for socket, child in zip(sockets, daemons, strict=True):
        answer(socket, child, needs_company=n > 1)
    trainers = []
    for index, socket in enumerate(sockets):
        trainers.append(Child(f"trainer{index}", [sys.executable, HERE / "mpd_peer.py", socket], folder, started))
        prefer(trainers[-1].pid)
    peers = ready(Peers(trainers))
    peers.sessions |= {child.pid for child in daemons}
    return peers


def answer(socket: Path, child: Child, *, needs_company: bool = False) -> dict[str, Any]:
    """Return the first status of a daemon, with another one in its DHT if `needs_company`."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(DaemonUnavailable):
            status: dict[str, Any] = connect(socket).status()
            if status["dht"]["peers"] or not needs_company:
                return status
        child.check()
        time.sleep(0.02)
    raise BenchError(f"{child.name} is not ready within {START_S:.0f} s: {child.last_words()}")


def prefer(pid: int) -> None:
    """Let a process that has a session of its own be as urgent as we are: the kernel weighs sessions, not processes."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    if nice < 0:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def subset(peers: Peers, n: int) -> Peers:
    """Return the first `n` of the peers."""
    few = Peers(peers._peers[:n])
    few.sessions = peers.sessions
    return few


def processor_s(peers: Peers) -> float:
    """Return the processor seconds used so far by all processes of the swarm, to the nanosecond."""
    total = 0
    for pid in peers.sessions:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9


class Run:
    """A run of some peers: open, average as often as wanted, close."""

    def __init__(self, peers: Peers, name: str, vector_bytes: int, group_size: int) -> None:
        self.peers, self.name, self.vector_bytes = peers, name, vector_bytes
        peers.ask("open", run=name, variant="numpy", n_elems=vector_bytes // 4, group_size=group_size)
        for _ in range(WARM_UP_ROUNDS):
            self.average(may_fail=True)

    def average(self, *, may_fail: bool = False) -> dict[str, Any]:
        """Let all peers average once; return seconds, processor seconds, and what others used meanwhile, in cores."""
        values = [float(index + 1) for index in range(len(self.peers))]
        self.peers.ask("fill", run=self.name, value=values)
        ours, everyone = processor_s(self.peers), facts.machine_cpu_s()
        answers = self.peers.ask("step", run=self.name, at=time.monotonic() + HEAD_START_S)
        ours, everyone = processor_s(self.peers) - ours, facts.machine_cpu_s() - everyone
        seconds = max(each["seconds"] for each in answers)
        errors = [each["error"] for each in answers if "error" in each]
        # Groups of one round may be any, but the sum of all values stays, unless somebody was left behind.
        means = statistics.mean(each["ends"][0] for each in answers)
        is_whole = all(each.get("contributors", 0) >= 2 for each in answers)
        if not errors and is_whole and abs(means / statistics.mean(values) - 1) > 0.5:
            errors.append(f"wrong result: a mean of {means} where {statistics.mean(values)} was expected")
        if errors and not may_fail:
            console.print(f"[yellow]{self.name}: {errors[0]}[/yellow]")
        return {
            "seconds": seconds,
            "first_seconds": min(each["seconds"] for each in answers),
            "processor_s": ours,
            "others_cores": max(0.0, everyone - ours) / (seconds + HEAD_START_S),
            "contributors": statistics.mean(each.get("contributors", 0) for each in answers),
            "errors": errors,
        }

    def close(self) -> None:
        """End the run."""
        self.peers.ask("close", run=self.name)


# --------------------------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Measured:
    """What the small swarm was seen to take: groups of several sizes, a tiny round on a grid, a round over lines."""

    samples: tuple[Sample, ...]
    grid_processor_s: float
    line: Sample | None


class Calibration:
    """The small swarm from which the model learns about this machine, kept alive beside the large ones."""

    def __init__(self, folder: Path, started: list[Child], hosts: Sequence[Host]) -> None:
        peers = start(folder / "near", GRID_PEERS, started)
        self._runs = [Run(subset(peers, n), f"c{n}-{n_bytes}", n_bytes, 8) for n, n_bytes in CALIBRATION]
        self._grid = Run(peers, "cgrid", TINY_BYTES, GRID_GROUP)
        far = start(folder / "far", len(hosts), started, hosts) if hosts else None
        self._line = Run(far, "cline", LINE_BYTES, 8) if far else None

    def measure(self) -> Measured:
        """Let every small group average a few times."""
        grid = [self._grid.average() for _ in range(CALIBRATION_ROUNDS)]
        return Measured(
            tuple(self._sample(run, CALIBRATION_ROUNDS) for run in self._runs),
            statistics.median(one["processor_s"] for one in grid),
            self._sample(self._line, 3) if self._line is not None else None,
        )

    @staticmethod
    def _sample(run: Run, n_rounds: int) -> Sample:
        rounds = [run.average() for _ in range(n_rounds)]
        n, n_bytes = len(run.peers), run.vector_bytes
        chunk = chunk_bytes_for(n_bytes, n, math.inf)
        return Sample(
            n_members=n,
            vector_bytes=n_bytes,
            n_records=2 * (n - 1) * n * math.ceil(n_bytes / n / chunk),
            processor_s=statistics.median(one["processor_s"] for one in rounds),
            seconds=statistics.median(one["seconds"] for one in rounds),
            cores=N_CORES,
        )


def costs_of(measured: Sequence[Measured]) -> Costs:
    """Return the costs that these measurements of the small swarm amount to."""
    costs = fit_costs([sample for each in measured for sample in each.samples], Costs())
    n, n_lines = GRID_PEERS, math.prod(fit(GRID_PEERS, GRID_GROUP)[:-1])
    n_pairs = n * (n / n_lines - 1)
    grid_s = statistics.median(each.grid_processor_s for each in measured)
    costs = replace(costs, slot_s=max(0.0, grid_s - n * costs.member_s - n_pairs * costs.pair_s) / n_pairs)
    over = [(each.line.processor_s - costs.work_s(each.line)) / each.line.moved_bytes for each in measured if each.line]
    return replace(costs, line_byte_s=max(0.0, statistics.median(over))) if over else costs


def mood(costs: Costs, measured: Sequence[Measured]) -> float:
    """Return how much longer the small groups took around a case than over the whole run."""
    samples = [sample for each in measured for sample in each.samples]
    return statistics.median(s.seconds / costs.wall_s(costs.work_s(s), s.n_members, s.cores) for s in samples)


def in_mood(costs: Costs, factor: float) -> Costs:
    """Return the costs of a machine on which everything takes `factor` times as long."""
    return replace(costs, **{name: factor * getattr(costs, name) for name in (*FITTED, "slot_s", "line_byte_s")})


# ---------------------------------------------------------------------------------------------------------- prediction


def predict(case: Case, costs: Costs, cores: int) -> dict[str, float]:
    """Return what the model says about a case: the last peer's seconds."""
    rates = np.array(case.mbit) * BYTES_PER_S if case.mbit else np.full(case.n, LOOPBACK_BYTES_PER_S)
    machines = Machines(rates, rates, np.zeros(case.n), cores=cores, one_host=True)
    shape = fit(case.n, case.group_size)
    work = Work(case.vector_bytes, is_grid=len(shape) > 1)
    groups = np.arange(case.n) * math.prod(shape[:-1]) // case.n
    seen = Timeline(machines, work, costs).play(groups)
    return {"seconds": float(seen.ended.max()), "first_seconds": float(seen.ended.min())}


# ---------------------------------------------------------------------------------------------------------------- main


@contextlib.contextmanager
def lines(mbit: Sequence[float]) -> Iterator[Sequence[Host]]:
    """Make a machine with a line of its own for each of these rates; none for none."""
    if not mbit:
        yield ()
        return
    with Net(len(mbit)) as net:
        for host, rate in zip(net.hosts, mbit, strict=True):
            net.resize_packets(host, MTU)
            net.limit(host, rate)
        yield net.hosts


def measure(case: Case, calibration: Calibration, n_rounds: int) -> dict[str, Any]:
    """Measure a case, and the small swarm right before and right after it."""
    with tempfile.TemporaryDirectory(prefix="mpd-") as folder, lines(case.mbit) as hosts, children() as started:
        run = Run(start(Path(folder), case.n, started, hosts), "case", case.vector_bytes, case.group_size)
        before = calibration.measure()
        rounds = [run.average() for _ in range(n_rounds)]
        after = calibration.measure()
    return {
        "case": case.name,
        **asdict(case),
        "measured_s": statistics.median(one["seconds"] for one in rounds),
        "first_measured_s": statistics.median(one["first_seconds"] for one in rounds),
        "processor_s": statistics.median(one["processor_s"] for one in rounds),
        "others_cores": statistics.median(one["others_cores"] for one in rounds),
        "failed": sum(bool(one["errors"]) for one in rounds),
        "rounds": rounds,
        "around": (before, after),
    }


def compare(case: Case, result: dict[str, Any], costs: Costs) -> None:
    """Add to what was measured what the model says, from the small swarm alone."""
    factor = mood(costs, result["around"])
    predicted = predict(case, in_mood(costs, factor), N_CORES)
    result |= {
        "mood": factor,
        "predicted_s": predicted["seconds"],
        "first_predicted_s": predicted["first_seconds"],
        "ratio": predicted["seconds"] / result["measured_s"],
        "around": [asdict(each) for each in result["around"]],
    }


def table(results: list[dict[str, Any]]) -> Table:
    """Return all cases side by side."""
    shown = Table(title="seconds to the last peer's result: predicted and measured", title_justify="left")
    shown.add_column("case")
    for name in ("predicted", "measured", "min-max", "ratio", "mood", "others' cores"):
        shown.add_column(name, justify="right")
    for one in results:
        seconds = [each["seconds"] for each in one["rounds"]]
        shown.add_row(
            one["case"],
            f"{one['predicted_s']:.3f}",
            f"{one['measured_s']:.3f}",
            f"{min(seconds):.3f}-{max(seconds):.3f}",
            f"{one['ratio']:.2f}",
            f"{one['mood']:.2f}",
            f"{one['others_cores']:.1f}",
        )
    return shown


def main() -> int:
    args = parse()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _frame: sys.exit(128 + number))
    result: dict[str, Any] = {"machine": facts.machine(), "cases": []}
    cases = [case for kind in args.cases for case in CASES[kind] if args.only in case.name and not args.calibrate]
    seen: list[tuple[Case, dict[str, Any]]] = []
    try:
        has_lines = any(CASES[kind] is not LOOPBACK for kind in args.cases)
        small = (LINE_MBIT,) * LINE_PEERS if has_lines else ()
        with tempfile.TemporaryDirectory(prefix="mpd-") as folder, lines(small) as hosts, children() as started:
            calibration = Calibration(Path(folder), started, hosts)
            measured = [calibration.measure() for _ in range(N_CALIBRATIONS)]
            for case in cases:
                try:
                    seen.append((case, measure(case, calibration, args.rounds)))
                except NetnsUnavailable as error:
                    console.print(f"left out: {case.name}: {error}", highlight=False)
                else:
                    measured += seen[-1][1]["around"]
                    console.print(f"{case.name}: {seen[-1][1]['measured_s']:.3f} s", highlight=False, soft_wrap=True)
    except NetnsUnavailable as error:
        print(f"{error}: try --cases loopback", file=sys.stderr)
        return 1
    except BenchError as error:
        print(f"validation failed: {error}", file=sys.stderr)
        return 1
    costs = costs_of(measured)
    console.print(f"costs of this machine: {json.dumps(asdict(costs))}", highlight=False, soft_wrap=True)
    for case, one in seen:
        compare(case, one, costs)
    result |= {"costs": asdict(costs), "cases": [one for _, one in seen]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if seen:
        console.print(table(result["cases"]))
        n_within = sum(abs(one["ratio"] - 1) <= WITHIN for one in result["cases"])
        console.print(f"{n_within} of {len(seen)} cases within {WITHIN:.0%}; all of it is in {args.out}")
    return 0


def kinds(text: str) -> list[str]:
    """Read "loopback,lines"."""
    named = text.split(",")
    if unknown := set(named) - set(CASES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: one or more of {', '.join(CASES)} expected")
    return named


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Hold the event model to what real daemons take.")
    parser.add_argument("--cases", default=list(CASES), type=kinds, help=f"of {', '.join(CASES)}, with commas")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calibrate", action="store_true", help="measure the constants of this machine and stop")
    parser.add_argument("--out", type=Path, default=Path("build/bench/validation.json"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
