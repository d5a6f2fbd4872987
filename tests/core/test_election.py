"""Whose state a joiner takes: votes first, then rounds; and one peer never outvotes two."""

import dataclasses
import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mpd.election import Offer, elect
from mpd.ids import PeerId

OLD, NEW = Offer(b"o" * 32, b"o" * 16, 4), Offer(b"n" * 32, b"n" * 16, 5)


def peer(number: int) -> PeerId:
    return PeerId(bytes([number]) * 20)


def offers(*made: Offer) -> dict[PeerId, Offer]:
    return {peer(i): offer for i, offer in enumerate(made)}


def test_nobody_offers_nothing() -> None:
    assert elect({}) is None


def test_most_peers_win_over_more_rounds() -> None:
    choice = elect(offers(NEW, OLD, OLD))
    assert choice is not None
    assert (choice.manifest, choice.round_id, choice.number) == (OLD.manifest, OLD.round_id, 4)
    assert (choice.holders, choice.n_offers) == ((peer(1), peer(2)), 3)


def test_of_equally_many_the_newest_wins() -> None:
    for made in ((NEW, OLD), (OLD, NEW), (OLD, NEW, NEW, OLD)):
        choice = elect(offers(*made))
        assert choice is not None
        assert choice.number == 5


def test_a_false_number_makes_a_group_of_its_own() -> None:
    liar = dataclasses.replace(OLD, number=1 << 60)
    choice = elect(offers(liar, OLD, OLD))
    assert choice is not None
    assert choice.number == 4
    assert peer(0) not in choice.holders


def test_metadata_are_those_of_most_holders_and_split_nobody() -> None:
    def labelled(metadata: bytes, offer: Offer = OLD) -> Offer:
        return dataclasses.replace(offer, metadata=metadata)

    choice = elect(offers(labelled(b"lie"), labelled(b"truth"), labelled(b"truth"), labelled(b"lie", NEW)))
    assert choice is not None
    assert choice.metadata == b"truth"
    assert len(choice.holders) == 3
    tied = elect(offers(labelled(b"b"), labelled(b"a")))
    assert tied is not None
    assert tied.metadata == b"b"  # of the smaller id


MADE = st.builds(Offer, st.sampled_from([b"a", b"b"]), st.sampled_from([b"x", b"y"]), st.integers(0, 3))


@given(st.lists(MADE, min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_everybody_elects_the_same_and_nobody_with_more_votes_loses(made: list[Offer], rng: random.Random) -> None:
    cast = offers(*made)
    shuffled = list(cast.items())
    rng.shuffle(shuffled)
    choice = elect(cast)
    assert choice is not None
    assert choice == elect(dict(shuffled))
    assert len(choice.holders) == max(Counter(made).values())
