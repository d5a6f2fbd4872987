"""Machines of their own for daemons: network namespaces on one switch, and cuts between them that nobody is told of.

Strategy: every namespace is held open by a `cat` that ends when this process does, however that happens, and everything
else (interfaces, queues, cuts) vanishes with the namespaces; nothing is ever seen in the namespace of the machine. Root
makes them as it is, anybody else inside a user namespace. A bridge in a namespace of its own is the switch.

A packet is lost by giving it the hardware address of nobody: a permanent neighbour entry in the sender's namespace. So
one direction between two hosts can be cut without the other, connections that exist are struck in mid-flight, no
error reaches either end, and all that is needed is `ip`. The daemon's Unix socket is reached through the file system.
"""

import contextlib
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

import pytest

SUBNET = "10.77.0"
_NOBODY = "02:00:00:00:00:01"
_TOOLS = ("ip", "nsenter", "unshare", "cat")
_IN_USER_NAMESPACE = ("--user", "--map-root-user")
_LIMIT_S = 10


class NetnsUnavailable(Exception):
    """This machine allows no network namespaces, and why."""


class Host:
    """One namespace with an interface on the switch. `enter` is what to put in front of a command to run it there."""

    def __init__(self, number: int, holder: "subprocess.Popen[str]", enter: tuple[str, ...]) -> None:
        self.address = f"{SUBNET}.{number}"
        self.port_name = f"v{number}"
        self.holder = holder
        self.enter = enter

    def run(self, *command: str, text: str = "") -> str:
        """Run a command there and return what it prints."""
        return _run(*self.enter, *command, text=text)


class Net:
    """Hosts on one switch, until the block ends. Raises NetnsUnavailable on entering."""

    def __init__(self, n_hosts: int) -> None:
        self.hosts: list[Host] = []
        self._n_hosts = n_hosts
        self.enter: tuple[str, ...] = ()  # what to put in front of a command to run it where the switch is
        self._holders: list[subprocess.Popen[str]] = []
        self._cuts: set[tuple[Host, Host]] = set()

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cut(self, senders: Iterable[Host], receivers: Sequence[Host]) -> None:
        """Lose all packets from each of the `senders` to each of the `receivers`, from now on and without a word."""
        for sender in senders:
            lost = [other for other in receivers if other is not sender]
            sender.run("ip", "-batch", "-", text=_each("replace", lost, f"lladdr {_NOBODY} dev eth0 nud permanent"))
            self._cuts |= {(sender, other) for other in lost}

    def part(self, *sides: Sequence[Host]) -> None:
        """Cut both ways between each two of the `sides`."""
        for side in sides:
            for other in sides:
                if other is not side:
                    self.cut(side, other)

    def heal(self) -> None:
        """Let all packets pass again."""
        for sender in {sender for sender, _ in self._cuts}:
            lost = [other for by, other in self._cuts if by is sender]
            sender.run("ip", "-batch", "-", text=_each("del", lost, "dev eth0"))
        self._cuts.clear()

    def limit(self, host: Host, mbit: float) -> None:
        """Let `host` send and receive no faster than this (token bucket, `tc tbf`)."""
        host.run("tc", "qdisc", "replace", "dev", "eth0", *bucket(mbit))
        self.run("tc", "qdisc", "replace", "dev", host.port_name, *bucket(mbit))

    def resize_packets(self, host: Host, mtu: int, *, singly: bool = True) -> None:
        """Let packets to and from `host` have up to `mtu` bytes.

        `singly`: inside the kernel, too. Else it passes up to 64 KiB as one packet, and a full queue drops it as one.
        """
        settings = ("mtu", str(mtu), *(("gso_max_segs", "1") if singly else ()))
        self.run("ip", "link", "set", host.port_name, *settings)
        host.run("ip", "link", "set", "eth0", *settings)

    def run(self, *command: str) -> str:
        """Run a command in the namespace of the switch and return what it prints."""
        return _run(*self.enter, *command)

    def _make(self) -> None:
        missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
        if missing:
            raise NetnsUnavailable(f"this machine has no {missing[0]}")
        for extra in ((), _IN_USER_NAMESPACE):
            switch, said = self._hold("unshare", *extra, "--net")
            if switch is not None:
                break
        else:
            raise NetnsUnavailable(f"this machine allows no network namespaces: {said}")
        user = ("--user", "--preserve-credentials") if extra else ()
        self.enter = ("nsenter", "--target", str(switch.pid), *user, "--net")
        _run(*self.enter, "ip", "-batch", "-", text="link set lo up\nlink add br0 type bridge\nlink set br0 up\n")
        for number in range(1, self._n_hosts + 1):
            holder, said = self._hold(*self.enter, "unshare", "--net")
            if holder is None:
                raise NetnsUnavailable(f"this machine allows no more network namespaces: {said}")
            host = Host(number, holder, ("nsenter", "--target", str(holder.pid), *user, "--net"))
            ours = (
                f"link add {host.port_name} type veth peer name eth0 netns {holder.pid}\n"
                f"link set {host.port_name} master br0 up\n"
            )
            theirs = (
                f"link set lo up\naddr add {host.address}/24 dev eth0\nlink set eth0 up\nroute add default dev eth0\n"
            )
            _run(*self.enter, "ip", "-batch", "-", text=ours)
            host.run("ip", "-batch", "-", text=theirs)
            self.hosts.append(host)

    def _hold(self, *command: str) -> tuple["subprocess.Popen[str] | None", str]:
        """Return a process that stays in a new namespace until we end, or None and what stood in the way."""
        holder = subprocess.Popen(
            [*command, "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert holder.stdout is not None
        if holder.stdout.readline() == "ready\n":
            self._holders.append(holder)
            return holder, ""
        return None, holder.communicate()[1].strip()

    def close(self) -> None:
        """End everything that was made. Called twice it does nothing more."""
        while self._holders:
            self._holders.pop().communicate()  # it reads the end of its input, and ends


@contextlib.contextmanager
def hosts_or_skip(n_hosts: int) -> Iterator[Net]:
    """Run a block with a `Net`; skip the test, with the reason, where there can be none."""
    net = Net(n_hosts)
    try:
        net.__enter__()
    except NetnsUnavailable as error:
        pytest.skip(str(error))
    with contextlib.closing(net):
        yield net


def bucket(mbit: float) -> tuple[str, ...]:
    """Return the arguments of `tc` for a queue that passes `mbit` Mbit/s and keeps what waits up to 50 ms."""
    return ("root", "tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "50ms")


def _each(verb: str, hosts: Iterable[Host], rest: str) -> str:
    return "".join(f"neigh {verb} {host.address} {rest}\n" for host in hosts)


def _run(*command: str, text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    if done.returncode:
        raise NetnsUnavailable(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
