"""The processes of `mpd chaos`: daemons and trainers on this machine, and what can be done to them.

Strategy: a machine is a daemon and a trainer that survive each other, as on a real one; its state directory and its
port survive both. Every process is started by way of a few lines that ask the kernel to kill it when we die, however
we die, and that then become the process; and in a process group of its own, so that Ctrl-C reaches us alone. Nothing
here waits, except for a process that has been killed: whoever has a plan must be able to keep it.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from mpd.errors import MpdError

from .chaos_plan import Settings
from .daemon import connect

# PR_SET_PDEATHSIG = 1 outlives exec; if we died before it was set, our child has another parent by now.
_DIE_WITH_US = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
_STEPS_PER_LIFE = 1_000_000  # of a trainer; the next one counts on from there, so that no number comes twice
_LEAVE_S = 30.0

Record = dict[str, Any]


class Machine:
    """Machine number `index`: a daemon with its socket and state under `home`, and its trainer.

    What the trainer tells goes to `records`; `lives` counts the trainers that machines of this number have had.
    """

    def __init__(
        self, index: int, home: Path, settings: Settings, records: "queue.SimpleQueue[Record]", lives: int = 0
    ) -> None:
        self.index = index
        self.socket = home / f"d{index}.sock"
        self.bootstrap: tuple[str, ...] = ()
        self._home = home
        self._settings = settings
        self._records = records
        self._exits: list[tuple[int, bool]] = []
        self._daemon: subprocess.Popen[bytes] | None = None
        self._trainer: subprocess.Popen[bytes] | None = None
        self._lives = lives
        self._wants_end = False

    @property
    def log(self) -> Path:
        """What its daemons have logged."""
        return self._home / f"d{self.index}.log"

    # --------------------------------------------------------------------------------------------------- the daemon

    def start(self) -> None:
        """Start the daemon, unless it runs."""
        if self.is_up():
            return
        options = [f"--bootstrap={address}" for address in self.bootstrap]
        command = ["-m", "mpd.cli", "join", f"--socket={self.socket}", f"--state-dir={self._home / f'd{self.index}'}"]
        with self.log.open("ab") as log:
            self._daemon = _spawn([*command, "--listen=127.0.0.1:0", *options], stdout=log, stderr=log)
        self._wants_end = False

    def is_up(self) -> bool:
        """Return whether the daemon's process is there; how it ended is noted."""
        if self._daemon is not None and (code := self._daemon.poll()) is not None:
            self._exits.append((code, self._wants_end))
            self._daemon = None
        return self._daemon is not None

    def take_exits(self) -> list[tuple[int, bool]]:
        """Return the exit codes of daemons that have ended, and whether we had them end; each once."""
        exits, self._exits = self._exits, []
        return exits

    def listen(self) -> str | None:
        """Return where the daemon listens, None while it does not answer."""
        with contextlib.suppress(MpdError), connect(self.socket) as daemon:
            return str(daemon.status()["listen"])
        return None

    def kill(self) -> None:
        """End the daemon as a power cut would."""
        self._signal(signal.SIGKILL)
        if self._daemon is not None:
            self._daemon.wait()

    def term(self) -> None:
        """Tell the daemon to leave."""
        self._signal(signal.SIGTERM)

    def leave(self) -> None:
        """Have the daemon leave as `mpd leave` does, which takes as long as its round."""
        self._wants_end = True
        threading.Thread(target=self._ask_to_leave, daemon=True).start()

    def freeze(self) -> None:
        """Stop the daemon's process."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self.is_up() and self._daemon is not None:
            self._wants_end |= number in (signal.SIGKILL, signal.SIGTERM)
            self._daemon.send_signal(number)

    def _ask_to_leave(self) -> None:
        with contextlib.suppress(MpdError), connect(self.socket) as daemon:
            daemon.leave(_LEAVE_S)

    # -------------------------------------------------------------------------------------------------- the trainer

    def start_trainer(self) -> None:
        """Start the trainer, which waits for the daemon if need be."""
        chosen = self._settings
        numbers = (self.index, chosen.guest + 1, self._lives * _STEPS_PER_LIFE, chosen.size_bytes)
        seconds = (chosen.train_s, chosen.timeout_s)
        self._trainer = _spawn(
            ["-m", "mpd.client.chaos_trainer", str(self.socket), *map(str, numbers), *map(str, seconds)],
            stdout=subprocess.PIPE,
        )
        self._lives += 1
        threading.Thread(target=self._listen_to, args=(self._trainer,), daemon=True).start()

    def kill_trainer(self) -> None:
        """End the trainer as the kernel would that is short of memory."""
        if self._trainer is not None:
            self._trainer.kill()
            self._trainer.wait()
            self._trainer = None

    def has_lost_trainer(self) -> bool:
        """Return whether the trainer has ended by itself."""
        return self._trainer is not None and self._trainer.poll() is not None

    def _listen_to(self, trainer: "subprocess.Popen[bytes]") -> None:
        assert trainer.stdout is not None
        with trainer.stdout as lines:
            for line in lines:
                if line.endswith(b"\n"):  # else it was killed while it spoke
                    self._records.put(json.loads(line))

    def end(self, patience_s: float) -> None:
        """End both: politely if `patience_s` is long enough."""
        self.kill_trainer()
        if self.is_up() and self._daemon is not None:
            self.thaw()
            self.term()
            try:
                self._daemon.wait(patience_s)
            except subprocess.TimeoutExpired:
                self.kill()
            self.is_up()


def _spawn(arguments: list[str], **streams: Any) -> "subprocess.Popen[bytes]":
    """Start Python with `arguments`, as a process that dies with us."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _DIE_WITH_US, str(os.getpid()), sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        env=_environment(),
        process_group=0,
        **streams,
    )


def _environment() -> dict[str, str]:
    """Return ours, without what would tie these daemons to another swarm."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MPD_")}
    return {**kept, "PYTHONSAFEPATH": "1"}  # a folder called mpd or daemon where we stand is not ours
