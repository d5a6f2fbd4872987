"""TLS between daemons on real sockets: who gets through, who does not, and what each side is told about it.

Strategy: every wrong certificate is a real one that the test's own authority signs. The dialler always trusts the
daemon that it calls, so that it is that daemon which has to find the fault.
"""

import datetime
import random
import ssl
import time
from collections.abc import Callable

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from identities import DAY_S, Card, TestSwarm, der, keys, lab, node_id, open_card, pem, public

from mpd.daemon import tls
from mpd.daemon.budgets import Descriptors
from mpd.daemon.tls import HandshakeFailed, Unwelcome, explain, leaf_of, shake_hands, wrap_client, wrap_server
from mpd.errors import PeerError
from mpd.identity import issue_leaf, member_of, new_root, open_root, peer_name, swarm_id_of
from mpd.ids import PeerId

Outcome = object


async def meet(
    dialler: Callable[[trio.SocketStream], object], acceptor: Callable[[trio.SocketStream], object]
) -> tuple[Outcome, Outcome]:
    """Run both ends of one connection; return what each returned or raised. Both streams are closed at the end."""
    outcomes: dict[str, Outcome] = {}

    async def run(name: str, wrap: Callable[[trio.SocketStream], object], stream: trio.SocketStream) -> None:
        try:
            outcomes[name] = await wrap(stream)
        except PeerError as error:
            outcomes[name] = error
        if isinstance(outcomes[name], PeerError):
            await stream.aclose()

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(10):
        async with listener:
            near = await trio.open_tcp_stream(*listener.socket.getsockname())
            far = await listener.accept()
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(run, "dialler", dialler, near)
            nursery.start_soon(run, "acceptor", acceptor, far)
    return outcomes["dialler"], outcomes["acceptor"]


def dial(card: Card, peer: PeerId) -> Callable[[trio.SocketStream], object]:
    """Dial as `card`, and read what comes first: in TLS 1.3 that is the verdict."""

    async def run(stream: trio.SocketStream) -> object:
        connection, member = await wrap_client(stream, card, peer)
        try:
            said = await connection.receive_some(5)
        except trio.BrokenResourceError as error:
            raise PeerError(explain(error)) from error
        return member, bytes(said)

    return run


def accept(card: Card) -> Callable[[trio.SocketStream], object]:
    async def run(stream: trio.SocketStream) -> object:
        try:
            connection, member = await wrap_server(stream, card)
        except Unwelcome as error:
            await error.tls.send_all(b"Leave")
            raise
        await connection.send_all(b"Hello")
        return member

    return run


async def test_two_members_know_each_other_from_their_certificates() -> None:
    one, other = lab().card(0), lab().card(1, role="observer")
    (acceptor, said), dialler = await meet(dial(one, other.own), accept(other))
    assert (acceptor.peer, acceptor.role, acceptor.swarm) == (other.own, "observer", lab().id)
    assert (dialler.peer, dialler.role) == (one.own, "member")
    assert said == b"Hello"


async def test_the_open_swarm_works_in_the_same_way() -> None:
    (acceptor, _), dialler = await meet(dial(open_card(0), node_id(1)), accept(open_card(1)))
    assert (acceptor.peer, dialler.peer) == (node_id(1), node_id(0))
    assert acceptor.issuer is None


# -------------------------------------------------------------------------------------------------- who is not let in


class Bare(Card):
    """Shows no certificate."""

    def client_context(self, pinned: bool = True) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols([tls.ALPN])
        context.load_verify_locations(cadata=der(self.root))
        return context


def with_chain(*chain: x509.Certificate) -> Card:
    return Card(keys()[0], [der(each) for each in chain], lab().root)


def bare() -> Card:
    return Bare(keys()[0], (), lab().root)


def of_another_swarm() -> Card:
    other = TestSwarm("elsewhere").card(0)
    return Card(other.key, other.chain, lab().root)


def of_the_open_swarm() -> Card:
    return Card(keys()[0], open_card(0).chain, lab().root)


def self_signed() -> Card:
    root = new_root(keys()[0], "myself", time.time(), serial=1)
    return with_chain(root)


def signed_by_a_member() -> Card:
    """A leaf that names the swarm, signed by the key of a member, which may not sign."""
    member = lab().card(5)
    fake = new_root(member.key, "lab", time.time(), serial=1)
    leaf = issue_leaf(member.key, fake, swarm_id_of(fake), public(keys()[0]), "member", time.time(), serial=2)
    return Card(keys()[0], (der(leaf), *member.chain), lab().root)


def expired() -> Card:
    return TestSwarm("lab", age_s=8 * DAY_S).card(0)


def not_yet_valid() -> Card:
    return lab().card(0, now_s=time.time() + 2 * DAY_S)


def without_its_admitter() -> Card:
    card = lab().card(0)
    return Card(card.key, card.chain[:1], lab().root)


REFUSED = [
    (bare, "it talks to members of its swarm only: get an invite"),
    (of_another_swarm, "of another swarm: get an invite"),
    (of_the_open_swarm, "of another swarm: get an invite"),
    (self_signed, "it refused this machine's certificate"),
    (signed_by_a_member, "it refused this machine's certificate"),
    (expired, "certificate: expired, or one of the two clocks is wrong"),
    (not_yet_valid, "certificate: not valid yet, or one of the two clocks is wrong"),
    (without_its_admitter, "of another swarm: get an invite"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
async def test_a_wrong_certificate_is_refused_and_its_owner_told(make: Callable[[], Card], reason: str) -> None:
    here = lab().card(1)
    dialler, acceptor = await meet(dial(make(), here.own), accept(here))
    assert isinstance(acceptor, HandshakeFailed)
    assert isinstance(dialler, PeerError)
    assert reason in str(dialler)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (of_another_swarm, "belongs to another swarm: get an invite for it"),
        (of_the_open_swarm, "belongs to another swarm: get an invite for it"),
        (self_signed, "belongs to another swarm: get an invite for it"),
        (expired, "the certificate of the daemon there has expired"),
        (not_yet_valid, "the certificate of the daemon there is not valid yet"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
async def test_a_wrong_certificate_on_the_other_side_is_refused_too(make: Callable[[], Card], reason: str) -> None:
    dialler, acceptor = await meet(dial(lab().card(1), node_id(0)), accept(make()))
    assert isinstance(acceptor, HandshakeFailed)
    assert reason in str(dialler)


async def test_whoever_is_called_must_be_whom_we_meant() -> None:
    dialler, acceptor = await meet(dial(lab().card(0), node_id(7)), accept(lab().card(1)))
    assert "another daemon answers there than the one that was called" in str(dialler)
    assert isinstance(acceptor, HandshakeFailed)


async def test_a_peer_is_pinned_even_if_its_name_was_not_asked_for() -> None:
    careless = lab().card(0)
    careless.client_context = lambda pinned=True: Card.client_context(careless, pinned=False)
    dialler, _ = await meet(dial(careless, node_id(7)), accept(lab().card(1)))
    assert "another daemon answers there than the one that was called" in str(dialler)


async def test_a_revoked_member_is_refused_and_can_be_told_why() -> None:
    here, revoked = lab().card(1), lab().card(0)
    here.revoked.add(revoked.own)
    dialler, acceptor = await meet(dial(revoked, here.own), accept(here))
    assert isinstance(acceptor, Unwelcome)
    assert "revoked" in str(acceptor)
    assert dialler[1] == b"Leave"


async def test_a_revoked_member_is_not_called_either() -> None:
    caller, revoked = lab().card(1), lab().card(0)
    caller.revoked.add(revoked.own)
    dialler, _ = await meet(dial(caller, revoked.own), accept(revoked))
    assert "revoked" in str(dialler)


async def test_a_name_that_is_not_of_the_key_is_refused() -> None:
    """An admitter that hands out somebody else's name: everything is well signed, only the hash tells."""
    here, victim = lab().card(1), lab().card(2)
    forged = forged_name(victim.own)
    dialler, acceptor = await meet(dial(Card(keys()[0], forged, lab().root), here.own), accept(here))
    assert isinstance(acceptor, Unwelcome)
    assert "named after another key" in str(acceptor)
    with pytest.raises(PeerError, match="named after another key"):
        member_of(forged[0], lab().id)
    # And the other way round: the name is right, so TLS lets it pass.
    dialler, _ = await meet(dial(here, victim.own), accept(Card(keys()[0], forged, lab().root)))
    assert "named after another key" in str(dialler)


def forged_name(victim: PeerId) -> tuple[bytes, bytes]:
    """Return a chain for key 0 with the name of `victim`, signed by the admitter."""
    honest = x509.load_der_x509_certificate(lab().card(2).chain[0])
    draft = x509.CertificateBuilder().subject_name(honest.subject).issuer_name(honest.issuer).serial_number(77)
    draft = draft.not_valid_before(honest.not_valid_before_utc).not_valid_after(honest.not_valid_after_utc)
    draft = draft.public_key(keys()[0].public_key())
    for extension in honest.extensions:
        draft = draft.add_extension(extension.value, extension.critical)
    assert peer_name(victim, lab().id) in str(honest.extensions)
    return der(draft.sign(lab().admitter_key, None)), der(lab().admitter)


class Meddler(trio.abc.HalfCloseableStream):
    """Passes on what is sent through `stream`, with one byte of it changed, dropped, or followed by too many."""

    def __init__(self, stream: trio.SocketStream, rng: random.Random) -> None:
        self.socket = stream.socket
        self._stream = stream
        self._rng = rng
        self._strikes_in = rng.randrange(2)

    async def send_all(self, data: bytes) -> None:
        if self._strikes_in == 0:
            i = self._rng.randrange(len(data))
            data = self._rng.choice(
                [data[:i] + self._rng.randbytes(1) + data[i + 1 :], data[:i] + data[i + 1 :], data[:i] + bytes(9000)]
            )
        self._strikes_in -= 1
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self._stream.receive_some(max_bytes)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


@pytest.mark.parametrize("seed", range(60))
async def test_a_handshake_that_is_tampered_with_comes_to_nothing_and_blames_the_peer(seed: int) -> None:
    """Whoever is on the path, or writes TLS by hand: neither end raises anything but what it says it raises."""
    rng = random.Random(seed)

    async def dial_badly(stream: trio.SocketStream) -> object:
        with trio.move_on_after(0.05):  # the other end may wait for the rest
            return await dial(lab().card(0), node_id(1))(Meddler(stream, rng))
        raise PeerError("nothing comes of it")

    dialler, acceptor = await meet(dial_badly, accept(lab().card(1)))
    assert isinstance(acceptor, PeerError) or acceptor.peer == node_id(0)
    assert isinstance(dialler, PeerError) or dialler[1] == b"Hello"  # a byte may be replaced by itself


# ------------------------------------------------------------------------------------- what ssl does not do by itself


def raw_client(alpn: str | None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = tls.client_context(pem(keys()[0]), lab().card(0).chain, lab().root)
    context.minimum_version = context.maximum_version = version
    if alpn is not None:
        context.set_alpn_protocols([alpn])
    return context


def wrap_raw(context: ssl.SSLContext, peer: PeerId) -> Callable[[trio.SocketStream], object]:
    async def run(stream: trio.SocketStream) -> object:
        return await shake_hands(stream, context, alpn="h2", server_hostname=peer_name(peer, lab().id))

    return run


async def test_another_protocol_is_refused_on_both_sides_although_the_handshake_succeeds() -> None:
    dialler, acceptor = await meet(wrap_raw(raw_client("h2"), node_id(1)), accept(lab().card(1)))
    assert isinstance(acceptor, HandshakeFailed)
    assert "does not speak mpd/1" in str(acceptor)
    assert "not an mpd daemon" in str(dialler)


async def test_an_older_tls_is_refused() -> None:
    context = raw_client(tls.ALPN, ssl.TLSVersion.TLSv1_2)
    dialler, acceptor = await meet(wrap_raw(context, node_id(1)), accept(lab().card(1)))
    assert isinstance(acceptor, HandshakeFailed)
    assert "it does not speak TLS 1.3" in str(dialler)


async def test_a_web_server_is_not_taken_for_another_swarm() -> None:
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "www.example.org")])
    now = datetime.datetime.now(datetime.UTC)
    site = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now).not_valid_after(now + datetime.timedelta(1)).sign(key, None)
    )  # fmt: skip
    context = tls.server_context(pem(key), [der(site)], lab().root)
    context.set_alpn_protocols(["http/1.1"])

    async def serve(stream: trio.SocketStream) -> object:
        return await shake_hands(stream, context, alpn="http/1.1", server_side=True)

    dialler, _ = await meet(dial(lab().card(0), node_id(1)), serve)
    assert str(dialler) == "what answers there is not an mpd daemon"


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"\xff" * 300])
async def test_whoever_does_not_speak_tls_is_named_as_such(answer: bytes) -> None:
    async def serve(stream: trio.SocketStream) -> object:
        await stream.send_all(answer)

    dialler, _ = await meet(dial(lab().card(0), node_id(1)), serve)
    assert "not an mpd daemon: it does not speak TLS" in str(dialler)


async def test_whoever_hangs_up_leaves_both_possibilities_open() -> None:
    async def hang_up(stream: trio.SocketStream) -> object:
        await stream.receive_some(1)
        await stream.aclose()

    dialler, _ = await meet(dial(lab().card(0), node_id(1)), hang_up)
    assert "it closed the connection during the handshake: it may not be an mpd daemon, or it refuses" in str(dialler)


def talk_in_memory(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> ssl.SSLObject:
    """Do a handshake and exchange a byte each way without sockets; return the client's end."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname=name)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    for step in (near.do_handshake, far.do_handshake, near.do_handshake, far.do_handshake):
        try:
            step()
        except ssl.SSLWantReadError:
            continue
    far.write(b"1")
    assert near.read(1) == b"1"
    return near


def test_no_session_can_be_resumed() -> None:
    """A ticket would let its holder in again after a revocation, without a certificate."""
    here, caller = lab().card(1), lab().card(0)
    name = peer_name(here.own, lab().id)
    connection = talk_in_memory(caller.client_context(), here.server_context(), name)
    assert not connection.session.has_ticket
    careless = here.server_context()
    careless.num_tickets = 2
    assert talk_in_memory(caller.client_context(), careless, name).session.has_ticket  # so the test would see one


@pytest.mark.parametrize("make", ["server_context", "client_context"])
def test_contexts_demand_tls_13_and_a_certificate(make: str) -> None:
    context = getattr(lab().card(0), make)()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.verify_flags & ssl.VERIFY_X509_STRICT
    assert not context.hostname_checks_common_name
    assert context.check_hostname == (make == "client_context")


def test_making_a_context_leaves_no_descriptor_open() -> None:
    descriptors = Descriptors()
    before = descriptors.used
    for _ in range(5):
        lab().card(0).server_context()
        with pytest.raises(ssl.SSLError):
            tls.server_context(pem(keys()[1]), lab().card(0).chain, lab().root)  # not the key of that certificate
    assert descriptors.used == before


# ----------------------------------------------------------------------------------------------------------- admission


def serve_admission(card: Card) -> Callable[[trio.SocketStream], object]:
    context = tls.admission_server_context(pem(card.key), card.chain)

    async def run(stream: trio.SocketStream) -> object:
        connection = await shake_hands(stream, context, alpn=tls.ADMISSION_ALPN, server_side=True)
        await connection.send_all(b"Hello")
        return leaf_of(connection)

    return run


def seek_admission(root: x509.Certificate | None, admitter: PeerId | None) -> Callable[[trio.SocketStream], object]:
    context = tls.admission_client_context(pem(keys()[0]), open_card(0).chain[0], root)

    async def run(stream: trio.SocketStream) -> object:
        name = None if admitter is None else peer_name(admitter, lab().id)
        connection = await shake_hands(stream, context, alpn=tls.ADMISSION_ALPN, server_hostname=name)
        try:
            return bytes(await connection.receive_some(5)), leaf_of(connection)
        except trio.BrokenResourceError as error:
            raise PeerError(explain(error)) from error

    return run


@pytest.mark.parametrize("root", [None, lab().root], ids=["to fetch the root", "verified"])
async def test_whoever_wants_to_join_proves_its_key_and_no_more(root: x509.Certificate | None) -> None:
    admitter = lab().card(1)
    dialler, leaf = await meet(seek_admission(root, None if root is None else admitter.own), serve_admission(admitter))
    assert dialler == (b"Hello", admitter.chain[0])
    assert x509.load_der_x509_certificate(leaf).public_key().public_bytes_raw() == public(keys()[0])


async def test_only_the_admitter_of_the_invite_is_asked() -> None:
    dialler, _ = await meet(seek_admission(lab().root, node_id(2)), serve_admission(lab().card(1)))
    assert "another daemon answers there" in str(dialler)


async def test_an_admitter_of_another_swarm_is_not_asked() -> None:
    dialler, _ = await meet(seek_admission(open_root()[1], node_id(1)), serve_admission(lab().card(1)))
    assert "belongs to another swarm" in str(dialler)


async def test_the_door_for_applicants_leads_to_no_link_and_the_other_way_round() -> None:
    """A certificate of the open swarm opens the one, a member's opens the other; ALPN keeps them apart besides."""
    dialler, acceptor = await meet(dial(lab().card(0), node_id(1)), serve_admission(lab().card(1)))
    assert isinstance(acceptor, HandshakeFailed)
    assert isinstance(dialler, PeerError)
    dialler, acceptor = await meet(seek_admission(lab().root, node_id(1)), accept(lab().card(1)))
    assert isinstance(acceptor, HandshakeFailed)
    assert isinstance(dialler, PeerError)


# -------------------------------------------------------------------------------------------------------- explanations


def alert(name: str) -> trio.BrokenResourceError:
    cause = ssl.SSLError(1, "[SSL] ...")
    cause.reason = name
    error = trio.BrokenResourceError()
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("TLSV1_ALERT_UNKNOWN_CA", "another swarm: get an invite"),
        ("SSLV3_ALERT_CERTIFICATE_REVOKED", "revoked"),
        ("SSL/TLS_ALERT_CERTIFICATE_EXPIRED", "expired"),  # as later OpenSSL call it
        ("TLSV1_ALERT_NO_APPLICATION_PROTOCOL", "not an mpd daemon"),
        ("TLSV1_ALERT_INTERNAL_ERROR", "it ended the handshake: internal error"),
        ("WRONG_VERSION_NUMBER", "it does not speak TLS"),
    ],
)
def test_alerts_are_explained(name: str, meaning: str) -> None:
    assert meaning in explain(alert(name))


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset"), trio.BrokenResourceError(), ssl.SSLEOFError(8, "")]
)
def test_every_other_end_is_explained_too(error: Exception) -> None:
    assert "closed the connection" in explain(error)
