"""What is looked at where no daemon runs, and that looking leaves nothing behind."""

import os
import socket
from pathlib import Path

from mpd.daemon.checkup import check_up
from mpd.daemon.state import make_state_dir
from mpd.findings import NOT_CHECKED, OK, PROBLEM, Finding
from mpd.ids import Endpoint

ANY = Endpoint("127.0.0.1", 0)


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in findings}


async def test_a_fresh_machine_needs_nothing(tmp_path: Path) -> None:
    found = verdicts(await check_up(tmp_path / "mpd.sock", tmp_path / "state", ANY, ()))
    assert {found[check] for check in ("platform", "local socket", "disk", "swarm", "ports")} == {OK}
    assert found["clock"] == NOT_CHECKED
    assert "bootstrap" not in found
    assert os.listdir(tmp_path) == []


async def test_a_port_in_use_and_a_dead_bootstrap_are_problems(tmp_path: Path) -> None:
    with socket.socket() as busy, socket.socket() as closed:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        closed.bind(("127.0.0.1", 0))
        dead = Endpoint(*closed.getsockname())
        findings = await check_up(None, tmp_path, Endpoint(*busy.getsockname()), (dead,))
    found = verdicts(findings)
    assert (found["ports"], found["bootstrap"]) == (PROBLEM, PROBLEM)
    assert "local socket" not in found
    (ports,) = [finding for finding in findings if finding.check == "ports"]
    assert "by TCP: Address already in use" in ports.says


async def test_a_key_is_used_and_a_damaged_one_is_a_problem(tmp_path: Path) -> None:
    make_state_dir(tmp_path).load_key()
    assert verdicts(await check_up(None, tmp_path, ANY, ()))["swarm"] == OK
    (tmp_path / "key.pem").write_text("nonsense")
    assert verdicts(await check_up(None, tmp_path, ANY, ()))["swarm"] == PROBLEM
