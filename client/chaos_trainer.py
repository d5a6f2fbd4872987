"""A training process of `mpd chaos`: step after step, and a line of JSON about each.

    python -m mpd.client.chaos_trainer SOCKET MACHINE N_PEERS FIRST_STEP SIZE_BYTES TRAIN_S TIMEOUT_S

Strategy: it does what a training script does, and looks at its own tensors after every step: they hold a mean of known
peers, or what they held before. It judges nothing that another peer would have to confirm. It runs until it is killed.
"""

import hashlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from mpd.errors import DaemonUnavailable, LocalError

from .averager import Averager
from .chaos_oracle import Vectors
from .daemon import connect

RUN = "chaos"
_RETRY_S = 0.1  # while there is no daemon


def train(socket: Path, machine: int, n_peers: int, first_step: int, size_bytes: int, pause: "Pause") -> None:
    """Do steps for ever and tell of each. Starts over where the daemon has gone."""
    vectors = Vectors(machine, n_peers, size_bytes)
    with _attach(socket, machine, vectors) as averager:
        for step in itertools.count(first_step + 1):
            tell({"machine": machine, **do_step(averager, vectors, step, pause.timeout_s)})
            time.sleep(pause.train_s)


class Pause:
    """How long to train between two steps, and how long a step may take, in seconds."""

    def __init__(self, train_s: float, timeout_s: float) -> None:
        self.train_s, self.timeout_s = train_s, timeout_s


def do_step(averager: Averager, vectors: Vectors, step: int, timeout_s: float) -> dict[str, Any]:
    """Do one step; return what it came to, with `wrong`: a sentence if the tensors are not what they should be."""
    vectors.fill(step)
    began = time.monotonic()
    told: dict[str, Any] = {"step": step, "began": began, "averaged": False, "wrong": ""}
    try:
        outcome = averager.step(timeout=timeout_s)
    except (DaemonUnavailable, LocalError) as error:
        told["reason"] = f"{type(error).__name__}: {error}"
    else:
        told |= {"averaged": outcome.averaged, "reason": outcome.reason, "missing": outcome.missing}
        told["contributors"] = outcome.contributors
    told["ended"] = time.monotonic()
    if not told["averaged"]:
        if not vectors.is_filled(step):
            told["wrong"] = "the step did not average, and the tensors have changed"
        return told
    try:
        reading = vectors.read()
    except ValueError as error:
        told["wrong"] = str(error)
        return told
    digest = hashlib.blake2b(vectors.values.data, digest_size=16)
    digest.update(vectors.steps.data)
    return {**told, "sets": reading.sets, "steps": reading.steps, "digest": digest.hexdigest()}


def tell(what: dict[str, Any]) -> None:
    """Print one line of JSON."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _attach(socket: Path, machine: int, vectors: Vectors) -> Averager:
    while True:
        try:
            daemon = connect(socket)
            tell({"machine": machine, "peer": daemon.peer})
            return daemon.averager(RUN, vectors.tensors)
        except DaemonUnavailable:
            time.sleep(_RETRY_S)


def main() -> None:
    """Entry point of the process."""
    socket, machine, n_peers, first_step, size_bytes, train_s, timeout_s = sys.argv[1:]
    pause = Pause(float(train_s), float(timeout_s))
    train(Path(socket), int(machine), int(n_peers), int(first_step), int(size_bytes), pause)


if __name__ == "__main__":
    main()
