"""Which of the states that peers offer a joiner takes: the one that most of them hold.

Members are trusted with values, in states as in rounds. But one of them alone, lying or left behind, must not decide
what a newcomer starts from while others agree. So peers have one vote each, and a state counts as offered by those who
name the very same bytes, round and number. Among equals the one with most rounds behind it wins.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mpd.ids import PeerId


@dataclass(frozen=True, slots=True)
class Offer:
    """What one peer says that it holds."""

    manifest: bytes
    round_id: bytes
    number: int
    metadata: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Choice:
    """The state to load, who holds it, smallest id first, and how many peers offered any."""

    manifest: bytes
    round_id: bytes
    number: int
    metadata: bytes = field(repr=False)
    holders: tuple[PeerId, ...] = ()
    n_offers: int = 0


def elect(offers: Mapping[PeerId, Offer]) -> Choice | None:
    """Return the state that most peers offer, of equally many the one with the greatest number; None if there is none.

    Metadata are no part of a state: those win that most of its holders offer, then those of the smallest id.
    """
    if not offers:
        return None
    groups: dict[tuple[bytes, bytes, int], list[PeerId]] = {}
    for peer in sorted(offers):
        offer = offers[peer]
        groups.setdefault((offer.manifest, offer.round_id, offer.number), []).append(peer)
    (manifest, round_id, number), holders = max(groups.items(), key=lambda item: (len(item[1]), item[0][2], item[0]))
    metadata = _most_common(offers[peer].metadata for peer in holders)
    return Choice(manifest, round_id, number, metadata, tuple(holders), len(offers))


def _most_common(blobs: Iterable[bytes]) -> bytes:
    return Counter(blobs).most_common(1)[0][0]  # of equally many the first
