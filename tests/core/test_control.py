"""What trainer and daemon say to each other: every message survives the trip, and nothing else gets through."""

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from message_strategies import any_message, gone_wrong, messages, outcome, required_fields

from mpd import control
from mpd.control import LOCAL, MAX_FRAME_BYTES, PREFIX_BYTES, body_length, pack
from mpd.errors import LocalError
from mpd.layout import MAX_WEIGHT, TensorSpec

KINDS = pytest.mark.parametrize("kind", LOCAL.types.values(), ids=list(LOCAL.types))
NOT_THAT = [[[]]]  # no field has this type


@KINDS
def test_every_message_survives_the_trip(kind: type[Any]) -> None:
    @given(messages(kind))
    def survives(message: Any) -> None:
        assert LOCAL.decode(LOCAL.encode(message)) == message

    survives()


@KINDS
def test_every_field_is_checked(kind: type[Any]) -> None:
    @given(messages(kind))
    def is_checked(message: Any) -> None:
        name, body = msgspec.msgpack.decode(LOCAL.encode(message))
        for field in body:
            with pytest.raises(LocalError):
                LOCAL.decode(msgspec.msgpack.encode([name, {**body, field: NOT_THAT}]))
        for field in required_fields(kind):
            with pytest.raises(LocalError, match=f"missing required field `{field}`"):
                LOCAL.decode(msgspec.msgpack.encode([name, {k: v for k, v in body.items() if k != field}]))

    is_checked()


@given(gone_wrong(LOCAL) | st.binary(max_size=200))
def test_a_message_gone_wrong_is_another_message_or_a_local_error(body: bytes) -> None:
    message = outcome(LOCAL, body, LocalError)
    assert message is None or type(message) in LOCAL.types.values()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": 0.0}, "weight is 0.0"),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"weight": float("inf")}, "weight is inf"),
        ({"weight": 1e9}, r"weight is 1000000000.0: a positive number up to 1e\+08 expected"),
        ({"timeout_s": 0.0}, "timeout is 0.0"),
        ({"timeout_s": float("inf")}, "timeout is inf"),
        ({"timeout_s": float("nan")}, "timeout is nan"),
        ({"source": "out"}, "source is 'out'"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused(change: dict[str, Any], words: str) -> None:
    body = {"seq": 1, "weight": 1.0, "timeout_s": 1.0, "source": "in"} | change
    with pytest.raises(LocalError, match=words):
        LOCAL.decode(msgspec.msgpack.encode(["step", body]))
    with pytest.raises(ValueError, match=words):
        control.Step(**body)


def test_the_heaviest_step_is_accepted() -> None:
    step = control.Step(1, MAX_WEIGHT, 1.0)
    assert LOCAL.decode(LOCAL.encode(step)) == step


def test_tensors_are_checked_while_they_are_decoded() -> None:
    attach = control.Attach("run", (TensorSpec("w", "float32", (4,)),), 16, 1, "raw", "mean")
    body = LOCAL.encode(attach)
    with pytest.raises(LocalError, match="tensor 'w' is float23"):
        LOCAL.decode(body.replace(b"float32", b"float23"))


@given(any_message(LOCAL))
def test_a_frame_is_the_length_and_the_body(message: Any) -> None:
    frame = pack(message)
    prefix, body = frame[:PREFIX_BYTES], frame[PREFIX_BYTES:]
    assert body_length(prefix) == len(body) == struct.unpack("<I", prefix)[0]
    assert LOCAL.decode(body) == message


def test_a_frame_has_1_byte_to_64_mib() -> None:
    assert body_length(struct.pack("<I", 1)) == 1
    assert body_length(struct.pack("<I", MAX_FRAME_BYTES)) == MAX_FRAME_BYTES == 64 << 20
    for length in (0, MAX_FRAME_BYTES + 1, 2**32 - 1):
        with pytest.raises(LocalError, match=f"a frame of {length} bytes was announced"):
            body_length(struct.pack("<I", length))


def test_a_message_that_is_too_long_is_never_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_FRAME_BYTES", 100)
    assert len(pack(control.Answer("x" * 80))) <= PREFIX_BYTES + 100
    with pytest.raises(LocalError, match="is too long: at most 100 fit"):
        pack(control.Answer("x" * 100))
