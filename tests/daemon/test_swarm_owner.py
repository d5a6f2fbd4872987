"""What the owner decides, as far as the files show it; what becomes of it at the door is in test_admission.py."""

from pathlib import Path

import pytest
from swarm_helpers import DAY_S, NOWHERE, START_S, Machine, World, fill_disk

from mpd.daemon.swarm_owner import InviteTerms, make_invite
from mpd.daemon.swarm_store import raw_public
from mpd.errors import LocalError
from mpd.identity import swarm_name_of
from mpd.ids import Endpoint, PeerId, show_peer
from mpd.invites import parse_token

STRANGER = PeerId(b"x" * 20)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def owner(world: World) -> Machine:
    return world.owner()


# -------------------------------------------------------------------------------------------------------------- create


def test_swarms_of_one_name_are_different_swarms(world: World, owner: Machine) -> None:
    other = world.owner()
    assert swarm_name_of(other.store.root()) == swarm_name_of(owner.store.root()) == "lab"
    assert raw_public(other.store.root()) != raw_public(owner.store.root())
    assert other.load().datagram_keys() != owner.load().datagram_keys()


@pytest.mark.parametrize("name", ["", " lab", "a" * 65, "l\nab", "\x1b[31m"])
def test_a_name_that_cannot_be_shown_makes_no_swarm(world: World, name: str) -> None:
    machine = world.machine()
    with pytest.raises(LocalError, match="cannot be the name of a swarm"):
        machine.create(name)
    assert not machine.store.exists()


# -------------------------------------------------------------------------------------------------------------- invite


def test_an_invite_says_what_was_decided(owner: Machine) -> None:
    where = (Endpoint("peer.example", 4747), Endpoint("2001:db8::7", 1))
    token = owner.invite(*where, life_s=3 * DAY_S, role="observer", uses=7, peer=STRANGER)
    signed = parse_token(token)
    invite = signed.invite
    assert (invite.swarm, invite.admitter, invite.addresses) == (owner.load().swarm_id, owner.own, where)
    assert (invite.not_after_s, invite.uses, invite.role, invite.peer) == (START_S + 3 * DAY_S, 7, "observer", STRANGER)
    assert signed.is_signed_by(owner.public)


def test_an_invite_to_another_admitter_is_signed_by_the_root(world: World, owner: Machine) -> None:
    admitter = world.member(owner, "admitter")
    signed = parse_token(owner.invite(admitter=admitter.own))
    assert signed.invite.admitter == admitter.own
    assert signed.is_signed_by(raw_public(owner.store.root()))
    with pytest.raises(LocalError, match="needs the root key, which is not on this machine"):
        admitter.invite(admitter=owner.own)


def test_only_who_may_admit_invites(world: World, owner: Machine) -> None:
    open_machine = world.machine()
    terms = InviteTerms("member", 1, DAY_S)
    with pytest.raises(LocalError, match="an open swarm needs no invites: make a private one"):
        make_invite(open_machine.load(), open_machine.key, terms, [NOWHERE], bytes(16), START_S)
    with pytest.raises(LocalError, match="this machine is no admitter of swarm lab"):
        world.member(owner).invite()
    admitter = world.member(owner, "admitter")
    assert parse_token(admitter.invite()).is_signed_by(admitter.public)
    with pytest.raises(LocalError, match="can only be made where the root key is"):
        admitter.invite(role="admitter")
    world.clock.now_s += 31 * DAY_S
    with pytest.raises(LocalError, match="this machine is no admitter"):
        admitter.invite()


def test_nobody_invites_at_an_admitter_that_is_revoked(world: World, owner: Machine) -> None:
    admitter = world.member(owner, "admitter")
    owner.revoke(admitter.own)
    admitter.store.exchange_news(owner.store.news())
    for invite in (admitter.invite, lambda: owner.invite(admitter=admitter.own)):
        with pytest.raises(LocalError, match=f"{show_peer(admitter.own)}, or whoever let it in, is revoked"):
            invite()


@pytest.mark.parametrize("where", [Endpoint("0.0.0.0", 4747), Endpoint("192.0.2.1", 0)])
def test_an_invite_to_nowhere_is_none(owner: Machine, where: Endpoint) -> None:
    with pytest.raises(LocalError, match="nobody can be dialled at"):
        owner.invite(where)


# -------------------------------------------------------------------------------------------------------------- revoke


def test_a_revocation_is_the_next_list_with_a_new_key(owner: Machine) -> None:
    before = owner.store.news()
    assert owner.revoke(STRANGER)
    after = owner.store.news()
    assert (after.revocations.seq, after.revocations.peers) == (2, {STRANGER})
    assert after.keys[0].key != before.keys[0].key
    assert after.keys[1].key == before.keys[0].key
    assert not owner.revoke(STRANGER)
    assert owner.store.news() == after
    assert owner.revoke(PeerId(b"y" * 20))
    assert owner.store.news().revocations.peers == {STRANGER, b"y" * 20}


def test_only_the_root_key_revokes(world: World, owner: Machine) -> None:
    for machine in (world.member(owner), world.member(owner, "admitter")):
        with pytest.raises(LocalError, match=r"only the root key can revoke, .*: run this where root\.pem is"):
            machine.revoke(STRANGER)
    root_key = owner.store.folder / "root.pem"
    root_key.rename(root_key.with_suffix(".elsewhere"))
    with pytest.raises(LocalError, match="only the root key can revoke"):
        owner.revoke(STRANGER)
    assert owner.store.news().revocations.seq == 1


def test_the_owner_does_not_revoke_itself(owner: Machine) -> None:
    with pytest.raises(LocalError, match="this is this machine itself"):
        owner.revoke(owner.own)


def test_a_revocation_that_cannot_be_written_is_none(owner: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = owner.store.news()
    fill_disk(monkeypatch)
    with pytest.raises(LocalError, match="No space left on device"):
        owner.revoke(STRANGER)
    assert owner.store.news() == before
