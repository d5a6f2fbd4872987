"""Shared memory holds against a trainer that means harm, and leaves nothing behind."""

import mmap
import os
import struct
from pathlib import Path

import pytest

from mpd.control import OUT_HEADER_BYTES
from mpd.daemon import memory
from mpd.daemon.memory import OutRegion, Region, private
from mpd.errors import LocalError

N_BYTES = 3 * mmap.PAGESIZE + 100
KINDS = [Region, OutRegion]


@pytest.mark.parametrize("kind", KINDS)
def test_a_region_is_zeroed_and_writable_in_full(kind: type[Region]) -> None:
    region = kind(N_BYTES)
    assert region.n_bytes == len(region.view) == N_BYTES
    assert bytes(region.view) == bytes(N_BYTES)
    region.view[-1] = 7
    assert os.pread(region.fd, 1, os.fstat(region.fd).st_size - 1) == b"\x07"
    region.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_bytes", [0, N_BYTES - 1, N_BYTES + OUT_HEADER_BYTES + 1])
def test_no_region_changes_its_size(kind: type[Region], n_bytes: int) -> None:
    region = kind(N_BYTES)
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, n_bytes)
    region.close()


def test_a_trainer_writes_the_in_region() -> None:
    region = Region(N_BYTES)
    with mmap.mmap(region.fd, N_BYTES) as theirs:
        theirs[5] = 9
    assert region.view[5] == 9
    region.close()


def test_nobody_else_writes_the_out_region() -> None:
    region = OutRegion(N_BYTES)
    size = OUT_HEADER_BYTES + N_BYTES
    with pytest.raises(PermissionError):
        mmap.mmap(region.fd, size)
    with pytest.raises(PermissionError):
        os.pwrite(region.fd, b"x", 0)
    reopened = os.open(f"/proc/self/fd/{region.fd}", os.O_RDWR)
    with pytest.raises(PermissionError):
        mmap.mmap(reopened, size)
    os.close(reopened)
    with mmap.mmap(region.fd, size, prot=mmap.PROT_READ) as theirs:
        region.view[:3] = b"abc"
        assert theirs[OUT_HEADER_BYTES : OUT_HEADER_BYTES + 3] == b"abc"
    region.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_seals_are_final(kind: type[Region]) -> None:
    region = kind(N_BYTES)
    with pytest.raises(PermissionError):
        memory.fcntl.fcntl(region.fd, memory.fcntl.F_ADD_SEALS, memory.fcntl.F_SEAL_WRITE)
    region.close()


def test_a_hole_in_the_in_region_reads_as_zeros() -> None:
    """Linux allows it under these seals; what matters is that the daemon reads on."""
    region = Region(N_BYTES)
    region.view[:] = b"x" * N_BYTES
    with mmap.mmap(region.fd, N_BYTES) as theirs:
        theirs.madvise(mmap.MADV_REMOVE, 0, mmap.PAGESIZE)
    assert bytes(region.view[: mmap.PAGESIZE]) == bytes(mmap.PAGESIZE)
    assert bytes(region.view[mmap.PAGESIZE :]) == b"x" * (N_BYTES - mmap.PAGESIZE)
    region.close()


def test_publishing_sets_the_generation_word_and_nothing_else() -> None:
    region = OutRegion(N_BYTES)
    region.publish(2**40 + 3)
    assert os.pread(region.fd, OUT_HEADER_BYTES, 0) == struct.pack("<Q", 2**40 + 3) + bytes(OUT_HEADER_BYTES - 8)
    assert bytes(region.view) == bytes(N_BYTES)
    region.close()


@pytest.mark.parametrize("kind", KINDS)
def test_closing_twice_gives_descriptor_and_memory_back_once(kind: type[Region]) -> None:
    before = os.listdir("/proc/self/fd")
    maps = Path("/proc/self/maps").read_text().count("memfd:mpd")
    region = kind(N_BYTES)
    region.close()
    region.close()
    assert os.listdir("/proc/self/fd") == before
    assert Path("/proc/self/maps").read_text().count("memfd:mpd") == maps


def test_a_reader_survives_the_end_of_its_region() -> None:
    region = Region(N_BYTES)
    view, part = region.view, region.view[10:20]
    region.close()
    view[10] = 4
    assert part[0] == 4


def test_regions_have_no_name() -> None:
    before = os.listdir("/dev/shm")
    regions = [kind(N_BYTES) for kind in KINDS]
    assert os.listdir("/dev/shm") == before
    assert not any(os.get_inheritable(region.fd) for region in regions)
    for region in regions:
        region.close()


@pytest.mark.parametrize("make", [Region, OutRegion, private])
def test_more_than_the_machine_has_is_refused_with_both_sizes(make: type[Region]) -> None:
    with pytest.raises(LocalError, match=r"1048576\.\d MiB of memory are needed .* MiB are available: average fewer"):
        make(1 << 40)


def test_a_failing_system_call_is_refused_and_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(LocalError, match=r"1\.0 MiB of shared memory could not be set up: No space left on device"):
        Region(1 << 20)
    assert os.listdir("/proc/self/fd") == before


def test_private_memory_is_zeroed_touched_and_shared_with_nobody() -> None:
    n_bytes = 8 << 20
    before = _resident_bytes()
    kept = private(n_bytes)
    assert _resident_bytes() - before > n_bytes // 2
    assert not any(kept)
    child = os.fork()
    if child == 0:
        kept[0] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert kept[0] == 0


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
