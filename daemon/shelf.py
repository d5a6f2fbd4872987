"""The out region of a run, and the committed vectors that are held for others to read.

Strategy: a state is no copy. While somebody wants it, the region of a committed result is left as it is and the run
publishes in another one. That other one is made first, beside the rounds, and only a result that nobody is writing over
is held; so holding a state takes a step nothing but an exchange of two references. A run holds two states at most, and
each of them for a moment after the last reader has gone. Hashes are computed in a thread, once.
"""

from dataclasses import dataclass, field

import trio

from mpd.errors import LocalError
from mpd.layout import Terms
from mpd.manifest import Manifest, chunk_hash, chunk_span, n_chunks

from .budgets import Budget
from .memory import OutRegion

HOLD_S = 30.0  # how long a state is held that nobody asks for
BUSY_S = 2.0  # and for how long it does not make room for a newer one
MAX_HELD = 2  # per run: one that is being served, and a newer one


@dataclass(frozen=True, slots=True)
class Commit:
    """What lies in the out region: what round left it, how many rounds lie behind it, and its trainers' metadata."""

    round_id: bytes
    number: int
    metadata: bytes = field(repr=False)


class HeldState:
    """A vector that nobody writes any more. `readers` counts who serves from it now."""

    def __init__(self, region: OutRegion, manifest: Manifest, metadata: bytes) -> None:
        self.region = region
        self.manifest = manifest
        self.metadata = metadata
        self.readers = 0
        self.used_at = trio.current_time()
        self.is_open = True

    def chunk(self, chunk: int) -> memoryview:
        """Return one chunk."""
        begin, end = chunk_span(chunk, self.manifest.n_bytes)
        return self.region.view[begin:end]


class Shelf:
    """Where a run publishes (`out`), and what it holds for others. `age` counts the rounds behind its vector."""

    def __init__(self, terms: Terms, out: OutRegion, budget: Budget) -> None:
        self.out = out
        self.age = 0
        self.commit: Commit | None = None  # what `out` holds, while it does
        self.last: Commit | None = None  # the commit before which nothing is newer
        self.is_writing = False
        self.is_closed = False
        self.terms = terms
        self._budget = budget
        self._held: list[HeldState] = []  # the newest last
        self._pinned: OutRegion | None = None  # the region of a state, if that is `out`
        self._spare: OutRegion | None = None
        self._taking = trio.Lock()
        self._changed = trio.Event()

    # --------------------------------------------------------------------------------------------------------- the run

    def begin_write(self) -> None:
        """A round is about to write to `out`: if that is held, the round gets the other region."""
        self.commit = None
        self.is_writing = True
        self.turn()

    def publish(self, commit: Commit) -> None:
        """`out` holds a result, complete and published."""
        self.commit = self.last = commit
        self.age = max(self.age, commit.number)
        self.end_write()

    def end_write(self) -> None:
        """Nobody writes to `out` any more, whether or not there is a result."""
        self.is_writing = False
        self._wake()

    def turn(self) -> bool:
        """Leave `out` to those who hold it, if anybody does; return whether."""
        if self._pinned is None:
            return False
        assert self._spare is not None, "nothing is held before there is another region"
        self.out, self._spare, self._pinned = self._spare, None, None
        self.commit = None
        return True

    def replace(self, region: OutRegion) -> None:
        """Publish in `region` from now on."""
        if self._pinned is None:
            self.out.close()  # rounds that still serve others from it hold it themselves
        else:
            self._pinned = None
            self._free_spare()
        self.out, self.commit = region, None

    def close(self) -> None:
        """The run has ended: let go of everything."""
        self.is_closed = True
        self.is_writing = False
        self.commit = None
        for state in list(self._held):
            self._release(state)
        self._pinned = None
        self._free_spare()
        self.out.close()
        self._wake()

    # ------------------------------------------------------------------------------------------------------ for others

    @property
    def held(self) -> tuple[HeldState, ...]:
        """What is held now, the newest last."""
        return tuple(self._held)

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to hold, and no round that might bring something."""
        return not (self._held or self.commit or self.is_writing)

    @property
    def is_late(self) -> bool:
        """True if `state` would wait for the end of a round."""
        return self.is_writing and self._current() is None

    async def wait_newer(self, number: int) -> None:
        """Wait until something is committed that has more than `number` rounds behind it."""
        while self.last is None or self.last.number <= number:
            await self._changed.wait()

    def find(self, manifest: bytes) -> HeldState | None:
        """Return the state of this name, if it is held."""
        return next((state for state in self._held if state.manifest.digest == manifest), None)

    async def state(self, round_id: bytes = b"") -> HeldState:
        """Hold what was committed last, or rather what the round `round_id` left, and return it.

        Waits for the end of a round that is under way. Raises LocalError if there is nothing, or no room for it.
        """
        async with self._taking:
            named = next((state for state in self._held if state.manifest.round_id == round_id), None)
            state = named or self._current()
            if state is None:
                return await self._next()
            state.used_at = trio.current_time()
            return state

    def reserve(self) -> None:
        """Keep a place for what is to be loaded, for `adopt` or `unreserve`. Raises LocalError if there is none."""
        if self.is_closed or not (self._make_room(pause_s=0.0) and self._budget.take()):
            raise LocalError("this daemon holds as many states as it may: try again later")

    def unreserve(self) -> None:
        """Nothing was loaded."""
        self._budget.give()

    def adopt(self, region: OutRegion, manifest: Manifest, metadata: bytes) -> HeldState:
        """Hold what was loaded from elsewhere, in the place that was reserved; `region` becomes ours."""
        self.age = max(self.age, manifest.number)
        state = HeldState(region, manifest, metadata)
        self._held.append(state)
        if self.is_closed:
            self._release(state)
        return state

    def expire(self) -> None:
        """Let go of what nobody has asked for lately."""
        for state in list(self._held):
            if not state.readers and trio.current_time() - state.used_at > HOLD_S:
                self._release(state)

    def let_go(self, state: HeldState) -> None:
        """Whoever took `state` for itself needs it no more."""
        if state in self._held and not state.readers:
            self._release(state)

    def _current(self) -> HeldState | None:
        """Return the newest state that is held, None if something newer was committed."""
        newest = max(self._held, key=lambda state: state.manifest.number, default=None)
        is_outdated = newest is None or (self.last is not None and newest.manifest.number < self.last.number)
        return None if is_outdated else newest

    async def _next(self) -> HeldState:
        """Hold the last commit, or the next one; if there is none, the newest state of before. Raises LocalError."""
        if self._make_room():
            try:
                return await self._take()
            except LocalError:
                if not self._held or self.is_closed:
                    raise
        return max(self._held, key=lambda state: state.manifest.number)  # not counted as used: it should make room

    def _make_room(self, pause_s: float = BUSY_S) -> bool:
        """Return whether one more state may be held, having let go of one that nobody reads if need be."""
        before = trio.current_time() - pause_s
        idle = [state for state in self._held if not state.readers and state.used_at <= before]
        if len(self._held) >= MAX_HELD and idle:
            self._release(idle[0])
        return len(self._held) < MAX_HELD

    async def _take(self) -> HeldState:
        if not self._budget.take():
            raise LocalError("this daemon holds as many states as it may: try again later")
        try:
            if self._spare is None:
                self._spare = await OutRegion.make(self.terms.layout.n_bytes)
            while self.commit is None and self.is_writing:
                await self._changed.wait()
            commit = self.commit
            if commit is None:
                raise LocalError("no round has ended well there yet, or the last one did not")
            # From here on the region is ours, even if a round turns away from it before the hashes are there.
            region = self._pinned = self.out
            try:
                hashes = await trio.to_thread.run_sync(_hashes, region.view)
            except BaseException:
                self._unpin(region)
                raise
            if self.is_closed:
                self._unpin(region)
                raise LocalError("the run has ended there")
        except BaseException:
            if self._pinned is None:
                self._free_spare()
            self._budget.give()
            raise
        manifest = Manifest(
            self.terms.digest, commit.round_id, commit.number, self.terms.layout.n_bytes, b"".join(hashes)
        )
        state = HeldState(region, manifest, commit.metadata)
        self._held.append(state)
        return state

    def _release(self, state: HeldState) -> None:
        state.is_open = False
        self._held.remove(state)
        self._budget.give()
        self._unpin(state.region)

    def _unpin(self, region: OutRegion) -> None:
        """Nobody holds `region` any more: it is free, or the run's again."""
        if region is self._pinned:
            self._pinned = None
            self._free_spare()
        elif region is not self.out:
            region.close()

    def _free_spare(self) -> None:
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _hashes(vector: memoryview) -> list[bytes]:
    """Return the hash of each chunk of `vector`."""
    n_bytes = vector.nbytes
    return [chunk_hash(vector[begin:end]) for begin, end in (chunk_span(i, n_bytes) for i in range(n_chunks(n_bytes)))]
