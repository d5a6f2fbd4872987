"""Each judgement: what is fine, what is a warning, what is a problem; and that whoever has one hears what to do."""

import pytest

from mpd.doctor import (
    CHECKS,
    Bootstrap,
    Clocks,
    Datagrams,
    DialBackAnswer,
    Membership,
    Presence,
    Pressure,
    Reach,
    Rounds,
    judge,
)
from mpd.findings import (
    NOT_CHECKED,
    OK,
    PROBLEM,
    WARNING,
    Descriptors,
    Disk,
    Finding,
    Kernel,
    LocalSocket,
    Memory,
    Platform,
    Ports,
)

GIB = 1 << 30
YES, NO, SILENT = (DialBackAnswer("ab12..", "203.0.113.5", reached) for reached in (True, False, None))
OTHER = DialBackAnswer("cd34..", "198.51.100.9", True)
HERE = "203.0.113.5:4747"

CASES: list[tuple[object, str, str]] = [
    (Platform((3, 11), True), OK, "Python 3.11"),
    (Platform((3, 10), True), PROBLEM, "this is Python 3.10"),
    (Platform((3, 12), False), PROBLEM, "does not tell whose process"),
    (Platform((3, 12), True, "Function not implemented"), PROBLEM, "cannot be shared with trainers: Function not"),
    (Disk("/s", True, "", GIB, True), OK, "/s can be written; 1 GiB are free"),
    (Disk("/s", False, "", GIB, False), OK, "/s is not there yet and can be made"),
    (Disk("/s", True, "Read-only file system", GIB, True), PROBLEM, "/s cannot be written: Read-only file system"),
    (Disk("/s", True, "", GIB, False), WARNING, "others may look into"),
    (Disk("/s", True, "", 5 << 20, True), WARNING, "has 5 MiB left"),
    (Descriptors(4096, 832, 17), OK, "4096 are allowed, 17 in use"),
    (Descriptors(4096, 832), OK, "4096 are allowed"),
    (Descriptors(512, 832), WARNING, "512 open files are allowed, and 832 would be used"),
    (Descriptors(64, 832), PROBLEM, "only 64 open files"),
    (LocalSocket("/r/mpd.sock"), OK, "/r/mpd.sock can be used"),
    (LocalSocket("/r/mpd.sock", "/r is in other users' hands"), PROBLEM, "/r is in other users' hands"),
    (Ports(HERE), OK, "is free for TCP and UDP"),
    (Ports(HERE, tcp="in use"), PROBLEM, "by TCP: in use"),
    (Ports(HERE, udp="in use"), PROBLEM, "by UDP: in use"),
    (Ports(HERE, "in use", "in use"), PROBLEM, "by TCP and UDP: in use"),
    (Kernel(6 << 20, 4 << 20), OK, "may grow to 4 MiB"),
    (Kernel(6 << 20, 1 << 20), WARNING, "stay below 1 MiB"),
    (Kernel(0, 4 << 20), NOT_CHECKED, "not known"),
    (Memory(8 * GIB), OK, "8 GiB are left here"),
    (
        Memory(2 * GIB, 3 * GIB, GIB),
        OK,
        "2 GiB are left of the 3 GiB that its control group may have; the runs here",
    ),
    (Memory(GIB, 3 * GIB, 2 * GIB), WARNING, "1 GiB are left of the 3 GiB"),
    (Memory(1 << 20), WARNING, "1 MiB are left here"),
    (Membership(True), OK, "the open swarm"),
    (Membership(False, "lab", "member", 5 * 86400.0), OK, "member of lab; certificate for 5 days"),
    (Membership(False, "lab", "member", 7200.0), WARNING, "ends in 2 hours"),
    (Membership(False, "lab", "member", -1.0), PROBLEM, "has ended"),
    (Membership(False, "lab", "member", 9e5, "this machine is revoked"), PROBLEM, "this machine is revoked"),
    (Bootstrap(HERE, True, True), OK, "answers by TCP and UDP"),
    (Bootstrap(HERE, True, True, is_own=True), OK, "this daemon itself"),
    (Bootstrap(HERE, False, True), PROBLEM, "by TCP but not by UDP"),
    (Bootstrap(HERE, True, False, "Connection refused"), PROBLEM, "by UDP but not by TCP: Connection refused"),
    (Bootstrap(HERE, False, False, "No route to host"), PROBLEM, f"{HERE} does not answer: No route to host"),
    (Clocks(), NOT_CHECKED, "no other daemon"),
    (Clocks((("ab12..", 0.3), ("cd34..", -0.04))), OK, "agrees with 2 peers within 0.3 s"),
    (Clocks((("ab12..", 0.0),)), OK, "agrees with 1 peer within 0.1 s"),
    (Clocks((("ab12..", 45.0), ("cd34..", 47.0), ("ef..", 0.0))), PROBLEM, "47 s behind those of 2 of 3 peers"),
    (Clocks((("ab12..", -8.0), ("cd34..", -9.0))), WARNING, "8 s ahead of those of 2 of 2"),
    (Clocks((("ab12..", 45.0), ("cd34..", 0.0))), PROBLEM, "the clock of ab12.. is 45 s ahead of this machine's"),
    (Clocks((("ab12..", -7.0),)), WARNING, "the clock of ab12.. is 7 s behind this machine's"),
    (Clocks((), "the clock of 192.0.2.1:4 and this machine's differ by 70 s"), PROBLEM, "differ by 70 s"),
    (Reach(""), OK, "accepts no connections"),
    (Reach(HERE, (YES,)), OK, f"1 peer dialled back at {HERE}"),
    (Reach("lab.example:4747", (YES, OTHER)), OK, f"2 peers dialled back at {HERE}; announced is lab.example:4747"),
    (Reach(HERE, (NO,)), PROBLEM, f"ab12.. could not dial {HERE}"),
    (Reach(HERE, (NO,), n_called=3), WARNING, "; 3 others have called"),
    (Reach(HERE, (NO, OTHER)), WARNING, "1 of 2 peers could dial back; ab12.. could not"),
    (Reach(HERE, (SILENT,)), WARNING, "answered in time"),
    (Reach(HERE, (SILENT,), n_called=2), OK, "2 of the links here were made by others"),
    (Reach(HERE), NOT_CHECKED, "no peer is linked"),
    (Reach("127.0.0.1:4747", is_loopback=True), WARNING, "only daemons of this machine"),
    (Datagrams(4747, 3, 5), OK, "3 other daemons known; requests from outside arrive at UDP port 4747"),
    (Datagrams(4747, 1, 0), OK, "1 other daemon known; no request from outside"),
    (Datagrams(0, 3, 0, accepts=False), OK, "3 other daemons known"),
    (Datagrams(4747, 0, 0), NOT_CHECKED, "no other daemon is known"),
    (Datagrams(4747, 3, 5, problem="known peers not saved"), PROBLEM, "known peers not saved"),
    (Pressure(), OK, "none"),
    (Pressure((("open_links", 9, 9, 4), ("x", 1, 1, 0))), WARNING, "open links: 9 of 9 in use, refused 4 times, and 1"),
    (Rounds("run", 0, 0, 0), NOT_CHECKED, "no round has begun"),
    (Rounds("run", 20, 20, 15), OK, "of the last 20, 20 averaged and 15 were perfect"),
    (Rounds("run", 20, 20, 9, "its link ended"), WARNING, "; last: its link ended"),
    (Rounds("run", 20, 9, 9, "nobody came"), WARNING, "; last: nobody came"),
    (Presence("/r/s", True, versions=("1", "1")), OK, "mpd 1 answers at /r/s"),
    (Presence("/r/s", True, versions=("2", "1")), WARNING, "is mpd 1, this command is mpd 2"),
    (Presence("/r/s", False), NOT_CHECKED, "no daemon runs at /r/s"),
    (Presence("/r/s", False, wanted=True), PROBLEM, "no daemon runs at /r/s"),
    (Presence("", False, trouble="/tmp/mpd-0 must be yours"), PROBLEM, "/tmp/mpd-0 must be yours"),
]


@pytest.mark.parametrize(("fact", "verdict", "words"), CASES)
def test_a_fact_becomes_a_finding(fact: object, verdict: str, words: str) -> None:
    (finding,) = judge([fact])
    assert finding.verdict == verdict
    assert words in finding.says
    assert "\n" not in finding.says
    assert finding.check


def test_every_check_is_judged_above() -> None:
    assert {type(fact) for fact, _, _ in CASES} == set(CHECKS)


def test_whoever_has_a_problem_hears_what_to_do() -> None:
    for fact, verdict, _ in CASES:
        (finding,) = judge([fact])
        assert finding.advice or verdict in (OK, NOT_CHECKED) or isinstance(fact, Presence), finding


def test_findings_come_in_the_order_of_the_checks() -> None:
    checks = [finding.check for finding in judge([Clocks(), Rounds("b", 0, 0, 0), Platform((3, 11), True)])]
    assert checks == ["platform", "clock", "rounds"]
    assert judge([]) == []


def test_an_ipv6_address_is_written_as_one_can_type_it() -> None:
    (finding,) = judge([Reach("[2001:db8::5]:4747", (DialBackAnswer("ab12..", "2001:db8::5", False),))])
    assert finding == Finding("reachable", PROBLEM, "ab12.. could not dial [2001:db8::5]:4747", finding.advice)
