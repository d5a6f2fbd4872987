"""What a training process pays for `import mpd.client`, seen by a clean interpreter."""

import json
import subprocess
import sys
import threading

import numpy as np

from mpd.client import Daemon

PROBE = """
import json, sys, threading, time
before = set(sys.modules)
began = time.perf_counter()
import mpd.client
took = time.perf_counter() - began
print(json.dumps({"seconds": took, "threads": threading.active_count(), "loaded": sorted(set(sys.modules) - before)}))
"""
HEAVY = {"trio", "numpy", "torch", "msgspec", "kademlia", "cryptography", "zstandard", "click", "rich"}


def test_the_import_loads_nothing_heavy_and_starts_no_thread() -> None:
    done = subprocess.run([sys.executable, "-I", "-c", PROBE], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    print(f"import mpd.client takes {seen['seconds'] * 1000:.0f} ms")  # noqa: T201
    assert not HEAVY & set(seen["loaded"])
    assert not [name for name in seen["loaded"] if name.startswith("mpd.daemon")]
    assert seen["threads"] == 1


def test_a_step_starts_no_thread(daemon: Daemon) -> None:
    before = threading.active_count()
    with daemon.averager("run", [np.ones(3)]) as averager:
        assert averager.step()
        assert averager.start().wait()
        assert threading.active_count() == before
