"""The bytes of one round: where pieces come from, where they are summed, and where results lie.

`Exchange` decides, this computes. Inputs are read where the trainer (or the round before) left them, sums (or, where
members may be bad, the pieces themselves) live in pooled memory while a chunk is open, and results go to their slots in
the output vector. Before a slot is written, whoever still reads from it or is receiving into it is told
(`before_write`), so that no link ever carries a mixture of two versions.
"""

from collections.abc import Callable, Sequence
from typing import Any

from mpd.codecs import Codec
from mpd.errors import NotFinite, PeerError, RoundFailed
from mpd.reduce import Accumulator, AccumulatorPool, first_non_finite, members_of
from mpd.robust import Stack, StackPool
from mpd.schedule import Chunk

from . import faults

IN_PLACE = object()  # the payload of a result that was received straight into its slot
_PLAIN = 2.0**20  # weights up to here, and down to its inverse, are summed as they are
_SMALLEST = 2.0**-30
_MAX_CACHED_RESULTS = 8


class RegionVault:
    """The memory of one member in one round.

    Args:
        inputs: this member's vector; not written by anybody while the round lasts.
        slots: the output vector, of the same length; may hold anything.
        weights: of all members, by place.
    """

    def __init__(
        self, chunks: Sequence[Chunk], inputs: memoryview, slots: memoryview, weights: Sequence[float], me: int
    ) -> None:
        self.chunks = chunks
        self.before_write: Callable[[int], None] = lambda chunk: None
        self._inputs = inputs
        self.slots = slots
        self._weights = _scaled(weights)
        self._me = me
        self._open: dict[int, Accumulator | Stack | None] = {}
        self._encoded: dict[int, memoryview | bytes] = {}

    def use(self, codec: Codec, pool: AccumulatorPool | StackPool) -> "RegionVault":
        """Set how values travel, and what sums them in whose memory; returns itself."""
        self.codec = codec
        self._pool: Any = pool  # takes back what it handed out, so the two kinds never meet
        return self

    # --------------------------------------------------------------------------------------- what the exchange asks for

    def open(self, chunk: int) -> None:
        """Prepare to sum a chunk. Memory is taken with the first piece: all chunks of a shard open at once."""
        self._open[chunk] = None

    def add(self, chunk: int, sender: int, payload: Any) -> None:
        """Add a piece. Raises PeerError if it is malformed or not finite, RoundFailed if our own piece is."""
        self._sums(chunk).add(self._values(chunk, payload), self._weights[sender])

    def close(self, chunk: int, contributors: int) -> None:
        """Write the mean over `contributors` to the slot, as everybody else will read it from the wire."""
        if faults.armed:
            faults.strike("reduce")
        piece, slot = self.chunks[chunk], self.slot_view(chunk)
        sums = self._sums(chunk)
        self._prepare(chunk)
        sums.mean_into(slot, sum(self._weights[member] for member in members_of(contributors)))
        self.discard(chunk)
        if not self.codec.lossless:
            payload = memoryview(self.codec.encode(slot, piece.dtype))
            self.codec.decode(payload, piece.dtype, piece.n_elems, slot)

    def store(self, chunk: int, payload: Any) -> None:
        """Write a received result to its slot. Raises PeerError if it is malformed or not finite."""
        piece = self.chunks[chunk]
        if payload is not IN_PLACE:
            self._prepare(chunk)
            self.codec.decode(payload, piece.dtype, piece.n_elems, self.slot_view(chunk))
        self._encoded.pop(chunk, None)
        bad = first_non_finite(self.slot_view(chunk), piece.dtype)
        if bad is not None:
            raise NotFinite(f"its result for chunk {chunk} is not finite at element {bad}")

    def discard(self, chunk: int) -> None:
        """Forget a sum that will not be closed."""
        sums = self._open.pop(chunk, None)
        if sums is not None:
            self._pool.give(sums)

    def before_overwrite(self, chunk: int) -> None:
        """The slot's bytes are about to change: nobody may go on reading them."""
        self._prepare(chunk)

    # ------------------------------------------------------------------------------------------- what the links ask for

    def input_view(self, chunk: int) -> memoryview:
        """Return this member's values of a chunk."""
        return self._inputs[self.chunks[chunk].offset : self.chunks[chunk].end]

    def slot_view(self, chunk: int) -> memoryview:
        """Return the place of a chunk in the output vector."""
        return self.slots[self.chunks[chunk].offset : self.chunks[chunk].end]

    def piece_payload(self, chunk: int) -> memoryview:
        """Return this member's piece as it travels."""
        return memoryview(self.codec.encode(self.input_view(chunk), self.chunks[chunk].dtype)).cast("B")

    def result_payload(self, chunk: int) -> memoryview:
        """Return a result as it travels: encoded once although several links send it."""
        payload = self._encoded.get(chunk)
        if payload is None:
            payload = self.codec.encode(self.slot_view(chunk), self.chunks[chunk].dtype)
            if not self.codec.identity:
                while len(self._encoded) >= _MAX_CACHED_RESULTS:
                    del self._encoded[next(iter(self._encoded))]
                self._encoded[chunk] = payload
        return memoryview(payload).cast("B")

    def accepts(self, chunk: int, member: int, n_bytes: int, codec: int) -> str:
        """Return why a record with this header cannot be part of the plan, or an empty string."""
        if not 0 <= chunk < len(self.chunks):
            return f"chunk {chunk} of a plan with {len(self.chunks)} chunks"
        piece = self.chunks[chunk]
        limit = self.codec.payload_limit(piece.dtype, piece.n_elems)
        if member != piece.owner:
            return f"chunk {chunk} as part of the shard of member {member}; it belongs to member {piece.owner}"
        if codec != self.codec.code:
            return f"codec {codec}; this run uses {self.codec.name}"
        if n_bytes > limit or (self.codec.fixed_size and n_bytes != limit):
            return f"{n_bytes} bytes for chunk {chunk}; {limit} are planned"
        return ""

    def _sums(self, chunk: int) -> Accumulator | Stack:
        """Return the sum of an open chunk, with this member's own piece in it if that counts."""
        begun = self._open[chunk]
        if begun is not None:
            return begun
        piece, weight = self.chunks[chunk], self._weights[self._me]
        sums: Accumulator | Stack = self._pool.take(piece.dtype, piece.n_elems)
        self._open[chunk] = sums
        if weight > 0:
            try:
                sums.add(self.input_view(chunk), weight)
            except PeerError as error:
                raise RoundFailed(f"this machine's own values cannot be averaged: {error}") from error
        return sums

    def _values(self, chunk: int, payload: memoryview) -> memoryview:
        piece = self.chunks[chunk]
        if self.codec.identity:
            return payload
        values = memoryview(bytearray(piece.n_bytes))
        self.codec.decode(payload, piece.dtype, piece.n_elems, values)
        return values

    def _prepare(self, chunk: int) -> None:
        self._encoded.pop(chunk, None)
        self.before_write(chunk)


def _scaled(weights: Sequence[float]) -> tuple[float, ...]:
    """Return `weights` up to a common factor: all 1 if they are equal, and never so extreme that sums suffer.

    A weight below 2^-30 of the largest is raised to that: what float32 keeps of it is the same.
    """
    counting = [weight for weight in weights if weight > 0]
    smallest, largest = min(counting), max(counting)
    if smallest == largest:
        return tuple(1.0 if weight > 0 else 0.0 for weight in weights)
    if largest <= _PLAIN and smallest >= 1 / _PLAIN:
        return tuple(weights)
    return tuple(max(weight / largest, _SMALLEST) if weight > 0 else 0.0 for weight in weights)
