"""Averaging without groups, on a fixed graph: ring gossip, Chebyshev gossip and push-sum.

A round is one message to each neighbour. There is nothing to agree on, so a peer that is lost in the middle of a round
counts, for the chunks that it had sent by then, like one that was present, and for the rest like an absent one.

Gossip and push-sum follow the paper's simulation (Ryabinin et al., NeurIPS 2021, averaging_experiments); push-sum is
also there as its authors wrote it, because the two differ and the paper's figures come from theirs. Chebyshev gossip
is the two-term recursion that Scaman et al. (ICML 2017) use, on the same ring.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator

import numpy as np

from mpd.meetings import Bools, Floats, Ints, Meeting, Random, Sends
from mpd.mixing import GOLDEN
from mpd.policies import Mixed, Policy


class Overlay(Policy):
    """A policy whose round is a matrix: who sends to whom, each with the same share for itself and its receivers."""

    def __init__(self, n_peers: int) -> None:
        self.n_peers = n_peers
        self.number = 0

    @abstractmethod
    def edges(self) -> tuple[Ints, Ints]:
        """Return the senders and receivers of this round if all are present, a peer's own share left out."""

    def meet(self, present: Bools, rng: Random) -> Sends:
        """Return the messages between those that are present."""
        senders, receivers = self.edges()
        live = present[senders] & present[receivers]
        self._present = present
        return Sends(senders[live], receivers[live])

    def mix(self, values: Floats, meeting: Meeting, lost_at: Floats | None = None) -> Mixed:
        """Mix chunk by chunk where peers were lost, all at once where none was."""
        assert isinstance(meeting, Sends)
        present = self._present
        for columns, live in _by_presence(values, present, lost_at):
            arrived = live[meeting.senders] & live[meeting.receivers]
            self.mix_chunks(values, columns, live, meeting.senders[arrived], meeting.receivers[arrived])
        self.number += 1
        completed = present if lost_at is None else present & np.isinf(lost_at)
        return Mixed(completed.copy(), np.zeros(self.n_peers, bool), np.zeros(self.n_peers, np.int64))

    @abstractmethod
    def mix_chunks(self, values: Floats, columns: slice, live: Bools, senders: Ints, receivers: Ints) -> None:
        """Mix some columns of `values`; `live` peers (n,) exchanged these messages."""


def _by_presence(values: Floats, present: Bools, lost_at: Floats | None) -> Iterator[tuple[slice, Bools]]:
    """Yield columns of `values` with the peers that were there when they were sent."""
    if lost_at is None or np.isinf(lost_at).all():
        yield slice(None), present
        return
    for column in range(values.shape[1]):
        yield slice(column, column + 1), present & (lost_at >= (column + 1) * GOLDEN % 1)


def _received(what: Floats, senders: Ints, receivers: Ints, n_peers: int) -> Floats:
    """Return the sum (n, ...) of what each peer receives."""
    sums = np.zeros((n_peers, *what.shape[1:]))
    np.add.at(sums, receivers, what[senders])
    return sums


def _ring(n_peers: int) -> tuple[Ints, Ints]:
    here = np.arange(n_peers)
    if n_peers == 1:
        return here[:0], here[:0]
    if n_peers == 2:
        return here, here[::-1]
    return np.concatenate([here, here]), np.concatenate([np.roll(here, 1), np.roll(here, -1)])


def _neighbour_means(values: Floats, senders: Ints, receivers: Ints) -> Floats:
    """Return the mean of each peer and those it heard from; who heard nobody stays as it is."""
    n_peers = len(values)
    heard = np.bincount(receivers, minlength=n_peers)
    return np.asarray((values + _received(values, senders, receivers, n_peers)) / (1 + heard)[:, np.newaxis])


class Gossip(Overlay):
    """A ring: each round a peer takes the mean of itself and its two neighbours, as far as they are there."""

    def replace(self, peers: Ints, rng: Random) -> None:
        """There is nothing to forget."""

    def edges(self) -> tuple[Ints, Ints]:
        """Return the ring, both ways."""
        return _ring(self.n_peers)

    def mix_chunks(self, values: Floats, columns: slice, live: Bools, senders: Ints, receivers: Ints) -> None:
        """Replace values by means."""
        values[:, columns] = _neighbour_means(values[:, columns], senders, receivers)


class Chebyshev(Gossip):
    """The same ring and the same messages, with the recursion that damps every mode as fast as a polynomial can.

    x(t+1) = w(t+1) (W x(t) - x(t-1)) + x(t-1) with W = I - step * Laplacian; step and w follow from the spectrum of the
    ring. It is tuned to a graph that stays. A peer that is absent keeps both of its values, what the others do is then
    no longer the polynomial that was meant, and on a large ring the values grow without bound; to forget the value
    before instead makes it worse.
    """

    def __init__(self, n_peers: int) -> None:
        super().__init__(n_peers)
        self.step, self.radius = ring_spectrum(n_peers)
        self.weight = 1.0
        self.before: Floats | None = None

    def mix(self, values: Floats, meeting: Meeting, lost_at: Floats | None = None) -> Mixed:
        """Do one step of the recursion."""
        self.weight = chebyshev_weight(self.number, self.radius, self.weight)
        if self.before is None:
            self.before = values.copy()
        return super().mix(values, meeting, lost_at)

    def mix_chunks(self, values: Floats, columns: slice, live: Bools, senders: Ints, receivers: Ints) -> None:
        """Replace values by the next ones of the sequence, and remember the last."""
        assert self.before is not None
        now, before = values[:, columns].copy(), self.before[:, columns]
        heard = np.bincount(receivers, minlength=self.n_peers)[:, np.newaxis]
        nearer = now + self.step * (_received(now, senders, receivers, self.n_peers) - heard * now)
        following = nearer if self.number == 0 else self.weight * (nearer - before) + before
        values[:, columns] = np.where(live[:, np.newaxis], following, now)
        self.before[:, columns] = np.where(live[:, np.newaxis], now, before)

    def replace(self, peers: Ints, rng: Random) -> None:
        """A newcomer has no value before its first one: forget the sequence, everybody, and start it anew."""
        if len(peers):
            self.number, self.weight, self.before = 0, 1.0, None


def ring_spectrum(n_peers: int) -> tuple[float, float]:
    """Return (step, radius) of a ring: the step s with the smallest radius of I - s * Laplacian, and that radius.

    The radius is the largest modulus of an eigenvalue, that of the mean left out: (1 - g) / (1 + g) where g is the
    quotient of the Laplacian's smallest eigenvalue above 0 and its largest.
    """
    if n_peers <= 3:
        return 1 / n_peers, 0.0
    eigenvalues = [2 - 2 * math.cos(2 * math.pi * k / n_peers) for k in range(1, n_peers)]
    smallest, largest = min(eigenvalues), max(eigenvalues)
    return 2 / (smallest + largest), (largest - smallest) / (largest + smallest)


def chebyshev_weight(number: int, radius: float, last: float) -> float:
    """Return w of step `number`, from 0, of the Chebyshev recursion, given that of the step before."""
    if number == 0:
        return 1.0
    return 2 / (2 - radius**2) if number == 1 else 1 / (1 - radius**2 * last / 4)


class PushSum(Overlay):
    """Push-sum on a directed exponential graph: two messages a round, 2^h and 2^(h+1) places on, h rotating.

    A sender keeps a third of its values and of its weight and sends the others away; a value is the quotient of the
    two, so that the mean is kept whoever is absent (Kempe et al., FOCS 2003; SGP: Assran et al., ICML 2019).
    """

    def __init__(self, n_peers: int) -> None:
        super().__init__(n_peers)
        self.weights: Floats | None = None

    def hop(self) -> int:
        """Return h of this round; as in the paper's simulation, rounds count from 1 and h ends at log2 of N - 1."""
        return (self.number + 1) % max(1, int(math.log2(max(2, self.n_peers - 1))))

    def edges(self) -> tuple[Ints, Ints]:
        """Return two messages from each peer."""
        here = np.arange(self.n_peers)
        hops = [2 ** (self.hop() + further) for further in (0, 1)]
        far = [hop for hop in hops if hop % self.n_peers]
        receivers = [(here + hop) % self.n_peers for hop in far]
        return np.tile(here, len(far)), np.concatenate([*receivers, here[:0]])

    def mix(self, values: Floats, meeting: Meeting, lost_at: Floats | None = None) -> Mixed:
        """Push values and weights."""
        if self.weights is None:
            self.weights = np.ones_like(values)
        return super().mix(values, meeting, lost_at)

    def mix_chunks(self, values: Floats, columns: slice, live: Bools, senders: Ints, receivers: Ints) -> None:
        """Share out, add up, divide."""
        assert self.weights is not None
        parts = 1 / (1 + np.bincount(senders, minlength=self.n_peers))[:, np.newaxis]
        weights = self.weights[:, columns]
        pushed, pushed_weights = values[:, columns] * weights * parts, weights * parts
        sums = pushed + _received(pushed, senders, receivers, self.n_peers)
        weights = pushed_weights + _received(pushed_weights, senders, receivers, self.n_peers)
        values[:, columns], self.weights[:, columns] = sums / weights, weights

    def replace(self, peers: Ints, rng: Random) -> None:
        """A newcomer weighs 1."""
        if self.weights is not None:
            self.weights[peers] = 1.0


class PaperPushSum(PushSum):
    """Push-sum as the paper's figures have it: rows renormalised, no weights, and the graph displaced where it wraps.

    The authors' code rolls the whole matrix as if it were one line. So a message from place j to place j - s that wraps
    around the end arrives one place further on, some peers are heard more often than others, and the mean drifts.
    """

    def edges(self) -> tuple[Ints, Ints]:
        """Return the entries of the displaced matrix."""
        here = np.arange(self.n_peers)
        pairs = [divmod(here * (self.n_peers + 1) + 2 ** (self.hop() + further), self.n_peers) for further in (0, 1)]
        return np.concatenate([pair[1] for pair in pairs]), np.concatenate([pair[0] for pair in pairs]) % self.n_peers

    def mix_chunks(self, values: Floats, columns: slice, live: Bools, senders: Ints, receivers: Ints) -> None:
        """Take the mean of what was heard."""
        values[:, columns] = _neighbour_means(values[:, columns], senders, receivers)
