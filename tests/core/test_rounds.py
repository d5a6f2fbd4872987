"""What a round is fixed to be."""

import dataclasses

import pytest
from sim.exchange_net import make_plans

from mpd.rounds import RoundPlan


@pytest.mark.parametrize(("n", "redo", "success"), [(2, 2, 1), (3, 2, 2), (4, 3, 2), (5, 3, 3), (8, 5, 4), (16, 9, 8)])
def test_both_quorums_together_exceed_the_group(n: int, redo: int, success: int) -> None:
    plan = make_plans(n, [0])[0]
    assert (plan.redo_quorum, plan.success_quorum) == (redo, success)
    assert redo + success == n + 1


def test_two_members_that_cannot_be_dialled_have_no_link() -> None:
    plans = make_plans(4, [0], inbound=0b0011)
    assert [plan.linked_from_start() for plan in plans] == [0b1110, 0b1101, 0b0011, 0b0011]


def test_pieces_leave_shard_by_shard_from_the_right_neighbour_on() -> None:
    plan = make_plans(3, [0, 1, 2, 1])[1]
    assert plan.pieces_in_order() == (1, 3, 2, 0)  # its own chunk stays
    assert dataclasses.replace(plan, sending_order=(3, 2, 1, 0)).pieces_in_order() == (3, 2, 1, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_members": 1},
        {"n_members": 65},
        {"me": 3},
        {"owners": ()},
        {"owners": (0, 3)},
        {"inbound": 0b110},
        {"inbound": 0},
        {"senders": 0},
        {"senders": 0b1000},
        {"sending_order": (0, 0)},
        {"progress_s": 0.0},
    ],
)
def test_a_round_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    right = {"n_members": 3, "me": 0, "owners": (0, 1), "inbound": 7, "senders": 7, "deadline": 1.0, "progress_s": 1.0}
    RoundPlan(**right)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"group|members|dialled|chunk|positive"):
        RoundPlan(**{**right, **wrong})  # type: ignore[arg-type]
