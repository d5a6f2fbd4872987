"""Addresses by kind and by neighbourhood."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.daemon.dht_limits import LOOPBACK, PRIVATE, PUBLIC, Neighbourhood, kind_of, own_hosts, prefix_of, source_of


@pytest.mark.parametrize(
    ("host", "kind"),
    [
        ("127.0.0.1", LOOPBACK),
        ("127.255.0.1", LOOPBACK),
        ("::1", LOOPBACK),
        ("10.1.2.3", PRIVATE),
        ("100.64.0.1", PRIVATE),
        ("169.254.1.1", PRIVATE),
        ("172.31.255.255", PRIVATE),
        ("192.168.0.1", PRIVATE),
        ("fd00::1", PRIVATE),
        ("fe80::1", PRIVATE),
        ("8.8.8.8", PUBLIC),
        ("172.32.0.1", PUBLIC),
        ("2600::1", PUBLIC),
    ],
)
def test_kinds(host: str, kind: str) -> None:
    assert kind_of(host) == kind


@pytest.mark.parametrize(
    "host",
    [
        "",
        "localhost",
        "0.0.0.0",
        "0.1.2.3",
        "224.0.0.1",
        "239.255.255.250",
        "255.255.255.255",
        "240.0.0.1",
        "::",
        "::ffff:127.0.0.1",
        "::127.0.0.1",
        "ff02::1",
        "fe80::1%eth0",
        "1.2.3.4.5",
        "127.1",
    ],
)
def test_what_is_no_address_of_one_machine(host: str) -> None:
    assert kind_of(host) is None
    assert not Neighbourhood(True, ["127.0.0.1", "10.0.0.1"]).may_follow(host)


@given(st.text(max_size=45))
def test_no_text_upsets_anybody(host: str) -> None:
    assert kind_of(host) in {None, LOOPBACK, PRIVATE, PUBLIC}


def test_prefixes() -> None:
    assert prefix_of("192.0.2.7") == prefix_of("192.0.2.250") != prefix_of("192.0.3.7")
    assert prefix_of("2001:db8:1:2ff::1") == prefix_of("2001:db8:1:200::9") != prefix_of("2001:db8:1:300::1")
    assert prefix_of("fe80::1%eth0") == prefix_of("fe80::2")
    assert source_of("192.0.2.7") != source_of("192.0.2.8")
    assert source_of("2001:db8::1") == source_of("2001:db8::2") != source_of("2001:db8:0:1::1")


def test_private_networks_are_followed_by_those_who_live_there() -> None:
    outside = Neighbourhood(True, ["8.8.4.4"])
    assert outside.may_follow("8.8.8.8")
    assert not outside.may_follow("127.0.0.1")
    assert not outside.may_follow("192.168.1.1")
    outside.learn("127.0.0.1")
    assert outside.may_follow("127.0.0.9")
    assert not outside.may_follow("192.168.1.1")
    assert Neighbourhood(True, ["10.0.0.1"]).may_follow("192.168.1.1")


def test_crowds_are_counted_only_on_the_internet_of_an_open_swarm() -> None:
    ours = Neighbourhood(True, ["203.0.113.9"])
    assert ours.crowd_of("192.0.2.7") == "192.0.2.0/24"
    assert ours.crowd_of("203.0.113.200") is None, "our own subnet"
    assert ours.crowd_of("127.0.0.1") is None
    assert ours.crowd_of("10.0.0.1") is None
    assert Neighbourhood(False, []).crowd_of("192.0.2.7") is None, "members are not judged by address"


def test_where_a_socket_lives() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        assert own_hosts(sock) == ["127.0.0.1"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("0.0.0.0", 0))
        assert all(kind_of(host) is not None for host in own_hosts(sock))
