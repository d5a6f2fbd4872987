"""Whether a node of the swarm answers at an address by UDP: one question from a socket of its own, without joining.

The question is for nodes near a made-up id and comes in that id's name, so it proves membership by its MAC and leaves
no trace of this machine in anybody's table.
"""

import secrets
import socket
from collections import Counter
from collections.abc import Callable

import trio

from mpd.ids import PEER_ID_BYTES, Endpoint

from .budgets import Budgets
from .dht_gate import MAX_DATAGRAM_BYTES, MESSAGE_ID_BYTES, REQUEST, DhtTrust, Gate
from .dht_messages import FindNode, encode_request

ANSWER_S = 1.5
_AGAIN_S = 0.5


async def answers_by_udp(endpoint: Endpoint, trust: DhtTrust, wall_ms: Callable[[], int]) -> bool:
    """Return whether somebody at `endpoint` answers as a node of our swarm does. Takes `ANSWER_S` at most."""
    gate = Gate(trust, wall_ms, trio.current_time, Budgets(), Counter())
    made_up, message_id = secrets.token_bytes(PEER_ID_BYTES), secrets.token_bytes(MESSAGE_ID_BYTES)
    question = encode_request(FindNode(made_up, b"", made_up))
    with trio.move_on_after(ANSWER_S):
        try:
            found = await trio.socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_DGRAM)
            with trio.socket.socket(found[0][0], socket.SOCK_DGRAM) as sock:
                await sock.connect(found[0][4])
                while True:
                    await sock.send(gate.seal(REQUEST, message_id, question))
                    with trio.move_on_after(_AGAIN_S):
                        if await _is_answered(sock, gate, message_id, endpoint):
                            return True
        except OSError:
            return False
    return False


async def _is_answered(sock: trio.socket.SocketType, gate: Gate, message_id: bytes, endpoint: Endpoint) -> bool:
    """Wait for the answer; a connected socket hears nobody else."""
    while True:
        datagram = await sock.recv(MAX_DATAGRAM_BYTES + 1)
        opened = gate.open(datagram, (endpoint.host, endpoint.port), None, is_expected=True)
        if opened is not None and not opened.is_request and opened.message_id == message_id:
            return True
