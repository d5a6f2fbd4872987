"""A peer of hivemind 1.1.12, run by the Python of a virtual environment that has it.

Its averager owns the tensors, so only the averaging is timed and no copy, which is in hivemind's favour. Variants are
the compressions "float32" (none) and "float16".
"""

import sys
from typing import Any

import hivemind
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.compression import Float16Compression, NoCompression
from peer import serve

MATCHMAKING_S = 3.0  # a group that is full starts earlier
TIMEOUT_S = 120.0
COMPRESSION = {"float32": NoCompression, "float16": Float16Compression}


class Hivemind:
    """One averager per run, all on one DHT node."""

    def __init__(self, dht: hivemind.DHT) -> None:
        self._dht = dht
        self._averagers: dict[str, DecentralizedAverager] = {}

    def open(self, run: str, variant: str, n_elems: int, group_size: int) -> None:
        self._averagers[run] = DecentralizedAverager(
            [torch.zeros(n_elems)],
            self._dht,
            prefix=run,
            target_group_size=group_size,
            min_matchmaking_time=MATCHMAKING_S,
            request_timeout=MATCHMAKING_S / 2,
            compression=COMPRESSION[variant](),
            start=True,
        )

    def fill(self, run: str, value: float) -> None:
        with self._averagers[run].get_tensors() as tensors:
            tensors[0].fill_(value)

    def step(self, run: str) -> dict[str, Any]:
        try:
            gathered = self._averagers[run].step(timeout=TIMEOUT_S, allow_retries=False)
        except Exception as error:  # noqa: BLE001  # whatever it raises is a failed round of that system
            return {"error": repr(error)}
        return {"contributors": len(gathered)} if gathered else {"error": "no group found"}

    def ends(self, run: str) -> tuple[float, float]:
        with self._averagers[run].get_tensors() as tensors:
            return float(tensors[0][0]), float(tensors[0][-1])

    def train(self, run: str, at: float, seconds: float, average: bool) -> dict[str, Any]:
        raise NotImplementedError("only mpd averages while its trainer trains")

    def close(self, run: str) -> None:
        self._averagers.pop(run).shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    node = hivemind.DHT(initial_peers=sys.argv[1:], host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    serve(Hivemind(node), address=[str(address) for address in node.get_visible_maddrs()])
    node.shutdown()
