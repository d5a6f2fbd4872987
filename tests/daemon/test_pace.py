"""What people are shown of the deadlines."""

from trio.testing import MockClock

from mpd.daemon.pace import describe
from mpd.deadlines import MIN_SAMPLES, PROGRESS, WINDOW, Pace, SenderReport
from mpd.ids import PeerId, show_peer

A, B = PeerId(b"a" * 20), PeerId(b"b" * 20)


async def test_what_was_learnt_is_shown(autojump_clock: MockClock) -> None:
    pace = Pace()
    assert describe(pace, [A]) == {
        "window_s": WINDOW.first_s,
        "progress_s": PROGRESS.first_s,
        "download": 0,
        "peers": {},
    }
    for at in range(MIN_SAMPLES):
        pace.note_arrivals({A: 2.0, B: 0.0})
        pace.note_round(float(at), {A: SenderReport(4, 4, 1 << 20, 0.5, 0.3, n_members=3)})
    shown = describe(pace, [A, B])
    assert (shown["window_s"], shown["download"]) == (4.0, 4 << 20)
    assert shown["peers"] == {
        show_peer(A): {"window_s": 4.0, "progress_s": 1.2, "upload": 4 << 20},
        show_peer(B): {"window_s": WINDOW.floor_s, "progress_s": PROGRESS.first_s, "upload": 0},
    }
