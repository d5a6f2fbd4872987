"""Machines of a private swarm on a clock of their own: state directories, keys and certificates, and no network."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mpd.daemon.admission import Applicant
from mpd.daemon.state import make_state_dir, own_id
from mpd.daemon.swarm import Swarm, load_swarm
from mpd.daemon.swarm_owner import InviteTerms, create_swarm, make_invite, revoke
from mpd.daemon.swarm_store import SwarmNews, SwarmStore
from mpd.ids import Endpoint, PeerId

START_S = 1_800_000_000.0
HOUR_S, DAY_S = 3600.0, 86400.0
NOWHERE = Endpoint("192.0.2.1", 4747)


class Clock:
    """Seconds since 1970; they pass when a test says so, and with trio's clock once `run` was called."""

    def __init__(self, start_s: float) -> None:
        self.now_s = start_s
        self._began: float | None = None

    def run(self) -> None:
        self._began = trio.current_time()

    def __call__(self) -> float:
        return self.now_s + (0.0 if self._began is None else trio.current_time() - self._began)


class Machine:
    """One state directory and its key."""

    def __init__(self, path: Path, clock: Clock, seed: int) -> None:
        self.path = path
        self.clock = clock
        self.random_bytes = random.Random(seed).randbytes
        self.key: Ed25519PrivateKey = make_state_dir(path).load_key()
        self.own: PeerId = own_id(self.key)
        self.public = self.key.public_key().public_bytes_raw()
        self.store = SwarmStore(path)
        self.applicant = Applicant(self.key, clock, self.random_bytes)

    def create(self, name: str = "lab") -> "Machine":
        """Make a swarm of which this machine is the owner."""
        create_swarm(self.store, self.key, name, self.clock(), self.random_bytes)
        return self

    def load(self) -> Swarm:
        """Return the swarm as a daemon started now would see it."""
        return load_swarm(self.path, self.key, self.clock, self.random_bytes)

    def revoke(self, peer: PeerId) -> bool:
        return revoke(self.store, self.key, peer, self.clock(), self.random_bytes)

    def invite(
        self, *addresses: Endpoint, life_s: float = DAY_S, role: str = "member", uses: int = 1, **more: Any
    ) -> str:
        """Return the token of an invite."""
        terms = InviteTerms(role, uses, life_s, **more)
        return make_invite(self.load(), self.key, terms, addresses or (NOWHERE,), self.random_bytes(16), self.clock())


class World:
    """All machines of a test, on one clock."""

    def __init__(self, folder: Path, start_s: float = START_S) -> None:
        self.folder = folder
        self.clock = Clock(start_s)
        self._n = 0

    def machine(self) -> Machine:
        self._n += 1
        return Machine(self.folder / f"machine {self._n}", self.clock, self._n)

    def owner(self, name: str = "lab") -> Machine:
        return self.machine().create(name)

    def member(self, of: Machine, role: str = "member", news: SwarmNews | None = None) -> Machine:
        """Return a machine that `of` has let in, without a network."""
        machine, swarm = self.machine(), of.load()
        chain = swarm.issue(machine.public, role)
        if role == "admitter":
            admitter = swarm.issue_admitter(machine.public)
            chain = (machine.applicant.sign_leaf(admitter, swarm.swarm_id), admitter)
        machine.store.found(swarm.root, chain, news or of.store.news(), {of.own: (NOWHERE,)})
        return machine


def fill_disk(patch: pytest.MonkeyPatch) -> None:
    """From now on there is no room left: files cannot be made complete."""

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", fail)


async def at_once(fn: Callable[..., Any], *args: Any) -> Any:
    """Stand in for a thread: on a mock clock, time would fly while it works."""
    return fn(*args)
