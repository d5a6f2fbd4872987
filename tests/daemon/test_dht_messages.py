"""Messages by value: what decodes, what does not, how requests are padded, records paged, and all of it documented.

The tables of docs/wire.md are compared with the types, as `test_wire_docs.py` does for the other protocols.
"""

from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest
from dht_swarm import NOW_MS, PrivateSwarm
from hypothesis import given
from hypothesis import strategies as st

from mpd.daemon import dht_messages as m
from mpd.daemon.dht_gate import HEADER_BYTES, MAX_DATAGRAM_BYTES
from mpd.daemon.dht_records import MAX_SEQ, RECORD_FIXED_BYTES, WireRecord, digest_of
from mpd.daemon.rendezvous import MAX_VALUE_BYTES

ME, YOU, KEY, SIGNATURE = b"m" * 20, b"y" * 20, b"k" * 20, b"s" * 64
PUBLIC = b"p" * 32
RECORD = WireRecord(PUBLIC, 1, NOW_MS, b"v", SIGNATURE)
LONGEST_HOST = "ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255"
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")
REQUESTS = [
    m.Ping(ME, b"", PUBLIC, []),
    m.FindNode(ME, YOU, KEY),
    m.FindRecords(ME, YOU, KEY, 1, b""),
    m.Store(ME, YOU, KEY, 0, RECORD),
    m.Introduce(ME, YOU, PUBLIC),
    m.Leave(ME, b"", NOW_MS, PUBLIC, SIGNATURE),
]


def records(n: int, value_bytes: int) -> list[WireRecord]:
    return [WireRecord(bytes([i]) * 32, MAX_SEQ, 2**62, bytes(value_bytes), SIGNATURE) for i in range(1, n + 1)]


def turn_all(everything: list[WireRecord]) -> list[m.Page]:
    pages = [m.page_of(ME, everything, b"", [(YOU, "255.255.255.255", 65535)] * m.MAX_NODES)]
    while pages[-1].more:
        pages.append(m.page_of(ME, everything, pages[-1].records[-1].public_key, []))
    return pages


def without_padding(request: m.Request) -> m.Request:
    return request if isinstance(request, m.Leave) else msgspec.structs.replace(request, padding=b"")


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: type(request).__name__)
def test_requests_survive_the_trip(request_: m.Request) -> None:
    decoded = m.request_decoder.decode(m.encode_request(request_))
    assert type(decoded) is type(request_)
    assert without_padding(decoded) == request_


@pytest.mark.parametrize("request_", REQUESTS[:-1], ids=lambda request: type(request).__name__)
def test_a_request_is_so_long_that_no_reply_is_three_times_longer(request_: m.Request) -> None:
    n_bytes = HEADER_BYTES + len(m.encode_request(request_))
    assert m.MIN_REQUEST_BYTES <= n_bytes <= m.MIN_REQUEST_BYTES + 1
    assert 3 * n_bytes >= MAX_DATAGRAM_BYTES + m.MIN_REQUEST_BYTES, "the reply, and the question back to a stranger"


@given(st.integers(0, 900))
def test_padding_fits_whatever_the_length(value_bytes: int) -> None:
    store = m.Store(ME, YOU, KEY, 0, msgspec.structs.replace(RECORD, value=bytes(value_bytes)))
    body = m.encode_request(store)
    assert HEADER_BYTES + len(body) >= m.MIN_REQUEST_BYTES
    assert without_padding(m.request_decoder.decode(body)) == store


def test_a_goodbye_needs_no_padding() -> None:
    assert len(m.encode_request(REQUESTS[-1])) < 200


@pytest.mark.parametrize(
    "junk",
    [
        [],
        {},
        7,
        None,
        "ping",
        ["ping"],
        ["ping", 7],
        ["ping", ME, b"", b"short", []],
        ["ping", ME, bytes(21), PUBLIC, []],
        ["ping", ME, b"", PUBLIC, [b"a", b"b", b"c"]],
        ["ping", ME, b"", PUBLIC, [7]],
        ["ping", bytes(21), b"", PUBLIC, []],
        ["stun", ME],
        ["__class__", ME],
        ["find_node", ME, YOU, "k" * 20],
        ["find_records", ME, YOU, KEY, 0, bytes(33)],
        ["find_records", ME, YOU, KEY, m.MAX_SALT + 1, b""],
        ["find_records", ME, YOU, KEY, -1, b""],
        ["store", ME, YOU, KEY, 0, [PUBLIC, 1.5, NOW_MS, b"v", SIGNATURE]],
        ["store", ME, YOU, KEY, 0, [PUBLIC, 1, NOW_MS, b"v"]],
        ["store", ME, YOU, KEY, 0, None],
        ["introduce", ME, YOU, b"short"],
        ["leave", ME, b"", -1, PUBLIC, SIGNATURE],
        ["leave", ME, b"", 2**63, PUBLIC, SIGNATURE],
        ["leave", ME, b"", 1, PUBLIC, b"short"],
    ],
)
def test_nothing_else_is_a_request(junk: object) -> None:
    with pytest.raises(msgspec.DecodeError):
        m.request_decoder.decode(m.encode(junk))


@pytest.mark.parametrize(
    "junk",
    [
        7,
        {},
        [],
        [ME],
        [ME, {}],
        [ME, [[YOU]]],
        [ME, [[YOU, "127.0.0.1", 0]]],
        [ME, [[YOU, "127.0.0.1", 65536]]],
        [ME, [[YOU, "127.0.0.1", "4747"]]],
        [ME, [[YOU + b"long", "127.0.0.1", 4747]]],
        [ME, [[YOU, ["unhashable"], 4747]]],
        [ME, [[YOU, "1" * 46, 4747]]],
        [ME, [[YOU, "127.0.0.1", 4747]] * 17],
    ],
)
def test_nothing_else_is_a_reply(junk: object) -> None:
    with pytest.raises(msgspec.DecodeError):
        m.reply_decoders[m.FindNode].decode(m.encode(junk))


def test_every_request_but_a_goodbye_has_its_reply() -> None:
    assert {*m.reply_decoders, m.Leave} == {type(request) for request in REQUESTS}


def test_five_ordinary_records_fit_on_one_page() -> None:
    (page,) = turn_all(records(5, 88))
    assert page.records == records(5, 88)
    assert page.digest == b""


@given(st.integers(0, 64), st.integers(0, MAX_VALUE_BYTES))
def test_pages_hold_everything_once_and_never_exceed_a_datagram(n: int, value_bytes: int) -> None:
    everything = records(n, value_bytes)
    pages = turn_all(everything)
    assert [record for page in pages for record in page.records] == everything
    assert all(HEADER_BYTES + len(m.encode(page)) <= MAX_DATAGRAM_BYTES for page in pages)
    assert pages[0].nodes, "a page names at least one nearer node"
    if len(pages) > 1:
        assert pages[0].digest == digest_of(everything)


def test_the_longest_messages_fit_in_a_datagram() -> None:
    longest = (YOU, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535)
    largest = records(1, MAX_VALUE_BYTES)[0]
    swarm = PrivateSwarm()
    chain = [swarm.member(1).chain()[0], bytes(450)]  # an admitter's certificate has 418 bytes, at most
    for message in (
        m.Named(ME, [longest] * m.MAX_NODES),
        m.Stored(ME, [longest] * m.NODES_WITH_RECORDS, True, True),
        m.Store(ME, YOU, KEY, m.MAX_SALT, largest),
        m.Ping(ME, YOU, PUBLIC, chain),
        m.Home(ME, PUBLIC, chain, LONGEST_HOST, 65535, SIGNATURE),
        m.Introduction(ME, chain),
    ):
        assert HEADER_BYTES + len(m.encode(message)) <= MAX_DATAGRAM_BYTES, type(message).__name__


def test_the_largest_record_has_a_thousand_bytes() -> None:
    assert len(m.encode(records(1, MAX_VALUE_BYTES)[0])) == RECORD_FIXED_BYTES + MAX_VALUE_BYTES == 1000


def test_places_of_a_key() -> None:
    places = {m.location(key, salt) for key in (KEY, ME) for salt in range(m.MAX_SALT + 1)}
    assert len(places) == 2 * (m.MAX_SALT + 1)
    assert all(len(place) == 20 for place in places)
    assert m.location(KEY, 0) == KEY
    assert m.location(KEY, 1).hex() == "c0df2bbb07d20b78ddccc29960c5eb5db1c2d32c"


# the page


def documented(heading: str) -> dict[str, list[str]]:
    """Return {message: its fields in order} as the table under `heading` has them."""
    found: dict[str, list[str]] = {}
    lines = PAGE.partition(f"\n{heading}\n")[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        name, field, *_ = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
        if name:
            found[name] = fields = []
        else:
            fields.append(field)
    return found


def declared(kinds: dict[str, Any]) -> dict[str, list[str]]:
    return {name: list(get_type_hints(kind)) for name, kind in kinds.items()}


def test_the_tables_are_the_messages() -> None:
    requests = {str(kind.__struct_config__.tag): kind for kind in map(type, REQUESTS)}
    replies = {f"reply to {kind.__struct_config__.tag}": m.reply_decoders[kind].type for kind in m.reply_decoders}
    assert documented("### Requests and replies") == declared({**requests, **replies})
    assert documented("### Records") == declared({"record": WireRecord})
