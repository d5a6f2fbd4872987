"""What docs/simulate.md shows, anew: plots into docs/_static, tables in Markdown on stdout. `make figures` runs it."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mpd.paper import COLUMNS, Row, reproduce
from mpd.plots import COLOURS, load_matplotlib, plot_results, save
from mpd.simulate import COMPARED, Settings, compare, simulate

STATIC = Path(__file__).resolve().parent.parent / "_static"
LOSSES = (0.0, 0.01, 0.02, 0.05, 0.1)


def paper_table(rows: list[Row]) -> None:
    print("| peers | grid | absent |", " | ".join(COLUMNS), "|")
    print("|" + "---|" * (3 + len(COLUMNS)))
    for row in rows:
        cells = []
        for name in COLUMNS:
            measured, printed = row.measured.get(name), row.printed.get(name)
            cell = "" if measured is None else f"{measured[0]:.1f}"
            cells.append(f"{cell} ({printed[0]:.1f})" if printed else cell)
        print(f"| {row.n_peers} | {'x'.join(map(str, row.shape))} | {row.absent:g} |", " | ".join(cells), "|")


def mid_round_table() -> None:
    policies = ("moshpit", "moshpit-single", "random", "paper-grid", "allreduce", "pairs")
    print("\n| lost in the middle |", " | ".join(policies), "|")
    print("|" + "---|" * (1 + len(policies)))
    for loss in LOSSES:
        settings = Settings(512, group_size=32, mid_round=loss)
        found = [f"{result.rounds_to(1e-9):.1f}" for result in compare(settings, policies)]
        print(f"| {loss:g} |", " | ".join(found), "|")


def plot_rounds_by_peers(path: Path) -> None:
    """Rounds to agreement over the number of peers: a fitted grid needs its d rounds, whatever the number is."""
    load_matplotlib()
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.add_subplot()
    numbers = np.unique(np.geomspace(70, 2048, 48).astype(int))
    for policy, label in (("moshpit", "mpd, fitted grid"), ("paper-grid", "paper's grid"), ("random", "random groups")):
        settings = Settings(64, policy, 32, rounds=30, repeat=5)
        rounds = [simulate(replace(settings, n_peers=int(n))).rounds_to(1e-9) for n in numbers]
        axes.plot(numbers, rounds, color=COLOURS[policy], linewidth=2.8 if policy == "moshpit" else 1.6, label=label)
    axes.set(xscale="log", xlabel="peers", ylabel="rounds to a variance of 1e-9", ylim=(0, 20))
    axes.set_xticks([100, 200, 500, 1000, 2000], labels=["100", "200", "500", "1000", "2000"])
    axes.set_xticks([], minor=True)
    axes.set_title("Groups of 32, nobody absent", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def main() -> None:
    for absent, name in ((0.0, "simulate_calm.svg"), (0.01, "simulate_absent.svg")):
        settings = Settings(512, group_size=32, absent=absent, rounds=20)
        title = "512 peers, groups of 32, " + ("1% absent in each round" if absent else "nobody absent")
        plot_results(list(compare(settings, COMPARED)), STATIC / name, title)
    plot_rounds_by_peers(STATIC / "simulate_peers.svg")
    mid_round_table()
    sys.stdout.flush()
    paper_table(list(reproduce()))


if __name__ == "__main__":
    main()
