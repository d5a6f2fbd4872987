"""Why a bootstrap does not answer: what UDP leaves in silence, TCP can often say.

A daemon drops datagrams that it cannot verify without a word, so somebody who bootstraps from another swarm, or with a
certificate that has expired, only sees that nobody answers. TLS says more, so who does not answer by UDP is dialled.
"""

import logging
import random
from collections.abc import Awaitable, Callable

import trio

from mpd.ids import Endpoint, parse_endpoint

from .rendezvous import NO_ANSWER, Rendezvous

LOOK_S = 1.0
MIN_PAUSE_S = 2.0  # between two calls of one address; doubles
MAX_PAUSE_S = 60.0

_log = logging.getLogger("mpd")


class Lookout:
    """Finds out about bootstraps that do not answer, while `run` runs.

    `probe` dials an address and returns a sentence about who is there.
    """

    def __init__(self, rendezvous: Rendezvous, probe: Callable[[Endpoint], Awaitable[str]], rng: random.Random) -> None:
        self._rendezvous = rendezvous
        self._probe = probe
        self._rng = rng
        self._findings: dict[str, str] = {}
        self._due: dict[str, tuple[float, float]] = {}  # when to call an address next, and the pause after that

    def bootstrap(self) -> list[tuple[str, str]]:
        """Return each address as it was given, and how it fares."""
        return [
            (
                address,
                f"{state}; {self._findings[address]}" if state == NO_ANSWER and address in self._findings else state,
            )
            for address, state in self._rendezvous.snapshot().bootstrap
        ]

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await trio.sleep(LOOK_S)
            silent = {address for address, state in self._rendezvous.snapshot().bootstrap if state == NO_ANSWER}
            for address in self._due.keys() - silent:
                del self._due[address]
                self._findings.pop(address, None)
            async with trio.open_nursery() as nursery:
                for address in silent:
                    when, pause_s = self._due.get(address, (0.0, MIN_PAUSE_S))
                    if trio.current_time() >= when:
                        next_at = trio.current_time() + pause_s * self._rng.uniform(0.75, 1.25)
                        self._due[address] = next_at, min(2 * pause_s, MAX_PAUSE_S)
                        nursery.start_soon(self._find_out, address)

    async def _find_out(self, address: str) -> None:
        finding = await self._probe(parse_endpoint(address))
        if self._findings.get(address) != finding:
            _log.warning("bootstrap %s does not answer: %s", address, finding)
            self._findings[address] = finding
