"""What comes back is the weighted mean, of exactly those who took part, for the bytes that a butterfly costs.

Strategy: eleven daemons for the whole module; a test uses the first few of them and a run of its own. Expected means
are computed here in float64. "To rounding" means a few units in the last place of what was summed: members of
different groups may round differently, members of one group hold the same bytes.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from e2e_swarm import (
    Array,
    DaemonProcess,
    Swarm,
    averagers,
    eventually,
    moved_bytes,
    new_run,
    step_all,
    wait_for_company,
    wait_for_moved_bytes,
)

N_DAEMONS = 11
N_ELEMS = 10_007  # a prime: no shard and no chunk ends where another one does
FLOAT32_ROUNDING = 8 * 2.0**-24  # of values up to 1
MIB = 1 << 20


@pytest.fixture(scope="module")
def daemons(swarm: Swarm) -> list[DaemonProcess]:
    return swarm.grow(N_DAEMONS)


def random_vectors(n: int, seed: int = 0, dtype: str = "float32") -> list[Array]:
    rng = np.random.default_rng((n, seed))
    return [rng.uniform(-1, 1, N_ELEMS).astype(dtype) for _ in range(n)]


def weighted_mean(vectors: Sequence[Array], weights: Sequence[float]) -> Array:
    return np.average([vector.astype(np.float64) for vector in vectors], axis=0, weights=weights)


# ------------------------------------------------------------------------------------------------------- how many peers


@pytest.mark.parametrize("n", [5, 8, 9, 11])
def test_a_grid_gives_every_peer_the_exact_mean(daemons: list[DaemonProcess], n: int) -> None:
    """With groups of 3, more than 5 peers sit on a grid and need two rounds for it."""
    run, vectors = new_run(), random_vectors(n)
    with averagers(daemons[:n], run, vectors, group_size=3, rounds="exact") as attached:
        for step, weights in enumerate([[1.0] * n, [1.0 + i * i for i in range(n)]]):
            for vector, fresh in zip(vectors, random_vectors(n, seed=step), strict=True):
                vector[:] = fresh
            expected = weighted_mean(vectors, weights)
            outcomes = step_all(attached, weights)
            assert [(o.averaged, o.exact, o.heads) for o in outcomes] == [(True, True, n)] * n, outcomes
            for vector in vectors:
                np.testing.assert_allclose(vector, expected, rtol=0, atol=FLOAT32_ROUNDING)


@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_one_group_gives_every_peer_the_same_bytes(daemons: list[DaemonProcess], n: int) -> None:
    vectors, weights = random_vectors(n), [1.0 + i for i in range(n)]
    expected = weighted_mean(vectors, weights)
    with averagers(daemons[:n], new_run(), vectors) as attached:
        outcomes = step_all(attached, weights)
    peers = {daemon.peer for daemon in daemons[:n]}
    for vector, outcome in zip(vectors, outcomes, strict=True):
        assert (outcome.averaged, outcome.exact, outcome.heads) == (True, True, n), outcome
        assert set(outcome.contributors) == set(outcome.peers) == peers
        assert set(outcome.confirmed) <= peers
        assert outcome.missing == {}
        assert outcome.rounds == 1
        assert vector.tobytes() == vectors[0].tobytes()
        np.testing.assert_allclose(vector, expected, rtol=0, atol=FLOAT32_ROUNDING)


def test_the_trainers_of_one_daemon_are_one_peer_with_their_weights_summed(daemons: list[DaemonProcess]) -> None:
    run, vectors, weights = new_run(), random_vectors(4), [1.0, 2.0, 3.0, 4.0]
    expected = weighted_mean(vectors, weights)
    first, second = daemons[:2]
    with averagers([first, first, first, second], run, vectors) as attached:
        outcomes = step_all(attached, weights)
        status = first.run_status(run)
    assert status is not None
    assert (status["trainers"], status["peers"]) == (3, 2)
    for vector, outcome in zip(vectors, outcomes, strict=True):
        assert outcome.averaged, outcome
        assert set(outcome.contributors) == {first.peer, second.peer}
        assert outcome.heads == 2
        np.testing.assert_allclose(vector, expected, rtol=0, atol=FLOAT32_ROUNDING)


# -------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(("dtype", "rounding"), [("float16", 2.0**-11), ("float32", 2.0**-23), ("float64", 2.0**-51)])
def test_every_numpy_dtype_is_averaged_to_its_own_rounding(
    daemons: list[DaemonProcess], dtype: str, rounding: float
) -> None:
    vectors, weights = random_vectors(3, dtype=dtype), [1.0, 2.0, 4.0]
    expected = weighted_mean(vectors, weights)
    with averagers(daemons[:3], new_run(), vectors) as attached:
        outcomes = step_all(attached, weights)
    assert all(outcomes), outcomes
    for vector in vectors:
        assert vector.dtype == dtype
        np.testing.assert_allclose(vector.astype(np.float64), expected, rtol=0, atol=rounding)


def test_bfloat16_tensors_are_averaged_to_their_rounding(daemons: list[DaemonProcess]) -> None:
    tensors = [torch.from_numpy(vector).to(torch.bfloat16) for vector in random_vectors(3)]
    weights = [1.0, 2.0, 4.0]
    expected = weighted_mean([tensor.to(torch.float64).numpy() for tensor in tensors], weights)
    with averagers(daemons[:3], new_run(), [{"x": tensor} for tensor in tensors]) as attached:
        outcomes = step_all(attached, weights)
    assert all(outcomes), outcomes
    for tensor in tensors:
        np.testing.assert_allclose(tensor.to(torch.float64).numpy(), expected, rtol=0, atol=2.0**-8)


def test_a_mixture_with_an_empty_tensor_and_a_scalar(daemons: list[DaemonProcess]) -> None:
    def tensors(value: float) -> dict[str, Array]:
        return {
            "weight": np.full((5, 7), value, np.float32),
            "empty": np.zeros((0, 3), np.float16),
            "scale": np.array(value, np.float64),
        }

    own = [tensors(2.0**i) for i in range(3)]
    with averagers(daemons[:3], new_run(), own) as attached:
        outcomes = step_all(attached)
    assert all(outcomes), outcomes
    for each in own:
        np.testing.assert_allclose(each["weight"], np.full((5, 7), 7 / 3), rtol=2.0**-23)
        np.testing.assert_allclose(each["scale"], 7 / 3, rtol=2.0**-51)
        assert each["empty"].shape == (0, 3)


@pytest.mark.parametrize(("codec", "rounding", "part"), [("float16", 2.0**-10, 0.51), ("zstd", FLOAT32_ROUNDING, 0.1)])
def test_codecs_save_bytes_and_cost_no_more_than_their_rounding(
    daemons: list[DaemonProcess], codec: str, rounding: float, part: float
) -> None:
    vectors, weights = [np.repeat(vector[:1000], 1000) for vector in random_vectors(4)], [1.0, 2.0, 3.0, 4.0]
    expected = weighted_mean(vectors, weights)
    with averagers(daemons[:4], new_run(), vectors, codec=codec) as attached:
        outcomes = step_all(attached, weights)
    for vector, outcome in zip(vectors, outcomes, strict=True):
        assert outcome.averaged, outcome
        assert outcome.bytes_received < part * 2 * (1 - 1 / 4) * vector.nbytes
        assert vector.tobytes() == vectors[0].tobytes()
        np.testing.assert_allclose(vector, expected, rtol=0, atol=rounding)


# ---------------------------------------------------------------------------------------------------- bytes on the wire


@pytest.mark.parametrize("n_bytes", [MIB, 4 * MIB], ids=["1 MiB", "4 MiB"])
@pytest.mark.parametrize("n", [2, 7])
def test_a_round_costs_the_bytes_of_a_butterfly(daemons: list[DaemonProcess], n: int, n_bytes: int) -> None:
    """Each member sends, and receives, the n - 1 shards of others and its own one n - 1 times.

    A member may succeed while the last results that it owes to others are still under way: its outcome counts them
    already, its links a little later.
    """
    run, vectors = new_run(), [np.full(n_bytes // 4, 2.0**i, np.float32) for i in range(n)]
    expected = 2 * (1 - 1 / n) * n_bytes
    with averagers(daemons[:n], run, vectors) as attached:
        wait_for_company(daemons[:n], run)
        before = [moved_bytes(daemon) for daemon in daemons[:n]]
        outcomes = step_all(attached)
        for outcome, daemon, moved in zip(outcomes, daemons, before, strict=False):
            assert len(outcome.contributors) == n, outcome
            assert outcome.bytes_received == pytest.approx(expected, rel=0.02)
            assert outcome.bytes_sent == pytest.approx(expected, rel=0.02)
            wait_for_moved_bytes(daemon, moved + 1.98 * expected)
    for daemon, moved in zip(daemons, before, strict=False):
        assert moved_bytes(daemon) - moved == pytest.approx(2 * expected, rel=0.02)


# ------------------------------------------------------------------------------------------------------- who meets whom


def test_two_runs_on_the_same_daemons_never_mix(daemons: list[DaemonProcess]) -> None:
    ones = [np.full(N_ELEMS, 1.0 + i, np.float32) for i in range(4)]
    thousands = [np.full(N_ELEMS, 1000.0 * (1 + i), np.float32) for i in range(4)]
    with (
        averagers(daemons[:4], new_run(), ones) as few,
        averagers(daemons[:4], new_run(), thousands) as many,
    ):
        for _ in range(5):
            outcomes = step_all([*few, *many])
            assert all(len(outcome.contributors) == 4 for outcome in outcomes), outcomes
            for one, thousand in zip(ones, thousands, strict=True):
                assert (one.min(), one.max()) == (2.5, 2.5)
                assert (thousand.min(), thousand.max()) == (2500.0, 2500.0)
            for i in range(4):
                ones[i][:], thousands[i][:] = 1.0 + i, 1000.0 * (1 + i)


def test_two_layouts_under_one_name_never_meet_and_both_sides_are_told(daemons: list[DaemonProcess]) -> None:
    here = {"first": np.zeros(4, np.float32), "second": np.ones((2, 3), np.float32)}
    there = {"first": np.zeros(4, np.float32), "second": np.full((3, 2), 9.0, np.float32)}
    run = new_run()
    with averagers(daemons[:2], run, [here, there]) as attached:
        outcomes = step_all(attached, timeout=2.0)
    for mine, theirs, outcome in zip(daemons[:2], daemons[1::-1], outcomes, strict=True):
        assert not outcome.averaged, (mine.name, outcome)
        assert "'second'" in outcome.reason
        assert "'second'" in outcome.missing[theirs.peer]
    assert "float32[2, 3] here, float32[3, 2] there" in outcomes[0].reason
    assert "float32[3, 2] here, float32[2, 3] there" in outcomes[1].reason
    assert (here["second"] == 1).all()
    assert (there["second"] == 9).all()


def test_peers_with_one_layout_meet_although_others_use_their_name_for_another(daemons: list[DaemonProcess]) -> None:
    run = new_run()
    vectors = [{"x": np.full(10 + i // 2, 2.0**i)} for i in range(4)]
    with averagers(daemons[:4], run, vectors) as attached:
        outcomes = step_all(attached)
        eventually(lambda: all(names_x_as_different(daemon, run) for daemon in daemons[:4]), "all are told")
    for i, outcome in enumerate(outcomes):
        assert set(outcome.contributors) == {daemons[i & 2].peer, daemons[i & 2 | 1].peer}, outcome
        assert (vectors[i]["x"] == (1.5, 6.0)[i // 2]).all()


def names_x_as_different(daemon: DaemonProcess, run: str) -> bool:
    status = daemon.run_status(run)
    return status is not None and any("'x'" in difference for difference in status["other_terms"].values())


# ------------------------------------------------------------------------------------------ while the trainer trains on


def test_what_was_trained_during_a_background_step_survives(daemons: list[DaemonProcess]) -> None:
    mine, other = np.full(N_ELEMS, 1.0, np.float32), np.full(N_ELEMS, 3.0, np.float32)
    with averagers(daemons[:2], new_run(), [mine, other]) as (background, foreground):
        pending = background.start(timeout=20.0)
        mine += 0.25
        assert foreground.step(timeout=20.0).averaged
        mine += 0.5
        outcome = pending.wait()
        assert outcome.averaged, outcome
        assert pending.wait() is outcome
    assert (other == 2.0).all()
    assert (mine == 2.75).all()


def test_adopted_parameters_are_averaged_in_place(daemons: list[DaemonProcess]) -> None:
    models = [torch.nn.Linear(64, 64) for _ in range(2)]
    for i, model in enumerate(models):
        torch.nn.init.constant_(model.weight, 2.0**i)
        torch.nn.init.constant_(model.bias, 0.0)
    tensors = [dict(model.named_parameters()) for model in models]
    with averagers(daemons[:2], new_run(), tensors, adopt=True) as attached:
        assert all(step_all(attached))
        assert all((model.weight == 1.5).all() for model in models)
        with torch.no_grad():
            models[0].weight += 1.0
        assert all(step_all(attached))
        assert all((model.weight == 2.0).all() for model in models)
        pending = attached[0].start(timeout=20.0)
        with torch.no_grad():
            models[0].weight += 8.0
        assert attached[1].step(timeout=20.0).averaged
        assert pending.wait().averaged
        assert (models[0].weight == 10.0).all()
        assert (models[1].weight == 2.0).all()
    with torch.no_grad():
        models[0].weight += 1.0  # what was adopted outlives the averager
    assert (models[0].weight == 11.0).all()
