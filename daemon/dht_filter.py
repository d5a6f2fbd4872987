"""Datagrams that need not be read: a flood is dropped by the kernel, as a program of 1992 tells it.

Whom the gate is not listening to for a moment (`dht_gate.py`) may as well be dropped before the datagram wakes us and
takes a place in the receive buffer from somebody we do listen to: each costs the kernel a fraction of a microsecond,
and us nothing. The program is classic BPF (McCanne and Jacobson, "The BSD Packet Filter", USENIX 1993), which Linux
lets any process attach to its own sockets. It only repeats what the gate has decided, so where it cannot be attached
nothing is lost but processor time.

    from a contact, or a reply from somebody we asked?  yes: take it
    no: is the sender, or everybody, muted?             yes: drop it;  no: take it
"""

import contextlib
import ctypes
import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from .dht_gate import KIND_AT, REPLY, Address
from .dht_limits import source_of

MAX_INSTRUCTIONS = 2048  # 16 KiB: older kernels allow 20 for the options of one socket
MAX_MUTED = 64  # sources in one program; the gate itself goes on refusing the others

_SO_ATTACH_FILTER, _SO_DETACH_FILTER, _SO_MEMINFO = 26, 27, 55  # of Linux; the socket module does not name them
_N_DROPPED = struct.Struct("=32xI")  # in what SO_MEMINFO returns: nine numbers, this is the last

# Of a UDP socket, offset 0 is the UDP header, and the IP header is seen from here.
_IP = -0x100000
_V4_SOURCE, _V6_SOURCE, _SOURCE_PORT, _KIND = _IP + 12, _IP + 8, 0, 8 + KIND_AT

_INSTRUCTION = struct.Struct("=HBBI")
_LOAD_WORD, _LOAD_HALF, _LOAD_BYTE = 0x20, 0x28, 0x30  # at an absolute offset, into the accumulator
_AND, _JUMP, _JUMP_IF_EQUAL, _RETURN = 0x54, 0x05, 0x15, 0x06

_Condition = tuple[tuple[int, int], int]  # what to load, from where, and the number that it has to be
_Instruction = tuple[int, int, int, int]  # what to do; how many to jump over if equal, and if not; a number
_TAKE, _DROP = (_RETURN, 0, 0, 0xFFFFFFFF), (_RETURN, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Sieve:
    """Which datagrams are not wanted: those of `muted` sources (see `source_of`), None: of everybody.

    Of `contacts` all are wanted, of those who were `asked` what says that it is a reply. Hosts are numeric, IPv4 ones
    in their own form.
    """

    contacts: frozenset[Address]
    asked: frozenset[Address]
    muted: frozenset[str] | None

    def drops(self, address: Address, is_reply: bool) -> bool:
        """Return whether such a datagram from there is dropped."""
        is_spared = address in self.contacts or (is_reply and address in self.asked)
        return not is_spared and (self.muted is None or source_of(address[0]) in self.muted)

    def program(self) -> bytes | None:
        """Return it as the kernel wants it; None if it takes too many instructions."""
        v4, v6 = (self._for_version(version) for version in (4, 6))
        which = [(_LOAD_BYTE, 0, 0, _IP), (_AND, 0, 0, 0xF0), (_JUMP_IF_EQUAL, 1, 0, 0x40), (_JUMP, 0, 0, len(v4))]
        instructions = [*which, *v4, *v6]
        if len(instructions) > MAX_INSTRUCTIONS:
            return None
        return b"".join(_INSTRUCTION.pack(*each[:3], each[3] & 0xFFFFFFFF) for each in instructions)

    def _for_version(self, version: int) -> list[_Instruction]:
        made: list[_Instruction] = []
        for spared, also in (self.contacts, []), (self.asked - self.contacts, [((_LOAD_BYTE, _KIND), REPLY)]):
            for host, port in sorted(spared):
                if (address := _parsed(host)).version == version:
                    from_there = [*_source_is(address.packed), ((_LOAD_HALF, _SOURCE_PORT), port)]
                    made += _if_all([*from_there, *also], _TAKE)
        if self.muted is None:
            return [*made, _DROP]
        for source in sorted(self.muted)[:MAX_MUTED]:
            network = ipaddress.ip_network(source)
            if network.version == version:
                made += _if_all(_source_is(network.network_address.packed[: network.prefixlen // 8]), _DROP)
        return [*made, _TAKE]


def attach(sock: socket.socket, sieve: Sieve) -> bool:
    """Let the kernel drop what `sieve` drops, in place of what it dropped before; return whether it does."""
    if sys.platform != "linux" or (program := sieve.program()) is None:
        return False
    held = ctypes.create_string_buffer(program, len(program))
    try:
        sock.setsockopt(
            socket.SOL_SOCKET,
            _SO_ATTACH_FILTER,
            struct.pack("@HP", len(program) // _INSTRUCTION.size, ctypes.addressof(held)),
        )
    except OSError:  # a kernel that has none, or an emulated one
        return False
    return True


def detach(sock: socket.socket) -> None:
    """Take everything again."""
    with contextlib.suppress(OSError):  # nothing is attached
        sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def count_dropped(sock: socket.socket) -> int:
    """Return how many datagrams the kernel has dropped so far: filtered, or more than the receive buffer holds."""
    try:
        told = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _N_DROPPED.size)
    except OSError:
        return 0
    return int(_N_DROPPED.unpack(told)[0]) if len(told) == _N_DROPPED.size else 0


def _parsed(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(host.partition("%")[0])


def _source_is(packed: bytes) -> list[_Condition]:
    """Return the conditions under which the source address begins with `packed`: of 4 bytes, IPv4; of more, IPv6."""
    at = _V4_SOURCE if len(packed) == 4 else _V6_SOURCE
    words = struct.unpack(f">{len(packed) // 4}I", packed)
    return [((_LOAD_WORD, at + 4 * i), word) for i, word in enumerate(words)]


def _if_all(conditions: Iterable[_Condition], verdict: _Instruction) -> list[_Instruction]:
    """Return `verdict` if all `conditions` hold, else go on behind it."""
    made: list[_Instruction] = [verdict]
    for (load, offset), number in reversed(list(conditions)):
        made = [(load, 0, 0, offset), (_JUMP_IF_EQUAL, 0, len(made), number), *made]
    return made
