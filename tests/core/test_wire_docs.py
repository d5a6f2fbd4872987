"""The tables of docs/wire.md are the protocols: names, order and types of all fields, and the offsets of the header.

Strategy: read the Markdown tables into the same small records that are made from the dataclasses, and compare whole
protocols, so that a difference shows as a difference of two lists. A document that a machine holds to the code can be
trusted by whoever writes a client in another language.
"""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

import pytest

from mpd import wire
from mpd.admission import ADMISSION
from mpd.control import LOCAL
from mpd.ids import RoundId
from mpd.layout import TensorSpec
from mpd.mass import Standing
from mpd.messages import EXCHANGE, PEERS, Member

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")
STRUCTURES = {"TENSOR": TensorSpec, "STANDING": Standing, "MEMBER": Member}


def table_under(heading: str) -> list[list[str]]:
    """Return the rows of the first table after `heading`, without its head, as lists of stripped cells."""
    lines = PAGE.partition(f"\n{heading}\n")[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def documented(heading: str) -> dict[str, list[tuple[str, str]]]:
    """Return {message: [(field, type)]} as the page has it; a type ends with " ?" if the field may be left out."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, field, kind, _ in table_under(heading):
        if name:
            found[name.strip("`")] = fields = []
        else:
            required, optional, _ = kind.partition(" ?")
            fields.append((field.strip("`"), required + optional))
    return found


def declared(kinds: dict[str, type[Any]]) -> dict[str, list[tuple[str, str]]]:
    """Return the same as the dataclasses have it."""
    return {name: [(f.name, _type_of(kind, f)) for f in dataclasses.fields(kind)] for name, kind in kinds.items()}


def _type_of(kind: type[Any], field: dataclasses.Field[Any]) -> str:
    missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    return _show(typing.get_type_hints(kind)[field.name]) + ("" if missing else " ?")


def _show(annotation: Any) -> str:
    """Return how the page writes `annotation`."""
    for name, structure in STRUCTURES.items():
        if annotation is structure:
            return name
    arguments = typing.get_args(annotation)
    if isinstance(annotation, types.UnionType):
        return " or ".join(map(_show, arguments))
    if typing.get_origin(annotation) is tuple:
        inner = arguments[:-1] if arguments[-1] is Ellipsis else arguments
        return f"[{', '.join(map(_show, inner))}]"
    if typing.get_origin(annotation) is dict:
        return f"{{{_show(arguments[0])}: {_show(arguments[1])}}}"
    return str(annotation.__name__)


@pytest.mark.parametrize(
    ("heading", "kinds"),
    [
        ("## Local socket", LOCAL.types),
        ("## Control connection", PEERS.types),
        ("### Exchange", EXCHANGE.types),
        ("### Admission", ADMISSION.types),
        ("### Structures", STRUCTURES),
    ],
)
def test_the_tables_are_the_messages(heading: str, kinds: dict[str, type[Any]]) -> None:
    assert documented(heading) == declared(kinds)


def test_every_message_and_field_is_explained() -> None:
    for heading in ("## Local socket", "## Control connection", "### Admission", "### Exchange", "### Structures"):
        unexplained = [row for row in table_under(heading) if not row[-1]]
        assert not unexplained, heading


def test_the_header_lies_as_documented() -> None:
    rows = [(int(offset), int(size), field.strip("`")) for offset, size, field, _ in table_under("## Data connection")]
    # Each field in turn is the only one that is not zero: its bytes must be the documented ones.
    for offset, size, field in rows:
        values: dict[str, Any] = dict.fromkeys((name for _, _, name in rows), 0)
        values |= {"kind": wire.Kind.HELLO, "round_id": RoundId(bytes(16))}
        values[field] = {"kind": wire.Kind.CHUNK, "round_id": RoundId(b"\xff" * 16)}.get(field, (1 << 8 * size) - 1)
        packed = wire.pack_header(wire.Header(**values))
        expected = bytes([2]) if field == "kind" else b"\xff" * size
        assert packed == bytes(offset) + expected + bytes(wire.HEADER_BYTES - offset - size), field
    assert sum(size for _, size, _ in rows) == wire.HEADER_BYTES


def test_the_greeting_is_as_documented() -> None:
    assert wire.data_greeting(b"0123456789abcdef") == b"mpdD\x01\0\0\x000123456789abcdef"
    assert "begins with 24 bytes: `mpdD`, a version (1), three zero" in PAGE


def test_a_difference_would_show() -> None:
    page = documented("## Local socket")
    assert ("weight", "float") in page["step"]
    assert ("source", "str ?") in page["step"]
    assert page["leave"] == []
    assert page != declared({**LOCAL.types, "step": LOCAL.types["release"]})
