"""`mpd chaos`: break a swarm on purpose and see what it keeps. As in `cli.py`, other rooms are imported inside."""

import json
import re
import secrets
import shutil
import signal
import threading
from typing import Any

import click

from mpd.cli_options import JSON

_SIZE = re.compile(r"([0-9]{1,9})(B|KiB|MiB|GiB)?", re.ASCII)
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_MAX_BYTES = 1 << 30  # per machine, and all of them are this one
_FAULTS = "kill,term,leave,freeze,slow,trainer,join"


class _Size(click.ParamType[int]):
    """A number of bytes: 65536, 64KiB, 1MiB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = _SIZE.fullmatch(value)
        n_bytes = int(found[1]) * _UNITS[found[2] or "B"] if found else 0
        if not 0 < n_bytes <= _MAX_BYTES:
            self.fail(f"{value!r} is not a size up to 1GiB: 64KiB or 1MiB, for example", param, ctx)
        return n_bytes


class _Pause(click.ParamType[tuple[float, float]]):
    """Seconds, or a range of them: 30, 0.5-2."""

    name = "SECONDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        try:
            low, _, high = value.partition("-")
            pause = float(low), float(high or low)
        except ValueError:
            pause = 0.0, 0.0
        if not 0.1 <= pause[0] <= pause[1] <= 3600:
            self.fail(f"{value!r} is neither seconds nor a range of them: 30 or 0.5-2, for example", param, ctx)
        return pause


@click.command()
@click.option("--peers", type=click.IntRange(2, 16), default=4, show_default=True, help="How many machines to play.")
@click.option("--faults", default=_FAULTS, show_default=True, help="What may go wrong.")
@click.option(
    "--minutes", type=click.FloatRange(0.05, 24 * 60), default=1.0, show_default=True, help="How long things go wrong."
)
@click.option("--every", type=_Pause(), default="10", show_default=True, help="Between two faults: 30, or 0.5-2.")
@click.option("--seed", type=click.IntRange(min=0), help="The same one gives the same plan.  [default: any]")
@click.option("--size", type=_Size(), default="1MiB", show_default=True, help="Of what each machine averages.")
@click.option(
    "--train",
    type=click.FloatRange(0, 3600),
    default=0.5,
    show_default=True,
    help="Seconds that each trainer trains between two steps.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1, 3600),
    default=20.0,
    show_default=True,
    help="Seconds that a step may take.",
)
@click.option(
    "--quiet",
    type=click.FloatRange(0, 3600),
    help="Seconds without faults before and after, to compare with.  [default: a tenth of the time, 5 to 60]",
)
@JSON
def chaos(
    peers: int,
    faults: str,
    minutes: float,
    every: tuple[float, float],
    seed: int | None,
    size: int,
    train: float,
    timeout: float,
    quiet: float | None,
    as_json: bool,
) -> None:
    """Start a swarm on this machine, break it on purpose, and report what held.

    \b
    Examples:
      mpd chaos
      mpd chaos --peers 8 --minutes 30 --every 30 --seed 7
      mpd chaos --faults kill,freeze --every 0.5-2 --json

    It has nothing to do with the daemon of this machine, and leaves nothing behind. Exit code 0 if every promise was
    kept, 1 if not. Ctrl-C ends it early, with a report.
    """
    from mpd.client.chaos import run_chaos
    from mpd.client.chaos_judge import judge
    from mpd.client.chaos_plan import KINDS, Settings
    from mpd.client.chaos_report import as_json as to_json
    from mpd.client.chaos_report import as_text

    kinds = tuple(kind.strip() for kind in faults.split(","))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(KINDS)}", param_hint="--faults")
    settings = Settings(
        peers=peers,
        kinds=kinds,
        chaos_s=60 * minutes,
        every_s=every,
        seed=secrets.randbelow(1 << 31) if seed is None else seed,
        size_bytes=size,
        train_s=train,
        timeout_s=timeout,
        quiet_s=min(max(6 * minutes, 5.0), 60.0) if quiet is None else quiet,
    )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    seen, home = run_chaos(settings, lambda line: click.echo(line, err=True), stop)
    findings = judge(seen)
    if findings.held:
        shutil.rmtree(home, ignore_errors=True)
    else:
        click.echo(f"The daemons' logs are in {home}.", err=True)
    if as_json:
        click.echo(json.dumps(to_json(seen, findings), indent=2))
    else:
        click.echo(f"\n{as_text(seen, findings)}")
    if not findings.held:
        click.get_current_context().exit(1)
