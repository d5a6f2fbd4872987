"""What is to be reached, and what was seen: one row for each goal, from whatever parts of the suite have run.

A goal is a number and its side. `seen` finds the figure in a result; None where that part has not been measured. A row
that covers several cases shows the worst of them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
Seen = Callable[[Result], float | None]


@dataclass(frozen=True)
class Goal:
    """One row: `seen` is to be at most `limit`, or at least if `is_floor`."""

    what: str
    limit: float
    seen: Seen
    is_floor: bool = False
    unit: str = ""

    def met(self, value: float) -> bool:
        return value >= self.limit if self.is_floor else value <= self.limit


def ratio(column: str, to: str, cases: Iterable[tuple[int, int]]) -> Seen:
    """Return the largest ratio of two columns' medians among these cases of (peers, MiB)."""
    wanted = set(cases)

    def seen(result: Result) -> float | None:
        return max(_ratios(result, column, to, lambda peers, mib: (peers, mib) in wanted), default=None)

    return seen


def _ratios(result: Result, column: str, to: str, fits: Callable[[int, int], bool]) -> list[float]:
    found = []
    for case in result.get("rounds", []):
        seconds = [case["columns"].get(name, {}).get("median_s") for name in (column, to)]
        if fits(case["peers"], case["mib"]) and all(seconds):
            found.append(seconds[0] / seconds[1])
    return found


def _over_floor(result: Result) -> float | None:
    found = []
    for variant in ("adopt", "copies"):
        found += _ratios(result, f"mpd {variant}", f"floor sealed {variant}", lambda peers, mib: mib >= 64)
    return max(found, default=None)


def _sealed_over_plain(result: Result) -> float | None:
    """Return bytes per second of the sealed path over those of the plain one, the smaller of both variants."""
    found = []
    for variant in ("adopt", "copies"):
        found += _ratios(result, f"plain {variant}", f"mpd {variant}", lambda peers, mib: (peers, mib) in FOUR)
    return min(found, default=None)


def _share(*names: str) -> Seen:
    """Return the smallest share of the link-bound time among these cases."""

    def seen(result: Result) -> float | None:
        shares = [case.get("share") for case in result.get("links", []) if case["name"] in names]
        return min((share for share in shares if share), default=None)

    return seen


def _over_optimum(name: str) -> Seen:
    def seen(result: Result) -> float | None:
        share = _share(name)(result)
        return 1 / share if share else None

    return seen


def _formed(n: int, group_size: int, key: str) -> Seen:
    def seen(result: Result) -> float | None:
        for one in result.get("formation", []):
            if (one["peers"], one["group_size"]) == (n, group_size) and one[key] is not None:
                return float(one[key]) * 1000
        return None

    return seen


def _of(part: str, key: str) -> Seen:
    def seen(result: Result) -> float | None:
        value = result.get(part, {}).get(key)
        return None if value is None else float(value)

    return seen


FOUR = [(4, 64)]
GOALS = (
    Goal("4 peers x 64 MiB, plain, adopt / Gloo", 1.1, ratio("plain adopt", "gloo", FOUR)),
    Goal("4 peers x 64 MiB, plain, copies / Gloo", 1.25, ratio("plain copies", "gloo", FOUR)),
    Goal("4 peers x 64 MiB, sealed, adopt / Gloo", 1.4, ratio("mpd adopt", "gloo", FOUR)),
    Goal("4 peers x 64 MiB, sealed, copies / Gloo", 1.5, ratio("mpd copies", "gloo", FOUR)),
    Goal(
        "2 and 8 peers x 16 and 256 MiB, sealed, adopt / Gloo (worst)",
        1.6,
        ratio("mpd adopt", "gloo", [(2, 16), (2, 256), (8, 16), (8, 256)]),
    ),
    Goal("hivemind float32 / mpd sealed, adopt, 4 x 64 MiB", 10, ratio("hivemind float32", "mpd adopt", FOUR), True),
    Goal("sealed / plain, bytes per second, 4 x 64 MiB (worst)", 0.65, _sealed_over_plain, True),
    Goal("sealed / floor on the spot, 64 MiB and up (worst)", 1.8, _over_floor),
    Goal(
        "100 Mbit/s, 4 and 8 peers x 16 MiB: share of the link-bound time",
        0.95,
        _share("4 peers, 100 Mbit/s", "8 peers, 100 Mbit/s"),
        True,
    ),
    Goal(
        "the same with 100 ms: share of bytes over bandwidth + 3 round trips",
        0.90,
        _share("4 peers, 100 Mbit/s, 100 ms", "8 peers, 100 Mbit/s, 100 ms"),
        True,
    ),
    Goal(
        "one of 8 peers at a tenth: until it has its result / optimum",
        1.15,
        _over_optimum("8 peers, 100 Mbit/s, one of 10"),
    ),
    Goal("warm group, 4 peers, p95", 20, _formed(4, 4, "p95_s"), unit=" ms"),
    Goal("warm group, 32 daemons in groups of 8, p95", 150, _formed(32, 8, "p95_s"), unit=" ms"),
    Goal("1 KiB step, 4 peers, median", 20, _formed(4, 4, "median_s"), unit=" ms"),
    Goal("daemon memory beyond regions and idle, 256 MiB run of 4", 128, _of("memory", "beyond_mib"), unit=" MiB"),
    Goal("training slowed by a background round", 0.03, _of("overlap", "slowdown")),
)


def rows(result: Result) -> list[dict[str, Any]]:
    """Return what, goal, what was seen, and whether that will do: None where it was not measured."""
    table = []
    for goal in GOALS:
        value = goal.seen(result)
        table.append(
            {
                "what": goal.what,
                "goal": f"{'>=' if goal.is_floor else '<='} {goal.limit:g}{goal.unit}",
                "seen": "not measured" if value is None else f"{value:.3g}{goal.unit}",
                "met": None if value is None else goal.met(value),
            }
        )
    return table
