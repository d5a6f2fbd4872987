"""What peers say to each other: every message survives the trip, and whoever says anything else is to blame."""

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from message_strategies import gone_wrong, messages, outcome, required_fields

from mpd.control import LOCAL, Stepped
from mpd.errors import PeerError
from mpd.mass import MAX_MASS, Shares, certificate, enter
from mpd.messages import EXCHANGE, PEERS, Begin, Hello, Join, Member
from mpd.vocabulary import Vocabulary

BOTH = [(vocabulary, kind) for vocabulary in (PEERS, EXCHANGE) for kind in vocabulary.types.values()]
KINDS = pytest.mark.parametrize(("vocabulary", "kind"), BOTH, ids=[kind.__name__ for _, kind in BOTH])
NOT_THAT = [[[]]]  # no field has this type
NAN, INF = math.nan, math.inf

ALICE = Member(b"a" * 20, "192.0.2.7", 4747, True, 2.0, 1.0, 0.75, 7)
BOB = Member(b"b" * 20, "peer.example", 4748, True, 0.0, 1.0, 0.25, 7)
CAROL = Member(b"c" * 20, "", 0, False, 1.0, 1.0, 0.0, 7)
JOIN = Join("run", b"s" * 20, b"d" * 32, 1, 0, 5, enter(1.0, (0,)), "192.0.2.7", 4747, True, 0.0, 60.0)
BEGIN = Begin(
    b"r" * 16, "run", b"s" * 20, b"d" * 32, 1, 0, (ALICE, BOB, CAROL), True, 1 << 20, 60.0, 2.0, {b"x" * 20: "busy"}
)


def fields_of(member: Member, **changes: Any) -> dict[str, Any]:
    """Return the fields of `member` as they travel."""
    fields: dict[str, Any] = msgspec.to_builtins(member, builtin_types=[bytes])
    return fields | changes


def refused(vocabulary: Vocabulary, message: Any, change: dict[str, Any]) -> str:
    """Return how a peer is told off whose `message` has some fields changed."""
    name, body = msgspec.msgpack.decode(vocabulary.encode(message))
    with pytest.raises(PeerError) as refusal:
        vocabulary.decode(msgspec.msgpack.encode([name, {**body, **change}]))
    return str(refusal.value)


@KINDS
def test_every_message_survives_the_trip(vocabulary: Vocabulary, kind: type[Any]) -> None:
    @given(messages(kind))
    def survives(message: Any) -> None:
        assert vocabulary.decode(vocabulary.encode(message)) == message

    survives()


@KINDS
def test_every_field_is_checked(vocabulary: Vocabulary, kind: type[Any]) -> None:
    @given(messages(kind))
    def is_checked(message: Any) -> None:
        name, body = msgspec.msgpack.decode(vocabulary.encode(message))
        for field in body:
            refused(vocabulary, message, {field: NOT_THAT})
        for field in required_fields(kind):
            with pytest.raises(PeerError, match=f"missing required field `{field}`"):
                vocabulary.decode(msgspec.msgpack.encode([name, {k: v for k, v in body.items() if k != field}]))

    is_checked()


@given(gone_wrong(PEERS) | st.binary(max_size=200))
def test_a_message_gone_wrong_is_another_message_or_a_peer_error(body: bytes) -> None:
    message = outcome(PEERS, body, PeerError)
    assert message is None or type(message) in PEERS.types.values()


@given(gone_wrong(EXCHANGE) | st.binary(max_size=200))
def test_an_exchange_gone_wrong_is_another_message_or_a_peer_error(body: bytes) -> None:
    message = outcome(EXCHANGE, body, PeerError)
    assert message is None or type(message) in EXCHANGE.types.values()


HOSTILE_HOSTS = [
    "",
    " ",
    "a b",
    "a..b",
    "x" * 64,
    "a." * 128,
    "host\0",
    "\x1b[2J",
    "häst",
    "1.2.3",
    "a/b",
    "::1%" + "z" * 16,
]


@pytest.mark.parametrize("host", HOSTILE_HOSTS)
def test_no_host_gets_in_that_a_resolver_or_a_terminal_would_choke_on(host: str) -> None:
    """Such a name would raise in the resolver, far from here, where nobody blames the peer."""
    hello = Hello(2, b"i" * 16, "192.0.2.7", 4747, "192.0.2.8")
    for message in (hello, JOIN):
        assert "is not a host" in refused(PEERS, message, {"host": host})
    members = [fields_of(ALICE), fields_of(BOB, host=host)]
    assert "is not a host" in refused(PEERS, BEGIN, {"members": members})
    if host:
        assert "is not a host" in refused(PEERS, hello, {"seen_host": host})


def test_a_peer_that_cannot_be_dialled_needs_no_host() -> None:
    assert Hello(2, b"i" * 16, "", 0).port == 0
    assert CAROL.host == ""
    assert "has a port" in refused(PEERS, JOIN, {"port": 0})
    members = [fields_of(ALICE, fraction=1.0), fields_of(CAROL, inbound=True)]
    assert "has a port" in refused(PEERS, BEGIN, {"members": members})


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (BEGIN, {"round_id": b"r" * 15}),
        (BEGIN, {"slot": b"s" * 19}),
        (BEGIN, {"digest": b""}),
        (BEGIN, {"chunk_bytes": 4095}),
        (BEGIN, {"chunk_bytes": (4 << 20) + 1}),
        (BEGIN, {"timeout_s": 0.0}),
        (BEGIN, {"timeout_s": NAN}),
        (BEGIN, {"timeout_s": 1e9}),
        (BEGIN, {"progress_s": -1.0}),
        (BEGIN, {"number": -1}),
        (BEGIN, {"number": 1 << 62}),
        (BEGIN, {"epoch": -1}),
        (BEGIN, {"left_out": {bytes([i % 256, i // 256]): "" for i in range(1025)}}),
        (JOIN, {"time_left_s": 0.0}),
        (JOIN, {"time_left_s": NAN}),
        (JOIN, {"bandwidth": INF}),
        (JOIN, {"bandwidth": -1.0}),
        (JOIN, {"stamp": -1}),
        (JOIN, {"port": 65536}),
        (JOIN, {"standing": {"mass": NAN, "heads": 1.0, "origin": b"", "seen": -1, "full": False, "cell": []}}),
        (JOIN, {"standing": {"mass": INF, "heads": 1.0, "origin": b"", "seen": -1, "full": False, "cell": []}}),
        (JOIN, {"standing": {"mass": -1.0, "heads": 1.0, "origin": b"", "seen": -1, "full": False, "cell": []}}),
        (JOIN, {"standing": {"mass": 1e9, "heads": 1.0, "origin": b"", "seen": -1, "full": False, "cell": []}}),
        (JOIN, {"standing": {"mass": 1e15, "heads": 1.0, "origin": b"o" * 16, "seen": 0, "full": True, "cell": []}}),
        (JOIN, {"standing": {"mass": 1.0, "heads": 1.0, "origin": b"o", "seen": -1, "full": False, "cell": []}}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else type(value).__name__,
)
def test_values_out_of_range_are_refused(message: Any, change: dict[str, Any]) -> None:
    assert refused(PEERS, message, change).startswith("malformed message: ")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([ALICE], "2 to 64 members"),
        ([ALICE, ALICE], "stands in a group once"),
        ([ALICE, BOB, BOB], "stands in a group once"),
        ([ALICE, CAROL], "fractions sum to 1"),
    ],
)
def test_a_group_has_to_add_up(members: list[Member], words: str) -> None:
    assert words in refused(PEERS, BEGIN, {"members": [fields_of(member) for member in members]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fraction": NAN}, "a fraction lies between 0 and 1"),
        ({"fraction": 1.1}, "a fraction lies between 0 and 1"),
        ({"weight": NAN}, "a weight lies between"),
        ({"weight": -1.0}, "a weight lies between"),
        ({"weight": INF}, "a weight lies between"),
        ({"weight": 1.01 * MAX_MASS}, "a weight lies between"),
        ({"heads": -0.5}, "heads are a count"),
        ({"heads": 2.0**20 + 1}, "heads are a count"),
        ({"peer": b"a"}, "a peer id has 20 bytes"),
        ({"inbound": False}, "only who can be dialled reduces"),
    ],
)
def test_a_member_has_to_make_sense(change: dict[str, Any], words: str) -> None:
    members = [fields_of(ALICE, **change), fields_of(BOB)]
    assert words in refused(PEERS, BEGIN, {"members": members})


def test_the_heads_of_the_largest_swarm_fit_into_an_answer_to_a_trainer() -> None:
    group = Shares(1, (2**10, 2**10), (1.0,) * 64, (2.0**20,) * 64, whole=True)
    PEERS.decode(PEERS.encode(replace(BEGIN, members=(replace(ALICE, heads=2.0**20), BOB))))
    answer = Stepped(1, averaged=True, reason="", heads=certificate(group, (1 << 64) - 1)[1])
    assert LOCAL.decode(LOCAL.encode(answer)) == answer


def test_somebody_has_to_weigh_something() -> None:
    members = [fields_of(ALICE, weight=0.0), fields_of(BOB)]
    assert "somebody's weight must count" in refused(PEERS, BEGIN, {"members": members})


def test_a_tensor_that_makes_no_sense_is_the_peer_s_mistake() -> None:
    terms = {"tensors": [{"name": "w", "dtype": "int8", "shape": [2]}], "group_size": 2, "rounds": 1, "codec": "raw"}
    body = {"run": "run", "aggregate": "mean", "answer_me": True, **terms}
    with pytest.raises(PeerError, match="tensor 'w' is int8"):
        PEERS.decode(msgspec.msgpack.encode(["run_terms", body]))
