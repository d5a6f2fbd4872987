"""Pictures of simulations: the same result is the same file."""

from pathlib import Path

from mpd.plots import COLOURS, plot_results
from mpd.simulate import COMPARED, POLICIES, Settings, simulate


def test_the_same_results_are_the_same_file(tmp_path: Path) -> None:
    results = [simulate(Settings(32, policy, group_size=4, rounds=6, repeat=2)) for policy in ("moshpit", "gossip")]
    for suffix in (".svg", ".png", ".pdf"):
        first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
        plot_results(results, first, "32 peers")
        plot_results(results, second, "32 peers")
        assert first.read_bytes() == second.read_bytes()
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "<!-- moshpit -->" in text
    assert "<!-- theory -->" in text


def test_every_policy_has_a_colour_of_its_own() -> None:
    assert set(COLOURS) == set(POLICIES) >= set(COMPARED)
    assert len(set(COLOURS.values())) == len(COLOURS)
