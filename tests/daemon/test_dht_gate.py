"""The gate alone: datagrams in, verdicts out, both clocks in the hand of the test."""

import random
from collections import Counter

import pytest
from dht_swarm import HERE, NOW_MS, Actor, Clock, PrivateSwarm, message_id_of, open_trust, peer
from hypothesis import given
from hypothesis import strategies as st

from mpd.daemon import dht_gate
from mpd.daemon.budgets import Budgets, RateBudget
from mpd.daemon.dht_gate import (
    HEADER_BYTES,
    MAX_DATAGRAM_BYTES,
    REPLY,
    REQUEST,
    Gate,
    OpenTrust,
)

MESSAGE_ID = b"i" * 20
BODY = b"body"


class Post:
    """A gate, its clocks and its books."""

    def __init__(self, trust: dht_gate.DhtTrust | None = None, budgets: Budgets | None = None) -> None:
        self.wall, self.steady = Clock(NOW_MS), Clock(0.0)
        self.refused: Counter[str] = Counter()
        self.gate = Gate(trust or open_trust(1), self.wall, self.steady, budgets or Budgets(), self.refused)

    def opens(self, datagram: bytes, address: tuple[str, int] = HERE, contact: bytes | None = None) -> bool:
        return self.gate.open(datagram, address, contact, is_expected=False) is not None


@given(st.sampled_from([REQUEST, REPLY]), st.binary(min_size=20, max_size=20), st.binary(min_size=1, max_size=1187))
def test_what_is_sealed_is_opened(kind: int, message_id: bytes, body: bytes) -> None:
    opened = Post().gate.open(Post().gate.seal(kind, message_id, body), HERE, None, is_expected=False)
    assert opened is not None
    assert (opened.is_request, opened.message_id, bytes(opened.body)) == (kind == REQUEST, message_id, body)


def test_the_layout_is_the_documented_one() -> None:
    datagram = Post().gate.seal(REPLY, MESSAGE_ID, BODY)
    assert len(datagram) == HEADER_BYTES + len(BODY) == 45 + len(BODY)
    assert datagram[16:24] == NOW_MS.to_bytes(8, "little")
    assert datagram[24:] == bytes([REPLY]) + MESSAGE_ID + BODY


@given(st.integers(0, 8 * 80 - 1))
def test_no_bit_can_be_flipped(bit: int) -> None:
    post = Post()
    datagram = bytearray(post.gate.seal(REQUEST, MESSAGE_ID, bytes(35)))
    datagram[bit // 8] ^= 1 << bit % 8
    assert not post.opens(bytes(datagram))
    assert post.refused == {"mac": 1}


@given(st.binary(max_size=2000))
def test_noise_never_passes(noise: bytes) -> None:
    post = Post()
    assert not post.opens(noise)
    assert post.refused.keys() <= {"mac", "size"}


def test_only_our_swarm_passes() -> None:
    mine, theirs = PrivateSwarm(), PrivateSwarm()
    theirs.keys = (b"t" * 32,)
    post = Post(mine.member(1))
    assert post.opens(Actor(mine.member(2), post.wall).ping())
    assert not post.opens(Actor(theirs.member(2), post.wall).ping())
    assert not post.opens(Actor(open_trust(2), post.wall).ping())


def test_keys_change_without_a_pause() -> None:
    swarm = PrivateSwarm()
    post, sender = Post(swarm.member(1)), Actor(swarm.member(2), Clock(NOW_MS))
    old = sender.ping()
    swarm.keys = (b"n" * 32, b"s" * 32)
    new = sender.ping()
    assert post.opens(old)
    assert post.opens(new)
    swarm.keys = (b"n" * 32,)
    assert post.opens(sender.ping())
    late = Post(swarm.member(3))
    assert not late.opens(old)
    assert late.opens(new)


@pytest.mark.parametrize(
    ("off_ms", "passes"), [(-30_001, False), (-30_000, True), (0, True), (30_000, True), (30_001, False)]
)
def test_a_datagram_is_of_the_last_half_minute(off_ms: int, passes: bool) -> None:
    post = Post()
    datagram = post.gate.seal(REQUEST, MESSAGE_ID, BODY)
    post.wall.now -= off_ms
    assert post.opens(datagram) == passes
    assert post.refused == ({} if passes else {"time": 1})


def test_a_wrong_clock_is_named_for_a_while() -> None:
    post = Post()
    datagram = post.gate.seal(REQUEST, MESSAGE_ID, BODY)
    assert post.gate.problem == ""
    post.wall.now += 90_000
    post.opens(datagram, ("2001:db8::7", 4747))
    assert post.gate.problem == ("the clock of [2001:db8::7]:4747 and this machine's differ by 90 s: set the wrong one")
    post.steady.now += 61
    assert post.gate.problem == ""


def test_a_request_passes_once_and_a_reply_is_not_remembered() -> None:
    post = Post()
    request, reply = (post.gate.seal(kind, MESSAGE_ID, BODY) for kind in (REQUEST, REPLY))
    assert [post.opens(request) for _ in range(3)] == [True, False, False]
    assert [post.opens(reply) for _ in range(2)] == [True, True]
    assert post.refused == {"replay": 2}


def test_the_memory_of_requests_is_bounded_and_forgets_what_is_too_old_to_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dht_gate, "MAX_REMEMBERED", 10)
    post = Post()
    for i in range(30):
        assert post.opens(post.gate.seal(REQUEST, MESSAGE_ID, b"%d" % i))
    assert len(post.gate._remembered) == 10
    post.steady.now += 61
    post.wall.now += 61_000
    assert post.opens(post.gate.seal(REQUEST, MESSAGE_ID, BODY))
    assert len(post.gate._remembered) == 1


def test_an_unknown_kind_does_not_pass() -> None:
    post = Post()
    assert not post.opens(post.gate.seal(2, MESSAGE_ID, BODY))
    assert post.refused == {"kind": 1}


@pytest.mark.parametrize("n_bytes", [0, 1, HEADER_BYTES, MAX_DATAGRAM_BYTES + 1, 65_507])
def test_sizes(n_bytes: int) -> None:
    post = Post()
    assert not post.opens(bytes(n_bytes))
    assert post.refused == {"size": 1}


# floods


def noise(rng: random.Random) -> bytes:
    return rng.randbytes(100)


def test_a_noisy_address_is_not_listened_to_and_others_are() -> None:
    rng, post = random.Random(1), Post()
    assert not any(post.opens(noise(rng)) for _ in range(500))
    assert post.refused["mac"] == 101
    assert post.refused["flood"] == 399
    assert not post.opens(post.gate.seal(REQUEST, MESSAGE_ID, BODY)), "it has to wait"
    assert post.opens(post.gate.seal(REQUEST, MESSAGE_ID, BODY), ("192.0.2.77", 1))
    post.steady.now += 1
    assert post.opens(post.gate.seal(REQUEST, MESSAGE_ID, b"later"))
    for _ in range(500):
        post.opens(noise(rng))
    assert 150 <= post.refused["mac"] <= 153, "fifty are earned in a second"


def test_a_noisy_v6_customer_is_one_address() -> None:
    rng, post = random.Random(1), Post()
    for i in range(500):
        post.opens(noise(rng), (f"2001:db8::{i:x}", 1))
    assert post.refused["mac"] == 101


def test_contacts_and_those_we_asked_are_heard_through_any_noise() -> None:
    rng, post = random.Random(1), Post()
    for i in range(3000):
        post.opens(noise(rng), (f"192.0.{i % 250}.{i // 250}", 1))
    assert post.refused["mac"] == 2001, "two thousand at once from everywhere"
    assert not post.opens(post.gate.seal(REQUEST, MESSAGE_ID, b"a"), ("203.0.113.1", 1))
    assert post.opens(post.gate.seal(REQUEST, MESSAGE_ID, b"b"), ("203.0.113.1", 1), contact=peer(2))
    reply = post.gate.seal(REPLY, MESSAGE_ID, b"c")
    assert post.gate.open(reply, ("203.0.113.1", 1), None, is_expected=True) is not None
    request = post.gate.seal(REQUEST, MESSAGE_ID, b"d")
    assert post.gate.open(request, ("203.0.113.1", 1), None, is_expected=True) is None, "who knocks is soon asked"


def test_who_is_not_listened_to_is_told_as_long_as_that_is_so() -> None:
    post = Post()
    assert post.gate.muted() is None
    for _ in range(101):
        post.opens(b"x" * 100)
    muted = post.gate.muted()
    assert muted is not None
    assert muted.sources == {HERE[0]}
    post.steady.now = 0.05
    assert post.gate.muted() is muted
    for _ in range(101):
        post.opens(b"x" * 100, ("192.0.2.7", 1))
    both = post.gate.muted()
    assert both is not None
    assert both.sources == {HERE[0], "192.0.2.7"}
    assert both.until == muted.until == dht_gate.MUTE_S
    post.steady.now = dht_gate.MUTE_S
    assert post.gate.muted().sources == {"192.0.2.7"}  # type: ignore[union-attr]
    post.steady.now = 1.0
    assert post.gate.muted() is None
    assert post.opens(post.gate.seal(REQUEST, MESSAGE_ID, BODY))


def test_a_contact_that_is_noisy_does_not_change_who_is_told_with_each_datagram() -> None:
    post = Post()
    told = set()
    for _ in range(1000):
        post.opens(b"x" * 100, contact=peer(1))
        told.add(post.gate.muted())
    assert len(told) == 2  # nobody, and that address


@pytest.mark.parametrize("cause", ["noise in total", "strangers"])
def test_nobody_else_is_listened_to_while_there_is_too_much_of(cause: str) -> None:
    post = Post(budgets=Budgets(datagrams=RateBudget(1, 5)))
    if cause == "strangers":
        for i in range(600):
            post.opens(post.gate.seal(REQUEST, MESSAGE_ID, b"%d" % i))
    else:
        for i in range(6):
            post.opens(b"x" * 100, (f"192.0.2.{i}", 1))
    muted = post.gate.muted()
    assert muted is not None
    assert muted.sources is None
    assert not post.opens(post.gate.seal(REQUEST, MESSAGE_ID, b"of a stranger"))
    assert post.refused["flood"] > 0
    assert post.opens(post.gate.seal(REQUEST, MESSAGE_ID, b"of a contact"), contact=peer(1))
    post.steady.now = 2 * dht_gate.MUTE_S
    assert post.gate.muted() is None
    assert post.opens(post.gate.seal(REQUEST, MESSAGE_ID, b"of a stranger, later"))


def test_the_list_of_noisy_addresses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_gate, "MAX_MUTED", 10)
    rng = random.Random(1)
    post = Post(budgets=Budgets(datagrams_per_address=RateBudget(1, 1), datagrams=RateBudget(1e6, 10**6)))
    for i in range(300):
        for _ in range(2):
            post.opens(noise(rng), (f"192.0.2.{i % 250}", 1))
    assert len(post.gate._muted_until) <= 10


def test_each_contact_has_a_quota_and_strangers_share_one() -> None:
    post = Post()
    datagrams = [post.gate.seal(REQUEST, MESSAGE_ID, b"%d" % i) for i in range(3000)]
    greedy = sum(post.opens(datagram, contact=peer(1)) for datagram in datagrams[:1000])
    strangers = sum(post.opens(datagram) for datagram in datagrams[1000:2000])
    modest = sum(post.opens(datagram, contact=peer(2)) for datagram in datagrams[2000:2100])
    assert (greedy, strangers, modest) == (400, 500, 100)
    assert post.refused == {"quota": 601, "flood": 499}  # nobody listens to strangers once they have none left


def test_a_replay_costs_its_victim_no_quota() -> None:
    post = Post()
    datagram = post.gate.seal(REQUEST, MESSAGE_ID, BODY)
    for _ in range(5000):
        post.opens(datagram, contact=peer(1))
    assert post.opens(post.gate.seal(REQUEST, MESSAGE_ID, b"next"), contact=peer(1))


def test_in_the_open_swarm_everyone_is_a_member_with_a_key() -> None:
    trust = open_trust(1)
    assert isinstance(trust, OpenTrust)
    assert trust.is_open
    assert trust.chain() == ()
    assert trust.admits(b"any key", ())
    assert not trust.is_revoked(peer(2))
    assert message_id_of(Actor(trust, Clock(NOW_MS)).ask([], MESSAGE_ID)) == MESSAGE_ID
