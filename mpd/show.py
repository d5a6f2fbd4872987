"""What `mpd status`, `rounds` and `peers` look like to a person: rich tables of the very JSON that `--json` prints."""

import datetime
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mpd.findings import NOT_CHECKED, OK, PROBLEM, WARNING, Finding
from mpd.seal import NO_SEAL

_SHORT_ID_CHARS = 8
_MAX_RUN_CHARS = 24
_RUN_COLUMN = {"run": 0, "at": 1}  # by the first column's head
_GAP = "  "
_INDENT = 10  # below what stands right of the time


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
    console.print()
    heads = ("run", "size", "shape", "key", "peers", "trainers", "rounds")
    rows: list[Row] = [
        (
            _plain(run["name"]),
            Text(_bytes(run["bytes"])),
            Text("x".join(map(str, run["shape"])) or "-"),
            Text(",".join(map(str, run["key"])) or "-"),
            Text(str(run["peers"])),
            Text(str(run["trainers"])),
            Text(str(run["rounds"])),
        )
        for run in status["runs"]
    ]
    _print_rows(console, heads, rows, [_about_run(run) for run in status["runs"]], right={1, 4, 5, 6})


def show_rounds(rounds: list[dict[str, Any]], console: Console | None = None) -> None:
    """Print the answer of `mpd rounds`: a line for each round, and below it why it was not perfect, if it was not."""
    console = console or Console()
    if not rounds:
        console.print("No round has begun yet.")
        return
    heads = ("at", "run", "averaged", "seconds", "sent", "received", "group")
    rows: list[Row] = []
    below: list[Lines] = []
    for entry in rounds:
        cells = [
            Text(_clock(entry["at"])),
            _plain(entry["run"]),
            _averaged(entry),
            Text(f"{entry['seconds']:.3f}"),
            Text(_bytes(entry["bytes_sent"])),
            Text(_bytes(entry["bytes_received"])),
            Text(" ".join(_short(peer) for peer in entry["group"]) or "-"),
        ]
        rows.append(tuple(cells))
        below.append(_causes(entry))
    _print_rows(console, heads, rows, below, right={3, 4, 5})


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


_STYLES = {PROBLEM: "red", WARNING: "yellow", OK: "green", NOT_CHECKED: "dim"}


def show_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Print what `mpd doctor` has found: a sentence for each check, and below it what to do."""
    console = console or Console()
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for each in findings:
        grid.add_row(Text(each.verdict, _STYLES.get(each.verdict, "")), _plain(each.check), _plain(each.says))
        if each.advice:
            grid.add_row("", "", _plain(f"-> {each.advice}", "cyan"))
    console.print(grid)
    console.print()
    counts = [(sum(each.verdict == verdict for each in findings), verdict) for verdict in _STYLES]
    plural = {PROBLEM: "problems", WARNING: "warnings"}
    said = [f"{n} {plural.get(v, v) if n != 1 else v}" for n, v in counts if n]
    console.print(", ".join(said))


Row = tuple[Text, ...]
Lines = list[tuple[Text, Text]]  # a label and a sentence


def _print_rows(console: Console, heads: Sequence[str], rows: list[Row], below: list[Lines], right: set[int]) -> None:
    """Print `rows` in columns, and below each one its sentences, indented.

    Columns that do not fit into the terminal are left out from the right; a group goes below then, where it changes.
    """
    widths = [max([len(head), *(row[i].cell_len for row in rows)]) for i, head in enumerate(heads)]
    widths[_RUN_COLUMN[heads[0]]] = min(widths[_RUN_COLUMN[heads[0]]], _MAX_RUN_CHARS)
    n_columns = len(heads)
    while n_columns > 1 and sum(widths[:n_columns]) + len(_GAP) * (n_columns - 1) > console.width:
        n_columns -= 1
    group_above = ""
    for cells, lines in zip([tuple(Text(head, "bold") for head in heads), *rows], [[], *below], strict=True):
        line = Text(_GAP).join(_fitted(cells[i], widths[i], i in right) for i in range(n_columns))
        line.rstrip()
        console.print(line)
        rest = []
        if heads[-1] == "group" and n_columns < len(heads) and cells[-1].plain not in ("-", "group", group_above):
            rest, group_above = [(Text("group"), cells[-1])], cells[-1].plain
        if rest or lines:
            grid = Table.grid(padding=(0, len(_GAP), 0, 0))
            grid.add_column(no_wrap=True)
            grid.add_column(overflow="fold")
            for label, sentence in (*rest, *lines):
                grid.add_row(label, sentence)
            console.print(Padding(grid, (0, 0, 0, _INDENT)))


def _fitted(cell: Text, width: int, is_right: bool) -> Text:
    cell = cell.copy()
    cell.truncate(width, overflow="ellipsis")
    cell.align("right" if is_right else "left", width)
    return cell


def _about_run(run: dict[str, Any]) -> Lines:
    """Return what there is to say about a run: what it does, who is not there, and what went wrong last."""
    lines = [(Text("now"), _plain(run["state"])), (Text("shape"), _about_shape(run["elastic"]))]
    lines += [
        (Text("terms"), _plain(f"{_short(peer)} uses other terms: {why}", "yellow"))
        for peer, why in run["other_terms"].items()
    ]
    lines += [(Text("absent"), _plain(f"{_short(peer)}: {why}", "yellow")) for peer, why in run["absent"].items()]
    last = run["last_imperfect"]
    if last is not None:
        result = f"averaged {_averaged(last).plain}" if last["averaged"] else "did not average"
        lines.append((Text("last not perfect"), Text(f"{_clock(last['at'])}, {result}")))
        lines += [(Text.assemble("  ", label), sentence) for label, sentence in _causes(last)]
    return lines


def _about_shape(elastic: dict[str, Any]) -> Text:
    """Return which shape a run has, and what its cycles say about it."""
    if not elastic["epoch"]:
        return _plain(elastic["says"])
    made_for = f"number {elastic['epoch']}, made for {elastic['n_peers']} peers"
    if elastic["next"] is not None:
        return _plain(f"{made_for}; {'x'.join(map(str, elastic['next']))} comes next", "yellow")
    return _plain(f"{made_for}; {elastic['says']}")


def _causes(entry: dict[str, Any]) -> Lines:
    """Return why a round was not perfect: one line for each cause."""
    lines = []
    if entry["reason"]:
        often = f" ({entry['times']} times)" if entry["times"] > 1 else ""
        lines.append((Text("why"), _plain(entry["reason"] + often, "red" if not entry["averaged"] else "")))
    lines += [(_plain(_short(who)), _plain(why, "yellow")) for who, why in entry["missing"].items()]
    lines += [(Text("note"), _plain(note)) for note in entry["notes"]]
    return lines


def _averaged(entry: dict[str, Any]) -> Text:
    if not entry["averaged"]:
        return Text("no", "red")
    return Text(f"{len(entry['contributors'])} of {len(entry['group'])}", "" if entry["perfect"] else "yellow")


def _short(who: str) -> str:
    """Return as much of a peer's id as tells it from others; a trainer keeps its label."""
    return who if " " in who else who[:_SHORT_ID_CHARS]


def _clock(at: float) -> str:
    return f"{datetime.datetime.fromtimestamp(at, tz=datetime.UTC).astimezone():%H:%M:%S}"


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
