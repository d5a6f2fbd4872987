"""Daemons come, go and are ended, and the others notice at once.

Strategy: three daemons stay for the whole module, a fourth one comes and goes and is started again where a test needs
it. Daemons whose bootstrap matters are started by the test itself.
"""

import signal
import time
from collections.abc import Callable

import numpy as np
import pytest
from e2e_swarm import (
    STEP_S,
    Array,
    Background,
    DaemonProcess,
    Swarm,
    averagers,
    eventually,
    moved_bytes,
    mpd,
    mpd_json,
    new_run,
    start_step,
    step_all,
    wait_for_company,
    wait_for_moved_bytes,
)

from mpd.client import Outcome
from mpd.errors import LocalError

N_ELEMS = 1000
BIG_ELEMS = 16 << 20  # 64 MiB: long enough under way to be caught there
SOON_S = 2.5  # "within a second", on a machine that is busy with something else


@pytest.fixture(scope="module")
def stayers(swarm: Swarm) -> list[DaemonProcess]:
    return swarm.grow(3)


@pytest.fixture
def fourth(swarm: Swarm, stayers: list[DaemonProcess]) -> DaemonProcess:
    """A daemon that the test may end in whatever way."""
    if len(swarm.daemons) == len(stayers):
        swarm.grow(1)
    swarm.revive()
    return swarm[len(stayers)]


def ones(n: int, n_elems: int = N_ELEMS) -> list[Array]:
    return [np.full(n_elems, 2.0**i, np.float32) for i in range(n)]


def leave(daemon: DaemonProcess) -> None:
    done = mpd("leave", "--socket", daemon.socket)
    assert (done.returncode, done.stderr) == (0, "")
    assert daemon.wait() == 0


def terminate(daemon: DaemonProcess) -> None:
    daemon.send(signal.SIGTERM)
    assert daemon.wait() == 0


# ---------------------------------------------------------------------------------------------------------- come and go


def test_a_peer_that_joins_late_takes_part_within_two_rounds(stayers: list[DaemonProcess]) -> None:
    run, vectors = new_run(), ones(3)
    with averagers(stayers[:2], run, vectors[:2]) as early:
        assert all(step_all(early))
        with averagers(stayers[2:], run, vectors[2:]) as late:
            step_all([*early, *late], timeout=4.0)  # half of it is the late one's window, if it is missed
            outcomes = step_all([*early, *late])
            assert [len(outcome.contributors) for outcome in outcomes] == [3, 3, 3], outcomes


@pytest.mark.parametrize("go", [leave, terminate, DaemonProcess.kill], ids=["leave", "SIGTERM", "SIGKILL"])
def test_a_peer_that_goes_is_gone_by_the_next_round(
    stayers: list[DaemonProcess], fourth: DaemonProcess, go: Callable[[DaemonProcess], None]
) -> None:
    run = new_run()
    with averagers([*stayers, fourth], run, ones(4)) as attached:
        outcomes = step_all(attached)
        assert [len(outcome.contributors) for outcome in outcomes] == [4] * 4, outcomes
        go(fourth)
        outcomes = step_all(attached[:3])
    for outcome in outcomes:
        assert set(outcome.contributors) == set(outcome.peers) == {daemon.peer for daemon in stayers}, outcome
        assert outcome.seconds < SOON_S, outcome


def test_a_peer_that_comes_back_takes_part_again(stayers: list[DaemonProcess], fourth: DaemonProcess) -> None:
    run, vectors, everyone = new_run(), ones(4), [*stayers, fourth]
    with averagers(everyone, run, vectors) as attached:
        assert all(step_all(attached))
        fourth.kill()
        assert "mpd join" in attached[3].step(timeout=0.1).reason
        assert all(step_all(attached[:3]))
        fourth.start().wait_ready()
        pending = start_step(attached[3])
        wait_for_company(everyone, run)
        outcomes = [*step_all(attached[:3]), pending.join()]
        assert [len(outcome.contributors) for outcome in outcomes] == [4] * 4, outcomes


def test_a_lone_peer_says_so_and_averages_as_soon_as_somebody_comes(stayers: list[DaemonProcess]) -> None:
    run, vectors = new_run(), ones(2)
    with averagers(stayers[:1], run, vectors[:1]) as (alone,):
        first = alone.step()
        assert not first.averaged
        assert "nobody else" in first.reason
        assert 4.5 < first.seconds < 5 + SOON_S
        second = alone.step()
        assert not second.averaged
        assert "nobody else" in second.reason
        assert second.seconds < 0.5
        assert (vectors[0] == 1.0).all()
        with averagers(stayers[1:2], run, vectors[1:]) as (other,):
            pending = start_step(other)
            eventually(lambda: alone.step(timeout=STEP_S).averaged, "the lone peer averages")
            assert pending.join().averaged
    assert (vectors[0] == 1.5).all()
    assert (vectors[1] == 1.5).all()


# ----------------------------------------------------------------------------------------------------------- bootstraps


def test_a_daemon_serves_while_its_bootstrap_is_dead_and_joins_when_it_appears() -> None:
    with Swarm() as swarm:
        bootstrap = swarm.new().start().wait_ready()
        bootstrap.kill()
        daemon = swarm.new("--bootstrap", bootstrap.listen).start().wait_ready()
        run, vectors = new_run(), ones(2)
        with averagers([daemon], run, vectors[:1]) as (averager,):
            assert "nobody else" in averager.step(timeout=0.5).reason
            dead = {"address": bootstrap.listen, "state": "unreachable: no answer; Connection refused"}
            eventually(lambda: daemon.status()["dht"]["bootstrap"] == [dead], "the daemon says that it is dead")
            assert mpd_json("status", "--socket", daemon.socket)["dht"]["peers"] == 0
            assert f"{bootstrap.listen}: unreachable" in mpd("status", "--socket", daemon.socket).stdout
            address = bootstrap.listen
            bootstrap.start().wait_ready()
            assert bootstrap.listen == address
            eventually(lambda: daemon.status()["dht"]["peers"] == 1, "the daemon joins", swarm.log)
            assert daemon.status()["dht"]["bootstrap"][0]["state"] == f"connected: {bootstrap.peer}"
            with averagers([bootstrap], run, vectors[1:]) as (other,):
                wait_for_company([daemon, bootstrap], run)
                assert all(step_all([averager, other]))


def test_a_bootstrap_may_have_a_name() -> None:
    with Swarm() as swarm:
        first = swarm.new().start().wait_ready()
        port = first.listen.rpartition(":")[2]
        second = swarm.new("--bootstrap", f"localhost:{port}").start().wait_ready()
        eventually(lambda: second.status()["dht"]["peers"] == 1, "the daemon joins", swarm.log)
        assert second.status()["dht"]["bootstrap"][0]["state"] == f"connected: {first.peer}"
        assert all(average([first, second]))


def test_known_peers_replace_a_dead_bootstrap_after_a_restart() -> None:
    with Swarm() as swarm:
        bootstrap, second, third = swarm.grow(3)
        eventually(lambda: third.status()["dht"]["peers"] == 2, "the third knows the second", swarm.log)
        terminate(third)
        bootstrap.kill()
        third.start().wait_ready()
        eventually(lambda: third.status()["dht"]["peers"] == 1, "the third finds the second again", swarm.log)
        assert all(average([second, third]))


def average(daemons: list[DaemonProcess]) -> list[Outcome]:
    with averagers(daemons, new_run(), ones(len(daemons))) as attached:
        return step_all(attached)


# -------------------------------------------------------------------------------------------------------------- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_daemon_within_a_second(fourth: DaemonProcess, number: signal.Signals) -> None:
    began = time.monotonic()
    fourth.send(number)
    assert fourth.wait() == 0
    assert time.monotonic() - began < SOON_S
    assert not fourth.socket.exists()
    assert "Traceback" not in fourth.log()


@pytest.mark.parametrize(
    ("number", "busy"),
    [(signal.SIGINT, "waiting"), (signal.SIGINT, "exchanging")],
)
def test_a_signal_ends_a_daemon_in_the_middle_of_a_step_within_a_second(
    stayers: list[DaemonProcess], fourth: DaemonProcess, number: signal.Signals, busy: str
) -> None:
    run, vectors = new_run(), ones(2, N_ELEMS if busy == "waiting" else BIG_ELEMS)
    with averagers([fourth, stayers[0]], run, vectors) as (mine, other):
        wait_for_company([fourth, stayers[0]], run)
        steps = [start_step(mine)]
        eventually(lambda: fourth.is_waiting(run), "the step has begun")
        if busy == "exchanging":
            goal = moved_bytes(fourth) + (1 << 20)
            steps.append(start_step(other))
            wait_for_moved_bytes(fourth, goal)
        began = time.monotonic()
        fourth.send(number)
        assert fourth.wait() == 0
        assert time.monotonic() - began < SOON_S
        for step in steps:
            assert step.join().reason
    for i, vector in enumerate(vectors):
        assert vector.min() == vector.max()
        assert vector[0] in (2.0**i, 1.5)
    assert "Traceback" not in fourth.log()


def refuses_trainers(daemon: DaemonProcess) -> bool:
    try:
        with averagers([daemon], new_run(), ones(1)):
            return False
    except LocalError as error:
        return "leaving" in str(error)


def test_leave_finishes_the_round(stayers: list[DaemonProcess], fourth: DaemonProcess) -> None:
    run, vectors = new_run(), ones(2)
    with averagers([fourth, stayers[0]], run, vectors) as (mine, other):
        wait_for_company([fourth, stayers[0]], run)
        step = start_step(mine)
        eventually(lambda: fourth.is_waiting(run), "the step has begun")
        leaving = Background(lambda: mpd("leave", "--socket", fourth.socket))
        eventually(lambda: refuses_trainers(fourth), "the daemon is leaving")
        assert fourth.is_running()
        assert other.step(timeout=STEP_S).averaged
        assert step.join().averaged
        done = leaving.join()
        assert (done.returncode, done.stderr) == (0, "")
        assert fourth.wait() == 0
    assert all((vector == 1.5).all() for vector in vectors)


def test_a_signal_ends_a_daemon_that_waits_to_leave(stayers: list[DaemonProcess], fourth: DaemonProcess) -> None:
    run = new_run()
    with averagers([fourth, stayers[0]], run, ones(2)) as (mine, _):
        wait_for_company([fourth, stayers[0]], run)
        step = start_step(mine)
        eventually(lambda: fourth.is_waiting(run), "the step has begun")
        leaving = Background(lambda: mpd("leave", "--socket", fourth.socket))
        eventually(lambda: refuses_trainers(fourth), "the daemon is leaving")
        began = time.monotonic()
        fourth.send(signal.SIGTERM)
        assert fourth.wait() == 0
        assert time.monotonic() - began < SOON_S
        assert leaving.join().returncode == 0
        assert "went away" in step.join().reason


def test_a_second_signal_ends_the_daemon_at_once(stayers: list[DaemonProcess], fourth: DaemonProcess) -> None:
    run = new_run()
    with averagers([fourth, stayers[0]], run, ones(2)) as (mine, _):
        wait_for_company([fourth, stayers[0]], run)
        step = start_step(mine)
        eventually(lambda: fourth.is_waiting(run), "the step has begun")
        began = time.monotonic()
        fourth.send(signal.SIGTERM)
        fourth.send(signal.SIGINT)
        fourth.wait()
        assert time.monotonic() - began < SOON_S
        assert "went away" in step.join().reason
    assert "Traceback" not in fourth.log()


# -------------------------------------------------------------------------------------------------------- what it tells


def test_the_json_of_status_rounds_and_peers(stayers: list[DaemonProcess]) -> None:
    run, ids = new_run(), {daemon.peer for daemon in stayers}
    first = stayers[0]
    with averagers([first, *stayers], run, ones(4)) as attached:
        assert all(step_all(attached))
        assert all(step_all(attached))
        status = mpd_json("status", "--socket", first.socket)
        rounds = mpd_json("rounds", "--run", run, "--last", 1, "--socket", first.socket)
        peers = mpd_json("peers", "--socket", first.socket)
    assert {"peer_id", "listen", "dht", "runs", "version", "uptime_s"} <= set(status)
    assert (status["peer_id"], status["listen"]) == (first.peer, first.listen)
    assert set(status["dht"]) >= {"peers", "bootstrap"}
    assert status["dht"]["peers"] >= 2
    assert status["uptime_s"] > 0
    (described,) = [each for each in status["runs"] if each["name"] == run]
    assert {"name", "shape", "key", "phase", "peers", "trainers", "rounds"} <= set(described)
    assert (described["shape"], described["key"], described["phase"]) == ([1], [0], 0)
    assert (described["peers"], described["trainers"], described["rounds"]) == (3, 2, 2)
    (last,) = rounds
    assert (last["run"], last["averaged"]) == (run, True)
    assert set(last["group"]) == set(last["contributors"]) == ids
    assert last["seconds"] > 0
    assert last["bytes_sent"] > N_ELEMS * 4
    assert last["bytes_received"] > N_ELEMS * 4
    assert isinstance(last["reason"], str)
    linked = {peer["peer"]: peer for peer in peers}
    assert set(linked) >= ids - {first.peer}
    assert all({"address", "goodput", "bytes_sent", "bytes_received"} <= set(peer) for peer in peers)
    assert linked[stayers[1].peer]["address"] == stayers[1].listen


def test_people_get_tables(stayers: list[DaemonProcess]) -> None:
    run, other = new_run(), stayers[1]
    with averagers(stayers, run, ones(3)) as attached:
        assert all(step_all(attached))
        for command, fact in {"status": run, "rounds": other.peer[:8], "peers": other.listen}.items():
            done = mpd(command, "--socket", stayers[0].socket)
            assert (done.returncode, done.stderr) == (0, "")
            assert fact in done.stdout
