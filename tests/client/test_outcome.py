"""How an outcome reads, and that nothing of the daemon's answer is lost on the way into it."""

import dataclasses

import pytest

from mpd.client.outcome import Outcome, outcome_of
from mpd.control import Stepped

STEPPED = Stepped(
    seq=4,
    averaged=True,
    reason="the group was full",
    exact=True,
    heads=5,
    peers=("a", "b", "c"),
    contributors=("a", "b"),
    confirmed=("a",),
    missing={"c": "sent nothing for 2 s"},
    rounds=2,
    seconds=0.25,
    bytes_sent=10,
    bytes_received=20,
    generation=9,
    new_out=True,
)


def test_an_outcome_has_every_field_of_the_answer_that_concerns_a_trainer() -> None:
    outcome = dataclasses.asdict(outcome_of(STEPPED))
    answer = dataclasses.asdict(STEPPED)
    assert set(answer) - set(outcome) == {"seq", "generation", "new_out"}
    assert all(answer[name] == value for name, value in outcome.items())


@pytest.mark.parametrize("averaged", [True, False])
def test_an_outcome_is_true_if_it_averaged(averaged: bool) -> None:
    assert bool(Outcome(averaged=averaged, reason="")) is averaged


def test_an_outcome_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        outcome_of(STEPPED).averaged = False  # type: ignore[misc]


@pytest.mark.parametrize(
    ("outcome", "sentence"),
    [
        (
            outcome_of(STEPPED),
            "exact mean of 5 peers in 0.25 s (the group was full); missing: c (sent nothing for 2 s)",
        ),
        (
            Outcome(averaged=True, reason="the group was full", contributors=("a", "b"), seconds=1.5),
            "mean of 2 peers in 1.50 s (the group was full)",
        ),
        (Outcome(averaged=False, reason="nobody came"), "not averaged, parameters unchanged: nobody came"),
    ],
)
def test_an_outcome_prints_as_one_sentence(outcome: Outcome, sentence: str) -> None:
    assert str(outcome) == sentence
