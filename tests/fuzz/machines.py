"""What peers send, handed to the machines that decide: the plan of a round, a round, and finding a group.

A parser that accepts something is right only if whoever decides can live with it. So here the very machines of a daemon
get what was parsed, in any order and with any clock, and they too may only blame the peer.
"""

import math
import random
from collections.abc import Iterator

from fuzz.peers import LAYOUT, ROUND_ID, TERMS
from fuzz.target import Choices, Target, examples, frame
from message_strategies import messages

from mpd.codecs import codec_named
from mpd.daemon.vault import RegionVault
from mpd.errors import PeerError, RoundFailed
from mpd.exchange import Exchange, RoundPlan, Send
from mpd.grouping import compose_begins
from mpd.ids import PeerId
from mpd.layout import CODEC_NAMES
from mpd.mass import Shares, Standing, after, certificate
from mpd.matchmaking import MatchLimits, Matchmaker, Sighting
from mpd.messages import EXCHANGE, PEERS, Begin, Declined, Disbanded, Here, Join, Joined, Member, Quit
from mpd.reduce import AccumulatorPool
from mpd.schedule import chunks
from mpd.wire import HEADER_BYTES, Header, Kind, pack_header, unpack_header

SLOT = b"s" * 20

# ---------------------------------------------------------------------------------------------------------------- plans


def parse_begin(data: bytes) -> RoundPlan:
    """Every `Begin` that is accepted can be carried out: it has a plan, memory for it, and a standing afterwards."""
    begin = PEERS.decode(data)
    if not isinstance(begin, Begin):
        raise PeerError("no begin")
    memory = memoryview(bytearray(LAYOUT.n_bytes))
    plan = chunks(LAYOUT.segments, [member.fraction for member in begin.members], begin.chunk_bytes)
    weights = tuple(member.weight for member in begin.members)
    RegionVault(plan, memory, memory, weights, 0).use(codec_named("raw"), AccumulatorPool())
    heads = tuple(member.heads for member in begin.members)
    shares = Shares(begin.number, (2, 3), weights, heads, begin.whole)
    everyone = (1 << len(begin.members)) - 1
    for contributors in (everyone, 1):
        certificate(shares, contributors)
        after(Standing(1.0, 1.0, b"", -1, False, (1, 2)), 0, shares, contributors, begin.round_id, 6)
    return RoundPlan(
        n_members=len(begin.members),
        me=0,
        owners=tuple(chunk.owner for chunk in plan),
        inbound=sum(1 << place for place, member in enumerate(begin.members) if member.inbound),
        senders=sum(1 << place for place, weight in enumerate(weights) if weight > 0),
        deadline=begin.timeout_s,
        progress_s=begin.progress_s,
    )


def begin_seeds() -> list[bytes]:
    return [PEERS.encode(begin) for begin in examples(messages(Begin), 12)] + [PEERS.encode(_begin(n)) for n in (2, 3)]


def _begin(n: int) -> Begin:
    members = tuple(Member(bytes([i]) * 20, "peer.example", 4747, True, 1.0 + i, 1.0, 1 / n, i) for i in range(n))
    return Begin(ROUND_ID, "run", SLOT, TERMS.digest, 1, 0, members, True, 4096, 60.0, 2.0, {bytes(20): "late"})


# --------------------------------------------------------------------------------------------------------------- rounds


class Round:
    """Member 0 of a round of three, told about by `Choices` what happens: records, messages, losses, time."""

    def __init__(self, choices: Choices) -> None:
        self.codec = codec_named(CODEC_NAMES[choices.number(3)])
        plan = chunks(LAYOUT.segments, [1.0, 2.0, 1.0], 64)
        weights = [1.0, 1.0, float(choices.number(2))]
        self.vault = RegionVault(
            plan, memoryview(bytearray(LAYOUT.n_bytes)), memoryview(bytearray(LAYOUT.n_bytes)), weights, 0
        ).use(self.codec, AccumulatorPool())
        senders = 0b011 | (weights[2] > 0) << 2
        round_plan = RoundPlan(3, 0, tuple(chunk.owner for chunk in plan), 0b111, senders, 30.0, 1.0)
        self.now = 0.0
        self.machine = Exchange(round_plan, self.vault, 0.0)
        self.machine.start(0.0)

    def go(self, choices: Choices) -> None:
        """Do what the next choices say."""
        what, sender = divmod(choices.number(10), 2)
        try:
            self._event(what, 1 + sender, choices)
        except PeerError as error:
            self.machine.on_lost(self.now, 1 + sender, str(error))
        except RoundFailed as error:
            self.machine.cancel(self.now, str(error))
        for action in self.machine.take_actions():
            if isinstance(action, Send):
                EXCHANGE.decode(EXCHANGE.encode(action.message))
        assert self.machine.gone or math.isfinite(self.machine.wakeup or math.nan)

    def _event(self, what: int, sender: int, choices: Choices) -> None:
        if what == 0:
            self._record(sender, unpack_header(choices.take(HEADER_BYTES)), choices)
        elif what == 1:
            self.machine.on_message(self.now, sender, EXCHANGE.decode(choices.frame()))
        elif what == 2:
            self.now += choices.number(256) / 64
            self.machine.on_tick(self.now)
        elif what == 3:
            self.machine.on_lost(self.now, sender, "its link ended")
        else:
            self.machine.on_progress(self.now, sender)

    def _record(self, sender: int, header: Header, choices: Choices) -> None:
        machine, where = self.machine, (header.chunk, header.version)
        why = self.vault.accepts(header.chunk, header.member, header.length, header.codec)
        if why:
            raise PeerError(why)
        payload = memoryview(choices.take(header.length).ljust(header.length, b"\0"))
        if header.kind is Kind.PIECE:
            machine.wants_piece(sender, *where)
            machine.on_piece(self.now, sender, *where, payload)
        elif header.kind is Kind.CHUNK:
            machine.wants_result(sender, *where)
            machine.on_result(self.now, sender, *where, header.contributors, payload)


def parse_round(data: bytes) -> None:
    """Whatever members send in whatever order, only they are to blame, and the round ends by its deadline."""
    choices = Choices(data)
    one = Round(choices)
    while choices:
        one.go(choices)
    one.machine.on_tick(max(one.now, 30.0))
    assert one.machine.gone


def round_seeds() -> Iterator[bytes]:
    said = [
        b"\x02" + frame(EXCHANGE.encode(m)) for kind in EXCHANGE.types.values() for m in examples(messages(kind), 2)
    ]
    yield b"\0\1"
    for codec in range(len(CODEC_NAMES)):
        whole = Round(Choices(bytes([codec, 1])))
        sent = bytes([codec, 1])
        for chunk in whole.vault.chunks:
            if chunk.owner == 0:
                sent += (
                    b"\0" + _sent(whole, chunk.index, Kind.PIECE, 0) + b"\1" + _sent(whole, chunk.index, Kind.PIECE, 0)
                )
            elif chunk.owner == 1:
                sent += b"\0" + _sent(whole, chunk.index, Kind.CHUNK, 7)
            else:
                sent += b"\1" + _sent(whole, chunk.index, Kind.CHUNK, 7)
        yield sent
    for message in said:
        yield bytes(2) + message + b"\x04\x40" + message


def _sent(one: Round, chunk: int, kind: Kind, contributors: int) -> bytes:
    payload, owner = bytes(one.vault.piece_payload(chunk)), one.vault.chunks[chunk].owner
    return pack_header(Header(kind, one.codec.code, owner, chunk, len(payload), 0, ROUND_ID, contributors)) + payload


# ---------------------------------------------------------------------------------------------------------- matchmaking

MATCHING = (Here, Join, Joined, Declined, Disbanded, Quit, Begin)


def parse_matchmaking(data: bytes) -> None:
    """Whatever peers say in a slot, only they are to blame, and what we answer can be sent."""
    choices = Choices(data)
    now = 0.0
    machine = Matchmaker(_peer(0), SLOT, "run", 0, _compose, MatchLimits(), choices.number(5))
    while choices:
        what, place = divmod(choices.number(25), 5)
        sender = _peer(place)
        try:
            if what == 0:
                message = PEERS.decode(choices.frame())
                if place and isinstance(message, MATCHING):
                    machine.on_message(now, sender, message)
            elif what == 1:
                machine.on_sighted(now, Sighting(sender, True, ready=False, stamp=0))
            elif what == 2:
                now += choices.number(256) / 64
                machine.on_tick(now)
            elif what == 3:
                machine.on_gone(now, sender, "its link ended")
            elif machine.state.name == "EXPECTED" and not machine.verdict:
                machine.on_ready(now, _ticket(0, 30.0))
        except PeerError as error:
            machine.on_gone(now, sender, str(error))
        for action in machine.take_actions():
            PEERS.encode(action.message)


def _peer(place: int) -> PeerId:
    return PeerId(bytes([100 + place if place < 3 else 100 - place]) * 20)


def _ticket(place: int, time_left_s: float, stamp: int = 1) -> Join:
    standing = Standing(1.0, 1.0, b"", -1, False, (0,))
    return Join("run", SLOT, TERMS.digest, 1, 0, stamp, standing, "peer.example", 4747, True, 1e6 * place, time_left_s)


def _compose(members: tuple[tuple[PeerId, Join], ...], left_out: dict[PeerId, str]) -> tuple[Begin, ...]:
    return compose_begins(
        members,
        left_out,
        shape=(4,),
        n_peers=6,
        exact=True,
        rng=random.Random(7),
        progress_s=2.0,
        payload_bytes=LAYOUT.payload_bytes,
    )


def matchmaking_seeds() -> Iterator[bytes]:
    ready, later = bytes([20]), bytes([10, 255])
    heard = [
        Here("run", SLOT, 0, True, 2),
        _ticket(1, 20.0, 2),
        Joined(SLOT, 1),
        *(Declined(SLOT, why, "so", _peer(2)) for why in ("not_leading", "full", "other_terms")),
        Disbanded(SLOT, _peer(2)),
        Quit(SLOT),
        _begin_of((0, 1, 3)),
    ]
    said = {
        type(m).__name__ + str(i): [bytes([p]) + frame(PEERS.encode(m)) for p in range(5)] for i, m in enumerate(heard)
    }
    for each in said.values():
        yield b"\0" + ready + each[1] + later + each[3]
    yield b"\2" + bytes([6]) + ready + b"".join(each[1] + each[3] for each in said.values()) + later * 9


def _begin_of(places: tuple[int, ...]) -> Begin:
    members = tuple(Member(_peer(p), "peer.example", 4747, True, 1.0, 1.0, 1 / len(places), 1) for p in places)
    return Begin(ROUND_ID, "run", SLOT, TERMS.digest, 1, 0, members, True, 4096, 60.0, 2.0, {})


TARGETS = {
    "begin": Target(parse_begin, (PeerError,), begin_seeds),
    "round": Target(parse_round, (), round_seeds),
    "matchmaking": Target(parse_matchmaking, (), matchmaking_seeds),
}
