"""What a training loop holds: an averager for its tensors, and a pending step while it trains on.

Strategy: one step at a time, and everything that can be wrong is found before anything is sent. The result touches the
tensors only once it is complete; whatever fails before that leaves them alone. A connection that is in doubt (the
daemon died, somebody pressed Ctrl-C while waiting) is dropped, and the next step attaches anew: there is no state worth
saving on it. A daemon that dies, hangs or is away is an outcome like any other round that did not average: machines
come and go, and training goes on meanwhile.
"""

import contextlib
import math
import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from mpd import control
from mpd.errors import DaemonUnavailable, LocalError, MpdError
from mpd.layout import MAX_WEIGHT
from mpd.manifest import MAX_METADATA_BYTES

from .attachment import ATTACH_S
from .lifeline import Lifeline
from .loading import LoadedState, loaded_state_of
from .outcome import Outcome, outcome_of
from .tensors import Tensor
from .writeback import Replace, Shift, WriteBack, run_to_end

STEP_S = 60.0
LOAD_S = 600.0
GRACE_S = 2.0  # the daemon ends a step by its timeout; if it is not heard of by then and a little, it hangs
MIN_STEP_S = 0.05  # what is asked for if to attach again has taken all the time that the step had
GRACE_BYTES_PER_S = 256 << 20  # what of that little goes into setting memory up and copying, at the worst


class Averager:
    """Averages the same tensors again and again. Made by `Daemon.averager`; used by one thread and process.

    `metadata`, up to 64 KiB, go with every step from now on: whoever loads the state that a step leaves gets those that
    most of its peers had set.
    """

    def __init__(self, lifeline: Lifeline, tensors: Sequence[Tensor], weight: float, check_finite: bool) -> None:
        self._lifeline = lifeline
        self._tensors = tensors
        self._weight = weight
        self._check_finite = check_finite
        self._metadata = b""
        self._pid = os.getpid()
        self._seq = 0
        self._pending: Pending | None = None
        self._closed = False

    def step(self, weight: float | None = None, timeout: float | None = None) -> Outcome:
        """Average now: if the outcome is true, the tensors hold the average; if not, they are untouched.

        weight: of our values in the average, up to 1e8; timeout: the longest time the step may take, in seconds (60).
        If the daemon dies, hangs, or is away, the outcome says so, and the next step attaches to it as soon as it is
        back. Raises LocalError if the tensors cannot be averaged, or if another peer serves the socket now.
        """
        pending = self._begin(weight, timeout, train_on=False)
        try:
            return pending.wait()
        finally:
            if self._pending:
                self._drop()

    def start(self, weight: float | None = None, timeout: float | None = None) -> "Pending":
        """Begin to average the tensors as they are now, and return at once. Training may go on meanwhile.

        Arguments and errors are those of `step`. "At once" is when the tensors have been copied; after a restart of the
        daemon, when its memory has been set up as well.
        """
        return self._begin(weight, timeout, train_on=True)

    def load_state(self, timeout: float | None = None) -> LoadedState:
        """Get the run's current vector from the peers that hold it; if the result is true, the tensors hold it.

        For a trainer that comes late, or again: before its first step. `timeout`: the longest time that may take, in
        seconds (600). Nobody has a state before the first step of the run has averaged; that is found out in seconds.
        Raises LocalError if the tensors cannot be loaded, DaemonUnavailable if the daemon is gone.
        """
        self._ensure_usable()
        timeout_s = LOAD_S if timeout is None else _seconds(timeout)
        for tensor in self._tensors:
            tensor.check()
        lifeline, grace_s = self._lifeline, GRACE_S + self._lifeline.n_bytes / GRACE_BYTES_PER_S
        lifeline.ensure(timeout_s, min(timeout_s + grace_s, ATTACH_S), waits=True)
        self._ensure_in_place()
        self._seq += 1
        try:
            answer = lifeline.attachment.load_state(control.LoadState(self._seq, timeout_s), timeout_s + grace_s)
            if answer.loaded:
                run_to_end(Replace(self._tensors, lifeline.attachment.result))
                with contextlib.suppress(DaemonUnavailable):  # the tensors are loaded all the same
                    lifeline.attachment.send(control.Release(self._seq))
        except LocalError:
            raise
        except BaseException:
            self._drop()
            raise
        return loaded_state_of(answer)

    @property
    def metadata(self) -> bytes:
        """What goes with the next step."""
        return self._metadata

    @metadata.setter
    def metadata(self, value: bytes) -> None:
        try:
            metadata = bytes(memoryview(value))
        except TypeError:
            raise LocalError(f"metadata is {value!r}: bytes expected, at most {MAX_METADATA_BYTES}") from None
        if len(metadata) > MAX_METADATA_BYTES:
            raise LocalError(f"metadata has {len(metadata)} bytes: at most {MAX_METADATA_BYTES} expected")
        self._metadata = metadata

    def close(self) -> None:
        """Detach from the run. The tensors stay usable."""
        self._closed = True
        self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, weight: float | None, timeout: float | None, train_on: bool) -> "Pending":
        self._ensure_usable()
        weight_now = self._weight if weight is None else check_weight(weight)
        timeout_s = STEP_S if timeout is None else _seconds(timeout)
        for tensor in self._tensors:
            tensor.check()
        if self._check_finite:
            self._ensure_finite()
        lifeline, grace_s = self._lifeline, GRACE_S + self._lifeline.n_bytes / GRACE_BYTES_PER_S
        deadline = time.monotonic() + timeout_s
        self._seq += 1
        pending = Pending(self, self._seq, deadline + grace_s)
        try:
            lifeline.ensure(timeout_s, min(timeout_s + grace_s, ATTACH_S), waits=not train_on)
            self._ensure_in_place()
            self._hand_over(pending, weight_now, deadline, train_on)
        except DaemonUnavailable as error:
            pending._lose(error)
        return pending

    def _hand_over(self, pending: "Pending", weight: float, deadline: float, train_on: bool) -> None:
        """Give the daemon values and order. Whatever comes in between, neither is half given to the next step."""
        try:
            patience_s = max(deadline - time.monotonic(), 0.0) + GRACE_S
            source, sent = self._lifeline.hand_over(train_on, patience_s)
            self._pending = pending
            left_s = max(deadline - time.monotonic(), MIN_STEP_S)
            order = control.Step(pending.seq, weight, left_s, source, self._metadata)
            pending._ask(order, sent if train_on else None)
        except BaseException:
            self._drop()
            raise

    def _ensure_usable(self) -> None:
        self._ensure_own_process()
        if self._closed:
            raise LocalError("this averager is closed: open a new one")
        if self._pending:
            raise LocalError(f"step {self._pending.seq} is still running: wait() for it or cancel() it first")

    def _ensure_own_process(self) -> None:
        if os.getpid() != self._pid:
            raise LocalError(
                f"this averager belongs to process {self._pid} and was used in its child {os.getpid()}: "
                "call connect() after the fork"
            )

    def _ensure_in_place(self) -> None:
        tensor = self._lifeline.misplaced()
        if tensor is not None:
            raise LocalError(
                f"tensor {tensor.spec.name!r} has left the shared memory that it was adopted into (its .data was "
                "replaced): open a new averager for it"
            )

    def _ensure_finite(self) -> None:
        for tensor in self._tensors:
            if not tensor.is_finite():
                raise LocalError(
                    f"tensor {tensor.spec.name!r} holds NaN or infinity: nothing was sent (check_finite=False sends it)"
                )

    def _drop(self) -> None:
        self._pending = None
        self._lifeline.attachment.close()


class Pending:
    """A step under way. `wait` applies its result, once; until then nobody but the trainer touches the tensors."""

    def __init__(self, averager: Averager, seq: int, deadline: float) -> None:
        self.seq = seq
        self._averager = averager
        self._attachment = averager._lifeline.attachment
        self._began = time.monotonic()
        self._deadline = deadline
        self._snapshot: Sequence[Any] | None = None
        self._stepped: control.Stepped | None = None
        self._write_back: WriteBack | None = None
        self._result: Outcome | MpdError | None = None

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for the end of the step, apply its result, and return the outcome; the same one every time.

        What was trained since `start` survives: the tensors move by average minus snapshot.
        Raises TimeoutError if the step has not ended after `timeout` seconds (wait again, or cancel), LocalError if
        the tensors have changed shape meanwhile.
        """
        self._averager._ensure_own_process()
        if not self._poll(math.inf if timeout is None else timeout):
            raise TimeoutError(f"step {self.seq} has not ended within {timeout:g} s: wait again, or cancel() it")
        result = self._apply() if self._result is None else self._result
        if isinstance(result, MpdError):
            raise result
        return result

    def done(self) -> bool:
        """Return at once: True if `wait` would not have to wait."""
        self._averager._ensure_own_process()
        return self._poll(0)

    def cancel(self) -> None:
        """Give the step up and leave the tensors alone. Does nothing after `wait` has returned or raised an error."""
        self._averager._ensure_own_process()
        if not self._poll(0):
            # That the daemon is gone is for the poll to notice.
            with contextlib.suppress(DaemonUnavailable):
                self._attachment.send(control.Cancel(self.seq))
            self._deadline = min(self._deadline, time.monotonic() + GRACE_S)
            self._poll(math.inf)
        if self._stepped is None or self._result is not None:
            return
        if self._write_back:  # an exception came between the end of a write-back and its outcome
            self._apply()
            return
        reason = "cancelled after the others had averaged" if self._stepped.averaged else self._stepped.reason
        self._end(Outcome(averaged=False, reason=reason))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _ask(self, step: control.Step, snapshot: Sequence[Any] | None) -> None:
        """Ask the daemon for the step. Its result is a change against `snapshot`, if there is one."""
        self._attachment = self._averager._lifeline.attachment
        self._snapshot = snapshot
        self._attachment.send(step)

    def _lose(self, error: DaemonUnavailable) -> None:
        """End the step without a result: the daemon is gone, or as good as gone."""
        self._averager._drop()
        reason = f"kept the old values: in step {self.seq} {error}; others may have averaged"
        self._result = Outcome(averaged=False, reason=reason, seconds=time.monotonic() - self._began)

    def _poll(self, timeout_s: float) -> bool:
        """Return True once the answer is in `_stepped`, or what came instead in `_result`."""
        if self._result is None and self._averager._pending is not self:
            # We have detached, so even a result that is announced already may be written over any moment.
            self._result = LocalError(f"the averager was closed during step {self.seq}: its result is lost")
        if self._stepped or self._result is not None:
            return True
        patience_s = max(0.0, self._deadline - time.monotonic())
        try:
            self._stepped = self._attachment.receive_stepped(min(timeout_s, patience_s))
            if self._stepped is None:
                if timeout_s < patience_s:
                    return False
                raise DaemonUnavailable("the daemon has not answered in time: it hangs or is overloaded; see its log")
        except DaemonUnavailable as error:
            self._lose(error)
        except LocalError as error:
            self._averager._drop()
            self._result = error
        return True

    def _apply(self) -> Outcome | MpdError:
        """Bring the tensors up to date with the answer."""
        assert self._stepped is not None
        if not self._stepped.averaged:
            return self._end(outcome_of(self._stepped))
        tensors, average = self._averager._tensors, self._attachment.result
        try:
            for tensor in tensors:
                tensor.check()
        except LocalError as error:
            return self._end(error)
        if self._write_back is None:
            before = self._snapshot
            self._write_back = Replace(tensors, average) if before is None else Shift(tensors, average, before)
        run_to_end(self._write_back)
        return self._end(outcome_of(self._stepped))

    def _end(self, result: Outcome | MpdError) -> Outcome | MpdError:
        """The daemon may write the out region again, and the averager may take the next step."""
        if self._stepped and self._stepped.averaged:
            # The result is ours whether or not the daemon still hears this.
            with contextlib.suppress(DaemonUnavailable):
                self._attachment.send(control.Release(self.seq))
        self._result = result
        self._averager._pending = None
        return result


def check_weight(value: float) -> float:
    if not 0 < value <= MAX_WEIGHT:
        raise LocalError(f"weight is {value}: a positive number up to {MAX_WEIGHT:g} expected")
    return float(value)


def _seconds(value: float) -> float:
    if not 0 < value < math.inf:
        raise LocalError(f"timeout is {value}: a positive finite number expected")
    return float(value)
