"""What keeps an averager attached across the lives of its daemon: it notices the end of one, and attaches to the next.

Strategy: a daemon that was restarted is found again by whoever needs it, at the next step, so nothing runs in between.
One step of an outage waits a little, because a daemon that is restarted is back within seconds; the others look once
and go on, because a machine whose daemon is gone should train at full speed. What is attached again is what was
attached first: the same tensors under the same terms, at the same peer. Another peer at the same socket may belong to
another swarm, and is refused.

Adopted tensors are never moved a second time. They live in the region that the first daemon made, which stays theirs
when that daemon has gone, so their addresses and all views of them hold; a step after a restart copies them.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpd import control
from mpd.errors import DaemonUnavailable, LocalError
from mpd.layout import Layout

from .attachment import ATTACH_S, Attachment
from .connection import ANSWER_S, Connection
from .tensors import Tensor

RETURN_S = 5.0  # how long one step of an outage waits for the daemon: a service manager brings it back within these
GREETING_S = 1.0  # how long each step of an outage waits for a daemon that accepts connections and says nothing
_LOOK_AGAIN_S = 0.05


class Lifeline:
    """The attachment of `tensors` to the daemon at `path`, which is `peer`. `attachment` is the present or last one.

    Raises LocalError if the daemon refuses or is another peer, DaemonUnavailable if there is none.
    """

    def __init__(self, path: Path, peer: str, request: control.Attach, tensors: Sequence[Tensor], adopt: bool) -> None:
        self._path = path
        self._peer = peer
        self._request = request
        self._tensors = tensors
        self._layout = Layout(request.tensors)
        self._has_waited = False  # in this outage
        if adopt:
            for tensor in tensors:
                tensor.ensure_adoptable()
        self.attachment = self._attach(ANSWER_S, ATTACH_S)
        self._home = self.attachment.sent if adopt else None
        if adopt:
            for tensor, window in zip(tensors, self.attachment.sent, strict=True):
                tensor.adopt(window)

    @property
    def n_bytes(self) -> int:
        """The length of each region."""
        return self._layout.n_bytes

    @property
    def is_shared(self) -> bool:
        """True if the tensors live in the in region of the present attachment."""
        return self._home is self.attachment.sent

    def ensure(self, patience_s: float, attach_s: float, waits: bool) -> None:
        """Attach again if the daemon of the last attachment has gone; within `patience_s`, if it `waits` at all.

        attach_s: the longest time in which the memory must be there, in seconds.
        Raises DaemonUnavailable if there is no daemon now, LocalError if it is another peer or refuses.
        """
        if self.attachment.is_open:
            return
        self.attachment.close()
        waits = waits and not self._has_waited
        give_up_at = time.monotonic() + (min(patience_s, RETURN_S) if waits else 0.0)
        while True:
            try:
                attachment = self._attach(min(patience_s, GREETING_S), attach_s)
                break
            except DaemonUnavailable:
                if time.monotonic() + _LOOK_AGAIN_S > give_up_at:
                    self._has_waited = self._has_waited or waits
                    raise
                time.sleep(_LOOK_AGAIN_S)
        self.attachment = attachment
        self._has_waited = False

    def misplaced(self) -> Tensor | None:
        """Return a tensor that should live in the present in region, and does not any more."""
        if not self.is_shared:
            return None
        placed = zip(self._tensors, self.attachment.sent, strict=True)
        return next((tensor for tensor, window in placed if not tensor.lives_in(window)), None)

    def hand_over(self, train_on: bool, patience_s: float) -> tuple[str, Sequence[Any]]:
        """Put the values where the daemon will read them; return the name of that region and its windows.

        With `train_on` the tensors may change from now on. Raises DaemonUnavailable.
        """
        attachment = self.attachment
        if self.is_shared and not train_on:
            return "in", attachment.sent
        shared = self.is_shared
        source, windows = ("snapshot", attachment.snapshot(patience_s)) if shared else ("in", attachment.sent)
        for tensor, window in zip(self._tensors, windows, strict=True):
            tensor.store(window)
        return source, windows

    def _attach(self, greeting_s: float, attach_s: float) -> Attachment:
        connection = Connection(self._path, greeting_s)
        if connection.peer != self._peer:
            connection.close()
            raise LocalError(
                f"the daemon at {self._path} is peer {connection.peer} now, it was {self._peer}: if that is meant, "
                "connect() again and open a new averager; if not, start it with the --state-dir that it had"
            )
        return Attachment(connection, self._request, self._layout, self._tensors, attach_s)
