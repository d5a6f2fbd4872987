"""Errors, typed by who is to blame, because that decides what happens next.

Whoever catches one of these knows what to do without reading the message: a `LocalError` goes back to the caller, a
`PeerError` costs that peer its place while the round goes on, a `RoundFailed` costs this round, a `Fatal` ends the
process with one sentence. The message is for people: what happened, what was expected, what to do.
"""


class MpdError(Exception):
    """Root of everything that mpd raises on purpose."""


class LocalError(MpdError):
    """The caller on this machine asked for something impossible: a bad argument, other terms, a closed object."""


class PeerError(MpdError):
    """Another peer broke the rules. Drop that peer; the round goes on without it."""


class NotFinite(PeerError):
    """A peer's values hold a NaN or an infinity, which may happen to anybody. They do not count, and the peer stays."""


class RoundFailed(MpdError):
    """This round did not average. The old values stay; the next round may well succeed."""


class Fatal(MpdError):
    """The process cannot go on: a port in use, an unreadable state directory."""


class DaemonUnavailable(MpdError):
    """There is no daemon at that socket, or it went away. Start one, then try again."""
