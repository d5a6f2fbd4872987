"""Peers that use a run's name for something else: both sides tell each other their terms, and say what differs.

They never meet, because their terms are part of every slot; without this, nobody would know why.
"""

from typing import Any

from mpd.errors import LocalError, PeerError
from mpd.ids import PeerId
from mpd.layout import Layout, Terms
from mpd.messages import RunTerms

from .contacts import Contacts
from .links import Link
from .roster import Seen


class Strangers:
    """The peers with other terms under the name `run`."""

    def __init__(self, run: str, terms: Terms, contacts: Contacts) -> None:
        self.differences: dict[PeerId, str] = {}  # the first difference, in our words
        self._run = run
        self._terms = terms
        self._contacts = contacts
        self._told: dict[PeerId, bytes] = {}  # who has our terms, in answer to which

    def review(self, strangers: dict[PeerId, Seen]) -> None:
        """Tell our terms to those whom the roster shows for the first time; forget those who have gone from it."""
        self.differences = {peer: what for peer, what in self.differences.items() if peer in strangers}
        self._told = {peer: digest for peer, digest in self._told.items() if peer in strangers}
        for seen in strangers.values():
            if self._told.get(seen.peer) != seen.place.digest:
                self._told[seen.peer] = seen.place.digest
                self._contacts.note(seen)
                self._contacts.say(seen.peer, self._own_terms(answer_me=True))

    def lose(self, peer: PeerId) -> None:
        """The peer is gone; if it comes back, it may have changed its mind."""
        self.differences.pop(peer, None)
        self._told.pop(peer, None)

    def on_terms(self, link: Link, message: RunTerms) -> str | None:
        """Return what differs, where that is news. Raises PeerError on terms that nobody can have."""
        try:
            theirs = Terms(
                Layout(message.tensors), message.group_size, message.rounds, message.codec, message.aggregate
            )
        except LocalError as error:
            raise PeerError(f"it sent impossible terms: {error}") from error
        difference = self._terms.first_difference(theirs)
        if message.answer_me:
            link.send(self._own_terms(answer_me=False))
        if difference is None or self.differences.get(link.peer) == difference:
            return None
        self.differences[link.peer] = difference
        return difference

    def _own_terms(self, answer_me: bool) -> Any:
        terms = self._terms
        return RunTerms(
            self._run, terms.layout.specs, terms.group_size, terms.rounds, terms.codec, terms.aggregate, answer_me
        )
