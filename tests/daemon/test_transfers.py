"""Records on their way in and out: what they do to memory, and to the machine of their round."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

from mpd.daemon.transfers import Arrival, Bye, Departure, StagePool
from mpd.daemon.vault import IN_PLACE
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
    stages: StagePool = field(default_factory=StagePool)
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
    return Arrival(session, 1, header(kind), session.stages.take(100))


def in_place(session: Session, slot: bytearray) -> Arrival:
    session.landings[0] = Arrival(session, 1, header(Kind.CHUNK), memoryview(slot), in_place=True)
    return session.landings[0]


# ---------------------------------------------------------------------------------------------------------- arrivals


@pytest.mark.parametrize(
    ("kind", "heard"), [(Kind.PIECE, ("piece", 1, 0, 3)), (Kind.CHUNK, ("result", 1, 0, 3, 0b101))]
)
async def test_a_record_is_handed_in_when_it_is_whole(kind: Kind, heard: tuple[Any, ...]) -> None:
    session = Session()
    arrival = staged(session, kind)
    arrival.view[:] = bytes(range(100))
    arrival.progress()
    assert session.exchange.n_progress == 1
    assert session.exchange.heard == []
    payload = arrival.view
    arrival.complete()
    assert session.exchange.heard == [(*heard, payload)]
    assert session.bytes_received == HEADER_BYTES + 100


async def test_a_result_in_place_is_handed_in_as_such_and_leaves_its_slot_free_for_the_next() -> None:
    session, slot = Session(), bytearray(100)
    arrival = in_place(session, slot)
    arrival.complete()
    assert session.exchange.heard == [("result", 1, 0, 3, 0b101, IN_PLACE)]
    assert session.landings == {}


async def test_after_its_slot_was_taken_a_record_goes_nowhere() -> None:
    session, slot = Session(), bytearray(100)
    arrival = in_place(session, slot)
    arrival.view[:40] = b"\1" * 40
    arrival.revoke()
    arrival.view[40:] = b"\2" * 60
    arrival.complete()
    assert bytes(slot) == b"\1" * 40 + bytes(60)
    assert session.exchange.heard == []
    assert session.bytes_received == HEADER_BYTES + 100


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
    arrival.complete()
    assert session.exchange.heard == []


async def test_stages_are_used_again_once_their_record_is_done() -> None:
    session = Session()
    first = staged(session, Kind.PIECE)
    second = staged(session, Kind.PIECE)
    assert first.view.obj is not second.view.obj
    memory = first.view.obj
    first.complete()
    assert staged(session, Kind.CHUNK).view.obj is memory


@pytest.mark.parametrize("n_bytes", [0, 1, 4096, 4097, 65536, 1_000_000])
def test_a_stage_has_the_size_that_was_asked_for_whatever_it_was_before(n_bytes: int) -> None:
    pool = StagePool()
    for size in (n_bytes, max(0, n_bytes - 1), n_bytes + 1):
        view = pool.take(size)
        assert len(view) == size
        pool.give(view)
    assert len(pool.take(n_bytes)) == n_bytes


def test_the_pool_does_not_keep_everything_that_it_is_given() -> None:
    pool = StagePool()
    given = [pool.take(100) for _ in range(100)]
    for view in given:
        pool.give(view)
    memory = {id(view.obj) for view in given}
    kept = sum(id(pool.take(100).obj) in memory for _ in range(100))
    assert 0 < kept <= 32


# --------------------------------------------------------------------------------------------------------- departures


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
