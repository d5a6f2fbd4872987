"""What people see: tables with everything that is known, sentences where nothing is, and no trick of a stranger's."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from mpd.show import show_peers, show_rounds, show_status

ALICE, BOB, CAROL = "a" * 32, "b" * 32, "c" * 32
HOSTILE = "[bold]x[/] [link=file:///]y :fire: \x1b[2J\r\n\x07 \u202e [/no]"
SHOWN = "[bold]x[/] [link=file:///]y :fire: ?[2J??? ? [/no]"

RUN: dict[str, Any] = {
    "name": "my-run", "shape": [3, 4], "key": [1, 2], "phase": 0, "peers": 12, "trainers": 2, "rounds": 7,
    "bytes": 64 << 20, "tensors": 3, "state": "waiting for 3 of 4 peers", "other_terms": {}, "absent": {},
    "last_imperfect": None,
    "elastic": {"epoch": 2, "n_peers": 13, "heads": 13, "certified": True, "next": None, "written": 0,
                "says": "the shape fits 13 peers; with 1 fewer it would not"},
}  # fmt: skip
STATUS: dict[str, Any] = {
    "peer_id": ALICE, "listen": "192.0.2.7:4747", "announce": "192.0.2.7:4747", "reachable": True, "links": 2,
    "suites": ["aes-256-gcm"], "dht": {"peers": 2, "bootstrap": [], "problem": ""}, "runs": [], "problem": "",
    "version": "0.1.0", "uptime_s": 3723.4,
    "swarm": {"name": "lab", "id": CAROL, "open": False, "role": "member", "expires_in_s": 5 * 86400 + 7},
    "budgets": {"open_links": {"limit": 256, "used": 2, "peak": 3, "refused": 0}},
}  # fmt: skip
ROUND: dict[str, Any] = {
    "run": "my-run", "number": 3, "round_id": "00" * 16, "averaged": True, "group": [ALICE, BOB, CAROL],
    "contributors": [ALICE, BOB], "missing": {CAROL: "its link ended"}, "seconds": 0.0514, "bytes_sent": 1000,
    "bytes_received": 5000, "reason": "one is missing", "at": 1_700_000_000.0, "perfect": False, "notes": [],
    "times": 1,
}  # fmt: skip
PEER: dict[str, Any] = {
    "peer": BOB, "address": "192.0.2.8:4747", "goodput": 3.5 * 2**20, "bytes_sent": 0, "bytes_received": 3 << 30,
    "rounds": 1,
}  # fmt: skip


def asking(address: str, state: str) -> dict[str, Any]:
    """Return the `dht` part of a status with one bootstrap address."""
    return {"peers": 0, "bootstrap": [{"address": address, "state": state}], "problem": ""}


def printed(show: Any, answer: Any, width: int = 160, terminal: bool = False) -> str:
    out = io.StringIO()
    show(answer, Console(width=width, file=out, force_terminal=terminal))
    return out.getvalue()


def lines_of(text: str) -> list[str]:
    """Return what is printed, without the time of day, which depends on where this runs."""
    return [re.sub(r"\d\d:\d\d:20", "00:00:20", line.rstrip()) for line in text.splitlines()]


def test_a_quiet_daemon_says_how_to_go_on() -> None:
    lines = [line.rstrip() for line in printed(show_status, STATUS).splitlines()]
    assert lines == [
        f"peer        {ALICE}",
        "listens on  192.0.2.7:4747",
        f"swarm       lab ({CAROL}), as member; certificate for 5 days",
        "others      2 daemons known",
        "links       2 open, sealed with aes-256-gcm",
        "up          1 h 2 min, mpd 0.1.0",
        "",
        "No trainer is attached. In a training script: mpd.client.connect().averager(...)",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"announce": None, "reachable": False}, "192.0.2.7:4747 (outbound only)"),
        ({"reachable": False}, "192.0.2.7:4747, not yet known to be reachable"),
        ({"listen": "0.0.0.0:4747"}, "0.0.0.0:4747, announced as 192.0.2.7:4747"),
        ({"listen": "[fe80::1]:4747", "announce": "[fe80::1]:4747"}, "listens on  [fe80::1]:4747 "),
        ({"dht": {"peers": 0, "bootstrap": [], "problem": ""}}, "others      none known yet"),
        ({"dht": {"peers": 1, "bootstrap": [], "problem": ""}}, "others      1 daemon known"),
        ({"dht": asking("[fe80::2]:1", "no answer")}, "bootstrap   [fe80::2]:1: no answer"),
        ({"dht": {"peers": 0, "bootstrap": [], "problem": "the clock is off"}}, "problem     the clock is off"),
        ({"problem": "the disk is full"}, "problem     the disk is full"),
        ({"suites": ["none"]}, "2 open, tensors in the clear"),
        ({"swarm": {"open": True}}, "open: anyone who reaches a daemon of it can take part"),
        ({"budgets": {"a_b": {"limit": 9, "used": 3, "peak": 9, "refused": 4}}}, "a b: 3 of 9 in use, refused 4 times"),
        ({"budgets": {"links": {"limit": 9, "used": 9, "peak": 9, "refused": 0}}}, "limit       links: 9 of 9 in use"),
        ({"uptime_s": 59.9}, "59 s, mpd"),
        ({"uptime_s": 61}, "1 min 1 s, mpd"),
    ],
)  # fmt: skip
def test_status_says_what_matters(change: dict[str, Any], words: str) -> None:
    assert words in printed(show_status, STATUS | change)


def test_runs_come_with_what_they_do_and_what_went_wrong() -> None:
    shapeless = {"epoch": 0, "n_peers": 0, "next": None, "says": "the run has no shape yet"}
    young = RUN | {"name": "young", "shape": [], "key": [], "bytes": 12, "state": "looking for other peers of this run"}
    young |= {"elastic": shapeless}
    run = RUN | {
        "other_terms": {BOB: "group_size is 16 here, 8 there"},
        "absent": {CAROL: "left: its daemon was told to leave"},
        "last_imperfect": ROUND,
    }
    text = printed(show_status, STATUS | {"runs": [run, young]})
    assert lines_of(text)[-12:] == [
        "run         size  shape  key  peers  trainers  rounds",
        "my-run  64.0 MiB  3x4    1,2     12         2       7",
        "          now               waiting for 3 of 4 peers",
        "          shape             number 2, made for 13 peers; the shape fits 13 peers; with 1 fewer it would not",
        "          terms             bbbbbbbb uses other terms: group_size is 16 here, 8 there",
        "          absent            cccccccc: left: its daemon was told to leave",
        "          last not perfect  00:00:20, averaged 2 of 3",
        "            why             one is missing",
        "            cccccccc        its link ended",
        "young       12 B  -      -       12         2       7",
        "          now    looking for other peers of this run",
        "          shape  the run has no shape yet",
    ]


def test_a_run_says_which_shape_comes_next() -> None:
    changing = RUN | {"elastic": RUN["elastic"] | {"next": [3, 3, 3]}}
    text = printed(show_status, STATUS | {"runs": [changing]})
    assert "shape  number 2, made for 13 peers; 3x3x3 comes next" in text


PERFECT = ROUND | {"reason": "", "contributors": [ALICE, BOB, CAROL], "missing": {}, "perfect": True}
REDONE = PERFECT | {"perfect": False, "notes": ["2 of 8 chunks of cccccccc.. were reduced again by others"]}
ALONE = ROUND | {
    "averaged": False, "group": [], "contributors": [], "reason": "nobody had joined", "times": 12,
    "missing": {BOB: "cannot be reached", "trainer gpu 1": "had not asked"},
}  # fmt: skip


def test_a_round_that_was_not_perfect_says_why() -> None:
    assert lines_of(printed(show_rounds, [PERFECT, ROUND, REDONE, ALONE])) == [
        "at        run     averaged  seconds    sent  received  group",
        "00:00:20  my-run  3 of 3      0.051  1000 B   4.9 KiB  aaaaaaaa bbbbbbbb cccccccc",
        "00:00:20  my-run  2 of 3      0.051  1000 B   4.9 KiB  aaaaaaaa bbbbbbbb cccccccc",
        "          why       one is missing",
        "          cccccccc  its link ended",
        "00:00:20  my-run  3 of 3      0.051  1000 B   4.9 KiB  aaaaaaaa bbbbbbbb cccccccc",
        "          note  2 of 8 chunks of cccccccc.. were reduced again by others",
        "00:00:20  my-run  no          0.051  1000 B   4.9 KiB  -",
        "          why            nobody had joined (12 times)",
        "          bbbbbbbb       cannot be reached",
        "          trainer gpu 1  had not asked",
    ]


def test_where_a_group_has_no_room_in_the_line_it_stands_below_once() -> None:
    why = "its link ended 1.3 s into the round: nothing was heard from it for 0.6 s"
    assert lines_of(printed(show_rounds, [PERFECT, PERFECT, ROUND | {"reason": "", "missing": {CAROL: why}}], 80)) == [
        "at        run     averaged  seconds    sent  received",
        "00:00:20  my-run  3 of 3      0.051  1000 B   4.9 KiB",
        "          group  aaaaaaaa bbbbbbbb cccccccc",
        "00:00:20  my-run  3 of 3      0.051  1000 B   4.9 KiB",
        "00:00:20  my-run  2 of 3      0.051  1000 B   4.9 KiB",
        "          cccccccc  its link ended 1.3 s into the round: nothing was heard from",
        "                    it for 0.6 s",
    ]


def test_a_long_name_of_a_run_leaves_room_for_the_rest() -> None:
    text = printed(show_rounds, [ROUND | {"run": "x" * 256}], 80)
    assert "  " + "x" * 23 + "\u2026  2 of 3 " in text


def test_peers_are_a_table() -> None:
    silent = PEER | {"address": "outbound only", "goodput": 0.0}
    rows = [line.strip("│┃").replace("┃", "│") for line in printed(show_peers, [PEER, silent]).splitlines()]
    assert [[cell.strip() for cell in row.split("│")] for row in rows if "│" in row] == [
        ["peer", "address", "goodput", "sent", "received", "in rounds"],
        [BOB, "192.0.2.8:4747", "3.5 MiB/s", "0 B", "3.0 GiB", "1"],
        [BOB, "outbound only", "-", "0 B", "3.0 GiB", "1"],
    ]


def test_nothing_is_said_in_words() -> None:
    assert printed(show_rounds, []) == "No round has begun yet.\n"
    assert printed(show_peers, []) == "No link is open. Links open when peers meet in a run.\n"


@pytest.mark.parametrize(
    ("show", "answer"),
    [
        (show_status, STATUS | {"problem": HOSTILE}),
        (show_status, STATUS | {"dht": asking("a:1", HOSTILE)}),
        (show_status, STATUS | {"dht": {"peers": 0, "bootstrap": [], "problem": HOSTILE}}),
        (show_status, STATUS | {"runs": [RUN | {"state": HOSTILE}]}),
        (show_status, STATUS | {"runs": [RUN | {"other_terms": {BOB: HOSTILE}}]}),
        (show_rounds, [ROUND | {"reason": HOSTILE}]),
        (show_rounds, [ROUND | {"missing": {CAROL: HOSTILE}}]),
        (show_rounds, [ROUND | {"missing": {f"trainer {HOSTILE}": "late"}}]),
        (show_rounds, [ROUND | {"notes": [HOSTILE]}]),
        (show_status, STATUS | {"runs": [RUN | {"absent": {BOB: HOSTILE}}]}),
        (show_status, STATUS | {"runs": [RUN | {"last_imperfect": ROUND | {"reason": HOSTILE}}]}),
        (show_peers, [PEER | {"address": HOSTILE}]),
    ],
)  # fmt: skip
def test_what_strangers_write_is_only_text(show: Any, answer: Any) -> None:
    assert SHOWN in printed(show, answer, width=300)
    on_a_terminal = printed(show, answer, width=300, terminal=True)
    assert SHOWN in on_a_terminal
    assert "\x1b[2J" not in on_a_terminal


def test_what_strangers_call_their_run_is_only_text() -> None:
    for show, answer in (
        (show_rounds, [ROUND | {"run": HOSTILE[:20]}]),
        (show_status, STATUS | {"runs": [RUN | {"name": HOSTILE[:20]}]}),
    ):
        assert HOSTILE[:20] in printed(show, answer, width=300)
        assert "\x1b[2J" not in printed(show, answer, width=300, terminal=True)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    for show, answer in (
        (show_status, STATUS | {"runs": [RUN | {"last_imperfect": ROUND}]}),
        (show_rounds, [ROUND, ALONE]),
        (show_peers, [PEER]),
    ):
        assert all(len(line) <= width for line in printed(show, answer, width).splitlines())
