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
    for name in ("peers", "group size", "median ms", "p95 ms", "contributors (mean)", "failed steps"):
        table.add_column(name, justify="right")
    for one in formed:
        times = ["-" if one[name] is None else f"{one[name] * 1000:.1f}" for name in ("median_s", "p95_s")]
        failed = f"{one['failed']} of {one['steps']}"
        table.add_row(str(one["peers"]), str(one["group_size"]), *times, f"{one['contributors']:.1f}", failed)
    console.print(table)
    for one in formed:
        if one["failed"]:
            console.print(f"{one['peers']} peers: {one['first_error']}", style="red")


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
