"""What passes between daemons can be neither read nor changed, and a round survives whoever tries.

Strategy: one daemon of the swarm lives behind a `Relay`, whose address it announces as its own, so the relay sits on
the path of what others send it. For reading, the relay keeps all bytes, and the test looks for the tensors in them. For
changing, it attacks records of the data connections. Peer i contributes 2^i, so a single altered bit in any accepted
value shows in the result.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
from e2e_swarm import (
    Array,
    DaemonProcess,
    Swarm,
    averagers,
    contributors_of,
    eventually,
    new_run,
    step_all,
    wait_for_company,
)
from relay import Attack, Relay, pass_on

from mpd.client import Outcome
from mpd.wire import HEADER_BYTES

N_ELEMS = 1 << 18
LARGE_BYTES = 4096  # records from here on carry tensors
WINDOW_BYTES = 8


@pytest.fixture(scope="module")
def relay() -> Iterator[Relay]:
    with Relay() as relay:
        yield relay


@pytest.fixture(scope="module")
def four(swarm: Swarm, relay: Relay) -> list[DaemonProcess]:
    """Four daemons, of which the first lives behind the relay."""
    swarm.new("--announce", relay.address).start().wait_ready()
    relay.target = int(swarm[0].listen.rpartition(":")[2])
    joined = [swarm.new("--bootstrap", swarm[0].listen).start() for _ in range(3)]
    for daemon in joined:
        daemon.wait_ready()
    eventually(lambda: all(daemon.status()["dht"]["peers"] for daemon in joined), "all find another", swarm.log)
    return swarm.daemons


@pytest.fixture(autouse=True)
def peaceful(relay: Relay) -> Iterator[None]:
    """Every test ends with a relay that changes nothing."""
    yield
    relay.attack = pass_on


def average(daemons: list[DaemonProcess], vectors: list[Array]) -> list[Outcome]:
    """Average `vectors` in place, once, in a run of its own."""
    run = new_run()
    with averagers(daemons, run, vectors) as attached:
        wait_for_company(daemons, run)
        return step_all(attached)


def capture(relay: Relay, daemons: list[DaemonProcess], seed: int) -> tuple[bytes, list[Array]]:
    """Average once; return what was heard meanwhile, and all vectors: what went in and what came out."""
    rng = np.random.default_rng(seed)
    sent = [rng.standard_normal(N_ELEMS, np.float32) for _ in daemons]
    vectors = [vector.copy() for vector in sent]
    before = len(relay.heard)
    outcomes = average(daemons, vectors)
    assert all(len(outcome.contributors) == len(daemons) for outcome in outcomes), outcomes
    heard = b"".join(relay.heard[before:])
    assert len(heard) > sent[0].nbytes, "the relay is not on the path"
    return heard, [*sent, *vectors]


def words(raw: bytes, shift: int) -> Array:
    """Return the 8-byte words of `raw` from `shift` on."""
    n_words = (len(raw) - shift) // WINDOW_BYTES
    return np.frombuffer(raw, np.uint64, n_words, shift)


def test_a_capture_holds_no_bytes_of_the_tensors(relay: Relay, four: list[DaemonProcess]) -> None:
    heard, vectors = capture(relay, four, seed=1)
    secrets = np.concatenate([words(vector.tobytes(), 0) for vector in vectors])
    assert np.isin(words(b"xxx" + vectors[0].tobytes(), 3), secrets).all(), "this test would not see them"
    for shift in range(WINDOW_BYTES):
        assert not np.isin(words(heard, shift), secrets).any()


def test_two_captures_of_the_same_tensors_differ(relay: Relay, four: list[DaemonProcess]) -> None:
    first, vectors = capture(relay, four, seed=2)
    second, same = capture(relay, four, seed=2)
    assert vectors[0].tobytes() == same[0].tobytes()
    known = np.unique(words(first, 0))
    for shift in range(WINDOW_BYTES):
        common = np.isin(words(second, shift), known).sum()
        assert common < 0.01 * known.size, "sealed bytes repeat"  # headers hold zeros, and records of the DHT live on


# ---------------------------------------------------------------------------------------------------------- attacks


class Once:
    """An attack on the first record that is large enough, on whichever connection it comes first, and never again."""

    def __init__(self, strike: Callable[[bytes], Iterable[bytes] | None], at: int = 2) -> None:
        self.struck = 0
        self._strike = strike
        self._at = at

    def __call__(self, direction: str, number: int, record: bytes) -> Iterable[bytes] | None:
        if self.struck or number < self._at or len(record) < LARGE_BYTES:
            return (record,)
        self.struck += 1
        return self._strike(record)


def flip(record: bytes, at: int) -> bytes:
    return record[:at] + bytes([record[at] ^ 1]) + record[at + 1 :]


class Held:
    """Attacks that need two records."""

    def __init__(self) -> None:
        self.struck = 0
        self._held: dict[str, bytes] = {}

    def reorder(self, direction: str, number: int, record: bytes) -> Iterable[bytes]:
        held = self._held.pop(direction, None)
        if held is not None:
            self.struck += 1
            return (record, held)
        if not self.struck and not self._held and number >= 2 and len(record) >= LARGE_BYTES:
            self._held[direction] = record
            return ()
        return (record,)

    def splice(self, direction: str, number: int, record: bytes) -> Iterable[bytes]:
        """Put the record of another connection or direction in place of one of the same length."""
        other = self._held.get("in" if direction == "out" else "out")
        self._held[direction] = record
        if self.struck or other is None or len(other) != len(record) or len(record) < LARGE_BYTES:
            return (record,)
        self.struck += 1
        return (other,)


def junk(record: bytes) -> Iterable[bytes]:
    return (bytes(len(record)), record)


ATTACKS: dict[str, Callable[[], Attack]] = {
    "flip a bit of the body": lambda: Once(lambda record: (flip(record, HEADER_BYTES + 777),)),
    "flip a bit of the tag": lambda: Once(lambda record: (flip(record, len(record) - 1),)),
    "flip the chunk number": lambda: Once(lambda record: (flip(record, 4),)),
    "flip a contributor": lambda: Once(lambda record: (flip(record, 32),)),
    "replay": lambda: Once(lambda record: (record, record)),
    "drop": lambda: Once(lambda record: ()),
    "inject": lambda: Once(junk),
    "truncate": lambda: Once(lambda record: (record[: len(record) // 2],)),
    "reset": lambda: Once(lambda record: None),
    "reorder": lambda: Held().reorder,
    "splice": lambda: Held().splice,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_altered_record_is_never_accepted_and_the_round_ends_well(
    name: str, relay: Relay, four: list[DaemonProcess]
) -> None:
    attack = ATTACKS[name]()
    relay.attack = attack
    before = relay.data_connections
    vectors = [np.full(N_ELEMS, 2.0**i, np.float32) for i in range(4)]
    outcomes = average(four, vectors)
    assert getattr(attack, "__self__", attack).struck == 1, "the attack never came to pass"
    for outcome, vector in zip(outcomes, vectors, strict=True):
        assert outcome.averaged, outcome
        assert len(outcome.contributors) == 4, outcome
        assert (vector == 15 / 4).all()
    assert relay.data_connections > before, "no fresh keys were agreed on"


def test_who_attacks_for_ever_costs_one_member_and_not_the_round(relay: Relay, four: list[DaemonProcess]) -> None:
    struck = 0

    def attack(direction: str, number: int, record: bytes) -> Iterable[bytes]:
        nonlocal struck
        if len(record) < LARGE_BYTES:
            return (record,)
        struck += 1
        return (flip(record, HEADER_BYTES),)

    relay.attack = attack
    vectors = [np.full(N_ELEMS, 2.0**i, np.float32) for i in range(4)]
    outcomes = average(four, vectors)
    assert struck > 0
    for outcome, vector in zip(outcomes[1:], vectors[1:], strict=True):
        assert outcome.averaged, outcome
        assert vector.tobytes() == vectors[1].tobytes(), "survivors differ"
        # It still reduces its part for those whom it dialled itself, past the relay. Nobody else misses a survivor.
        sets = contributors_of(vector, 4)
        assert all(0 in contributors or contributors == {1, 2, 3} for contributors in sets), sets
        assert set(outcome.contributors) == {four[i].peer for i in frozenset.intersection(*sets)}, outcome
