"""Whose word counts how much, by network address: what stands in for membership where anybody may join.

In an open swarm one machine can make itself any number of keys, so nodes whose addresses lie close together count as
one crowd: a /24 of IPv4, a /56 of IPv6 (compare the groups of go-libp2p and BEP 42). Nobody counts the machines of a
swarm against it where they naturally crowd: on loopback, in private networks, in our own subnet; and no member of a
private swarm, who has a certificate to show, is judged by its address at all.

An address that somebody names is asked only if it can be that of one machine, and if it is on the internet or in a
kind of network in which we live ourselves; nobody makes us knock at the doors of our neighbours.
"""

import functools
import ipaddress
import socket
from collections.abc import Iterable

MAX_PER_PREFIX = 3  # contacts, and nodes that one lookup meets
MAX_RECORDS_PER_PREFIX = 256  # held for publishers of one prefix
PREFIX_BITS = {4: 24, 6: 56}

LOOPBACK, PRIVATE, PUBLIC = "loopback", "private", "public"
_LOOPBACK = ("127.0.0.0/8", "::1/128")
_PRIVATE = ("10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "fe80::/10")
_NOBODY = ("0.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4", "::/96", "::ffff:0:0/96", "ff00::/8")


class Neighbourhood:
    """The rules as seen from a node with the addresses `own_hosts` (numeric)."""

    def __init__(self, is_open: bool, own_hosts: Iterable[str] = ()) -> None:
        self._is_open = is_open
        self._lived_in = {PUBLIC}
        self._own_prefixes: set[str] = set()
        for host in own_hosts:
            self.learn(host)
            self._own_prefixes.add(prefix_of(host))

    def learn(self, host: str) -> None:
        """Take note that there is, or should be, a node of this swarm at `host`."""
        if (kind := kind_of(host)) is not None:
            self._lived_in.add(kind)

    def may_follow(self, host: str) -> bool:
        """Return whether a node that somebody names may be asked at this address."""
        return kind_of(host) in self._lived_in

    def crowd_of(self, host: str) -> str | None:
        """Return the prefix with which this address is counted, None if it is not counted."""
        if not self._is_open or kind_of(host) != PUBLIC:
            return None
        prefix = prefix_of(host)
        return None if prefix in self._own_prefixes else prefix


def own_hosts(sock: socket.socket) -> list[str]:
    """Return the address to which `sock` is bound; if it is bound to all, the one that this machine would send from."""
    host = str(sock.getsockname()[0])
    if kind_of(host) is not None:
        return [host]
    outside = "2001:db8::1" if ":" in host else "192.0.2.1"  # for documentation: nobody is there, and nothing is sent
    with socket.socket(sock.family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((outside, 9))
        except OSError:
            return []
        return [str(probe.getsockname()[0])]


@functools.lru_cache(maxsize=4096)
def kind_of(host: str) -> str | None:
    """Return the kind of network that a numeric address is in; None if it is no address of one machine."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if "%" in host:
        return None
    if _is_in(address, _LOOPBACK):
        return LOOPBACK
    if _is_in(address, _PRIVATE):
        return PRIVATE
    return None if _is_in(address, _NOBODY) else PUBLIC


@functools.lru_cache(maxsize=4096)
def prefix_of(host: str) -> str:
    """Return the network that stands for a numeric address and its neighbours."""
    return _network(host, PREFIX_BITS[6 if ":" in host else 4])


@functools.lru_cache(maxsize=4096)
def source_of(host: str) -> str:
    """Return what a flood from a numeric address is counted by: in IPv6, one customer has a /64."""
    return _network(host, 64) if ":" in host else host


def _network(host: str, n_bits: int) -> str:
    return str(ipaddress.ip_network(f"{host.partition('%')[0]}/{n_bits}", strict=False))


def _is_in(address: ipaddress.IPv4Address | ipaddress.IPv6Address, networks: tuple[str, ...]) -> bool:
    return any(address in network for network in _networks(networks, address.version))


@functools.cache
def _networks(networks: tuple[str, ...], version: int) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    parsed = map(ipaddress.ip_network, networks)
    return [network for network in parsed if network.version == version]
