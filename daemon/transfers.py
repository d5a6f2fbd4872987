"""One record of a round on its way in or out, and the memory that it passes through."""

from typing import TYPE_CHECKING, Any

import trio

from mpd.exchange import SendPiece, SendResult
from mpd.ids import RoundId
from mpd.wire import HEADER_BYTES, Header, Kind, pack_header

from .vault import IN_PLACE

if TYPE_CHECKING:
    from .sessions import RoundSession

_MAX_FREE_STAGES = 16


class Arrival:
    """One record on its way in."""

    def __init__(
        self, session: "RoundSession", place: int, header: Header, view: memoryview, in_place: bool = False
    ) -> None:
        self.view = view
        self._session = session
        self._place = place
        self._header = header
        self._in_place = in_place
        self._revoked = False

    def revoke(self) -> None:
        """Somebody else writes the slot: the rest goes nowhere."""
        self._revoked = True
        self._in_place = False
        self.view = self._session.stages.take(self._header.length)

    def progress(self) -> None:
        session = self._session
        if self._place not in session.left:
            session.exchange.on_progress(trio.current_time(), self._place)

    def complete(self) -> None:
        session, header = self._session, self._header
        session.bytes_received += HEADER_BYTES + header.length
        if self._in_place:
            session.landings.pop(header.chunk, None)
        if not (self._revoked or session.gone.is_set() or self._place in session.left):
            self._use(IN_PLACE if self._in_place else self.view)
        if not self._in_place:
            session.stages.give(self.view)

    def _use(self, payload: Any) -> None:
        machine, header, place = self._session.exchange, self._header, self._place
        if header.kind is Kind.PIECE:
            self._session.feed(machine.on_piece, place, header.chunk, header.version, payload)
        else:
            contributors = header.contributors
            self._session.feed(machine.on_result, place, header.chunk, header.version, contributors, payload)


class StagePool:
    """Memory for records on their way in, used again because touching fresh pages costs more than reading."""

    def __init__(self) -> None:
        self._free: dict[int, list[memoryview]] = {}

    def take(self, n_bytes: int) -> memoryview:
        """Return a view of `n_bytes`."""
        free = self._free.get(_capacity(n_bytes))
        return (free.pop() if free else memoryview(bytearray(_capacity(n_bytes))))[:n_bytes]

    def give(self, view: memoryview) -> None:
        """Take back what `take` returned; a view that is never given back is simply freed."""
        free = self._free.setdefault(_capacity(len(view)), [])
        if len(free) < _MAX_FREE_STAGES:
            free.append(memoryview(view.obj))


def _capacity(n_bytes: int) -> int:
    return max(4096, 1 << (n_bytes - 1).bit_length()) if n_bytes else 4096


class Departure:
    """A piece or a result that waits for its turn on a link."""

    def __init__(self, session: "RoundSession", action: SendPiece | SendResult) -> None:
        self.owner: object = session
        self.chunk = action.chunk
        self._session = session
        self._action = action

    def load(self) -> tuple[bytes, memoryview] | None:
        session, action, vault = self._session, self._action, self._session.vault
        if isinstance(action, SendPiece):
            if not session.exchange.may_send_piece(action.chunk, action.version):
                return None
            kind, contributors, payload = Kind.PIECE, 0, vault.piece_payload(action.chunk)
        else:
            if not session.exchange.holds(action.chunk, action.version):
                return None
            kind, contributors, payload = Kind.CHUNK, action.contributors, vault.result_payload(action.chunk)
        header = Header(
            kind=kind,
            codec=vault.codec.code,
            member=vault.chunks[action.chunk].owner,
            chunk=action.chunk,
            length=len(payload),
            version=action.version,
            round_id=session.round_id,
            contributors=contributors,
        )
        return pack_header(header), payload

    def n_bytes(self) -> int:
        is_piece, vault = isinstance(self._action, SendPiece), self._session.vault
        return HEADER_BYTES + len(vault.piece_payload(self.chunk) if is_piece else vault.result_payload(self.chunk))

    def sent(self, n_bytes: int) -> None:
        self._session.bytes_sent += n_bytes


class Bye:
    """The last record of a round on a link; behind everything that was sent before it."""

    def __init__(self, round_id: RoundId) -> None:
        self.owner: object = None  # outlives its session
        self.chunk = -1
        self._round_id = round_id

    def load(self) -> tuple[bytes, memoryview]:
        return pack_header(Header(Kind.BYE, 0, 0, 0, 0, 0, self._round_id, 0)), memoryview(b"")

    def n_bytes(self) -> int:
        return HEADER_BYTES

    def sent(self, n_bytes: int) -> None:
        pass
