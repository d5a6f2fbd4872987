"""Advice: right where the answer is known, honest where the target is out of reach, and the same for the same seed."""

import math

import pytest

from mpd.advise import OWN, Question, advise, candidates
from mpd.errors import LocalError
from mpd.quantities import parse_distribution

MIB = 1 << 20


def test_a_small_swarm_is_one_group() -> None:
    found = advise(Question(8, 4 * MIB, latency=parse_distribution("0", "x", zero=True)))
    assert found.best.shape == (1,)
    assert found.best.target_rounds == 1
    assert found.best.variance < 1e-20
    assert found.best.target_bytes == pytest.approx(2 * 7 / 8 * 4 * MIB)
    assert found.best.target_s > 2 * 7 / 8 * 4 * MIB / 12.5e6
    assert found.reasons


def test_equal_lines_and_a_large_vector_ask_for_few_rounds() -> None:
    found = advise(Question(1000, 400 * MIB))
    own = [each for each in found.alternatives if each.policy == OWN]
    assert found.best.rounds_per_step == min(each.rounds_per_step for each in own)
    assert found.best.target_s == min(each.target_s for each in own)
    assert found.best.limit in ("uplink", "downlink")
    by_policy = {each.policy: each for each in found.alternatives if each.policy != OWN}
    assert by_policy["random"].target_s > found.best.target_s
    assert by_policy["pairs"].target_s > by_policy["random"].target_s


def test_absence_costs_time_and_is_survived() -> None:
    calm, rough = (advise(Question(200, 64 * MIB, absent=p, seed=2)).best for p in (0.0, 0.05))
    assert rough.target_rounds >= calm.target_rounds
    assert rough.target_s > calm.target_s


def test_the_same_seed_gives_the_same_advice() -> None:
    line = parse_distribution("lognormal:200,0.8", "x")
    question = Question(100, 64 * MIB, download=line, seed=5)
    assert advise(question) == advise(question)
    assert len(set(question.peers().up.tolist())) > 90


def test_upload_and_download_are_one_draw_only_on_symmetrical_lines() -> None:
    line = parse_distribution("uniform:10,20", "x")
    same, other = (Question(50, MIB, upload=line, download=line, same_line=same).peers() for same in (True, False))
    assert (same.up == same.down).all()
    assert (other.up != other.down).any()


def test_a_target_out_of_reach_is_said() -> None:
    with pytest.raises(LocalError, match="within 60 rounds"):
        advise(Question(20, MIB, absent=0.97, target=1e-30))


@pytest.mark.parametrize(
    "wrong",
    [{"n_peers": 1}, {"n_peers": 10**7}, {"vector_bytes": 0}, {"target": 0.0}, {"target": 2.0}, {"absent": 1.0}],
)
def test_nonsense_is_refused_in_one_sentence(wrong: dict[str, float]) -> None:
    with pytest.raises(LocalError, match="expected"):
        Question(**{"n_peers": 10, "vector_bytes": MIB, **wrong})  # type: ignore[arg-type]


def test_every_grid_is_looked_at_once() -> None:
    assert [size for policy, size in candidates(5) if policy == OWN] == [4]
    assert math.prod(len(list(candidates(n))) for n in (5, 50, 5000)) > 0
