"""Round trips of every codec, and payloads made to break the decoder."""

import json
import random
import subprocess
import sys
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mpd.codecs import codec_coded, codec_named
from mpd.errors import LocalError, PeerError
from mpd.layout import CODEC_NAMES, ITEM_BYTES
from mpd.reduce import as_array

DTYPES = list(ITEM_BYTES)
MIB = 1024 * 1024


def encoded(name: str, values, dtype: str) -> memoryview:
    return memoryview(codec_named(name).encode(memoryview(values).cast("B"), dtype)).cast("B")


def decoded(name: str, payload, dtype: str, n_elems: int) -> bytearray:
    out = bytearray(n_elems * ITEM_BYTES[dtype])
    codec_named(name).decode(memoryview(payload), dtype, n_elems, memoryview(out))
    return out


def zstd_frame(data: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(level=1, **options).compress(data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["raw", "zstd"])
@given(values=st.binary(min_size=1, max_size=300))
def test_lossless_codecs_return_the_same_bytes(name, dtype, values):
    codec = codec_named(name)
    values = values * ITEM_BYTES[dtype]
    payload = encoded(name, values, dtype)
    n_elems = len(values) // ITEM_BYTES[dtype]
    assert codec.lossless
    assert decoded(name, payload, dtype, n_elems) == values
    assert payload.nbytes <= codec.payload_limit(dtype, n_elems)
    assert bytes(encoded(name, values, dtype)) == bytes(payload)


def test_raw_payloads_are_the_values_themselves():
    values = memoryview(bytearray(64))
    assert codec_named("raw").encode(values, "float32") is values
    assert codec_named("raw").identity


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_payloads_keep_to_the_limit(name, dtype):
    codec = codec_named(name)
    values = np.random.default_rng(0).bytes(MIB)  # does not compress
    n_elems = MIB // ITEM_BYTES[dtype]
    payload = encoded(name, values, dtype)
    limit = codec.payload_limit(dtype, n_elems)
    assert payload.nbytes == limit if codec.fixed_size else payload.nbytes <= limit


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(data=st.data())
def test_float16_rounds_clamps_and_is_stable_when_forwarded(dtype, data):
    width = int(dtype.removeprefix("float"))
    floats = st.floats(allow_nan=False, allow_infinity=False, width=width)
    values = np.array(data.draw(st.lists(floats, min_size=1, max_size=50)), dtype)
    payload = encoded("float16", values, dtype)
    received = as_array(decoded("float16", payload, dtype, values.size), dtype)
    expected = np.clip(values, -65504, 65504).astype(np.float16).astype(dtype)
    assert (received == expected).all()
    assert encoded("float16", received, dtype) == payload


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_float16_value_is_forwarded_unchanged(dtype):
    patterns = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    finite = patterns[np.isfinite(patterns.view(np.float16))]
    received = decoded("float16", finite.tobytes(), dtype, finite.size)
    assert encoded("float16", received, dtype) == finite.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float16_shows_nan_and_infinity_to_whoever_must_refuse_them(dtype):
    values = np.array([1, np.nan, np.inf, -np.inf, 1e30, -65520], dtype)
    received = as_array(decoded("float16", encoded("float16", values, dtype), dtype, 6), dtype)
    np.testing.assert_array_equal(received, np.array([1, np.nan, np.inf, -np.inf, 65504, -65504], dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_values_travel_as_they_are_under_float16(dtype):
    values = memoryview(np.arange(65536, dtype=np.uint32).astype(np.uint16)).cast("B")
    assert codec_named("float16").encode(values, dtype) is values
    assert decoded("float16", values, dtype, 65536) == values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["raw", "float16"])
def test_fixed_payloads_of_another_size_are_refused(name, dtype):
    limit = codec_named(name).payload_limit(dtype, 10)
    for n_bytes in (0, 1, limit - 1, limit + 1, 2 * limit):
        with pytest.raises(PeerError, match=f"{n_bytes} bytes"):
            decoded(name, bytes(n_bytes), dtype, 10)


def test_zstd_shrinks_values_that_compress():
    assert encoded("zstd", np.zeros(MIB // 4, np.float32), "float32").nbytes < 1024


@pytest.mark.parametrize("n_bytes", [4, 64 * 1024, MIB, 4 * MIB])
def test_zstd_frames_of_every_chunk_size_are_accepted(n_bytes):
    values = np.random.default_rng(1).integers(0, 9, n_bytes, np.uint8).tobytes()
    assert decoded("zstd", encoded("zstd", values, "float32"), "float32", n_bytes // 4) == values


VALUES = np.random.default_rng(2).integers(0, 5, 4000, np.uint8).tobytes()
FRAME = zstd_frame(VALUES)
EMPTY_SKIPPABLE = b"\x50\x2a\x4d\x18" + bytes(4)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x28\xb5",
        FRAME[:-1],
        FRAME[: len(FRAME) // 2],
        FRAME + b"\0",
        FRAME + b"\x28\xb5\x2f",
        FRAME + zstd_frame(b""),
        FRAME + EMPTY_SKIPPABLE,
        EMPTY_SKIPPABLE + FRAME,
        b"\x50\x2a\x4d\x18" + (4000).to_bytes(4, "little") + bytes(4000),
        zstd_frame(VALUES[:2000]) + zstd_frame(VALUES[2000:]),
        zstd_frame(VALUES[:-1]),
        zstd_frame(VALUES + b"\0"),
        zstd_frame(VALUES, write_content_size=False),
        bytes(4000),
        FRAME + bytes(5000),
    ],
    ids=[
        "nothing", "half a magic", "one byte short", "half", "one more byte", "part of a magic", "a second empty frame",
        "a skippable frame after", "a skippable frame before", "only a skippable frame", "two frames",
        "one value byte less", "one value byte more", "no content size", "zeros", "above the limit",
    ],
)  # fmt: skip
def test_malformed_zstd_payloads_are_refused(payload):
    assert decoded("zstd", FRAME, "float32", 1000) == VALUES
    with pytest.raises(PeerError, match="zstd payload"):
        decoded("zstd", payload, "float32", 1000)


def test_a_zstd_frame_with_a_dictionary_is_refused():
    with_id = bytearray(FRAME)
    with_id[4] |= 0b01  # one byte of dictionary id follows the descriptor
    single_segment = with_id[4] & 0b100000
    with_id.insert(5 if single_segment else 6, 7)
    assert zstandard.get_frame_parameters(bytes(with_id)).dict_id == 7
    with pytest.raises(PeerError, match="dictionary 7"):
        decoded("zstd", with_id, "float32", 1000)


def test_a_zstd_frame_with_a_huge_window_is_refused():
    n_bytes = 16 * MIB
    parameters = zstandard.ZstdCompressionParameters(compression_level=1, window_log=24)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(n_bytes))
    assert zstandard.get_frame_parameters(frame).window_size > 4 * MIB
    with pytest.raises(PeerError, match="window"):
        decoded("zstd", frame, "float32", n_bytes // 4)


@given(st.lists(st.tuples(st.integers(0, len(FRAME) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_mutated_zstd_frames_decode_to_the_planned_size_or_raise(mutations):
    mutated = bytearray(FRAME)
    for position, flip in mutations:
        mutated[position] ^= flip
    guarded = bytearray(b"\xaa" * 4128)  # the decoder gets the middle only
    with suppress(PeerError):
        codec_named("zstd").decode(memoryview(mutated), "float32", 1000, memoryview(guarded)[64:4064])
    assert guarded[:64] == guarded[4064:] == b"\xaa" * 64


def handmade_frame(announced_bytes: int, *blocks: tuple[int, int], window_log: int = 17, dict_id: int = 0) -> bytes:
    """Return a zstd frame that holds (times, n_bytes) blocks of zero bytes; its window is 2**window_log bytes."""
    header = b"\x28\xb5\x2f\xfd" + bytes([0x80 | bool(dict_id), window_log - 10 << 3])
    header += bytes([dict_id] if dict_id else []) + announced_bytes.to_bytes(4, "little")
    sizes = [n_bytes for times, n_bytes in blocks for _ in range(times)]
    run_length = [(n_bytes << 3 | 0b010).to_bytes(3, "little") + b"\0" for n_bytes in sizes]
    return header + b"".join(run_length) + b"\x01\0\0"  # and an empty block that is the last


def bomb(announced_bytes: int, inflated_bytes: int) -> bytes:
    return handmade_frame(announced_bytes, (inflated_bytes // (128 * 1024), 128 * 1024))


def test_the_bombs_are_real():
    payload = bomb(256 * MIB, 256 * MIB)
    assert len(payload) < 8300
    assert zstandard.get_frame_parameters(payload).window_size == 128 * 1024
    reader = zstandard.ZstdDecompressor().stream_reader(payload)
    assert sum(iter(lambda: len(reader.read(MIB)), 0)) == 256 * MIB


def test_a_payload_above_the_limit_is_refused_even_if_it_would_decode():
    payload = handmade_frame(4000, (2000, 0), (1, 4000))
    assert zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False) == bytes(4000)
    with pytest.raises(PeerError, match="at most 4079 expected"):
        decoded("zstd", payload, "float32", 1000)


@pytest.mark.parametrize("announced", [256 * MIB, MIB])
def test_a_zstd_bomb_costs_no_memory(announced):
    payload = bomb(announced, 256 * MIB)  # 8 KiB that would become 256 MiB, by its own word or against it
    out = memoryview(bytearray(MIB))
    tracemalloc.start()
    try:
        for _ in range(5):
            with pytest.raises(PeerError, match="zstd payload"):
                codec_named("zstd").decode(memoryview(payload), "float32", MIB // 4, out)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * MIB


def hostile_frames(n_frames: int) -> list[bytes]:
    """Return frames for a chunk of 1 MiB, each of at most 8 KiB and a bit, that lie in one of ten ways."""
    rng = random.Random(12)
    full = (8, 128 * 1024)
    honest = handmade_frame(MIB, full)
    ways = [
        lambda: bomb(256 * MIB, 256 * MIB),
        lambda: bomb(MIB, 256 * MIB),
        lambda: bomb(rng.randrange(2**32), rng.randint(1, 2048) * 128 * 1024),
        lambda: handmade_frame(MIB, (rng.choice([*range(8), *range(9, 2048)]), 128 * 1024)),
        lambda: handmade_frame(MIB, full, window_log=rng.randint(23, 41)),  # 27: the 128 MiB that zstd would allow
        lambda: handmade_frame(MIB, full, dict_id=rng.randint(1, 255)),
        lambda: honest + rng.randbytes(rng.randint(1, 8192)),
        lambda: honest + rng.choice([honest, zstd_frame(b""), EMPTY_SKIPPABLE, bomb(256 * MIB, 256 * MIB)]),
        lambda: honest[: rng.randrange(len(honest))],
        lambda: handmade_frame(MIB, (rng.randint(1, 2000), 0), full, (1, 1)),
    ]
    return [ways[i % len(ways)]() for i in range(n_frames)]


DECODE_ALL = """
import json, sys, time
from mpd.codecs import codec_named
from mpd.errors import PeerError

def peak_bytes():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return 1024 * int(lines["VmHWM"].split()[0])

honest, *frames = [bytes.fromhex(line) for line in open(sys.argv[1])]
codec, n_elems = codec_named("zstd"), 1 << 18
out = memoryview(bytearray(4 * n_elems))
for _ in range(3):
    codec.decode(memoryview(honest), "float32", n_elems, out)
before, refused, slowest_s = peak_bytes(), 0, 0.0
for frame in frames:
    times = []
    for _ in range(3):
        began = time.process_time()
        try:
            codec.decode(memoryview(frame), "float32", n_elems, out)
        except PeerError:
            refused += 1
        times.append(time.process_time() - began)
    slowest_s = max(slowest_s, min(times))
print(json.dumps({"refused": refused, "growth_bytes": peak_bytes() - before, "slowest_s": slowest_s}))
"""


def test_a_thousand_hostile_frames_are_refused_at_no_cost(tmp_path):
    """In a process of its own, whose peak of memory is nobody else's. Times are of its processor, best of three."""
    frames = hostile_frames(1000)
    assert max(map(len, frames)) < 8400
    path = tmp_path / "frames"
    path.write_text("\n".join(frame.hex() for frame in [handmade_frame(MIB, (8, 128 * 1024)), *frames]))
    done = subprocess.run([sys.executable, "-c", DECODE_ALL, path], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["refused"] == 3 * len(frames)
    assert found["growth_bytes"] < 8 * MIB
    assert found["slowest_s"] < 0.001


def test_codecs_are_found_by_name_and_number():
    assert [codec_named(name).name for name in CODEC_NAMES] == list(CODEC_NAMES)
    assert [codec_named(name).code for name in CODEC_NAMES] == [0, 1, 2]
    assert all(codec_coded(codec_named(name).code) is codec_named(name) for name in CODEC_NAMES)
    assert [codec_named(name).identity for name in CODEC_NAMES] == [True, False, False]
    with pytest.raises(LocalError, match=r"'gzip'.*raw, float16, zstd"):
        codec_named("gzip")
    with pytest.raises(PeerError, match="number 3"):
        codec_coded(3)
