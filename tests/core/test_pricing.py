"""What a round costs: against closed forms where there are some, and against the daemon's own rules elsewhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.costs import DIAL_HOPS, WIRE_OVERHEAD, Costs, hops
from mpd.deadlines import PROGRESS, patience_s
from mpd.errors import LocalError
from mpd.pricing import LIMITS, NOBODY, Floats, Ints, Peers, Price, Work, price
from mpd.schedule import chunk_bytes_for, tempered_fractions

MIB = 1 << 20
FREE = Costs(0, 0, 0, 0, 0, 0, 0, busy=1.0, serial=0.0)


def machines(up: list[float], down: list[float] | None = None, rtt_s: float = 0.0) -> Peers:
    return Peers(np.array(up), np.array(up if down is None else down), np.full(len(up), rtt_s))


def progress_s(n: int, vector_bytes: int, slowest: float, typical: float = 1e7) -> float:
    """Return the limit on silence: four times what lies between two pieces of one sender."""
    pause_s = chunk_bytes_for(vector_bytes, n, slowest) * (n - 1) / typical * WIRE_OVERHEAD
    return PROGRESS.clamp(PROGRESS.of_median * pause_s)


def one_group(n: int) -> Ints:
    return np.arange(n)[None, :]


def round_of(peers: Peers, mib: float = 100, costs: Costs = FREE, **work: bool) -> Price:
    return price(peers, Work(int(mib * MIB), **work), costs, one_group(len(peers)))


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16, 48])
def test_equal_lines_take_the_time_of_a_butterfly(n: int) -> None:
    paid = round_of(machines([1e7] * n))
    assert paid.seconds == pytest.approx(np.full((1, n), 2 * (1 - 1 / n) * 100 * MIB / 1e7 * WIRE_OVERHEAD))
    assert paid.sent.sum() == pytest.approx(2 * (n - 1) * 100 * MIB)
    assert LIMITS[paid.limit[0]] in ("uplink", "downlink")


@given(st.lists(st.floats(1e6, 1.5e6), min_size=3, max_size=20))
def test_no_group_is_faster_than_its_slowest_line_could_be(up: list[float]) -> None:
    paid = round_of(machines(up))
    n, v = len(up), 100 * MIB * WIRE_OVERHEAD
    assert paid.shares.sum() == pytest.approx(1)
    slowest = max((1 + (n - 2) * w) * v / b for w, b in zip(paid.shares[0], up, strict=True))
    assert paid.seconds.max() == pytest.approx(slowest)
    assert paid.seconds.min() > 0


def test_shards_are_those_that_the_daemon_cuts() -> None:
    up = [1e7, 1e7, 1e7, 2e6, 9e7]
    paid = round_of(machines(up))
    assert paid.shares[0].tolist() == list(tempered_fractions(up, [True] * 5))
    assert paid.shares[0][3] == 0  # five times slower than the median: it sends, and reduces nothing


def test_strangers_do_not_know_who_sends_slowly() -> None:
    up, down = [1e7] * 7 + [1e6], [1e7] * 8
    assert round_of(machines(up, down)).shares[0][7] == 0
    assert round_of(machines(up, down), is_grid=True).shares[0][7] == pytest.approx(1 / 8)
    assert round_of(machines(up), is_known=False).shares[0] == pytest.approx(np.full(8, 1 / 8))


def test_the_group_waits_for_a_slow_member_as_long_as_the_daemon_would() -> None:
    second = 100 * MIB * WIRE_OVERHEAD / 1e7  # in which the vector passes once
    slower = round_of(machines([1e7] * 7 + [1e7 / 3]))
    assert slower.seconds[0] == pytest.approx(np.full(8, 3 * 1.75 * second))  # it is one of the group, shard and all
    far_slower = round_of(machines([1e7] * 7 + [1e7 / 30]))
    # Seven reduce, and each has received the pieces of all others after a second.
    patient_s = patience_s(second, progress_s(8, 100 * MIB, 1e7 / 30))
    assert far_slower.shares[0][7] == 0
    assert far_slower.seconds[0, :7] == pytest.approx(np.full(7, patient_s))
    # A quorum has its result: who is left behind holds nobody up, and still has to receive the whole vector.
    assert far_slower.seconds[0, 7] == pytest.approx(30 * second)
    assert LIMITS[far_slower.limit[0]] in ("uplink", "downlink", "slow member")


def test_places_that_nobody_has_change_nothing() -> None:
    peers = machines([1e7, 2e7, 1.5e7, 1e7, 1.2e7, 3e7])
    alone = price(peers, Work(MIB), Costs(), np.array([[0, 1, 2, 3]]))
    padded = price(peers, Work(MIB), Costs(), np.array([[4, 5, NOBODY, NOBODY], [0, 1, 2, 3]]))
    assert padded.seconds[1] == pytest.approx(alone.seconds[0])
    assert (padded.seconds[0, 2:] == 0).all()
    assert (padded.sent[0, 2:] == 0).all()


@pytest.mark.parametrize("n", [2, 3, 8])
def test_latency_costs_as_many_delays_as_a_step_has(n: int) -> None:
    near, far = (round_of(machines([1e9] * n, rtt_s=rtt_s), 0.01).seconds.max() for rtt_s in (0.0, 0.1))
    assert far - near == pytest.approx(hops(n) * 0.05)


def test_a_large_swarm_meets_strangers() -> None:
    peers = machines([1e9] * 5000, rtt_s=0.1)
    group = np.arange(8)[None, :]
    known, strange = (price(peers, Work(1024, is_grid=is_grid), FREE, group).seconds.max() for is_grid in (False, True))
    assert strange - known > DIAL_HOPS * 0.05


def test_windows_open_slowly_on_far_links() -> None:
    near, far = (round_of(machines([1e8] * 4, rtt_s=rtt_s), 40).seconds.max() for rtt_s in (1e-9, 0.2))
    assert far - near > hops(4) * 0.1 + 0.2


def test_on_one_host_the_work_of_all_is_shared_by_its_cores() -> None:
    costs = Costs(0, 0, 1e-9, 0, 0, 0, 0, busy=1.0, serial=0.0)
    many = Peers(np.full(16, 1e12), np.full(16, 1e12), np.zeros(16), cores=2, one_host=True)
    groups = np.arange(16).reshape(4, 4)
    paid = price(many, Work(8 * MIB), costs, groups)
    assert paid.seconds.max() == pytest.approx(4 * 2 * 3 * 8 * MIB * 1e-9 / 2, rel=1e-3)
    assert LIMITS[paid.limit[0]] == "processor"


def test_a_machine_of_its_own_moves_bytes_on_one_core() -> None:
    costs = Costs(0, 0, 1e-9, 0, 0, 0, 0, busy=1.0, serial=0.0)
    paid = round_of(machines([1e12] * 4), 8, costs)
    assert paid.seconds.max() == pytest.approx(2 * 3 / 4 * 8 * MIB * 1e-9, rel=1e-3)


def test_a_lost_member_costs_its_detection_and_its_shard() -> None:
    peers = machines([1e7] * 8)
    calm = round_of(peers).seconds.max()

    def lost(at: float) -> float:
        lost_at: Floats = np.full((1, 8), np.inf)
        lost_at[0, 3] = at
        return float(price(peers, Work(100 * MIB), FREE, one_group(8), lost_at).seconds.max())

    shard_s = 100 * MIB / 8 / 1e7 * WIRE_OVERHEAD
    noticed_s = progress_s(8, 100 * MIB, 1e7)
    assert lost(0.0) - calm == pytest.approx(noticed_s + 2 * shard_s)
    assert lost(1.0) - calm == pytest.approx(noticed_s)


@pytest.mark.parametrize(("up", "rtt_s"), [([1.0], 0.0), ([1.0, 0.0], 0.0), ([1.0, -1.0], 0.0), ([1.0, 1.0], -1.0)])
def test_machines_that_cannot_be_are_refused(up: list[float], rtt_s: float) -> None:
    with pytest.raises(LocalError, match="expected"):
        machines(up, rtt_s=rtt_s)
    with pytest.raises(LocalError, match="bytes"):
        Work(0)
