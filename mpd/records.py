"""What peers publish in the DHT: small, self-contained values that are only ever hints.

A record says where a peer stands and how to reach it; whether that is still so shows on a link. Values are msgpack of
the dataclasses below and must fit into one datagram together with a few others.
"""

from dataclasses import dataclass

from mpd.errors import PeerError
from mpd.grid import Cell, ShapeRecord
from mpd.ids import Endpoint
from mpd.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Place:
    """A peer takes part in a run with terms `digest`, stands at `cell` for round `number`, and can be dialled there.

    In the roster of a run `cell` is empty, and `epoch` is that of the shape record in which the peer has finished a
    cycle (0: in none). `port` 0: the peer accepts no connections.
    """

    host: str
    port: int
    digest: bytes
    number: int = 0
    cell: Cell = ()
    epoch: int = 0

    def __post_init__(self) -> None:
        if self.port:
            Endpoint(self.host, self.port)
        if len(self.digest) != 32 or not 0 <= self.number < 1 << 62:
            raise ValueError("a digest has 32 bytes and a number is not negative")
        if not 0 <= self.epoch < 2**63:
            raise ValueError("an epoch is not negative")


RECORDS = Vocabulary(PeerError, Place, ShapeRecord)
