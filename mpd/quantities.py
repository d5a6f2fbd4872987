"""What people say about machines and links: sizes, and distributions that stand for many of them.

A distribution is one word and its numbers: `constant:100`, `uniform:50,500`, `lognormal:200,0.8`. The first number of a
lognormal is its median and the second the standard deviation of the logarithm, so `lognormal:200,0.8` says that half of
the peers have less than 200 and that two thirds lie within a factor of 2.2 (e to the 0.8) of it. A bare number is a
constant.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpd.errors import LocalError

BYTES_PER_S = 1e6 / 8  # in one Mbit/s
_SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)(B|KiB|MiB|GiB)", re.ASCII)
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_KINDS = {"constant": ("VALUE",), "uniform": ("LOW", "HIGH"), "lognormal": ("MEDIAN", "SIGMA")}
_MAX_SIGMA = 5.0  # one peer in six would be 150 times off the median: nobody means that

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Where the value of each peer is drawn from: `kind` is "constant", "uniform" or "lognormal"; see `parse`."""

    kind: str
    numbers: tuple[float, ...]

    def draw(self, rng: np.random.Generator, n: int) -> Floats:
        """Return `n` independent values, float64 of shape (n,), in the unit of the numbers."""
        match self.kind:
            case "uniform":
                low, high = self.numbers
                return rng.uniform(low, high, n)
            case "lognormal":
                median, sigma = self.numbers
                return np.asarray(median * np.exp(sigma * rng.standard_normal(n)), np.float64)
            case _:
                return np.full(n, self.numbers[0])

    @property
    def median(self) -> float:
        """What half of the values do not exceed."""
        return sum(self.numbers) / 2 if self.kind == "uniform" else self.numbers[0]

    def __str__(self) -> str:
        return f"{self.kind}:{','.join(f'{number:g}' for number in self.numbers)}"


def parse_distribution(text: str, what: str, *, zero: bool = False) -> Distribution:
    """Read a distribution; `what` names it in errors, and `zero` says whether a value of 0 makes sense.

    Raises LocalError, with one sentence that says what was expected.
    """
    kind, colon, rest = text.strip().partition(":")
    if not colon:
        kind, rest = "constant", kind
    if kind not in _KINDS:
        known = ", ".join(f"{name}:{','.join(names)}" for name, names in _KINDS.items())
        raise LocalError(f"{what} {text!r}: {kind!r} is no distribution, one of {known} expected")
    names = _KINDS[kind]
    numbers = [_number(part) for part in rest.split(",")]
    if len(numbers) != len(names) or not all(map(math.isfinite, numbers)):
        raise LocalError(f"{what} {text!r}: {kind}:{','.join(names)} with {len(names)} numbers expected")
    least = "0 or more" if zero else "more than 0"
    values = numbers[:1] if kind == "lognormal" else numbers
    if any(value < 0 or (value == 0 and not zero) for value in values):
        raise LocalError(f"{what} {text!r}: {least} expected")
    if kind == "uniform" and numbers[0] > numbers[1]:
        raise LocalError(f"{what} {text!r}: the lower end first, then the upper one expected")
    if kind == "lognormal" and not 0 <= numbers[1] <= _MAX_SIGMA:
        raise LocalError(f"{what} {text!r}: a sigma from 0 to {_MAX_SIGMA:g} expected: the deviation of the logarithm")
    return Distribution(kind, tuple(numbers))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def parse_size(text: str) -> int:
    """Read a size with its unit, such as "400MiB", and return bytes. Raises LocalError."""
    found = _SIZE.fullmatch(text.strip())
    n_bytes = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not 4 <= n_bytes <= 1 << 42:
        raise LocalError(f"vector {text!r}: a size with its unit expected, from 4B to 4096GiB, such as 400MiB")
    return n_bytes


def show_size(n_bytes: float) -> str:
    """Return a size as people read it."""
    unit = next((unit for unit in ("GiB", "MiB", "KiB") if n_bytes >= _UNITS[unit]), "B")
    number = n_bytes / _UNITS[unit]
    return f"{number:.0f} {unit}" if number >= 100 or unit == "B" else f"{number:.3g} {unit}"
