"""What an unexpected exception may cost: its own share of the daemon, and nothing else.

A bug, or a machine that behaves as nobody thought of, must cost one link, one round, one step, one connection or one
call, and never the daemon with all its other runs and trainers. trio's nurseries do the opposite by design: whatever
escapes from one task ends its siblings. So each task that is somebody's share runs `contained` (`confine` does that for
a nursery), or `supervise`d if it has to go on. What is contained is logged with its traceback, once for each place it
comes from, and counted for `mpd status`. Counts belong to the process, as its log does.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import trio

MIN_PAUSE_S = 0.1  # before work that failed is begun again; doubles
MAX_PAUSE_S = 10.0
UNEXPECTED = "an unexpected error on this machine, which its log describes"
_MAX_PLACES = 1000  # whose traceback is remembered to have been logged

_log = logging.getLogger("mpd")
_counts: Counter[str] = Counter()
_places: set[tuple[str, type[BaseException], str, int]] = set()


def report(share: str, error: BaseException) -> None:
    """Log and count an unexpected `error` that costs one `share`: "link", "round", "step" and the like."""
    _counts[share] += 1
    place = (share, *_origin(error))
    is_known = place in _places
    if len(_places) < _MAX_PLACES:
        _places.add(place)
    _log.error(
        "an unexpected error cost one %s, the rest of the daemon goes on: %r%s",
        share,
        _innermost(error),
        " (as before)" if is_known else "",
        exc_info=None if is_known else error,
    )


def counts() -> dict[str, int]:
    """Return how many unexpected errors were contained since the start, by what they cost."""
    return dict(_counts)


def problem() -> str:
    """Return the counts as a sentence for the owner of this machine; empty if there is nothing to say."""
    if not _counts:
        return ""
    what = ", ".join(f"{n} {share}{'s' * (n != 1)}" for share, n in sorted(_counts.items()))
    return f"unexpected errors cost {what}: the log has their tracebacks, please report them"


@contextlib.contextmanager
def contained(share: str) -> Iterator[None]:
    """Let an unexpected exception in the block end the block only. Cancellation passes."""
    try:
        yield
    except* Exception as errors:  # noqa: BLE001  # that is what this is for
        report(share, errors)


async def confine(share: str, work: Callable[..., Awaitable[None]], *args: object) -> None:
    """Run `work(*args)` once, `contained`: what to give to a nursery whose other tasks are none of its business."""
    with contained(share):
        await work(*args)


async def supervise(share: str, work: Callable[..., Awaitable[None]], *args: object) -> None:
    """Run `work(*args)` until it returns; after an unexpected exception begin again, each time a little later."""
    pause_s = MIN_PAUSE_S
    while True:
        began = trio.current_time()
        is_done = False
        with contained(share):
            await work(*args)
            is_done = True
        if is_done:
            return
        pause_s = MIN_PAUSE_S if trio.current_time() - began > MAX_PAUSE_S else min(2 * pause_s, MAX_PAUSE_S)
        await trio.sleep(pause_s)


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _origin(error: BaseException) -> tuple[type[BaseException], str, int]:
    error = _innermost(error)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return type(error), "", 0
    return type(error), trace.tb_frame.f_code.co_filename, trace.tb_lineno
