"""The fit finds the costs that a swarm was made of, and says so if it cannot."""

import itertools

import pytest

from mpd.costs import Costs, Sample, fit_costs, hops, lookup_hops
from mpd.errors import LocalError

TRUE = Costs(4e-3, 1e-3, 1.3e-9, 2e-4, 0.3e-9, 7e-3, busy=0.8, serial=0.5)


def samples(costs: Costs, cores: int = 2) -> list[Sample]:
    """Return what small swarms with these costs would have been seen to take."""
    seen = []
    for n, n_bytes in itertools.product((2, 4, 7), (1024, 4 << 20, 16 << 20)):
        n_records = 2 * (n - 1) * n * max(1, n_bytes // n // 65536 // (1 + (n_bytes > 8 << 20)))
        sample = Sample(n, n_bytes, n_records, 1.0, 1.0, cores)
        work_s = costs.work_s(sample)
        seen.append(Sample(n, n_bytes, n_records, work_s, costs.wall_s(work_s, n, cores), cores))
    return seen


def test_the_fit_finds_what_the_samples_were_made_of() -> None:
    found = fit_costs(samples(TRUE), Costs(slot_s=7e-3))
    for name in ("member_s", "pair_s", "byte_s", "record_s", "copy_s", "slot_s", "busy", "serial"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name


def test_no_cost_is_negative_and_no_machine_does_more_than_its_cores() -> None:
    odd = [
        Sample(s.n_members, s.vector_bytes, s.n_records, s.processor_s, s.seconds * (0.6 if s.n_members == 7 else 1), 2)
        for s in samples(TRUE)
    ]
    found = fit_costs(odd, Costs())
    assert 0 < found.busy <= 1
    assert found.serial >= 0
    assert min(found.member_s, found.pair_s, found.byte_s, found.record_s, found.copy_s) >= 0


@pytest.mark.parametrize("few", [samples(TRUE)[:4], [Sample(2, 1, 1, 0.0, 1.0, 2)] * 9])
def test_too_few_samples_and_samples_of_nothing_are_refused(few: list[Sample]) -> None:
    with pytest.raises(LocalError, match="samples"):
        fit_costs(few, Costs())


def test_costs_are_read_from_json() -> None:
    assert Costs.from_json({"member_s": 1, "busy": 0.5}) == Costs(member_s=1.0, busy=0.5)
    for wrong, said in (
        ({"speed": 1.0}, "no cost"),
        ({"busy": "fast"}, "number"),
        ({"busy": 0.0}, "share"),
        ({"byte_s": -1.0}, "from 0"),
    ):
        with pytest.raises(LocalError, match=said):
            Costs.from_json(wrong)


def test_lookups_take_longer_in_larger_swarms() -> None:
    counts = [lookup_hops(n) for n in (2, 20, 100, 5000, 10**6)]
    assert counts == sorted(counts)
    assert counts[0] == 2
    assert (hops(2), hops(3), hops(16)) == (5, 8, 9)
