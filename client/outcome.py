"""What a step did, in terms that a training loop can act on and a person can read."""

from dataclasses import dataclass, field

from mpd.control import Stepped


@dataclass(frozen=True, slots=True)
class Outcome:
    """The honest result of one step. It is true if the step averaged.

    Attributes:
        averaged: The tensors hold an average; if not, they are untouched, and other peers may have averaged without us.
        reason: One sentence.
        exact: It is the certified mean of all `heads` peers of the run.
        heads: Of how many peers it is the mean, where that is known.
        peers: Who was met, in all groups of the step.
        contributors: Whose values are in every part of the result, this peer included.
        confirmed: Who was seen to succeed.
        missing: Who was expected and is not in the result, with the reason.
        rounds: How many rounds the step completed.
        seconds: From the call to the outcome.
        bytes_sent: To other peers.
        bytes_received: From other peers.
    """

    averaged: bool
    reason: str
    exact: bool = False
    heads: int = 0
    peers: tuple[str, ...] = ()
    contributors: tuple[str, ...] = ()
    confirmed: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    seconds: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0

    def __bool__(self) -> bool:
        return self.averaged

    def __str__(self) -> str:
        if not self.averaged:
            return f"not averaged, parameters unchanged: {self.reason}"
        what = f"exact mean of {self.heads} peers" if self.exact else f"mean of {len(self.contributors)} peers"
        text = f"{what} in {self.seconds:.2f} s ({self.reason})"
        if self.missing:
            text += "; missing: " + ", ".join(f"{peer} ({why})" for peer, why in self.missing.items())
        return text


def outcome_of(stepped: Stepped) -> Outcome:
    """Return what the daemon said, without what only the client needs."""
    return Outcome(
        averaged=stepped.averaged,
        reason=stepped.reason,
        exact=stepped.exact,
        heads=stepped.heads,
        peers=stepped.peers,
        contributors=stepped.contributors,
        confirmed=stepped.confirmed,
        missing=stepped.missing,
        rounds=stepped.rounds,
        seconds=stepped.seconds,
        bytes_sent=stepped.bytes_sent,
        bytes_received=stepped.bytes_received,
    )
