"""What is seen of addresses that lead into the swarm, by TCP and UDP."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from daemon_helpers import swarm, wall_ms

from mpd.daemon.dht_gate import OpenTrust
from mpd.daemon.outlook import MAX_ADDRESSES, look_out
from mpd.ids import Endpoint, show_peer

TRUST = OpenTrust(Ed25519PrivateKey.generate())


async def test_each_address_tells_who_answers_and_how() -> None:
    async with swarm(2) as (a, b):
        membership = a.card
        nowhere = Endpoint("127.0.0.1", 1)
        seen, clocks = await look_out([b.endpoint, nowhere, a.endpoint, b.endpoint], membership, TRUST, wall_ms)
        facts = {fact.address: fact for fact in seen}
        assert len(seen) == 3  # each once
        there = facts[str(b.endpoint)]
        assert (there.by_udp, there.by_tcp, there.trouble, there.is_own) == (False, True, "", False)  # no DHT there
        assert (facts[str(nowhere)].by_tcp, facts[str(nowhere)].trouble) == (False, "Connection refused")
        assert facts[str(a.endpoint)].is_own
        ((peer, ahead_s),) = clocks
        assert peer == show_peer(b.own)
        assert abs(ahead_s) < 30


async def test_few_addresses_are_looked_at() -> None:
    async with swarm(1) as (a,):
        many = [Endpoint("127.0.0.1", port) for port in range(1, 50)]
        seen, clocks = await look_out(many, a.card, TRUST, wall_ms)
        assert (len(seen), clocks) == (MAX_ADDRESSES, [])
