"""What is seen of a machine, in good order and out of it; and that looking leaves nothing behind."""

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mpd.daemon import facts
from mpd.daemon.budgets import WANTED_DESCRIPTORS, Budgets
from mpd.findings import Kernel, Memory


def test_this_platform_is_one_that_tests_run_on() -> None:
    fact = facts.platform()
    assert fact.python == sys.version_info[:2]
    assert fact.knows_processes
    assert fact.sealing == ""


def test_a_private_folder_that_can_be_written_is_fine(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    fact = facts.disk(tmp_path)
    assert (fact.exists, fact.trouble, fact.is_private) == (True, "", True)
    assert fact.free_bytes > 0
    assert list(tmp_path.iterdir()) == []
    tmp_path.chmod(0o755)
    assert not facts.disk(tmp_path).is_private


def test_a_folder_that_is_not_there_is_judged_by_where_it_would_be(tmp_path: Path) -> None:
    fact = facts.disk(tmp_path / "a" / "b")
    assert (fact.exists, fact.trouble) == (False, "")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert "not a folder" in facts.disk(tmp_path / "file").trouble
    assert facts.disk(tmp_path / "file" / "a").trouble


def test_a_file_system_that_takes_nothing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    assert facts.disk(tmp_path).trouble == "Read-only file system"


def test_a_limit_on_files_is_found(tmp_path: Path) -> None:
    """In a process of its own: a limit of zero would hurt this one."""
    code = f"from pathlib import Path; from mpd.daemon import facts; print(facts.disk(Path({str(tmp_path)!r})).trouble)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)),
    )
    assert done.stdout.strip() == "File too large"


def test_a_file_system_without_nameless_files_is_asked_for_its_rights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*arguments: object) -> int:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "open", unsupported)
    assert facts.disk(tmp_path).trouble == ""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert facts.disk(tmp_path).trouble == "Permission denied"


def test_descriptors_are_counted_as_a_daemon_would_get_them() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = facts.descriptors(Budgets())
    assert before.limit >= min(soft, WANTED_DESCRIPTORS)
    assert before.limit <= max(soft, WANTED_DESCRIPTORS)
    assert before.needed > 2 * Budgets().links.limit
    assert facts.descriptors(Budgets(), used=7).limit == soft
    assert hard >= soft or hard == -1


def test_a_place_for_the_socket(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert facts.local_socket(tmp_path / "mpd.sock").trouble == ""
    assert facts.local_socket(tmp_path / "new" / "mpd.sock").trouble == ""
    (tmp_path / "mpd.sock").touch()
    assert "is no socket" in facts.local_socket(tmp_path / "mpd.sock").trouble
    assert "too long" in facts.local_socket(tmp_path / ("x" * 120)).trouble
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(str(tmp_path / "old.sock"))
        assert facts.local_socket(tmp_path / "old.sock").trouble == ""
    tmp_path.chmod(0o777)
    assert "in other users' hands" in facts.local_socket(tmp_path / "mpd.sock").trouble


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_sizes_of_buffers_are_read(tmp_path: Path) -> None:
    assert facts.kernel(tmp_path) == Kernel(0, 0)
    write(tmp_path, tcp_rmem="4096\t131072\t6291456\n", tcp_wmem="nonsense")
    assert facts.kernel(tmp_path) == Kernel(6291456, 0)


MEMINFO = "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n"


def test_the_tightest_limit_on_memory_counts(tmp_path: Path) -> None:
    write(tmp_path, proc__meminfo=MEMINFO)
    assert facts.memory(5, tmp_path) == Memory(4000 * 1024, 0, 5)
    write(tmp_path, proc__self__cgroup="0::/a/b\n")
    group = tmp_path / "sys/fs/cgroup/a"
    (group / "b").mkdir(parents=True)
    for folder, limit, used in ((group / "b", "max", "7"), (group, "3000000", "1000000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    assert facts.memory(0, tmp_path) == Memory(2_000_000, 3_000_000)


def test_limits_of_the_first_kind_of_control_groups_count_too(tmp_path: Path) -> None:
    write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="3:cpu,memory:/c\n1:name=systemd:/c\n")
    folder = tmp_path / "sys/fs/cgroup/memory/c"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("2000")
    (folder / "memory.usage_in_bytes").write_text("500")
    assert facts.memory(0, tmp_path) == Memory(1500, 2000)
