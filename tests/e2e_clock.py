"""A daemon whose clock is wrong: `python e2e_clock.py FILE ARGUMENTS..` is `mpd ARGUMENTS..` with another wall clock.

FILE holds by how many seconds, and may be changed at any time. Only the wall clock moves, as when somebody sets it;
monotonic time goes on. What reads the clock in C (OpenSSL, when it looks at the dates of certificates) still sees the
true one.
"""

import os
import sys
import time
from pathlib import Path

from mpd import cli


def set_wrong(file: Path) -> None:
    """Let `time.time` and `time.time_ns` be wrong from now on."""
    time_s, time_ns = time.time, time.time_ns

    def offset_s() -> float:
        return float(file.read_text(encoding="ascii"))

    time.time = lambda: time_s() + offset_s()
    time.time_ns = lambda: time_ns() + int(offset_s() * 1e9)


if __name__ == "__main__":
    set_wrong(Path(sys.argv[1]))
    sys.argv = [os.fspath(Path(sys.argv[0])), *sys.argv[2:]]
    cli.main()
