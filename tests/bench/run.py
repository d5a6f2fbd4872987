"""Measure mpd on this machine, against Gloo and, where a virtual environment has it, hivemind.

    python tests/bench/run.py                          # 2, 4 and 8 peers; 1, 16, 64 and 256 MiB each
    python tests/bench/run.py --quick                  # a minute
    python tests/bench/run.py --hivemind .venv-hivemind/bin/python --peers 4 --sizes 64

All peers run on this machine and talk over loopback. mpd's step is end to end (client, shared memory, daemon, finding
each other, exchange, commit), sealed as everywhere, and in the columns "plain" without sealing of tensors; Gloo's is a
bare all_reduce in a fixed world and the division. The floor is the memory traffic alone of each of mpd's columns (see
floor_peer.py). Only ratios within one run mean anything; every single round is kept in the JSON file.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import facts
import goals
import history
import report
from dht_scale import DHT_SIZES, dht_of
from links import CASES, QUICK, over_links, unpaced
from overlap import memory, overlap
from rounds import Column, measure
from scale import GROUP_SIZE, SCALE_DAEMONS, many
from small import footprint, formation
from swarm import BenchError, Place, children, start_floor, start_gloo, start_hivemind, start_mpd

PARTS = ["footprint", "formation", "memory", "overlap", "links", "scale", "rounds"]
MEMORY_LIMIT_MIB = 16 * 1024
# What a peer's processes hold, in MiB, before there are vectors, and how many vectors they hold for each column (with a
# little for what is being reduced or under way): Gloo its own; mpd in and out, and its own if copied; hivemind its own
# and those of its averager's process.
PROCESSES_MIB = {"gloo": 150, "floor": 60, "mpd": 190, "plain": 190, "hivemind": 500}
VECTORS = {
    "gloo": 1.05, "floor sealed adopt": 2.35, "floor sealed copies": 3.35, "floor plain adopt": 2.35,
    "floor plain copies": 3.35, "mpd adopt": 2.15, "mpd copies": 3.15, "plain adopt": 2.15, "plain copies": 3.15,
    "hivemind float32": 2.4, "hivemind float16": 2.4,
}  # fmt: skip
# What is left out first of a case that does not fit into memory; Gloo and sealed `adopt` are what goals speak of.
SPARE = (
    "hivemind float16", "hivemind float32", "floor plain copies", "floor sealed copies", "plain copies", "mpd copies",
    "floor plain adopt", "plain adopt", "floor sealed adopt",
)  # fmt: skip


def main() -> int:
    args = parse()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _frame: sys.exit(128 + number))
    result: dict[str, Any] = {"machine": facts.machine(), "arguments": {k: str(v) for k, v in vars(args).items()}}
    report.show_machine(result["machine"])
    code = 0
    try:
        if "footprint" in args.parts:
            result["footprint"] = footprint()
            report.show_footprint(result["footprint"])
        if "formation" in args.parts:
            groups = [(4, 4)] if args.quick else [(4, 4), (32, 8)]
            result["formation"] = [formation(n, group_size, args.formation_rounds) for n, group_size in groups]
            report.show_formation(result["formation"])
        if "memory" in args.parts:
            result["memory"] = memory()
            report.show_memory(result["memory"])
        if "overlap" in args.parts:
            result["overlap"] = overlap()
            report.show_overlap(result["overlap"])
        if "links" in args.parts:
            result["links"] = []
            for case in CASES:
                if not args.quick or case.name in QUICK:
                    result["links"].append(over_links(case, args.link_rounds))
            report.show_links(result["links"])
        if "scale" in args.parts and not args.quick:
            result["dht"] = [dht_of(n) for n in DHT_SIZES]
            result["scale"] = many(SCALE_DAEMONS, GROUP_SIZE, args.link_rounds)
            report.show_scale(result["scale"], result["dht"])
        if "rounds" in args.parts:
            result["rounds"] = []
            with unpaced() as place:
                for n in args.peers:
                    result["rounds"] += compare(n, args, place)
            report.show_rounds(result["rounds"])
    except BenchError as error:
        print(f"bench failed: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("bench interrupted", file=sys.stderr)
        code = 130
    result["goals"] = goals.rows(result)
    report.show_goals(result["goals"])
    print(f"all figures: {report.save(args.out, result)}")
    if args.history and result.get("rounds"):
        history.append(args.history, result)
        history.draw(history.latest(args.history), args.history.with_suffix(".svg"))
        print(f"ratios: {args.history} and {args.history.with_suffix('.svg')}")
    return code


def compare(n: int, args: argparse.Namespace, unpaced_place: tuple[Place, str]) -> list[dict[str, Any]]:
    """Measure every size with `n` peers of each system; they stay alive from size to size."""
    cases = []
    with tempfile.TemporaryDirectory(prefix="mpd-") as folder, children() as started:
        place, congestion = unpaced_place
        systems = {
            "gloo": start_gloo(Path(folder), n, started, place),
            "floor": start_floor(Path(folder), n, started),
            "mpd": start_mpd(Path(folder) / "sealed", n, started),
            "plain": start_mpd(Path(folder) / "plain", n, started, "--plain-on-loopback"),
        }
        variants = {
            "gloo": ["gloo"],
            "floor": ["sealed adopt", "sealed copies", "plain adopt", "plain copies"],
            "mpd": ["adopt", "copies"],
            "plain": ["adopt", "copies"],
        }
        if args.hivemind:
            systems["hivemind"] = start_hivemind(args.hivemind, Path(folder), n, started)
            variants["hivemind"] = ["float32", "float16"]
        for mib in args.sizes:
            columns = [
                Column("gloo" if system == "gloo" else f"{system} {variant}", peers, variant)
                for system, peers in systems.items()
                for variant in variants[system]
            ]
            left_out = []
            while (reason := too_big(n, mib, columns)) and (spare := [c for c in SPARE if c in map(name_of, columns)]):
                left_out.append(spare[0])
                columns = [column for column in columns if column.name != spare[0]]
            if reason:
                report.console.print(f"skipped {n} peers x {mib} MiB: {reason}", style="yellow")
                continue
            if left_out:
                told = ", ".join(left_out)
                report.console.print(f"{n} peers x {mib} MiB: no memory for {told} beside the rest", style="yellow")
            measure(columns, f"{n}x{mib}", mib * facts.MIB // 4, args.rounds)
            summaries = {column.name: {**column.summary(), "each": column.rounds} for column in columns}
            cases.append({"peers": n, "mib": mib, "gloo_congestion": congestion, "columns": summaries})
            medians = (f"{name} {one['median_s']:.4f}" for name, one in summaries.items() if one["median_s"])
            report.console.print(f"{n} peers x {mib} MiB: {', '.join(medians)} s", highlight=False)
    return cases


def name_of(column: Column) -> str:
    return column.name


def too_big(n: int, mib: int, columns: Sequence[Column]) -> str:
    """Return why this case does not fit into memory, or nothing."""
    names = list(map(name_of, columns))
    processes = sum(PROCESSES_MIB[system] for system in {name.split()[0] for name in names})
    needed = n * (processes + mib * sum(VECTORS[name] for name in names))
    limit = min(MEMORY_LIMIT_MIB, facts.memory_free_mib() * 0.9)
    return f"it needs about {needed:.0f} MiB and {limit:.0f} MiB may be used" if needed > limit else ""


def whole_numbers(text: str) -> list[int]:
    """Read "2,4,8"."""
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure mpd against Gloo (and hivemind) on this machine.")
    parser.add_argument("--peers", default=[2, 4, 8], type=whole_numbers, metavar="N,N,..")
    parser.add_argument("--sizes", default=[1, 16, 64, 256], type=whole_numbers, metavar="MIB,MIB,..")
    parser.add_argument("--rounds", type=int, default=9, help="rounds per system and size, at least 5")
    parser.add_argument("--formation-rounds", type=int, default=50)
    parser.add_argument("--parts", default=PARTS, type=lambda text: text.split(","))
    parser.add_argument("--link-rounds", type=int, default=5, help="rounds per case over slow links, and at scale")
    parser.add_argument("--quick", action="store_true", help="2 and 4 peers, 16 MiB, few rounds")
    parser.add_argument("--hivemind", type=Path, metavar="PYTHON", help="interpreter of an environment with hivemind")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder for the JSON file")
    parser.add_argument(
        "--history", type=Path, metavar="FILE", help="add the ratios to this file and draw them beside it"
    )
    args = parser.parse_args()
    if args.rounds < 5:
        parser.error(f"--rounds is {args.rounds}: at least 5 expected, a median of fewer says little")
    if args.quick:
        args.peers, args.sizes, args.rounds, args.formation_rounds = [2, 4], [16], 6, 20
    return args


if __name__ == "__main__":
    sys.exit(main())
