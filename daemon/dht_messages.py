"""What DHT nodes say to each other. The types are the gate: what does not decode into one of them is no message.

A datagram is one byte (0 request, 1 reply), 20 bytes that tie a reply to its request, and msgpack, as in rpcudp. A
request is an array that starts with its name, so the union `Request` is the list of all that can be asked. Each reply
starts with the id of who replies, which shows when another node has taken over an address.

No datagram exceeds `MAX_DATAGRAM_BYTES`, so none is fragmented on the way. Records are therefore handed out in pages,
in the order of their publishers: a page starts behind the publisher `after`, and a reader that has turned all pages
holds the set whose digest the first one gave.
"""

import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from mpd.ids import PEER_ID_BYTES

from .dht_records import WireRecord, digest_of

MAX_DATAGRAM_BYTES = 1400
MAX_NODES = 16  # that a reply may name; with IPv6 addresses they just fit
NODES_WITH_RECORDS = 8  # that a page names beside its records, as far as there is room
REQUEST, REPLY = b"\x00", b"\x01"
MESSAGE_ID_BYTES = 20
HEADER_BYTES = 1 + MESSAGE_ID_BYTES

_RECORD_FIXED_BYTES = 40  # a record's msgpack beside its value, at most
_NODE_FIXED_BYTES = 28  # a node's msgpack beside its host, at most
_PAGE_FIXED_BYTES = 63  # header and fixed fields of a page, at most
_IPV4_NODE_BYTES = _NODE_FIXED_BYTES + len("255.255.255.255")
_PAGE_BYTES = MAX_DATAGRAM_BYTES - _PAGE_FIXED_BYTES - _IPV4_NODE_BYTES  # for records: room for one node stays

Id = Annotated[bytes, msgspec.Meta(min_length=PEER_ID_BYTES, max_length=PEER_ID_BYTES)]
NamedNode = tuple[Id, Annotated[str, msgspec.Meta(max_length=45)], Annotated[int, msgspec.Meta(ge=1, le=65535)]]
NamedNodes = Annotated[list[NamedNode], msgspec.Meta(max_length=MAX_NODES)]


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    sender: Id


class FindNode(msgspec.Struct, frozen=True, array_like=True, tag="find_node"):
    sender: Id
    target: Id


class FindRecords(msgspec.Struct, frozen=True, array_like=True, tag="find_records"):
    sender: Id
    key: Id
    after: Annotated[bytes, msgspec.Meta(max_length=PEER_ID_BYTES)]


class Store(msgspec.Struct, frozen=True, array_like=True, tag="store"):
    sender: Id
    key: Id
    record: WireRecord


class Leave(msgspec.Struct, frozen=True, array_like=True, tag="leave"):
    """Goodbye. The one request that has no reply."""

    sender: Id


Request = Ping | FindNode | FindRecords | Store | Leave


class Named(msgspec.Struct, frozen=True, array_like=True):
    """The reply to ping (no nodes) and find_node: nodes near the target, nearest first."""

    sender: Id
    nodes: NamedNodes


class Stored(msgspec.Struct, frozen=True, array_like=True):
    """The reply to store: whether the record is held now, and nodes near its key."""

    sender: Id
    nodes: NamedNodes
    held: bool


class Page(msgspec.Struct, frozen=True, array_like=True):
    """The reply to find_records. `more` records follow this page; `digest` names the whole set, "" if this is all."""

    sender: Id
    nodes: NamedNodes
    records: list[WireRecord]
    more: Annotated[int, msgspec.Meta(ge=0)]
    digest: bytes


AnyReply = Named | Stored | Page

encode = msgspec.msgpack.Encoder().encode
request_decoder = msgspec.msgpack.Decoder(Request)
_reply_types: dict[type, Any] = {Ping: Named, FindNode: Named, Store: Stored, FindRecords: Page}
reply_decoders = {asked: msgspec.msgpack.Decoder(reply) for asked, reply in _reply_types.items()}


def page_of(
    sender: bytes, records: Sequence[WireRecord], after: bytes, nodes: Sequence[tuple[bytes, str, int]]
) -> Page:
    """Return the page of `records` (sorted by publisher) behind `after`, with as many of `nodes` as fit beside it."""
    rest = [record for record in records if record.publisher > after]
    sizes = itertools.accumulate(_RECORD_FIXED_BYTES + len(record.value) for record in rest)
    taken = [record for record, n_bytes in zip(rest, sizes, strict=True) if n_bytes <= _PAGE_BYTES]
    room = MAX_DATAGRAM_BYTES - _PAGE_FIXED_BYTES - sum(_RECORD_FIXED_BYTES + len(record.value) for record in taken)
    sizes = itertools.accumulate(_NODE_FIXED_BYTES + len(host) for _, host, _ in nodes)
    named = [node for node, n_bytes in zip(nodes, sizes, strict=True) if n_bytes <= room][:NODES_WITH_RECORDS]
    more = len(rest) - len(taken)
    return Page(sender, named, taken, more, digest_of(records) if more else b"")
