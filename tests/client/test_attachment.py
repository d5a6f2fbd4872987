"""An attachment checks what it is given before it maps it, and leaves nothing behind."""

import mmap
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from client.stub import DaemonThread, Seat, Trainers

from mpd import control
from mpd.client.attachment import Attachment
from mpd.client.connection import Connection
from mpd.client.tensors import register
from mpd.daemon.memory import OutRegion, Region
from mpd.errors import LocalError
from mpd.layout import Layout


def attach(path: Path, *arrays: np.ndarray, run: str = "run") -> Attachment:
    tensors = register(arrays)
    layout = Layout(tuple(tensor.spec for tensor in tensors))
    return Attachment(Connection(path), control.Attach(run, layout.specs, 16, 1, "raw", "mean"), layout, tensors)


def test_windows_lie_where_the_layout_says(path: Path, server: DaemonThread) -> None:
    attachment = attach(path, np.ones(3, np.float32), np.ones((2, 2)), np.ones(0))
    (seat,) = server.trainers.seats
    for number, window in enumerate(attachment.sent, start=1):
        window[...] = number
    for offset, window in zip(seat.layout.offsets, attachment.sent, strict=True):
        assert bytes(seat.in_region.view[offset : offset + window.nbytes]) == window.tobytes()
    seat.out_region.view[:] = seat.in_region.view
    assert [window.tolist() for window in attachment.result] == [[1, 1, 1], [[2, 2], [2, 2]], []]
    attachment.close()


def test_results_cannot_be_written(path: Path, server: DaemonThread) -> None:
    attachment = attach(path, np.ones(3))
    with pytest.raises(ValueError, match="read-only"):
        attachment.result[0][0] = 1
    attachment.close()


def test_windows_outlive_the_attachment(path: Path, server: DaemonThread) -> None:
    attachment = attach(path, np.ones(3))
    window = attachment.sent[0]
    attachment.close()
    attachment.close()
    assert server.trainers.seats[0].closed.wait(10)
    window[:] = 7
    assert window.tolist() == [7, 7, 7]


def test_an_attachment_that_has_ended_keeps_no_memory(path: Path, server: DaemonThread) -> None:
    before = Counter(_resident_memfds())  # other tests in this process may have left some for the garbage collector
    attachment = attach(path, np.ones(8192))
    attachment.snapshot()
    attachment.close()
    assert server.trainers.seats[0].closed.wait(10)
    server.stop()
    assert Counter(_resident_memfds()) <= before


def test_a_refusal_is_passed_on(path: Path, server: DaemonThread) -> None:
    with pytest.raises(LocalError, match="run 'taken' has other terms: group_size is 16 here, 8 there"):
        attach(path, np.ones(3), run="taken")


def test_an_attachment_leaves_no_descriptors_behind(path: Path, server: DaemonThread) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        attachment = attach(path, np.ones(3))
        attachment.snapshot()
        attachment.close()
    assert all(seat.closed.wait(10) for seat in server.trainers.seats)
    server.stop()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("region", ["in_region", "out_region"])
def test_a_daemon_with_another_layout_is_refused(path: Path, region: str) -> None:
    class Odd(Trainers):
        async def attach(self, request: control.Attach, label: str) -> Seat:
            seat = await super().attach(request, label)
            getattr(seat, region).close()
            setattr(seat, region, Region(64) if region == "in_region" else OutRegion(64))
            return seat

    with (
        DaemonThread(path, Odd()),
        pytest.raises(LocalError, match="bytes out for these tensors, we 24: install the same mpd"),
    ):
        attach(path, np.ones(3))


def test_shared_memory_that_is_too_small_is_refused(path: Path) -> None:
    class Short(Trainers):
        async def attach(self, request: control.Attach, label: str) -> Seat:
            seat = await super().attach(request, label)
            seat.in_region.close()
            seat.in_region = Region(8)
            seat.in_region.n_bytes = seat.layout.n_bytes
            return seat

    with DaemonThread(path, Short()), pytest.raises(LocalError, match="of 8192 bytes cannot be mapped"):
        attach(path, np.ones(8192 // 8))


def test_the_memory_has_no_name(path: Path, server: DaemonThread) -> None:
    before = set(os.listdir("/dev/shm"))
    attachment = attach(path, np.ones(3))
    attachment.snapshot()
    assert set(os.listdir("/dev/shm")) == before
    attachment.close()


def test_an_attachment_maps_with_all_its_pages(path: Path, server: DaemonThread) -> None:
    """First touch belongs to the attachment: a step must find every page of its three regions mapped."""
    n_bytes = 64 * mmap.PAGESIZE
    attachment = attach(path, np.ones(n_bytes // 8))
    attachment.snapshot()
    sizes = [region for region in _resident_memfds() if region[0] >= n_bytes // 1024]
    assert len(sizes) == 6  # the daemon's three and ours, in one process here
    assert all(resident == size for size, resident in sizes)
    attachment.close()


def _resident_memfds() -> list[tuple[int, int]]:
    """Return (size, resident) in KiB of every mapping of one of our memfds."""
    found: list[tuple[int, int]] = []
    ours = False
    size = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if " " in name:
            ours = "memfd:mpd" in line
        elif ours and name == "Size":
            size = int(rest.split()[0])
        elif ours and name == "Rss":
            found.append((size, int(rest.split()[0])))
    return found
