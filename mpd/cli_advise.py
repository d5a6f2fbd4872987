"""`mpd simulate --advise`: how long a swarm takes, and which group size it should use. Also `mpd advise`.

`WithAdvice` makes the one out of the other: a command that hands its arguments over where --advise is among them.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpd.cli_options import JSON
from mpd.errors import LocalError

if TYPE_CHECKING:
    from mpd.advise import Advice, Alternative


class WithAdvice(click.Command):
    """A command with an --advise, which makes it `advise` with all other arguments."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if "--advise" in args:
            rest = [arg for arg in args if arg != "--advise"]
            # Whoever called us goes on with our own `invoke`, which finds the other command in the context.
            return advise.make_context(f"{info_name} --advise", rest, parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that the context belongs to."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


@click.command()
@click.option("--peers", type=int, required=True, help="How many peers there are.")
@click.option("--vector", required=True, metavar="SIZE", help="What each averages: 400MiB, for example.")
@click.option("--bandwidth", default="100", show_default=True, metavar="DIST", help="Of their lines, in Mbit/s.")
@click.option("--upload", default="", metavar="DIST", help="Where it differs: what a peer sends, in Mbit/s.")
@click.option("--latency", default="40", show_default=True, metavar="DIST", help="Round trips, in milliseconds.")
@click.option("--target", type=float, default=1e-4, show_default=True, help="The variance to reach; it starts at 1.")
@click.option("--fail", type=float, default=0.0, help="Probability that a peer misses a round.")
@click.option("--mid-round", type=float, default=0.0, help="That its machine is lost in the middle of one.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of all draws.")
@click.option("--costs", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="JSON from a calibration.")
@JSON
def advise(
    peers: int,
    vector: str,
    bandwidth: str,
    upload: str,
    latency: str,
    target: float,
    fail: float,
    mid_round: float,
    seed: int,
    costs: Path | None,
    as_json: bool,
) -> None:
    """Recommend a group size, and say how long the swarm takes to agree.

    \b
    Examples:
      mpd advise --peers 5000 --bandwidth lognormal:200,0.8 --vector 400MiB
      mpd advise --peers 64 --bandwidth 500 --upload uniform:20,50 --vector 1GiB --json

    A DIST is constant:VALUE (or just VALUE), uniform:LOW,HIGH or lognormal:MEDIAN,SIGMA. No daemon is touched.
    """
    from mpd.advise import Question
    from mpd.advise import advise as answer
    from mpd.costs import Costs
    from mpd.quantities import parse_distribution, parse_size

    try:
        down = parse_distribution(bandwidth, "bandwidth")
        question = Question(
            n_peers=peers,
            vector_bytes=parse_size(vector),
            upload=parse_distribution(upload, "upload") if upload else down,
            download=down,
            latency=parse_distribution(latency, "latency", zero=True),
            same_line=not upload,
            target=target,
            absent=fail,
            mid_round=mid_round,
            seed=seed,
        )
        prices = Costs.from_json(_read(costs)) if costs else Costs()
    except LocalError as error:
        raise click.UsageError(str(error)) from None
    advice = answer(question, prices)
    if as_json:
        click.echo(json.dumps(to_json(advice), indent=2))
    else:
        click.echo(to_text(advice))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise LocalError(f"costs {str(path)!r} cannot be read as JSON: {error}") from None
    values = found.get("costs", found) if isinstance(found, dict) else None
    if not isinstance(values, dict):
        raise LocalError(f"costs {str(path)!r}: an object of names and numbers expected")
    return values


def to_json(advice: "Advice") -> dict[str, Any]:
    """Return the advice as JSON can say it; what was not reached is null."""
    import math
    from dataclasses import asdict

    def plain(each: "Alternative") -> dict[str, Any]:
        values = {**asdict(each), "limit": each.limit}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }

    question = asdict(advice.question)
    lines = {name: str(getattr(advice.question, name)) for name in ("upload", "download", "latency")}
    return {
        "question": {**question, **lines},
        "best": plain(advice.best),
        "reasons": list(advice.reasons),
        "alternatives": [plain(each) for each in advice.alternatives],
    }


def to_text(advice: "Advice") -> str:
    """Return the advice as people read it."""
    import math

    from mpd.quantities import show_size

    best = advice.best
    shape = "x".join(map(str, best.shape))
    text = [
        f"Use group_size={best.group_size}: grid {shape}, {best.rounds_per_step} rounds per exact step.",
        f"  {best.step_s:.1f} s per step; {best.target_s:.1f} s until 95 % of the peers hold a mean of variance "
        f"{advice.question.target:g}; {show_size(best.target_bytes)} sent by a peer; {best.limit} is what limits it.",
        "",
        *(f"  * {reason}" for reason in advice.reasons),
        "",
        f"  {'policy':<10} {'group':>6} {'grid':>14} {'rounds':>7} {'s/round':>9} {'s to target':>12} {'sent':>9}"
        "  limit",
    ]
    for each in advice.alternatives:
        mark = "*" if each is best else " "
        reached = math.isfinite(each.target_s)
        text.append(
            f"{mark} {each.policy:<10} {each.group_size:>6} {'x'.join(map(str, each.shape)) or '-':>14} "
            f"{each.target_rounds if reached else '-':>7} {each.round_s:>9.1f} "
            f"{f'{each.target_s:.1f}' if reached else 'never':>12} "
            f"{show_size(each.target_bytes) if reached else '-':>9}  {each.limit}"
        )
    return "\n".join(text)
