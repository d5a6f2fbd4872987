"""Show what was measured, and keep all of it as JSON."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Which floor lies under which column.
FLOORS = {
    f"{system} {variant}": f"floor {kind} {variant}"
    for system, kind in {"mpd": "sealed", "plain": "plain"}.items()
    for variant in ("adopt", "copies")
}

DHT_COSTS = ("join", "announce", "seek")

console = Console(width=None if Console().is_terminal else 140)


def show_machine(machine: dict[str, Any]) -> None:
    """Print what the numbers depend on."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(
        f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_mib']} MiB, Linux {machine['kernel']}, "
        f"TCP {machine['tcp_congestion_control']}, Python {machine['python']}, {versions}, "
        f"load before {machine['load_before']:.2f}",
        highlight=False,
    )


def show_rounds(measured: list[dict[str, Any]]) -> None:
    """Print one line per size, peers and system, with ratios of medians on the line's own peers and size."""
    table = Table(title="seconds per round: median over rounds (min-max)", title_justify="left")
    table.add_column("peers", justify="right")
    table.add_column("MiB", justify="right")
    table.add_column("system")
    for name in ("median", "min-max", "to Gloo", "to floor", "CPU s", "others' cores", "failed"):
        table.add_column(name, justify="right")
    for case in measured:
        gloo = case["columns"]["gloo"]["median_s"]
        for name, column in case["columns"].items():
            floor = case["columns"].get(FLOORS.get(name, ""), {}).get("median_s")
            table.add_row(str(case["peers"]), str(case["mib"]), name, *_cells(column, gloo, floor))
        table.add_section()
    console.print(table)
    for case in measured:
        for name, column in case["columns"].items():
            if column["failed"]:
                console.print(f"{case['peers']} x {case['mib']} MiB, {name}: {column['first_error']}", style="red")


def _cells(column: dict[str, Any], gloo: float | None, floor: float | None) -> list[str]:
    failed = f"{column['failed']} of {column['rounds']}" if column["failed"] else ""
    rest = [f"{column['cpu_s']:.2f}", f"{column['others_cores']:.2f}", failed]
    if column["median_s"] is None:
        return ["-", "-", "-", "-", *rest]
    ratios = [f"{column['median_s'] / each:.2f}" if each else "" for each in (gloo, floor)]
    return [f"{column['median_s']:.4f}", f"{column['min_s']:.4f}-{column['max_s']:.4f}", *ratios, *rest]


def show_formation(formed: list[dict[str, Any]]) -> None:
    """Print how fast warm groups form."""
    table = Table(title="time to form a warm group: step of 1 KiB, every peer's time", title_justify="left")
    for name in ("peers", "group size", "median ms", "p95 ms", "CPU ms/daemon", "contributors (mean)", "failed steps"):
        table.add_column(name, justify="right")
    for one in formed:
        times = ["-" if one[name] is None else f"{one[name] * 1000:.1f}" for name in ("median_s", "p95_s")]
        failed = f"{one['failed']} of {one['steps']}"
        rest = [f"{one['cpu_s'] * 1000:.1f}", f"{one['contributors']:.1f}", failed]
        table.add_row(str(one["peers"]), str(one["group_size"]), *times, *rest)
    console.print(table)
    for one in formed:
        if one["failed"]:
            console.print(f"{one['peers']} peers: {one['first_error']}", style="red")


def show_memory(found: dict[str, Any]) -> None:
    """Print what a daemon holds in large rounds."""
    console.print(
        f"daemon in rounds of 4 x 256 MiB: at most {found['peak_mib']:.0f} MiB, {found['beyond_mib']:.0f} MiB beyond "
        f"its two regions and the {found['idle_mib']:.0f} MiB that it holds without runs; "
        f"{found['failed']} rounds failed",
        highlight=False,
    )


def show_overlap(found: dict[str, Any]) -> None:
    """Print what a round costs the training that it hides behind."""
    console.print(
        f"training with a round behind it: {found['slowdown']:.1%} slower ({found['slowdown_min']:.1%} to "
        f"{found['slowdown_max']:.1%}), the daemons using {found['round_cpu_part']:.2%} of the processor; "
        f"{found['failed']} rounds failed",
        highlight=False,
    )


def show_links(cases: list[dict[str, Any]]) -> None:
    """Print rounds over links as they are, against what the necessary bytes take."""
    table = Table(title="rounds over links: median (min-max), and share of the link-bound time", title_justify="left")
    table.add_column("links")
    for name in ("MiB", "bound s", "median s", "min-max", "share", "CPU s", "failed"):
        table.add_column(name, justify="right")
    for case in cases:
        failed = f"{case['failed']} of {case['rounds']}" if case.get("failed") else ""
        seconds = ["-"] * 3
        if case.get("median_s"):
            seconds = [f"{case['median_s']:.3f}", f"{case['min_s']:.3f}-{case['max_s']:.3f}", f"{case['share']:.1%}"]
        rest = [f"{case['cpu_s']:.2f}", failed] if "cpu_s" in case else ["", case["skipped"]]
        table.add_row(case["name"], str(case["mib"]), f"{case['bound_s']:.3f}", *seconds, *rest)
    console.print(table)
    for case in cases:
        if case.get("failed"):
            console.print(f"{case['name']}: {case['first_error']}", style="red")


def show_scale(found: dict[str, Any], dht: list[dict[str, Any]]) -> None:
    """Print what many daemons cost each other."""
    median = f"{found['median_s']:.3f} s" if found["median_s"] else "-"
    console.print(
        f"{found['daemons']} daemons in groups of {found['group_size']}: {found['failed']} of {found['steps']} steps "
        f"failed, {median} a step, {found['contributors']:.1f} contributors, "
        f"{found['cpu_s_per_step'] * 1000:.0f} ms of CPU per daemon and step, "
        f"{found['resident_mib']:.0f} MiB per daemon, "
        f"{found['idle_cpu_percent']:.2f} % of a core when idle",
        highlight=False,
    )
    table = Table(title="DHT: what a node pays", title_justify="left")
    for name in ("nodes", "join", "announce", "seek", "found", "idle datagrams/s", "idle bytes/s", "idle CPU"):
        table.add_column(name, justify="right")
    for one in dht:
        costs = [f"{one[what]['datagrams']:.0f} datagrams, {one[what]['bytes'] / 1024:.0f} KiB" for what in DHT_COSTS]
        idle, seen = one["idle"], f"{one['found']} of {one['sought']}"
        per_s = [f"{idle['datagrams_per_s']:.2f}", f"{idle['bytes_per_s']:.0f}", f"{idle['cpu_percent']:.2f} %"]
        table.add_row(str(one["nodes"]), *costs, seen, *per_s)
    console.print(table)


def show_goals(rows: list[dict[str, Any]]) -> None:
    """Print what is to be reached and what was seen."""
    table = Table(title="to reach", title_justify="left")
    for name, justify in {"what": "left", "goal": "right", "seen": "right", "": "left"}.items():
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        verdict = {None: "", True: "reached", False: "[red]not reached"}[row["met"]]
        table.add_row(row["what"], row["goal"], row["seen"], verdict)
    console.print(table)


def show_footprint(found: dict[str, Any]) -> None:
    """Print what a daemon costs before it does anything."""
    console.print(
        f"daemon: answers {found['start_median_s']:.2f} s after exec (slowest {found['start_max_s']:.2f} s), "
        f"{found['resident_mib']:.0f} MiB resident without runs, {found['idle_cpu_percent']:.2f} % of a core when idle",
        highlight=False,
    )


def save(folder: Path, result: dict[str, Any]) -> Path:
    """Write `result` under a name that sorts by time and return where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['machine']['when'][:19].replace(':', '')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
