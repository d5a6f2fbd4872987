"""What the benchmarks compute: bounds, goals, delays and costs. How fast anything is, no test says."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import costs
import goals
from far import BURST_S, QUEUE_S, Carrier
from links import Case

S = 16 * (1 << 20)


def test_what_a_link_needs_is_the_bytes_of_a_butterfly_and_three_round_trips() -> None:
    near, far = Case("near", 4, 16, 100), Case("far", 4, 16, 100, rtt_s=0.1)
    payload_s = 2 * 3 / 4 * S * 8 / 100e6
    assert payload_s < near.bound_s() < 1.01 * payload_s
    assert far.bound_s() == pytest.approx(payload_s * 9000 / (9000 - 52) + 0.3)


def test_one_slow_link_needs_as_long_as_its_own_vector() -> None:
    slow = Case("slow", 8, 16, 100, slowest=0.1)
    assert S * 8 / 10e6 < slow.bound_s() < 1.01 * S * 8 / 10e6


def test_a_goal_is_judged_by_its_worst_case_and_only_if_it_was_measured() -> None:
    column = {"gloo": {"median_s": 0.1}, "mpd adopt": {"median_s": 0.2}}
    better = {"gloo": {"median_s": 0.1}, "mpd adopt": {"median_s": 0.11}}
    rounds = [{"peers": 2, "mib": 16, "columns": better}, {"peers": 8, "mib": 256, "columns": column}]
    links = [{"name": "4 peers, 100 Mbit/s", "share": 0.97}, {"name": "8 peers, 100 Mbit/s", "share": None}]
    rows = {row["what"]: row for row in goals.rows({"rounds": rounds, "links": links})}
    worst = rows["2 and 8 peers x 16 and 256 MiB, sealed, adopt / Gloo (worst)"]
    assert (worst["goal"], worst["seen"], worst["met"]) == ("<= 1.6", "2", False)
    assert rows["100 Mbit/s, 4 and 8 peers x 16 MiB: share of the link-bound time"]["met"] is True
    assert {row["met"] for row in goals.rows({})} == {None}


def test_the_sealed_path_is_judged_by_its_bytes_per_second_over_those_of_the_plain_one() -> None:
    columns = {"plain adopt": 0.6, "mpd adopt": 0.8, "plain copies": 0.6, "mpd copies": 1.0}
    rounds = [{"peers": 4, "mib": 64, "columns": {name: {"median_s": s} for name, s in columns.items()}}]
    (row,) = (row for row in goals.rows({"rounds": rounds}) if row["what"].startswith("sealed / plain"))
    assert (row["goal"], row["seen"], row["met"]) == (">= 0.65", "0.6", False)


class Devices:
    """Stands in for the kernel: notes what is handed over, and to whom."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.got: list[tuple[int, bytes]] = []
        monkeypatch.setattr("os.write", lambda device, packet: self.got.append((device, packet)))


def packet_to(number: int, n_bytes: int = 1000) -> bytes:
    return b"\x45" + bytes(18) + bytes([number]) + bytes(n_bytes - 20)


def test_packets_come_after_the_delay_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices(monkeypatch)
    carrier = Carrier([7, 8], 0.05, 0.0, [0, 0])
    carrier.take(1.0, packet_to(2))
    carrier.take(1.01, packet_to(1))
    assert carrier.deliver(1.049) == pytest.approx(1.05)
    assert devices.got == []
    assert carrier.deliver(1.05) == pytest.approx(1.06)
    assert carrier.deliver(1.06) is None
    assert [device for device, _ in devices.got] == [8, 7]


def test_a_receiver_gets_no_more_than_its_link_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices(monkeypatch)
    carrier = Carrier([7], 0.0, 0.0, [8.0])  # 1000 bytes a millisecond
    for _ in range(200):
        carrier.take(100.0, packet_to(1))
    carrier.deliver(100.01)
    assert len(devices.got) == pytest.approx((0.01 + BURST_S) / 0.001, abs=1)
    carrier.deliver(110.0)
    assert len(devices.got) == pytest.approx((QUEUE_S + BURST_S) / 0.001, abs=2)  # the rest had no room


def test_strangers_and_the_lost_arrive_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices(monkeypatch)
    carrier = Carrier([7], 0.0, 0.0, [0])
    for packet in (packet_to(9), b"", b"\x60" * 40):
        carrier.take(0.0, packet)
    lossy = Carrier([7], 0.0, 1.0, [0])
    lossy.take(0.0, packet_to(1))
    assert carrier.deliver(1.0) is None
    assert lossy.deliver(1.0) is None
    assert devices.got == []


def test_costs_on_paper_are_those_measured_where_they_were_and_grow_with_the_logarithm() -> None:
    one = {"datagrams": 20.0, "bytes": 10_000.0, "median_s": 0.09}
    dht = {"nodes": 256, "announce": one, "seek": one, "idle": {"bytes_per_s": 900.0}}
    small = costs.cost(256, dht)
    assert small["datagrams"] == 40 * small["rounds"]
    assert small["seek_s"] == 0.09
    large, larger = costs.cost(1_000, dht), costs.cost(1_000_000, dht)
    assert larger["rounds"] == 2 * large["rounds"]
    assert larger["idle_bytes_per_s"] == pytest.approx(2 * large["idle_bytes_per_s"])
    assert larger["vectors_each_way"] < 2 * larger["rounds"]
