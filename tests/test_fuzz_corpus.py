"""What fuzzing has found worth keeping is tried again: it is understood, or its sender is to blame, and nothing else.

The same holds for what hypothesis makes of those inputs, in a few tries here and in more with `make fuzz`.
The inputs in `tests/fuzz/corpus/` were chosen because together they reach what all inputs that were ever found reach,
and every input that once was a finding stays. `tests/fuzz/README.md` tells how they are searched and chosen.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.targets import TARGETS
from hypothesis import given
from hypothesis import strategies as st

CORPUS = Path(__file__).resolve().parent / "fuzz" / "corpus"
MAX_INPUT_BYTES = 2048
MAX_CORPUS_BYTES = 300_000

each_target = pytest.mark.parametrize("name", list(TARGETS))


def kept(name: str) -> Iterator[tuple[str, bytes]]:
    return ((path.name, path.read_bytes()) for path in sorted((CORPUS / name).iterdir()))


@each_target
def test_what_is_valid_is_accepted(name: str) -> None:
    seeds = list(TARGETS[name].seeds())
    assert seeds
    assert all(TARGETS[name].accepts(seed) for seed in seeds)


@each_target
def test_kept_inputs_blame_nobody_but_their_sender(name: str) -> None:
    outcomes = {}
    for file, data in kept(name):
        try:
            outcomes[file] = TARGETS[name].accepts(data)
        except Exception as error:
            error.add_note(f"input: tests/fuzz/corpus/{name}/{file}")
            raise
    assert set(outcomes.values()) == ({True, False} if TARGETS[name].blame else {True})


@st.composite
def gone_wrong(draw: st.DrawFn, name: str) -> bytes:
    """Return a kept input of a target after an accident, two of them run together, or bytes that never were one."""
    inputs = st.sampled_from([data for _, data in kept(name)])
    data = draw(inputs)
    start = draw(st.integers(0, len(data)))
    rest = draw(st.one_of(st.just(data[start + 1 :]), st.just(data[start:]), inputs, st.just(b"")))
    changed = data[:start] + draw(st.binary(max_size=8)) + rest
    return draw(st.sampled_from([changed, changed, draw(st.binary(max_size=200))]))[: TARGETS[name].max_bytes]


@each_target
@given(source=st.data())
def test_other_inputs_blame_nobody_else_either(name: str, source: st.DataObject) -> None:
    TARGETS[name].accepts(source.draw(gone_wrong(name)))


def test_the_kept_inputs_are_small_and_each_has_a_target() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == set(TARGETS)
    sizes = [len(data) for name in TARGETS for _, data in kept(name)]
    assert max(sizes) <= MAX_INPUT_BYTES
    assert sum(sizes) <= MAX_CORPUS_BYTES
