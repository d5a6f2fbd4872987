"""Where tensors lie in the flat region, and what two peers say about terms that differ."""

import hashlib
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.errors import LocalError
from mpd.layout import (
    AGGREGATE_NAMES,
    ITEM_BYTES,
    MAX_LAYOUT_BYTES,
    Layout,
    Segment,
    TensorSpec,
    Terms,
    first_difference,
)

SPECS = st.lists(
    st.builds(
        TensorSpec,
        name=st.text("abc.é", min_size=1, max_size=8),
        dtype=st.sampled_from(list(ITEM_BYTES)),
        shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda spec: spec.name,
).filter(lambda specs: any(spec.n_elems for spec in specs))


def layout(*tensors: tuple[str, str, tuple[int, ...]]) -> Layout:
    return Layout(tuple(TensorSpec(*tensor) for tensor in tensors))


def terms(**changes) -> Terms:
    values = {"layout": layout(("w", "float32", (3,))), "group_size": 16, "rounds": 1, "codec": "raw"}
    return Terms(**{**values, "aggregate": "mean", **changes})


def test_tensors_are_grouped_by_dtype_and_segments_start_at_multiples_of_64():
    mixed = layout(
        ("half", "float16", (5,)),
        ("a", "float32", (3, 2)),
        ("d", "float64", ()),
        ("b", "float32", ()),
        ("e", "bfloat16", (0,)),
    )
    assert mixed.segments == (Segment("float64", 0, 1), Segment("float32", 64, 7), Segment("float16", 128, 5))
    assert mixed.offsets == (128, 64, 0, 64 + 24, 64 + 28)
    assert mixed.n_bytes == 138
    assert mixed.payload_bytes == 8 + 28 + 10


@given(SPECS)
def test_tensors_fill_their_segments_without_gap_or_overlap(specs):
    placed = Layout(tuple(specs))
    assert [segment.dtype for segment in placed.segments] == [
        dtype for dtype in ITEM_BYTES if any(spec.n_elems and spec.dtype == dtype for spec in specs)
    ]
    for segment in placed.segments:
        assert segment.offset % 64 == 0
        cursor = segment.offset
        for spec, offset in zip(specs, placed.offsets, strict=True):
            if spec.dtype == segment.dtype:
                assert offset == cursor
                cursor += spec.n_bytes
        assert cursor == segment.end
    assert all(
        earlier.end <= later.offset for earlier, later in zip(placed.segments, placed.segments[1:], strict=False)
    )
    assert placed.n_bytes == placed.segments[-1].end
    assert all(0 <= offset <= placed.n_bytes for offset in placed.offsets)
    assert placed.payload_bytes == sum(segment.n_bytes for segment in placed.segments)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "message"),
    [
        ("", "float32", (1,), "tensor name"),
        ("x" * 1025, "float32", (1,), "tensor name"),
        ("two\nlines", "float32", (1,), "tensor name"),
        ("\ud800", "float32", (1,), "tensor name"),
        ("x", "int8", (1,), "'x' is int8"),
        ("x", "float32", (-1,), "shape"),
        ("x", "float32", (0, 2**40 + 1), "shape"),
        ("x", "float32", (1,) * 33, "33 dimensions"),
    ],
)
def test_impossible_tensors_are_refused(name, dtype, shape, message):
    with pytest.raises(LocalError, match=message):
        TensorSpec(name, dtype, shape)


def test_tensors_at_the_limits_are_accepted():
    assert TensorSpec("x" * 1024, "float16", (1,) * 32).n_elems == 1
    assert layout(("x", "float16", (2**39,))).payload_bytes == MAX_LAYOUT_BYTES


def test_a_layout_needs_distinct_names_some_elements_and_a_sane_size():
    with pytest.raises(LocalError, match="'twice'"):
        layout(("twice", "float32", (1,)), ("twice", "float64", (2,)))
    with pytest.raises(LocalError, match="nothing to average"):
        Layout(())
    with pytest.raises(LocalError, match="nothing to average"):
        layout(("x", "float32", (0, 3)))
    with pytest.raises(LocalError, match="at most 1099511627776"):
        layout(("x", "float16", (2**39,)), ("y", "float16", ()))
    with pytest.raises(LocalError, match="at most 1048576"):
        Layout((TensorSpec("x", "float32", (1,)),) * (2**20 + 1))


@given(SPECS, SPECS)
def test_digests_and_differences_agree_with_equality(mine, theirs):
    here, there = Layout(tuple(mine)), Layout(tuple(theirs))
    assert len(here.digest) == 32
    assert (here.digest == there.digest) == (mine == theirs)
    assert (first_difference(here, there) is None) == (mine == theirs)
    assert Layout(tuple(mine)).digest == here.digest


def test_the_digest_of_a_layout_never_changes():
    """Peers of different releases compare it, so the encoding is part of the protocol."""
    known = layout(("fc.weight", "float32", (10, 64)), ("é", "bfloat16", ()))
    weight = b"\x09\0fc.weight" + b"\x01\x02" + struct.pack("<2Q", 10, 64)
    scalar = b"\x02\0\xc3\xa9" + b"\x02\x00"
    assert known.digest == hashlib.sha256(b"mpd layout 1" + weight + scalar).digest()
    encoded = b"mpd terms 1" + known.digest + b"\x10" + b"\x05exact" + b"\x03raw" + b"\x04mean"
    assert terms(layout=known, rounds="exact").digest == hashlib.sha256(encoded).digest()


@pytest.mark.parametrize(
    ("mine", "theirs", "sentence"),
    [
        ([("w", 10), ("x", 1)], [("w", 12), ("x", 2)], "tensor 'w' is float32[10] here, float32[12] there"),
        ([("w", 1), ("x", 1)], [("w", 1)], "tensor 'x' is only here"),
        ([("w", 1)], [("w", 1), ("x", 1)], "tensor 'x' is only there"),
        ([("x", 1), ("w", 1)], [("w", 1)], "tensor 'x' is only here"),
        ([("w", 1)], [("x", 1), ("w", 1)], "tensor 'x' is only there"),
        ([("a", 1), ("b", 1)], [("b", 1), ("a", 1)], "tensor 0 is 'a' here, 'b' there"),
        ([("w", 1), ("a", 1)], [("w", 1), ("b", 1)], "tensor 1 is 'a' here, 'b' there"),
        ([("w", 1)], [("w", 1)], None),
    ],
)
def test_the_first_different_tensor_is_named(mine, theirs, sentence):
    here = layout(*((name, "float32", (size,)) for name, size in mine))
    there = layout(*((name, "float32", (size,)) for name, size in theirs))
    assert first_difference(here, there) == sentence


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"group_size": 8}, "group_size is 16 here, 8 there"),
        ({"rounds": "exact"}, "rounds is 1 here, exact there"),
        ({"codec": "zstd"}, "codec is raw here, zstd there"),
        ({"layout": layout(("w", "float64", (3,)))}, "tensor 'w' is float32[3] here, float64[3] there"),
    ],
)
def test_each_term_is_part_of_the_digest_and_of_the_difference(change, sentence):
    assert terms().first_difference(terms(**change)) == sentence
    assert terms().digest != terms(**change).digest


def test_equal_terms_have_no_difference_and_one_digest():
    assert terms().first_difference(terms()) is None
    assert terms().digest == terms().digest
    assert len(terms().digest) == 32


def test_terms_are_named_before_tensors():
    other = terms(group_size=2, layout=layout(("other", "float32", (3,))))
    assert terms().first_difference(other) == "group_size is 16 here, 2 there"


@pytest.mark.parametrize(
    "change",
    [
        {"group_size": 1},
        {"group_size": 49},
        {"rounds": 2},
        {"rounds": "all"},
        {"codec": "gzip"},
        {"aggregate": "median"},
        {"aggregate": "clip", "rounds": "exact"},
        {"aggregate": "trimmed", "rounds": "exact"},
    ],
)
def test_impossible_terms_are_refused_by_name(change):
    with pytest.raises(LocalError, match=next(iter(change))):
        terms(**change)


def test_only_a_mean_can_be_certified():
    assert [terms(aggregate=name).aggregate for name in AGGREGATE_NAMES] == ["mean", "clip", "trimmed"]
    assert terms(rounds="exact", aggregate="mean").rounds == "exact"
    with pytest.raises(LocalError, match=r"aggregate is 'clip' with rounds='exact': only a mean .* can be certified"):
        terms(rounds="exact", aggregate="clip")


def test_importing_layout_needs_no_numpy():
    check = (
        "import sys, mpd.layout; sys.exit(' '.join({'numpy', 'torch', 'zstandard', 'msgspec'} & set(sys.modules)) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False, capture_output=True).returncode == 0
