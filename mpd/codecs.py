"""How chunks travel: as they are, as float16, or compressed. The only place that makes a new buffer out of values.

Strategy: a codec is a stateless pair of functions with a wire number. Sizes come from the agreed plan, never from the
payload: decoding writes exactly the planned elements into memory that exists, or raises PeerError. A chunk may be
encoded again by whoever forwards it, so encoding decoded values gives the same values again; and whoever closes a
chunk must keep decode(encode(mean)), not the mean, to hold the same bytes as everyone else. NaN and Inf travel like any
value: refusing them is up to whoever uses what arrived.
"""

from typing import Protocol

import numpy as np
import zstandard

from mpd.errors import LocalError, PeerError
from mpd.layout import CODEC_NAMES, ITEM_BYTES
from mpd.reduce import as_array, first_non_finite

_FLOAT16_MAX = 65504.0
_ZSTD_LEVEL = 1
_ZSTD_MAX_WINDOW_BYTES = 4 * 1024 * 1024


class Codec(Protocol):
    """One way for values to travel; the same object serves all chunks, in one thread or many.

    Attributes:
        code: the number in chunk headers.
        lossless: decoded values are the very values that were encoded.
        identity: payload and values are the same bytes.
        fixed_size: every payload has exactly `payload_limit` bytes.
    """

    name: str
    code: int
    lossless: bool
    identity: bool
    fixed_size: bool

    def payload_limit(self, dtype: str, n_elems: int) -> int:
        """Return the size in bytes of the largest payload that `decode` accepts and `encode` makes."""
        ...

    def encode(self, values: memoryview, dtype: str) -> memoryview | bytes:
        """Return the payload for `values` (at least one element), or `values` itself where nothing changes."""
        ...

    def decode(self, payload: memoryview, dtype: str, n_elems: int, out: memoryview) -> None:
        """Write the `n_elems` values of `payload` to `out`, which has exactly their size.

        Raises PeerError on any payload that is not exactly that many values, and then `out` means nothing.
        """
        ...


class _Raw:
    name = "raw"
    code = 0
    lossless = True
    identity = True
    fixed_size = True

    def payload_limit(self, dtype: str, n_elems: int) -> int:
        return n_elems * ITEM_BYTES[dtype]

    def encode(self, values: memoryview, dtype: str) -> memoryview:
        return values

    def decode(self, payload: memoryview, dtype: str, n_elems: int, out: memoryview) -> None:
        _check_size(payload, self.payload_limit(dtype, n_elems), self.name)
        _copy(payload, out)


class _Float16:
    name = "float16"
    code = 1
    lossless = False
    identity = False
    fixed_size = True

    def payload_limit(self, dtype: str, n_elems: int) -> int:
        return n_elems * ITEM_BYTES["float16"]

    def encode(self, values: memoryview, dtype: str) -> memoryview:
        if ITEM_BYTES[dtype] == ITEM_BYTES["float16"]:
            return values
        wide = as_array(values, dtype)
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float16)
        if first_non_finite(narrow.data, "float16") is not None:
            # Too large is clamped; NaN and Inf stay what they are, or the reducer could not refuse them.
            too_large = np.isinf(narrow) & np.isfinite(wide)
            narrow[too_large] = np.copysign(_FLOAT16_MAX, wide[too_large])
        return narrow.data.cast("B")

    def decode(self, payload: memoryview, dtype: str, n_elems: int, out: memoryview) -> None:
        _check_size(payload, self.payload_limit(dtype, n_elems), self.name)
        if ITEM_BYTES[dtype] == ITEM_BYTES["float16"]:
            _copy(payload, out)
        else:
            np.copyto(as_array(out, dtype), as_array(payload, "float16"))


class _Zstd:
    name = "zstd"
    code = 2
    lossless = True
    identity = False
    fixed_size = False

    def payload_limit(self, dtype: str, n_elems: int) -> int:
        n_bytes = n_elems * ITEM_BYTES[dtype]
        return n_bytes + n_bytes // 256 + 64  # what zstd promises for values that do not compress

    def encode(self, values: memoryview, dtype: str) -> bytes:
        # A context may not be shared between threads, and a fresh one costs only some 10 us.
        return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(values)

    def decode(self, payload: memoryview, dtype: str, n_elems: int, out: memoryview) -> None:
        limit = self.payload_limit(dtype, n_elems)
        if payload.nbytes > limit:
            raise PeerError(f"a zstd payload has {payload.nbytes} bytes: at most {limit} expected")
        try:
            values = self._decompress(payload, n_elems * ITEM_BYTES[dtype])
        except zstandard.ZstdError as error:
            raise PeerError(f"a zstd payload does not decode: {error}") from error
        _copy(memoryview(values), out)

    def _decompress(self, payload: memoryview, n_bytes: int) -> bytes:
        frame = zstandard.get_frame_parameters(payload)
        if frame.content_size != n_bytes or frame.dict_id or frame.window_size > _ZSTD_MAX_WINDOW_BYTES:
            raise PeerError(
                f"a zstd payload announces {frame.content_size} bytes, window {frame.window_size}, dictionary "
                f"{frame.dict_id}: {n_bytes} bytes, window up to {_ZSTD_MAX_WINDOW_BYTES}, no dictionary expected"
            )
        # The one-shot call allocates what the frame announces, whatever limit it is given: hence the check above. In
        # exchange it returns exactly that many and sees trailing bytes, which the streaming reader drops in silence.
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
        return decompressor.decompress(payload, allow_extra_data=False)


_CODECS: tuple[Codec, ...] = (_Raw(), _Float16(), _Zstd())
_BY_NAME = dict(zip(CODEC_NAMES, _CODECS, strict=True))
_BY_CODE = {codec.code: codec for codec in _CODECS}


def codec_named(name: str) -> Codec:
    """Return the codec that terms call `name`. Raises LocalError listing the known names."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise LocalError(f"there is no codec {name!r}: one of {', '.join(_BY_NAME)} expected") from None


def codec_coded(code: int) -> Codec:
    """Return the codec with number `code` in a chunk header. Raises PeerError if there is none."""
    try:
        return _BY_CODE[code]
    except KeyError:
        raise PeerError(f"there is no codec number {code}: one of {', '.join(map(str, _BY_CODE))} expected") from None


def _check_size(payload: memoryview, n_bytes: int, name: str) -> None:
    if payload.nbytes != n_bytes:
        raise PeerError(f"a {name} payload has {payload.nbytes} bytes: {n_bytes} expected")


def _copy(payload: memoryview, out: memoryview) -> None:
    out.cast("B")[:] = payload.cast("B")
