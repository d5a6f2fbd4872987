"""What `mpd status`, `rounds` and `peers` look like to a person: rich tables of the very JSON that `--json` prints."""

import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_SHORT_ID_CHARS = 8


def show_status(status: dict[str, Any], console: Console | None = None) -> None:
    """Print the answer of `mpd status`."""
    console = console or Console()
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column()
    facts.add_row("peer", status["peer_id"])
    facts.add_row("listens on", _plain(status["listen"] + _reachability(status)))
    facts.add_row("swarm", _swarm(status))
    facts.add_row("links", f"{status['links']} open, " + ("sealed" if status["sealed"] else "in the clear"))
    facts.add_row("up", f"{_duration(status['uptime_s'])}, mpd {status['version']}")
    for entry in status["dht"]["bootstrap"]:
        facts.add_row("bootstrap", _plain(f"{entry['address']}: {entry['state']}"))
    for problem in (status["problem"], status["dht"]["problem"]):
        if problem:
            facts.add_row("problem", _plain(problem, "red"))
    console.print(facts)
    if not status["runs"]:
        console.print("\nNo trainer is attached. In a training script: mpd.client.connect().averager(...)")
        return
    runs = Table(title="runs", title_justify="left")
    for name in ("run", "size", "shape", "key", "peers", "trainers", "rounds", "state"):
        runs.add_column(name, justify="right" if name in ("size", "peers", "trainers", "rounds") else "left")
    for run in status["runs"]:
        runs.add_row(
            _plain(run["name"]),
            _bytes(run["bytes"]),
            "x".join(map(str, run["shape"])) or "-",
            ",".join(map(str, run["key"])) or "-",
            str(run["peers"]),
            str(run["trainers"]),
            str(run["rounds"]),
            _plain(run["state"]),
        )
    console.print()
    console.print(runs)
    for run in status["runs"]:
        for peer, difference in run["other_terms"].items():
            console.print(_plain(f"{run['name']}: {peer} uses other terms: {difference}", "yellow"))


def show_rounds(rounds: list[dict[str, Any]], console: Console | None = None) -> None:
    """Print the answer of `mpd rounds`."""
    console = console or Console()
    if not rounds:
        console.print("No round has begun yet.")
        return
    table = Table()
    for name in ("at", "run", "group", "averaged", "seconds", "sent", "received", "reason"):
        table.add_column(name, justify="right" if name in ("seconds", "sent", "received") else "left")
    for entry in rounds:
        at = datetime.datetime.fromtimestamp(entry["at"], tz=datetime.UTC).astimezone()
        missing = [f"{peer[:_SHORT_ID_CHARS]}: {why}" for peer, why in entry["missing"].items()]
        table.add_row(
            f"{at:%H:%M:%S}",
            _plain(entry["run"]),
            " ".join(peer[:_SHORT_ID_CHARS] for peer in entry["group"]),
            f"{len(entry['contributors'])} of {len(entry['group'])}" if entry["averaged"] else "[red]no[/red]",
            f"{entry['seconds']:.3f}",
            _bytes(entry["bytes_sent"]),
            _bytes(entry["bytes_received"]),
            _plain("; ".join([entry["reason"], *missing] if entry["reason"] else missing)),
        )
    console.print(table)


def show_peers(peers: list[dict[str, Any]], console: Console | None = None) -> None:
    """Print the answer of `mpd peers`."""
    console = console or Console()
    if not peers:
        console.print("No link is open. Links open when peers meet in a run.")
        return
    table = Table()
    for name in ("peer", "address", "goodput", "sent", "received", "in rounds"):
        table.add_column(name, justify="left" if name in ("peer", "address") else "right")
    for peer in peers:
        table.add_row(
            peer["peer"],
            _plain(peer["address"]),
            f"{_bytes(peer['goodput'])}/s" if peer["goodput"] else "-",
            _bytes(peer["bytes_sent"]),
            _bytes(peer["bytes_received"]),
            str(peer["rounds"]),
        )
    console.print(table)


def _plain(text: str, style: str = "") -> Text:
    """Return `text`, which anybody may have written, as characters that command neither rich nor a terminal."""
    return Text("".join(c if c.isprintable() else "?" for c in text), style)


def _reachability(status: dict[str, Any]) -> str:
    if status["announce"] is None:
        return " (outbound only)"
    announced = "" if status["announce"] == status["listen"] else f", announced as {status['announce']}"
    return announced + ("" if status["reachable"] else ", not yet known to be reachable")


def _swarm(status: dict[str, Any]) -> str:
    n_peers = status["dht"]["peers"]
    return f"{n_peers} other daemon{'s' * (n_peers != 1)} known" if n_peers else "no other daemon known yet"


def _bytes(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024 or unit == "GiB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
