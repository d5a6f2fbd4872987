"""What the end-to-end tests of one module share: its swarm, and what is shown of it.

A test that fails shows what the daemons logged while it ran.
"""

import sys
from collections.abc import Iterator

import pytest
from e2e_swarm import Swarm


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    """The daemons of this module. None runs at first; see `Swarm.grow`."""
    with Swarm() as own:
        yield own


@pytest.fixture(autouse=True)
def logs(swarm: Swarm) -> Iterator[None]:
    """Have pytest show the daemons' logs, if it shows anything; they must tell of no bug that was contained."""
    for daemon in swarm.daemons:
        daemon.mark_log()
    yield
    sys.stderr.write(swarm.log())
    assert "an unexpected error cost" not in swarm.log()
