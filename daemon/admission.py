"""The door of a private swarm: how an admitter lets others in, and how a machine asks for it.

Whoever asks proves its key with a certificate of the open swarm, because it has no other yet. It comes twice: the first
time it believes nobody and only fetches the swarm's root, which must have the hash that its invite names; the second
time TLS verifies the admitter against that root and by name, and only then does the invite leave the machine.

The admitter issues first and counts last, and what it counts is on disk before it answers: a crash in between costs the
applicant one more try, which is not counted again, and never lets one invite admit more peers than it says.
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from mpd import revocations
from mpd.admission import ADMISSION, Admitted, Apply, Card, Refused, Renew
from mpd.errors import Fatal, LocalError, PeerError
from mpd.identity import (
    OPEN_SWARM,
    SwarmId,
    issue_leaf,
    member_of,
    open_root,
    peer_name,
    read_root,
    swarm_id_of,
    swarm_name_of,
    verify_member,
)
from mpd.ids import Endpoint, PeerId, show_peer
from mpd.invites import Invite, SignedInvite, parse_token
from mpd.wire import control_frame

from .budgets import Budget
from .handshake import ADMISSION_GREETING, FRAME_PREFIX_BYTES, receive_exactly, why
from .state import own_id, private_pem
from .swarm import (
    GRACE_S,
    TURN_S,
    RandomBytes,
    Swarm,
    Wall,
    load_swarm,
    new_serial,
    verify_lapsed,
)
from .swarm_store import KEPT_KEY_S, DatagramKey, SwarmNews, SwarmStore, key_digest, raw_public, read_certificate
from .tls import ADMISSION_ALPN, admission_client_context, leaf_of, shake_hands

DEADLINE_S = 5.0  # for everything from the first byte to the answer
ASK_S = 10.0  # how long an applicant waits for one address
_MAX_REQUEST_BYTES = 16 << 10
_MAX_ANSWER_BYTES = 1 << 20

_log = logging.getLogger("mpd")


# -------------------------------------------------------------------------------------------------------- the admitter


class Admitter:
    """Answers those who ask to be let in. `pending` bounds how many requests are decided at once.

    Whoever has not asked yet takes none of it: the door bounds connections, and silence must not keep others out.
    """

    def __init__(self, swarm: Swarm, wall: Wall, pending: Budget) -> None:
        self._pending = pending
        self._swarm = swarm
        self._wall = wall

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection that has sent the greeting of admission; the caller closes it."""
        try:
            with trio.move_on_after(DEADLINE_S):
                await self._serve(stream)
        except (PeerError, OSError, trio.BrokenResourceError) as error:
            _log.debug("admission: %s", why(error))

    async def _serve(self, stream: trio.SocketStream) -> None:
        tls = await shake_hands(stream, self._swarm.admission_context(), alpn=ADMISSION_ALPN, server_side=True)
        leaf = leaf_of(tls)
        applicant = member_of(leaf, OPEN_SWARM).peer
        talk = _Talk(tls, _MAX_REQUEST_BYTES)
        await talk.send(Card(self._swarm.root.public_bytes(Encoding.DER)))
        request = await talk.receive()
        public = raw_public(read_certificate(leaf))
        answer = await self._decide_soon(request, applicant, public)
        if isinstance(answer, Refused):
            _log.info("refused to admit %s: %s", show_peer(applicant), answer.reason)
        await talk.send(answer)
        await tls.aclose()

    async def _decide_soon(self, request: Any, applicant: PeerId, public: bytes) -> Admitted | Refused:
        if not self._pending.take():
            return Refused.because("the admitter is busy with others: try again in a moment")
        try:
            # What is counted must also be answered if that is still possible, so the disk is waited for.
            return await trio.to_thread.run_sync(self._decide, request, applicant, public)
        finally:
            self._pending.give()

    def _decide(self, request: Any, applicant: PeerId, public: bytes) -> Admitted | Refused:
        """Answer `request` of the peer that has proved to hold the key `public`. Blocks on the disk."""
        try:
            if isinstance(request, Apply):
                return self._admit(request.invite(), applicant, public)
            if isinstance(request, Renew):
                return self._renew(request, applicant, public)
        except PeerError as error:
            return Refused.because(str(error))
        except (LocalError, Fatal) as error:  # ours; where our files lie is none of theirs
            _log.warning("cannot admit %s: %s", show_peer(applicant), error)
            return Refused.because("the admitter cannot admit anybody now; its log says why")
        raise PeerError(f"it asked to be admitted with {type(request).__name__}")

    def _admit(self, signed: SignedInvite, applicant: PeerId, public: bytes) -> Admitted:
        swarm, invite = self._swarm, signed.invite
        self._check_invite(signed, applicant)
        self._check_own_right()
        admitter = b""
        if invite.role == "admitter":
            if not swarm.has_root_key():
                raise PeerError("only where the root key is can admitters be made, and it is not on this machine")
            admitter = swarm.issue_admitter(public)
        admitted = Admitted(swarm.issue(public, invite.role), swarm.keys_to_give(), swarm.swarm_news.blob, admitter)
        assert swarm.store is not None
        if not swarm.store.count_use(invite, applicant, self._wall()):
            raise PeerError("this invite has been used as often as it may be: ask for a new one")
        _log.info("admitted %s as %s", show_peer(applicant), invite.role)
        return admitted

    def _check_invite(self, signed: SignedInvite, applicant: PeerId) -> None:
        """Raise PeerError unless `applicant` may come in with this invite, if it is not used up."""
        swarm, invite = self._swarm, signed.invite
        if invite.swarm != swarm.swarm_id:
            raise PeerError("this invite is for another swarm")
        if invite.admitter != swarm.own:
            raise PeerError(f"this invite is for admitter {show_peer(invite.admitter)}, not for this one")
        if not any(map(signed.is_signed_by, (swarm.public_key, raw_public(swarm.root)))):
            raise PeerError(
                "this invite is not as it was made: neither this admitter nor the root of the swarm has signed it; "
                "paste the whole token again, or ask for a new one"
            )
        if self._wall() > invite.not_after_s:
            raise PeerError(f"this invite expired on {_date(invite.not_after_s)}: ask for a new one")
        if invite.peer not in (None, applicant):
            raise PeerError("this invite is for another peer")
        if swarm.is_revoked(applicant):
            raise PeerError("this machine's key is revoked in this swarm")

    def _renew(self, request: Renew, applicant: PeerId, public: bytes) -> Admitted:
        swarm, now_s = self._swarm, self._wall()
        member = verify_lapsed(request.chain, swarm.root, now_s)
        if member.peer != applicant:
            raise PeerError("this certificate is for another peer than the one that wants it renewed")
        if now_s > member.not_after_s + GRACE_S:
            raise PeerError(f"this certificate expired on {_date(member.not_after_s)}: ask for a new invite")
        swarm.check_not_revoked(member)
        self._check_own_right()
        # The proof of having been made an admitter is a certificate by the root over one's own key, not a role.
        is_admitter = member.issuer == member.peer
        admitter = b""
        if request.wants_admitter and is_admitter and swarm.has_root_key():
            admitter = swarm.issue_admitter(public)
        return Admitted(swarm.issue(public, member.role), swarm.keys_to_give(), swarm.swarm_news.blob, admitter)

    def _check_own_right(self) -> None:
        if not self._swarm.may_admit or self._swarm.is_revoked_here():
            raise PeerError("this machine is no admitter of its swarm now: ask another one")


# ------------------------------------------------------------------------------------------------------- the applicant


@dataclass(frozen=True, slots=True)
class Welcome:
    """What an applicant has got: all that makes it a member."""

    root: x509.Certificate
    chain: tuple[bytes, ...]
    news: SwarmNews


@dataclass(frozen=True, slots=True)
class Applicant:
    """The holder of `key`, who asks; `wall` returns seconds since 1970."""

    key: Ed25519PrivateKey
    wall: Wall
    random_bytes: RandomBytes

    @property
    def own(self) -> PeerId:
        """The id of the peer."""
        return own_id(self.key)

    async def redeem(self, token: str) -> Welcome:
        """Become a member with the invite `token`. Raises LocalError with what is wrong; it never quotes the token."""
        invite = parse_token(token).invite
        if self.wall() > invite.not_after_s:
            raise LocalError(f"this invite expired on {_date(invite.not_after_s)}: ask for a new one")
        if invite.peer not in (None, self.own):
            raise LocalError(f"this invite is for another peer: this machine is {show_peer(self.own)}")
        causes = []
        for address in invite.addresses:
            try:
                root = await self._fetch_root(address, invite.swarm)
                answer = await self._ask(address, _Door(invite.swarm, root, invite.admitter), Apply(token))
                return self._welcome(answer, root, invite.role)
            except PeerError as error:
                causes.append(f"{address}: {error}")
        raise LocalError(f"this invite could not be redeemed ({'; '.join(causes)})")

    async def renew(self, swarm: Swarm, admitter: PeerId, address: Endpoint) -> tuple[bytes, ...]:
        """Return a new chain from `admitter`. Raises PeerError if it cannot be reached, LocalError if it refuses."""
        door = _Door(swarm.swarm_id, swarm.root, admitter)
        answer = await self._ask(address, door, Renew(swarm.chain(), wants_admitter=swarm.admitter_is_due()))
        return self._welcome(answer, swarm.root, swarm.role).chain

    async def _fetch_root(self, address: Endpoint, swarm: SwarmId) -> x509.Certificate:
        """Return the root certificate of `swarm`, from whoever answers at `address`: its hash proves it."""
        card = await self._visit(address, None, None)
        if not isinstance(card, Card):
            raise PeerError(f"it opened with {type(card).__name__}")
        try:
            return read_root(card.root, swarm)
        except PeerError as error:
            raise PeerError("the daemon there belongs to another swarm than the invite") from error

    async def _ask(self, address: Endpoint, door: "_Door", request: Apply | Renew) -> Admitted:
        """Return what the admitter grants. Raises PeerError if there is no answer, LocalError if it refuses."""
        answer = await self._visit(address, door, request)
        if isinstance(answer, Refused):
            raise LocalError(f"admitter {show_peer(door.admitter)} refuses: {answer.reason}")
        if not isinstance(answer, Admitted):
            raise PeerError(f"it answered with {type(answer).__name__}")
        return answer

    async def _visit(self, address: Endpoint, door: "_Door | None", request: Apply | Renew | None) -> Any:
        """Return the answer to `request`; without a door to trust there is none, and the card is returned."""
        root, name = (None, None) if door is None else (door.root, peer_name(door.admitter, door.swarm))
        context = admission_client_context(private_pem(self.key), self._open_leaf(), root)
        try:
            with trio.fail_after(ASK_S):
                stream = await trio.open_tcp_stream(address.host, address.port)
                try:
                    await stream.send_all(ADMISSION_GREETING)
                    tls = await shake_hands(stream, context, alpn=ADMISSION_ALPN, server_hostname=name)
                    talk = _Talk(tls, _MAX_ANSWER_BYTES)
                    card = await talk.receive()
                    if door is None or request is None:
                        return card
                    if member_of(leaf_of(tls), door.swarm).peer != door.admitter:
                        raise PeerError("another daemon answers there than the admitter")
                    await talk.send(request)
                    return await talk.receive()
                finally:
                    await trio.aclose_forcefully(stream)
        except trio.TooSlowError as error:
            raise PeerError(f"it did not answer within {ASK_S:g} s") from error
        except (OSError, trio.BrokenResourceError) as error:
            raise PeerError(why(error)) from error

    def _welcome(self, admitted: Admitted, root: x509.Certificate, role: str) -> Welcome:
        """Return what was granted, once all of it is known to be true. Raises PeerError."""
        now_s, swarm = self.wall(), swarm_id_of(root)
        chain = admitted.chain
        if admitted.admitter:
            chain = (self.sign_leaf(admitted.admitter, swarm), admitted.admitter)
        member = verify_member(chain, root, now_s)
        if (member.peer, member.role) != (self.own, role):
            raise PeerError(f"it sent the certificate of a {member.role}, {show_peer(member.peer)}, which is not ours")
        listed = revocations.parse(admitted.news, raw_public(root), swarm)
        if key_digest(admitted.datagram_keys[0]) != listed.key_digest:
            raise PeerError("it sent a datagram key that is not the one of its revocation list")
        if listed.names(member):
            raise PeerError("it let this machine in and revokes it at once")
        current, *older = admitted.datagram_keys
        # When they were replaced we do not know: long enough ago that nobody sends with them.
        keys = (DatagramKey(current), *(DatagramKey(key, now_s + KEPT_KEY_S - TURN_S) for key in older))
        return Welcome(root, chain, SwarmNews(listed, admitted.news, keys))

    def sign_leaf(self, admitter: bytes, swarm: SwarmId) -> bytes:
        """Return the leaf that we sign for ourselves with our own `admitter` certificate (DER). Raises PeerError."""
        return self._leaf(self.key, read_certificate(admitter), swarm, "admitter")

    def _open_leaf(self) -> bytes:
        """Return a certificate of the open swarm, which proves the key and nothing else."""
        return self._leaf(*open_root(), OPEN_SWARM, "member")

    def _leaf(self, issuer_key: Ed25519PrivateKey, issuer: x509.Certificate, swarm: SwarmId, role: str) -> bytes:
        public = self.key.public_key().public_bytes_raw()
        try:
            leaf = issue_leaf(issuer_key, issuer, swarm, public, role, self.wall(), new_serial(self.random_bytes))
        except LocalError as error:
            raise PeerError(str(error)) from error
        return leaf.public_bytes(Encoding.DER)


@dataclass(frozen=True, slots=True)
class _Door:
    """The admitter of a swarm, once its root is known."""

    swarm: SwarmId
    root: x509.Certificate
    admitter: PeerId


async def join_with_invite(path: Path, applicant: Applicant, token: str) -> str:
    """Make the state directory `path` that of a member, unless it is already; return a sentence for the user.

    Raises LocalError if the invite does not work or the directory belongs to another swarm, Fatal if it is damaged.
    """
    invite = parse_token(token).invite
    store = SwarmStore(path)
    swarm = load_swarm(path, applicant.key, applicant.wall, applicant.random_bytes) if store.exists() else None
    if swarm is not None and swarm.swarm_id != invite.swarm:
        raise LocalError(
            f"{path} belongs to swarm {swarm.name}, and the invite is for another one: choose another --state-dir"
        )
    if swarm is not None and swarm.can_stay(invite.role):
        return f"this machine is in swarm {swarm.name} already, so the invite is left alone"
    welcome = await applicant.redeem(token)
    await trio.to_thread.run_sync(_move_in, store, welcome, invite)
    return f"this machine is now in swarm {swarm_name_of(welcome.root)}, as {invite.role}"


def _move_in(store: SwarmStore, welcome: Welcome, invite: Invite) -> None:
    if not store.exists():
        store.found(welcome.root, welcome.chain, welcome.news, {invite.admitter: invite.addresses})
        return
    store.exchange_news(welcome.news)
    store.remember_admitter(invite.admitter, *invite.addresses)
    store.save_chain(welcome.chain)


class _Talk:
    """Messages at the door, one at a time; what the other side sends has at most `max_bytes`."""

    def __init__(self, stream: trio.abc.Stream, max_bytes: int) -> None:
        self._stream = stream
        self._max_bytes = max_bytes

    async def send(self, message: Any) -> None:
        await self._stream.send_all(control_frame(ADMISSION.encode(message)))

    async def receive(self) -> Any:
        length = int.from_bytes(await receive_exactly(self._stream, FRAME_PREFIX_BYTES), "little")
        if length > self._max_bytes:
            raise PeerError(f"it announced a message of {length} bytes: at most {self._max_bytes} are allowed")
        return ADMISSION.decode(await receive_exactly(self._stream, length))


def _date(time_s: float) -> str:
    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M} UTC"
