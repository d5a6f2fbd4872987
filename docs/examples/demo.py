"""Four machines on one: what mpd is good for, to be seen in a minute.

Every peer is a daemon of its own (`mpd join`, its own state, socket and port) with a trainer of `digits.py` beside it,
and nothing is shared between peers but the network. First each peer trains alone and one trainer gets everyone's
images: the floor and the ceiling. Then the same four train together through their daemons.

    python docs/examples/demo.py

This file only starts processes, watches what they print and stops them again, whatever happens.
"""

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table

PEERS = 4
NAMES = [f"peer {index}" for index in range(PEERS)]
STOP_S = 5  # what a process gets to leave by itself before it is killed
PATIENCE_S = 60  # how long each stage may take
NEAR = 0.03  # how close to a trainer with all data every peer has to come
FAR = 0.20  # and how far above what it learns alone
MPD = Path(sys.executable).with_name("mpd")
DIGITS = Path(__file__).with_name("digits.py")

console = Console()


class Failed(Exception):
    """The demo cannot go on; the message is one sentence for whoever watches."""


class Process:
    """A child process: its output arrives as JSON events if it prints any, its errors go to a log file."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name = name
        self.log = log
        self.events: list[dict[str, Any]] = []
        # A session of its own keeps Ctrl+C from reaching the child before we have stopped it in order.
        with log.open("w") as errors:
            self._child = subprocess.Popen(
                command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith("{"):
                self.events.append({"at": time.monotonic(), **json.loads(line)})

    def last(self, event: str) -> dict[str, Any] | None:
        """Return the newest event of that kind, or None."""
        return next((seen for seen in reversed(self.events) if seen["event"] == event), None)

    def go(self) -> None:
        """Send the line that a trainer started with --hold waits for."""
        assert self._child.stdin is not None
        self._child.stdin.write("go\n")
        self._child.stdin.flush()

    def check(self) -> None:
        """Raise Failed if the process has ended badly."""
        if code := self._child.poll():
            lines = self.log.read_text().strip().splitlines() or ["it said nothing"]
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            raise Failed(f"{self.name} ended with {how}; the last it said was: {lines[-1]}")

    def left(self) -> bool:
        """Return whether the process has ended and all it printed has been read."""
        return self._child.poll() is not None and not self._reader.is_alive()

    def terminate(self) -> None:
        """Ask the process to end."""
        if self._child.poll() is None:
            self._child.terminate()

    def reap(self, deadline: float) -> None:
        """Wait for the process until `deadline`, then kill it."""
        try:
            self._child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


@contextlib.contextmanager
def stopping(processes: list[Process]) -> Iterator[None]:
    """Stop all `processes`, those started meanwhile included, on every way out."""
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + STOP_S
        for process in processes:
            process.reap(deadline)


def wait_until(what: str, met: Callable[[], bool], running: list[Process]) -> None:
    """Poll `met` until it is true. Raises Failed after a while, or when one of `running` ends badly."""
    deadline = time.monotonic() + PATIENCE_S
    while not met():
        for process in running:
            process.check()
        if time.monotonic() > deadline:
            raise Failed(f"there were no {what} after {PATIENCE_S} s")
        time.sleep(0.05)


# ---- daemons


def status(socket: Path) -> dict[str, Any] | None:
    """Return what `mpd status --json` says at `socket`, or None while no daemon answers there."""
    answer = subprocess.run([MPD, "status", "--socket", socket, "--json"], capture_output=True, text=True, check=False)
    return json.loads(answer.stdout) if answer.returncode == 0 else None


def start_daemons(home: Path, running: list[Process]) -> list[Path]:
    """Start one daemon per peer, each bootstrapped from the first; return their sockets once all know another."""
    sockets = [home / f"{index}.sock" for index in range(PEERS)]
    bootstrap: list[str] = []
    for index, socket in enumerate(sockets):
        command = [str(MPD), "join", "--listen", "127.0.0.1:0", "--socket", str(socket)]
        command += ["--state-dir", str(home / f"state{index}"), *bootstrap]
        running.append(Process(f"the daemon of {NAMES[index]}", command, home / f"daemon{index}.log"))
        if index == 0:
            wait_until("answers from the first daemon", lambda: status(sockets[0]) is not None, running)
            bootstrap = ["--bootstrap", (status(sockets[0]) or {})["listen"]]

    def all_met() -> bool:
        return all((status(socket) or {"dht": {"peers": 0}})["dht"]["peers"] for socket in sockets)

    wait_until("daemons that know each other", all_met, running)
    return sockets


# ---- trainers


def train(
    home: Path, plans: dict[str, list[str]], shared: list[str], running: list[Process], title: str
) -> dict[str, Process]:
    """Run one trainer per plan (name: arguments), all let go at once; return them when every one has finished."""
    trainers: dict[str, Process] = {}
    for name, arguments in plans.items():
        out = home / f"{title} {name}"
        command = [sys.executable, str(DIGITS), "--json", "--hold", "--out", str(out), *shared, *arguments]
        trainers[name] = Process(f"the trainer of {name}", command, out.with_suffix(".log"))
        running.append(trainers[name])

    wait_until("trainers ready to start", lambda: all(t.last("ready") for t in trainers.values()), running)
    for trainer in trainers.values():
        trainer.go()

    with contextlib.ExitStack() as stack:
        live = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None

        def all_done() -> bool:
            if live:
                live.update(progress(title, trainers), refresh=True)
            return all(trainer.left() for trainer in trainers.values())

        wait_until("trainers that finished", all_done, running)
    if not live:
        console.print(progress(title, trainers))
    return trainers


def progress(title: str, trainers: dict[str, Process]) -> Table:
    """Return a table of where each trainer is."""
    table = Table(title=title, title_justify="left")
    for column in ("", "round", "accuracy", "before averaging", "last outcome"):
        table.add_column(column, justify="left" if column in ("", "last outcome") else "right")
    for name, trainer in trainers.items():
        now = trainer.last("round")
        if now is None:
            table.add_row(name, "", "", "", "starting")
            continue
        outcome = "alone"
        if "averaged" in now:
            outcome = f"{now['peers']} peers, {now['seconds'] * 1000:.0f} ms" if now["averaged"] else now["reason"]
        before = f"{now['before']:.1%}" if "before" in now else ""
        table.add_row(name, str(now["round"]), f"{now['accuracy']:.1%}", before, outcome)
    return table


# ---- results


def summary(home: Path, alone: dict[str, Process], together: dict[str, Process]) -> dict[str, Any]:
    """Return what the demo found, from the trainers' events and files."""
    done = {name: trainer.last("done") or {} for name, trainer in together.items()}
    ready = {name: trainer.last("ready") or {} for name, trainer in together.items()}
    rounds = [event for trainer in together.values() for event in trainer.events if event["event"] == "round"]
    vectors = [np.load(home / f"together {name}.npy") for name in NAMES]  # each (n_parameters,) float32
    floor = {name: trainer.last("done") or {} for name, trainer in alone.items()}
    return {
        "peers": PEERS,
        "images": [ready[name]["images"] for name in NAMES],
        "accuracy_alone": [floor[name]["accuracy"] for name in NAMES],
        "accuracy_mpd": [done[name]["accuracy"] for name in NAMES],
        "accuracy_all_data": floor["all data"]["accuracy"],
        "max_spread": float(np.ptp(vectors, axis=0).max()),
        "rounds": max(event["round"] for event in rounds),
        "steps_not_averaged": sum(not event["averaged"] for event in rounds),
        "seconds": max(end["at"] for end in done.values()) - max(start["at"] for start in ready.values()),
        "seconds_per_round": statistics.median(event["seconds"] for event in rounds),
        "bytes_per_round": statistics.median(event["bytes"] for event in rounds),
    }


def show(found: dict[str, Any]) -> None:
    """Print the result table and the figures below it."""
    table = Table(title="accuracy on the same 360 test images", title_justify="left")
    for column in ("", "own images", "alone", "with mpd", "one trainer with all data"):
        table.add_column(column, justify="left" if not column else "right")
    for name, n, alone, mpd in zip(NAMES, found["images"], found["accuracy_alone"], found["accuracy_mpd"], strict=True):
        table.add_row(name, str(n), f"{alone:.1%}", f"{mpd:.1%}", f"{found['accuracy_all_data']:.1%}")
    console.print(table)
    console.print(
        f"{found['rounds']} rounds in {found['seconds']:.1f} s, {found['seconds_per_round'] * 1000:.0f} ms and "
        f"{found['bytes_per_round'] / 1024:.0f} KiB sent and received per peer and round; "
        f"parameters of the peers differ by at most {found['max_spread']:g}"
    )


def verdict(found: dict[str, Any]) -> str:
    """Return what is wrong with the result, or nothing."""
    worst, best_alone = min(found["accuracy_mpd"]), max(found["accuracy_alone"])
    if found["max_spread"] != 0:
        return f"the peers should end with the same parameters, but they differ by {found['max_spread']:g}"
    if worst < found["accuracy_all_data"] - NEAR:
        return f"with mpd a peer reached {worst:.1%}, which is too far below {found['accuracy_all_data']:.1%}"
    if best_alone > worst - FAR:
        return f"alone a peer reached {best_alone:.1%}, which is too near to {worst:.1%} with mpd"
    return ""


def demo(home: Path, rounds: int, seed: int) -> dict[str, Any]:
    """Run everything inside the folder `home` and return what was found."""
    shared = ["--rounds", str(rounds), "--seed", str(seed), "--peers", str(PEERS)]
    running: list[Process] = []
    with stopping(running):
        plans = {name: ["--alone", "--index", str(index)] for index, name in enumerate(NAMES)}
        alone = train(home, plans | {"all data": ["--all-data"]}, shared, running, "alone")
        sockets = start_daemons(home, running)
        plans = {NAMES[i]: ["--index", str(i), "--socket", str(socket)] for i, socket in enumerate(sockets)}
        together = train(home, plans, shared, running, "together")
    return summary(home, alone, together)


def main() -> int:
    parser = argparse.ArgumentParser(description="Four daemons and their trainers learn digits together.")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/demo.json"))
    args = parser.parse_args()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _frame: sys.exit(128 + number))
    try:
        if not MPD.exists():
            raise Failed(f"there is no {MPD}: install mpd into this environment first")
        with tempfile.TemporaryDirectory(prefix="mpd-") as home:  # short, because a socket's path may be 107 bytes long
            found = demo(Path(home), args.rounds, args.seed)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n")
        show(found)
        if problem := verdict(found):
            raise Failed(problem)
    except Failed as failure:
        print(f"demo failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
