"""Who stands in the lines of our cell, as far as the peers themselves have said so: what a lobby remembers by slot.

A peer comes back to each of its d slots every d rounds, and on a grid at rest it finds the same peers there. So nobody
has to be looked for again: whoever took part in the last round of a slot is greeted when we stand there the next time.
Only a peer's own word counts. What it says of a slot of ours in which we do not stand yet is kept until we do.
"""

from collections.abc import Callable, Collection, Iterable

from mpd.ids import PeerId
from mpd.messages import Here

MAX_HEARD = 1024  # peers whose word is kept; it takes a link to say anything


class Company:
    """The mates of one peer in each of the slots of its cell; `is_linked` says who can be spoken to at once."""

    def __init__(self, is_linked: Callable[[PeerId], bool]) -> None:
        self._is_linked = is_linked
        self._mates: dict[bytes, set[PeerId]] = {}
        self._last: dict[bytes, int] = {}  # the last round that has begun in a slot since we came to its line
        self.is_foreseen = False  # the roster of a new shape has named them, and we have not moved since
        self._heard: dict[PeerId, Here] = {}
        self.sought: dict[bytes, float] = {}  # when the rendezvous was last asked who is there

    @property
    def slots(self) -> Collection[bytes]:
        """The slots of our cell, one for each axis."""
        return self._mates.keys()

    def dwell(self, slots: Collection[bytes]) -> None:
        """We are in the cell with these slots now. Who was met in others is forgotten."""
        self.is_foreseen &= set(slots) == self._mates.keys()
        self._mates = {slot: self._mates.get(slot, set()) for slot in slots}
        self._last = {slot: number for slot, number in self._last.items() if slot in self._mates}
        self.sought = {slot: when for slot, when in self.sought.items() if slot in self._mates}

    def mates(self, slot: bytes) -> list[PeerId]:
        """Return who is known to stand in `slot` when its turn comes, and is linked to us."""
        return sorted(filter(self._is_linked, self._mates.get(slot, ())))

    def has_met(self, slot: bytes) -> bool:
        """Return whether the mates in `slot` are known: by a round that has begun there since we came to its line."""
        return slot in self._last or (self.is_foreseen and slot in self._mates)

    def foresee(self) -> None:
        """Who will be in our lines is known from the roster of a new shape, until we move."""
        self.is_foreseen = True

    def expect(self, peer: PeerId, slot: bytes) -> None:
        """`peer` will stand in `slot`, as far as is known."""
        if slot in self._mates:
            self._mates[slot].add(peer)

    def began(self, slot: bytes, number: int, members: Iterable[PeerId]) -> None:
        """Round `number` began in `slot` with these others; who was not in it comes back by a word of its own."""
        if slot in self._mates:
            self._mates[slot] = set(members)
            self._last[slot] = number

    def is_early(self, here: Here) -> bool:
        """Return whether a peer stands in a slot of ours for a round that has not begun there yet."""
        return here.slot in self._mates and here.number > self._last.get(here.slot, -1)

    def hear(self, peer: PeerId, here: Here) -> None:
        """Keep what `peer` says of a slot in which we do not stand now. It is in one slot at a time."""
        self.expect(peer, here.slot)
        if peer in self._heard or len(self._heard) < MAX_HEARD:
            self._heard[peer] = here

    def take(self, slot: bytes) -> list[tuple[PeerId, Here]]:
        """Return, and forget, what was said of `slot` while we stood elsewhere."""
        heard = [(peer, here) for peer, here in self._heard.items() if here.slot == slot]
        for peer, _ in heard:
            del self._heard[peer]
        return heard

    def quit(self, peer: PeerId, slot: bytes) -> None:
        """`peer` does not stand in `slot` any more; it may come back for a later round."""
        if peer in self._heard and self._heard[peer].slot == slot:
            del self._heard[peer]

    def lose(self, peer: PeerId) -> None:
        """`peer` is gone: what it said counts no longer, but it may come back to where it was."""
        self._heard.pop(peer, None)
