"""What `mpd status`, `rounds` and `peers` look like to a person: rich tables of the very JSON that `--json` prints."""

import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpd.seal import NO_SEAL

_SHORT_ID_CHARS = 8


def show_status(status: dict[str, Any], console: Console | None = None) -> None:
    """Print the answer of `mpd status`."""
    console = console or Console()
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column()
    facts.add_row("peer", status["peer_id"])
    facts.add_row("listens on", _plain(status["listen"] + _reachability(status)))
    facts.add_row("swarm", _swarm(status["swarm"]))
    facts.add_row("others", _others(status))
    facts.add_row("links", f"{status['links']} open, {_sealing(status['suites'])}")
    facts.add_row("up", f"{_duration(status['uptime_s'])}, mpd {status['version']}")
    for entry in status["dht"]["bootstrap"]:
        facts.add_row("bootstrap", _plain(f"{entry['address']}: {entry['state']}"))
    for name, budget in status["budgets"].items():
        if budget["refused"] or budget["used"] >= budget["limit"]:
            facts.add_row("limit", _plain(_pressed(name, budget), "yellow"))
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


def _swarm(swarm: dict[str, Any]) -> Text:
    if swarm["open"]:
        return Text("open: anyone who reaches a daemon of it can take part", "yellow")
    left = _duration(max(0, swarm["expires_in_s"]))
    return _plain(f"{swarm['name']} ({swarm['id']}), as {swarm['role']}; certificate for {left}")


def _others(status: dict[str, Any]) -> str:
    n_peers = status["dht"]["peers"]
    return f"{n_peers} daemon{'s' * (n_peers != 1)} known" if n_peers else "none known yet"


def _sealing(suites: list[str]) -> str:
    return "[yellow]tensors in the clear[/yellow]" if suites == [NO_SEAL] else f"sealed with {suites[0]}"


def _pressed(name: str, budget: dict[str, int]) -> str:
    return f"{name.replace('_', ' ')}: {budget['used']} of {budget['limit']} in use, refused {budget['refused']} times"


def _bytes(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024 or unit == "GiB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
