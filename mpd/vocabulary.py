"""Messages as frozen dataclasses, on the wire as msgpack: `[name, {field: value}]`.

The dataclasses are plain, so declaring a language costs its users nothing but the standard library; msgspec comes in
with the first message that is sent or read. Names rather than numbers travel because these frames are small and rare,
and a person with a packet capture, or with a client in another language, can read them.
"""

import functools
from collections.abc import Callable
from typing import Any

from mpd.errors import MpdError


class Vocabulary:
    """A closed set of message types and the error that whoever speaks anything else has to answer for."""

    def __init__(self, blame: type[MpdError], *types: type[Any]) -> None:
        self._blame = blame
        self.types: dict[str, type[Any]] = {_wire_name(kind): kind for kind in types}
        self._decoders: dict[str, Callable[[Any], Any]] = {}

    def encode(self, message: Any) -> bytes:
        """Return the msgpack bytes of `message`, an instance of one of the types."""
        return _encoder()([_wire_name(type(message)), message])

    def decode(self, body: bytes | bytearray | memoryview) -> Any:
        """Return the message in `body`, fully validated. Raises the vocabulary's error for anything else."""
        import msgspec

        try:
            name, raw = _envelope()(body)
            kind = self.types.get(name)
            if kind is None:
                raise ValueError(f"{name[:40]!r} is none of {', '.join(self.types)}")
            if name not in self._decoders:
                self._decoders[name] = msgspec.msgpack.Decoder(kind).decode
            return self._decoders[name](raw)
        # An MpdError comes from a structure that trainers and peers share: whose mistake it is, only we know here.
        except (msgspec.MsgspecError, MpdError, RecursionError, ValueError) as error:
            raise self._blame(f"malformed message: {error}") from error


def _wire_name(kind: type[Any]) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in kind.__name__).lstrip("_")


@functools.cache
def _encoder() -> Callable[[Any], bytes]:
    import msgspec

    return msgspec.msgpack.Encoder().encode


@functools.cache
def _envelope() -> Callable[[Any], tuple[str, Any]]:
    import msgspec

    return msgspec.msgpack.Decoder(tuple[str, msgspec.Raw]).decode
