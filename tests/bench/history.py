"""What is kept of a benchmark for later: one line per run with its ratios, and a picture of the latest ones.

Seconds of two runs cannot be compared, and are not kept here; ratios taken side by side can. A run replaces nothing:
the file grows by a line of JSON, and the picture shows for each size and number of peers what was measured last.
"""

import json
from pathlib import Path
from typing import Any

COLUMNS = {
    "plain adopt": "plain, adopt",
    "plain copies": "plain, copies",
    "mpd adopt": "sealed, adopt",
    "mpd copies": "sealed, copies",
}


def ratios(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return for each "peers x MiB" the ratio of every column's median to Gloo's, as far as both were measured."""
    found: dict[str, dict[str, float]] = {}
    for case in result.get("rounds", []):
        columns = {name: column["median_s"] for name, column in case["columns"].items() if column["median_s"]}
        if gloo := columns.pop("gloo", None):
            found[f"{case['peers']}x{case['mib']}"] = {name: round(s / gloo, 3) for name, s in columns.items()}
    return found


def append(path: Path, result: dict[str, Any]) -> None:
    """Add the ratios of a run to the history at `path`."""
    machine = result["machine"]
    line = {
        "when": machine["when"],
        "mpd": machine["versions"]["mpd"],
        "cores": machine["cores"],
        "cpu": machine["cpu"],
        "load_before": round(machine["load_before"], 2),
        "to_gloo": ratios(result),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def latest(path: Path) -> dict[str, dict[str, float]]:
    """Return the last measured ratios of each case in the history at `path`."""
    cases: dict[str, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        cases |= json.loads(line)["to_gloo"]
    return cases


def draw(cases: dict[str, dict[str, float]], path: Path) -> None:
    """Draw the ratio to Gloo by size, one field per number of peers, as SVG or PNG (by the name of `path`)."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mpd"  # the same picture of the same numbers is the same file
    from matplotlib import pyplot

    numbers = sorted({int(case.partition("x")[0]) for case in cases})
    figure, fields = pyplot.subplots(1, len(numbers), figsize=(3.6 * len(numbers), 3.4), sharey=True, squeeze=False)
    for field, n in zip(fields[0], numbers, strict=True):
        sizes = sorted(int(case.partition("x")[2]) for case in cases if case.startswith(f"{n}x"))
        for name, label in COLUMNS.items():
            points = [(mib, cases[f"{n}x{mib}"][name]) for mib in sizes if name in cases[f"{n}x{mib}"]]
            style = "--" if "copies" in name else "-"
            field.plot(*zip(*points, strict=True), style, marker="o", label=label)
        field.axhline(1.0, color="gray", linewidth=1)
        field.set_xscale("log", base=2)
        field.set_xticks(sizes, [str(mib) for mib in sizes])
        field.set_title(f"{n} peers")
        field.set_xlabel("MiB per peer")
        field.set_ylim(bottom=0)
    fields[0][0].set_ylabel("time of a step / Gloo's all-reduce")
    fields[0][-1].legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    pyplot.close(figure)
