"""A private swarm with real daemons: three commands make it, an invite lets one machine in, and nobody else gets in.

Strategy: everything goes through the command line, as its owner would do it. Outsiders are raw sockets and a daemon of
another swarm; what counts is that they get nothing, that it costs the daemon next to nothing, and that the person who
tried reads why.
"""

import os
import re
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from e2e_swarm import DaemonProcess, Swarm, averagers, eventually, mpd, mpd_json, new_run, step_all, wait_for_company

SOAK = os.environ.get("MPD_SOAK") == "1"
ATTEMPTS = 5000 if SOAK else 500


def create(daemon: DaemonProcess, name: str = "lab") -> None:
    done = mpd("swarm", "create", name, "--state-dir", daemon.state_dir)
    assert done.returncode == 0, done.stderr


def invite(daemon: DaemonProcess, *options: str) -> str:
    done = mpd("swarm", "invite", "--state-dir", daemon.state_dir, "--socket", daemon.socket, *options)
    assert done.returncode == 0, done.stderr
    found = re.search(r"mpdi1\.[A-Za-z0-9_-]+", done.stdout)
    assert found, done.stdout
    return found[0]


@pytest.fixture(scope="module")
def owner(swarm: Swarm) -> DaemonProcess:
    daemon = swarm.new()
    create(daemon)
    return daemon.start().wait_ready()


@pytest.fixture(scope="module")
def member(swarm: Swarm, owner: DaemonProcess) -> DaemonProcess:
    daemon = swarm.new("--invite", invite(owner)).start().wait_ready()
    eventually(lambda: bool(daemon.status()["dht"]["peers"]), "the new member finds the owner", swarm.log)
    return daemon


def fails_to_join(swarm: Swarm, token: str) -> str:
    """Return what a machine that joins with `token` in vain is told."""
    daemon = swarm.new()
    done = mpd(
        "join", "--socket", daemon.socket, "--state-dir", daemon.state_dir, "--listen", "127.0.0.1:0", "--invite", token
    )
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert token not in done.stderr
    return done.stderr


def test_who_was_invited_averages_with_the_owner(owner: DaemonProcess, member: DaemonProcess) -> None:
    vectors = [np.full(1000, 1.0, np.float32), np.full(1000, 3.0, np.float32)]
    run = new_run()
    with averagers([owner, member], run, vectors) as attached:
        wait_for_company([owner, member], run)
        assert all(outcome.averaged for outcome in step_all(attached))
    assert all((vector == 2).all() for vector in vectors)


def test_both_say_which_swarm_they_are_in(owner: DaemonProcess, member: DaemonProcess) -> None:
    theirs = [daemon.status()["swarm"] for daemon in (owner, member)]
    assert theirs[0]["id"] == theirs[1]["id"]
    assert all(each["name"] == "lab" and not each["open"] for each in theirs)
    shown = [mpd_json("swarm", "show", "--state-dir", daemon.state_dir) for daemon in (owner, member)]
    assert [each["id"] for each in shown] == [theirs[0]["id"]] * 2


def test_an_invite_for_one_works_once(swarm: Swarm, owner: DaemonProcess) -> None:
    token = invite(owner)
    first = swarm.new("--invite", token).start().wait_ready()
    assert first.status()["swarm"]["name"] == "lab"
    first.kill()
    first.start().wait_ready()  # the invite in its command line is spent, and it is a member already
    assert "used" in fails_to_join(swarm, token)
    first.kill()


def test_an_invite_of_another_swarm_lets_nobody_in(swarm: Swarm, owner: DaemonProcess) -> None:
    stranger = swarm.new()
    create(stranger, "elsewhere")
    token = invite(stranger, "--address", owner.listen)
    assert "another swarm" in fails_to_join(swarm, token)


def test_an_invite_for_somebody_else_is_refused(swarm: Swarm, owner: DaemonProcess) -> None:
    token = invite(owner, "--for", "a" * 32)
    assert "another peer" in fails_to_join(swarm, token)


def test_a_daemon_of_another_swarm_is_told_why_it_finds_nobody(swarm: Swarm, owner: DaemonProcess) -> None:
    outsider = swarm.new("--bootstrap", owner.listen).start().wait_ready()
    assert outsider.status()["swarm"]["open"]
    eventually(
        lambda: "another swarm" in outsider.status()["dht"]["bootstrap"][0]["state"],
        "the outsider reads that this is another swarm",
        outsider.log,
    )
    assert outsider.status()["dht"]["peers"] == 0
    outsider.kill()


def test_an_open_swarm_is_loudly_open(swarm: Swarm) -> None:
    daemon = swarm.new().start().wait_ready()
    assert daemon.status()["swarm"]["open"]
    assert "open swarm" in daemon.log()
    assert "anyone" in daemon.log()
    assert "open" in mpd("status", "--socket", daemon.socket).stdout
    daemon.kill()


def test_a_revoked_member_is_cut_off_and_told(swarm: Swarm, owner: DaemonProcess, member: DaemonProcess) -> None:
    doomed = swarm.new("--invite", invite(owner)).start().wait_ready()
    run = new_run()
    three = [owner, member, doomed]
    with averagers(three, run, [np.zeros(10, np.float32) for _ in three]) as attached:
        wait_for_company(three, run)
        assert all(len(outcome.contributors) == 3 for outcome in step_all(attached))
        done = mpd("swarm", "revoke", doomed.peer, "--state-dir", owner.state_dir)
        assert done.returncode == 0, done.stderr
        for daemon in (owner, member):
            eventually(
                lambda daemon=daemon: doomed.peer not in [link["peer"] for link in daemon.connect().peers()],
                "the link to the revoked member is cut",
                swarm.log,
            )
        outcomes = step_all(attached, timeout=5.0)
    assert doomed.peer not in outcomes[0].contributors + outcomes[1].contributors
    assert len(outcomes[0].contributors) == 2, outcomes
    eventually(lambda: "revoked" in doomed.log(), "the revoked member reads why", doomed.log)
    doomed.kill()


# -------------------------------------------------------------------------------------------------------- raw sockets


def connect(daemon: DaemonProcess) -> socket.socket:
    host, _, port = daemon.listen.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answer_to(daemon: DaemonProcess, greeting: bytes) -> bytes:
    """Return everything that the daemon says to who begins with `greeting`."""
    said = b""
    with connect(daemon) as raw:
        try:
            raw.sendall(greeting)
            while received := raw.recv(4096):
                said += received
        except ConnectionResetError:
            pass
    return said


GREETINGS = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9\r\n",
    "an mpd without sealing": b"mpdC\x01\0\0\0",
    "data without an offer": b"mpdD\x01\0\0\0" + bytes(16),
    "zeros": bytes(64),
}


@pytest.mark.parametrize("greeting", GREETINGS.values(), ids=GREETINGS)
def test_who_does_not_speak_tls_hears_nothing(owner: DaemonProcess, greeting: bytes) -> None:
    assert answer_to(owner, greeting) == b""


def test_tls_without_a_certificate_hears_nothing(owner: DaemonProcess) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    said, verdict = b"", "the connection was kept"
    with connect(owner) as raw:
        try:
            # A TLS 1.3 client believes that it is connected before it has been judged: only reading tells.
            with context.wrap_socket(raw, server_hostname="x") as tls:
                tls.sendall(b"hello")
                said = tls.recv(1)
        except (ssl.SSLError, ConnectionError) as error:
            verdict = str(error)
    assert said == b""
    assert "certificate" in verdict.lower()


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_plain_attempt_costs_less_than_a_millisecond(
    owner: DaemonProcess, record_property: Callable[[str, object], None]
) -> None:
    before = processor_s(owner.pid)
    for _ in range(ATTEMPTS):
        assert answer_to(owner, b"GET / HTTP/1.1\r\n\r\n") == b""
    cost_ms = (processor_s(owner.pid) - before) / ATTEMPTS * 1000
    record_property("ms of CPU per plain attempt", round(cost_ms, 3))
    assert cost_ms < 1
