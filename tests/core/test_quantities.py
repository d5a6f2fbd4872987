"""What people say about machines: understood as meant, or refused in one sentence that says what was expected."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.errors import LocalError
from mpd.quantities import Distribution, parse_distribution, parse_size, show_size


@pytest.mark.parametrize(
    ("text", "kind", "numbers"),
    [
        ("constant:100", "constant", (100.0,)),
        ("100", "constant", (100.0,)),
        (" uniform:50,500 ", "uniform", (50.0, 500.0)),
        ("lognormal:200,0.8", "lognormal", (200.0, 0.8)),
    ],
)
def test_distributions_are_read(text: str, kind: str, numbers: tuple[float, ...]) -> None:
    found = parse_distribution(text, "bandwidth")
    assert found == Distribution(kind, numbers)
    assert parse_distribution(str(found), "bandwidth") == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("-5", "more than 0"),
        ("0", "more than 0"),
        ("normal:3,4", "no distribution"),
        ("lognormal:200", "2 numbers"),
        ("lognormal:200,a", "2 numbers"),
        ("lognormal:200,nan", "2 numbers"),
        ("lognormal:200,9", "sigma from 0 to 5"),
        ("lognormal:-200,1", "more than 0"),
        ("uniform:9,3", "lower end first"),
        ("uniform:-9,3", "more than 0"),
        ("constant:", "1 numbers"),
        ("", "1 numbers"),
        ("1e999", "1 numbers"),
    ],
)
def test_a_bad_distribution_is_one_clear_sentence(text: str, said: str) -> None:
    with pytest.raises(LocalError) as refused:
        parse_distribution(text, "bandwidth")
    assert said in str(refused.value)
    assert str(refused.value).startswith(f"bandwidth {text!r}")
    assert "\n" not in str(refused.value)


def test_zero_is_a_latency_and_no_bandwidth() -> None:
    assert parse_distribution("0", "latency", zero=True).median == 0


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (lambda: parse_distribution(text, "x"), lambda: parse_size(text)):
        with contextlib.suppress(LocalError):
            read()


def test_draws_have_the_distribution_that_was_asked_for() -> None:
    rng = np.random.default_rng(1)
    many = parse_distribution("lognormal:200,0.8", "x").draw(rng, 20000)
    assert np.median(many) == pytest.approx(200, rel=0.03)
    assert np.std(np.log(many)) == pytest.approx(0.8, rel=0.03)
    flat = parse_distribution("uniform:50,500", "x").draw(rng, 20000)
    assert flat.min() >= 50
    assert flat.max() <= 500
    assert np.median(flat) == pytest.approx(parse_distribution("uniform:50,500", "x").median, rel=0.03)
    assert (parse_distribution("7", "x").draw(rng, 3) == 7).all()


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("400MiB", 400 << 20), ("1.5GiB", 3 << 29), ("64KiB", 65536), ("512B", 512)]
)
def test_sizes_are_read(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["400", "-1MiB", "0B", "MiB", "4TB", "9000000GiB", "4 0MiB"])
def test_a_size_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(LocalError, match="400MiB"):
        parse_size(text)


def test_sizes_are_shown_as_people_read_them() -> None:
    shown = [show_size(n) for n in (12, 65536, 400 << 20, 3 << 29, 1023 << 20)]
    assert shown == ["12 B", "64 KiB", "400 MiB", "1.5 GiB", "1023 MiB"]
