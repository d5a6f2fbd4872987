"""One link: everything that passes between this daemon and one peer.

A link is a control connection and, beside it, a data connection. Control (TLS) carries small messages and never waits
behind tensors; data carries records, a 40-byte header and a payload, sealed with keys that were agreed on over control.

What is promised upwards: messages arrive in order; records arrive in order, each once and unaltered; after
`on_link_down` nothing arrives. A data connection that is lost while control lives, because somebody cut it or because a
record did not open, is replaced by one with fresh keys: each end says how many records it has, the other goes on from
there. That helps three times a round, so whoever sits on the path gains little. When control is gone the link is over,
but what the peer had already sent on the data connection still counts, so it is read to its end first.
"""

import collections
import contextlib
from typing import Any, Protocol

import trio

from mpd.errors import LocalError, PeerError
from mpd.identity import Member
from mpd.ids import Endpoint, PeerId
from mpd.messages import PEERS, DataAccept, DataBad, DataOffer, DataRefused, Goodbye, Ping
from mpd.seal import BadRecord
from mpd.wire import ControlBuffer, Header, control_frame

from . import faults
from .channels import DataChannel, DataDoor, Sealing, dial_data
from .containment import UNEXPECTED, report
from .transfers import Outbox, Shipment

DRAIN_S = 2.0  # how long the rest of the data may take to arrive after control has ended
IDLE_PING_S = 20.0  # an idle link is asked for a sign of life this often
MAX_QUEUED_CONTROL_BYTES = 16 << 20  # a peer that does not read its messages is dropped at this point
MAX_RECORD_BYTES = 5 << 20  # the largest chunk, and room for a codec that makes it longer
BACK_OFF_S = (0.0, 0.1, 0.4)  # before each of the data connections that may replace a lost one in a round
MAX_REPAIRS = len(BACK_OFF_S)
REPAIR_S = 10.0  # how long one may take
WORN = 0.5  # of what keys may do: time for fresh ones on an idle link. Both ends count, one a moment later
VERY_WORN = 0.9  # and on a busy one
MAX_CONTROL_AGE_S = (
    25 * 3600.0
)  # TLS in Python cannot change its keys; whoever dialled should have called again by then
_RECEIVE_BYTES = 65536


class Landing(Protocol):
    """What becomes of one incoming record."""

    view: memoryview | None
    """Where the payload goes; None: leave it where it is. May change at any moment until `complete`."""

    def progress(self) -> None:
        """More bytes have arrived. Not called for sealed records: nobody has proved yet whose bytes these are."""

    def complete(self, payload: memoryview) -> None:
        """The record has arrived and is the peer's: `payload` is `view`, or valid only during this call."""

    def abandon(self) -> None:
        """It will not arrive; whatever lies in `view` is garbage."""


class LinkEvents(Protocol):
    """Whoever owns the links hears from them here. PeerError from any of these ends the link."""

    def on_link_up(self, link: "Link") -> None:
        """The link may be used."""

    def on_message(self, link: "Link", message: Any) -> None:
        """The peer said `message`."""

    def expects(self, link: "Link", header: Header) -> bool:
        """Return whether `landing` knows at once what to do with a record."""

    async def landing(self, link: "Link", header: Header) -> Landing | None:
        """Say what becomes of the record; None: read it and throw it away. Raises PeerError if it cannot be right.

        A header is anybody's word until the record is complete: nothing may follow from it yet.
        """

    def on_link_down(self, link: "Link", reason: str) -> None:
        """The link is over, and why."""


class Link:
    """A live link to `peer`. Made by the handshake; everything here may be called from any task of the daemon."""

    def __init__(
        self,
        peer: PeerId,
        instance: bytes,
        endpoint: Endpoint | None,
        control: trio.abc.Stream,
        sealing: Sealing,
        door: DataDoor,
        remote: tuple[str, int],
    ) -> None:
        self.peer = peer
        self.instance = instance
        self.endpoint = endpoint  # where the peer can be dialled; None: nowhere
        self.remote_host = remote[0]
        self._busy = self._awaited = 0
        self._needed = trio.Event()  # replaced by a new one before each wait
        self.patience_s = 2.0  # how long it may be silent while it is watched
        self.repairs_left = MAX_REPAIRS  # how often its data connection may still be replaced
        self.repair_cause = ""  # why it was replaced last
        self.bad_records = 0  # that did not open, or could not be right
        self.goodput = 0.0  # bytes per second while records arrive, smoothed
        self.reason = ""
        self.up = True
        self.member: Member  # what its certificate says; set by `Peers`, as is
        self.news = 0  # the number of its revocation list when the link was made
        self.clock_ahead_s = 0.0  # of ours, when the link was made
        self._born = trio.current_time()
        self._heard_at = self._born
        self._scope: trio.CancelScope | None = None
        self._control = control
        self._buffer = ControlBuffer()
        self._frames: collections.deque[bytes] = collections.deque()
        self._queued_control_bytes = 0
        self._frames_waiting = trio.Event()
        self._flushed = trio.Event()
        self._sealing = sealing
        self._door = door
        self._remote = remote
        self._channel: DataChannel | None = None
        self._past_traffic = (0, 0)  # bytes sent and received on data connections that are gone
        self._n_received = 0  # records
        self._outbox = Outbox()
        self._shipments_waiting = trio.Event()
        self._shipping: Shipment | None = None
        self._sending = trio.CancelScope()
        self._turn = trio.CancelScope()  # of what is under way with the data connection, until something ends it
        self._data_message: DataOffer | DataAccept | DataRefused | None = None
        self._data_message_came = trio.Event()
        self._is_draining = False
        self._drained = trio.Event()  # nothing more can come on the data connection

    # --------------------------------------------------------------------------------------------------- for the daemon

    @property
    def busy(self) -> int:
        """How many rounds depend on this link now: then its silence is watched."""
        return self._busy

    @busy.setter
    def busy(self, n_rounds: int) -> None:
        self._watch_from_now()
        self._busy = n_rounds

    @property
    def awaited(self) -> int:
        """How many lobbies wait for a word of the peer: its silence is watched then too."""
        return self._awaited

    @awaited.setter
    def awaited(self, n_lobbies: int) -> None:
        self._watch_from_now()
        self._awaited = n_lobbies

    @property
    def is_watched(self) -> bool:
        """True while the peer may not be silent for longer than `patience_s`."""
        return self._busy > 0 or self._awaited > 0

    def _watch_from_now(self) -> None:
        if not self.is_watched:
            self._heard_at = trio.current_time()  # that an idle link was silent is not held against the peer
            self._needed.set()

    @property
    def bytes_sent(self) -> int:
        """Bytes that the kernel took for the data connections of this link."""
        return self._past_traffic[0] + (self._channel.bytes_sent if self._channel is not None else 0)

    @property
    def bytes_received(self) -> int:
        """Bytes that came on them."""
        return self._past_traffic[1] + (self._channel.bytes_received if self._channel is not None else 0)

    @property
    def is_sealed(self) -> bool:
        """True unless both ends were told to send data in the clear."""
        return self._sealing.is_sealed

    def send(self, message: Any) -> None:
        """Queue `message`; it is sent in order, and lost if the link ends first."""
        if not self.up:
            return
        try:
            frame = control_frame(PEERS.encode(message))
        except LocalError as error:  # the plan of an absurdly long round: that may cost a link, but not the daemon
            self.close(str(error))
            return
        self._queued_control_bytes += len(frame)
        if self._queued_control_bytes > MAX_QUEUED_CONTROL_BYTES:
            self.close("it does not read its messages")
            return
        self._frames.append(frame)
        self._frames_waiting.set()

    def ship(self, shipment: Shipment) -> None:
        """Queue a data record."""
        if self.up:
            self._outbox.put(shipment)
            self._shipments_waiting.set()

    def drop_shipments(self, owner: object) -> None:
        """Forget the records of `owner`: those in the queue, and those that would be sent again if they were lost."""
        self._outbox.drop(owner)

    def unsent(self, owner: object) -> list[Shipment]:
        """Return the records of `owner` that have not left yet, or not completely."""
        shipping = [self._shipping] if self._shipping is not None and self._shipping.owner is owner else []
        return shipping + self._outbox.of(owner)

    def detach(self, owner: object, chunk: int | None = None) -> None:
        """Make the record of `owner` that is being sent now independent of its memory, which is about to change."""
        shipping = self._shipping
        if self._channel and shipping is not None and shipping.owner is owner and chunk in (None, shipping.chunk):
            self._channel.detach()

    def close(self, reason: str) -> None:
        """End the link at once."""
        if self.up:
            self.up = False
            self.reason = self.reason or reason
            if self._scope is not None:
                self._scope.cancel()

    # --------------------------------------------------------------------------------------------------------- lifetime

    async def establish(self) -> None:
        """Open the first data connection, talking in turns on the control stream. Raises PeerError."""
        try:
            self._channel = await self._new_channel()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerError(f"the data connection failed: {_why(error)}") from error

    async def run(self, events: LinkEvents) -> None:
        """Carry messages and records until either side ends the link; `on_link_down` comes last and exactly once."""
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                if not self.up:  # closed before it ran
                    return
                nursery.start_soon(self._send_control)
                nursery.start_soon(self._carry_data, events)
                nursery.start_soon(self._watch)
                events.on_link_up(self)
                await self._receive_control(events)
                self._is_draining = True
                self._sending.cancel()
                with trio.move_on_after(DRAIN_S):
                    await self._drained.wait()
                nursery.cancel_scope.cancel()
        except* (PeerError, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as group:
            self.reason = self.reason or _why(group)
        except* Exception as group:  # noqa: BLE001  # a bug costs the link
            self.reason = self.reason or UNEXPECTED
            report("link", group)
        finally:
            self.up = False
            self._retire_channel()
            with trio.CancelScope(shield=True, deadline=trio.current_time()):
                await self._control.aclose()
            events.on_link_down(self, self.reason or "the connection was closed")

    async def flush(self, within_s: float) -> None:
        """Wait until the queued messages have been handed to the kernel, but not for long."""
        with trio.move_on_after(within_s):
            while self._queued_control_bytes and self.up:
                await self._flushed.wait()

    async def _watch(self) -> None:
        """Ask for a sign of life while nothing is heard; end the link when none comes. Renew what has become old."""
        while True:
            patience = self.patience_s if self.is_watched else IDLE_PING_S
            silent = trio.current_time() - self._heard_at
            if silent > patience and (self.is_watched or silent > IDLE_PING_S + 10):
                self.close(f"nothing was heard from it for {silent:.1f} s")
                return
            if silent > patience / 4:
                self.send(Ping(answer=True))
            if not self.busy and trio.current_time() - self._born > MAX_CONTROL_AGE_S:
                self.send(Goodbye("this connection is a day old: call again"))
                await self.flush(1.0)
                self.close("the connection was a day old")
                return
            if self._sealing.is_initiator and self._wear() > (VERY_WORN if self.busy else WORN):
                self._turn.cancel()
            self._needed = trio.Event()
            with trio.move_on_after((self.patience_s if self.is_watched else IDLE_PING_S) / 4):
                await self._needed.wait()

    def _wear(self) -> float:
        return self._channel.wear if self._channel is not None else 0.0

    # ---------------------------------------------------------------------------------------------------------- control

    async def _send_control(self) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                while self._frames:
                    frames = b"".join(self._frames)
                    self._frames.clear()
                    if faults.armed:
                        await faults.outlast()
                    await self._control.send_all(frames)
                    self._queued_control_bytes -= len(frames)
                    self._flushed.set()
                    self._flushed = trio.Event()
                self._frames_waiting = trio.Event()
                await self._frames_waiting.wait()

    async def _receive_control(self, events: LinkEvents) -> None:
        while (message := await self._receive_message()) is not None:
            match message:
                case Ping():
                    if message.answer:
                        self.send(Ping())
                case DataOffer() | DataAccept() | DataRefused():
                    if isinstance(message, DataOffer) is self._sealing.is_initiator:
                        raise PeerError(f"it said {type(message).__name__}, which is for the other side to say")
                    self._data_message = message
                    self._data_message_came.set()
                    if isinstance(message, DataOffer):
                        self._turn.cancel()
                case DataBad():
                    if self._channel is not None and self._channel.conn_id == message.conn_id:
                        self._turn.cancel()
                case _:
                    events.on_message(self, message)
        self.reason = self.reason or "it closed the connection"

    async def _receive_message(self) -> Any:
        """Return the next message, None at the end of the connection."""
        while (body := self._buffer.next_frame()) is None:
            try:
                received = await self._control.receive_some(_RECEIVE_BYTES)
            except trio.BrokenResourceError:
                received = b""
            if not received:
                return None
            self._heard_at = trio.current_time()
            self._buffer.feed(received)
        return PEERS.decode(body)

    # ---------------------------------------------------------------------------------------------- one data connection

    async def _new_channel(self) -> DataChannel:
        """Agree on keys and open a data connection with them. Raises PeerError, OSError."""
        if self._sealing.is_initiator:
            return await self._offer_channel()
        return await self._accept_channel()

    async def _offer_channel(self) -> DataChannel:
        offer = self._sealing.offer(self._n_received)
        await self._say(offer)
        answer = await self._hear()
        while isinstance(answer, DataAccept | DataRefused) and answer.conn_id != offer.conn_id:
            answer = await self._hear()  # that was about an offer which has been given up
        if isinstance(answer, DataRefused):
            raise PeerError(f"it refused the data connection: {answer.reason[:200]}")
        if not isinstance(answer, DataAccept):
            raise PeerError(f"it answered the offer of a data connection with {type(answer).__name__}")
        self._outbox.resume(answer.received)
        return await dial_data(*self._remote, self._sealing.agreed(offer, answer), self._door.stages)

    async def _accept_channel(self) -> DataChannel:
        offer = await self._hear()
        if not isinstance(offer, DataOffer):
            raise PeerError(f"it said {type(offer).__name__} instead of offering a data connection")
        with contextlib.ExitStack() as undo:
            try:
                self._outbox.resume(offer.received)
                answer, keys = self._sealing.accept(offer, self._n_received)
                pending = undo.enter_context(self._door.expect(keys))
            except PeerError as error:
                await self._say(DataRefused(offer.conn_id, str(error)))
                raise
            await self._say(answer)
            with trio.CancelScope() as self._turn:
                return await pending.channel()
            raise PeerError("it gave up its offer of a data connection")

    async def _say(self, message: Any) -> None:
        """Send a message about the data connection, before the link runs or while it does."""
        if self._scope is None:
            await self._control.send_all(control_frame(PEERS.encode(message)))
        else:
            self.send(message)

    async def _hear(self) -> Any:
        """Return what the peer says about the data connection, before the link runs or while it does."""
        if self._scope is None:
            message = await self._receive_message()
            if message is None:
                raise PeerError("it closed the connection")
            return message
        while self._data_message is None:
            self._data_message_came = trio.Event()
            await self._data_message_came.wait()
        message, self._data_message = self._data_message, None
        return message

    # ---------------------------------------------------------------------------------------------- one after the other

    async def _carry_data(self, events: LinkEvents) -> None:
        """Use one data connection after the other. Raises PeerError when there is no hope for another."""
        while self._channel is not None:
            channel = self._channel
            cause = await self._use_channel(channel, events)
            self._drained.set()
            if self._is_draining:
                return
            self._retire_channel(hard=True)
            await self._replace_channel(cause, is_free=channel.wear > 0.8 * WORN)
            self._drained = trio.Event()

    async def _use_channel(self, channel: DataChannel, events: LinkEvents) -> str:
        """Send and receive until the connection is lost or to be replaced; return why."""
        with trio.CancelScope() as self._turn:
            if isinstance(self._data_message, DataOffer):  # the peer has given this one up already
                self._turn.cancel()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_records, channel)
                cause = await self._receive_records(channel, events)
                nursery.cancel_scope.cancel()
            self.send(DataBad(channel.conn_id, channel.n_received))
            return cause
        return "it was to be replaced"

    def _retire_channel(self, *, hard: bool = False) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close(hard=hard)
            sent, received = self._past_traffic
            self._past_traffic = sent + channel.bytes_sent, received + channel.bytes_received

    async def _replace_channel(self, cause: str, *, is_free: bool) -> None:
        """Open another data connection after one was lost to `cause`; only worn keys are replaced for nothing."""
        while self._channel is None:
            if not is_free:
                if not self.repairs_left:
                    raise PeerError(f"its data connection failed {MAX_REPAIRS + 1} times, at last because {cause}")
                self.repairs_left -= 1
                self.repair_cause = cause
                if self._sealing.is_initiator:
                    await trio.sleep(BACK_OFF_S[MAX_REPAIRS - 1 - self.repairs_left])
            is_free = False
            cause = f"no other one was open within {REPAIR_S:g} s"
            with trio.move_on_after(REPAIR_S):
                try:
                    self._channel = await self._new_channel()
                except (PeerError, OSError, trio.BrokenResourceError) as error:
                    cause = _why(error)

    # ---------------------------------------------------------------------------------------------------------- records

    async def _send_records(self, channel: DataChannel) -> None:
        """Send until that fails. It fails quietly: what the peer sent before is still to be read."""
        with contextlib.suppress(OSError), trio.CancelScope() as self._sending:
            while not self._is_draining:
                if not self._outbox:
                    self._shipments_waiting = trio.Event()
                    await self._shipments_waiting.wait()
                if self._outbox:
                    await self._ship(channel, self._outbox.take())  # no variable here keeps it alive while we wait

    async def _ship(self, channel: DataChannel, shipment: Shipment) -> None:
        loaded = shipment.load()
        if loaded is None:
            return
        self._outbox.departs(shipment)
        self._shipping = shipment
        try:
            await channel.send(*loaded)
        except LocalError:  # the keys are worn out
            self._turn.cancel()
            await trio.sleep_forever()
        finally:
            self._shipping = None
        shipment.sent(len(loaded[0]) + len(loaded[1]))
        await trio.lowlevel.checkpoint()

    async def _receive_records(self, channel: DataChannel, events: LinkEvents) -> str:
        """Receive until the connection is lost; return why. PeerError is what the peer has certainly done."""
        try:
            while True:
                await self._receive_record(channel, events)
        except OSError as error:
            return _why(error)
        except BadRecord as error:
            self.bad_records += 1
            return str(error)

    async def _receive_record(self, channel: DataChannel, events: LinkEvents) -> None:
        try:
            header = await channel.receive_header()
            if header.length > MAX_RECORD_BYTES:
                raise PeerError(
                    f"it announced a record of {header.length} bytes: at most {MAX_RECORD_BYTES} are allowed"
                )
            # Whoever is on the path may have made up the round, and must not have us wait for it: first see it proved.
            is_late = channel.is_sealed and not events.expects(self, header)
            landing = None if is_late else await events.landing(self, header)
        except PeerError as error:
            if channel.is_sealed:  # anybody on the path may have written this header
                raise BadRecord(str(error)) from error
            raise
        began = trio.current_time()
        try:
            try:
                payload = await channel.receive_payload(header.length, landing)
            except BaseException:
                if landing is not None:
                    landing.abandon()
                raise
            if is_late:
                landing = await events.landing(self, header)
                if landing is not None and landing.view is not None:
                    landing.view[:] = payload
                    payload = landing.view
            self._heard_at = trio.current_time()
            self._n_received += 1
            if landing is not None:
                landing.complete(payload)
        finally:
            channel.release()
        if header.length >= 65536:
            speed = header.length / max(self._heard_at - began, 1e-6)
            self.goodput = speed if not self.goodput else 0.9 * self.goodput + 0.1 * speed


def _why(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
