"""The plan of faults: repeatable, over in time, and never against a majority."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.client.chaos_plan import KINDS, Settings, make_plan
from mpd.errors import LocalError

SETTINGS = Settings(
    peers=8,
    kinds=tuple(KINDS),
    chaos_s=1800.0,
    every_s=(30.0, 30.0),
    seed=7,
    size_bytes=1 << 20,
    train_s=0.5,
    timeout_s=20.0,
    quiet_s=60.0,
)

settings_of_any_kind = st.builds(
    lambda peers, kinds, chaos_s, shortest, more, seed: replace(
        SETTINGS, peers=peers, kinds=tuple(kinds), chaos_s=chaos_s, every_s=(shortest, shortest + more), seed=seed
    ),
    st.integers(2, 16),
    st.lists(st.sampled_from(sorted(KINDS)), min_size=1, unique=True),
    st.floats(1, 600),
    st.floats(0.1, 60),
    st.floats(0, 60),
    st.integers(0, 1 << 31),
)


def test_the_same_seed_gives_the_same_plan() -> None:
    assert make_plan(SETTINGS) == make_plan(SETTINGS)
    assert make_plan(SETTINGS) != make_plan(replace(SETTINGS, seed=8))


def test_half_an_hour_with_a_fault_every_half_minute_has_sixty_of_all_kinds() -> None:
    plan = make_plan(SETTINGS)
    assert len(plan) == 60
    assert {fault.kind for fault in plan} == set(KINDS)
    assert {fault.target for fault in plan} == set(range(SETTINGS.peers + 1))


@given(settings_of_any_kind)
def test_all_is_over_in_time_and_a_majority_is_left_alone(settings: Settings) -> None:
    plan = make_plan(settings)
    assert list(plan) == sorted(plan, key=lambda fault: fault.at_s)
    for fault in plan:
        assert fault.kind in settings.kinds
        assert (fault.target == settings.guest) == (fault.kind == "join")
        assert 0 < fault.at_s < fault.ends_s <= settings.chaos_s + 0.002
        under = [other for other in plan if other.at_s <= fault.at_s < other.ends_s]
        assert len({other.target for other in under}) == len(under), "a machine is hit while it is down"
        assert sum(other.kind != "join" for other in under) <= max(1, (settings.peers - 1) // 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ("kill", "flood")}, "flood is no fault: choose among kill, "),
        ({"kinds": ()}, "nothing is no fault"),
        ({"peers": 1}, "2 to 16 expected"),
        ({"peers": 17}, "2 to 16 expected"),
        ({"every_s": (0.0, 1.0)}, "two rising numbers"),
        ({"every_s": (2.0, 1.0)}, "two rising numbers"),
    ],
)
def test_what_is_no_plan_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(LocalError, match=message):
        replace(SETTINGS, **changes)  # type: ignore[arg-type]
