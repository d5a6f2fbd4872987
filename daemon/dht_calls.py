"""Questions that this node has asked and that are not answered yet.

A question is sent a second time after a while, for lost packets, and given up after a second; one to an address that
we have only been told of is sent once. A reply counts only if it comes from the address that was asked, carries the
question's message id, and is of the type that the question asks for.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from . import dht_messages as m
from .dht_gate import MESSAGE_ID_BYTES, REQUEST, Address, Gate

REQUEST_TIMEOUT_S = 1.0
MIN_PATIENCE_S = 0.25

Answer = asyncio.Future[Any]  # of a reply, or of None where none came


@dataclass(slots=True)
class Call:
    """A question on its way. `node_id` is who should answer, None for whoever lives at that address."""

    message_id: bytes
    address: Address
    node_id: bytes | None
    answer: Answer
    body: bytes
    decoder: msgspec.msgpack.Decoder[Any]
    sent_at: float
    timer: asyncio.TimerHandle


class Calls:
    """All questions of one node. `send(datagram, address)` sends.

    `judge(call, reply)` is asked about each reply, or None where none came, and returns what the asker is told.
    """

    def __init__(
        self,
        gate: Gate,
        send: Callable[[bytes, Address], None],
        judge: Callable[[Call, m.AnyReply | None], m.AnyReply | None],
        refused: Counter[str],
    ) -> None:
        self.waiting: dict[bytes, Call] = {}
        self._gate = gate
        self._send = send
        self._judge = judge
        self._refused = refused
        self._loop = asyncio.get_running_loop()
        self._n_asked: Counter[Address] = Counter()
        self._rtt_s = 0.0

    @property
    def patience_s(self) -> float:
        """How long to wait for a node before going on without it: twice the slowest recent round trip, bounded."""
        return min(max(2 * self._rtt_s, MIN_PATIENCE_S), REQUEST_TIMEOUT_S)

    def expects(self, address: Address) -> bool:
        """Return whether an answer from this address is awaited."""
        return address in self._n_asked

    def addresses(self) -> frozenset[Address]:
        """Return all addresses from which an answer is awaited."""
        return frozenset(self._n_asked)

    def ask(self, address: Address, node_id: bytes | None, request: m.Request, repeat: bool = True) -> Answer:
        """Send `request` and return the future of its reply, of None if there is none."""
        message_id, body = os.urandom(MESSAGE_ID_BYTES), m.encode_request(request)
        timer = self._loop.call_later(
            self.patience_s if repeat else REQUEST_TIMEOUT_S, self._send_again if repeat else self._give_up, message_id
        )
        answer: Answer = self._loop.create_future()
        self.waiting[message_id] = Call(
            message_id, address, node_id, answer, body, m.reply_decoders[type(request)], self._loop.time(), timer
        )
        self._n_asked[address] += 1
        self._send(self._gate.seal(REQUEST, message_id, body), address)
        return answer

    def accept(self, message_id: bytes, body: memoryview, address: Address) -> None:
        """Take a datagram that says it is a reply."""
        call = self.waiting.get(message_id)
        if call is None:
            self._refused["reply to no question"] += 1
            return
        if call.address != address:
            self._refused["reply from elsewhere"] += 1
            return
        call.timer.cancel()
        reply: m.AnyReply | None = None
        try:
            reply = call.decoder.decode(body)
            self._rtt_s = max(self._loop.time() - call.sent_at, 0.9 * self._rtt_s)
        except (msgspec.DecodeError, ValueError, RecursionError):
            self._refused["reply"] += 1
        self._end(call, reply)

    def close(self) -> None:
        """Free everybody who still waits."""
        for call in list(self.waiting.values()):
            call.timer.cancel()
            call.answer.cancel()
        self.waiting.clear()
        self._n_asked.clear()

    def _send_again(self, message_id: bytes) -> None:
        call = self.waiting[message_id]
        left_s = max(0.0, call.sent_at + REQUEST_TIMEOUT_S - self._loop.time())
        call.timer = self._loop.call_later(left_s, self._give_up, message_id)
        # Sealed anew: a second copy of the first datagram would be taken for a replay.
        self._send(self._gate.seal(REQUEST, message_id, call.body), call.address)

    def _give_up(self, message_id: bytes) -> None:
        self._end(self.waiting[message_id], None)

    def _end(self, call: Call, reply: m.AnyReply | None) -> None:
        del self.waiting[call.message_id]
        self._n_asked[call.address] -= 1
        if not self._n_asked[call.address]:
            del self._n_asked[call.address]
        verdict = self._judge(call, reply)
        if not call.answer.done():
            call.answer.set_result(verdict)


def then(first: Answer, step: Callable[[Any], Any]) -> Answer:
    """Return a future of what `step` makes of the result of `first`: a value, or another future to wait for."""
    last: Answer = first.get_loop().create_future()

    def end(future: Answer) -> None:
        if not last.done():
            last.set_result(None if future.cancelled() else future.result())

    def go_on(future: Answer) -> None:
        made = step(None if future.cancelled() else future.result())
        if isinstance(made, asyncio.Future):
            made.add_done_callback(end)
        elif not last.done():
            last.set_result(made)

    first.add_done_callback(go_on)
    return last
