"""Any vocabulary: what goes in comes out, and whatever else comes is refused with the error that it was made with."""

import json
import subprocess
import sys
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.errors import Fatal, LocalError, MpdError, PeerError
from mpd.layout import TensorSpec
from mpd.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Ping:
    """Nothing to say."""


@dataclass(frozen=True, slots=True)
class LongerWord:
    number: int
    share: float = 0.5
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError("a number is not negative")


@dataclass(frozen=True, slots=True)
class Tensors:
    specs: tuple[TensorSpec, ...]


WORDS = Vocabulary(PeerError, Ping, LongerWord, Tensors)
ARRAY_OF_4_BILLION = b"\xdd\xff\xff\xff\xff"


def packed(name: object, body: object) -> bytes:
    return msgspec.msgpack.encode([name, body])


@pytest.mark.parametrize(
    "message",
    [
        Ping(),
        LongerWord(3),
        LongerWord(2**63, -1.5e300, {"a": "é", "": "\0"}),
        Tensors((TensorSpec("w", "float32", (2, 0)), TensorSpec("b", "bfloat16", ()))),
    ],
)
def test_what_goes_in_comes_out(message: object) -> None:
    body = WORDS.encode(message)
    for same in (body, bytearray(body), memoryview(body)):
        assert WORDS.decode(same) == message


def test_the_wire_has_the_name_and_the_fields_by_name() -> None:
    assert msgspec.msgpack.decode(WORDS.encode(LongerWord(7))) == [
        "longer_word",
        {"number": 7, "share": 0.5, "notes": {}},
    ]
    assert list(WORDS.types) == ["ping", "longer_word", "tensors"]


def test_fields_with_defaults_may_be_left_out_and_unknown_ones_are_ignored() -> None:
    assert WORDS.decode(packed("longer_word", {"number": 1})) == LongerWord(1)
    assert WORDS.decode(packed("longer_word", {"number": 1, "colour": "red"})) == LongerWord(1)
    assert WORDS.decode(packed("longer_word", {"number": 1, "share": 1})) == LongerWord(1, 1.0)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "truncated"),
        (packed("pong", {}), "'pong' is none of ping, longer_word, tensors"),
        (packed("Ping", {}), "'Ping' is none of"),
        (packed("p" * 1000, {}), f"'{'p' * 40}' is none of"),
        (packed(1, {}), "Expected `str`"),
        (packed("ping", []), "Expected `object`"),
        (packed("ping", {}) + b"\0", "trailing"),
        (msgspec.msgpack.encode(["ping"]), "length 2"),
        (msgspec.msgpack.encode(["ping", {}, {}]), "length 2"),
        (packed("longer_word", {}), "missing required field `number`"),
        (packed("longer_word", {"number": True}), "Expected `int`"),
        (packed("longer_word", {"number": "1"}), "Expected `int`"),
        (packed("longer_word", {"number": 1, "share": "x"}), "Expected `float`"),
        (packed("longer_word", {"number": 1, "notes": {"a": 1}}), "Expected `str`"),
        (packed("longer_word", {"number": -1}), "a number is not negative"),
        (b"\x92\xa4p\xffng\x80", "utf-8"),
        (ARRAY_OF_4_BILLION, "length 2"),
        (b"\x92\xa7tensors\x81\xa5specs" + ARRAY_OF_4_BILLION, "truncated"),
        (b"\x92\xa4ping" + b"\x91" * 100_000 + b"\xc0", "recursion"),
        (b"\x92" + b"\x81\xa1x" * 100_000, "Expected `str`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the bytes are long
)
def test_anything_else_is_refused_in_words(body: bytes, words: str) -> None:
    with pytest.raises(PeerError) as refusal:
        WORDS.decode(body)
    assert str(refusal.value).startswith("malformed message: ")
    assert words in str(refusal.value)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize("blame", [PeerError, LocalError, Fatal])
def test_the_speaker_is_to_blame_whatever_a_shared_structure_raises(blame: type[MpdError]) -> None:
    words = Vocabulary(blame, Tensors)
    for body in (
        packed("tensors", {"specs": [{"name": "w", "dtype": "int8", "shape": []}]}),
        packed("tensors", {"specs": [{"name": "", "dtype": "float32", "shape": []}]}),
        packed("tensors", {"specs": 1}),
        packed("ping", {}),
    ):
        with pytest.raises(blame) as refusal:
            words.decode(body)
        assert type(refusal.value) is blame


@given(st.binary(max_size=200))
def test_random_bytes_are_a_message_or_a_peer_error(body: bytes) -> None:
    try:
        message = WORDS.decode(body)
    except PeerError:
        return
    assert WORDS.decode(WORDS.encode(message)) == message


def test_declaring_messages_loads_no_msgspec() -> None:
    code = "import json, sys; import mpd.vocabulary, mpd.control; print(json.dumps('msgspec' in sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=True, cwd="/")
    assert json.loads(done.stdout) is False
