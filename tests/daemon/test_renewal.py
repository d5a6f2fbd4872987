"""Renewal over weeks of a mock clock: nobody's certificate ends while an admitter is there, and people hear in time."""

import itertools
import random
from pathlib import Path

import pytest
import trio
from swarm_helpers import DAY_S, NOWHERE, START_S, Machine, World, at_once, fill_disk
from trio.testing import MockClock

from mpd.daemon.renewal import CHECK_S, MAX_PAUSE_S, Candidate, Renewal, Troubles
from mpd.daemon.swarm import Swarm
from mpd.errors import LocalError, PeerError
from mpd.ids import Endpoint, PeerId


class Office:
    """Stands in for the network: renews as the admitters there would, while they are up."""

    def __init__(self) -> None:
        self.admitters: dict[PeerId, Swarm] = {}
        self.asked: list[tuple[PeerId, float]] = []
        self.refusal = ""
        self.machines: dict[PeerId, Machine] = {}

    async def candidates(self) -> list[Candidate]:
        await trio.lowlevel.checkpoint()
        return [Candidate(peer, NOWHERE, swarm.has_root_key()) for peer, swarm in self.admitters.items()]

    async def renew(self, swarm: Swarm, admitter: PeerId, address: Endpoint) -> tuple[bytes, ...]:
        await trio.lowlevel.checkpoint()
        self.asked.append((admitter, trio.current_time()))
        if self.refusal:
            raise LocalError(self.refusal)
        signer = self.admitters[admitter]
        if not signer.may_admit:
            raise PeerError("Connection refused")
        if swarm.admitter_is_due() and signer.has_root_key():
            der = signer.issue_admitter(swarm.public_key)
            return self.machines[swarm.own].applicant.sign_leaf(der, swarm.swarm_id), der
        return signer.issue(swarm.public_key, swarm.role)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def owner(world: World) -> Machine:
    return world.owner()


@pytest.fixture
def office(world: World) -> Office:
    return Office()


def begin(nursery: trio.Nursery, machine: Machine, office: Office, *, admits: bool = False) -> tuple[Swarm, Renewal]:
    """Run the renewal of `machine`."""
    machine.clock.run()
    swarm = machine.load()
    office.machines[machine.own] = machine
    if admits:
        office.admitters[machine.own] = swarm
    renewal = Renewal(swarm, office.candidates, office, random.Random(1), at_once)
    nursery.start_soon(renewal.run)
    return swarm, renewal


async def weeks(n: float, *swarms: Swarm) -> None:
    """Let time pass; at no moment may a certificate have ended."""
    for _ in range(int(n * 7 * 4)):
        await trio.sleep(DAY_S / 4)
        assert all(swarm.not_after_s > swarm.now_s() + DAY_S for swarm in swarms)


async def test_a_member_keeps_its_certificate_and_its_role(
    world: World, owner: Machine, office: Office, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    of_owner, _ = begin(nursery, owner, office, admits=True)
    machine = world.member(owner, "observer")
    swarm, renewal = begin(nursery, machine, office)
    await weeks(2, of_owner, swarm)
    assert (swarm.role, renewal.problem) == ("observer", "")
    assert machine.load().not_after_s == swarm.not_after_s
    assert machine.store.admitters() == {owner.own: (NOWHERE,)}
    assert 3 <= len(office.asked) <= 5  # every half of seven days


async def test_the_owner_renews_itself_alone_longer_than_its_right_lasts(
    owner: Machine, office: Office, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm, renewal = begin(nursery, owner, office)
    await weeks(5, swarm)
    assert swarm.may_admit
    assert owner.load().may_admit
    assert (office.asked, renewal.problem) == ([], "")


async def test_an_admitter_keeps_its_right_while_the_root_key_is_around(
    world: World, owner: Machine, office: Office, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    of_owner, _ = begin(nursery, owner, office, admits=True)
    machine = world.member(owner, "admitter")
    swarm, renewal = begin(nursery, machine, office)
    await weeks(3, of_owner, swarm)
    assert swarm.may_admit
    assert machine.load().admits_until_s > swarm.now_s() + 14 * DAY_S
    assert renewal.problem == ""
    assert len(office.asked) == 1  # for the right to admit only, every half of 30 days


async def test_without_the_root_key_there_is_a_warning_a_day_before_the_right_ends(
    world: World, owner: Machine, office: Office, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm, renewal = begin(nursery, world.member(owner, "admitter"), office)
    await trio.sleep(28.9 * DAY_S)
    assert (swarm.may_admit, renewal.problem) == (True, "")
    await trio.sleep(0.2 * DAY_S)
    assert "this machine's right to admit others ends in 22 h: only a daemon with the root key can" in renewal.problem
    assert "this machine's certificate ends in 22 h" in renewal.problem
    owner.store.save_chain(owner.load().renewed_here() or ())
    office.admitters[owner.own] = owner.load()
    await trio.sleep(DAY_S)
    assert swarm.admits_until_s > swarm.now_s() + 29 * DAY_S  # the owner is back in time
    assert renewal.problem == ""


async def test_without_an_admitter_a_day_before_the_end_there_is_a_warning(
    world: World, owner: Machine, office: Office, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm, renewal = begin(nursery, world.member(owner), office)
    await trio.sleep(5.9 * DAY_S)
    assert renewal.problem == ""
    await trio.sleep(0.2 * DAY_S)
    assert renewal.problem == "this machine's certificate ends in 22 h: no admitter was found that could renew it"
    await trio.sleep(DAY_S)
    assert renewal.problem == "this machine's certificate has ended: no admitter was found that could renew it"
    begin(nursery, owner, office, admits=True)
    await trio.sleep(2 * MAX_PAUSE_S)
    assert renewal.problem == ""
    assert swarm.not_after_s > swarm.now_s() + 6 * DAY_S


async def test_who_refuses_is_asked_less_and_less_often_and_quoted(
    world: World, owner: Machine, office: Office, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    office.admitters[owner.own] = owner.load()
    office.refusal = "this certificate is not to my taste"
    _, renewal = begin(nursery, world.member(owner), office)
    await trio.sleep(6.5 * DAY_S)
    assert f"did not renew it: {office.refusal}" in renewal.problem
    times = [at for _, at in office.asked]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses[0] < 3 * CHECK_S
    assert all(pause < 1.25 * MAX_PAUSE_S + 1 for pause in pauses)
    assert pauses[-1] > 0.7 * MAX_PAUSE_S


async def test_the_next_admitter_is_asked_when_one_is_down(
    world: World, owner: Machine, office: Office, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    gone, there = world.member(owner, "admitter"), world.member(owner, "admitter")
    office.admitters = {gone.own: world.member(owner).load(), there.own: there.load()}
    swarm, renewal = begin(nursery, world.member(owner), office)
    await trio.sleep(3.6 * DAY_S)
    assert [peer for peer, _ in office.asked] == [gone.own, there.own]
    assert not swarm.leaf_is_due()
    assert renewal.problem == ""


async def test_on_a_full_disk_the_new_certificate_counts_and_people_hear_of_the_disk(
    world: World, owner: Machine, office: Office, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    machine = world.member(owner)
    office.admitters[owner.own] = owner.load()
    swarm, renewal = begin(nursery, machine, office)
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch)
        await trio.sleep(3.6 * DAY_S)
    assert not swarm.leaf_is_due()
    assert "chain.pem cannot be written: No space left on device" in renewal.problem
    assert machine.load().not_after_s == START_S + 7 * DAY_S
    await trio.sleep(2 * CHECK_S)
    assert renewal.problem == ""
    assert machine.load().not_after_s == swarm.not_after_s


async def test_the_open_swarm_needs_nobody(
    world: World, office: Office, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    swarm, renewal = begin(nursery, world.machine(), office)
    await weeks(2, swarm)
    assert (office.asked, renewal.problem) == ([], "")


async def test_trouble_is_remembered_until_it_goes_well() -> None:
    troubles = Troubles(at_once)

    def fail() -> None:
        raise LocalError("the disk is full")

    assert await troubles.attempt("writing", fail) is None
    assert await troubles.attempt("reading", lambda: 7) == 7
    assert list(troubles) == ["the disk is full"]
    assert await troubles.attempt("writing", lambda: 8) == 8
    assert list(troubles) == []


def test_a_candidate_is_shown_as_people_know_it() -> None:
    assert str(Candidate(PeerId(bytes(20)), NOWHERE, False)) == f"admitter {'a' * 32} at 192.0.2.1:4747"
