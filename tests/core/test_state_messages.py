"""Words about states: what is possible, and what costs whoever says it the link. Trips are tested in test_messages."""

from typing import Any

import pytest
from hypothesis import given
from message_strategies import gone_wrong, outcome

from mpd import state_messages
from mpd.errors import PeerError
from mpd.manifest import HASH_BYTES, HASHES_PER_PAGE, MAX_METADATA_BYTES, MAX_NUMBER
from mpd.messages import PEERS
from mpd.state_messages import MAX_WANTED, NoState, StateAsk, StateGone, StateHashes, StateList, StateOffer, StateWant
from mpd.vocabulary import Vocabulary
from mpd.wire import MAX_CONTROL_BYTES, control_frame

M, ROUND = bytes(32), bytes(16)
WORDS = Vocabulary(PeerError, StateAsk, StateOffer, NoState, StateList, StateHashes, StateWant, StateGone)
LARGEST = [
    StateOffer("r" * 256, M, ROUND, MAX_NUMBER, bytes(MAX_METADATA_BYTES)),
    StateHashes(M, (1 << 20) - 1, bytes(HASH_BYTES * HASHES_PER_PAGE)),
    StateWant(M, tuple((1 << 20) - 1 - i for i in range(MAX_WANTED))),
]


def test_all_of_them_are_words_between_peers() -> None:
    assert set(WORDS.types.items()) <= set(PEERS.types.items())


@pytest.mark.parametrize("message", LARGEST, ids=lambda message: type(message).__name__)
def test_the_largest_are_fine_and_fit(message: Any) -> None:
    assert PEERS.decode(PEERS.encode(message)) == message
    assert len(control_frame(PEERS.encode(message))) < MAX_CONTROL_BYTES


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (StateAsk, {"run": "r", "digest": bytes(31)}),
        (StateAsk, {"run": "r", "digest": M, "round_id": b"short"}),
        (StateOffer, {"run": "r", "manifest": bytes(31), "round_id": ROUND, "number": 0}),
        (StateOffer, {"run": "r", "manifest": M, "round_id": bytes(15), "number": 0}),
        (StateOffer, {"run": "r", "manifest": M, "round_id": ROUND, "number": -1}),
        (StateOffer, {"run": "r", "manifest": M, "round_id": ROUND, "number": MAX_NUMBER + 1}),
        (StateOffer, {"run": "r", "manifest": M, "round_id": ROUND, "number": 0, "metadata": bytes(65537)}),
        (StateList, {"manifest": bytes(33), "first": 0}),
        (StateList, {"manifest": M, "first": -1}),
        (StateList, {"manifest": M, "first": 1 << 20}),
        (StateHashes, {"manifest": M, "first": 0, "hashes": b""}),
        (StateHashes, {"manifest": M, "first": 0, "hashes": bytes(HASH_BYTES * HASHES_PER_PAGE + 1)}),
        (StateWant, {"manifest": M, "chunks": ()}),
        (StateWant, {"manifest": M, "chunks": tuple(range(MAX_WANTED + 1))}),
        (StateWant, {"manifest": M, "chunks": (-1,)}),
        (StateWant, {"manifest": M, "chunks": (1 << 20,)}),
        (StateGone, {"manifest": b"", "reason": ""}),
    ],
)
def test_what_cannot_be_is_refused(kind: type[Any], fields: dict[str, Any]) -> None:
    import msgspec

    name = next(name for name, each in WORDS.types.items() if each is kind)
    with pytest.raises(PeerError, match="malformed message"):
        PEERS.decode(msgspec.msgpack.encode([name, fields]))


@given(gone_wrong(WORDS))
def test_accidents_blame_the_sender_only(body: bytes) -> None:
    outcome(WORDS, body, PeerError)


def test_nothing_else_is_said() -> None:
    public = {name for name in vars(state_messages) if name.startswith(("State", "NoState"))}
    assert public == {kind.__name__ for kind in WORDS.types.values()}
