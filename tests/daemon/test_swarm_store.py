"""The folder `swarm/`: complete or not there, never lost to a full disk, and junk in it is named and left alone."""

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from swarm_helpers import DAY_S, NOWHERE, Machine, World, fill_disk

from mpd.daemon.swarm_store import KEPT_KEY_S, DatagramKey, SwarmNews, SwarmStore
from mpd.errors import Fatal, LocalError
from mpd.ids import Endpoint, PeerId, parse_peer, show_peer
from mpd.invites import parse_token
from mpd.revocations import Revocations

FILES = ("swarm.json", "chain.pem", "news.json", "invites.json", "root.pem")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def owner(world: World) -> Machine:
    return world.owner()


def everything(machine: Machine) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in machine.store.folder.iterdir()}


def read_all(store: SwarmStore) -> None:
    store.check()
    store.admitters()


# ------------------------------------------------------------------------------------------------------------ becoming


def test_a_machine_without_the_folder_is_in_no_private_swarm(world: World) -> None:
    assert not world.machine().store.exists()


def test_what_is_written_is_read_again(world: World, owner: Machine) -> None:
    member = world.member(owner)
    assert member.store.root() == owner.store.root()
    assert member.store.news() == owner.store.news()
    assert member.store.admitters() == {owner.own: (NOWHERE,)}
    assert len(member.store.chain()) == 2
    assert member.store.root_key() is None
    assert owner.store.root_key() is not None


def test_everything_is_for_its_owner_only(owner: Machine) -> None:
    assert sorted(everything(owner)) == sorted(FILES)
    assert {stat.S_IMODE(file.stat().st_mode) for file in owner.store.folder.iterdir()} == {0o600}
    assert stat.S_IMODE(owner.store.folder.stat().st_mode) == 0o700


def test_there_is_one_swarm_for_a_machine(world: World, owner: Machine) -> None:
    before = everything(owner)
    with pytest.raises(LocalError, match="exists already: this machine belongs to a swarm"):
        owner.create("another")
    assert everything(owner) == before
    assert sorted(path.name for path in owner.path.iterdir()) == ["key.pem", "lock.files", "swarm"]


def test_on_a_full_disk_nothing_is_half_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = world.machine()
    fill_disk(monkeypatch)
    with pytest.raises(LocalError, match="cannot be made: No space left on device; nothing was changed"):
        machine.create()
    assert sorted(path.name for path in machine.path.iterdir()) == ["key.pem", "lock.files"]


# ---------------------------------------------------------------------------------------------------------------- junk


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "junk",
    [b"", b"\0" * 64, b"{}", b"[" * 100_000, b'{"root": 1}', b"\x80\x04K\x01.", b"-----BEGIN CERTIFICATE-----\nAAAA\n"],
    ids=["empty", "zeros", "object", "deep", "other types", "pickle", "cut pem"],
)
def test_junk_is_fatal_named_and_left_alone(owner: Machine, name: str, junk: bytes) -> None:
    file = owner.store.folder / name
    if (name, junk) == ("invites.json", b"{}"):
        junk = b"[]"
    file.write_bytes(junk)
    with pytest.raises(Fatal, match=rf"{name} .*(restore it, or |move it away)"):
        read_all(owner.store)
    assert file.read_bytes() == junk


@pytest.mark.parametrize("name", ["swarm.json", "chain.pem", "news.json", "root.pem"])
def test_a_file_that_cannot_be_read_is_fatal(owner: Machine, name: str) -> None:
    (owner.store.folder / name).unlink()
    (owner.store.folder / name).mkdir()
    with pytest.raises(Fatal, match=rf"{name} cannot be read: Is a directory"):
        read_all(owner.store)


@pytest.mark.parametrize("name", ["swarm.json", "chain.pem", "news.json"])
def test_a_file_that_is_missing_is_fatal(owner: Machine, name: str) -> None:
    (owner.store.folder / name).unlink()
    with pytest.raises(Fatal, match=rf"{name} cannot be read: No such file"):
        read_all(owner.store)


def test_the_root_key_and_the_used_invites_may_be_missing(owner: Machine) -> None:
    (owner.store.folder / "root.pem").unlink()
    (owner.store.folder / "invites.json").unlink()
    read_all(owner.store)
    assert owner.store.root_key() is None


def test_a_huge_file_is_junk(owner: Machine) -> None:
    with (owner.store.folder / "news.json").open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(Fatal, match=r"news\.json is damaged \(it is longer than 16 MiB\)"):
        owner.store.news()


@pytest.mark.parametrize("name", ["swarm.json", "news.json", "root.pem"])
def test_files_of_another_swarm_do_not_fit_in(world: World, owner: Machine, name: str) -> None:
    other = world.owner("elsewhere")
    (owner.store.folder / name).write_bytes((other.store.folder / name).read_bytes())
    with pytest.raises(Fatal, match=r"(news\.json is damaged|root\.pem is the root key of another swarm)"):
        read_all(owner.store)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([], "at least one datagram key"),
        ([{"key": "AAAA", "until_s": None}], "at least one datagram key of 32 bytes"),
        ([{"key": "A" * 43 + "=", "until_s": None}], "not that of the revocation list"),
    ],
)
def test_datagram_keys_that_do_not_go_with_the_list_are_damage(owner: Machine, keys: object, words: str) -> None:
    file = owner.store.folder / "news.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "datagram_keys": keys}))
    with pytest.raises(Fatal, match=words):
        owner.store.news()


def test_a_current_key_with_an_end_is_damage(owner: Machine) -> None:
    file = owner.store.folder / "news.json"
    news = json.loads(file.read_text())
    news["datagram_keys"][0]["until_s"] = 1.0
    file.write_text(json.dumps(news))
    with pytest.raises(Fatal, match="every datagram key but the first has an end"):
        owner.store.news()


@pytest.mark.parametrize("name", FILES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_any_bytes_are_either_read_or_fatal(owner: Machine, name: str, data: st.DataObject) -> None:
    file = owner.store.folder / name
    good = file.read_bytes()
    where = data.draw(st.integers(0, len(good)))
    file.write_bytes(
        data.draw(
            st.one_of(
                st.binary(max_size=200), st.binary(max_size=8).map(lambda b: good[:where] + b + good[where + 4 :])
            )
        )
    )
    try:
        read_all(owner.store)
    except Fatal as error:
        assert name in str(error)  # noqa: PT017
    finally:
        file.write_bytes(good)


# ---------------------------------------------------------------------------------------------------------------- news


def listed(seq: int) -> Revocations:
    return Revocations(owner_swarm, seq, frozenset(), bytes(32))  # type: ignore[arg-type]


owner_swarm = bytes(20)


def test_a_rotated_key_is_accepted_for_a_day() -> None:
    first, second, third = (bytes([n]) * 32 for n in (1, 2, 3))
    news = SwarmNews(listed(1), b"one", (DatagramKey(first),))
    news = news.followed_by(listed(2), b"two", second, now_s=1000.0)
    assert news.keys == (DatagramKey(second), DatagramKey(first, 1000.0 + KEPT_KEY_S))
    news = news.followed_by(listed(3), b"three", third, now_s=2000.0)
    assert [each.key for each in news.keys] == [third, second, first]
    late = news.followed_by(listed(4), b"four", first, now_s=1500.0 + KEPT_KEY_S)
    assert [each.key for each in late.keys] == [first, third, second]
    late = late.followed_by(listed(5), b"five", first, now_s=1e9)
    assert [each.key for each in late.keys] == [first]


def test_keys_of_many_lists_in_a_day_are_bounded() -> None:
    news = SwarmNews(listed(1), b"", (DatagramKey(bytes(32)),))
    for n in range(2, 50):
        news = news.followed_by(listed(n), b"", bytes([n]) * 32, now_s=0.0)
    assert len(news.keys) == 8
    assert news.keys[0].key == bytes([49]) * 32


def test_the_newer_news_win_whoever_has_them(world: World, owner: Machine) -> None:
    old = owner.store.news()
    member = world.member(owner)
    owner.revoke(PeerId(b"x" * 20))
    new = owner.store.news()
    assert owner.store.exchange_news(old) == new
    assert owner.store.news() == new
    assert member.store.exchange_news(new) == new
    assert member.store.news() == new


def test_news_that_cannot_be_written_leave_the_old(
    world: World, owner: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = world.member(owner)
    owner.revoke(PeerId(b"x" * 20))
    before, new = everything(member), owner.store.news()
    fill_disk(monkeypatch)
    with pytest.raises(LocalError, match=r"news\.json cannot be written: No space left on device"):
        member.store.exchange_news(new)
    with pytest.raises(LocalError, match=r"chain\.pem cannot be written"):
        member.store.save_chain(owner.store.chain())
    with pytest.raises(LocalError, match=r"swarm\.json cannot be written"):
        member.store.remember_admitter(owner.own, Endpoint("192.0.2.9", 1))
    assert everything(member) == before


def test_a_change_of_the_news_shows(owner: Machine) -> None:
    before = owner.store.news_stamp()
    assert owner.store.news_stamp() == before
    owner.revoke(PeerId(b"x" * 20))
    assert owner.store.news_stamp() not in (None, before)
    (owner.store.folder / "news.json").unlink()
    assert owner.store.news_stamp() is None


# -------------------------------------------------------------------------------------------------------------- invites


def test_a_use_is_counted_once_for_each_peer(owner: Machine) -> None:
    invite = parse_token(owner.invite(uses=2)).invite
    a, b, c = (PeerId(bytes([n]) * 20) for n in (1, 2, 3))
    now_s = owner.clock()
    assert [owner.store.count_use(invite, peer, now_s) for peer in (a, a, b, c, a, c)] == [
        True,
        True,
        True,
        False,
        True,
        False,
    ]
    assert [SwarmStore(owner.path).count_use(invite, peer, now_s) for peer in (b, c)] == [True, False]


def test_a_use_that_cannot_be_counted_is_none(owner: Machine) -> None:
    invite = parse_token(owner.invite()).invite
    a, b = PeerId(b"a" * 20), PeerId(b"b" * 20)
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch)
        with pytest.raises(LocalError, match=r"invites\.json cannot be written: No space left on device"):
            owner.store.count_use(invite, a, owner.clock())
    assert owner.store.count_use(invite, b, owner.clock())
    assert not owner.store.count_use(invite, a, owner.clock())


def test_used_invites_are_forgotten_a_day_after_their_end(owner: Machine) -> None:
    invites = [parse_token(owner.invite(life_s=life_s)).invite for life_s in (DAY_S, 30 * DAY_S)]
    for invite in invites:
        owner.store.count_use(invite, PeerId(bytes(20)), owner.clock())
    third = parse_token(owner.invite()).invite
    owner.store.count_use(third, PeerId(bytes(20)), owner.clock() + 1.9 * DAY_S)
    assert len(json.loads((owner.store.folder / "invites.json").read_text())) == 3
    fourth = parse_token(owner.invite()).invite
    owner.store.count_use(fourth, PeerId(bytes(20)), owner.clock() + 2.1 * DAY_S)
    kept = json.loads((owner.store.folder / "invites.json").read_text())
    assert sorted(kept) == sorted([invites[1].nonce.hex(), fourth.nonce.hex()])


def test_of_many_that_count_at_once_one_wins(owner: Machine) -> None:
    invite = parse_token(owner.invite()).invite

    def count(n: int) -> bool:  # each with a lock of its own, as processes have
        return SwarmStore(owner.path).count_use(invite, PeerId(bytes([n]) * 20), owner.clock())

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(count, range(8))) == [False] * 7 + [True]


# ------------------------------------------------------------------------------------------------------------ admitters


def test_the_admitter_met_last_comes_first_and_few_are_kept(owner: Machine) -> None:
    for n in range(12):
        owner.store.remember_admitter(PeerId(bytes([n]) * 20), Endpoint("192.0.2.1", 1 + n))
    owner.store.remember_admitter(PeerId(bytes([9]) * 20), Endpoint("192.0.2.1", 99), Endpoint("::1", 100))
    known = owner.store.admitters()
    assert [peer[0] for peer in known] == [9, 11, 10, 8, 7, 6, 5, 4]
    assert known[PeerId(bytes([9]) * 20)] == (Endpoint("192.0.2.1", 99), Endpoint("::1", 100))


@given(st.binary(min_size=20, max_size=20))
def test_a_peer_is_read_as_it_is_shown(raw: bytes) -> None:
    assert parse_peer(show_peer(raw)) == raw


@given(st.text(max_size=40))
def test_whatever_is_no_peer_is_refused(text: str) -> None:
    try:
        assert show_peer(parse_peer(text)) == text.lower()
    except LocalError as error:
        assert "is not a peer" in str(error)  # noqa: PT017
