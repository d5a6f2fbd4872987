"""`mpd doctor` where no daemon runs: what one would need here, and how the addresses answer that lead into the swarm.

Nothing is changed, and nobody is joined: without a key in the state directory the bootstraps are asked in the name of
a key that is thrown away.
"""

import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mpd.doctor import Clocks, Membership, judge
from mpd.errors import Fatal, LocalError
from mpd.findings import Finding, Ports
from mpd.ids import Endpoint

from . import facts
from .budgets import Budgets
from .outlook import look_out
from .ports import why_not_free
from .state import StateDir
from .swarm import Swarm, load_swarm

LOOK_S = 6.0
KEY = "key.pem"


async def check_up(
    socket_path: Path | None, state_dir: Path, listen: Endpoint, bootstrap: Sequence[Endpoint]
) -> list[Finding]:
    """Return how this machine fares with what a daemon with these settings would need. Takes less than ten seconds."""
    found: list[object] = [
        facts.platform(),
        facts.kernel(),
        facts.memory(),
        facts.descriptors(Budgets()),
        *([facts.local_socket(socket_path)] if socket_path is not None else []),
        Ports(str(listen), *why_not_free(listen)),
        await trio.to_thread.run_sync(facts.disk, state_dir, abandon_on_cancel=True),
    ]
    try:
        swarm = _swarm_of(state_dir)
        found.append(_membership(swarm))
    except (Fatal, LocalError) as error:
        found.append(Membership(True, trouble=str(error)))
        return judge(found)
    addresses = [*bootstrap, *swarm.bootstrap()]
    ahead_s: list[tuple[str, float]] = []
    with trio.move_on_after(LOOK_S):
        seen, ahead_s = await look_out(addresses, swarm, swarm, lambda: time.time_ns() // 1_000_000)
        found += seen
    found.append(Clocks(tuple((f"{peer[:8]}..", ahead) for peer, ahead in ahead_s)))
    return judge(found)


def _swarm_of(state_dir: Path) -> Swarm:
    """Return the swarm that a daemon on `state_dir` would be in. Raises Fatal."""
    if (state_dir / KEY).exists():
        return load_swarm(state_dir, StateDir(state_dir).load_key(), time.time, secrets.token_bytes)
    return Swarm(Ed25519PrivateKey.generate(), time.time, secrets.token_bytes, None)


def _membership(swarm: Swarm) -> Membership:
    status = swarm.status()
    trouble = "this machine is revoked in its swarm" if swarm.is_revoked_here() else ""
    return Membership(status["open"], status["name"], status["role"], status["expires_in_s"] or 0.0, trouble)
