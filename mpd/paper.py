"""The table that the paper's own simulation prints, and the same table from this one.

Rounds until the variance over all peers is below 1e-9 (and below 1e-4), from N(0, 1), mean of 10 swarms, 50 rounds at
most. `PRINTED` has what the authors' notebook shows for 512, 768 and 900 peers (Ryabinin et al., NeurIPS 2021,
averaging_experiments/plot_results.ipynb); it has no output for 1024 peers, nor for a grid of 8 x 8 x 8 cells: those
rows are a run of the authors' program. Swarms start from the authors' seeds and draw in their order, so that the
columns in `REPLAYED` are the very same swarms; the authors drew the cells of their grid from a generator without a
seed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mpd.grid import Shape
from mpd.simulate import Result, Settings, simulate

Rounds = tuple[float, float]
"""To a variance below 1e-9, and below 1e-4."""

TARGETS = (1e-9, 1e-4)
ABSENT = (0.0, 0.001, 0.005, 0.01)
SQUARE: Shape = (32, 32)
CUBE: Shape = (8, 8, 8)
REPLAYED = ("allreduce", "gossip", "paper-pushsum", "random")
COLUMNS = (*REPLAYED, "paper-grid", "pushsum", "moshpit")
NEVER = (50.0, 50.0)

PRINTED: dict[tuple[int, Shape, float], dict[str, Rounds]] = {
    (n_peers, shape, absent): dict(zip((*REPLAYED, "paper-grid"), columns, strict=True))
    for n_peers, shape, absent, *columns in (
        (512, SQUARE, 0.0, (1.0, 1.0), NEVER, (47.6, 15.6), (6.1, 3.0), (8.2, 3.6)),
        (512, SQUARE, 0.001, (1.6, 1.6), NEVER, (47.6, 15.6), (6.3, 3.0), (8.5, 3.3)),
        (512, SQUARE, 0.005, (10.9, 10.9), NEVER, (47.8, 15.6), (6.3, 3.0), (8.8, 3.9)),
        (512, SQUARE, 0.01, (41.7, 41.7), NEVER, (47.8, 15.6), (6.6, 3.0), (8.8, 3.9)),
        (768, SQUARE, 0.0, (1.0, 1.0), NEVER, (43.2, 13.8), (6.2, 3.0), (6.0, 3.0)),
        (768, SQUARE, 0.001, (1.8, 1.8), NEVER, (43.2, 13.8), (6.5, 3.0), (6.0, 3.0)),
        (768, SQUARE, 0.005, (28.7, 28.7), NEVER, (43.2, 14.1), (6.6, 3.0), (6.6, 3.0)),
        (768, SQUARE, 0.01, NEVER, NEVER, (43.9, 14.2), (7.0, 3.0), (6.9, 3.0)),
        (900, SQUARE, 0.0, (1.0, 1.0), NEVER, (45.0, 14.7), (6.4, 3.0), (5.0, 2.9)),
        (900, SQUARE, 0.001, (1.8, 1.8), NEVER, (45.0, 14.7), (6.3, 3.0), (5.1, 2.9)),
        (900, SQUARE, 0.005, NEVER, NEVER, (45.2, 14.7), (6.7, 3.0), (5.9, 3.1)),
        (900, SQUARE, 0.01, NEVER, NEVER, (45.6, 14.9), (7.0, 3.1), (6.5, 3.0)),
        (1024, SQUARE, 0.0, (1.0, 1.0), NEVER, (49.0, 16.2), (6.2, 3.0), (2.0, 2.0)),
        (1024, SQUARE, 0.001, (2.0, 2.0), NEVER, (49.0, 16.3), (6.5, 3.0), (3.5, 2.2)),
        (1024, SQUARE, 0.005, (42.6, 42.6), NEVER, (49.5, 16.3), (6.7, 3.0), (4.9, 2.9)),
        (1024, SQUARE, 0.01, NEVER, NEVER, (49.5, 16.3), (6.9, 3.1), (5.5, 3.0)),
    )
} | {
    (512, CUBE, absent): {"random": by_random, "paper-grid": by_grid}
    for absent, by_random, by_grid in (
        (0.0, (10.2, 5.0), (3.0, 3.0)),
        (0.001, (10.3, 5.0), (4.7, 3.1)),
        (0.005, (10.7, 5.0), (7.5, 3.5)),
        (0.01, (10.6, 5.0), (8.3, 4.0)),
    )
}


@dataclass(frozen=True)
class Row:
    """One row of the table: what was printed, and what comes out here, by policy."""

    n_peers: int
    shape: Shape
    absent: float
    printed: dict[str, Rounds]
    measured: dict[str, Rounds]


def settings_of(n_peers: int, shape: Shape, absent: float, policy: str) -> Settings:
    """Return what the paper simulates; `moshpit` and the random groups go by the same size of a group."""
    return Settings(
        n_peers,
        policy,
        group_size=shape[0],
        shape=shape if policy == "paper-grid" else None,
        absent=absent,
        legacy_random=True,
    )


def reproduce(on_round: Callable[[], None] = lambda: None, n_peers: int | None = None) -> Iterator[Row]:
    """Yield the rows of the table, those of `n_peers` only if that is given."""
    for (n, shape, absent), printed in PRINTED.items():
        if n_peers in (None, n):
            columns = COLUMNS if shape == SQUARE else ("random", "paper-grid", "moshpit")
            results = {name: simulate(settings_of(n, shape, absent, name), on_round) for name in columns}
            yield Row(n, shape, absent, printed, {name: _rounds(result) for name, result in results.items()})


def n_rounds(n_peers: int | None = None) -> int:
    """Return how many rounds `reproduce` simulates, for a progress bar."""
    rows = [shape for n, shape, _ in PRINTED if n_peers in (None, n)]
    return 50 * 10 * sum(len(COLUMNS) if shape == SQUARE else 3 for shape in rows)


def _rounds(result: Result) -> Rounds:
    return result.rounds_to(TARGETS[0]), result.rounds_to(TARGETS[1])
