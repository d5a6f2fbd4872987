"""`mpd doctor` on real daemons: what it says of a healthy swarm, and that it finds what is wrong and what to do."""

import json
import os
import resource
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e_swarm import ENVIRONMENT, MPD, DaemonProcess, Swarm, averagers, eventually, mpd, new_run, step_all

from mpd.findings import NOT_CHECKED, OK, PROBLEM, WARNING

EXAMINED_S = 15.0


@pytest.fixture(scope="module")
def pair(swarm: Swarm) -> list[DaemonProcess]:
    """Two daemons that know each other."""
    return swarm.grow(2)


def doctor(*arguments: object, code: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Return the findings of one `mpd doctor`, by check; it must end with exit code `code`."""
    done = mpd("doctor", "--json", *arguments)
    assert (done.returncode, done.stderr) == (code, ""), done.stdout + done.stderr
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(done.stdout)["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    return found


def only(found: dict[str, list[dict[str, Any]]], check: str) -> tuple[str, str]:
    (finding,) = found[check]
    return finding["verdict"], finding["says"]


def test_a_healthy_swarm_has_no_problem(pair: list[DaemonProcess]) -> None:
    first, second = pair
    vectors = [np.full(1000, 2.0**i, np.float32) for i in range(2)]
    with averagers([first, second], new_run(), vectors) as attached:
        assert all(outcome.averaged for outcome in step_all(attached))
        found = doctor("--socket", second.socket)
        assert {finding["verdict"] for each in found.values() for finding in each} <= {OK, WARNING}
        assert only(found, "reachable") == (OK, f"1 peer dialled back at {second.listen}")
        assert only(found, "bootstrap") == (OK, f"{first.listen} answers by TCP and UDP")
        assert only(found, "clock")[1].startswith("agrees with 1 peer within")
        assert "1 averaged" in only(found, "rounds")[1]
        assert only(doctor("--socket", first.socket), "DHT")[1].startswith(
            "1 other daemon known; requests from outside"
        )
    done = mpd("doctor", "--socket", first.socket)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].endswith(" ok")


def test_a_bootstrap_that_leads_nowhere_is_found(pair: list[DaemonProcess], tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))  # nobody listens
        wrong = f"127.0.0.1:{busy.getsockname()[1]}"
        found = doctor("--socket", pair[0].socket, "--bootstrap", wrong, code=1)
        says = f"{wrong} does not answer: Connection refused"
        assert (PROBLEM, says) in [(each["verdict"], each["says"]) for each in found["bootstrap"]]
        here = ("--state-dir", tmp_path, "--listen", "127.0.0.1:0")
        ENVIRONMENT["XDG_RUNTIME_DIR"] = str(tmp_path)
        try:
            found = doctor("--bootstrap", wrong, *here, code=1)
            assert only(found, "bootstrap") == (PROBLEM, says)
            assert only(found, "daemon")[0] == NOT_CHECKED
            found = doctor("--bootstrap", pair[0].listen, *here)
        finally:
            del ENVIRONMENT["XDG_RUNTIME_DIR"]
    assert only(found, "bootstrap") == (OK, f"{pair[0].listen} answers by TCP and UDP")
    assert only(found, "clock")[1].startswith("agrees with 1 peer within")
    assert list(tmp_path.iterdir()) == []  # it has looked, and left nothing


def test_a_peer_that_cannot_be_dialled_back_hears_which_port_to_open(swarm: Swarm, pair: list[DaemonProcess]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens at what is announced
        port = closed.getsockname()[1]
        hidden = swarm.new("--bootstrap", pair[0].listen, "--announce", f"127.0.0.1:{port}").start().wait_ready()
        eventually(lambda: hidden.status()["dht"]["peers"] > 0, "the hidden daemon finds the swarm", hidden.log)
        found = doctor("--socket", hidden.socket, code=1)
    (reach,) = found["reachable"]
    assert reach["verdict"] == PROBLEM
    assert reach["says"] == f"{pair[0].peer[:8]}.. could not dial 127.0.0.1:{port}"
    assert reach["advice"].startswith(f"open TCP and UDP port {port} in the firewall")
    hidden.kill()


def test_what_keeps_a_daemon_from_starting_is_found(pair: list[DaemonProcess], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    port_in_use = pair[0].listen
    missing = tmp_path / "no.sock"
    found = doctor("--socket", missing, "--state-dir", tmp_path / "file" / "state", "--listen", port_in_use, code=3)
    assert only(found, "daemon")[0] == PROBLEM
    assert only(found, "ports") == (
        PROBLEM,
        f"a daemon cannot listen on {port_in_use} by TCP and UDP: {os.strerror(98)}",
    )
    verdict, says = only(found, "disk")
    assert verdict == PROBLEM
    assert "is not a folder" in says or "Not a directory" in says
    assert not missing.exists()


def test_a_full_disk_is_found(tmp_path: Path) -> None:
    """A limit on the size of files is as good as a full disk, and root cannot pass it by."""
    command = [*MPD, "doctor", "--json", "--socket", str(tmp_path / "no.sock"), "--state-dir", str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        env=ENVIRONMENT,
        timeout=EXAMINED_S,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )
    assert done.returncode == 3
    (disk,) = [each for each in json.loads(done.stdout)["findings"] if each["check"] == "disk"]
    assert disk["verdict"] == PROBLEM
    assert os.strerror(27) in disk["says"]  # file too large
