"""Records on their way in and out: what they do to memory and to the machine of their round, and how they queue.

Strategy: the queue is tried against a model of a receiver that counts, with losses wherever they may happen.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from daemon_helpers import Parcel
from hypothesis import given
from hypothesis import strategies as st

from mpd.daemon.transfers import Arrival, Bye, Departure, Notice, Outbox
from mpd.daemon.vault import IN_PLACE
from mpd.errors import PeerError
from mpd.exchange import SendPiece, SendResult
from mpd.ids import RoundId
from mpd.schedule import Chunk
from mpd.wire import HEADER_BYTES, Header, Kind, unpack_header

ROUND = RoundId(b"r" * 16)


class Machine:
    """Says what it heard, and yes or no as it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.n_progress = 0
        self.may_send = True

    def on_progress(self, now: float, place: int) -> None:
        self.n_progress += 1

    def on_piece(self, now: float, *what: Any) -> None:
        self.heard.append(("piece", *what))

    def on_result(self, now: float, *what: Any) -> None:
        self.heard.append(("result", *what))

    def may_send_piece(self, chunk: int, version: int) -> bool:
        return self.may_send

    def holds(self, chunk: int, version: int) -> bool:
        return self.may_send


class Vault:
    codec = type("Codec", (), {"code": 2})
    chunks = (Chunk(0, 5, "float32", 0, 1), Chunk(1, 6, "float32", 4, 1))

    def piece_payload(self, chunk: int) -> memoryview:
        return memoryview(b"piece %d" % chunk)

    def result_payload(self, chunk: int) -> memoryview:
        return memoryview(b"result %d" % chunk)


@dataclass
class Session:
    """As much of a `RoundSession` as records see."""

    exchange: Machine = field(default_factory=Machine)
    vault: Vault = field(default_factory=Vault)
    landings: dict[int, Arrival] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)
    gone: trio.Event = field(default_factory=trio.Event)
    round_id: RoundId = ROUND
    bytes_sent: int = 0
    bytes_received: int = 0

    def feed(self, event: Any, *args: Any) -> None:
        event(trio.current_time(), *args)


def header(kind: Kind, length: int = 100) -> Header:
    return Header(kind, 0, 5, 0, length, 3, ROUND, 0 if kind is Kind.PIECE else 0b101)


def staged(session: Session, kind: Kind) -> Arrival:
    return Arrival(session, 1, header(kind))


def in_place(session: Session, slot: bytearray) -> Arrival:
    session.landings[0] = Arrival(session, 1, header(Kind.CHUNK), memoryview(slot))
    return session.landings[0]


PAYLOAD = memoryview(bytes(range(100)))

# ------------------------------------------------------------------------------------------------------------- arrivals


@pytest.mark.parametrize(
    ("kind", "heard"), [(Kind.PIECE, ("piece", 1, 0, 3)), (Kind.CHUNK, ("result", 1, 0, 3, 0b101))]
)
async def test_a_record_is_handed_in_when_it_is_whole(kind: Kind, heard: tuple[Any, ...]) -> None:
    session = Session()
    arrival = staged(session, kind)
    assert arrival.view is None
    arrival.progress()
    assert session.exchange.n_progress == 1
    assert session.exchange.heard == []
    arrival.complete(PAYLOAD)
    assert session.exchange.heard == [(*heard, PAYLOAD)]
    assert session.bytes_received == HEADER_BYTES + 100


async def test_a_result_in_place_is_handed_in_as_such_and_leaves_its_slot_free_for_the_next() -> None:
    session, slot = Session(), bytearray(100)
    arrival = in_place(session, slot)
    assert arrival.view is not None
    assert arrival.view.obj is slot
    arrival.complete(arrival.view)
    assert session.exchange.heard == [("result", 1, 0, 3, 0b101, IN_PLACE)]
    assert session.landings == {}


async def test_after_its_slot_was_taken_a_record_goes_nowhere() -> None:
    session = Session()
    arrival = in_place(session, bytearray(100))
    del session.landings[0]  # as the session does it
    arrival.revoke()
    assert arrival.view is None
    arrival.complete(PAYLOAD)
    assert session.exchange.heard == []
    assert session.bytes_received == HEADER_BYTES + 100


async def test_a_record_that_is_given_up_leaves_its_slot_to_the_next() -> None:
    """Or a result that was lost on its way would keep its own repetition out of its place."""
    session = Session()
    in_place(session, bytearray(100)).abandon()
    assert session.landings == {}
    arrival = in_place(session, bytearray(100))
    del session.landings[0]
    arrival.revoke()
    arrival.abandon()
    staged(session, Kind.PIECE).abandon()
    assert session.exchange.heard == []
    assert session.bytes_received == 0


@pytest.mark.parametrize("why", ["its sender left", "the round is gone"])
@pytest.mark.parametrize("kind", [Kind.PIECE, Kind.CHUNK])
async def test_a_record_that_comes_too_late_is_dropped(why: str, kind: Kind) -> None:
    session = Session()
    arrival = staged(session, kind)
    if why == "its sender left":
        session.left.add(1)
        arrival.progress()
        assert session.exchange.n_progress == 0
    else:
        session.gone.set()
    arrival.complete(PAYLOAD)
    assert session.exchange.heard == []


def test_a_notice_counts_when_it_has_come_and_not_before() -> None:
    came: list[str] = []
    notice = Notice(lambda: came.append("it"))
    notice.progress()
    notice.abandon()
    assert (notice.view, came) == (None, [])
    notice.complete(memoryview(b""))
    assert came == ["it"]


# ----------------------------------------------------------------------------------------------------------- departures


@pytest.mark.parametrize(
    ("action", "expected", "payload"),
    [
        (SendPiece(2, 1, 4), (Kind.PIECE, 2, 6, 1, 7, 4, ROUND, 0), b"piece 1"),
        (SendResult(2, 0, 3, 0b11), (Kind.CHUNK, 2, 5, 0, 8, 3, ROUND, 0b11), b"result 0"),
    ],
)
def test_a_departure_is_looked_up_when_its_turn_comes(
    action: SendPiece | SendResult, expected: tuple[Any, ...], payload: bytes
) -> None:
    session = Session()
    departure = Departure(session, action)
    assert (departure.owner, departure.chunk) == (session, action.chunk)
    loaded = departure.load()
    assert loaded is not None
    assert unpack_header(loaded[0]) == Header(*expected)
    assert loaded[1] == payload
    session.exchange.may_send = False
    assert departure.load() is None
    departure.sent(47)
    assert session.bytes_sent == 47


def test_a_goodbye_belongs_to_nobody_so_it_outlives_its_round() -> None:
    bye = Bye(ROUND)
    assert bye.owner is None
    head, payload = bye.load()
    assert unpack_header(head) == Header(Kind.BYE, 0, 0, 0, 0, 0, ROUND, 0)
    assert len(payload) == 0
    assert bye.n_bytes() == HEADER_BYTES


# ------------------------------------------------------------------------------------------------------------ the queue


def parcels(n: int, owner: object) -> list[Parcel]:
    return [Parcel(b"", chunk=i, owner=owner) for i in range(n)]


def depart(outbox: Outbox, n: int) -> list[Any]:
    """Send the next `n` records."""
    taken = []
    for _ in range(n):
        taken.append(outbox.take())
        outbox.departs(taken[-1])
    return taken


def test_records_leave_in_the_order_in_which_they_were_put() -> None:
    outbox, sent = Outbox(), parcels(3, object())
    assert not outbox
    for parcel in sent:
        outbox.put(parcel)
    assert outbox
    assert outbox.of(sent[0].owner) == sent
    assert depart(outbox, 3) == sent
    assert not outbox
    assert outbox.n_sent == 3


def test_what_has_not_arrived_leaves_again_before_everything_else() -> None:
    outbox, sent = Outbox(), parcels(6, object())
    for parcel in sent:
        outbox.put(parcel)
    depart(outbox, 4)
    outbox.resume(1)
    assert outbox.n_sent == 1
    assert depart(outbox, 5) == sent[1:]
    assert outbox.n_sent == 6
    outbox.resume(6)
    assert not outbox


def test_numbers_are_those_of_the_receiver_whatever_was_dropped() -> None:
    outbox, mine, other = Outbox(), parcels(4, object()), parcels(4, object())
    for pair in zip(mine, other, strict=True):
        for parcel in pair:
            outbox.put(parcel)
    depart(outbox, 6)
    outbox.drop(mine[0].owner)
    outbox.resume(3)  # two of mine and one of the others have arrived
    assert depart(outbox, 3) == other[1:]
    assert outbox.n_sent == 6


@pytest.mark.parametrize("n_received", [-1, 1, 5, 1 << 62])
def test_a_count_that_cannot_be_is_the_fault_of_the_peer(n_received: int) -> None:
    outbox = Outbox()
    for parcel in parcels(5, object()):
        outbox.put(parcel)
    depart(outbox, 3)
    outbox.resume(2)
    depart(outbox, 2)
    with pytest.raises(PeerError, match="2 to 4 are possible"):
        outbox.resume(n_received)


def test_of_the_goodbyes_that_nobody_owns_only_the_last_are_kept() -> None:
    outbox, owned = Outbox(), parcels(1, object())
    byes = parcels(200, None)
    for parcel in owned + byes:
        outbox.put(parcel)
        depart(outbox, 1)
    outbox.resume(0)
    kept = []
    while outbox:
        kept.append(outbox.take())
    assert kept == owned + byes[-64:]


def test_goodbyes_do_not_pile_up_before_a_peer_that_does_not_read() -> None:
    """It makes us say as many as it likes: one for each record of a round that has ended."""
    outbox, owned, byes = Outbox(), parcels(100, object()), parcels(1000, None)
    for parcel in byes + owned:
        outbox.put(parcel)
    assert outbox.of(None) == byes[:64]
    assert outbox.of(owned[0].owner) == owned


@given(
    st.lists(st.one_of(st.integers(1, 5), st.sampled_from(["lose all", "lose some", "drop"])), max_size=30), st.data()
)
def test_however_connections_break_each_record_arrives_once_and_in_order(steps: list[Any], data: Any) -> None:
    """The receiver knows nothing but how many records it has."""
    outbox, keep, drop = Outbox(), object(), object()
    on_the_way: list[Any] = []
    arrived: list[Any] = []
    put: list[Any] = []
    for step in [*steps, "lose some"]:
        if isinstance(step, int):
            for chunk in range(len(put), len(put) + step):
                put.append(Parcel(b"", chunk=chunk, owner=(keep, drop)[chunk % 2]))
                outbox.put(put[-1])
            on_the_way += depart(outbox, data.draw(st.integers(0, len(outbox.of(keep) + outbox.of(drop)))))
        elif step == "drop":
            outbox.drop(drop)
        else:
            n_arrived = 0 if step == "lose all" else data.draw(st.integers(0, len(on_the_way)))
            arrived += on_the_way[:n_arrived]
            on_the_way.clear()
            outbox.resume(len(arrived))
    while outbox:
        arrived += depart(outbox, 1)
    assert [p for p in arrived if p.owner is keep] == [p for p in put if p.owner is keep]
    assert len({id(p) for p in arrived}) == len(arrived)
    assert [p.chunk for p in arrived] == sorted(p.chunk for p in arrived)
