"""What a state is called: same bytes and round, same name; anything else, another one."""

import dataclasses
import hashlib
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd import manifest
from mpd.errors import PeerError
from mpd.manifest import (
    HASH_BYTES,
    HASHES_PER_PAGE,
    MAX_NUMBER,
    STATE_CHUNK_BYTES,
    Manifest,
    chunk_hash,
    chunk_span,
    n_chunks,
    page_bytes,
)

TERMS, ROUND_ID = bytes(range(32)), b"a round, a round"


def of(vector: bytes, **changes: Any) -> Manifest:
    hashes = b"".join(chunk_hash(vector[slice(*chunk_span(i, len(vector)))]) for i in range(n_chunks(len(vector))))
    fields = {"terms": TERMS, "round_id": ROUND_ID, "number": 3, "n_bytes": len(vector), "hashes": hashes}
    return Manifest(**(fields | changes))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "STATE_CHUNK_BYTES", 8)


@given(st.integers(1, 100))
def test_chunks_cover_a_vector_once(n_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "STATE_CHUNK_BYTES", 8)
        spans = [chunk_span(chunk, n_bytes) for chunk in range(n_chunks(n_bytes))]
    assert [spans[0][0], spans[-1][1]] == [0, n_bytes]
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert all(0 < end - begin <= 8 for begin, end in spans)


def test_a_chunk_is_known_by_its_place_and_bytes(small_chunks: None) -> None:
    vector = bytes(range(20))
    own = of(vector)
    assert [own.matches(i, vector[8 * i : 8 * i + 8]) for i in range(3)] == [True] * 3
    assert not own.matches(0, vector[8:16])
    assert not own.matches(2, vector[16:] + b"\0")
    assert not own.matches(3, b"")
    assert own.matches(1, memoryview(bytearray(vector))[8:16])


@pytest.mark.parametrize(
    "change",
    [{"terms": bytes(32)}, {"round_id": bytes(16)}, {"number": 4}, {"hashes": bytes(3 * HASH_BYTES)}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_differs_the_name_does(small_chunks: None, change: dict[str, Any]) -> None:
    vector = bytes(range(20))
    assert of(vector).digest == of(vector).digest
    assert of(vector).digest != dataclasses.replace(of(vector), **change).digest


def test_the_name_is_as_documented() -> None:
    hashes = hashlib.sha256(b"abc").digest()
    numbers = (3).to_bytes(8, "little") + (3).to_bytes(8, "little") + STATE_CHUNK_BYTES.to_bytes(8, "little")
    assert of(b"abc").digest == hashlib.sha256(b"mpd state 1" + TERMS + ROUND_ID + numbers + hashes).digest()


@pytest.mark.parametrize(
    "change",
    [{"hashes": b""}, {"hashes": bytes(31)}, {"hashes": bytes(64)}, {"round_id": b"short"}, {"number": -1},
     {"number": MAX_NUMBER + 1}],
)  # fmt: skip
def test_what_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PeerError):
        of(b"abc", **change)


def test_pages_are_all_hashes_in_order(small_chunks: None) -> None:
    n_bytes = 8 * (2 * HASHES_PER_PAGE + 5)
    hashes = b"".join(i.to_bytes(32, "big") for i in range(n_chunks(n_bytes)))
    own = of(b"", n_bytes=n_bytes, hashes=hashes)
    pages = [own.page(first) for first in (0, HASHES_PER_PAGE, 2 * HASHES_PER_PAGE)]
    assert b"".join(pages) == hashes
    assert [len(page) for page in pages] == [page_bytes(i * HASHES_PER_PAGE, n_bytes) for i in range(3)]
