"""What a number depends on: the machine, its settings, the versions, and who else used it meanwhile.

All of it is read from /proc, so that nothing has to be installed for it.
"""

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

MIB = 1 << 20
CONGESTION = "/proc/sys/net/ipv4/tcp_congestion_control"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, Any]:
    """Return what a reader must know to compare two runs."""
    congestion = Path(CONGESTION).read_text().strip()
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": next(
            (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "unknown"
        ),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": _meminfo_kib("MemTotal") // 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "tcp_congestion_control": congestion,
        "load_before": os.getloadavg()[0],
        "versions": {name: _version(name) for name in ("mpd", "torch", "numpy", "trio", "kademlia", "cryptography")},
    }


def memory_free_mib() -> int:
    """Return how much memory may be used before the machine starts to swap or kill."""
    return _meminfo_kib("MemAvailable") // 1024


def resident_mib(pid: int) -> float:
    """Return the resident memory (VmRSS) of a process."""
    line = next(line for line in _lines(f"/proc/{pid}/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def peak_mib(pid: int) -> float:
    """Return the most resident memory (VmHWM) that a process has had."""
    line = next(line for line in _lines(f"/proc/{pid}/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def cpu_s(sessions: set[int]) -> float:
    """Return the CPU seconds used so far by all living processes of these sessions."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if int(fields[3]) in sessions:
            total += int(fields[11]) + int(fields[12])  # user and system time
    return total / TICKS_PER_S


def machine_cpu_s() -> float:
    """Return the CPU seconds used so far by everything on the machine."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, _lines("/proc/stat")[0].split()[1:])
    return (user + nice + system + irq + softirq) / TICKS_PER_S


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _meminfo_kib(name: str) -> int:
    return int(next(line for line in _lines("/proc/meminfo") if line.startswith(name + ":")).split()[1])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
