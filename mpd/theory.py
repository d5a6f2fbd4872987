"""What mathematics says about the variance of a simulated swarm, round by round, to lay beside what was measured.

All values start as independent N(0, 1), so that the expected variance over n peers is (n - 1) / n at the start. Each
function returns the expected variance after 0, 1, .., n_rounds rounds, float64 of (n_rounds + 1,), and is exact for the
policy as simulated, unless it says otherwise.

Random groups: a group of m out of n values with variance s2 has a mean whose expected squared distance to the mean of
all is s2 (n - m) / (m (n - 1)). Summed over r groups of all peers that is the factor (r - 1) / (n - 1) a round,
whatever the sizes of the groups; the paper's Theorem 3.2 has an upper bound of it. Absence leaves it exact, since the
peers of a round are a random sample.
"""

import math

import numpy as np

from mpd.grid import Shape
from mpd.meetings import Floats
from mpd.overlays import chebyshev_weight, ring_spectrum


def butterfly_vectors(group_size: int) -> float:
    """Return how many vectors each member of a group sends, and receives, in a round: 2 (1 - 1 / m)."""
    return 2 * (1 - 1 / group_size)


def random_groups(n_peers: int, group_size: int, absent: float, n_rounds: int) -> Floats:
    """Expected variance under groups drawn anew in each round; `absent` is the probability to miss one."""
    present = np.arange(n_peers + 1)
    n_groups = np.minimum(np.maximum(1, present // group_size), present)
    if n_peers == 1:
        return np.zeros(n_rounds + 1)
    averaged = (n_groups * n_peers - present) / (n_peers - 1)
    factor = float(_binomial(n_peers, 1 - absent) @ (averaged + n_peers - present)) / n_peers
    return np.asarray(_start(n_peers) * factor ** np.arange(n_rounds + 1))


def all_or_nothing(n_peers: int, absent: float, n_rounds: int) -> Floats:
    """Expected variance under an all-reduce that fails if anyone is absent."""
    fails = 1 - (1 - absent) ** n_peers
    return np.asarray(_start(n_peers) * fails ** np.arange(n_rounds + 1))


def grid(n_peers: int, shape: Shape, n_rounds: int) -> Floats:
    """Expected variance on a grid whose cells are all filled, without absence: 0 from round d on.

    After round t < d every value is the mean of a block of peers, one of P / (M1 * .. * Mt) blocks. Exact where all
    blocks have one size, and within their rounding elsewhere.
    """
    n_blocks = math.prod(shape) / np.cumprod([1, *shape], dtype=np.float64)
    expected = np.zeros(n_rounds + 1)
    known = min(len(n_blocks), len(expected))
    expected[:known] = (n_blocks[:known] - 1) / n_peers
    expected[0] = _start(n_peers)
    return expected


def ring_gossip(n_peers: int, n_rounds: int) -> Floats:
    """Expected variance under ring gossip without absence: each mode of the ring shrinks by its own eigenvalue."""
    spectrum = 1 - _ring_laplacian(n_peers) / min(3, n_peers)
    return _modes(spectrum ** np.arange(n_rounds + 1)[:, np.newaxis])


def chebyshev_gossip(n_peers: int, n_rounds: int) -> Floats:
    """Expected variance under Chebyshev gossip without absence: a polynomial of each mode's eigenvalue."""
    step, radius = ring_spectrum(n_peers)
    spectrum = 1 - step * _ring_laplacian(n_peers)
    damped = np.ones((n_rounds + 1, n_peers))
    weight = 1.0
    for t in range(n_rounds):
        weight = chebyshev_weight(t, radius, weight)
        before = damped[t - 1] if t else np.zeros(n_peers)
        damped[t + 1] = weight * (spectrum * damped[t] - before) + before
    return _modes(damped)


def push_sum(n_peers: int, n_rounds: int) -> Floats:
    """Expected variance under push-sum on the exponential graph without absence."""
    n_hops = max(1, int(math.log2(max(2, n_peers - 1))))
    turn = 2j * np.pi * np.arange(n_peers) / n_peers
    damped = np.ones((n_rounds + 1, n_peers))
    for t in range(1, n_rounds + 1):
        far = [hop for hop in (2 ** (t % n_hops), 2 ** (t % n_hops + 1)) if hop % n_peers]
        spectrum = (1 + sum(np.exp(turn * hop) for hop in far)) / (1 + len(far))
        damped[t] = damped[t - 1] * np.abs(spectrum)
    return _modes(damped)


def _start(n_peers: int) -> float:
    return (n_peers - 1) / n_peers


def _ring_laplacian(n_peers: int) -> Floats:
    """Return the eigenvalues of the Laplacian of a ring, that of the mean first; 2 peers have one edge, not two."""
    edges = 1 if n_peers == 2 else 2
    return np.asarray(edges * (1 - np.cos(2 * np.pi * np.arange(n_peers) / n_peers)))


def _modes(damped: Floats) -> Floats:
    """Return the expected variance if mode k is `damped[t, k]` of what it was; mode 0 is the mean."""
    return np.asarray((damped[:, 1:] ** 2).sum(axis=1) / damped.shape[1])


def _binomial(n: int, p: float) -> Floats:
    """Return the probability of 0, 1, .., n successes."""
    if p in (0.0, 1.0):
        return np.asarray(np.eye(1, n + 1, int(n * p))[0])
    k = np.arange(n + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    return np.asarray(np.exp(logs[n] - logs[k] - logs[n - k] + k * math.log(p) + (n - k) * math.log1p(-p)))
