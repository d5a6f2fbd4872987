"""Whatever is done wrongly gets one clear sentence and the right exit code, and harms nobody else.

Strategy: one pair of daemons for the module; trainers do something impossible on one of them, commands are pointed at
what cannot work. `refused` holds every command to the same manners: nothing on stdout, one sentence, no traceback.
"""

import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from e2e_swarm import DaemonProcess, Swarm, averagers, mpd, new_run, step_all, wait_for_company

from mpd.client import connect
from mpd.errors import DaemonUnavailable, LocalError

N_ELEMS = 1000


@pytest.fixture(scope="module")
def pair(swarm: Swarm) -> list[DaemonProcess]:
    return swarm.grow(2)


def refused(code: int, *arguments: object) -> str:
    """Run a command that must fail with exit code `code`; return its sentence."""
    done = mpd(*arguments)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr.strip()


def refused_join(swarm: Swarm, *options: object) -> str:
    """Run `mpd join` in a place of its own, with `options` that must make it fail."""
    place = swarm.home / "elsewhere"
    defaults = {"--socket": place / "s.sock", "--state-dir": place / "state", "--listen": "127.0.0.1:0"}
    given = {str(options[i]): options[i + 1] for i in range(0, len(options), 2)}
    lines = refused(1, "join", *(word for option in (defaults | given).items() for word in option)).splitlines()
    assert [line for line in lines if line.startswith("mpd: ")] == lines[-1:], lines
    assert all(" INFO " in line for line in lines[:-1]), lines
    return lines[-1]


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("command", ["status", "rounds", "peers", "leave"])
def test_without_a_daemon_commands_say_how_to_start_one(swarm: Swarm, command: str) -> None:
    sentence = refused(3, command, "--socket", swarm.home / "nobody.sock")
    assert "nobody.sock" in sentence
    assert "`mpd join`" in sentence
    assert len(sentence.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-option"],
        ["status", "--no-such-option"],
        ["no-such-command"],
        ["join", "--listen", "127.0.0.1:many"],
        ["join", "--bootstrap", "127.0.0.1:99999"],
        ["rounds", "--last", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert arguments[-1] in refused(2, *arguments)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["TCP", "UDP"])
def test_a_port_in_use(swarm: Swarm, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        sentence = refused_join(swarm, "--listen", address)
    assert address in sentence
    assert "in use" in sentence


def test_an_address_of_another_machine(swarm: Swarm) -> None:
    assert "192.0.2.1:4747" in refused_join(swarm, "--listen", "192.0.2.1:4747")


def test_two_daemons_on_one_socket(swarm: Swarm, pair: list[DaemonProcess]) -> None:
    sentence = refused_join(swarm, "--socket", pair[0].socket)
    assert str(pair[0].socket) in sentence
    assert str(pair[0].pid) in sentence
    assert pair[0].status()["peer_id"] == pair[0].peer


def test_two_daemons_on_one_state_directory(swarm: Swarm, pair: list[DaemonProcess]) -> None:
    assert str(pair[0].state_dir) in refused_join(swarm, "--state-dir", pair[0].state_dir)
    assert pair[0].status()["peer_id"] == pair[0].peer


def test_a_state_directory_that_cannot_be_made(swarm: Swarm) -> None:
    blocked = swarm.home / "file"
    blocked.write_text("in the way")
    assert str(blocked / "state") in refused_join(swarm, "--state-dir", blocked / "state")


def test_a_key_that_cannot_be_read(swarm: Swarm) -> None:
    state_dir = swarm.home / "unreadable"
    (state_dir / "key.pem").mkdir(parents=True)  # permissions would not stop root
    assert str(state_dir / "key.pem") in refused_join(swarm, "--state-dir", state_dir)


def test_a_key_that_is_none(swarm: Swarm) -> None:
    state_dir = swarm.home / "damaged"
    state_dir.mkdir()
    (state_dir / "key.pem").write_text("not a key")
    assert str(state_dir / "key.pem") in refused_join(swarm, "--state-dir", state_dir)
    assert (state_dir / "key.pem").read_text() == "not a key"


def test_a_fault_to_arm_that_is_none(swarm: Swarm) -> None:
    sentence = refused_join(swarm, "--fault", "sned:1:kill")
    assert "'sned:1:kill' names no point of the protocol: announce, seek, " in sentence


def test_a_socket_path_that_is_too_long(swarm: Swarm) -> None:
    path = swarm.home / ("long" * 30)
    assert "--socket" in refused_join(swarm, "--socket", path)


def test_a_file_where_the_socket_belongs(swarm: Swarm) -> None:
    path = swarm.home / "notes.txt"
    path.write_text("precious")
    assert str(path) in refused_join(swarm, "--socket", path)
    assert path.read_text() == "precious"


# ------------------------------------------------------------------------------------------------------------- trainers


def test_connecting_without_a_daemon(swarm: Swarm) -> None:
    with pytest.raises(DaemonUnavailable, match="mpd join"):
        connect(swarm.home / "nobody.sock")


def array(value: float = 1.0, dtype: str = "float32") -> Any:
    return np.full(N_ELEMS, value, dtype)


def read_only() -> Any:
    frozen = array()
    frozen.flags.writeable = False
    return frozen


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"w": array(dtype="int64")}, "tensor 'w' is int64"),
        ({"w": array(dtype="complex64")}, "tensor 'w' is complex64"),
        ({"w": torch.zeros(3, dtype=torch.int8)}, "tensor 'w' is int8"),
        ({"w": torch.zeros(3, device="meta")}, "tensor 'w' has no plain memory"),
        ({"w": [1.0, 2.0]}, "tensor 'w' is a list"),
        ({"w": read_only()}, "array 'w' is read-only"),
        ([("w", array()), ("w", array())], "two tensors are named 'w'"),
        ([], "no tensors"),
        (array(), "a single tensor"),
        ({"w": np.zeros(0, np.float32)}, "no elements"),
    ],
    ids=["int64", "complex", "torch int8", "meta device", "list", "read-only", "duplicate", "none", "bare", "empty"],
)
def test_tensors_that_cannot_be_averaged(pair: list[DaemonProcess], tensors: Any, sentence: str) -> None:
    run = new_run()
    with pytest.raises(LocalError, match=sentence):
        pair[0].connect().averager(run, tensors)
    assert pair[0].run_status(run) is None


def test_one_tensor_under_two_names(pair: list[DaemonProcess]) -> None:
    tied = array()
    with pytest.raises(LocalError, match="'a' and 'b' share memory"):
        pair[0].connect().averager(new_run(), {"a": tied, "b": tied[10:]})


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        ({"group_size": 1}, "group_size is 1"),
        ({"group_size": 49}, "group_size is 49"),
        ({"rounds": 2}, "rounds is 2"),
        ({"rounds": "precise"}, "rounds is 'precise'"),
        ({"codec": "gzip"}, "'gzip'"),
        ({"aggregate": "median"}, "'median'"),
        ({"weight": 0.0}, "weight is 0"),
        ({"weight": -1.0}, "weight is -1"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"adopt": True}, "'w' cannot be adopted"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_terms_that_make_no_sense(pair: list[DaemonProcess], terms: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LocalError, match=sentence):
        pair[0].connect().averager(new_run(), {"w": array()}, **terms)


@pytest.mark.parametrize("run", ["", "x" * 257, "line\nbreak"], ids=["empty", "long", "unprintable"])
def test_run_names_that_make_no_sense(pair: list[DaemonProcess], run: str) -> None:
    with pytest.raises(LocalError, match="run's name"):
        pair[0].connect().averager(run, {"w": array()})


def test_other_terms_than_another_trainer_on_the_same_daemon(pair: list[DaemonProcess]) -> None:
    run = new_run()
    with averagers(pair[:1], run, [array()]), pytest.raises(LocalError, match="codec"):
        pair[0].connect().averager(run, {"x": array()}, codec="zstd")


def resize(tensor: torch.Tensor) -> None:
    tensor.resize_(N_ELEMS + 1)


def change_dtype(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.double()


@pytest.mark.parametrize("change", [resize, change_dtype])
def test_tensors_that_changed_since_they_were_registered(
    pair: list[DaemonProcess], change: Callable[[torch.Tensor], None]
) -> None:
    tensor = torch.ones(N_ELEMS)
    with averagers(pair[:1], new_run(), [{"w": tensor}]) as (averager,):
        change(tensor)
        with pytest.raises(LocalError, match=r"'w' was registered as float32\[1000\]"):
            averager.step()


@pytest.mark.parametrize("argument", [{"weight": 0.0}, {"weight": -2.0}, {"timeout": 0.0}, {"timeout": -1.0}], ids=str)
def test_steps_that_make_no_sense(pair: list[DaemonProcess], argument: dict[str, float]) -> None:
    (name,) = argument
    with averagers(pair[:1], new_run(), [array()]) as (averager,), pytest.raises(LocalError, match=f"{name} is"):
        averager.step(**argument)


def test_a_closed_averager(pair: list[DaemonProcess]) -> None:
    with averagers(pair[:1], new_run(), [array()]) as (averager,):
        averager.close()
        averager.close()
        with pytest.raises(LocalError, match="closed"):
            averager.step()


# -------------------------------------------------------------------------------------------------- not a number at all


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_never_leave_the_trainer(pair: list[DaemonProcess], value: float) -> None:
    run, good, bad = new_run(), array(1.0), array(3.0)
    with averagers(pair, run, [{"w": good}, {"w": bad}]) as (healthy, sick):
        wait_for_company(pair, run)
        bad[7] = value
        with pytest.raises(LocalError, match="'w' holds NaN or infinity"):
            sick.step()
        bad[7] = 3.0
        assert all(step_all([healthy, sick]))
    assert (good == 2.0).all()
    assert (bad == 2.0).all()


def test_values_that_are_not_finite_harm_only_who_sends_them(swarm: Swarm, pair: list[DaemonProcess]) -> None:
    """A trainer that insists (check_finite=False) is refused by the reducers, and the others average without it."""
    third = swarm.grow(1)[0] if len(swarm.daemons) == len(pair) else swarm[len(pair)]
    run, vectors = new_run(), [array(1.0), array(3.0), array(np.nan)]
    everyone = [*pair, third]
    with averagers(everyone, run, vectors, check_finite=False) as attached:
        wait_for_company(everyone, run)
        *good, bad = step_all(attached)
    for outcome in good:
        assert outcome.averaged, outcome
        assert set(outcome.contributors) == {daemon.peer for daemon in pair}
        assert outcome.missing[third.peer]  # it may have left before anybody saw its values
    assert not bad.averaged, bad
    assert "own values" in bad.reason
    assert "finite" in bad.reason
    assert (vectors[0] == 2.0).all()
    assert (vectors[1] == 2.0).all()
    assert np.isnan(vectors[2]).all()
