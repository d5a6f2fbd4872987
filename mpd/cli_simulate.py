"""`mpd simulate`: how fast a swarm of any size agrees, under any policy. What it computes is in `mpd.simulate`."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpd.cli_advise import WithAdvice
from mpd.cli_options import JSON
from mpd.errors import LocalError

if TYPE_CHECKING:
    from rich.progress import Progress

_SHAPE = re.compile(r"[0-9]{1,7}(x[0-9]{1,7})*", re.ASCII)
_COMPARED = "moshpit,paper-grid,random,allreduce,gossip,chebyshev,pushsum,pairs"


class _Shape(click.ParamType[tuple[int, ...]]):
    """Cells per axis: 32x32, 8x8x8."""

    name = "MxM.."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if not _SHAPE.fullmatch(value):
            self.fail(f"{value!r} is not a shape: 32x32 or 8x8x8, for example", param, ctx)
        return tuple(int(side) for side in value.split("x"))


class _Names(click.ParamType[tuple[str, ...]]):
    """Policies, separated by commas."""

    name = "NAME,.."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        from mpd.simulate import POLICIES

        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
        if unknown := [name for name in names if name not in POLICIES]:
            self.fail(f"{unknown[0]!r} is no policy: one of {', '.join(POLICIES)} expected", param, ctx)
        return names


class _Picture(click.ParamType[Path]):
    """A file that a picture can be written to, as far as that can be known before."""

    name = "FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from mpd.plots import KINDS

        path = Path(value)
        if path.suffix.lower() not in KINDS:
            self.fail(f"{str(path)!r} must end in one of {', '.join(KINDS)}", param, ctx)
        if path.is_dir() or not path.parent.is_dir():
            self.fail(f"{str(path)!r} cannot be written: its folder does not exist, or it is one", param, ctx)
        return path


PROBABILITY = click.FloatRange(0, 1)


@click.command(cls=WithAdvice)
@click.option("--peers", type=int, default=512, show_default=True, help="How many peers there are, up to 1048576.")
@click.option("--group-size", type=int, default=16, show_default=True, help="How many average together.")
@click.option("--shape", type=_Shape(), help="A grid of this shape, instead of one that fits the group size.")
@click.option("--policy", "policies", type=_Names(), default=_COMPARED, show_default=True, help="What to compare.")
@click.option("--fail", type=PROBABILITY, default=0.0, help="Probability that a peer misses a round.")
@click.option("--mid-round", type=PROBABILITY, default=0.0, help="That it is lost in the middle of one, at any chunk.")
@click.option("--churn", type=PROBABILITY, default=0.0, help="That it leaves after a round, and a newcomer comes.")
@click.option("--rounds", type=click.IntRange(1, 100_000), default=50, show_default=True, help="How many to simulate.")
@click.option("--target", type=float, default=1e-9, show_default=True, help="The variance to reach; it starts at 1.")
@click.option("--repeat", type=click.IntRange(1, 100_000), default=10, show_default=True, help="How many swarms.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of the first swarm.")
@click.option("--legacy-random", is_flag=True, help="Draw as the paper's own simulation does.")
@click.option("--paper-table", is_flag=True, help="Reproduce the paper's table instead; takes a minute.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV: one line for each policy and round.")
@JSON
@click.option("--plot", type=_Picture(), help="Draw the variance over the rounds: .png, .svg or .pdf. Needs mpd[plot].")
def simulate(
    peers: int,
    group_size: int,
    shape: tuple[int, ...] | None,
    policies: tuple[str, ...],
    fail: float,
    mid_round: float,
    churn: float,
    rounds: int,
    target: float,
    repeat: int,
    seed: int,
    legacy_random: bool,
    paper_table: bool,
    as_csv: bool,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Simulate how fast a swarm agrees: rounds until all peers hold nearly the same, under several policies.

    \b
    Examples:
      mpd simulate --peers 1000 --group-size 16
      mpd simulate --peers 512 --group-size 32 --fail 0.01 --plot 512.svg
      mpd simulate --peers 1024 --shape 32x32 --policy moshpit,paper-grid,random --mid-round 0.02
      mpd simulate --peers 1000000 --group-size 32 --policy moshpit --rounds 20 --repeat 1
      mpd simulate --advise --peers 5000 --bandwidth lognormal:200,0.8 --vector 400MiB

    With --advise it counts seconds instead of rounds and recommends a group size (`mpd simulate --advise --help`).

    It touches no daemon and no network, and uses the grid, the moves and the masses that daemons use.
    """
    from mpd.plots import load_matplotlib, plot_results
    from mpd.show_simulation import describe, show_results, to_csv
    from mpd.simulate import Result, Settings, compare, summary

    if as_csv and as_json:
        raise click.UsageError("--csv and --json: one of them at a time")
    if paper_table:
        _show_paper_table(as_json)
        return
    if plot is not None:
        load_matplotlib()
    results: list[Result] = []
    try:
        first, *_ = all_settings = [
            Settings(
                n_peers=peers, policy=policy, group_size=group_size, shape=shape, absent=fail, mid_round=mid_round,
                churn=churn, rounds=rounds, target=target, repeat=repeat, seed=seed, legacy_random=legacy_random,
            )
            for policy in policies
        ]  # fmt: skip
    except LocalError as error:
        raise click.UsageError(str(error)) from None
    with progress_bars() as bars:
        for settings in all_settings:
            bar = bars.add_task(settings.policy, total=repeat * rounds)
            results += compare(settings, [settings.policy], lambda bar=bar: bars.advance(bar))  # type: ignore[misc]
            bars.remove_task(bar)
    if as_json:
        click.echo(json.dumps([summary(result) for result in results], indent=2))
    elif as_csv:
        click.echo(to_csv(results), nl=False)
    else:
        show_results(results)
    if plot is not None:
        try:
            plot_results(results, plot, describe(first))
        except OSError as error:
            raise LocalError(f"the plot {str(plot)!r} cannot be written: {error}") from error
        click.echo(f"The plot is in {plot}.", err=True)


def progress_bars() -> "Progress":
    """Return progress bars on stderr, which leave nothing behind and stay away where nobody looks."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _show_paper_table(as_json: bool) -> None:
    from dataclasses import asdict

    from mpd.paper import n_rounds, reproduce
    from mpd.show_simulation import show_paper_rows

    with progress_bars() as bars:
        bar = bars.add_task("the paper's table", total=n_rounds())
        rows = list(reproduce(lambda: bars.advance(bar)))
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show_paper_rows(rows)
