"""Proofs: each holds for what it was made for and for nothing else, and what is remembered is bounded."""

from dataclasses import dataclass

import msgspec
import pytest
from dht_swarm import HERE, NOW_MS, Clock, PrivateSwarm, open_trust, peer, public

from mpd.daemon import dht_proof
from mpd.daemon.dht_proof import Memory, Proofs
from mpd.daemon.dht_records import WireRecord

KEY, OTHER_KEY, MESSAGE_ID = b"k" * 20, b"o" * 20, b"i" * 20


def proofs_of(number: int) -> Proofs:
    return Proofs(open_trust(number), lambda: 0.0)


def test_a_home_is_proved_to_one_asker_for_one_question_from_one_address() -> None:
    signature = proofs_of(1).sign_home(peer(2), MESSAGE_ID, HERE)
    asker = proofs_of(2)
    assert asker.is_home(public(1), MESSAGE_ID, HERE, signature)
    assert not asker.is_home(public(3), MESSAGE_ID, HERE, signature)
    assert not asker.is_home(public(1), bytes(20), HERE, signature)
    assert not asker.is_home(public(1), MESSAGE_ID, (HERE[0], 1), signature)
    assert not asker.is_home(public(1), MESSAGE_ID, ("not ascii: é", 1), signature)
    assert not proofs_of(3).is_home(public(1), MESSAGE_ID, HERE, signature)
    assert not asker.is_home(bytes(32), MESSAGE_ID, HERE, bytes(64))


def test_a_goodbye_is_said_by_one_at_one_time() -> None:
    signature = proofs_of(1).sign_goodbye(NOW_MS)
    assert proofs_of(2).is_goodbye(public(1), NOW_MS, signature)
    assert not proofs_of(2).is_goodbye(public(1), NOW_MS + 1, signature)
    assert not proofs_of(2).is_goodbye(public(3), NOW_MS, signature)


@pytest.mark.parametrize(
    "change",
    [
        {"public_key": public(2)},
        {"seq": 8},
        {"expires_at_ms": 1},
        {"value": b"w"},
        {"value": b""},
        {"signature": bytes(64)},
    ],
    ids=str,
)
def test_a_record_cannot_be_altered(change: dict[str, object]) -> None:
    record = proofs_of(1).sign_record(KEY, 7, NOW_MS, b"v")
    assert proofs_of(2).is_genuine(KEY, record)
    assert not proofs_of(2).is_genuine(KEY, msgspec.structs.replace(record, **change))


def test_a_record_is_for_one_key_and_one_swarm() -> None:
    swarm = PrivateSwarm()
    record = Proofs(swarm.member(1), lambda: 0.0).sign_record(KEY, 1, NOW_MS, b"v")
    assert Proofs(swarm.member(2), lambda: 0.0).is_genuine(KEY, record)
    assert not Proofs(swarm.member(2), lambda: 0.0).is_genuine(OTHER_KEY, record)
    assert not proofs_of(2).is_genuine(KEY, record)


def test_no_signature_passes_for_another_kind() -> None:
    signed: list[bytes] = []

    @dataclass
    class Eavesdropped:
        swarm_id = open_trust(1).swarm_id
        is_open = True
        public_key = public(1)

        def sign(self, message: bytes) -> bytes:
            signed.append(message)
            return bytes(64)

    proofs = Proofs(Eavesdropped(), lambda: 0.0)  # type: ignore[arg-type]
    proofs.sign_home(peer(2), MESSAGE_ID, HERE)
    proofs.sign_goodbye(NOW_MS)
    proofs.sign_record(KEY, 1, NOW_MS, b"v")
    words = [message.partition(b"|")[0] for message in signed]
    assert len(set(words)) == 3
    assert all(word.startswith(b"mpd dht ") for word in words)


def test_a_record_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[bytes] = []
    is_signed = dht_proof._is_signed
    monkeypatch.setattr(dht_proof, "_is_signed", lambda *args: checked.append(args[0]) or is_signed(*args))
    publisher, reader = proofs_of(1), proofs_of(2)
    record = publisher.sign_record(KEY, 1, NOW_MS, b"v")
    forged = WireRecord(public(1), 2, NOW_MS, b"v", bytes(64))
    assert publisher.is_genuine(KEY, record), "we believe ourselves"
    assert not checked
    assert all(reader.is_genuine(KEY, record) for _ in range(5))
    assert len(checked) == 1
    assert not any(reader.is_genuine(KEY, forged) for _ in range(2))
    assert len(checked) == 3, "only what is genuine is remembered"


def test_members_are_known_once_they_have_shown_their_certificates() -> None:
    swarm, clock = PrivateSwarm(), Clock(0.0)
    proofs = Proofs(swarm.member(1), clock)
    member, stranger = swarm.member(2), swarm.stranger(3)
    assert proofs.is_member(public(1)), "ourselves"
    assert not proofs.is_member(member.public_key)
    assert proofs.chain_of(member.public_key) == ()
    assert proofs.admit(member.public_key, list(member.chain()))
    assert proofs.is_member(member.public_key)
    assert proofs.chain_of(member.public_key) == member.chain()
    assert not proofs.admit(stranger.public_key, stranger.chain())
    assert not proofs.admit(stranger.public_key, member.chain()), "somebody else's certificate"
    assert not proofs.admit(stranger.public_key, [b"junk", b"junk"])
    assert not proofs.is_member(stranger.public_key)
    assert proofs.chain_of(public(1)) == swarm.member(1).chain()


def test_a_certificate_is_looked_at_again_after_a_while() -> None:
    swarm, clock = PrivateSwarm(), Clock(0.0)
    proofs, member = Proofs(swarm.member(1), clock), swarm.member(2)
    assert proofs.admit(member.public_key, member.chain())
    swarm.now_s += 8 * 86400
    assert proofs.is_member(member.public_key), "not yet"
    clock.now += dht_proof.RECHECK_S
    assert not proofs.is_member(member.public_key)
    renewed = swarm.member(2)
    assert proofs.admit(renewed.public_key, renewed.chain())


def test_a_revocation_counts_at_once() -> None:
    swarm = PrivateSwarm()
    proofs, member = Proofs(swarm.member(1), lambda: 0.0), swarm.member(2)
    assert proofs.admit(member.public_key, member.chain())
    swarm.revoked.add(peer(2))
    assert not proofs.is_member(member.public_key)
    assert not proofs.admit(member.public_key, member.chain())


def test_in_an_open_swarm_nothing_is_kept_of_members() -> None:
    proofs = proofs_of(1)
    assert proofs.admit(public(2), [bytes(1000)])
    assert proofs.is_member(public(3))
    assert proofs.chain_of(public(2)) == ()


def test_a_memory_forgets_what_was_written_first() -> None:
    memory: Memory[int, str] = Memory(2)
    for number, word in ((1, "a"), (2, "b"), (1, "c"), (3, "d")):
        memory.put(number, word)
    assert [memory.get(number) for number in (1, 2, 3)] == ["c", None, "d"]
    assert len(memory) == 2
    memory.drop(1)
    memory.drop(1)
    assert memory.get(1) is None
