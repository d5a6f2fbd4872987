"""Who is remembered in which slot, and for how long."""

from mpd.daemon.company import MAX_HEARD, Company
from mpd.ids import PeerId
from mpd.messages import Here

HERE, THERE, ELSEWHERE = b"h" * 20, b"t" * 20, b"e" * 20


def peer(index: int) -> PeerId:
    return PeerId(index.to_bytes(20, "big"))


def said(slot: bytes, number: int = 5) -> Here:
    return Here("run", slot, number, ready=False, stamp=0)


def company(*gone: PeerId) -> Company:
    made = Company(lambda who: who not in gone)
    made.dwell([HERE, THERE])
    return made


def test_those_of_the_last_round_are_the_mates_of_the_next_if_they_are_linked() -> None:
    ours = company(peer(3))
    assert not ours.has_met(HERE)
    ours.began(HERE, 4, [peer(2), peer(1), peer(3)])
    assert ours.has_met(HERE)
    assert ours.mates(HERE) == [peer(1), peer(2)]
    assert ours.mates(THERE) == []
    ours.began(HERE, 6, [peer(2)])
    assert ours.mates(HERE) == [peer(2)]
    ours.began(ELSEWHERE, 7, [peer(5)])
    assert ours.mates(ELSEWHERE) == []
    assert not ours.has_met(ELSEWHERE)


def test_whoever_moves_forgets_the_lines_it_has_left() -> None:
    ours = company()
    ours.began(HERE, 4, [peer(1)])
    ours.began(THERE, 5, [peer(2)])
    ours.sought = {HERE: 1.0, THERE: 2.0}
    ours.dwell([THERE, ELSEWHERE])
    assert set(ours.slots) == {THERE, ELSEWHERE}
    assert (ours.mates(THERE), ours.sought) == ([peer(2)], {THERE: 2.0})
    ours.dwell([HERE, THERE])
    assert ours.mates(HERE) == []
    assert not ours.has_met(HERE)


def test_what_is_said_of_a_round_to_come_is_kept_until_its_turn() -> None:
    ours = company()
    ours.began(HERE, 4, [])
    assert ours.is_early(said(HERE, 6))
    assert not ours.is_early(said(HERE, 4))
    assert ours.is_early(said(THERE, 0))
    assert not ours.is_early(said(ELSEWHERE, 6))
    ours.hear(peer(1), said(THERE))
    ours.hear(peer(1), said(HERE, 6))  # it is in one slot at a time
    ours.hear(peer(2), said(HERE, 6))
    ours.hear(peer(3), said(HERE, 6))
    ours.hear(peer(4), said(ELSEWHERE))  # of a shape that is to come
    ours.quit(peer(2), HERE)
    ours.quit(peer(3), THERE)
    ours.lose(peer(3))
    assert ours.take(HERE) == [(peer(1), said(HERE, 6))]
    assert ours.take(HERE) == []
    assert ours.mates(HERE) == [peer(1), peer(2), peer(3)]  # they may come back
    assert ours.mates(THERE) == [peer(1)]
    assert ours.take(ELSEWHERE) == [(peer(4), said(ELSEWHERE))]


def test_whoever_is_expected_is_a_mate_of_ours_only() -> None:
    ours = company()
    ours.expect(peer(1), THERE)
    ours.expect(peer(1), ELSEWHERE)
    assert ours.mates(THERE) == [peer(1)]
    assert ours.mates(ELSEWHERE) == []


def test_a_roster_tells_who_will_be_there_until_we_move() -> None:
    ours = company()
    ours.expect(peer(1), HERE)
    assert not ours.has_met(HERE)
    ours.foresee()
    ours.dwell([HERE, THERE])
    assert ours.has_met(HERE)
    assert ours.has_met(THERE)
    assert not ours.has_met(ELSEWHERE)
    ours.dwell([HERE, ELSEWHERE])
    assert not ours.has_met(HERE)
    assert not ours.has_met(ELSEWHERE)


def test_nobody_fills_the_memory() -> None:
    ours = company()
    for index in range(MAX_HEARD + 10):
        ours.hear(peer(index), said(ELSEWHERE))
    ours.hear(peer(0), said(THERE))
    assert len(ours.take(ELSEWHERE)) == MAX_HEARD - 1
    assert ours.take(THERE) == [(peer(0), said(THERE))]
