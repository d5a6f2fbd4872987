"""What became of a late joiner's wish for the vector of its run."""

from dataclasses import dataclass, field

from mpd.control import StateLoaded


@dataclass(frozen=True, slots=True)
class LoadedState:
    """The honest result of `load_state`. It is true if the tensors hold a state of the run now.

    Attributes:
        loaded: The tensors hold the vector; if not, they are untouched.
        reason: One sentence.
        number: How many rounds lie behind the vector.
        metadata: What the trainers of the run had set as `averager.metadata` for that step.
        sources: The peers that delivered parts of it; empty if this machine's daemon held it all.
        dropped: Who was given up, with the reason: for example because it sent something else than it had offered.
        seconds: From the call to the result.
        bytes_received: Of the vector, from other peers.
    """

    loaded: bool
    reason: str
    number: int = 0
    metadata: bytes = field(default=b"", repr=False)
    sources: tuple[str, ...] = ()
    dropped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    bytes_received: int = 0

    def __bool__(self) -> bool:
        return self.loaded

    def __str__(self) -> str:
        text = f"{self.reason}, in {self.seconds:.2f} s" if self.loaded else f"nothing loaded: {self.reason}"
        if self.dropped:
            text += "; dropped: " + ", ".join(f"{peer} ({why})" for peer, why in self.dropped.items())
        return text


def loaded_state_of(answer: StateLoaded) -> LoadedState:
    """Return what the daemon said, without what only the client needs."""
    return LoadedState(
        loaded=answer.loaded,
        reason=answer.reason,
        number=answer.number,
        metadata=answer.metadata,
        sources=answer.sources,
        dropped=answer.dropped,
        seconds=answer.seconds,
        bytes_received=answer.bytes_received,
    )
