"""Messages by value: what decodes, what does not, and how records are paged."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.daemon import dht_messages as m
from mpd.daemon.dht_records import WireRecord, digest_of

ME, YOU, KEY = b"m" * 20, b"y" * 20, b"k" * 20


def records(n: int, value_bytes: int) -> list[WireRecord]:
    return [WireRecord(bytes([i]) * 20, 2**62, 3_600_000, bytes(value_bytes)) for i in range(1, n + 1)]


def turn_all(everything: list[WireRecord]) -> list[m.Page]:
    pages = [m.page_of(ME, everything, b"", [(YOU, "255.255.255.255", 65535)] * m.MAX_NODES)]
    while pages[-1].more:
        pages.append(m.page_of(ME, everything, pages[-1].records[-1].publisher, []))
    return pages


@pytest.mark.parametrize(
    "request_",
    [
        m.Ping(ME),
        m.FindNode(ME, KEY),
        m.FindRecords(ME, KEY, b""),
        m.Store(ME, KEY, WireRecord(ME, 1, 1000, b"v")),
        m.Leave(ME),
    ],
)
def test_requests_survive_the_trip(request_: m.Request) -> None:
    assert m.request_decoder.decode(m.encode(request_)) == request_


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
        ["ping", b"short"],
        ["ping", bytes(21)],
        ["stun", ME],
        ["__class__", ME],
        ["find_node", ME, "k" * 20],
        ["find_records", ME, KEY, bytes(21)],
        ["store", ME, KEY, [ME, 1.5, 1000, b"v"]],
        ["store", ME, KEY, [ME, 1, 1000]],
        ["store", ME, KEY, None],
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
        [ME, [[YOU, "127.0.0.1", 4747]] * 17],
    ],
)
def test_nothing_else_is_a_reply(junk: object) -> None:
    with pytest.raises(msgspec.DecodeError):
        m.reply_decoders[m.FindNode].decode(m.encode(junk))


def test_eight_ordinary_records_fit_on_one_page() -> None:
    (page,) = turn_all(records(8, 120))
    assert page.records == records(8, 120)
    assert page.digest == b""


@given(st.integers(0, 64), st.integers(0, 1000))
def test_pages_hold_everything_once_and_never_exceed_a_datagram(n: int, value_bytes: int) -> None:
    everything = records(n, value_bytes)
    pages = turn_all(everything)
    assert [record for page in pages for record in page.records] == everything
    assert all(m.HEADER_BYTES + len(m.encode(page)) <= m.MAX_DATAGRAM_BYTES for page in pages)
    assert pages[0].nodes, "a page names at least one nearer node"
    if len(pages) > 1:
        assert pages[0].digest == digest_of(everything)


def test_the_longest_list_of_nodes_fits_in_a_datagram() -> None:
    longest = (YOU, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535)
    assert m.HEADER_BYTES + len(m.encode(m.Named(ME, [longest] * m.MAX_NODES))) <= m.MAX_DATAGRAM_BYTES
