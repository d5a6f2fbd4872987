"""Names: of peers by their keys, and of places on the network however people write them."""

import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mpd.errors import LocalError
from mpd.ids import MAX_HOST_CHARS, Endpoint, parse_endpoint, peer_id, peer_id_of, show_peer

BAD_HOSTS = [
    "", " ", "a b", "a\tb", "\0", "a\n", "\x1b[2J", "-a", "a-", "a..b", ".", ".a", "x" * 64, "a." * 127, "a/b", "http://a",
    "user@a", "[::1]", "häst", "1.2.3", "1.2.3.4.5", "256.1.1.1", "1234", "::1%", "::1%a..b", "::1%" + "z" * 16,
    "::1%é", "1.2.3.4%eth0", ":::", "12345::", "a:b", "%eth0",
]  # fmt: skip


def test_a_peer_id_is_the_hash_of_its_key() -> None:
    # SHA-256 of 32 zero bytes begins with 66687aadf862bd776c8fc18b8e9f8e20089714856ee233b3.
    assert peer_id_of(bytes(32)).hex() == "66687aadf862bd776c8fc18b8e9f8e2008971485"


@given(st.binary(min_size=20, max_size=20))
def test_people_see_32_lower_case_characters(raw: bytes) -> None:
    shown = show_peer(peer_id(raw))
    assert len(shown) == 32
    assert set(shown) <= set("abcdefghijklmnopqrstuvwxyz234567")


@given(st.sets(st.binary(min_size=20, max_size=20), min_size=2, max_size=2))
def test_different_peers_are_shown_differently(two: set[bytes]) -> None:
    assert len({show_peer(peer) for peer in two}) == 2


@pytest.mark.parametrize("n_bytes", [0, 19, 21, 32])
def test_a_peer_id_has_20_bytes(n_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"20 bytes, this has {n_bytes}"):
        peer_id(bytes(n_bytes))


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("192.0.2.7:4747", Endpoint("192.0.2.7", 4747)),
        ("0.0.0.0:0", Endpoint("0.0.0.0", 0)),
        ("peer.example:65535", Endpoint("peer.example", 65535)),
        ("peer.example.:1", Endpoint("peer.example.", 1)),
        ("my_host-7:1", Endpoint("my_host-7", 1)),
        ("7seas:1", Endpoint("7seas", 1)),
        ("[2001:db8::7]:4747", Endpoint("2001:db8::7", 4747)),
        ("[fe80::1%eth0]:4747", Endpoint("fe80::1%eth0", 4747)),
        ("[::ffff:192.0.2.7]:1", Endpoint("::ffff:192.0.2.7", 1)),
        ("192.0.2.7", Endpoint("192.0.2.7", 99)),
        ("localhost", Endpoint("localhost", 99)),
        ("2001:db8::7", Endpoint("2001:db8::7", 99)),
        ("[2001:db8::7]", Endpoint("2001:db8::7", 99)),
        ("::", Endpoint("::", 99)),
    ],
)
def test_addresses_are_understood_as_people_write_them(text: str, endpoint: Endpoint) -> None:
    assert parse_endpoint(text, 99) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "", ":", ":1", "a:", "a:-1", "a:+1", "a: 1", "a:1 ", "a:1_0", "a:\u0663", "a:65536", "a:100000", "a:0x10",
        "a:b", "a:1:2", "[::1", "::1]:1", "[::1]1", "[a]:1", "[]:1", "[[::1]]:1", "http://a:1", "a/b:1", "2001:db8::zz",
        *[f"{host}:1" for host in BAD_HOSTS if ":" not in host],
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(LocalError) as refusal:
        parse_endpoint(text, 99)
    assert str(refusal.value) == (f"{text!r} is not an address: HOST:PORT expected, for example 192.0.2.7:4747")


@pytest.mark.parametrize("text", ["192.0.2.7", "localhost", "::1", "[::1]", ""])
def test_without_a_default_the_port_is_needed(text: str) -> None:
    with pytest.raises(LocalError, match="HOST:PORT expected"):
        parse_endpoint(text)


@given(
    st.ip_addresses().map(str)
    | st.from_regex(r"[a-z0-9]{1,8}(\.[a-z]{1,8}){0,3}", fullmatch=True).filter(lambda h: not h.isdigit()),
    st.integers(0, 65535),
)
@example("::", 0)
def test_what_is_printed_can_be_read(host: str, port: int) -> None:
    endpoint = Endpoint(host, port)
    assert parse_endpoint(str(endpoint)) == endpoint


@given(st.text(max_size=30) | st.text("a1.:[]%-", max_size=12))
def test_any_text_is_an_endpoint_or_a_local_error(text: str) -> None:
    try:
        endpoint = parse_endpoint(text, 4747)
    except LocalError:
        return
    assert parse_endpoint(str(endpoint)) == endpoint
    assert endpoint.host.encode("idna")  # as resolvers do before they look up: no surprise left


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_a_bad_host_makes_no_endpoint(host: str) -> None:
    with pytest.raises(ValueError, match="is not a host: a name or an address expected"):
        Endpoint(host, 1)


def test_a_long_host_is_quoted_in_part() -> None:
    assert Endpoint("a." * 126 + "b", 1).host.count(".") == 126
    with pytest.raises(ValueError) as refusal:
        Endpoint("a" * 1_000_000, 1)
    assert len(str(refusal.value)) < MAX_HOST_CHARS


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_bad_port_makes_no_endpoint(port: int) -> None:
    with pytest.raises(ValueError, match=f"{port} is not a port: 0 to 65535 expected"):
        Endpoint("localhost", port)


@pytest.mark.parametrize(
    ("host", "is_loopback", "is_wildcard"),
    [
        ("127.0.0.1", True, False),
        ("127.9.9.9", True, False),
        ("::1", True, False),
        ("localhost", True, False),
        ("0.0.0.0", False, True),
        ("::", False, True),
        ("192.0.2.7", False, False),
        ("peer.example", False, False),
    ],
)
def test_loopback_and_wildcard_are_known(host: str, is_loopback: bool, is_wildcard: bool) -> None:
    endpoint = Endpoint(host, 1)
    assert (endpoint.is_loopback, endpoint.is_wildcard) == (is_loopback, is_wildcard)


@given(st.ip_addresses())
def test_every_numeric_address_is_a_host(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert Endpoint(str(address), 1).is_loopback == address.is_loopback
