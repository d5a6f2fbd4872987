"""What a daemon keeps on disk: one key for ever, one daemon at a time, and the old state when the disk is full."""

import errno
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from swarm_helpers import fill_disk

import mpd.daemon.state
from mpd.daemon.state import StateDir, make_state_dir, open_state_dir, own_id, writing
from mpd.errors import Fatal, LocalError
from mpd.ids import Endpoint, peer_id_of

PEM = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "state"


@pytest.fixture
def state(path: Path) -> Iterator[StateDir]:
    with open_state_dir(path) as opened:
        yield opened


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def raw(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes_raw()


@pytest.fixture(params=["write", "sync", "rename"])
def full_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has no room left, and it shows while a file is opened, synced, or renamed."""

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real_open = os.open

    def open_to_read(file: Any, flags: int, *arguments: Any) -> int:
        if flags & os.O_CREAT:
            fail()
        return real_open(file, flags, *arguments)

    if request.param == "write":
        monkeypatch.setattr(os, "open", open_to_read)
    else:
        monkeypatch.setattr(os, {"sync": "fsync", "rename": "replace"}[request.param], fail)


# ----------------------------------------------------------------------------------------------------------------- key


def test_the_key_is_made_once_and_for_its_owner_only(path: Path) -> None:
    with open_state_dir(path) as state:
        key = state.load_key()
        assert raw(state.load_key()) == raw(key)
    with open_state_dir(path) as state:
        assert raw(state.load_key()) == raw(key)
    assert mode(path / "key.pem") == 0o600
    assert mode(path) == 0o700
    assert sorted(file.name for file in path.iterdir()) == ["key.pem", "lock", "lock.files"]


def test_every_machine_has_a_key_of_its_own(tmp_path: Path) -> None:
    with open_state_dir(tmp_path / "a") as a, open_state_dir(tmp_path / "b") as b:
        assert own_id(a.load_key()) != own_id(b.load_key())


def test_the_id_is_that_of_the_public_key(state: StateDir) -> None:
    key = state.load_key()
    assert own_id(key) == peer_id_of(key.public_key().public_bytes_raw())


@pytest.mark.parametrize(
    "junk",
    [b"", b"\0" * 100, b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"],
    ids=["empty", "zeros", "text", "broken"],
)
def test_a_junk_key_is_fatal_and_stays(state: StateDir, junk: bytes) -> None:
    file = state.path / "key.pem"
    file.write_bytes(junk)
    with pytest.raises(Fatal, match=r"key\.pem is not a private key: restore it, or remove it to become a new peer"):
        state.load_key()
    assert file.read_bytes() == junk


def test_a_key_of_another_kind_is_fatal_and_stays(state: StateDir) -> None:
    other = X25519PrivateKey.generate().private_bytes(*PEM, serialization.NoEncryption())
    (state.path / "key.pem").write_bytes(other)
    with pytest.raises(Fatal, match=r"key\.pem is not an ed25519 key"):
        state.load_key()
    assert (state.path / "key.pem").read_bytes() == other


def test_a_key_with_a_password_is_fatal(state: StateDir) -> None:
    locked = Ed25519PrivateKey.generate().private_bytes(*PEM, serialization.BestAvailableEncryption(b"secret"))
    (state.path / "key.pem").write_bytes(locked)
    with pytest.raises(Fatal, match=r"key\.pem is not a private key"):
        state.load_key()


def test_a_key_that_cannot_be_read_is_fatal(state: StateDir) -> None:
    (state.path / "key.pem").mkdir()
    with pytest.raises(Fatal, match=r"key\.pem cannot be read or made: Is a directory"):
        state.load_key()


@pytest.mark.usefixtures("full_disk")
def test_no_room_for_a_key_is_fatal_and_leaves_none_behind(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match=r"key\.pem cannot be read or made: No space left on device"):
        StateDir(tmp_path).load_key()
    assert {file.name for file in tmp_path.iterdir()} <= {"lock.files"}


def test_a_daemon_and_a_command_that_start_at_once_make_one_key(path: Path) -> None:
    make_state_dir(path)
    with ThreadPoolExecutor(8) as pool:
        keys = {raw(key) for key in pool.map(lambda _: StateDir(path).load_key(), range(8))}
    assert len(keys) == 1


# ---------------------------------------------------------------------------------------------------------------- port


def test_the_port_is_remembered(path: Path) -> None:
    with open_state_dir(path) as state:
        assert state.last_port() == 0
        state.remember_port(4747)
        state.remember_port(4748)
        assert state.problem == ""
    with open_state_dir(path) as state:
        assert state.last_port() == 4748
    assert sorted(file.name for file in path.iterdir()) == ["lock", "port"]


@pytest.mark.parametrize("junk", [b"", b"many", b"-1", b"65536", b"\xff\xfe", b"9" * 5000])
def test_a_junk_port_is_no_port(state: StateDir, junk: bytes) -> None:
    (state.path / "port").write_bytes(junk)
    assert state.last_port() == 0


@pytest.mark.usefixtures("full_disk")
def test_on_a_full_disk_the_old_port_stays(tmp_path: Path) -> None:
    (tmp_path / "port").write_text("4747")
    state = StateDir(tmp_path)
    state.remember_port(4748)
    assert state.last_port() == 4747
    assert state.problem == (
        f"the state directory {tmp_path} cannot be written: No space left on device; what it holds is whole but out of "
        "date, and is written as soon as that works again"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["port"]
    state.retry()
    assert state.last_port() == 4747
    assert state.problem


def test_what_could_not_be_written_is_written_once_there_is_room(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    announced = Endpoint("peer.example", 4747)
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch)
        state.remember_port(4748)
        state.remember_announced(announced)
    assert state.problem
    state.retry()
    assert (state.last_port(), state.last_announced(), state.problem) == (4748, announced, "")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["announced", "port"]


def test_what_is_true_again_is_not_written_any_more(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    state.remember_port(4747)
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch)
        state.remember_port(4748)
        state.remember_port(4747)
    assert state.problem == ""
    state.retry()
    assert state.last_port() == 4747


# ----------------------------------------------------------------------------------------------------------- announced


def test_the_announced_address_is_remembered(path: Path) -> None:
    with open_state_dir(path) as state:
        assert state.last_announced() is None
        for endpoint in (Endpoint("peer.example", 4747), Endpoint("2001:db8::7", 1), Endpoint("2001:db8::7", 1)):
            state.remember_announced(endpoint)
            assert state.last_announced() == endpoint
    assert make_state_dir(path).last_announced() == Endpoint("2001:db8::7", 1)


@pytest.mark.parametrize("junk", [b"", b"nowhere", b"a:b", b"192.0.2.1:0", b"\xff\xfe", b"9" * 5000])
def test_a_junk_address_is_none(state: StateDir, junk: bytes) -> None:
    (state.path / "announced").write_bytes(junk)
    assert state.last_announced() is None


# ---------------------------------------------------------------------------------------------------------------- lock


def test_a_second_daemon_is_told_and_the_first_goes_on(path: Path, state: StateDir) -> None:
    with (
        pytest.raises(Fatal, match=r"another daemon uses the state directory .*: stop it, or choose another"),
        open_state_dir(path),
    ):
        pass
    assert state.last_port() == 0


def test_the_lock_is_free_again_after_the_block_however_it_ended(path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_state_dir(path):
        raise ZeroDivisionError
    with open_state_dir(path) as state:
        assert state.path == path


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_way_is_fatal(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("weights")
    with (
        pytest.raises(Fatal, match=r"the state directory .*file.* cannot be used: .*; choose another with --state-dir"),
        open_state_dir(tmp_path / "file" / below),
    ):
        pass
    assert (tmp_path / "file").read_text() == "weights"


def test_a_command_waits_for_its_turn_to_write_and_not_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpd.daemon.state, "_WRITERS_PAUSE_S", 0.0)
    make_state_dir(path)
    with writing(path):
        with pytest.raises(LocalError, match=r"another process does not let go of .*lock\.files"), writing(path):
            pass
        with open_state_dir(path):  # the daemon's own lock is another one
            pass
    with writing(path):
        assert mode(path / "lock.files") == 0o600
