"""The last committed vector of each run on disk, so that a swarm whose machines all vanished can go on.

Strategy: saving is one more reader of a held state, in a thread, so no round waits for a disk. A file is written beside
the old one, synced, and renamed over it: whatever happens, one of the two is there and whole. It is written once a
minute at most, and less often where it takes long. What is read back counts only if header, terms and every chunk are
right; anything else is named and left alone. A disk that is full or read-only costs nothing but the file.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from mpd.errors import LocalError
from mpd.manifest import chunk_span
from mpd.state_file import PREFIX_BYTES, Kept, StateHead, head_bytes, pack_head, parse_head

from .memory import OutRegion
from .shelf import HeldState, Shelf
from .state import sync_folder

EVERY_S = 60.0  # at most once in this time is a run's state saved
_REST = 20  # and at most this share of the time is spent on it: a twentieth
_WRITE_BYTES = 4 << 20  # after so many it is asked whether anybody still wants it
_FRESH = ".new-"
FOLDER = "runs"

_log = logging.getLogger("mpd")


class Keeper:
    """Keeps states in `folder`, one file per run. `wall_s` is the time of day."""

    def __init__(self, folder: Path, wall_s: Callable[[], float]) -> None:
        self._folder = folder
        self._wall_s = wall_s
        self._troubles: dict[str, str] = {}  # of each run
        self._reading = trio.Lock()
        with contextlib.suppress(OSError):
            for left_behind in folder.glob(f"{_FRESH}*"):
                left_behind.unlink()

    @property
    def problem(self) -> str:
        """What could not be kept or loaded, in sentences; empty if all is well."""
        return "; ".join(self._troubles.values())

    def file_of(self, run: str) -> Path:
        """Return where the state of `run` lies."""
        return state_file(self._folder, run)

    # ----------------------------------------------------------------------------------------------------------- out

    async def keep(self, run: str, shelf: Shelf) -> None:
        """Save what `run` commits, now and then, until cancelled."""
        saved = -1
        while True:
            await shelf.wait_newer(saved)
            began = trio.current_time()
            try:
                saved = await self._save(run, shelf)
                self._troubles.pop(run, None)
            except OSError as error:
                self._complain(run, f"the state of run {run!r} could not be saved: {error.strerror or error}")
            except LocalError as error:
                self._complain(run, f"the state of run {run!r} could not be saved: {error}")
            await trio.sleep(max(EVERY_S, _REST * (trio.current_time() - began)))

    async def _save(self, run: str, shelf: Shelf) -> int:
        """Save the newest state; return the number of its round. Raises OSError, LocalError."""
        state = await shelf.state()
        taken_at = state.used_at
        state.readers += 1
        given_up = threading.Event()
        try:
            write = partial(_write, self.file_of(run), self._head(run, state), state.region.view, given_up)
            await trio.to_thread.run_sync(write, abandon_on_cancel=True)
        finally:
            given_up.set()
            state.readers -= 1
            if state.used_at == taken_at:  # nobody else has asked for it
                shelf.let_go(state)
        return state.manifest.number

    def _head(self, run: str, state: HeldState) -> bytes:
        manifest = state.manifest
        kept = Kept(
            run,
            manifest.terms,
            manifest.round_id,
            manifest.number,
            manifest.n_bytes,
            max(0.0, self._wall_s()),
            state.metadata,
        )
        return pack_head(kept, manifest)

    # ------------------------------------------------------------------------------------------------------------ in

    async def restore(self, run: str, shelf: Shelf) -> None:
        """Hold what was kept of `run`, if there is such a file and all of it is right. Otherwise nothing happens."""
        async with self._reading:
            file = self.file_of(run)
            if not shelf.is_empty or not file.exists():
                return
            try:
                await self._restore(run, shelf, file)
            except OSError as error:
                self._complain(run, f"the kept state {file} was not loaded: {error.strerror or error}")
            except LocalError as error:
                self._complain(run, f"the kept state {file} was not loaded: {error}")

    async def _restore(self, run: str, shelf: Shelf, file: Path) -> None:
        head = await trio.to_thread.run_sync(read_head, file)
        if head.kept.run != run:
            raise LocalError(f"it is of run {head.kept.run[:100]!r}")
        if head.kept.terms != shelf.terms.digest or head.kept.n_bytes != shelf.terms.layout.n_bytes:
            raise LocalError("the run had other terms or tensors then")
        shelf.reserve()
        try:
            region = await OutRegion.make(head.kept.n_bytes)
            try:
                await trio.to_thread.run_sync(_read, file, head, region.view)
                region.publish(1)
            except BaseException:
                region.close()
                raise
        except BaseException:
            shelf.unreserve()
            raise
        shelf.adopt(region, head.manifest, head.kept.metadata)
        _log.info("run %s: the state after round %d was found in %s", run, head.kept.number, file)

    def _complain(self, run: str, sentence: str) -> None:
        if self._troubles.get(run) != sentence:
            _log.warning("%s", sentence)
        self._troubles[run] = sentence


def state_file(folder: Path, run: str) -> Path:
    """Return where `folder` has the state of `run`: names of runs may hold anything."""
    return folder / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}.state"


def read_head(file: Path) -> StateHead:
    """Return what a state file says of itself. Raises OSError, LocalError."""
    with file.open("rb") as stream:
        prefix = stream.read(PREFIX_BYTES)
        head = prefix + stream.read(head_bytes(prefix) - len(prefix))
        return parse_head(head, os.fstat(stream.fileno()).st_size)


def _read(file: Path, head: StateHead, out: memoryview) -> None:
    """Read the vector, and believe no byte of it before its chunk is right. Raises OSError, LocalError."""
    with file.open("rb", buffering=0) as stream:
        stream.seek(head.vector_at)
        for chunk in range(head.manifest.n_chunks):
            begin, end = chunk_span(chunk, head.kept.n_bytes)
            slot = out[begin:end]
            if stream.readinto(slot) != end - begin or not head.manifest.matches(chunk, slot):
                raise LocalError(f"chunk {chunk} of its vector is damaged")


def _write(file: Path, head: bytes, vector: memoryview, given_up: threading.Event) -> None:
    """Make `file` hold `head` and `vector`, or leave it as it is. Raises OSError."""
    file.parent.mkdir(mode=0o700, exist_ok=True)
    fd, fresh = tempfile.mkstemp(prefix=_FRESH, dir=file.parent)
    try:
        with os.fdopen(fd, "wb", buffering=0) as stream:
            for part in (memoryview(head), vector):
                _write_all(stream.fileno(), part, given_up)
            os.fsync(stream.fileno())
        os.replace(fresh, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise
    sync_folder(file.parent)


def _write_all(fd: int, data: memoryview, given_up: threading.Event) -> None:
    while data:
        if given_up.is_set():
            raise InterruptedError("given up")
        data = data[os.write(fd, data[:_WRITE_BYTES]) :]
