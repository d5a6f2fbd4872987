"""One attachment to a run: a connection, the shared regions that came with it, and a window on them per tensor.

Strategy: regions are mapped and their windows made once, when they arrive, so that a step only copies. Mappings are
never closed by hand: adopted parameters and numpy views may outlive the attachment, and the last of them frees the
memory. So an attachment that has ended keeps no windows of its own: its memory may be needed for the next one.
"""

import mmap
import os
import struct
from collections.abc import Sequence
from typing import Any

from mpd import control
from mpd.errors import LocalError
from mpd.layout import Layout

from .connection import Connection
from .tensors import Tensor

ATTACH_S = 120.0  # the daemon touches every page of the new regions first
_GENERATION = struct.Struct("<Q")

Windows = list[Any]


class Attachment:
    """Attached with `request` over `connection`, which it closes in the end, or at once if it raises.

    `sent` are the windows on the in region, `result` those on the out region. Raises LocalError if the daemon refuses,
    DaemonUnavailable if it is gone or takes longer than `attach_s`.
    """

    def __init__(
        self,
        connection: Connection,
        request: control.Attach,
        layout: Layout,
        tensors: Sequence[Tensor],
        attach_s: float = ATTACH_S,
    ) -> None:
        self._layout = layout
        self._tensors = tensors
        self.sent: Windows = []
        self.result: Windows = []
        self._snapshot: Windows | None = None
        self._out_map: mmap.mmap | None = None
        self._connection = connection
        try:
            attached = self._connection.request(request, control.Attached, attach_s)
            sizes = (attached.in_bytes, attached.out_bytes)
            if sizes != (layout.n_bytes, layout.n_bytes + control.OUT_HEADER_BYTES):
                raise LocalError(
                    f"the daemon lays {sizes[0]} bytes out for these tensors, we {layout.n_bytes}: "
                    "install the same mpd for daemon and trainer"
                )
            self.sent = self._map_writable()
            self._map_result()
        except BaseException:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        """True while the daemon is there."""
        return self._connection.is_open

    def snapshot(self, patience_s: float = ATTACH_S) -> Windows:
        """Return the windows on the snapshot region, which is opened with the first call.

        Raises LocalError if the daemon refuses, DaemonUnavailable if it is gone or takes longer than `patience_s`.
        """
        if self._snapshot is None:
            self._connection.request(control.OpenSnapshot(), control.SnapshotOpened, patience_s)
            self._snapshot = self._map_writable()
        return self._snapshot

    def send(self, message: object) -> None:
        """Send `message`. Raises DaemonUnavailable."""
        self._connection.send(message)

    def receive_stepped(self, timeout_s: float) -> control.Stepped | None:
        """Return the answer to the step that was sent, or None if it is not there within `timeout_s`.

        Raises LocalError if the step is refused, DaemonUnavailable if the daemon is gone.
        """
        answer = self._connection.receive(timeout_s)
        if answer is None:
            return None
        if isinstance(answer, control.Refused):
            raise LocalError(answer.message)
        if not isinstance(answer, control.Stepped):
            raise LocalError(f"the daemon answered a step with a {type(answer).__name__}")
        if answer.new_out:
            self._map_result()
        if answer.averaged:
            self._ensure_published(answer.generation)
        return answer

    def load_state(self, request: control.LoadState, timeout_s: float) -> control.StateLoaded:
        """Have the daemon load a state; if it has, `result` shows it.

        Raises LocalError if it refuses, DaemonUnavailable if it is gone or has not answered after `timeout_s`.
        """
        answer = self._connection.request(request, control.StateLoaded, timeout_s)
        if answer.loaded:
            self._map_result()
            self._ensure_published(answer.generation)
        return answer

    def close(self) -> None:
        """Detach. Windows that somebody holds stay valid."""
        self._connection.close()
        self.sent, self.result, self._snapshot = [], [], None
        self._out_map = None

    def _ensure_published(self, generation: int) -> None:
        assert self._out_map is not None, "a result comes with its region"
        (found,) = _GENERATION.unpack_from(self._out_map, 0)
        if found != generation:
            raise LocalError(
                f"result {generation} was announced and the shared memory holds result {found}: parameters are "
                "unchanged; please report this"
            )

    def _map_writable(self) -> Windows:
        return self._windows(self._map(self._layout.n_bytes, mmap.PROT_READ | mmap.PROT_WRITE), 0)

    def _map_result(self) -> None:
        self._out_map = self._map(control.OUT_HEADER_BYTES + self._layout.n_bytes, mmap.PROT_READ)
        self.result = self._windows(self._out_map, control.OUT_HEADER_BYTES)

    def _map(self, n_bytes: int, access: int) -> mmap.mmap:
        fd = self._connection.take_descriptor()
        try:
            # Populated now, because the first touch of a page costs ten times its copy.
            return mmap.mmap(fd, n_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=access)
        except (OSError, ValueError) as error:
            raise LocalError(f"the daemon's shared memory of {n_bytes} bytes cannot be mapped: {error}") from error
        finally:
            os.close(fd)

    def _windows(self, region: mmap.mmap, base: int) -> Windows:
        placed = zip(self._tensors, self._layout.offsets, strict=True)
        return [tensor.window(region, base + offset) for tensor, offset in placed]
