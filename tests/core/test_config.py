"""Configuration: the defaults that documentation promises, and no duration that would never end or never begin."""

import dataclasses
import math
from pathlib import Path

import pytest

from mpd.config import DEFAULT_PORT, DaemonConfig, NetConfig, RoundLimits
from mpd.ids import Endpoint


def test_a_daemon_listens_on_all_interfaces_and_seals_what_it_sends() -> None:
    net = NetConfig()
    assert net.listen == Endpoint("0.0.0.0", DEFAULT_PORT) == Endpoint("0.0.0.0", 4747)
    assert (net.announce, net.bootstrap, net.outbound_only, net.plain_data) == (None, (), False, False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_tensors_in_the_clear_never_leave_the_machine(host: str) -> None:
    with pytest.raises(ValueError, match="on a loopback address only"):
        NetConfig(Endpoint(host, 4747), plain_data=True)
    assert NetConfig(Endpoint("127.0.0.1", 4747), plain_data=True).plain_data


def test_what_is_promised_until_something_is_measured() -> None:
    limits = DaemonConfig(Path("socket"), Path("state")).limits
    assert (limits.window_s, limits.progress_s, limits.step_s, limits.roster_quiet_s) == (5.0, 2.0, 60.0, 1.0)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(RoundLimits)])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_limit_is_a_positive_number_of_seconds(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a positive number of seconds"):
        RoundLimits(**{name: value})
    assert getattr(RoundLimits(**{name: 0.5}), name) == 0.5


def test_configuration_never_changes() -> None:
    config = DaemonConfig(Path("socket"), Path("state"))
    for group, name in ((config, "socket"), (config.net, "listen"), (config.limits, "window_s")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, name, None)
