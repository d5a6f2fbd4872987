"""What `mpd doctor` sees of the addresses that lead into the swarm: who answers there, how, and its clock."""

from collections.abc import Callable, Sequence

import trio

from mpd.doctor import Bootstrap
from mpd.ids import Endpoint, show_peer

from .dht_gate import DhtTrust
from .dht_probe import answers_by_udp
from .handshake import Sight, look_at
from .tls import Membership

MAX_ADDRESSES = 8

Clock = tuple[str, float]


async def look_out(
    addresses: Sequence[Endpoint], membership: Membership, trust: DhtTrust, wall_ms: Callable[[], int]
) -> tuple[list[Bootstrap], list[Clock]]:
    """Look at all `addresses` at once; return how each fares, and how far the clocks there are ahead of ours."""
    found: dict[Endpoint, tuple[Sight, bool]] = {}

    async def look(address: Endpoint) -> None:
        sight = Sight("")
        by_udp = False

        async def by_tcp() -> None:
            nonlocal sight
            sight = await look_at(address, membership, wall_ms)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(by_tcp)
            by_udp = await answers_by_udp(address, trust, wall_ms)
        found[address] = sight, by_udp

    async with trio.open_nursery() as nursery:
        for address in dict.fromkeys(addresses[:MAX_ADDRESSES]):
            nursery.start_soon(look, address)
    facts = [
        Bootstrap(str(address), by_udp, sight.peer is not None, sight.trouble, sight.is_own)
        for address, (sight, by_udp) in sorted(found.items(), key=lambda each: str(each[0]))
    ]
    clocks = {
        show_peer(sight.peer): sight.ahead_s
        for sight, _ in found.values()
        if sight.peer is not None and sight.ahead_s is not None and not sight.is_own
    }
    return facts, list(clocks.items())
