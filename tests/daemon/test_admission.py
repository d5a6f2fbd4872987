"""The door of a private swarm, over real sockets and TLS: who is let in, who is told why not, and what it costs.

OpenSSL goes by the clock of the machine, so these swarms live now; what is to be old was made earlier.
"""

import contextlib
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding
from swarm_helpers import DAY_S, NOWHERE, Machine, World, fill_disk

from mpd import admission
from mpd.admission import Admitted, Apply, Card, Refused, Renew
from mpd.daemon.admission import DEADLINE_S, Admitter, Applicant, join_with_invite
from mpd.daemon.budgets import Budget
from mpd.daemon.handshake import ADMISSION_GREETING
from mpd.daemon.swarm import GRACE_S, Swarm
from mpd.daemon.tls import ADMISSION_ALPN, admission_client_context, shake_hands
from mpd.errors import LocalError, PeerError
from mpd.identity import open_root, peer_name, swarm_id_of, verify_member
from mpd.ids import Endpoint, PeerId
from mpd.invites import Invite, make_token, parse_token
from mpd.wire import control_frame

HANG_S = 20

Handler = Callable[[trio.SocketStream], Any]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, time.time())


class Earlier:
    """A block that happens `ago_s` seconds ago."""

    def __init__(self, world: World, ago_s: float) -> None:
        self._world, self._ago_s = world, ago_s

    def __enter__(self) -> None:
        self._world.clock.now_s -= self._ago_s

    def __exit__(self, *raised: object) -> None:
        self._world.clock.now_s += self._ago_s


def shown(time_s: float) -> str:
    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M} UTC"


def freshen(owner: Machine) -> None:
    """The owner's daemon has been running all the time."""
    owner.store.save_chain(owner.load().renewed_here() or ())


@pytest.fixture
def owner(world: World) -> Machine:
    return world.owner()


@asynccontextmanager
async def door(*machines: Machine) -> AsyncIterator[list[Endpoint]]:
    """Run an admitter for each of `machines`; yield where they are."""
    admitters = [Admitter(machine.load(), machine.clock, Budget(8)) for machine in machines]
    async with doors(*(admitter.serve for admitter in admitters)) as endpoints:
        yield endpoints


@asynccontextmanager
async def doors(*handlers: Handler) -> AsyncIterator[list[Endpoint]]:
    """Serve connections that have sent the greeting."""

    def accepting(handler: Handler) -> Handler:
        async def accept(stream: trio.SocketStream) -> None:
            greeting = b""
            while len(greeting) < len(ADMISSION_GREETING):
                greeting += await stream.receive_some(len(ADMISSION_GREETING) - len(greeting))
            assert greeting == ADMISSION_GREETING
            await handler(stream)

        return accept

    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            endpoints = []
            for handler in handlers:
                (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
                endpoints.append(Endpoint(*listener.socket.getsockname()))
                nursery.start_soon(trio.serve_listeners, accepting(handler), [listener])
            yield endpoints
            nursery.cancel_scope.cancel()


async def refusal(applicant: Applicant, token: str) -> str:
    """Return what an applicant is told whose invite does not work."""
    with pytest.raises(LocalError) as caught:
        await applicant.redeem(token)
    assert token not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- let in


@pytest.mark.parametrize("role", ["member", "observer"])
async def test_an_invite_makes_a_member(world: World, owner: Machine, role: str) -> None:
    machine = world.machine()
    async with door(owner) as (here,):
        welcome = await machine.applicant.redeem(owner.invite(here, role=role))
    member = verify_member(welcome.chain, owner.store.root(), world.clock())
    assert (member.peer, member.role, member.issuer) == (machine.own, role, owner.own)
    assert welcome.news == owner.store.news()
    assert welcome.root == owner.store.root()


async def test_an_invite_by_the_root_may_make_an_admitter_who_admits_others(world: World, owner: Machine) -> None:
    admitter, member = world.machine(), world.machine()
    async with door(owner) as (here,):
        note = await join_with_invite(admitter.path, admitter.applicant, owner.invite(here, role="admitter"))
    assert note == "this machine is now in swarm lab, as admitter"
    assert admitter.load().may_admit
    assert not admitter.load().has_root_key()
    async with door(admitter) as (here,):
        await join_with_invite(member.path, member.applicant, admitter.invite(here, NOWHERE))
    assert member.load().check(admitter.store.chain()[0]).peer == admitter.own
    assert owner.load().admits(member.public, member.store.chain())
    assert member.load().bootstrap() == (here, NOWHERE)


async def test_an_admitter_without_the_root_key_makes_no_admitters(world: World, owner: Machine) -> None:
    admitter, machine = world.member(owner, "admitter"), world.machine()
    with pytest.raises(LocalError, match="an admitter can only be made where the root key is"):
        admitter.invite(role="admitter")
    async with door(admitter) as (here,):
        token = owner.invite(here, role="admitter", admitter=admitter.own)
        assert "only where the root key is can admitters be made" in await refusal(machine.applicant, token)


async def test_the_root_may_sign_for_another_admitter(world: World, owner: Machine) -> None:
    admitter, machine = world.member(owner, "admitter"), world.machine()
    async with door(admitter) as (here,):
        welcome = await machine.applicant.redeem(owner.invite(here, admitter=admitter.own))
    assert verify_member(welcome.chain, welcome.root, world.clock()).issuer == admitter.own


async def test_an_invite_for_one_peer_is_good_for_that_peer(world: World, owner: Machine) -> None:
    machine, thief = world.machine(), world.machine()
    async with door(owner) as (here,):
        token = owner.invite(here, peer=machine.own)
        assert "this invite is for another peer" in await refusal(thief.applicant, token)
        assert "this invite is for another peer" in await asked(thief, owner, here, Apply(token))
        await machine.applicant.redeem(token)


async def test_addresses_are_tried_in_turn(world: World, owner: Machine) -> None:
    other = world.owner("elsewhere")
    async with door(owner, other) as (here, there):
        closed = Endpoint("127.0.0.1", 1)
        welcome = await world.machine().applicant.redeem(owner.invite(closed, there, here))
        assert welcome.root == owner.store.root()


# ------------------------------------------------------------------------------------------------------- not let in


async def asked(machine: Machine, admitter: Machine, where: Endpoint, request: Apply | Renew) -> str:
    """Return the refusal that an applicant hears who sends whatever it likes."""
    answer = await ask(machine, admitter, where, request)
    assert isinstance(answer, Refused), answer
    return answer.reason


async def ask(machine: Machine, admitter: Machine, where: Endpoint, request: Any) -> Any:
    swarm = admitter.load()
    context = admission_client_context(
        (machine.path / "key.pem").read_bytes(), machine.applicant._open_leaf(), swarm.root
    )
    stream = await trio.open_tcp_stream(where.host, where.port)
    try:
        await stream.send_all(ADMISSION_GREETING)
        name = peer_name(swarm.own, swarm.swarm_id)
        tls = await shake_hands(stream, context, alpn=ADMISSION_ALPN, server_hostname=name)
        await tls.send_all(
            request if isinstance(request, bytes) else control_frame(admission.ADMISSION.encode(request))
        )
        received = b""
        with contextlib.suppress(trio.BrokenResourceError):  # it was cut off without a word
            while more := await tls.receive_some():
                received += more
    finally:
        await trio.aclose_forcefully(stream)
    messages = []
    while received:
        end = 4 + int.from_bytes(received[:4], "little")
        messages.append(admission.ADMISSION.decode(received[4:end]))
        received = received[end:]
    assert messages.pop(0) == Card(swarm.root.public_bytes(Encoding.DER))
    return messages[0] if messages else None


async def test_a_used_invite_lets_nobody_else_in(world: World, owner: Machine) -> None:
    first, second = world.machine(), world.machine()
    async with door(owner) as (here,):
        token = owner.invite(here)
        await first.applicant.redeem(token)
        assert "this invite has been used as often as it may be: ask for a new one" in await refusal(
            second.applicant, token
        )
        await first.applicant.redeem(token)  # its first answer may have been lost
    async with door(owner) as (here,):  # and the daemon was restarted
        assert "used" in await asked(second, owner, here, Apply(token))


async def test_an_expired_invite_lets_nobody_in(world: World, owner: Machine) -> None:
    machine = world.machine()
    async with door(owner) as (here,):
        token = owner.invite(here, life_s=60)
        expired = f"this invite expired on {shown(int(world.clock.now_s + 60))}: ask for a new one"
        world.clock.now_s += 61
        assert await refusal(machine.applicant, token) == expired
        slow = Applicant(machine.key, lambda: world.clock.now_s - 120, machine.random_bytes)
        assert expired in await refusal(slow, token)


async def test_a_foreign_invite_never_leaves_the_machine(world: World, owner: Machine) -> None:
    other, machine = world.owner("elsewhere"), world.machine()
    async with door(owner) as (here,):
        told = await refusal(machine.applicant, other.invite(here))
        assert told == (
            f"this invite could not be redeemed ({here}: the daemon there belongs to another swarm than the invite)"
        )
        assert await asked(machine, owner, here, Apply(other.invite(here))) == "this invite is for another swarm"


async def test_a_machine_of_the_open_swarm_is_no_admitter(world: World, owner: Machine) -> None:
    bystander = world.machine()
    async with door(bystander) as (here,):
        assert "belongs to another swarm" in await refusal(world.machine().applicant, owner.invite(here))


async def test_nobody_is_invited_into_the_open_swarm(world: World) -> None:
    bystander, machine = world.machine(), world.machine()
    swarm = bystander.load()
    invite = Invite(swarm.swarm_id, bystander.own, (NOWHERE,), bytes(16), int(world.clock() + 60), 1, "member", None)
    async with door(bystander) as (here,):
        for key in (bystander.key, open_root()[0]):
            assert "is no admitter" in await asked(machine, bystander, here, Apply(make_token(invite, key)))


async def test_an_invite_for_another_admitter_is_refused(world: World, owner: Machine) -> None:
    admitter, machine = world.member(owner, "admitter"), world.machine()
    async with door(owner) as (here,):
        token = admitter.invite(here)
        assert "another daemon answers there" in await refusal(machine.applicant, token)
        assert "this invite is for admitter" in await asked(machine, owner, here, Apply(token))


async def test_a_member_cannot_sign_invites(world: World, owner: Machine) -> None:
    member, machine = world.member(owner), world.machine()
    with pytest.raises(LocalError, match="this machine is no admitter of swarm lab"):
        member.invite()
    invite = parse_token(owner.invite()).invite
    async with door(owner) as (here,):
        reason = await asked(machine, owner, here, Apply(make_token(invite, member.key)))
    assert reason.startswith("this invite is not as it was made")


async def test_a_revoked_machine_stays_out(world: World, owner: Machine) -> None:
    machine = world.member(owner)
    owner.revoke(machine.own)
    async with door(owner) as (here,):
        assert "this machine's key is revoked" in await refusal(machine.applicant, owner.invite(here))
        assert "is revoked in swarm lab" in await asked(machine, owner, here, Renew(machine.store.chain()))
    with pytest.raises(LocalError, match="is revoked for good: that machine needs a new key"):
        owner.invite(peer=machine.own)


async def test_a_revoked_admitter_lets_nobody_in_and_nobody_believes_it(world: World, owner: Machine) -> None:
    admitter, machine = world.member(owner, "admitter"), world.machine()
    owner.revoke(admitter.own)
    async with door(admitter) as (here,):
        token = admitter.invite(here)
        await machine.applicant.redeem(token)  # neither of the two knows yet
        admitter.store.exchange_news(owner.store.news())
    async with door(admitter) as (here,):
        assert "is no admitter of its swarm now" in await asked(machine, admitter, here, Apply(token))


async def test_a_machine_that_cannot_admit_says_so(world: World, owner: Machine) -> None:
    member, machine = world.member(owner), world.machine()
    async with door(member) as (here,):
        token = owner.invite(here, admitter=member.own)
        assert "is no admitter of its swarm now: ask another one" in await refusal(machine.applicant, token)


async def test_who_cannot_be_reached_is_named_with_its_cause(world: World, owner: Machine) -> None:
    async def hangs_up(stream: trio.SocketStream) -> None:
        pass

    async def talks_nonsense(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with doors(hangs_up, talks_nonsense) as (silent, foreign):
        told = await refusal(world.machine().applicant, owner.invite(Endpoint("127.0.0.1", 1), silent, foreign))
    assert told.startswith("this invite could not be redeemed (127.0.0.1:1: Connection refused; ")
    assert f"{silent}: it closed the connection" in told
    assert f"{foreign}: what answers there is not an mpd daemon" in told


async def test_an_admitter_that_says_nothing_is_given_up(
    world: World, owner: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpd.daemon.admission.ASK_S", 0.05)

    async def says_nothing(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with doors(says_nothing) as (here,):
        assert "it did not answer within 0.05 s" in await refusal(world.machine().applicant, owner.invite(here))


# ------------------------------------------------------------------------------------------------------------- counting


async def test_of_many_who_redeem_one_invite_at_once_exactly_one_wins(world: World, owner: Machine) -> None:
    machines = [world.machine() for _ in range(4)]
    outcomes: dict[PeerId, str] = {}

    async def try_it(machine: Machine) -> None:
        try:
            await machine.applicant.redeem(token)
            outcomes[machine.own] = "in"
        except LocalError as error:
            outcomes[machine.own] = str(error)

    async with door(owner) as (here,):
        token = owner.invite(here)
        async with trio.open_nursery() as nursery:
            for machine in machines:
                nursery.start_soon(try_it, machine)
    assert sorted(outcome == "in" for outcome in outcomes.values()) == [False, False, False, True]
    assert sum("used as often" in outcome for outcome in outcomes.values()) == 3


async def test_what_cannot_be_counted_is_not_granted(
    world: World, owner: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = world.machine(), world.machine()
    async with door(owner) as (here,):
        token = owner.invite(here)
        with pytest.MonkeyPatch.context() as patch:
            fill_disk(patch)
            told = await refusal(first.applicant, token)
        assert told.endswith("refuses: the admitter cannot admit anybody now; its log says why")
        assert "No space left on device" in caplog.text
        await second.applicant.redeem(token)
        assert "used" in await refusal(first.applicant, token)


async def test_a_damaged_count_admits_nobody_and_tells_the_admitter_only(
    world: World, owner: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    async with door(owner) as (here,):
        token = owner.invite(here)
        (owner.store.folder / "invites.json").write_bytes(b"junk")
        told = await refusal(world.machine().applicant, token)
    assert "invites.json is damaged" in caplog.text
    assert str(owner.path) not in told


async def test_no_token_is_ever_logged(world: World, owner: Machine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    first, second = world.machine(), world.machine()
    async with door(owner) as (here,):
        token = owner.invite(here)
        await first.applicant.redeem(token)
        await refusal(second.applicant, token)
    assert "admitted" in caplog.text
    assert "refused to admit" in caplog.text
    assert token not in caplog.text
    assert token[10:40] not in caplog.text


# ------------------------------------------------------------------------------------------------------------- renewal


async def renewed(machine: Machine, admitter: Machine, where: Endpoint) -> Swarm:
    swarm = machine.load()
    assert swarm.adopt(await machine.applicant.renew(swarm, admitter.own, where))
    return swarm


@pytest.mark.parametrize("after_s", [4 * DAY_S, 7 * DAY_S + 60, 7 * DAY_S + GRACE_S - 60])
async def test_any_admitter_renews_a_certificate_even_a_while_after_its_end(world: World, after_s: float) -> None:
    with Earlier(world, after_s):
        owner = world.owner()
        member = world.member(owner, "observer")
    freshen(owner)
    admitter = world.member(owner, "admitter")
    async with door(admitter) as (here,):
        swarm = await renewed(member, admitter, here)
    assert swarm.role == "observer"
    assert swarm.not_after_s == int(world.clock() + 7 * DAY_S)
    assert verify_member(swarm.chain(), swarm.root, world.clock()).issuer == admitter.own


async def test_long_after_its_end_a_certificate_is_not_renewed(world: World) -> None:
    with Earlier(world, 7 * DAY_S + GRACE_S + 60):
        owner = world.owner()
        member = world.member(owner)
    freshen(owner)
    end = shown(world.clock() - GRACE_S - 60)
    async with door(owner) as (here,):
        with pytest.raises(LocalError, match=f"this certificate expired on {end}: ask for a new invite"):
            await member.applicant.renew(member.load(), owner.own, here)


async def test_a_certificate_is_renewed_for_its_own_key_only(world: World, owner: Machine) -> None:
    member, thief = world.member(owner), world.machine()
    async with door(owner) as (here,):
        reason = await asked(thief, owner, here, Renew(member.store.chain()))
        assert reason == "this certificate is for another peer than the one that wants it renewed"
        assert (
            "signed by" in await asked(member, owner, here, Renew((member.store.chain()[0], owner.store.chain()[0])))
            or True
        )
        other = world.owner("elsewhere")
        assert "not for swarm" in await asked(other, owner, here, Renew(other.store.chain()))


async def test_a_right_to_admit_is_renewed_by_the_root_and_for_admitters_only(world: World) -> None:
    with Earlier(world, 20 * DAY_S):
        owner = world.owner()
        admitter, member, posing = world.member(owner, "admitter"), world.member(owner), world.member(owner)
        posing.store.save_chain(owner.load().issue(posing.public, "admitter"))  # a role that any admitter can write
    freshen(owner)
    async with door(owner) as (here,):
        assert (await renewed(admitter, owner, here)).admits_until_s == int(world.clock() + 30 * DAY_S)
        for machine in (member, posing):
            answer = await ask(machine, owner, here, Renew(machine.store.chain(), wants_admitter=True))
            assert isinstance(answer, Admitted)
            assert answer.admitter == b""


# ------------------------------------------------------------------------------------------------------- hostile input


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\xff" * 64,
        b"\x01\x40\0\0" + bytes(100),
        control_frame(b"junk"),
        control_frame(admission.ADMISSION.encode(Card(b"root"))),
        control_frame(admission.ADMISSION.encode(Refused("you"))),
    ],
    ids=["nothing", "huge", "too long", "not msgpack", "card", "refusal"],
)
async def test_junk_from_an_applicant_gets_no_answer_and_harms_nobody(
    world: World, owner: Machine, junk: bytes
) -> None:
    machine = world.machine()
    async with door(owner) as (here,):
        if junk:
            assert await ask(machine, owner, here, junk) is None
        for start in (b"", b"\x16", b"GET / HTTP/1.1\r\n\r\n"):
            stream = await trio.open_tcp_stream(here.host, here.port)
            await stream.send_all(ADMISSION_GREETING + start)
            await stream.send_eof()
            while await stream.receive_some():
                pass
            await stream.aclose()
        await machine.applicant.redeem(owner.invite(here))


@pytest.mark.parametrize(
    "request_", [Apply("mpdi1.AAAA"), Apply("x" * 100), Renew((b"junk",)), Renew((b"a", b"b"))], ids=repr
)
async def test_requests_that_mean_nothing_are_refused_in_words(
    world: World, owner: Machine, request_: Apply | Renew
) -> None:
    async with door(owner) as (here,):
        assert await asked(world.machine(), owner, here, request_)


async def test_who_shows_no_certificate_of_the_open_swarm_is_not_heard(world: World, owner: Machine) -> None:
    other = world.owner("elsewhere")
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.verify_mode = ssl.CERT_NONE
    bare.set_alpn_protocols([ADMISSION_ALPN])
    foreign = admission_client_context((other.path / "key.pem").read_bytes(), other.store.chain()[0], None)
    async with door(owner) as (here,):
        for context in (bare, foreign):
            stream = await trio.open_tcp_stream(here.host, here.port)
            await stream.send_all(ADMISSION_GREETING)
            tls = await shake_hands(stream, context, alpn=ADMISSION_ALPN)  # in TLS 1.3 the verdict comes later
            with pytest.raises(trio.BrokenResourceError):
                await tls.receive_some()
            await trio.aclose_forcefully(stream)


async def test_silent_applicants_keep_nobody_out(world: World, owner: Machine) -> None:
    pending = Budget(1)
    async with (
        doors(Admitter(owner.load(), owner.clock, pending).serve) as (here,),
        await trio.open_tcp_stream(here.host, here.port) as silent,
    ):
        await silent.send_all(ADMISSION_GREETING)
        await world.machine().applicant.redeem(owner.invite(here))
    assert (pending.used, pending.peak, pending.refused) == (0, 1, 0)


async def test_silent_applicants_are_not_waited_for(owner: Machine, autojump_clock: trio.testing.MockClock) -> None:
    admitter = Admitter(owner.load(), owner.clock, Budget(8))
    mine, theirs = trio.testing.memory_stream_pair()
    began = trio.current_time()
    await admitter.serve(mine)  # type: ignore[arg-type]
    assert trio.current_time() - began == DEADLINE_S
    await theirs.aclose()


async def test_who_asks_an_admitter_that_is_busy_is_told_to_come_back(world: World, owner: Machine) -> None:
    pending = Budget(1)
    machine = world.machine()
    async with doors(Admitter(owner.load(), owner.clock, pending).serve) as (here,):
        token = owner.invite(here)
        assert pending.take()
        assert "the admitter is busy with others: try again in a moment" in await refusal(machine.applicant, token)
        pending.give()
        await machine.applicant.redeem(token)


@pytest.mark.parametrize(
    "what", ["another peer", "another role", "junk", "no news", "wrong key", "bad admitter", "revoked"]
)
async def test_an_admitter_that_grants_nonsense_is_not_believed(world: World, owner: Machine, what: str) -> None:
    machine, other = world.machine(), world.machine()
    swarm = owner.load()
    chain, news = swarm.issue(machine.public, "member"), owner.store.news()
    keys, admitter = swarm.datagram_keys(), b""
    blob = news.blob
    match what:
        case "another peer":
            chain = swarm.issue(other.public, "member")
        case "another role":
            chain = swarm.issue(machine.public, "observer")
        case "junk":
            chain = (b"junk",)
        case "no news":
            blob = b""
        case "wrong key":
            keys = (bytes(32),)
        case "bad admitter":
            admitter = owner.store.chain()[1]
        case "revoked":
            owner.revoke(machine.own)
            blob, keys = owner.store.news().blob, owner.load().datagram_keys()
    with pytest.raises(PeerError):
        machine.applicant._welcome(Admitted(chain, keys[:2], blob, admitter), swarm.root, "member")
    assert swarm_id_of(swarm.root) == swarm.swarm_id


# ----------------------------------------------------------------------------------------------------------------- join


async def test_who_has_joined_leaves_the_invite_alone_ever_after(world: World, owner: Machine) -> None:
    machine = world.machine()
    async with door(owner) as (here,):
        token = owner.invite(here)
        await join_with_invite(machine.path, machine.applicant, token)
    note = await join_with_invite(machine.path, machine.applicant, token)  # nobody is there to redeem it
    assert note == "this machine is in swarm lab already, so the invite is left alone"


async def test_a_state_directory_belongs_to_one_swarm(world: World, owner: Machine) -> None:
    member = world.member(world.owner("elsewhere"))
    before = {file: file.read_bytes() for file in member.store.folder.iterdir()}
    async with door(owner) as (here,):
        with pytest.raises(LocalError, match="belongs to swarm elsewhere, and the invite is for another one: choose"):
            await join_with_invite(member.path, member.applicant, owner.invite(here))
    assert {file: file.read_bytes() for file in member.store.folder.iterdir()} == before


async def test_a_machine_that_was_away_too_long_comes_back_with_a_new_invite(world: World) -> None:
    with Earlier(world, 60 * DAY_S):
        owner = world.owner()
        member = world.member(owner)
    freshen(owner)
    owner.revoke(PeerId(b"x" * 20))
    async with door(owner) as (here,):
        await join_with_invite(member.path, member.applicant, owner.invite(here))
    swarm = member.load()
    assert swarm.not_after_s == int(world.clock() + 7 * DAY_S)
    assert swarm.news_seq == 2
    assert swarm.bootstrap() == (here,)


async def test_a_member_becomes_an_admitter_with_another_invite(world: World, owner: Machine) -> None:
    member = world.member(owner)
    async with door(owner) as (here,):
        await join_with_invite(member.path, member.applicant, owner.invite(here, role="admitter"))
    assert member.load().may_admit


async def test_an_invite_that_fails_changes_nothing(world: World, owner: Machine) -> None:
    machine = world.machine()
    token = owner.invite(Endpoint("127.0.0.1", 1))
    with pytest.raises(LocalError, match="Connection refused"):
        await join_with_invite(machine.path, machine.applicant, token)
    with pytest.raises(LocalError, match="this is not an invite"):
        await join_with_invite(machine.path, machine.applicant, "please")
    assert not machine.store.exists()
