"""What one member holds, writes and lacks of the vector, under the plan that it follows.

A slot holds one version of its chunk; versions overwrite each other. A version is opened by its writer at BEGIN or when
the very plan that calls for it is installed, and never again: closed twice, it could have two contents.
"""

import itertools
import struct
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

from mpd.ballot import MAX_EPOCH, Plan, first_plan, make_bitmap
from mpd.collect import Collector
from mpd.errors import PeerError
from mpd.group import Group
from mpd.messages import Ask, ChunkVersion, Want
from mpd.reduce import mask_of, members_of
from mpd.rounds import RoundPlan, SendPiece, SendResult, Vault
from mpd.seek import Seeker

NO_VERSION = -1


class Chunks:
    """The slots, the open versions (`collector`), and the search for what is lacking (`seeker`).

    `plan` is the plan in force, `contributors[chunk]` the mask that belongs to the slot, `n_lacking` the number of
    chunks of which the slot is not what the plan names. `has_unclosed` says that `close_next` has something to do.
    """

    def __init__(self, round_plan: RoundPlan, vault: Vault, group: Group) -> None:
        self._round = round_plan
        self._vault = vault
        self._group = group
        self._me_sends = round_plan.senders >> round_plan.me & 1 == 1
        self.plan = first_plan(round_plan)
        self.versions = [NO_VERSION] * round_plan.n_chunks
        self.contributors = [0] * round_plan.n_chunks
        self.n_lacking = round_plan.n_chunks
        self.has_unclosed = False
        self.collector = Collector(round_plan, vault)
        self.seeker = Seeker(round_plan)

    # pieces

    def start(self) -> None:
        """Open what I own, push my pieces of the rest."""
        owners = self._round.owners
        for chunk, owner in enumerate(owners):
            if owner == self._round.me:
                self.collector.open(chunk)
        if self._me_sends:
            for chunk in self._round.pieces_in_order():
                if self._group.is_linked(owners[chunk]):
                    self._group.actions.append(SendPiece(owners[chunk], chunk, 0))
        self.close_what_is_ready()

    def wants_piece(self, sender: int, chunk: int, version: int) -> bool:
        """True if this piece would be added. Raises PeerError if `sender` must not send it."""
        self._check(chunk, version)
        if not self._round.senders >> sender & 1:
            raise PeerError("it weighs nothing in this round and sends a piece all the same")
        if version > self.plan.epoch or (version == 0 and self._round.owners[chunk] != self._round.me):
            raise PeerError(f"it sends a piece of chunk {chunk}, version {version}, which I do not write")
        return version == self.plan.table[chunk][0] and self.collector.lacks(chunk, sender)

    def add_piece(self, sender: int, chunk: int, payload: Any) -> None:
        """Add a wanted piece. Raises PeerError if it is unusable."""
        self.collector.add(chunk, sender, payload)
        self._close_if_ready(chunk)

    def answer_ask(self, asker: int, chunks: tuple[ChunkVersion, ...]) -> None:
        """Send my pieces again, for versions that `asker` redoes. Raises PeerError if that cannot be."""
        self._check_all(asker, chunks)
        if not self._me_sends or not all(version for _, version in chunks):
            raise PeerError("it asks for pieces that I do not have")
        self._group.actions.extend(SendPiece(asker, chunk, version) for chunk, version in chunks)

    def close_what_is_ready(self) -> None:
        """Who is waited for may have changed: close what waits for nobody any more, one chunk now, the rest later."""
        self.collector.expect(self.plan.awaited & self._group.linked)
        self.close_next()

    def close_next(self) -> None:
        """Close one more of the chunks that wait for nobody.

        A lost member may have been all that every chunk waited for, and to combine many vectors takes long: whoever
        drives this member has other things to do in between.
        """
        ready = list(itertools.islice(filter(self.collector.is_ready, self.collector.chunks()), 2))
        for chunk in ready[:1]:
            self._close_if_ready(chunk)
        self.has_unclosed = len(ready) > 1

    def _close_if_ready(self, chunk: int) -> None:
        if not self.collector.is_ready(chunk):
            return
        version = self.plan.table[chunk][0]
        self._vacate(chunk)
        contributors = self.collector.close(chunk)
        self._hold(chunk, version, contributors, send_to=self._group.linked)
        self._ask_for_pieces()

    def _ask_for_pieces(self) -> None:
        self._ask(self.collector.next_to_ask(), self.collector.expected)

    def _ask(self, chunks: list[int], members: int) -> None:
        if chunks:
            ask = Ask(tuple((chunk, self.plan.table[chunk][0]) for chunk in chunks))
            for member in members_of(members):
                self._group.send(member, ask)

    # results

    def wants_result(self, sender: int, chunk: int, version: int) -> bool:
        """True if this result would be stored. Raises PeerError if `sender` cannot have it."""
        self._check(chunk, version)
        if version != self.plan.table[chunk][0] or version == self.versions[chunk]:
            return False
        if chunk in self.collector:
            raise PeerError(f"it sends chunk {chunk}, version {version}, which I am still writing")
        return True

    def note_result(self, sender: int, chunk: int, version: int) -> None:
        """A result has come: one whose plan has yet to come will be wanted from `sender` when it does."""
        if version > self.plan.epoch:
            self.seeker.note_early(chunk, version, sender)

    def check_contributors(self, contributors: int) -> None:
        """Raise PeerError unless `contributors` can be those of a chunk."""
        if not contributors or contributors & ~self._round.senders:
            raise PeerError(f"contributors {contributors:#x}: members of this round whose weight counts expected")

    def store_result(self, chunk: int, version: int, contributors: int, payload: Any) -> None:
        """Store a wanted result. Raises PeerError if it is unusable; then the slot is empty."""
        self._vacate(chunk)
        self._vault.store(chunk, payload)
        self._hold(chunk, version, contributors)

    def answer_want(self, member: int, chunks: tuple[ChunkVersion, ...], *, keep: bool) -> None:
        """Send what is wanted and here, whatever the plan says; with `keep` send the rest when it comes."""
        self._check_all(member, chunks)
        for chunk, version in chunks:
            if self.versions[chunk] == version:
                self._group.actions.append(SendResult(member, chunk, version, self.contributors[chunk]))
            elif keep:
                self.seeker.owe(chunk, version, member)

    def _vacate(self, chunk: int) -> None:
        if self.versions[chunk] != NO_VERSION:
            self._vault.before_overwrite(chunk)
            self.versions[chunk] = NO_VERSION

    def _hold(self, chunk: int, version: int, contributors: int, send_to: int = 0) -> None:
        """The slot is filled: send it to the members in `send_to`, and to those that have wanted it for a while."""
        self.versions[chunk] = version
        self.contributors[chunk] = contributors
        self.n_lacking -= 1
        receivers = send_to | mask_of(self.seeker.arrived(chunk, version)) & self._group.linked
        for member in members_of(receivers):
            self._group.actions.append(SendResult(member, chunk, version, contributors))

    # plans

    def follow(self, plan: Plan, *, may_open: bool) -> None:
        """Go over to `plan`, opening the versions that it tells me to write if I `may_open` any."""
        before, self.plan = self.plan, plan
        expected_before = self.collector.expected
        for chunk, entry in enumerate(plan.table):
            if entry != before.table[chunk]:
                self._replan(chunk, entry, may_open=may_open)
        self.n_lacking = sum(held != version for held, (version, _) in zip(self.versions, plan.table, strict=True))
        self.close_what_is_ready()
        # The plan may keep a version that I redo, and let me wait for members that I have not asked for their pieces.
        self._ask(self.collector.asked(), self.collector.expected & ~expected_before)
        self._ask_for_pieces()

    def _replan(self, chunk: int, entry: tuple[int, int], *, may_open: bool) -> None:
        self.collector.abandon(chunk)
        self.seeker.replanned(chunk, is_new=entry[0] == self.plan.epoch)
        if may_open and entry == (self.plan.epoch, self._round.me):
            self.collector.open_to_ask(chunk)

    def seek(self, holders: int) -> None:
        """Want from others what will not come by itself; `holders` masks who is known to hold everything."""
        lacking = [
            chunk
            for chunk, (version, _) in enumerate(self.plan.table)
            if self.versions[chunk] != version and (chunk not in self.collector or self.collector.is_barren(chunk))
        ]
        prompt, silent = self._group.linked & ~self._group.silent, self._group.linked & self._group.silent
        wants = self.seeker.seek(lacking, self.plan, holders, prompt, silent)
        for member, chunks in sorted(wants.items()):
            self._group.send(member, Want(self.plan.epoch, tuple(chunks)))

    def suppliers(self) -> int:
        """Mask of the members from whom lacking chunks are to come."""
        return mask_of(supplier for supplier, _ in self._lacking())

    def lacking_from_writers(self) -> Counter[int]:
        """Count the lacking chunks by writer, those left out that are to come from somebody else."""
        return Counter(writer for supplier, writer in self._lacking() if supplier == writer)

    def _lacking(self) -> Iterator[tuple[int, int]]:
        """Yield supplier and writer of each chunk that I lack."""
        if self.n_lacking:
            for chunk, (version, writer) in enumerate(self.plan.table):
                if self.versions[chunk] != version:
                    yield self.seeker.supplier(chunk, writer), writer

    def held(self) -> bytes:
        """Bitmap of the chunks that I hold as the plan names them."""
        chunks = (c for c, (version, _) in enumerate(self.plan.table) if self.versions[c] == version)
        return make_bitmap(chunks, self._round.n_chunks)

    def opened(self) -> bytes:
        """Bitmap of the chunks that I am writing and will close."""
        chunks = (c for c in self.collector.chunks() if not self.collector.is_barren(c))
        return make_bitmap(chunks, self._round.n_chunks)

    def digest(self) -> bytes:
        """8 bytes over version and contributors of every slot."""
        n_chunks = self._round.n_chunks
        body = struct.pack(f"<{n_chunks}I{n_chunks}Q", *self.versions, *self.contributors)
        return blake2b(body, digest_size=8).digest()

    def _check(self, chunk: int, version: int) -> None:
        if not 0 <= chunk < self._round.n_chunks:
            raise PeerError(f"chunk {chunk}: 0 to {self._round.n_chunks - 1} expected")
        if not 0 <= version <= MAX_EPOCH:
            raise PeerError(f"version {version}: 0 to {MAX_EPOCH} expected")

    def _check_all(self, member: int, chunks: tuple[ChunkVersion, ...]) -> None:
        for chunk, version in chunks:
            self._check(chunk, version)
        self._group.count_servings(member, len(chunks))
