"""What is found on this machine itself. `test_doctor.py` has a case for every judgement; here is what they share."""

import pytest

from mpd.findings import (
    MIN_FREE_BYTES,
    MIN_TCP_BUFFER_BYTES,
    OK,
    WARNING,
    Descriptors,
    Disk,
    Kernel,
    Memory,
    judge_descriptors,
    judge_disk,
    judge_kernel,
    judge_memory,
)


@pytest.mark.parametrize(("below", "verdict"), [(0, OK), (1, WARNING)])
def test_each_threshold_is_where_it_says(below: int, verdict: str) -> None:
    room = MIN_FREE_BYTES - below
    assert judge_disk(Disk("/s", True, "", room, True)).verdict == verdict
    assert judge_memory(Memory(room)).verdict == verdict
    assert judge_kernel(Kernel(MIN_TCP_BUFFER_BYTES - below, 1 << 30)).verdict == verdict
    assert judge_descriptors(Descriptors(800 - below, 800)).verdict == verdict


@pytest.mark.parametrize(("n_bytes", "words"), [(1023 << 20, "1023 MiB"), (1 << 30, "1 GiB"), (3 << 40, "3.0 TiB")])
def test_sizes_are_told_in_units_that_people_use(n_bytes: int, words: str) -> None:
    assert judge_memory(Memory(n_bytes)).says == f"{words} are left here"
