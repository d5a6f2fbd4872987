"""What became of the rounds of one run, as `mpd rounds` tells it: one record each, and a cause for whatever is missing.

A round is perfect if it averaged, everybody of its line stands in every chunk of it, and nothing had to be done twice.
Any other has one sentence for each peer (or trainer of this machine) that is missing, told as it was seen from here,
and a note for each thing that went otherwise than planned. Steps in which no group began are recorded as well, with an
empty group; the same one again, as when a trainer is alone for an hour, only counts up `times`.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpd.ids import PeerId, show_peer
from mpd.matchmaking import Begun
from mpd.reduce import members_of
from mpd.roll import name

from .handshake import printable
from .sessions import RoundResult, RoundSession

HISTORY_ROUNDS = 1000
_USUAL_OF = 32  # rounds that tell how long one usually takes
_MIN_USUAL_OF = 5
_LATE = 3.0  # times as long as usual is late,
_LATE_BY_S = 0.5  # if it is noticeable

Record = dict[str, Any]


class History:
    """The last records of a run, oldest first. `wall` returns seconds since 1970."""

    def __init__(self, run: str, wall: Callable[[], float] = time.time) -> None:
        self.records: deque[Record] = deque(maxlen=HISTORY_ROUNDS)
        self.last_imperfect: Record | None = None
        self.n_added = 0
        self._run = run
        self._wall = wall
        self._usual: deque[float] = deque(maxlen=_USUAL_OF)

    def add_round(self, session: RoundSession, result: RoundResult, absent: Mapping[str, str]) -> None:
        """A round has ended. `absent` are those that were not in its group, and why."""
        names = [show_peer(peer) for peer in session.members]
        missing = {**absent, **{names[place]: why for place, why in result.missing.items()}}
        notes = [*result.notes, *self._lateness(session, result)]
        if result.success:
            self._usual.append(result.seconds)
        self._add(
            {
                "run": self._run,
                "number": session.begin.number,
                "epoch": session.begin.epoch,
                "round_id": session.round_id.hex(),
                "averaged": result.success,
                "perfect": result.success and not missing and not notes,
                "group": names,
                "contributors": [names[place] for place in members_of(result.contributors)],
                "missing": missing,
                "notes": notes,
                "seconds": round(result.seconds, 6),
                "bytes_sent": result.bytes_sent,
                "bytes_received": result.bytes_received,
                "reason": result.reason,
                "times": 1,
                "at": self._wall(),
            }
        )

    def add_step(self, number: int, epoch: int, reason: str, missing: Mapping[str, str], seconds: float) -> None:
        """A step has ended before a group began."""
        self._add(
            {
                "run": self._run,
                "number": number,
                "epoch": epoch,
                "round_id": "",
                "averaged": False,
                "perfect": False,
                "group": [],
                "contributors": [],
                "missing": dict(missing),
                "notes": [],
                "seconds": round(seconds, 6),
                "bytes_sent": 0,
                "bytes_received": 0,
                "reason": reason,
                "times": 1,
                "at": self._wall(),
            }
        )

    def _add(self, record: Record) -> None:
        self.n_added += 1
        if not record["perfect"]:
            self.last_imperfect = record
        last = self.records[-1] if self.records else None
        if last is not None and _is_the_same_again(last, record):
            record["times"] += self.records.pop()["times"]
        self.records.append(record)

    def _lateness(self, session: RoundSession, result: RoundResult) -> list[str]:
        """Return a note if the round took much longer than those before it."""
        if not result.success or len(self._usual) < _MIN_USUAL_OF:
            return []
        usual_s = statistics.median(self._usual)
        if result.seconds < max(_LATE * usual_s, usual_s + _LATE_BY_S):
            return []
        note = f"ended late, after {result.seconds:.1f} s; a round of this run usually takes {usual_s:.2f} s"
        if result.last_delivery is not None:
            place, after_s = result.last_delivery
            note += f"; {name(session.members[place])} was the last to deliver, after {after_s:.1f} s"
        return [note]


def left_out(begun: Begun, overlooked: Sequence[PeerId]) -> dict[str, str]:
    """Return who is not in a group that has begun, and why: the leader's reasons, and whom only we knew to be there."""
    absent = {}
    for peer in overlooked:
        absent[show_peer(peer)] = "was announced here, and the leader of the group began without it"
    for member, why in begun.begin.left_out.items():
        absent[show_peer(PeerId(member))] = why if begun.leader else f"the leader left it out: {printable(why)}"
    return absent


def _is_the_same_again(one: Record, other: Record) -> bool:
    of_no_interest = ("at", "times", "seconds")
    return not one["group"] and all(one[key] == other[key] for key in one if key not in of_no_interest)
