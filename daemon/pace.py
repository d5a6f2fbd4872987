"""What a run's deadlines (mpd/deadlines.py) look like to people."""

from collections.abc import Iterable
from typing import Any

import trio

from mpd.deadlines import Pace
from mpd.ids import PeerId, show_peer


def describe(pace: Pace, company: Iterable[PeerId]) -> dict[str, Any]:
    """Return what was learnt, for `mpd status --json`: seconds, and bytes per second (0: not known)."""
    now, company = trio.current_time(), list(company)
    return {
        "window_s": round(pace.window_s(company), 3),
        "progress_s": round(pace.progress_s(company), 3),
        "download": round(pace.download(now)),
        "peers": {
            show_peer(peer): {
                "window_s": round(pace.window_s([peer]), 3),
                "progress_s": round(pace.progress_s([peer]), 3),
                "upload": round(pace.upload(now, peer)),
            }
            for peer in pace.peers()
        },
    }
