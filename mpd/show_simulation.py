"""Simulations for people: tables that fit the terminal, CSV for spreadsheets."""

import csv
import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mpd.paper import Rounds, Row
from mpd.simulate import Result, Settings

COARSE = 1e-4
CSV_FIELDS = ("policy", "peers", "absent", "mid_round", "churn", "round", "variance", "expected_variance", "error")


def show_results(results: Sequence[Result], console: Console | None = None) -> None:
    """Print one line for each policy, and what the columns mean."""
    settings = results[0].settings
    console = console or Console()
    console.print(describe(settings), highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("policy")
    table.add_column("grid")
    columns = dict.fromkeys(f"{target:g}" for target in (settings.target, COARSE))
    for target in columns:
        table.add_column(f"rounds to {target}", justify="right")
    for header in ("variance at the end", "by theory", "vectors sent", "certified"):
        table.add_column(header, justify="right")
    for result in results:
        end, theory = result.variance[-1], result.theory
        sent = sum(float(run.vectors.mean()) for run in result.runs) / len(result.runs)
        exact = sum(float(run.exact[-len(result.settings.grid) :].max()) for run in result.runs) / len(result.runs)
        table.add_row(
            result.settings.policy,
            "x".join(map(str, result.settings.grid)) if result.settings.has_grid else "",
            *(_rounds(result, float(target)) for target in columns),
            f"{end:.1e}",
            "" if theory is None else f"{theory[-1]:.1e}",
            f"{sent:.2f}",
            f"{exact:.0%}" if result.settings.policy == "moshpit" else "",
        )
    console.print(table)
    console.print(
        "Variance of the peers' values, 1 at the start. Vectors: sent by a peer in a round, on average. Certified: "
        "peers that know in the last cycle that they hold the exact mean.",
        style="dim",
        highlight=False,
    )


def describe(settings: Settings) -> str:
    """Return in a line what is simulated."""
    parts = [f"{settings.n_peers} peers", f"groups of {settings.group_size}"]
    if settings.shape:
        parts[1] = f"grid {'x'.join(map(str, settings.shape))}"
    for share, what in (
        (settings.absent, "absent in each round"),
        (settings.mid_round, "lost in the middle of each"),
        (settings.churn, "replaced after each"),
    ):
        if share:
            parts.append(f"{100 * share:g}% {what}")
    return ", ".join(parts)


def _rounds(result: Result, target: float) -> str:
    reached, repeat = result.n_reached(target), result.settings.repeat
    if not reached:
        return f"over {result.settings.rounds}"
    mean = f"{result.rounds_to(target):.1f}"
    return mean if reached == repeat else f"over {mean} ({reached} of {repeat})"


def show_paper_rows(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the paper's table: what comes out here, and in brackets what was printed there."""
    names = list(dict.fromkeys(name for row in rows for name in row.measured))
    table = Table(box=None, pad_edge=False)
    for header in ("peers", "grid", "absent", *names):
        table.add_column(header, justify="left" if header == "grid" else "right")
    for row in rows:
        cells = [_both(row.measured.get(name), row.printed.get(name)) for name in names]
        table.add_row(str(row.n_peers), "x".join(map(str, row.shape)), f"{row.absent:g}", *cells)
    console = console or Console()
    console.print(
        "Rounds to a variance of 1e-9, mean of 10 swarms, 50 at most; in brackets what the paper's program prints."
    )
    console.print(table)


def _both(measured: Rounds | None, printed: Rounds | None) -> str:
    if measured is None:
        return ""
    return f"{measured[0]:.1f}" + (f" ({printed[0]:.1f})" if printed else "")


def to_csv(results: Sequence[Result]) -> str:
    """Return one line for each policy and round, means over the repeats, round 0 being the start."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    for result in results:
        s = result.settings
        errors = [float(sum(run.error[t] for run in result.runs) / len(result.runs)) for t in range(s.rounds)]
        for number, variance in enumerate(result.variance.tolist()):
            expected = "" if result.theory is None else float(result.theory[number])
            error = errors[number - 1] if number else variance
            writer.writerow([s.policy, s.n_peers, s.absent, s.mid_round, s.churn, number, variance, expected, error])
    return text.getvalue()
