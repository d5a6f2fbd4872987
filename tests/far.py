"""Distance between network namespaces: every packet from one host to another is held back, and some are lost.

netem does this in the kernel where there is one. Here every host gets a second interface, a TUN device that ends in
one process: it reads whole IP packets and writes each to the device of its receiver once its time has come. So TCP
meets a real round trip, with its windows, its slow start and its losses, which no relay of byte streams would show.
What a host sends is limited by a token bucket in its own kernel, as on a near link (netns.Net.limit); what it receives
is limited here, by a queue that drops what would wait for longer than `QUEUE_S`.

Packets are larger than on an Ethernet, `MTU` bytes, because a Python process passes some ten thousand a second.
"""

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from netns import Host, Net, NetnsUnavailable, bucket

SUBNET = "10.78.0"
MTU = 9000
QUEUE_S = 0.05
BURST_S = 0.002  # a receiver's queue may run ahead of the clock by this much, as a token bucket does
_TUN = "/dev/net/tun"
_SET_TUN = 0x400454CA  # TUNSETIFF
_FLAGS = 0x0001 | 0x1000  # IFF_TUN | IFF_NO_PI: IP packets and nothing around them
_QUEUE_PACKETS = "10000"


class Far:
    """A second network of the hosts of `net`, `rtt_s` apart, until the block ends. Raises NetnsUnavailable.

    Args:
        mbits: what each host may send and receive, in Mbit/s; 0: as much as it can.
        loss: probability with which a packet vanishes.
    """

    def __init__(self, net: Net, rtt_s: float, mbits: Sequence[float] = (), loss: float = 0.0) -> None:
        self._net = net
        self._mbits = list(mbits) or [0.0] * len(net.hosts)
        self._arguments = [str(rtt_s / 2), str(loss), *map(str, self._mbits)]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if not Path(_TUN).exists():
            raise NetnsUnavailable(f"this machine has no {_TUN}")
        command = [*self._net.enter, sys.executable, __file__, *self._arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise NetnsUnavailable(f"there can be no TUN devices: {self._process.communicate()[1].strip()[-200:]}")
        for number, (host, mbit) in enumerate(zip(self._net.hosts, self._mbits, strict=True), 1):
            self._net.run("ip", "link", "set", f"far{number}", "netns", str(host.holder.pid))
            host.run(
                "ip",
                "-batch",
                "-",
                text=f"link set far{number} mtu {MTU} txqueuelen {_QUEUE_PACKETS} up\n"
                f"addr add {self.address(host)}/24 dev far{number}\n",
            )
            if mbit:
                host.run("tc", "qdisc", "replace", "dev", f"far{number}", *bucket(mbit))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.communicate()  # it reads the end of its input, and ends

    def address(self, host: Host) -> str:
        """Return the address of `host` in this network."""
        return f"{SUBNET}.{host.address.rpartition('.')[2]}"


class Carrier:
    """Passes packets on: `devices[i]` is that of host i + 1."""

    def __init__(self, devices: Sequence[int], delay_s: float, loss: float, mbits: Sequence[float]) -> None:
        self._devices = devices
        self._delay_s = delay_s
        self._loss = loss
        self._bytes_per_s = [mbit * 1e6 / 8 for mbit in mbits]
        self._free_at = [0.0] * len(devices)  # when a receiver's link has passed all that waits for it
        self._rng = random.Random(1)
        self._under_way: list[tuple[float, int, int, bytes]] = []
        self._n = 0

    def take(self, now: float, packet: bytes) -> None:
        """A packet has left its sender."""
        receiver = packet[19] - 1 if len(packet) >= 20 and packet[0] >> 4 == 4 else -1
        if not 0 <= receiver < len(self._devices) or self._rng.random() < self._loss:
            return
        due = now + self._delay_s
        if rate := self._bytes_per_s[receiver]:
            free_at = max(self._free_at[receiver], due - BURST_S)
            if free_at - due > QUEUE_S:
                return
            self._free_at[receiver] = free_at + len(packet) / rate
            due = max(due, self._free_at[receiver])
        self._n += 1
        heapq.heappush(self._under_way, (due, self._n, receiver, packet))

    def deliver(self, now: float) -> float | None:
        """Hand over what is due; return when the next packet is."""
        while self._under_way and self._under_way[0][0] <= now:
            _, _, receiver, packet = heapq.heappop(self._under_way)
            try:
                os.write(self._devices[receiver], packet)
            except OSError:  # that interface is down, or not there any more
                continue
        return self._under_way[0][0] if self._under_way else None


def carry(devices: Sequence[int], carrier: Carrier) -> None:
    """Pass packets on until standard input ends."""
    with select.epoll() as epoll:
        for device in (*devices, sys.stdin.fileno()):
            epoll.register(device, select.EPOLLIN)
        while True:
            due = carrier.deliver(time.monotonic())
            for device, _ in epoll.poll(-1 if due is None else max(0.0, due - time.monotonic())):
                if device == sys.stdin.fileno():
                    return
                for _ in range(32):
                    try:
                        packet = os.read(device, 65536)
                    except BlockingIOError:
                        break
                    carrier.take(time.monotonic(), packet)


def main() -> None:
    delay_s, loss, *mbits = map(float, sys.argv[1:])
    devices = []
    for number in range(1, len(mbits) + 1):
        device = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, _SET_TUN, struct.pack("16sH22x", f"far{number}".encode(), _FLAGS))
        devices.append(device)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    carry(devices, Carrier(devices, delay_s, loss, mbits))


if __name__ == "__main__":
    main()
