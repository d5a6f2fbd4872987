"""What is averaged: the tensors of a run in one flat region of bytes, and the terms that all its peers must share.

Strategy: a layout is a pure function of the tensors' names, dtypes and shapes, so peers never send each other offsets;
they compare digests, and where those differ they look for the first difference worth telling a person. Tensors are
grouped by dtype so that a region is a handful of typed vectors (segments) instead of thousands of small ones. Standard
library only: trainers import this file before they have numpy.
"""

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from mpd.errors import LocalError

ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2})
"""Bytes per element of every dtype that mpd averages, in the order of their segments."""

CODEC_NAMES = ("raw", "float16", "zstd")
AGGREGATE_NAMES = ("mean", "clip", "trimmed")
SEGMENT_ALIGNMENT_BYTES = 64

MAX_NAME_CHARS = 1024
MAX_DIMS = 32
MAX_TENSORS = 2**20
MAX_LAYOUT_BYTES = 2**40
MIN_GROUP_SIZE = 2
MAX_GROUP_SIZE = 48
MAX_WEIGHT = 1e8  # of a trainer, or of all trainers of a machine together: far above any batch

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(ITEM_BYTES)}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of one tensor. Scalars (shape `()`) and empty tensors are fine. Raises LocalError."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= MAX_NAME_CHARS or not self.name.isprintable():
            raise LocalError(
                f"{self.name[:64]!r} is no tensor name: 1 to {MAX_NAME_CHARS} printable characters expected"
            )
        if self.dtype not in ITEM_BYTES:
            raise LocalError(f"tensor {self.name!r} is {self.dtype}: one of {', '.join(ITEM_BYTES)} expected")
        if len(self.shape) > MAX_DIMS:
            raise LocalError(f"tensor {self.name!r} has {len(self.shape)} dimensions: at most {MAX_DIMS} expected")
        # A larger dimension could only belong to an empty tensor, and would not fit the digest's 64 bits.
        if not all(0 <= dim <= MAX_LAYOUT_BYTES for dim in self.shape):
            raise LocalError(f"tensor {self.name!r} has shape {list(self.shape)}: dimensions 0 to 2**40 expected")

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    @property
    def n_elems(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes of the elements, without padding."""
        return self.n_elems * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of elements of one dtype that starts `offset` bytes into the region."""

    dtype: str
    offset: int
    n_elems: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the elements."""
        return self.n_elems * ITEM_BYTES[self.dtype]

    @property
    def end(self) -> int:
        """Offset of the first byte after the segment."""
        return self.offset + self.n_bytes


@dataclass(frozen=True)
class Layout:
    """Where each of `specs` lies in the flat region.

    Raises LocalError on duplicate names, on tensors without a single element between them, and above 2**20 tensors or
    2**40 bytes.
    """

    specs: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        if len(self.specs) > MAX_TENSORS:
            raise LocalError(f"{len(self.specs)} tensors: at most {MAX_TENSORS} can be averaged in one run")
        names: set[str] = set()
        for spec in self.specs:
            if spec.name in names:
                raise LocalError(f"two tensors are named {spec.name!r}: names must differ within a run")
            names.add(spec.name)
        if self.payload_bytes == 0:
            raise LocalError("there is nothing to average: the tensors have no elements")
        if self.payload_bytes > MAX_LAYOUT_BYTES:
            raise LocalError(f"the tensors have {self.payload_bytes} bytes: at most {MAX_LAYOUT_BYTES} can be averaged")

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of all elements: what travels."""
        return sum(spec.n_bytes for spec in self.specs)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """One segment for each dtype that has elements: float64, float32, bfloat16, float16."""
        return self._placement[0]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Byte offset of each tensor, in the order of `specs`."""
        return self._placement[1]

    @cached_property
    def n_bytes(self) -> int:
        """Size of the region: from 0 to the end of the last segment, gaps between segments included."""
        return self.segments[-1].end

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 (32 bytes) over a prefix and, per tensor, name length, UTF-8 name, dtype, dimensions: no two layouts
        share an encoding.
        """
        sha = hashlib.sha256(b"mpd layout 1")
        for spec in self.specs:
            name = spec.name.encode()
            sha.update(struct.pack("<H", len(name)) + name)
            sha.update(struct.pack("<BB", _DTYPE_CODES[spec.dtype], len(spec.shape)))
            sha.update(struct.pack(f"<{len(spec.shape)}Q", *spec.shape))
        return sha.digest()

    @cached_property
    def _placement(self) -> tuple[tuple[Segment, ...], tuple[int, ...]]:
        segments: list[Segment] = []
        offsets = [0] * len(self.specs)
        cursor = 0
        for dtype in ITEM_BYTES:
            members = [index for index, spec in enumerate(self.specs) if spec.dtype == dtype]
            n_elems = sum(self.specs[index].n_elems for index in members)
            if n_elems:
                cursor = -(-cursor // SEGMENT_ALIGNMENT_BYTES) * SEGMENT_ALIGNMENT_BYTES
                segments.append(Segment(dtype, cursor, n_elems))
            for index in members:
                offsets[index] = cursor
                cursor += self.specs[index].n_bytes
        return tuple(segments), tuple(offsets)


def first_difference(mine: Layout, theirs: Layout) -> str | None:
    """Return one sentence about the first tensor that differs between two layouts, None if they are equal.

    Positions count from 0.
    """
    my_names = {spec.name for spec in mine.specs}
    their_names = {spec.name for spec in theirs.specs}
    for index, (here, there) in enumerate(zip(mine.specs, theirs.specs, strict=False)):
        if here == there:
            continue
        if here.name == there.name:
            return f"tensor {here.name!r} is {here} here, {there} there"
        missing_there, missing_here = here.name not in their_names, there.name not in my_names
        if missing_there == missing_here:
            return f"tensor {index} is {here.name!r} here, {there.name!r} there"
        return f"tensor {here.name!r} is only here" if missing_there else f"tensor {there.name!r} is only there"
    n_common = min(len(mine.specs), len(theirs.specs))
    for spec in mine.specs[n_common:]:
        return f"tensor {spec.name!r} is only here"
    for spec in theirs.specs[n_common:]:
        return f"tensor {spec.name!r} is only there"
    return None


@dataclass(frozen=True)
class Terms:
    """What all peers of a run agree on before they average: `digest` is what they compare. Raises LocalError."""

    layout: Layout
    group_size: int
    rounds: int | str
    codec: str
    aggregate: str

    def __post_init__(self) -> None:
        if not MIN_GROUP_SIZE <= self.group_size <= MAX_GROUP_SIZE:
            raise LocalError(f"group_size is {self.group_size}: {MIN_GROUP_SIZE} to {MAX_GROUP_SIZE} expected")
        if self.rounds not in (1, "exact"):
            raise LocalError(f"rounds is {self.rounds!r}: 1 or 'exact' expected")
        if self.codec not in CODEC_NAMES:
            raise LocalError(f"codec is {self.codec!r}: one of {', '.join(CODEC_NAMES)} expected")
        if self.aggregate not in AGGREGATE_NAMES:
            raise LocalError(f"aggregate is {self.aggregate!r}: one of {', '.join(AGGREGATE_NAMES)} expected")
        if self.rounds == "exact" and self.aggregate != "mean":
            raise LocalError(
                f"aggregate is {self.aggregate!r} with rounds='exact': only a mean of group means is the mean of all "
                "peers, so nothing else can be certified; use rounds=1 or aggregate='mean'"
            )

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 (32 bytes) over the layout's digest and the other terms, each text with its length before it."""
        sha = hashlib.sha256(b"mpd terms 1" + self.layout.digest + bytes([self.group_size]))
        for text in ("exact" if self.rounds == "exact" else "1", self.codec, self.aggregate):
            sha.update(bytes([len(text)]) + text.encode())
        return sha.digest()

    def first_difference(self, other: "Terms") -> str | None:
        """Return one sentence about the first term or tensor that differs (ours is "here"), None if all are equal."""
        for term in ("group_size", "rounds", "codec", "aggregate"):
            here, there = getattr(self, term), getattr(other, term)
            if here != there:
                return f"{term} is {here} here, {there} there"
        return first_difference(self.layout, other.layout)
