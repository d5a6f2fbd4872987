"""What is said at the door: every message comes out as it went in, and anything else is the peer's mistake."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from message_strategies import outcome

from mpd.admission import ADMISSION, MAX_REASON_CHARS, Admitted, Apply, Card, Refused, Renew
from mpd.errors import PeerError
from mpd.identity import MAX_CERTIFICATE_BYTES, SwarmId
from mpd.ids import Endpoint, peer_id_of
from mpd.invites import MAX_TOKEN_CHARS, Invite, make_token
from mpd.revocations import MAX_BLOB_BYTES

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PUBLIC = KEY.public_key().public_bytes_raw()
TOKEN = make_token(
    Invite(SwarmId(b"s" * 20), peer_id_of(PUBLIC), (Endpoint("192.0.2.7", 4747),), b"n" * 16, 2**31, 1, "member", None),
    KEY,
)
TOO_LONG = bytes(MAX_CERTIFICATE_BYTES + 1)

CERTIFICATES = st.binary(min_size=1, max_size=60)
CHAINS = st.lists(CERTIFICATES, min_size=1, max_size=2).map(tuple)
KEYS = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=2).map(tuple)
MESSAGES = st.one_of(
    st.builds(Card, CERTIFICATES),
    st.builds(Apply, st.text(max_size=60)),
    st.builds(Renew, CHAINS, st.booleans()),
    st.builds(Admitted, CHAINS, KEYS, st.binary(max_size=60), st.just(b"") | CERTIFICATES),
    st.builds(Refused.because, st.text(max_size=60)),
)


@given(MESSAGES)
def test_what_goes_in_comes_out(message: object) -> None:
    assert ADMISSION.decode(ADMISSION.encode(message)) == message


def test_an_application_carries_an_invite() -> None:
    assert Apply(TOKEN).invite().is_signed_by(PUBLIC)


@pytest.mark.parametrize("token", ["", "mpdi1.", TOKEN[:-9], "\ud800", "mpdi2.AAAA"])
def test_an_application_without_one_is_the_peers_mistake(token: str) -> None:
    with pytest.raises(PeerError, match="invite"):
        Apply(token).invite()


def test_secrets_are_not_shown() -> None:
    assert repr(Apply(TOKEN)) == "Apply()"
    assert "sssss" not in repr(Admitted((b"leaf",), (b"s" * 32,)))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Card(b""), "1 to 2048 bytes"),
        (lambda: Card(TOO_LONG), "1 to 2048 bytes"),
        (lambda: Apply("x" * (MAX_TOKEN_CHARS + 1)), "at most 4096 characters"),
        (lambda: Renew(()), "1 to 2 certificates"),
        (lambda: Renew((b"x",) * 3), "1 to 2 certificates"),
        (lambda: Renew((b"x", TOO_LONG)), "1 to 2048 bytes"),
        (lambda: Admitted((), (bytes(32),)), "1 to 2 certificates"),
        (lambda: Admitted((b"x",), ()), "1 to 2 datagram keys"),
        (lambda: Admitted((b"x",), (bytes(32),) * 3), "1 to 2 datagram keys"),
        (lambda: Admitted((b"x",), (bytes(31),)), "a datagram key has 32 bytes"),
        (lambda: Admitted((b"x",), (bytes(32),), bytes(MAX_BLOB_BYTES + 1)), "at most 200124 bytes"),
        (lambda: Admitted((b"x",), (bytes(32),), b"", TOO_LONG), "1 to 2048 bytes"),
        (lambda: Refused("x" * (MAX_REASON_CHARS + 1)), "at most 300 characters"),
        (lambda: Refused("\x1b[2J"), "one printable line"),
    ],
)
def test_a_message_beyond_its_bounds_cannot_be_made(make: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make()  # type: ignore[operator]


@given(st.text())
def test_any_reason_can_be_given(reason: str) -> None:
    refused = Refused.because(reason)
    assert len(refused.reason) == min(len(reason), MAX_REASON_CHARS)
    assert outcome(ADMISSION, ADMISSION.encode(refused), PeerError) == refused


def test_a_reason_that_can_be_shown_stays_as_it_is() -> None:
    assert Refused.because("this invite was used before: ask for another").reason.endswith("ask for another")
    assert Refused.because("a\nb\x1b[2J").reason == "a b [2J"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_peers_mistake(body: bytes) -> None:
    message = outcome(ADMISSION, body, PeerError)
    assert message is None or type(message) in ADMISSION.types.values()


@given(MESSAGES, st.data())
def test_a_message_gone_wrong_is_one_or_a_peers_mistake(message: object, data: st.DataObject) -> None:
    body = ADMISSION.encode(message)
    start = data.draw(st.integers(0, len(body)))
    wrong = body[:start] + data.draw(st.binary(max_size=4)) + body[start + data.draw(st.integers(0, 4)) :]
    received = outcome(ADMISSION, wrong, PeerError)
    assert received is None or ADMISSION.decode(ADMISSION.encode(received)) == received
