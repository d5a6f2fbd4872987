"""Shared memory holds against a trainer that means harm, and leaves nothing behind."""

import mmap
import os
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from mpd.control import OUT_HEADER_BYTES
from mpd.daemon import memory
from mpd.daemon.memory import OutRegion, Region, private
from mpd.errors import LocalError

N_BYTES = 3 * mmap.PAGESIZE + 100
MIB = 1 << 20
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
    assert region.generation == 2**40 + 3
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


@pytest.mark.parametrize("n_bytes", [N_BYTES, 8 * MIB])
def test_a_reader_survives_the_end_of_its_region(n_bytes: int) -> None:
    region = Region(n_bytes)
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


@pytest.mark.parametrize("make", [Region.make, OutRegion.make, private])
async def test_more_than_the_machine_has_is_refused_with_both_sizes(make: Callable[[int], Awaitable[object]]) -> None:
    with pytest.raises(LocalError, match=r"1048576\.\d MiB of memory are needed .* MiB are available: average fewer"):
        await make(1 << 40)


@pytest.mark.parametrize("call", ["memfd_create", "ftruncate", "posix_fallocate"])
async def test_a_failing_system_call_is_refused_and_leaves_no_descriptor(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(LocalError, match=r"1\.0 MiB of memory could not be set up: No space left on device"):
        await Region.make(1 << 20)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("n_bytes", [N_BYTES, 5 * MIB + 100], ids=["at once", "in slices"])
async def test_a_region_that_is_made_has_all_its_pages(n_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_SLICE_BYTES", 2 * MIB)
    for kind in KINDS:
        region = await kind.make(n_bytes)
        size = os.fstat(region.fd).st_size
        assert os.fstat(region.fd).st_blocks * 512 == -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        assert _mapped_kib(region) == (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE // 1024
        assert not any(region.view)
        region.close()


async def test_memory_that_is_no_longer_wanted_is_given_up_after_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_SLICE_BYTES", 2 * MIB)
    slices: list[int] = []
    fill, before = memory._fill_slice, set(os.listdir("/proc/self/fd"))

    def watched(values: Any, begin: int, *more: Any) -> None:
        slices.append(begin)
        fill(values, begin, *more)
        trio.from_thread.run_sync(scope.cancel)

    monkeypatch.setattr(memory, "_fill_slice", watched)
    with trio.CancelScope() as scope:
        await Region.make(100 * MIB)
    assert scope.cancelled_caught
    assert slices == [0]
    with trio.fail_after(5):
        while set(os.listdir("/proc/self/fd")) - before:  # a thread gives the pages back
            await trio.lowlevel.checkpoint()


async def test_memory_that_runs_out_on_the_way_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone else took it after we had looked."""
    before = os.listdir("/proc/self/fd")
    left = iter([1 << 40, 1 << 40, 0])
    monkeypatch.setattr(memory, "_SLICE_BYTES", MIB // 2)
    monkeypatch.setattr(memory, "_available_bytes", lambda: next(left))
    with pytest.raises(LocalError, match=r"0\.5 MiB of memory are needed for these tensors, 0\.0 MiB are available"):
        await Region.make(MIB)
    assert os.listdir("/proc/self/fd") == before


async def test_a_loop_goes_on_while_memory_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills a slice lets go of the interpreter, and the event loop has its turns meanwhile."""
    turns, done = 0, trio.Event()

    async def make() -> None:
        for make_one in (Region.make, OutRegion.make, private):
            await make_one(64 * MIB)
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make)
        while not done.is_set():
            await trio.lowlevel.checkpoint()
            turns += 1
    assert turns > 100


async def test_private_memory_is_zeroed_touched_and_shared_with_nobody() -> None:
    n_bytes = 8 << 20
    before = _resident_bytes()
    kept = await private(n_bytes)
    assert _resident_bytes() - before > n_bytes // 2
    assert not any(kept)
    _write_in_a_child(kept)
    assert kept[0] == 0


def _write_in_a_child(memory: memoryview) -> None:
    child = os.fork()
    if child == 0:
        memory[0] = 1
        os._exit(0)
    os.waitpid(child, 0)


def _mapped_kib(region: Region) -> int:
    """Return how much of `region` our page tables hold."""
    inode = str(os.fstat(region.fd).st_ino)
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if "memfd:mpd" in line and line.split()[4] == inode)
    return int(next(line for line in lines[start:] if line.startswith("Rss:")).split()[1])


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
