"""The log: one line an event, news only, and strangers cannot write into it what they like."""

import contextlib
import io
import logging
from collections.abc import Iterator

import pytest

from mpd.daemon.logs import OnChange, setup


@contextlib.contextmanager
def logging_as_the_daemon_does(verbose: bool) -> Iterator[io.StringIO]:
    """Yield a stderr to which a process logs that has just called `setup`."""
    root, asyncio_log = logging.getLogger(), logging.getLogger("asyncio")
    handlers, level, asyncio_level = root.handlers, root.level, asyncio_log.level
    raises = logging.raiseExceptions
    root.handlers = []
    try:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            setup(verbose)
            yield err
    finally:
        logging.raiseExceptions = raises
        root.handlers = handlers
        root.setLevel(level)
        asyncio_log.setLevel(asyncio_level)


def test_a_line_says_when_and_how_bad_and_what() -> None:
    with logging_as_the_daemon_does(verbose=False) as err:
        logging.getLogger("mpd").info("linked to %s", "aaaa")
        logging.getLogger("mpd").debug("a detail")
    assert err.getvalue().endswith(" INFO linked to aaaa\n")
    assert len(err.getvalue().splitlines()) == 1


def test_verbose_says_it_all_but_not_what_asyncio_does() -> None:
    with logging_as_the_daemon_does(verbose=True) as err:
        logging.getLogger("mpd").debug("a detail")
        logging.getLogger("asyncio").debug("using selector")
    assert err.getvalue().endswith(" DEBUG a detail\n")
    assert len(err.getvalue().splitlines()) == 1


def test_what_a_peer_says_stays_on_its_line_and_away_from_the_terminal() -> None:
    with logging_as_the_daemon_does(verbose=False) as err:
        logging.getLogger("mpd").info("it left: %s", "bye\n2026-01-01 00:00:00 ERROR the disk is full\r\x1b[2J")
    assert err.getvalue().endswith("INFO it left: bye?2026-01-01 00:00:00 ERROR the disk is full??[2J\n")
    assert len(err.getvalue().splitlines()) == 1


def test_a_traceback_keeps_its_lines() -> None:
    with logging_as_the_daemon_does(verbose=True) as err:
        try:
            raise ZeroDivisionError("by zero")
        except ZeroDivisionError:
            logging.getLogger("mpd").debug("in full:", exc_info=True)
    lines = err.getvalue().splitlines()
    assert lines[0].endswith("in full:")
    assert lines[1] == "| Traceback (most recent call last):"
    assert lines[-1] == "| ZeroDivisionError: by zero"


def test_what_an_exception_quotes_of_a_peer_begins_no_line_and_commands_no_terminal() -> None:
    with logging_as_the_daemon_does(verbose=False) as err:
        try:
            raise ValueError("it said bye\n2026-01-01 00:00:00 ERROR the disk is full\x1b[2J")
        except ValueError:
            logging.getLogger("mpd").exception("unexpected")
    assert "| 2026-01-01 00:00:00 ERROR the disk is full?[2J" in err.getvalue().splitlines()
    assert all(line.startswith("| ") for line in err.getvalue().splitlines()[1:])


def test_a_line_that_cannot_be_written_is_lost_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with logging_as_the_daemon_does(verbose=False) as err:
        with monkeypatch.context() as patch:
            patch.setattr(err, "flush", lambda: (_ for _ in ()).throw(OSError("No space left on device")))
            logging.getLogger("mpd").info("linked to %s", "aaaa")
        assert "Traceback" not in err.getvalue()


def test_only_news_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = OnChange(logging.getLogger("mpd"), "DHT")
    for sentence in ("", "2 known", "2 known", "3 known", "", "", "3 known", "2 known"):
        found.say(sentence)
    assert caplog.messages == ["DHT: 2 known", "DHT: 3 known", "DHT: 3 known", "DHT: 2 known"]


def test_subjects_do_not_mix(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = logging.getLogger("mpd")
    one, other = OnChange(log, "DHT"), OnChange(log, "disk")
    one.say("fine")
    other.say("fine")
    one.say("fine")
    assert caplog.messages == ["DHT: fine", "disk: fine"]
