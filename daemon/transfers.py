"""Records of a round on their way in and out, and the queue in which they wait for a link.

A record's bytes are looked up when its turn comes, so a plan that changed meanwhile wastes nothing, and a record that
was lost with its connection is simply looked up again. What has left is kept until the peer says that it has arrived.
"""

import collections
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import trio

from mpd.errors import PeerError
from mpd.exchange import SendPiece, SendResult
from mpd.ids import RoundId
from mpd.wire import HEADER_BYTES, Header, Kind, pack_header

from . import faults
from .vault import IN_PLACE

if TYPE_CHECKING:
    from .sessions import RoundSession

_MAX_OWNERLESS = 64  # records that no session forgets, waiting, and kept until they are known to have arrived


class Arrival:
    """One record on its way in. With a `slot`, a result is written to its place, unless somebody else writes there."""

    def __init__(self, session: "RoundSession", place: int, header: Header, slot: memoryview | None = None) -> None:
        self.view = slot
        self._session = session
        self._place = place
        self._header = header
        self._revoked = False

    def revoke(self) -> None:
        """Somebody else writes the slot: this record comes too late."""
        self._revoked = True
        self.view = None

    def progress(self) -> None:
        session = self._session
        if self._place not in session.left:
            session.exchange.on_progress(trio.current_time(), self._place)

    def complete(self, payload: memoryview) -> None:
        session, header = self._session, self._header
        session.bytes_received += HEADER_BYTES + header.length
        in_place = self.view is not None
        self._vacate()
        if faults.armed:
            faults.strike("receive")
        if not (self._revoked or session.gone.is_set() or self._place in session.left):
            self._use(IN_PLACE if in_place else payload)

    def abandon(self) -> None:
        self._vacate()

    def _vacate(self) -> None:
        """Let the next record for this chunk have the slot."""
        if self.view is not None:
            del self._session.landings[self._header.chunk]
            self.view = None

    def _use(self, payload: Any) -> None:
        machine, header, place = self._session.exchange, self._header, self._place
        if header.kind is Kind.PIECE:
            self._session.feed(machine.on_piece, place, header.chunk, header.version, payload)
        else:
            contributors = header.contributors
            self._session.feed(machine.on_result, place, header.chunk, header.version, contributors, payload)


class Notice:
    """A record of which nothing counts but that it has come: only then is its header known to be its sender's."""

    view: memoryview | None = None

    def __init__(self, arrived: Callable[[], None]) -> None:
        self._arrived = arrived

    def progress(self) -> None:
        pass

    def complete(self, payload: memoryview) -> None:
        self._arrived()

    def abandon(self) -> None:
        pass


class Departure:
    """A piece or a result that waits for its turn on a link."""

    def __init__(self, session: "RoundSession", action: SendPiece | SendResult) -> None:
        self.owner: object = session
        self.chunk = action.chunk
        self._session = session
        self._action = action

    def load(self) -> tuple[bytes, memoryview] | None:
        session, action, vault = self._session, self._action, self._session.vault
        if faults.armed:
            faults.strike("send" if isinstance(action, SendPiece) else "return")
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


class Shipment(Protocol):
    """A record that waits for its turn on a link; its bytes are looked up when it is sent, not when it is queued."""

    owner: object
    chunk: int

    def load(self) -> tuple[bytes, memoryview] | None:
        """Return header and payload, or None if nobody wants this any more."""

    def n_bytes(self) -> int:
        """Return how long the record is, header included."""

    def sent(self, n_bytes: int) -> None:
        """All `n_bytes`, header included, have been handed to the kernel."""


class Outbox:
    """What is to be sent on a link, and what was sent and may have been lost.

    Both ends number the records of a link in the order in which they travel. When a data connection is lost, the
    receiver says how many it has; the next record then bears that number, whatever was dropped meanwhile.
    """

    def __init__(self) -> None:
        self._waiting: collections.deque[Shipment] = collections.deque()
        self._unconfirmed: collections.deque[tuple[int, Shipment]] = collections.deque()
        self._n_confirmed = 0
        self.n_sent = 0
        """Records whose sending has begun, as the receiver counts them."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, shipment: Shipment) -> None:
        """Queue a record; one without owner only while few of them wait, because nobody drops those."""
        if shipment.owner is not None or len(self.of(None)) < _MAX_OWNERLESS:
            self._waiting.append(shipment)

    def take(self) -> Shipment:
        """Take the next record out of the queue; call `departs` if it is really sent."""
        return self._waiting.popleft()

    def departs(self, shipment: Shipment) -> None:
        """The sending of a record begins: give it its number."""
        self._unconfirmed.append((self.n_sent, shipment))
        self.n_sent += 1
        if shipment.owner is None:
            ownerless = [entry for entry in self._unconfirmed if entry[1].owner is None]
            if len(ownerless) > _MAX_OWNERLESS:
                self._unconfirmed.remove(ownerless[0])

    def resume(self, n_received: int) -> None:
        """The peer has received this many records: queue again what it has not, in the old order and before the rest.

        Raises PeerError if that number cannot be.
        """
        if not self._n_confirmed <= n_received <= self.n_sent:
            raise PeerError(
                f"it says that it has received {n_received} records: {self._n_confirmed} to {self.n_sent} are possible"
            )
        self._waiting.extendleft(shipment for number, shipment in reversed(self._unconfirmed) if number >= n_received)
        self._unconfirmed.clear()
        self._n_confirmed = self.n_sent = n_received

    def drop(self, owner: object) -> None:
        """Forget the records of `owner`."""
        self._waiting = collections.deque(s for s in self._waiting if s.owner is not owner)
        self._unconfirmed = collections.deque(entry for entry in self._unconfirmed if entry[1].owner is not owner)

    def of(self, owner: object) -> list[Shipment]:
        """Return the records of `owner` that wait."""
        return [shipment for shipment in self._waiting if shipment.owner is owner]
