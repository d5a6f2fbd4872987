"""What the daemon says on stderr: one line per event that a person would want to know, and none per tick."""

import logging
import sys


class _OneLine(logging.Formatter):
    """What peers say is quoted in messages, and must neither begin a new line nor command a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return "".join(c if c.isprintable() else "?" for c in super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        """A traceback keeps its lines, each behind a bar, because an exception may quote a peer too."""
        first, *more = super().format(record).split("\n")
        return "\n".join([first, *("| " + "".join(c if c.isprintable() else "?" for c in line) for line in more)])


def setup(verbose: bool) -> None:
    """Send the log to stderr; with `verbose`, everything."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.raiseExceptions = False  # a line that a full disk does not take is lost, and not worth a traceback
    logging.basicConfig(handlers=[handler], level=logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


class OnChange:
    """Logs a sentence about `subject` whenever it differs from the one before."""

    def __init__(self, logger: logging.Logger, subject: str) -> None:
        self._logger = logger
        self._subject = subject
        self._last = ""

    def say(self, sentence: str) -> None:
        """Log `sentence` if it is news; an empty one is never logged but makes the next one news."""
        if sentence and sentence != self._last:
            self._logger.info("%s: %s", self._subject, sentence)
        self._last = sentence
