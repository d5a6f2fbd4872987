"""What `mpd doctor` makes of the way to the peers and of the daemon; and the table of all its checks.

As with this machine itself (mpd/findings.py), every check is a small judgement of facts that were gathered elsewhere
(daemon/doctor.py, daemon/outlook.py): here nothing is asked of anybody.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mpd.findings import (
    NOT_CHECKED,
    OK,
    PROBLEM,
    WARNING,
    Descriptors,
    Disk,
    Finding,
    Kernel,
    LocalSocket,
    Memory,
    Platform,
    Ports,
    judge_descriptors,
    judge_disk,
    judge_kernel,
    judge_local_socket,
    judge_memory,
    judge_platform,
    judge_ports,
)  # fmt: skip

MAX_CLOCK_ERROR_S = 30.0  # beyond this, daemons do not hear each other
SUSPECT_CLOCK_S = 5.0
SOON_S = 86400.0  # a certificate that ends earlier should have been renewed by now


# ---------------------------------------------------------------------------------------------------------- the swarm


@dataclass(frozen=True, slots=True)
class Membership:
    """Which swarm this machine is in. `trouble` is what its owner should know."""

    is_open: bool
    name: str = ""
    role: str = ""
    expires_in_s: float = 0.0
    trouble: str = ""


def judge_membership(fact: Membership) -> Finding:
    """In a private swarm, certificates live for days and renew themselves."""
    if fact.trouble:
        return Finding("swarm", PROBLEM, fact.trouble, "see `mpd swarm show`; a new invite lets a machine in again")
    if fact.is_open:
        return Finding("swarm", OK, "the open swarm: links are sealed, and anyone who reaches a daemon can take part")
    if fact.expires_in_s <= 0:
        says = f"the certificate for swarm {fact.name} has ended: the others refuse this machine"
        return Finding("swarm", PROBLEM, says, "check this machine's clock; then join again with a new invite")
    if fact.expires_in_s < SOON_S:
        says = f"the certificate for swarm {fact.name} ends in {fact.expires_in_s / 3600:.0f} hours"
        return Finding("swarm", WARNING, says, "keep the daemon running, and an admitter in reach, to renew it")
    days = f"{fact.expires_in_s / 86400:.0f} days"
    return Finding("swarm", OK, f"{fact.role} of {fact.name}; certificate for {days}")


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """One address to find the swarm through: whether a daemon of this swarm answers there by UDP and by TCP.

    `trouble` is why TCP led nowhere. `is_own`: this machine's own daemon answers.
    """

    address: str
    by_udp: bool
    by_tcp: bool
    trouble: str = ""
    is_own: bool = False


def judge_bootstrap(fact: Bootstrap) -> Finding:
    """UDP finds the swarm, TCP carries it; both have to get through."""
    address, port = fact.address, fact.address.rpartition(":")[2]
    if fact.is_own:
        return Finding("bootstrap", OK, f"{address} is this daemon itself")
    if fact.by_udp and fact.by_tcp:
        return Finding("bootstrap", OK, f"{address} answers by TCP and UDP")
    if fact.by_tcp:
        says = f"{address} answers by TCP but not by UDP: the swarm cannot be found through it"
        return Finding("bootstrap", PROBLEM, says, f"open UDP port {port} there, and for answers to this machine")
    if fact.by_udp:
        says = f"{address} answers by UDP but not by TCP: {fact.trouble}"
        return Finding("bootstrap", PROBLEM, says, f"open TCP port {port} there")
    says = f"{address} does not answer: {fact.trouble}"
    advice = f"see that a daemon of this swarm runs there, and that TCP and UDP port {port} are open; check the address"
    return Finding("bootstrap", PROBLEM, says, advice)


@dataclass(frozen=True, slots=True)
class Clocks:
    """By how many seconds the clock of each peer is ahead of this machine's. `complaint` is what the DHT has to say."""

    ahead_s: tuple[tuple[str, float], ...] = ()
    complaint: str = ""


def judge_clocks(fact: Clocks) -> Finding:
    """Whose clock is wrong is a matter of majority."""
    advice = "timedatectl set-ntp true, or run chrony"
    wrong = [(peer, ahead_s) for peer, ahead_s in fact.ahead_s if abs(ahead_s) > SUSPECT_CLOCK_S]
    worst = max((abs(ahead_s) for _, ahead_s in wrong), default=0.0)
    verdict = PROBLEM if worst > MAX_CLOCK_ERROR_S else WARNING
    if len(wrong) > 1 and 2 * len(wrong) > len(fact.ahead_s):
        middle = sorted(ahead_s for _, ahead_s in wrong)[len(wrong) // 2]
        way = "behind" if middle > 0 else "ahead of"
        says = f"this machine's clock is {abs(middle):.0f} s {way} those of {len(wrong)} of {len(fact.ahead_s)} peers"
        return Finding("clock", verdict, says, f"set it: {advice}")
    if wrong:
        peer, ahead_s = max(wrong, key=lambda each: abs(each[1]))
        way = "ahead of" if ahead_s > 0 else "behind"
        says = f"the clock of {peer} is {abs(ahead_s):.0f} s {way} this machine's"
        return Finding("clock", verdict, says, f"set the wrong one: {advice}")
    if fact.complaint:
        return Finding("clock", PROBLEM, fact.complaint, advice)
    if not fact.ahead_s:
        return Finding("clock", NOT_CHECKED, "no other daemon answers whose clock could be compared")
    most = max(abs(ahead_s) for _, ahead_s in fact.ahead_s)
    n_peers = len(fact.ahead_s)
    return Finding("clock", OK, f"agrees with {n_peers} peer{'s' * (n_peers != 1)} within {max(most, 0.1):.1f} s")


@dataclass(frozen=True, slots=True)
class DialBackAnswer:
    """What a peer says that was asked to dial this machine; `reached` is None if it did not answer in time.

    `host` is where it sees this machine.
    """

    peer: str
    host: str
    reached: bool | None


@dataclass(frozen=True, slots=True)
class Reach:
    """How others reach this machine. `announced` is empty for one that accepts no connections.

    `n_called` counts the links that others have made to it.
    """

    announced: str
    answers: tuple[DialBackAnswer, ...] = ()
    n_called: int = 0
    is_loopback: bool = False


def judge_reach(fact: Reach) -> Finding:
    """Peers that can be dialled reduce; the others only send and receive."""
    if not fact.announced:
        return Finding("reachable", OK, "this machine accepts no connections: it dials the others and reduces nothing")
    port = fact.announced.rpartition(":")[2]
    reached = [answer for answer in fact.answers if answer.reached]
    failed = [answer for answer in fact.answers if answer.reached is False]
    remedy = (
        f"open TCP and UDP port {port} in the firewall, or forward it and pass --announce HOST:PORT; "
        "without either: --outbound-only"
    )
    if failed and not reached:
        verdict = WARNING if fact.n_called else PROBLEM
        names = ", ".join(f"{answer.peer} could not dial {_at(answer.host, port)}" for answer in failed[:2])
        more = f"; {fact.n_called} others have called" if fact.n_called else ""
        return Finding("reachable", verdict, f"{names}{more}", remedy)
    if failed:
        says = f"{len(reached)} of {len(reached) + len(failed)} peers could dial back; {failed[0].peer} could not"
        return Finding("reachable", WARNING, says, "see that the way from there is open as well")
    if reached:
        n_peers = f"{len(reached)} peer{'s' * (len(reached) != 1)}"
        if all(_at(answer.host, port) == fact.announced for answer in reached):
            return Finding("reachable", OK, f"{n_peers} dialled back at {fact.announced}")
        says = f"{n_peers} dialled back at {_at(reached[0].host, port)}; announced is {fact.announced}"
        return Finding("reachable", OK, says)
    if fact.n_called:
        return Finding("reachable", OK, f"{fact.n_called} of the links here were made by others")
    if fact.is_loopback:
        says = f"{fact.announced} is announced, which only daemons of this machine can dial"
        return Finding("reachable", WARNING, says, "join with --bootstrap or --announce if others run elsewhere")
    if fact.answers:
        return Finding("reachable", WARNING, "no peer that was asked to dial back answered in time", "try again")
    return Finding("reachable", NOT_CHECKED, "no peer is linked that could dial back: try again once others are here")


@dataclass(frozen=True, slots=True)
class Datagrams:
    """The DHT: how many peers it knows, and how many strangers' requests came without having been asked for."""

    port: int
    n_peers: int
    n_unasked: int
    accepts: bool = True
    problem: str = ""


def judge_datagrams(fact: Datagrams) -> Finding:
    """Answers pass most firewalls; a request that nobody waited for shows that the port is open."""
    if fact.problem:
        return Finding("DHT", PROBLEM, fact.problem, f"see that UDP port {fact.port} is open in both directions")
    if not fact.n_peers:
        return Finding("DHT", NOT_CHECKED, "no other daemon is known yet: join others with --bootstrap, or wait")
    known = f"{fact.n_peers} other daemon{'s' * (fact.n_peers != 1)} known"
    if fact.n_unasked:
        return Finding("DHT", OK, f"{known}; requests from outside arrive at UDP port {fact.port}")
    if not fact.accepts:
        return Finding("DHT", OK, known)
    return Finding("DHT", OK, f"{known}; no request from outside has shown yet that UDP port {fact.port} is open")


# --------------------------------------------------------------------------------------------------------- the daemon


@dataclass(frozen=True, slots=True)
class Pressure:
    """The limits of a daemon that are full or were: name, in use, limit, times refused."""

    budgets: tuple[tuple[str, int, int, int], ...] = ()


def judge_pressure(fact: Pressure) -> Finding:
    """Limits keep others from taking too much; who meets them has been turned away."""
    if not fact.budgets:
        return Finding("limits", OK, "none of the daemon's own limits has been reached")
    name, used, limit, refused = max(fact.budgets, key=lambda each: each[3])
    more = f", and {len(fact.budgets) - 1} more" if len(fact.budgets) > 1 else ""
    says = f"{name.replace('_', ' ')}: {used} of {limit} in use, refused {refused} times{more}"
    return Finding("limits", WARNING, says, "see `mpd status`; somebody asks for more than one daemon gives")


@dataclass(frozen=True, slots=True)
class Rounds:
    """How the last rounds of a run went: how many there were, how many averaged, how many were perfect."""

    run: str
    n_rounds: int
    n_averaged: int
    n_perfect: int
    last_cause: str = ""


def judge_rounds(fact: Rounds) -> Finding:
    """A round that was not perfect now and then is what unreliable machines are; every one is not."""
    if not fact.n_rounds:
        return Finding("rounds", NOT_CHECKED, f"{fact.run}: no round has begun yet")
    says = f"{fact.run}: of the last {fact.n_rounds}, {fact.n_averaged} averaged and {fact.n_perfect} were perfect"
    if 2 * fact.n_averaged < fact.n_rounds:
        return Finding("rounds", WARNING, f"{says}; last: {fact.last_cause}", "see `mpd rounds`")
    if 2 * fact.n_perfect < fact.n_rounds:
        return Finding("rounds", WARNING, f"{says}; last: {fact.last_cause}", "see `mpd rounds`")
    return Finding("rounds", OK, says)


@dataclass(frozen=True, slots=True)
class Presence:
    """Whether a daemon answers at `socket`; `wanted` if the user named that socket. `trouble`: how it failed to."""

    socket: str
    is_there: bool
    wanted: bool = False
    trouble: str = ""
    versions: tuple[str, str] = ("", "")  # of this command and of the daemon


def judge_presence(fact: Presence) -> Finding:
    """Without a daemon only what it would need can be looked at."""
    if not fact.is_there:
        verdict = PROBLEM if fact.wanted or fact.trouble else NOT_CHECKED
        says = fact.trouble or f"no daemon runs at {fact.socket}"
        return Finding("daemon", verdict, says, "start one with `mpd join`" if fact.wanted else "")
    ours, theirs = fact.versions
    if ours != theirs:
        says = f"the daemon at {fact.socket} is mpd {theirs}, this command is mpd {ours}"
        return Finding("daemon", WARNING, says, "restart the daemon: `mpd leave`, then `mpd join`")
    return Finding("daemon", OK, f"mpd {theirs} answers at {fact.socket}")


# ------------------------------------------------------------------------------------------------------ all of it

CHECKS: dict[type, Callable[[Any], Finding]] = {
    Presence: judge_presence,
    Platform: judge_platform,
    LocalSocket: judge_local_socket,
    Disk: judge_disk,
    Descriptors: judge_descriptors,
    Memory: judge_memory,
    Kernel: judge_kernel,
    Membership: judge_membership,
    Ports: judge_ports,
    Bootstrap: judge_bootstrap,
    Datagrams: judge_datagrams,
    Reach: judge_reach,
    Clocks: judge_clocks,
    Pressure: judge_pressure,
    Rounds: judge_rounds,
}


def judge(facts: Iterable[object]) -> list[Finding]:
    """Return what all `facts` come to, in the order of `CHECKS`."""
    order = list(CHECKS)
    return [CHECKS[type(fact)](fact) for fact in sorted(facts, key=lambda fact: order.index(type(fact)))]


def _at(host: str, port: str) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
