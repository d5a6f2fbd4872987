"""Errors are told apart by who is to blame: one root, and no kind is a special case of another."""

import itertools

import pytest

from mpd.errors import DaemonUnavailable, Fatal, LocalError, MpdError, PeerError, RoundFailed

KINDS = (LocalError, PeerError, RoundFailed, Fatal, DaemonUnavailable)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_caught_by_the_root_and_keeps_its_sentence(kind: type[MpdError]) -> None:
    with pytest.raises(MpdError, match=r"^the disk is full: make room$"):
        raise kind("the disk is full: make room")


def test_catching_one_kind_never_catches_another() -> None:
    for one, other in itertools.permutations(KINDS, 2):
        assert not issubclass(one, other)


def test_none_is_mistaken_for_an_error_of_python() -> None:
    """`except OSError` or `except ValueError` must not swallow what was decided about blame."""
    for kind in KINDS:
        assert kind.__mro__[1:] == (MpdError, Exception, BaseException, object)
