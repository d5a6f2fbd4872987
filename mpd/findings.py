"""What a check of `mpd doctor` has found, and what it finds on this machine itself: facts in, findings out.

A finding is a sentence and, where something is wrong, what to do about it. A *problem* keeps this machine from taking
part, or makes its rounds fail; a *warning* costs something or will; what could not be looked at is *not checked*. The
facts are gathered elsewhere (daemon/facts.py): here nothing is asked of anybody.
"""

from dataclasses import dataclass

OK, WARNING, PROBLEM, NOT_CHECKED = "ok", "warning", "problem", "not checked"

MIN_FREE_BYTES = 64 << 20  # of the disk with the state directory: it needs little, but a full disk keeps nothing
MIN_TCP_BUFFER_BYTES = 4 << 20  # what a gigabit link over 30 ms needs on its way


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check has found. `verdict` is OK, WARNING, PROBLEM or NOT_CHECKED; `advice` says what to do."""

    check: str
    verdict: str
    says: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Platform:
    """What the system offers. `sealing` says why memory cannot be shared safely, or nothing."""

    python: tuple[int, int]
    knows_processes: bool  # the kernel tells who is at the other end of a local socket
    sealing: str = ""


def judge_platform(fact: Platform) -> Finding:
    """A daemon shares sealed memory with its trainers, and lets in processes of its own user only."""
    version = ".".join(map(str, fact.python))
    if fact.python < (3, 11):
        return Finding("platform", PROBLEM, f"this is Python {version}", "install Python 3.11 or later")
    if not fact.knows_processes:
        says = "this system does not tell whose process is at the other end of a local socket"
        return Finding("platform", PROBLEM, says, "run mpd on Linux 5.1 or later")
    if fact.sealing:
        says = f"memory cannot be shared with trainers: {fact.sealing}"
        return Finding("platform", PROBLEM, says, "run mpd on Linux 5.1 or later, and allow memfd_create")
    return Finding("platform", OK, f"Python {version}; memory can be shared and sealed")


@dataclass(frozen=True, slots=True)
class Disk:
    """The state directory. `trouble` says why nothing can be written there, or nothing."""

    path: str
    exists: bool
    trouble: str
    free_bytes: int
    is_private: bool


def judge_disk(fact: Disk) -> Finding:
    """The state directory holds the key, the swarm and the known peers."""
    other = "or choose another with --state-dir"
    if fact.trouble:
        says = f"the state directory {fact.path} cannot be written: {fact.trouble}"
        return Finding("disk", PROBLEM, says, f"make room or make it writable, {other}")
    if fact.exists and not fact.is_private:
        says = f"others may look into the state directory {fact.path}, where this machine's key is"
        return Finding("disk", WARNING, says, f"chmod 700 {fact.path}")
    if fact.free_bytes < MIN_FREE_BYTES:
        says = f"the disk of the state directory {fact.path} has {_in_bytes(fact.free_bytes)} left"
        return Finding("disk", WARNING, says, f"make room, {other}")
    does = "can be written" if fact.exists else "is not there yet and can be made"
    return Finding("disk", OK, f"the state directory {fact.path} {does}; {_in_bytes(fact.free_bytes)} are free")


@dataclass(frozen=True, slots=True)
class Descriptors:
    """Open files and sockets: how many the daemon gets, and how many its limits on peers and trainers add up to."""

    limit: int
    needed: int
    used: int = 0


def judge_descriptors(fact: Descriptors) -> Finding:
    """Every link and every trainer takes a few files and sockets."""
    advice = f"allow {fact.needed} (ulimit -n {fact.needed}, or LimitNOFILE={fact.needed} in the unit of systemd)"
    if fact.limit < fact.needed // 4:
        says = f"only {fact.limit} open files are allowed: a few peers and trainers fit"
        return Finding("open files", PROBLEM, says, advice)
    if fact.limit < fact.needed:
        says = f"{fact.limit} open files are allowed, and {fact.needed} would be used with every place taken"
        return Finding("open files", WARNING, says, advice)
    in_use = f", {fact.used} in use" if fact.used else ""
    return Finding("open files", OK, f"{fact.limit} are allowed{in_use}")


@dataclass(frozen=True, slots=True)
class LocalSocket:
    """The socket for trainers. `trouble` says why a daemon cannot make it, or nothing; it may hold the remedy."""

    path: str
    trouble: str = ""


def judge_local_socket(fact: LocalSocket) -> Finding:
    """Trainers find the daemon at a socket in a folder that is its user's alone."""
    if fact.trouble:
        return Finding("local socket", PROBLEM, fact.trouble, "choose another with --socket, or make the folder yours")
    return Finding("local socket", OK, f"{fact.path} can be used")


@dataclass(frozen=True, slots=True)
class Ports:
    """Whether a daemon could listen at `listen`: why not, by TCP and by UDP."""

    listen: str
    tcp: str = ""
    udp: str = ""


def judge_ports(fact: Ports) -> Finding:
    """One number is needed for both TCP and UDP."""
    if not fact.tcp and not fact.udp:
        return Finding("ports", OK, f"{fact.listen} is free for TCP and UDP")
    which = "TCP and UDP" if fact.tcp and fact.udp else "TCP" if fact.tcp else "UDP"
    says = f"a daemon cannot listen on {fact.listen} by {which}: {fact.tcp or fact.udp}"
    port = fact.listen.rpartition(":")[2]
    advice = f"see what uses it (ss -lntup 'sport = :{port}'), or choose another with --listen"
    return Finding("ports", PROBLEM, says, advice)


@dataclass(frozen=True, slots=True)
class Kernel:
    """How large the kernel lets a TCP buffer grow, for receiving and sending; 0: not known."""

    receive_bytes: int = 0
    send_bytes: int = 0


def judge_kernel(fact: Kernel) -> Finding:
    """Small buffers slow down links that are both fast and long."""
    if not fact.receive_bytes or not fact.send_bytes:
        return Finding("kernel", NOT_CHECKED, "it is not known how large TCP buffers may become here")
    if min(fact.receive_bytes, fact.send_bytes) < MIN_TCP_BUFFER_BYTES:
        says = f"TCP buffers stay below {_in_bytes(min(fact.receive_bytes, fact.send_bytes))}: far peers will be slow"
        advice = "sysctl -w net.ipv4.tcp_rmem='4096 131072 6291456' net.ipv4.tcp_wmem='4096 16384 4194304'"
        return Finding("kernel", WARNING, says, advice)
    return Finding("kernel", OK, f"TCP buffers may grow to {_in_bytes(min(fact.receive_bytes, fact.send_bytes))}")


@dataclass(frozen=True, slots=True)
class Memory:
    """What this machine, or the control group that the process is in, has left for runs."""

    available_bytes: int
    limit_bytes: int = 0  # of the control group; 0: none
    held_bytes: int = 0  # by the vectors of the runs here


def judge_memory(fact: Memory) -> Finding:
    """A run takes two to four times its vector, as shared memory; trainers count into the same limit."""
    where = f"of the {_in_bytes(fact.limit_bytes)} that its control group may have" if fact.limit_bytes else "here"
    held = f"; the runs here hold vectors of {_in_bytes(fact.held_bytes)}" if fact.held_bytes else ""
    says = f"{_in_bytes(fact.available_bytes)} are left {where}{held}"
    if fact.available_bytes < max(fact.held_bytes, MIN_FREE_BYTES):
        return Finding("memory", WARNING, says, "raise the limit or run fewer things: another run may not fit")
    return Finding("memory", OK, says)


def _in_bytes(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"
