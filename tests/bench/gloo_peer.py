"""The yardstick: Gloo's bare all_reduce as torch offers it. A fixed world, no encryption, nobody may leave or come."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from peer import serve


class Gloo:
    """One rank."""

    def __init__(self) -> None:
        self._vectors: dict[str, torch.Tensor] = {}

    def open(self, run: str, variant: str, n_elems: int, group_size: int) -> None:
        self._vectors[run] = torch.zeros(n_elems)

    def fill(self, run: str, value: float) -> None:
        self._vectors[run].fill_(value)

    def step(self, run: str) -> dict[str, Any]:
        vector = self._vectors[run]
        dist.all_reduce(vector)
        vector.div_(dist.get_world_size())
        return {}

    def ends(self, run: str) -> tuple[float, float]:
        vector = self._vectors[run]
        return float(vector[0]), float(vector[-1])

    def train(self, run: str, at: float, seconds: float, average: bool) -> dict[str, Any]:
        raise NotImplementedError("only mpd averages while its trainer trains")

    def close(self, run: str) -> None:
        del self._vectors[run]


if __name__ == "__main__":
    rank, world_size, rendezvous_file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous_file}", rank=rank, world_size=world_size)
    serve(Gloo())
    dist.destroy_process_group()
