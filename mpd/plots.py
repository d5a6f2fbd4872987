"""Pictures of simulations, for slides and documentation: measurement as lines, theory as dashes over them.

matplotlib is an extra (`mpd[plot]`), imported when somebody asks for a picture.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpd.errors import LocalError
from mpd.simulate import Result

COLOURS = {
    "moshpit": "#0072B2", "moshpit-single": "#56B4E9", "paper-grid": "#D55E00", "random": "#009E73", "pairs": "#CC79A7",
    "allreduce": "#000000", "gossip": "#999999", "chebyshev": "#8C564B", "pushsum": "#E69F00",
    "paper-pushsum": "#BCBD22",
}  # fmt: skip
FLOOR = 1e-16  # below it a variance is rounding
KINDS = (".png", ".svg", ".pdf")


def load_matplotlib() -> Any:
    """Return matplotlib, set up to draw into files. Raises LocalError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise LocalError("plots need matplotlib, which is not installed: pip install 'mpd[plot]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mpd"  # the same picture is the same file
    return matplotlib


def plot_results(results: Sequence[Result], path: Path, title: str) -> None:
    """Draw the variance over the rounds, a line for each policy, and write it to `path` in the format of its suffix.

    Raises LocalError where matplotlib is missing, and OSError where the file cannot be written.
    """
    load_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings = results[0].settings
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.add_subplot()
    drawn = _last_interesting_round(results)
    rounds = np.arange(drawn + 1)
    for result in results:
        name = result.settings.policy
        measured = np.maximum(result.variance[: drawn + 1], FLOOR)
        emphasis = 2.8 if name == "moshpit" else 1.6
        axes.plot(
            rounds, measured, color=COLOURS[name], linewidth=emphasis, label=name, zorder=3 if emphasis > 2 else 2
        )
        if result.theory is not None:
            expected = np.maximum(result.theory[: drawn + 1], FLOOR)
            axes.plot(rounds, expected, color=COLOURS[name], linestyle=(0, (1, 2)), linewidth=4, alpha=0.45, zorder=1)
    axes.axhline(settings.target, color="#666666", linewidth=0.8)
    axes.text(drawn, settings.target, f"target {settings.target:g} ", ha="right", va="bottom", color="#666666")
    axes.set(yscale="log", ylim=(FLOOR / 3, 3), xlim=(0, drawn), xlabel="round", ylabel="variance over the peers")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.plot([], [], color="#666666", linestyle=(0, (1, 2)), linewidth=4, alpha=0.45, label="theory")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write `figure` in the format of the suffix of `path`, without a date: the same figure is the same file."""
    dateless = {"Date": None} if path.suffix == ".svg" else {"CreationDate": None} if path.suffix == ".pdf" else {}
    figure.savefig(path, dpi=150, metadata=dateless)


def _last_interesting_round(results: Sequence[Result]) -> int:
    """Return a round by which everything has happened that will."""
    rounds = results[0].settings.rounds
    reached = [result.rounds_to(FLOOR) for result in results if result.n_reached(FLOOR)]
    return min(rounds, max(10, int(2 * max(reached, default=rounds)))) if len(reached) == len(results) else rounds
