"""The peer's end of a benchmark: one process that averages when the coordinator says so.

Commands arrive on standard input and answers leave on standard output, one JSON object a line, so that a peer may live
in any virtual environment; this file needs nothing but the standard library. `step` names the moment at which all peers
begin, on the machine's monotonic clock: matchmaking is inside the measured time, waiting for another peer's Python to
get there is not.
"""

import json
import os
import sys
import time
from typing import Any, Protocol


class Averaging(Protocol):
    """What a system under test has to offer; vectors are float32."""

    def open(self, run: str, variant: str, n_elems: int, group_size: int) -> None:
        """Get ready to average a vector of `n_elems` under the name `run`."""

    def fill(self, run: str, value: float) -> None:
        """Set every element of this peer's vector."""

    def step(self, run: str) -> dict[str, Any]:
        """Average once. Return facts for the report; "error" says why it did not work."""

    def ends(self, run: str) -> tuple[float, float]:
        """Return the first and the last element of this peer's vector."""

    def close(self, run: str) -> None:
        """Let the vector go."""

    def train(self, run: str, at: float, seconds: float, average: bool) -> dict[str, Any]:
        """Compute for `seconds`, with a round behind it if told to `average`; return how far that came."""


def serve(system: Averaging, **hello: Any) -> None:
    """Say `hello`, then obey until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not get in between

    def answer(**facts: Any) -> None:
        answers.write(json.dumps(facts) + "\n")

    answer(**hello)
    for line in sys.stdin:
        command = json.loads(line)
        match command.pop("do"):
            case "open":
                system.open(**command)
                answer()
            case "fill":
                system.fill(**command)
                answer()
            case "close":
                system.close(**command)
                answer()
            case "train":
                answer(**system.train(**command))
            case "step":
                run, begin = command["run"], command["at"]
                time.sleep(max(0.0, begin - time.monotonic()))
                facts = system.step(run)
                ended = time.monotonic()
                answer(seconds=ended - begin, ends=system.ends(run), **facts)
