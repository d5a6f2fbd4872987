"""News of a swarm: how fast a revocation reaches everybody, who is told and who is not, and what lies can do.

Strategy: real `NewsDesk`s and real state directories on a mock clock; links are pairs of objects that pass messages on.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from swarm_helpers import NOWHERE, Machine, World, at_once, fill_disk
from trio.testing import MockClock

from mpd.daemon.news import FILES_S, LOOK_S, POSTS, NewsDesk, Post, admitters_key
from mpd.daemon.peers import Unreachable
from mpd.daemon.rendezvous import MemoryBoard, MemoryRendezvous
from mpd.errors import PeerError
from mpd.identity import OPEN_SWARM, Member, SwarmId
from mpd.ids import Endpoint, PeerId, show_peer
from mpd.messages import News

STRANGER = PeerId(b"x" * 20)
REACH_S = 60.0  # a revocation reaches every daemon that runs within this time


class FakeLink:
    """One end of a link; `far` is the other one."""

    def __init__(self, owner: "Node", other: "Node") -> None:
        self.peer = other.machine.own
        self.member: Member = owner.swarm.check(other.swarm.chain()[0])
        self.busy = 0
        self.up = True
        self.owner = owner
        self.sent: list[Any] = []
        self.far: FakeLink | None = None

    def send(self, message: Any) -> None:
        if not self.up:
            return
        self.sent.append(message)
        if self.far is not None and isinstance(message, News):
            self.far.owner.desk.on_news(self.far, message)  # type: ignore[arg-type]

    def close(self) -> None:
        for end in (self, self.far):
            if end is not None:
                end.up = False
                end.owner.peers.live.pop(end.peer, None)


class FakePeers:
    """The links of one node."""

    def __init__(self, net: "Net", node: "Node", endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.live: dict[PeerId, FakeLink] = {}
        self.calls: list[tuple[PeerId, Endpoint | None]] = []
        self.cuts: list[str] = []
        self._net = net
        self._node = node

    def links(self) -> list[Any]:
        return list(self.live.values())

    def get(self, peer: PeerId) -> Any:
        return self.live.get(peer)

    async def link(self, peer: PeerId, endpoint: Endpoint | None) -> Any:
        await trio.lowlevel.checkpoint()
        if peer in self.live:
            return self.live[peer]
        self.calls.append((peer, endpoint))
        other = next((node for node in self._net.nodes if node.peers.endpoint == endpoint), None)
        if other is None or other.machine.own != peer:
            raise Unreachable(f"nobody answers at {endpoint}")
        return self._net.connect(self._node, other)

    def recheck(self) -> None:
        for link in list(self.live.values()):
            if self._node.swarm.revocations.names(link.member):
                link.close()

    def cut(self, is_doomed: Callable[[Any], bool], reason: str) -> None:
        for link in list(self.live.values()):
            if is_doomed(link):
                self.cuts.append(reason)
                link.close()


class Node:
    """One daemon."""

    def __init__(self, net: "Net", machine: Machine, endpoint: Endpoint, rendezvous: MemoryRendezvous) -> None:
        self.machine = machine
        self.swarm = machine.load()
        self.peers = FakePeers(net, self, endpoint)
        self.rendezvous = rendezvous
        self.desk = NewsDesk(self.swarm, self.peers, rendezvous, random.Random(len(net.nodes)), at_once)


class Net:
    """All daemons of a test, running on the mock clock."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._board = MemoryBoard(trio.current_time)
        self.nodes: list[Node] = []
        self._nursery = nursery

    def start(self, machine: Machine, *, outbound_only: bool = False, elsewhere: bool = False) -> Node:
        n = len(self.nodes) + 1
        board = MemoryBoard(trio.current_time) if elsewhere else self._board
        rendezvous = MemoryRendezvous(board, machine.own)
        node = Node(self, machine, Endpoint("127.0.0.1", 0 if outbound_only else n), rendezvous)
        self.nodes.append(node)
        self._nursery.start_soon(node.desk.run)
        return node

    def connect(self, a: Node, b: Node) -> FakeLink:
        """Link two daemons, which tell each other their numbers."""
        near, far = FakeLink(a, b), FakeLink(b, a)
        near.far, far.far = far, near
        a.peers.live[near.peer], b.peers.live[far.peer] = near, far
        seqs = b.swarm.news_seq, a.swarm.news_seq
        a.desk.on_link_up(near, seqs[0])  # type: ignore[arg-type]
        b.desk.on_link_up(far, seqs[1])  # type: ignore[arg-type]
        return near


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def owner(world: World) -> Machine:
    return world.owner()


@pytest.fixture
def net(nursery: trio.Nursery) -> Net:
    return Net(nursery)


# -------------------------------------------------------------------------------------------------------------- gossip


async def test_who_meets_brings_the_other_up_to_date(
    world: World, owner: Machine, net: Net, autojump_clock: MockClock
) -> None:
    late = world.member(owner)
    owner.revoke(STRANGER)
    informed, behind = net.start(world.member(owner)), net.start(late)
    assert (informed.swarm.news_seq, behind.swarm.news_seq) == (2, 1)
    link = net.connect(informed, behind)
    assert behind.swarm.is_revoked(STRANGER)
    assert behind.swarm.datagram_keys() == informed.swarm.datagram_keys()
    assert (len(link.sent), len(link.far.sent if link.far else [])) == (1, 0)
    await trio.sleep(FILES_S + 1)
    assert late.load().news_seq == 2


async def test_who_is_equal_says_nothing(world: World, owner: Machine, net: Net, autojump_clock: MockClock) -> None:
    a, b = net.start(world.member(owner)), net.start(world.member(owner))
    link = net.connect(a, b)
    assert link.far is not None
    assert (link.sent, link.far.sent) == ([], [])


async def test_a_revocation_that_the_swarm_outran_is_not_lost_in_silence(
    world: World, owner: Machine, net: Net, autojump_clock: MockClock
) -> None:
    informed_machine = world.member(owner)
    old = owner.store.news()
    for name in (b"y", b"z"):
        owner.revoke(PeerId(name * 20))
    informed_machine.store.exchange_news(owner.store.news())
    owner.store.save_news(old)  # a backup is restored
    owner.revoke(STRANGER)
    informed, restored = net.start(informed_machine), net.start(owner)
    net.connect(informed, restored)
    assert not restored.swarm.is_revoked(STRANGER)
    assert f"does not revoke {show_peer(STRANGER)}: run `mpd swarm revoke` again" in restored.desk.problem
    assert informed.desk.problem == ""
    await trio.sleep(FILES_S + 1)
    owner.revoke(STRANGER)
    await trio.sleep(FILES_S + 1)
    assert informed.swarm.is_revoked(STRANGER)
    assert restored.desk.problem == ""


async def test_news_travel_along_links_and_not_in_circles(
    world: World, owner: Machine, net: Net, autojump_clock: MockClock
) -> None:
    nodes = [net.start(world.member(owner)) for _ in range(5)]
    first = net.start(owner)
    ring = [first, *nodes]
    links = [net.connect(a, b) for a, b in zip(ring, [*ring[1:], first], strict=True)]
    owner.revoke(STRANGER)
    await trio.sleep(FILES_S)
    await trio.testing.wait_all_tasks_blocked()
    assert all(node.swarm.news_seq == 2 for node in ring)
    assert sum(len(end.sent) for link in links for end in (link, link.far) if end) <= 2 * len(links)


async def test_the_revoked_lose_their_links_and_never_see_the_new_key(
    world: World, owner: Machine, net: Net, autojump_clock: MockClock
) -> None:
    middle, doomed_machine = net.start(world.member(owner)), world.member(owner)
    doomed, first = net.start(doomed_machine), net.start(owner)
    net.connect(first, middle)
    link, far = net.connect(middle, doomed), net.connect(first, doomed)
    owner.revoke(doomed_machine.own)
    await trio.sleep(FILES_S)
    await trio.testing.wait_all_tasks_blocked()
    assert not link.up
    assert not far.up
    assert (link.sent, far.sent) == ([], [])
    assert doomed.swarm.news_seq == 1
    assert set(middle.peers.live) == {owner.own}
    assert middle.swarm.swarm_news.keys[0].key not in doomed.swarm.datagram_keys()


async def test_forged_news_cost_the_sender_its_link_and_nothing_else(
    world: World, owner: Machine, net: Net, autojump_clock: MockClock
) -> None:
    a, b = net.start(world.member(owner)), net.start(world.member(owner))
    other = world.owner("elsewhere")
    other.revoke(STRANGER)
    forged = other.load().news()
    assert forged is not None
    link = net.connect(a, b)
    with pytest.raises(PeerError):
        a.desk.on_news(link, forged)  # type: ignore[arg-type]
    assert a.swarm.news_seq == 1


# --------------------------------------------------------------------------------------------------------------- files


async def test_a_command_on_this_machine_is_noticed(owner: Machine, net: Net, autojump_clock: MockClock) -> None:
    node = net.start(owner)
    await trio.sleep(3.5 * FILES_S)
    owner.revoke(STRANGER)
    await trio.sleep(FILES_S)
    assert node.swarm.is_revoked(STRANGER)


async def test_on_a_full_disk_the_list_counts_and_is_written_later(
    world: World, owner: Machine, net: Net, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    machine = world.member(owner)
    node = net.start(machine)
    owner.revoke(STRANGER)
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch)
        net.connect(net.start(owner), node)
        await trio.sleep(10 * FILES_S)
        assert node.swarm.is_revoked(STRANGER)
        assert "news.json cannot be written: No space left on device" in node.desk.problem
        assert machine.load().news_seq == 1
    assert caplog.text.count("news.json cannot be written") == 1
    await trio.sleep(2 * LOOK_S)
    assert node.desk.problem == ""
    assert machine.load().news_seq == 2


async def test_a_damaged_file_is_a_problem_and_no_end(
    world: World, owner: Machine, net: Net, autojump_clock: MockClock
) -> None:
    machine = world.member(owner)
    node = net.start(machine)
    await trio.sleep(1)
    (machine.store.folder / "news.json").write_bytes(b"junk")
    await trio.sleep(FILES_S)
    assert "news.json is damaged" in node.desk.problem
    assert (machine.store.folder / "news.json").read_bytes() == b"junk"
    owner.revoke(STRANGER)
    net.connect(net.start(owner), node)
    assert node.swarm.is_revoked(STRANGER)


async def test_a_daemon_says_that_it_is_revoked_itself(
    world: World, owner: Machine, net: Net, autojump_clock: MockClock
) -> None:
    machine = world.member(owner)
    node = net.start(machine)
    assert node.desk.problem == ""
    owner.revoke(machine.own)
    machine.store.exchange_news(owner.store.news())
    await trio.sleep(FILES_S)
    await trio.testing.wait_all_tasks_blocked()
    assert "is revoked in swarm lab" in node.desk.problem


# ----------------------------------------------------------------------------------------------------------- admitters


async def test_a_revocation_reaches_idle_daemons_within_a_minute(
    world: World, owner: Machine, net: Net, autojump_clock: MockClock
) -> None:
    first = net.start(owner)
    nodes = [net.start(world.member(owner), outbound_only=n % 2 == 1) for n in range(12)]
    await trio.sleep(100.0)
    owner.revoke(STRANGER)
    await trio.sleep(REACH_S)
    assert all(node.swarm.is_revoked(STRANGER) for node in (first, *nodes))
    await trio.sleep(10.0)
    assert not first.peers.live  # links for news only do not stay


async def test_a_link_that_a_round_uses_stays(
    world: World, owner: Machine, net: Net, autojump_clock: MockClock
) -> None:
    node, first = net.start(world.member(owner)), net.start(owner)
    used = net.connect(node, first)
    await trio.sleep(2 * LOOK_S)
    assert used.up
    owner.revoke(STRANGER)
    await trio.sleep(REACH_S)
    assert used.up
    assert node.swarm.news_seq == 2


async def test_only_who_may_admit_and_can_be_dialled_is_announced(
    world: World, owner: Machine, net: Net, autojump_clock: MockClock
) -> None:
    admitter = net.start(world.member(owner, "admitter"))
    node = net.start(world.member(owner))
    net.start(world.member(owner, "admitter"), outbound_only=True)
    first = net.start(owner)
    await trio.sleep(LOOK_S * 1.5)
    found = {
        record.publisher: POSTS.decode(record.value)
        for record in await node.rendezvous.seek(admitters_key(node.swarm.swarm_id))
    }
    assert found == {
        owner.own: Post("127.0.0.1", first.peers.endpoint.port, 1, is_root=True),
        admitter.machine.own: Post("127.0.0.1", admitter.peers.endpoint.port, 1, is_root=False),
    }
    candidates = await node.desk.admitters()
    assert {each.peer for each in candidates if each.is_root} == {owner.own}
    assert sorted(each.peer for each in candidates) == sorted(found)
    world.clock.now_s += 31 * 86400.0
    await trio.sleep(LOOK_S * 1.5)
    assert await node.rendezvous.seek(admitters_key(node.swarm.swarm_id)) == ()


async def test_an_admitter_that_has_moved_is_remembered_where_it_is(
    world: World, owner: Machine, net: Net, autojump_clock: MockClock
) -> None:
    machine = world.member(owner)
    first = net.start(owner)
    net.start(machine)
    net.start(world.member(owner, "admitter"))  # of whom nothing is remembered: anybody may say that he admits
    await trio.sleep(LOOK_S * 1.5)
    assert machine.store.admitters() == {owner.own: (first.peers.endpoint,)}


async def test_without_the_dht_a_remembered_admitter_is_called(
    world: World, owner: Machine, net: Net, autojump_clock: MockClock
) -> None:
    machine = world.member(owner)
    first = net.start(owner, elsewhere=True)  # with a datagram key that is too new for others to hear it
    machine.store.remember_admitter(owner.own, first.peers.endpoint)
    owner.revoke(STRANGER)
    await trio.sleep(FILES_S)
    await trio.testing.wait_all_tasks_blocked()
    node = net.start(machine)
    await trio.sleep(1.0)
    assert node.swarm.is_revoked(STRANGER)


async def test_who_promises_news_and_has_none_is_asked_ever_less(
    world: World, owner: Machine, net: Net, autojump_clock: MockClock
) -> None:
    liar, victim = net.start(world.member(owner)), net.start(world.member(owner))
    key = admitters_key(victim.swarm.swarm_id)
    seq = 100

    async def lie() -> None:
        nonlocal seq
        while True:
            seq += 1
            elsewhere = POSTS.encode(Post("192.0.2.80", 80, seq))
            await liar.rendezvous.announce(key, elsewhere, 60.0)
            await trio.sleep(5.0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lie)
        await trio.sleep(3600.0)
        nursery.cancel_scope.cancel()
    to_liar = [endpoint for peer, endpoint in victim.peers.calls if peer == liar.machine.own]
    assert 1 <= len(to_liar) <= 8
    owner.revoke(STRANGER)
    net.start(owner)
    await trio.sleep(REACH_S)
    assert victim.swarm.is_revoked(STRANGER)


async def test_junk_in_the_dht_is_nothing(world: World, owner: Machine, net: Net, autojump_clock: MockClock) -> None:
    node, other = net.start(world.member(owner)), net.start(world.member(owner))
    await other.rendezvous.announce(admitters_key(node.swarm.swarm_id), b"junk", 60.0)
    await trio.sleep(2 * LOOK_S)
    assert [each.endpoint for each in await node.desk.admitters()] == [NOWHERE]


async def test_in_an_open_swarm_there_are_no_news(world: World, net: Net, autojump_clock: MockClock) -> None:
    a, b = net.start(world.machine()), net.start(world.machine())
    await trio.sleep(100.0)
    assert a.rendezvous._records == {}
    assert (a.desk.problem, a.swarm.news()) == ("", None)
    a.desk.on_link_up(None, 0)  # type: ignore[arg-type]
    assert b.peers.calls == []


# --------------------------------------------------------------------------------------------------------------- posts


def test_every_swarm_has_a_key_of_its_own() -> None:
    assert len(admitters_key(OPEN_SWARM)) == 20
    assert admitters_key(OPEN_SWARM) != admitters_key(SwarmId(bytes(20)))


def test_a_post_is_read_as_it_was_written() -> None:
    post = Post("2001:db8::7", 4747, 3, is_root=True)
    assert POSTS.decode(POSTS.encode(post)) == post


@pytest.mark.parametrize(
    "post", [b'\x92\xa4post\x84\xa4host\xa1a\xa4port\x00\xa4news\x01\xa7is_root\xc2', b"\x90"], ids=["port 0", "empty"]
)  # fmt: skip
def test_impossible_posts_are_refused(post: bytes) -> None:
    with pytest.raises(PeerError):
        POSTS.decode(post)


@given(st.binary(max_size=100))
def test_any_bytes_are_a_post_or_the_publishers_fault(raw: bytes) -> None:
    try:
        assert isinstance(POSTS.decode(raw), Post)
    except PeerError as error:
        assert "malformed" in str(error)  # noqa: PT017
