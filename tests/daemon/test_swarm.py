"""The swarm as links and the DHT see it: who is a member now, which keys count, and what changes when."""

import dataclasses
import ssl
import threading
import time
from pathlib import Path

import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding
from daemon_helpers import HANG_S, stream_of, tcp_pair
from swarm_helpers import DAY_S, HOUR_S, START_S, Machine, World

from mpd.daemon.swarm import GRACE_S, TURN_S, Swarm, new_serial, verify_lapsed
from mpd.daemon.swarm_store import KEPT_KEY_S
from mpd.daemon.tls import Unwelcome, wrap_client, wrap_server
from mpd.errors import Fatal, LocalError, PeerError
from mpd.identity import OPEN_DATAGRAM_KEY, OPEN_SWARM, Member, member_of, open_root, verify_member
from mpd.ids import PeerId, peer_id_of
from mpd.messages import News

STRANGER = PeerId(b"x" * 20)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def owner(world: World) -> Machine:
    return world.owner()


def leaf_of(machine: Machine) -> bytes:
    return machine.store.chain()[0]


def tell(swarm: Swarm, news: News | None) -> bool:
    assert news is not None
    return swarm.learn(news.revocations, news.datagram_key)


# ---------------------------------------------------------------------------------------------------------------- open


def test_without_a_folder_the_swarm_is_open(world: World) -> None:
    machine = world.machine()
    swarm = machine.load()
    assert swarm.is_open
    assert (swarm.name, swarm.swarm_id, swarm.role) == ("open", OPEN_SWARM, "member")
    assert (swarm.chain(), swarm.datagram_keys()) == ((), (OPEN_DATAGRAM_KEY,))
    assert swarm.news() is None
    assert swarm.news_seq == 0
    assert swarm.bootstrap() == ()
    assert not swarm.may_admit
    assert not swarm.has_root_key()
    assert swarm.admits(b"anybody's key, 32 bytes and long", ())
    assert not swarm.is_revoked(machine.own)
    assert sorted(path.name for path in machine.path.iterdir()) == ["key.pem", "lock.files"]


def test_a_daemon_of_the_open_swarm_renews_itself_for_ever(world: World) -> None:
    swarm = world.machine().load()
    for _ in range(20):
        assert swarm.renewed_here() is None
        old = swarm.server_context()
        assert swarm.server_context() is old
        world.clock.now_s += 4 * DAY_S
        assert swarm.leaf_is_due()
        chain = swarm.renewed_here()
        assert chain is not None
        assert swarm.adopt(chain)
        assert swarm.server_context() is not old
        assert swarm.not_after_s == world.clock() + 7 * DAY_S
        assert verify_member(chain, open_root()[1], world.clock()).peer == swarm.own


def test_nobody_brings_news_into_an_open_swarm(world: World, owner: Machine) -> None:
    with pytest.raises(PeerError, match="news of a private swarm in an open one"):
        tell(world.machine().load(), owner.load().news())


def test_an_open_swarm_admits_nobody(world: World) -> None:
    swarm = world.machine().load()
    with pytest.raises(LocalError, match="is no admitter of swarm open"):
        swarm.issue(bytes(32), "member")
    with pytest.raises(LocalError, match="the root key is needed"):
        swarm.issue_admitter(bytes(32))


# ------------------------------------------------------------------------------------------------------------- private


def test_the_owner_is_an_admitter_with_the_root_key(owner: Machine) -> None:
    swarm = owner.load()
    assert not swarm.is_open
    assert (swarm.name, swarm.role, swarm.news_seq) == ("lab", "admitter", 1)
    assert swarm.may_admit
    assert swarm.has_root_key()
    assert swarm.not_after_s == START_S + 7 * DAY_S
    assert swarm.admits_until_s == START_S + 30 * DAY_S
    assert swarm.status() == {
        "name": "lab", "id": swarm.status()["id"], "open": False, "role": "admitter", "expires_in_s": 7 * DAY_S,
        "admits": True, "revoked": 0, "news": 1,
    }  # fmt: skip


def test_members_recognise_each_other(world: World, owner: Machine) -> None:
    a, b = world.member(owner), world.member(owner, "observer")
    swarm = a.load()
    assert swarm.check(leaf_of(b)).role == "observer"
    assert swarm.check(leaf_of(b)).issuer == owner.own
    assert swarm.admits(b.public, b.store.chain())
    assert swarm.admits(owner.public, owner.store.chain())
    assert swarm.sign(b"text") == a.key.sign(b"text")
    assert peer_id_of(swarm.public_key) == swarm.own == a.own


def test_a_chain_proves_its_own_key_only(world: World, owner: Machine) -> None:
    a, b = world.member(owner), world.member(owner)
    assert not a.load().admits(a.public, b.store.chain())
    assert not a.load().admits(b.public, ())
    assert not a.load().admits(b.public, (b"junk",))
    assert not a.load().admits(b.public, b.store.chain()[:1])


def test_strangers_are_not_admitted(world: World, owner: Machine) -> None:
    other = world.owner("elsewhere")
    swarm = owner.load()
    assert not swarm.admits(other.public, other.store.chain())
    with pytest.raises(PeerError, match="is not for swarm"):
        swarm.check(leaf_of(other))
    with pytest.raises(PeerError):
        swarm.check(open_root()[1].public_bytes(Encoding.DER))


def test_a_member_is_one_as_long_as_its_certificate_says(world: World, owner: Machine) -> None:
    member, swarm = world.member(owner), owner.load()
    chain = member.store.chain()
    for now_s, is_member in (
        (START_S - 4 * HOUR_S, True),
        (START_S + 7 * DAY_S, True),
        (START_S + 7 * DAY_S + 1, False),
        (START_S - 4 * HOUR_S - 1, False),
        (START_S, True),
    ):
        world.clock.now_s = now_s
        assert swarm.admits(member.public, chain) is is_member
        assert owner.load().admits(member.public, chain) is is_member  # with nothing remembered


def test_the_memory_of_verified_chains_is_bounded(owner: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpd.daemon.swarm._MAX_VERIFIED", 2)
    swarm = owner.load()
    for n in range(5):
        public = bytes([n]) * 32
        assert swarm.admits(public, swarm.issue(public, "member"))
    assert len(swarm._verified) == 2


def test_contexts_are_made_once_for_a_certificate(owner: Machine) -> None:
    swarm = owner.load()
    made = [
        swarm.server_context(),
        swarm.client_context(),
        swarm.client_context(pinned=False),
        swarm.admission_context(),
    ]
    assert len({id(each) for each in made}) == 4
    assert [each.check_hostname for each in made] == [False, True, False, False]
    assert all(each.verify_mode == ssl.CERT_REQUIRED for each in made)
    again = [
        swarm.server_context(),
        swarm.client_context(),
        swarm.client_context(pinned=False),
        swarm.admission_context(),
    ]
    assert all(a is b for a, b in zip(made, again, strict=True))


def test_another_key_than_that_of_the_certificate_is_fatal(world: World, owner: Machine) -> None:
    (owner.path / "key.pem").write_bytes((world.machine().path / "key.pem").read_bytes())
    with pytest.raises(Fatal, match=r"restore key\.pem, or move .*swarm away and join again with a new invite"):
        Machine(owner.path, world.clock, 1).load()


@pytest.mark.parametrize("what", ["of another swarm", "without its issuer", "nothing"])
def test_a_chain_that_does_not_hold_is_fatal(world: World, owner: Machine, what: str) -> None:
    chains = {
        "of another swarm": world.owner("elsewhere").store.chain(),
        "without its issuer": owner.store.chain()[:1],
        "nothing": (),
    }
    owner.store.save_chain(chains[what])
    with pytest.raises(Fatal, match=r"chain\.pem is damaged"):
        owner.load()


@pytest.mark.parametrize("shift_s", [-400 * DAY_S, -5 * HOUR_S, 8 * DAY_S, 400 * DAY_S])
def test_a_daemon_starts_with_a_lapsed_certificate_or_a_wrong_clock(
    world: World, owner: Machine, shift_s: float
) -> None:
    member = world.member(owner)
    world.clock.now_s += shift_s
    assert member.load().not_after_s == START_S + 7 * DAY_S


def test_a_lapsed_chain_is_judged_as_of_its_end(world: World, owner: Machine) -> None:
    chain, root = world.member(owner).store.chain(), owner.store.root()
    much_later = START_S + 300 * DAY_S
    with pytest.raises(PeerError, match="expired"):
        verify_member(chain, root, much_later, GRACE_S)
    assert verify_lapsed(chain, root, much_later).not_after_s == START_S + 7 * DAY_S
    with pytest.raises(PeerError):
        verify_lapsed(chain[:1], root, much_later)
    with pytest.raises(PeerError, match="there is no certificate"):
        verify_lapsed((), root, much_later)


# --------------------------------------------------------------------------------------------------------- real TLS


async def shake_hands(caller: Swarm, called: Swarm) -> tuple[Member, Member]:
    """Return whom each of the two has met."""
    near, far = (stream_of(sock) for sock in tcp_pair())
    met: dict[str, Member] = {}

    async def answer() -> None:
        met["called"] = (await wrap_server(far, called))[1]

    with trio.fail_after(HANG_S):
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer)
                met["caller"] = (await wrap_client(near, caller, called.own))[1]
        finally:
            for stream in (near, far):
                await trio.aclose_forcefully(stream)
    return met["caller"], met["called"]


async def test_members_meet_whoever_let_them_in(tmp_path: Path) -> None:
    world = World(tmp_path, time.time())  # OpenSSL goes by the clock of the machine
    owner = world.owner()
    admitter = world.member(owner, "admitter")
    swarms = [each.load() for each in (owner, admitter, world.member(owner), world.member(admitter, "observer"))]
    for caller in swarms:
        for called in swarms:
            if caller is not called:
                by_caller, by_called = await shake_hands(caller, called)
                assert (by_caller.peer, by_called.peer) == (called.own, caller.own)
                assert by_called.role == caller.role


async def test_strangers_and_the_revoked_do_not_get_past_the_handshake(tmp_path: Path) -> None:
    world = World(tmp_path, time.time())
    owner = world.owner()
    member, doomed = world.member(owner).load(), world.member(owner).load()
    others = [world.owner("elsewhere").load(), world.machine().load()]
    for stranger in others:
        for pair in ((stranger, member), (member, stranger)):
            with pytest.raises(ExceptionGroup) as caught:
                await shake_hands(*pair)
            assert caught.value.split(PeerError)[1] is None
    await shake_hands(doomed, member)
    owner.revoke(doomed.own)
    tell(member, owner.load().news())
    with pytest.RaisesGroup(pytest.RaisesExc(Unwelcome, match="is revoked in swarm lab")):
        await shake_hands(doomed, member)
    with pytest.RaisesGroup(pytest.RaisesExc(PeerError, match="is revoked in swarm lab")):
        await shake_hands(member, doomed)


async def test_peers_of_the_open_swarm_meet_by_their_keys(tmp_path: Path) -> None:
    world = World(tmp_path, time.time())
    a, b = world.machine().load(), world.machine().load()
    by_caller, by_called = await shake_hands(a, b)
    assert (by_caller.peer, by_called.peer) == (b.own, a.own)


# ---------------------------------------------------------------------------------------------------------- revocation


def test_who_is_revoked_is_no_member_and_the_others_are(world: World, owner: Machine) -> None:
    doomed, member = world.member(owner), world.member(owner)
    swarm = member.load()
    assert swarm.admits(doomed.public, doomed.store.chain())
    assert owner.revoke(doomed.own)
    assert tell(swarm, owner.load().news())
    assert not swarm.admits(doomed.public, doomed.store.chain())
    assert swarm.is_revoked(doomed.own)
    assert not swarm.is_revoked_here()
    with pytest.raises(PeerError, match="is revoked in swarm lab"):
        swarm.check(leaf_of(doomed))
    assert swarm.check(leaf_of(owner)).peer == owner.own
    assert swarm.news_seq == 2
    told = doomed.load()
    tell(told, swarm.news())
    assert told.is_revoked_here()


def test_with_an_admitter_go_those_whom_it_let_in(world: World, owner: Machine) -> None:
    admitter = world.member(owner, "admitter")
    member = world.member(admitter)
    owner.revoke(admitter.own)
    swarm = owner.load()
    with pytest.raises(PeerError, match="by an admitter that is revoked: it needs a new invite"):
        swarm.check(leaf_of(member))
    assert not swarm.admits(member.public, member.store.chain())
    assert not swarm.is_revoked(member.own)


def test_a_new_datagram_key_is_accepted_at_once_and_sent_with_later(world: World, owner: Machine) -> None:
    swarm = world.member(owner).load()
    (old,) = swarm.datagram_keys()
    owner.revoke(STRANGER)
    new = owner.store.news().keys[0].key
    assert tell(swarm, owner.load().news())
    assert swarm.datagram_keys() == owner.load().datagram_keys() == (old, new)
    world.clock.now_s += TURN_S - 1
    assert swarm.datagram_keys() == (old, new)
    world.clock.now_s += 1
    assert swarm.datagram_keys() == (new, old)
    world.clock.now_s += KEPT_KEY_S - TURN_S - 1
    assert swarm.datagram_keys() == (new, old)
    world.clock.now_s += 1
    assert swarm.datagram_keys() == (new,)


def test_after_many_revocations_at_once_the_key_that_everybody_knows_sends(owner: Machine, world: World) -> None:
    (oldest,) = owner.load().datagram_keys()
    for n in range(3):
        owner.revoke(PeerId(bytes([n]) * 20))
        world.clock.now_s += 60
    swarm = owner.load()
    assert len(swarm.datagram_keys()) == 4
    assert swarm.datagram_keys()[0] == oldest
    assert swarm.keys_to_give() == tuple(each.key for each in owner.store.news().keys[:2])
    world.clock.now_s += TURN_S
    assert swarm.datagram_keys()[0] == owner.store.news().keys[0].key


def test_old_news_and_known_news_are_no_news(world: World, owner: Machine) -> None:
    old, swarm = owner.load().news(), world.member(owner).load()
    assert not tell(swarm, old)
    owner.revoke(STRANGER)
    new = owner.load().news()
    assert tell(swarm, new)
    keys = swarm.datagram_keys()
    assert not tell(swarm, new)
    assert not tell(swarm, old)
    assert (swarm.news_seq, swarm.datagram_keys()) == (2, keys)


def test_forged_news_are_the_senders_fault_and_change_nothing(world: World, owner: Machine) -> None:
    swarm = world.member(owner).load()
    other = world.owner("elsewhere")
    other.revoke(STRANGER)
    owner.revoke(STRANGER)
    news = owner.load().news()
    assert news is not None
    flipped = bytes([news.revocations[0] ^ 1]) + news.revocations[1:]
    for forged in (
        other.load().news(),
        dataclasses.replace(news, revocations=flipped),
        dataclasses.replace(news, revocations=b""),
        dataclasses.replace(news, datagram_key=bytes(32)),
    ):
        with pytest.raises(PeerError):
            tell(swarm, forged)
    assert swarm.news_seq == 1
    assert not swarm.is_revoked(STRANGER)


def test_news_on_disk_count_if_they_are_newer(owner: Machine) -> None:
    swarm, old = owner.load(), owner.store.news()
    owner.revoke(STRANGER)
    assert swarm.take_news(owner.store.news())
    assert not swarm.take_news(owner.store.news())
    assert not swarm.take_news(old)
    assert swarm.is_revoked(STRANGER)


def test_another_thread_never_sees_half_of_a_change(world: World, owner: Machine) -> None:
    swarm = owner.load()
    lists = []
    for n in range(40):
        owner.revoke(PeerId(bytes([n]) * 20))
        lists.append(owner.store.news())
    at = {news.revocations.seq: news for news in [swarm.swarm_news, *lists]}
    done, wrong = threading.Event(), []

    def look() -> None:
        while not done.is_set():
            seen = swarm.swarm_news
            if at[seen.revocations.seq] != seen:
                wrong.append(seen)

    thread = threading.Thread(target=look)
    thread.start()
    for news in lists:
        swarm.take_news(news)
    done.set()
    thread.join()
    assert not wrong
    assert swarm.news_seq == 41


# ------------------------------------------------------------------------------------------------------------- renewal


def test_a_certificate_is_due_after_half_of_its_life(world: World, owner: Machine) -> None:
    swarm = world.member(owner).load()
    world.clock.now_s = START_S + 3.4 * DAY_S
    assert not swarm.leaf_is_due()
    world.clock.now_s = START_S + 3.5 * DAY_S
    assert swarm.leaf_is_due()
    assert swarm.renewed_here() is None  # a member cannot do that alone
    assert not swarm.admitter_is_due()


def test_a_new_chain_takes_the_place_of_the_old(world: World, owner: Machine) -> None:
    member = world.member(owner)
    swarm, context = member.load(), member.load().client_context()
    world.clock.now_s += 4 * DAY_S
    chain = owner.load().issue(member.public, "member")
    assert swarm.adopt(chain)
    assert swarm.chain() == chain
    assert swarm.client_context() is not context
    assert swarm.not_after_s == START_S + 11 * DAY_S
    assert not swarm.leaf_is_due()
    assert not swarm.adopt(chain)


def test_a_chain_for_another_or_of_nobody_is_refused(world: World, owner: Machine) -> None:
    member, swarm = world.machine(), world.member(owner).load()
    with pytest.raises(PeerError, match="for another peer than this one"):
        swarm.adopt(owner.load().issue(member.public, "member"))
    with pytest.raises(PeerError):
        swarm.adopt(world.owner("elsewhere").load().issue(swarm.public_key, "member"))


def test_an_admitter_renews_its_own_leaf_and_the_owner_its_right_too(world: World, owner: Machine) -> None:
    admitter = world.member(owner, "admitter")
    of_owner, of_admitter = owner.load(), admitter.load()
    for _ in range(10):
        world.clock.now_s += 4 * DAY_S
        for swarm in (of_owner, of_admitter):
            chain = swarm.renewed_here()
            if chain is not None:
                swarm.adopt(chain)
    assert of_owner.may_admit
    assert of_owner.admits_until_s > world.clock() + 14 * DAY_S
    assert not of_admitter.may_admit  # nobody with the root key was asked
    assert of_admitter.not_after_s == START_S + 30 * DAY_S


def test_a_right_to_admit_is_given_up_only_when_it_ends_anyway(world: World, owner: Machine) -> None:
    admitter = world.member(owner, "admitter")
    swarm = admitter.load()
    owners = owner.load()
    world.clock.now_s = START_S + 29 * DAY_S
    owners.adopt(owners.renewed_here() or ())
    assert not swarm.adopt(owners.issue(admitter.public, "admitter"))
    world.clock.now_s = START_S + 30 * DAY_S - HOUR_S
    assert swarm.adopt(owners.issue(admitter.public, "admitter"))
    assert not swarm.may_admit


def test_an_admitter_whose_right_has_ended_issues_nothing(world: World, owner: Machine) -> None:
    swarm = world.member(owner, "admitter").load()
    world.clock.now_s = START_S + 31 * DAY_S
    assert not swarm.may_admit
    assert swarm.renewed_here() is None
    with pytest.raises(LocalError):
        swarm.issue(bytes(32), "member")


def test_the_owner_comes_back_from_a_long_sleep(world: World, owner: Machine) -> None:
    world.clock.now_s = START_S + 200 * DAY_S
    swarm = owner.load()
    assert not swarm.may_admit
    chain = swarm.renewed_here()
    assert chain is not None
    assert swarm.adopt(chain)
    assert swarm.may_admit
    assert member_of(chain[0], swarm.swarm_id).role == "admitter"


@pytest.mark.parametrize(
    ("role", "invited_as", "stays"),
    [
        ("member", "member", True), ("member", "observer", True), ("member", "admitter", False),
        ("observer", "member", False), ("observer", "observer", True), ("admitter", "admitter", True),
        ("admitter", "member", True),
    ],
)  # fmt: skip
def test_a_machine_stays_what_it_is_without_a_new_invite(
    world: World, owner: Machine, role: str, invited_as: str, stays: bool
) -> None:
    machine = world.member(owner, role)
    assert machine.load().can_stay(invited_as) is stays
    world.clock.now_s = START_S + 7 * DAY_S + GRACE_S + 1
    assert not machine.load().can_stay(invited_as)


def test_who_is_revoked_cannot_stay(world: World, owner: Machine) -> None:
    machine = world.member(owner)
    owner.revoke(machine.own)
    machine.store.exchange_news(owner.store.news())
    assert not machine.load().can_stay("member")


def test_serial_numbers_fit_whatever_the_randomness() -> None:
    for byte in (0, 0x7F, 0xFF):
        assert 0 < new_serial(lambda n, byte=byte: bytes([byte]) * n) < 1 << 159
