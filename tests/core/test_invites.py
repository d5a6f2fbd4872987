"""Invites: one line of text, read however it was pasted, refused in clear words, and shown to nobody."""

import base64
import dataclasses
import re
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given
from hypothesis import strategies as st

from mpd.errors import LocalError
from mpd.identity import ROLES, SwarmId
from mpd.ids import Endpoint, PeerId, peer_id_of
from mpd.invites import MAX_ADDRESSES, MAX_TOKEN_CHARS, MAX_USES, Invite, make_token, parse_token

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
PUBLIC = KEY.public_key().public_bytes_raw()
NONCE = b"*secret nonce 16"
INVITE = Invite(
    swarm=SwarmId(b"s" * 20),
    admitter=peer_id_of(PUBLIC),
    addresses=(Endpoint("192.0.2.7", 4747), Endpoint("2001:db8::7", 4747)),
    nonce=NONCE,
    not_after_s=1_800_000_000,
    uses=1,
    role="member",
    peer=None,
)
TOKEN = make_token(INVITE, KEY)
DAMAGED = "damaged or cut short: copy the whole line that was printed"

IDS = st.binary(min_size=20, max_size=20)
HOSTS = st.sampled_from(["192.0.2.7", "2001:db8::7", "fe80::1%eth0", "peer-7.example", "localhost"])
INVITES = st.builds(
    Invite,
    swarm=IDS.map(SwarmId),
    admitter=IDS.map(PeerId),
    addresses=st.lists(st.builds(Endpoint, HOSTS, st.integers(1, 65535)), min_size=1, max_size=MAX_ADDRESSES).map(
        tuple
    ),
    nonce=st.binary(min_size=16, max_size=16),
    not_after_s=st.integers(1, 2**34 - 1),
    uses=st.integers(1, MAX_USES),
    role=st.sampled_from(ROLES),
    peer=st.none() | IDS.map(PeerId),
)


def text_of(raw: bytes) -> str:
    return "mpdi1." + base64.urlsafe_b64encode(raw).decode("ascii").rstrip("=")


def refusal_of(text: str) -> str:
    """Return why `text` is no invite, or nothing if it is one; any other error passes through."""
    try:
        parse_token(text)
    except LocalError as error:
        return str(error)
    return ""


@given(INVITES)
def test_what_goes_in_comes_out(invite: Invite) -> None:
    signed = parse_token(make_token(invite, KEY))
    assert signed.invite == invite
    assert signed.is_signed_by(PUBLIC)


def test_a_token_is_one_short_word() -> None:
    assert re.fullmatch(r"mpdi1\.[A-Za-z0-9_-]+", TOKEN)
    assert len(TOKEN) < 400


def test_the_longest_token_can_be_read() -> None:
    addresses = tuple(Endpoint("a." * 125 + f"b{i}", 65535) for i in range(MAX_ADDRESSES))
    longest = dataclasses.replace(
        INVITE, addresses=addresses, not_after_s=2**34 - 1, uses=MAX_USES, role="observer", peer=PeerId(b"p" * 20)
    )
    token = make_token(longest, KEY)
    assert len(token) <= MAX_TOKEN_CHARS
    assert parse_token(token).invite == longest


@pytest.mark.parametrize(
    "text",
    [
        f"  {TOKEN}\n",
        "\n".join(TOKEN[i : i + 60] for i in range(0, len(TOKEN), 60)),
        " ".join(TOKEN),
        f"\ufeff {TOKEN}"[1:],
    ],
)
def test_white_space_does_not_matter(text: str) -> None:
    assert parse_token(text) == parse_token(TOKEN)


def test_only_the_key_that_signed_is_accepted() -> None:
    signed = parse_token(TOKEN)
    assert signed.is_signed_by(PUBLIC)
    assert not signed.is_signed_by(OTHER_KEY.public_key().public_bytes_raw())
    for nonsense in (b"", bytes(32), b"\xff" * 32, bytes(33)):
        assert not signed.is_signed_by(nonsense)


def test_an_altered_invite_is_not_signed() -> None:
    signed = parse_token(TOKEN)
    raised = signed.body.replace(b"\xa4uses\x01", b"\xa4uses\x02")
    altered = parse_token(text_of(signed.signature + raised))
    assert altered.invite == dataclasses.replace(INVITE, uses=2)
    assert not altered.is_signed_by(PUBLIC)


def test_a_signature_made_for_something_else_does_not_count() -> None:
    body = parse_token(TOKEN).body
    for domain in (b"", b"mpd revocations 1"):
        assert not parse_token(text_of(KEY.sign(domain + body) + body)).is_signed_by(PUBLIC)
    assert parse_token(text_of(KEY.sign(b"mpd invite 1" + body) + body)).is_signed_by(PUBLIC)


def test_an_invite_does_not_show_its_secrets() -> None:
    signed = parse_token(TOKEN)
    for shown in (repr(signed), str(signed), f"{signed}", repr(signed.invite), f"{[signed]}"):
        assert "192.0.2.7" in shown
        assert NONCE.decode("ascii") not in shown
        assert repr(signed.signature)[2:10] not in shown


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "this is not an invite: an invite begins with mpdi1.; copy the whole line that was printed"),
        ("mpd join --invite " + TOKEN, "this is not an invite: an invite begins with mpdi1."),
        (TOKEN[1:], "this is not an invite"),
        (TOKEN.upper(), "this is not an invite"),
        (TOKEN.removeprefix("mpdi1."), "this is not an invite"),
        (TOKEN.replace("mpdi1.", "mpdi2."), "version 2 and this mpd reads version 1: use the same mpd on both ends"),
        (TOKEN.replace("mpdi1.", "mpdi\u0661."), "this is not an invite"),
        ("mpdi1.", DAMAGED),
        (TOKEN + "=", DAMAGED),
        (TOKEN[:60] + "/" + TOKEN[61:], DAMAGED),
        (TOKEN[:60] + "\u00e4" + TOKEN[61:], DAMAGED),
        (TOKEN + TOKEN, DAMAGED),
        (text_of(bytes(64)), DAMAGED),
        (text_of(bytes(64) + b"\xc0"), DAMAGED),
        (text_of(bytes(64) + msgspec.msgpack.encode(["card", {"root": b""}])), DAMAGED),
        ("mpdi1." + "A" * MAX_TOKEN_CHARS, f"has {MAX_TOKEN_CHARS + 6} characters, and an invite at most"),
    ],
)
def test_what_is_wrong_is_said_in_clear_words(text: str, why: str) -> None:
    assert why in refusal_of(text)


def test_no_beginning_of_a_token_is_one() -> None:
    refusals = [refusal_of(TOKEN[:n_chars]) for n_chars in range(len(TOKEN))]
    assert all("copy the whole line that was printed" in refusal for refusal in refusals)


@given(st.integers(0, len(TOKEN)), st.text("abcXYZ019-_.", max_size=6), st.integers(0, 6))
def test_a_refusal_never_quotes_the_token(start: int, new: str, n_gone: int) -> None:
    refusal = refusal_of(TOKEN[:start] + new + TOKEN[start + n_gone :])
    assert not any(TOKEN[i : i + 8] in refusal for i in range(6, len(TOKEN) - 8))


@given(st.text(max_size=100) | st.text("mpdi1.AZaz09_-= \n", max_size=100).map(lambda text: "mpdi1." + text))
@example("mpdi1.\ud800")
@example("mpdi" + "1" * 5000 + ".")
def test_any_text_is_no_invite_and_nothing_worse(text: str) -> None:
    assert refusal_of(text)


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 8))
def test_any_body_is_an_invite_or_a_local_error(new: bytes, start: int, n_gone: int) -> None:
    body = parse_token(TOKEN).body
    text = text_of(bytes(64) + body[:start] + new + body[start + n_gone :])
    if not refusal_of(text):
        assert parse_token(text).invite.role in ROLES


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"swarm": b"s" * 19}, "ids of 20 bytes"),
        ({"admitter": b"a" * 21}, "ids of 20 bytes"),
        ({"peer": b""}, "ids of 20 bytes"),
        ({"nonce": b"n" * 15}, "a nonce of 16"),
        ({"addresses": ()}, "1 to 8 addresses, not 0"),
        ({"addresses": INVITE.addresses * 5}, "1 to 8 addresses, not 10"),
        ({"addresses": (Endpoint("0.0.0.0", 4747),)}, "nobody can be dialled at 0.0.0.0:4747"),
        ({"addresses": (Endpoint("::", 4747),)}, r"nobody can be dialled at \[::\]:4747"),
        ({"addresses": (Endpoint("peer.example", 0),)}, "nobody can be dialled at peer.example:0"),
        ({"not_after_s": 0}, "cannot expire at 0 s after 1970"),
        ({"not_after_s": 2**34}, "cannot expire at"),
        ({"uses": 0}, "1 to 10000 times, not 0"),
        ({"uses": MAX_USES + 1}, "1 to 10000 times, not 10001"),
        ({"role": "root"}, "'root' is not a role: one of member, observer, admitter expected"),
    ],
)
def test_an_invite_that_nobody_could_use_is_not_made(change: dict[str, Any], why: str) -> None:
    with pytest.raises(LocalError, match=why):
        dataclasses.replace(INVITE, **change)
