"""State files: what was written is read, and anything else is refused before a byte of a vector is believed."""

import hashlib
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.errors import LocalError
from mpd.manifest import HASH_BYTES, MAX_METADATA_BYTES, Manifest
from mpd.state_file import MAGIC, PREFIX_BYTES, Kept, head_bytes, pack_head, parse_head

N_BYTES = (2 << 20) + 7
HASHES = b"".join(bytes([i]) * HASH_BYTES for i in range(3))
MANIFEST = Manifest(b"t" * 32, b"r" * 16, 12, N_BYTES, HASHES)


def kept(**changes: Any) -> Kept:
    fields = {
        "run": "my run", "terms": b"t" * 32, "round_id": b"r" * 16, "number": 12, "n_bytes": N_BYTES,
        "saved_at_s": 1.8e9, "metadata": b"epoch 7",
    }  # fmt: skip
    return Kept(**(fields | changes))


HEAD = pack_head(kept(), MANIFEST)


@pytest.mark.parametrize("metadata", [b"", b"epoch 7", bytes(MAX_METADATA_BYTES)])
def test_what_was_written_is_read(metadata: bytes) -> None:
    head = pack_head(kept(metadata=metadata), MANIFEST)
    assert head_bytes(head[:PREFIX_BYTES]) == len(head)
    parsed = parse_head(head, len(head) + N_BYTES)
    assert (parsed.kept, parsed.manifest, parsed.vector_at) == (kept(metadata=metadata), MANIFEST, len(head))
    assert parsed.manifest.digest == MANIFEST.digest


@pytest.mark.parametrize("at", range(0, len(HEAD), 3))
def test_a_byte_that_changed_is_noticed(at: int) -> None:
    damaged = bytearray(HEAD)
    damaged[at] ^= 0x40
    with pytest.raises(LocalError):
        parse_head(bytes(damaged), len(HEAD) + N_BYTES)


@pytest.mark.parametrize("cut", [0, 5, PREFIX_BYTES, PREFIX_BYTES + 1, len(HEAD) - 1])
def test_a_file_that_ends_in_its_header_is_refused(cut: int) -> None:
    with pytest.raises(LocalError):
        parse_head(HEAD[:cut], cut)


@pytest.mark.parametrize("n_bytes", [0, N_BYTES - 1, N_BYTES + 1])
def test_a_file_of_another_length_is_refused(n_bytes: int) -> None:
    with pytest.raises(LocalError, match="its header speaks of"):
        parse_head(HEAD, len(HEAD) + n_bytes)


@pytest.mark.parametrize(
    ("header", "hashes"), [(0, 32), (1 << 20, 32), (100, 0), (100, 33), (100, 1 << 40), (2**32 - 1, 2**64 - 1)]
)
def test_lengths_that_lie_are_refused_before_anything_is_read(header: int, hashes: int) -> None:
    with pytest.raises(LocalError, match="lengths that cannot be"):
        head_bytes(MAGIC + struct.pack("<IQ", header, hashes))


def test_what_is_no_state_file_is_refused() -> None:
    for foreign in (b"", b"\x80\x04\x95" + bytes(40), b"PK\x03\x04" + bytes(40), b"mpdstat2" + HEAD[8:]):
        with pytest.raises(LocalError, match="does not begin like a state file"):
            head_bytes(foreign[:PREFIX_BYTES])


def signed(body: bytes, hashes: bytes) -> bytes:
    """Return a head with a right checksum, whatever is in it."""
    head = MAGIC + struct.pack("<IQ", len(body), len(hashes)) + body + hashes
    return head + hashlib.sha256(head).digest()


@pytest.mark.parametrize("hashes", [HASHES[32:], HASHES + bytes(32)])
def test_more_or_fewer_hashes_than_chunks_are_refused(hashes: bytes) -> None:
    body = HEAD[PREFIX_BYTES : -32 - len(HASHES)]
    head = signed(body, hashes)
    with pytest.raises(LocalError, match="hashes are not those"):
        parse_head(head, len(head) + N_BYTES)


@given(st.binary(max_size=200), st.integers(1, 4))
def test_any_header_is_understood_or_refused(body: bytes, n_hashes: int) -> None:
    head = signed(body or b"x", bytes(HASH_BYTES * n_hashes))
    with pytest.raises(LocalError):
        parse_head(head, len(head) + N_BYTES)


@pytest.mark.parametrize(
    "change",
    [{"terms": b""}, {"round_id": b""}, {"number": -1}, {"n_bytes": 0}, {"metadata": bytes(MAX_METADATA_BYTES + 1)},
     {"saved_at_s": -1.0}],
)  # fmt: skip
def test_what_cannot_be_is_not_written(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        kept(**change)
