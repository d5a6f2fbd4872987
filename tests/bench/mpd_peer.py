"""A trainer of mpd. What is timed is all that a user waits for: `averager.step()`, from call to return.

Variants: "adopt" keeps the tensor in shared memory, "copies" has it copied in and out, and "numpy" is a small array in
a process without torch, for measuring how fast groups form.
"""

import sys
import time
from typing import Any

from peer import serve

from mpd.client import connect

TIMEOUT_S = 120.0


class Trainer:
    """One trainer, with a connection and a vector per run."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._open: dict[str, tuple[Any, Any, Any]] = {}  # run: daemon, averager, vector

    def open(self, run: str, variant: str, n_elems: int, group_size: int) -> None:
        vector = numpy_vector(n_elems) if variant == "numpy" else torch_vector(n_elems)
        daemon = connect(socket=self._socket)
        averager = daemon.averager(run, [vector], group_size=group_size, rounds=1, adopt=variant == "adopt")
        self._open[run] = daemon, averager, vector

    def fill(self, run: str, value: float) -> None:
        self._open[run][2][:] = value

    def step(self, run: str) -> dict[str, Any]:
        outcome = self._open[run][1].step(timeout=TIMEOUT_S)
        facts = {
            "contributors": len(outcome.contributors),
            "bytes_sent": outcome.bytes_sent,
            "bytes_received": outcome.bytes_received,
        }
        return facts if outcome.averaged else {**facts, "error": outcome.reason}

    def ends(self, run: str) -> tuple[float, float]:
        vector = self._open[run][2]
        return float(vector[0]), float(vector[-1])

    def train(self, run: str, at: float, seconds: float, average: bool) -> dict[str, Any]:
        import torch

        weights, batch = torch.zeros(256, 256), torch.ones(64, 256)
        time.sleep(max(0.0, at - time.monotonic()))
        pending = self._open[run][1].start(timeout=TIMEOUT_S) if average else None
        iterations, outcome = 0, None
        while time.monotonic() < at + seconds:
            torch.relu(batch @ weights).sum()
            iterations += 1
            if pending is not None and pending.done():
                outcome, pending = pending.wait(), None
        if pending is not None:
            outcome = pending.wait()
        return {"iterations": iterations, "averaged": outcome is not None and outcome.averaged}

    def close(self, run: str) -> None:
        daemon, averager, _ = self._open.pop(run)
        averager.close()
        daemon.close()


def numpy_vector(n_elems: int) -> Any:
    import numpy as np

    return np.zeros(n_elems, np.float32)


def torch_vector(n_elems: int) -> Any:
    import torch

    torch.set_num_threads(1)
    return torch.zeros(n_elems)


if __name__ == "__main__":
    serve(Trainer(sys.argv[1]))
