"""States on disk: the old file or the new one, whole or refused, and no disk ever stops a run."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from fake_peers import Swarm
from state_swarm import CHUNK_BYTES, N_ELEMS, RUN, Host, host, small_chunks_and_no_threads, together
from trio.testing import MockClock

from mpd.daemon import keeping
from mpd.daemon.budgets import Budget
from mpd.daemon.keeping import EVERY_S, Keeper, read_head
from mpd.errors import LocalError


@pytest.fixture(autouse=True)
def small(repeatable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks_and_no_threads(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def keeper(folder: Path) -> Keeper:
    return Keeper(folder, lambda: 1.8e9)


async def keeping_hosts(nursery: trio.Nursery, folder: Path, n: int = 2) -> list[Host]:
    """Return hosts of which the first keeps states in `folder`."""
    swarm = Swarm(nursery)
    daemons = [swarm.daemon() for _ in range(n)]
    daemons[0].runs.desk.keeper = keeper(folder)
    return [await host(swarm, daemon) for daemon in daemons]


async def restarted(nursery: trio.Nursery, folder: Path) -> Host:
    """Return a host that knows nothing but what is in `folder`."""
    return (await keeping_hosts(nursery, folder, 1))[0]


def files(folder: Path) -> dict[Path, bytes]:
    """Return what lies in `folder`."""
    return {path: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


async def test_what_was_committed_is_there_after_a_restart_with_nobody_else(
    nursery: trio.Nursery, folder: Path, autojump_clock: MockClock
) -> None:
    hosts = await keeping_hosts(nursery, folder)
    await together(hosts, 1.0, 3.0, metadata=b"epoch 7")
    await trio.sleep(1)
    assert hosts[0].held == ()  # nobody else wanted it
    again = await restarted(nursery, folder)
    loaded = await again.load()
    assert loaded.loaded, loaded.reason
    assert (again.values(), loaded.number, loaded.metadata) == ({2.0}, 1, b"epoch 7")
    assert (loaded.sources, loaded.bytes_received) == ((), 0)
    assert again.run.shelf.age == 1


async def test_what_was_kept_is_offered_to_others(
    nursery: trio.Nursery, folder: Path, autojump_clock: MockClock
) -> None:
    hosts = await keeping_hosts(nursery, folder)
    await together(hosts, 1.0, 3.0)
    await trio.sleep(1)
    swarm = Swarm(nursery)
    daemon = swarm.daemon()
    daemon.runs.desk.keeper = keeper(folder)
    holder, late = await host(swarm, daemon), await host(swarm)
    loaded = await late.load()
    assert loaded.loaded, loaded.reason
    assert late.values() == {2.0}
    assert len(loaded.sources) == 1
    assert holder.held[0].manifest == late.held[0].manifest
    answers = await together([holder, late], 2.0, 4.0)
    assert answers[0].averaged
    assert holder.run.shelf.age == late.run.shelf.age == 2


async def test_it_is_saved_once_a_minute_at_most_and_then_the_newest(
    nursery: trio.Nursery, folder: Path, autojump_clock: MockClock
) -> None:
    hosts = await keeping_hosts(nursery, folder)
    file = hosts[0].daemon.runs.desk.keeper.file_of(RUN)  # type: ignore[union-attr]
    for _ in range(3):
        await together(hosts, 1.0, 3.0)
        await trio.sleep(1)
    assert read_head(file).kept.number == 1
    await trio.sleep(EVERY_S)
    assert read_head(file).kept.number == 3
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


def test_runs_do_not_share_files(folder: Path) -> None:
    own = keeper(folder)
    names = ["run", "Run", "run/../run", "a" * 256, "\u2603"]
    assert len({own.file_of(name) for name in names}) == len(names)
    assert {own.file_of(name).parent for name in names} == {folder}


def damaged(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda content: content[:-1], "its header speaks of"),
        (lambda content: content[: len(content) // 2], "its header speaks of"),
        (lambda content: content + b"\0", "its header speaks of"),
        (lambda content: content[:30], "cut off in its header"),
        (lambda content: b"", "does not begin like a state file"),
        (lambda content: b"\x80\x04\x95" + content, "does not begin like a state file"),
        (lambda content: damaged(content, 40), "header is damaged"),
        (lambda content: damaged(content, len(content) - 1), "of its vector is damaged"),
        (lambda content: damaged(content, len(content) - 4 * N_ELEMS), "chunk 0 of its vector is damaged"),
    ],
)
async def test_a_file_that_is_not_whole_is_refused_in_one_sentence(
    damage: Callable[[bytes], bytes], why: str, nursery: trio.Nursery, folder: Path, autojump_clock: MockClock
) -> None:
    hosts = await keeping_hosts(nursery, folder)
    await together(hosts, 1.0, 3.0)
    await trio.sleep(1)
    (file,) = files(folder)
    file.write_bytes(damage(file.read_bytes()))
    again = await restarted(nursery, folder)
    assert not (await again.load()).loaded
    desk = again.daemon.runs.desk
    assert desk.keeper is not None
    assert desk.keeper.problem.startswith(f"the kept state {file} was not loaded: ")
    assert why in desk.keeper.problem
    assert "\n" not in desk.keeper.problem
    assert (desk.budgets.states.used, again.held) == (0, ())


async def test_a_file_of_other_terms_or_another_run_is_not_ours(
    nursery: trio.Nursery, folder: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = await keeping_hosts(nursery, folder)
    await together(hosts, 1.0, 3.0)
    await trio.sleep(1)
    (file,) = files(folder)
    again = await restarted(nursery, folder)
    shelf, own = again.run.shelf, again.daemon.runs.desk.keeper
    assert own is not None
    os.rename(file, own.file_of("other run"))
    await own.restore("other run", shelf)
    assert "it is of run 'run'" in own.problem
    os.rename(own.file_of("other run"), file)
    own._troubles.clear()
    monkeypatch.setitem(shelf.terms.__dict__, "digest", bytes(32))
    await own.restore(RUN, shelf)
    assert "other terms or tensors" in own.problem


async def test_a_disk_that_refuses_costs_nothing_but_the_file(
    nursery: trio.Nursery, folder: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = await keeping_hosts(nursery, folder)
    own = hosts[0].daemon.runs.desk.keeper
    assert own is not None
    await together(hosts, 1.0, 3.0)
    await trio.sleep(1)
    before = own.file_of(RUN).read_bytes()
    write = os.write

    def full(fd: int, data: Any) -> int:
        if len(data) >= CHUNK_BYTES:
            write(fd, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(os, "write", full)
    for _ in range(3):
        assert (await together(hosts, 1.0, 3.0))[0].averaged
        await trio.sleep(EVERY_S + 1)
    assert own.problem == f"the state of run {RUN!r} could not be saved: No space left on device"
    assert list(files(folder).values()) == [before]
    monkeypatch.undo()
    small_chunks_and_no_threads(monkeypatch)
    await trio.sleep(EVERY_S + 1)  # it is tried again, without another step
    assert own.problem == ""
    assert read_head(own.file_of(RUN)).kept.number == 4


async def test_a_folder_that_cannot_be_made_is_said(
    nursery: trio.Nursery, folder: Path, autojump_clock: MockClock
) -> None:
    file = folder / "runs"  # a folder that cannot be made in a folder that is not there
    hosts = await keeping_hosts(nursery, file)
    assert (await together(hosts, 1.0, 3.0))[0].averaged
    await trio.sleep(1)
    assert "could not be saved: No such file" in hosts[0].daemon.runs.desk.keeper.problem  # type: ignore[union-attr]
    assert files(folder) == {}


async def test_without_room_for_another_state_it_is_not_kept_and_said(
    nursery: trio.Nursery, folder: Path, autojump_clock: MockClock
) -> None:
    hosts = await keeping_hosts(nursery, folder)
    hosts[0].run.shelf._budget = Budget(0)
    assert (await together(hosts, 1.0, 3.0))[0].averaged
    await trio.sleep(1)
    assert "as many states as it may" in hosts[0].daemon.runs.desk.keeper.problem  # type: ignore[union-attr]
    assert files(folder) == {}


def test_what_a_crash_left_half_written_goes_at_the_next_start(folder: Path) -> None:
    folder.mkdir()
    (folder / ".new-left").write_bytes(b"half")
    (folder / "kept.state").write_bytes(b"whole")
    keeper(folder)
    assert [path.name for path in folder.iterdir()] == ["kept.state"]


def test_a_write_that_is_given_up_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "x.state"
    keeping._write(file, b"head", memoryview(b"vector"), threading.Event())
    assert file.read_bytes() == b"headvector"
    given_up = threading.Event()
    given_up.set()
    with pytest.raises(InterruptedError):
        keeping._write(file, b"other", memoryview(b"vector"), given_up)
    assert [path.read_bytes() for path in file.parent.iterdir()] == [b"headvector"]


async def test_no_room_to_load_is_said_and_the_file_stays(
    nursery: trio.Nursery, folder: Path, autojump_clock: MockClock
) -> None:
    hosts = await keeping_hosts(nursery, folder)
    await together(hosts, 1.0, 3.0)
    await trio.sleep(1)
    again = await restarted(nursery, folder)
    again.run.shelf._budget = Budget(0)
    assert not (await again.load()).loaded
    assert "as many states as it may" in again.daemon.runs.desk.keeper.problem  # type: ignore[union-attr]
    assert len(files(folder)) == 1
    with pytest.raises(LocalError):
        again.run.shelf.reserve()
