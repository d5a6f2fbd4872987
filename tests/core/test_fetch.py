"""Fetching a state: every chunk arrives once its hash is right, whoever lies, dies, sleeps or comes back meanwhile."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mpd.fetch import ON_ORDER, RESCUE_S, SILENT_S, Fetch
from mpd.ids import PeerId
from mpd.manifest import Manifest, chunk_hash

N = 10


def peer(number: int) -> PeerId:
    return PeerId(bytes([number]) * 20)


def chunk(number: int) -> bytes:
    return bytes([number]) * 4


def manifest(n: int = N) -> Manifest:
    """Return a manifest whose chunks are as short as a test likes; nothing in `Fetch` goes by their sizes."""
    hashes = b"".join(chunk_hash(chunk(i)) for i in range(n))
    return Manifest(bytes(32), bytes(16), 1, n << 20, hashes)


def fetch(n_sources: int, n: int = N) -> Fetch:
    machine = Fetch(manifest(n))
    for i in range(n_sources):
        machine.add(0.0, peer(i))
    return machine


def ordered(machine: Fetch, now: float = 0.0) -> dict[PeerId, tuple[int, ...]]:
    return dict(machine.orders(now))


def test_sources_share_the_work_and_none_has_more_than_a_few_on_order() -> None:
    machine = fetch(2)
    orders = ordered(machine)
    assert orders == {peer(0): (0, 2, 4, 6), peer(1): (1, 3, 5, 7)}
    assert ordered(machine) == {}
    assert machine.on_chunk(1.0, peer(1), 3, chunk(3))
    assert ordered(machine, 1.0) == {peer(1): (8,)}


def test_all_arrives_and_who_delivered_is_known() -> None:
    machine = fetch(3)
    while not machine.is_done:
        for source, chunks in machine.orders(0.0):
            for each in chunks:
                assert machine.on_chunk(0.0, source, each, chunk(each))
    assert sum(machine.delivered.values()) == N
    assert set(machine.delivered) == {peer(i) for i in range(3)}
    assert ordered(machine) == {}


def test_what_a_lost_source_owed_is_asked_of_others_and_it_may_come_back() -> None:
    machine = fetch(2)
    owed = ordered(machine)[peer(0)]
    machine.lose(peer(0))
    for each in (1, 3, 5, 7):
        machine.on_chunk(0.0, peer(1), each, chunk(each))
    assert ordered(machine)[peer(1)] == owed
    machine.add(1.0, peer(0))
    assert set(machine.sources) == {peer(0), peer(1)}


def test_a_wrong_chunk_costs_its_source_everything() -> None:
    machine = fetch(2)
    ordered(machine)
    assert not machine.on_chunk(0.0, peer(0), 2, chunk(3))
    assert machine.dropped == {peer(0): "what it sent as chunk 2 is something else"}
    machine.add(0.0, peer(0))
    assert machine.sources == (peer(1),)
    assert not machine.on_chunk(0.0, peer(0), 4, chunk(4))  # not even what is right


@pytest.mark.parametrize("payload", [b"", chunk(9)[:3], chunk(9) + b"\0", bytes(1 << 20)])
def test_a_chunk_of_another_size_is_a_wrong_one(payload: bytes) -> None:
    machine = fetch(1)
    ordered(machine)
    assert not machine.on_chunk(0.0, peer(0), 3, payload)
    assert list(machine.dropped) == [peer(0)]


def test_what_was_not_ordered_is_nothing() -> None:
    machine = fetch(2)
    ordered(machine)
    for source, number in ((peer(0), 1), (peer(1), 9), (peer(7), 0), (peer(0), 1 << 40), (peer(0), -1)):
        assert not machine.on_chunk(0.0, source, number, chunk(number % 256))
    assert machine.dropped == {}
    assert machine.n_missing == N


def test_who_is_silent_is_dropped_and_who_owes_nothing_is_not() -> None:
    machine = fetch(2, n=ON_ORDER)
    machine.lose(peer(1))
    ordered(machine)
    machine.add(0.0, peer(1))
    machine.on_tick(SILENT_S - 0.1)
    assert machine.dropped == {}
    machine.on_tick(SILENT_S)
    assert machine.dropped == {peer(0): "it delivered nothing for 10 s"}
    assert ordered(machine, SILENT_S) == {peer(1): tuple(range(ON_ORDER))}


def test_a_chunk_that_got_lost_is_ordered_again() -> None:
    machine = fetch(1)
    assert ordered(machine) == {peer(0): (0, 1, 2, 3)}
    for now in (3.0, 6.0, 9.0):
        machine.on_chunk(now, peer(0), int(now) // 3, chunk(int(now) // 3))
        ordered(machine, now)
    machine.on_tick(SILENT_S)
    assert machine.dropped == {}
    assert 0 in ordered(machine, SILENT_S)[peer(0)]


def test_whoever_is_free_delivers_what_another_one_owes_for_long() -> None:
    machine = fetch(2, n=2)
    assert ordered(machine) == {peer(0): (0,), peer(1): (1,)}
    assert machine.on_chunk(0.1, peer(1), 1, chunk(1))
    assert ordered(machine, RESCUE_S - 0.1) == {}
    assert ordered(machine, RESCUE_S) == {peer(1): (0,)}
    assert ordered(machine, RESCUE_S + 5) == {}  # twice at most
    assert machine.on_chunk(RESCUE_S, peer(1), 0, chunk(0))
    assert machine.is_done
    assert not machine.on_chunk(RESCUE_S, peer(0), 0, chunk(0))  # too late, and no harm
    assert machine.dropped == {}


def test_what_is_here_already_is_not_ordered() -> None:
    machine = fetch(1)
    for each in range(N - 1):
        machine.have(each)
        machine.have(each)
    assert ordered(machine) == {peer(0): (N - 1,)}
    assert machine.n_missing == 1


class Anything(RuleBasedStateMachine):
    """Sources that come, go, lie and deliver in any order. Nothing wrong is ever kept, nothing is kept twice."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Fetch(manifest())
        self.now = 0.0
        self.owed: dict[PeerId, set[int]] = {}
        self.kept: set[int] = set()

    @rule(number=st.integers(0, 3))
    def come(self, number: int) -> None:
        self.machine.add(self.now, peer(number))

    @rule(number=st.integers(0, 3))
    def go(self, number: int) -> None:
        self.machine.lose(peer(number))

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.machine.on_tick(self.now)

    @rule()
    def order(self) -> None:
        for source, chunks in self.machine.orders(self.now):
            assert source in self.machine.sources
            assert len(chunks) <= ON_ORDER
            assert not set(chunks) & self.kept
            self.owed.setdefault(source, set()).update(chunks)

    @precondition(lambda self: any(self.owed.values()))
    @rule(data=st.data(), is_right=st.sampled_from([True, True, True, False]))
    def deliver(self, data: st.DataObject, is_right: bool) -> None:
        source = data.draw(st.sampled_from(sorted(peer for peer, chunks in self.owed.items() if chunks)))
        number = data.draw(st.sampled_from(sorted(self.owed[source])))
        self.owed[source].discard(number)
        if self.machine.on_chunk(self.now, source, number, chunk(number) if is_right else b"lie"):
            assert is_right
            assert number not in self.kept
            self.kept.add(number)

    @rule(number=st.integers(0, 3), which=st.integers(-2, 2 * N))
    def send_unasked(self, number: int, which: int) -> None:
        if which not in self.owed.get(peer(number), ()):
            assert not self.machine.on_chunk(self.now, peer(number), which, b"lie")

    @invariant()
    def counts_what_it_has(self) -> None:
        assert self.machine.n_missing == N - len(self.kept)
        assert not set(self.machine.sources) & set(self.machine.dropped)

    def teardown(self) -> None:
        """One honest source is enough to end it, whatever has happened."""
        honest = peer(200)
        self.machine.add(self.now, honest)
        for _ in range(20 * N):
            self.now += RESCUE_S
            self.machine.on_tick(self.now)
            for source, chunks in self.machine.orders(self.now):
                for each in chunks if source == honest else ():
                    if self.machine.on_chunk(self.now, honest, each, chunk(each)):
                        self.kept.add(each)
        assert self.machine.is_done
        assert self.kept == set(range(N))


TestAnything = Anything.TestCase


@given(st.permutations(range(N)), st.integers(1, 4))
def test_the_order_of_arrival_does_not_matter(order: list[int], n_sources: int) -> None:
    machine = fetch(n_sources)
    waiting: dict[int, PeerId] = {}
    while not machine.is_done:
        waiting.update({each: source for source, chunks in machine.orders(0.0) for each in chunks})
        number = min(waiting, key=order.index)
        assert machine.on_chunk(0.0, waiting.pop(number), number, chunk(number))
    assert sum(machine.delivered.values()) == N
