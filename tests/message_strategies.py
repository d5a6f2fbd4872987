"""Hypothesis strategies for messages, made from the dataclasses themselves, and the bytes of messages gone wrong.

A field's strategy follows from its type; a field whose value is bounded has one by its name. So a new message needs an
entry here only if it is choosier than its types.
"""

import types
import typing
from dataclasses import MISSING, fields
from typing import Any

from hypothesis import strategies as st

from mpd.errors import MpdError
from mpd.grid import ShapeRecord, fit
from mpd.layout import CODEC_NAMES, ITEM_BYTES, MAX_WEIGHT, TensorSpec
from mpd.mass import Standing
from mpd.messages import DECLINES, MAX_MEMBERS, MAX_ROUND_S, Begin, Done, Member
from mpd.state_messages import MAX_WANTED, StateWant
from mpd.vocabulary import Vocabulary

COUNTS = st.integers(0, 2**62 - 1)
HOSTS = st.sampled_from(["192.0.2.7", "2001:db8::7", "fe80::1%eth0", "peer-7.example", "localhost"])
MASKS = st.integers(0, 2**MAX_MEMBERS - 1)
DURATIONS = st.floats(0, MAX_ROUND_S, exclude_min=True)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=20)

# What a type alone does not say, by the name of the field.
BOUNDED: dict[str, st.SearchStrategy[Any]] = {
    "peer": st.binary(min_size=20, max_size=20),
    "instance": st.binary(min_size=16, max_size=16),
    "conn_id": st.binary(min_size=16, max_size=16),
    "round_id": st.binary(min_size=16, max_size=16),
    "slot": st.binary(min_size=20, max_size=20),
    "digest": st.binary(min_size=32, max_size=32),
    "leader": st.sampled_from([b"", b"l" * 20]),
    "host": HOSTS,
    "seen_host": HOSTS,
    "port": st.integers(1, 65535),
    "number": COUNTS,
    "stamp": COUNTS,
    "age": COUNTS,
    "manifest": st.binary(min_size=32, max_size=32),
    "hashes": st.integers(1, 3).map(lambda n: n * b"h" * 32),
    "first": st.integers(0, 2**20 - 1),
    "terms": st.binary(min_size=32, max_size=32),
    "n_bytes": st.integers(1, 2**40),
    "saved_at_s": st.floats(0, 1e11),
    "epoch": st.integers(1, 2**62),
    "promised": COUNTS,
    "accepted": st.integers(-1, 2**62),
    "slow": MASKS,
    "alive": MASKS,
    "cut": MASKS,
    "holders": st.lists(st.tuples(COUNTS, MASKS), max_size=5).map(tuple),
    "why": st.sampled_from(DECLINES),
    "bandwidth": st.floats(0, 1e12),
    "weight": st.floats(1e-9, MAX_WEIGHT),
    "timeout_s": DURATIONS,
    "progress_s": DURATIONS,
    "time_left_s": DURATIONS,
    "chunk_bytes": st.integers(64, 1 << 16).map(lambda steps: 64 * steps),
    "news": COUNTS,
    "wall_ms": COUNTS,
    "received": COUNTS,
    "seq": COUNTS,
    "random": st.binary(min_size=32, max_size=32),
    "datagram_key": st.binary(min_size=32, max_size=32),
    "suites": st.lists(st.text(max_size=20), min_size=1, max_size=8).map(tuple),
    "source": st.sampled_from(["in", "snapshot"]),
    "codec": st.sampled_from(CODEC_NAMES),
    # Standing
    "mass": st.floats(0, MAX_WEIGHT),  # more only behind an origin
    "heads": st.floats(0, 2**20),
    "parts": st.integers(1, 64),
    "newest": COUNTS,
    "origin": st.sampled_from([b"", b"o" * 16]),
    "seen": st.integers(-1, 2**62),
    # TensorSpec
    "dtype": st.sampled_from(sorted(ITEM_BYTES)),
}


def messages(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Return valid messages of `kind`."""
    if kind is ShapeRecord:
        return st.builds(_shape_record, st.integers(1, 2**62), st.integers(1, 40), BOUNDED["digest"], st.booleans())
    chosen = {name: _field(name, hint) for name, hint in typing.get_type_hints(kind).items()}
    if kind is Done:
        chosen["digest"] = st.binary(min_size=8, max_size=8)
    if kind is TensorSpec:
        chosen |= {"name": NAMES, "shape": st.lists(st.integers(0, 2**40), max_size=4).map(tuple)}
    if kind is Begin:
        chosen["members"] = _groups()
    if kind is StateWant:
        chosen["chunks"] = st.lists(st.integers(0, 2**20 - 1), min_size=1, max_size=MAX_WANTED).map(tuple)
    if "heads" in chosen and kind not in (Standing, Member):
        chosen["heads"] = COUNTS
    if kind.__module__ == "mpd.control" and "peer" in chosen:
        chosen["peer"] = st.text(max_size=40)  # as people see it
    return st.builds(kind, **chosen)


def any_message(vocabulary: Vocabulary) -> st.SearchStrategy[Any]:
    """Return valid messages of all types of `vocabulary`."""
    return st.one_of([messages(kind) for kind in vocabulary.types.values()])


@st.composite
def gone_wrong(draw: st.DrawFn, vocabulary: Vocabulary) -> bytes:
    """Return the bytes of a valid message after an accident: bytes changed, cut out, or put in."""
    data = bytearray(vocabulary.encode(draw(any_message(vocabulary))))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        n_gone = draw(st.integers(0, 4))
        data[start : start + n_gone] = draw(st.binary(max_size=4))
    return bytes(data)


def outcome(vocabulary: Vocabulary, body: bytes, blame: type[MpdError]) -> Any | None:
    """Return the message in `body`, or None if it is refused as it should be; any other error passes through."""
    try:
        return vocabulary.decode(body)
    except blame as error:
        refusal = str(error)
    assert refusal.startswith("malformed message: ")
    return None


def required_fields(kind: type[Any]) -> list[str]:
    """Return the names of the fields that have no default."""
    return [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]


def _field(name: str, hint: Any) -> st.SearchStrategy[Any]:
    return BOUNDED[name] if name in BOUNDED else _of_type(hint)


def _of_type(hint: Any) -> st.SearchStrategy[Any]:
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return st.one_of([_of_type(each) for each in arguments])
    if typing.get_origin(hint) is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(_of_type(arguments[0]), max_size=4).map(tuple)
        return st.tuples(*map(_of_type, arguments))
    if typing.get_origin(hint) is dict:
        return st.dictionaries(*map(_of_type, arguments), max_size=3)
    simple = {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(max_size=40),
        bytes: st.binary(max_size=40),
    }
    return simple[hint] if hint in simple else messages(hint)


@st.composite
def _groups(draw: st.DrawFn) -> tuple[Member, ...]:
    n = draw(st.integers(2, 5))
    reducers = draw(st.integers(1, n))
    members = []
    for i in range(n):
        peer, host, weight = bytes([i]) * 20, draw(HOSTS), draw(BOUNDED["weight"])
        inbound = i < reducers
        members.append(Member(peer, host, 4747 * inbound, inbound, weight, 1.0, inbound / reducers, i))
    return tuple(members)


def _shape_record(epoch: int, n_peers: int, digest: bytes, with_roster: bool) -> ShapeRecord:
    return ShapeRecord(epoch, n_peers, fit(n_peers, 4), digest, bytes(4 * n_peers) if with_roster else b"")
