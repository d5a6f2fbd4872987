"""What DHT nodes say to each other. The types are the gate: what does not decode into one of them is no message.

A request is an array that starts with its name, so the union `Request` is the list of all that can be asked. It names
who asks and whom, as far as that is known, so that what was meant for one node cannot be played to another. Each reply
starts with the id of who replies, which shows when another node has taken over an address.

No datagram exceeds 1232 bytes, so none is fragmented on the way, and a request is padded to half of that: together
with the question that a stranger is asked in return, the reply to it stays below three times its size, so nobody gains
by asking in somebody else's name. Records are therefore handed out in pages, in the order of their publishers' keys: a
page starts behind the key `after`, and a reader that has turned all pages holds the set whose digest the first gave.
"""

import hashlib
import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from mpd.ids import PEER_ID_BYTES

from .dht_gate import HEADER_BYTES, MAX_DATAGRAM_BYTES
from .dht_records import RECORD_FIXED_BYTES, WireRecord, digest_of

MIN_REQUEST_BYTES = MAX_DATAGRAM_BYTES // 2
MAX_NODES = 16  # that a reply may name; with IPv6 addresses they just fit
NODES_WITH_RECORDS = 8  # that a page names beside its records, as far as there is room
MAX_SALT = 3

_NODE_FIXED_BYTES = 28  # a node's msgpack beside its host, at most
_PAGE_FIXED_BYTES = HEADER_BYTES + 56  # header and fixed fields of a page, at most
_IPV4_NODE_BYTES = _NODE_FIXED_BYTES + len("255.255.255.255")
_PAGE_BYTES = MAX_DATAGRAM_BYTES - _PAGE_FIXED_BYTES - _IPV4_NODE_BYTES  # for records: room for one node stays
_NO_PADDING, _PADDING = b"\xc4\x00", b"\xc5"  # msgpack: no bytes; bytes whose number follows in two bytes

Id = Annotated[bytes, msgspec.Meta(min_length=PEER_ID_BYTES, max_length=PEER_ID_BYTES)]
IdOrNone = Annotated[bytes, msgspec.Meta(max_length=PEER_ID_BYTES)]  # empty: whoever lives at that address
Host = Annotated[str, msgspec.Meta(max_length=45)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
NamedNode = tuple[Id, Host, Port]
NamedNodes = Annotated[list[NamedNode], msgspec.Meta(max_length=MAX_NODES)]
PublicKey = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
Chain = Annotated[list[bytes], msgspec.Meta(max_length=2)]
Salt = Annotated[int, msgspec.Meta(ge=0, le=MAX_SALT)]


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    """Prove who you are. `public_key` and `chain` are the asker's, who may want to publish here soon."""

    sender: Id
    to: IdOrNone
    public_key: PublicKey
    chain: Chain
    padding: bytes = b""


class FindNode(msgspec.Struct, frozen=True, array_like=True, tag="find_node"):
    sender: Id
    to: IdOrNone
    target: Id
    padding: bytes = b""


class FindRecords(msgspec.Struct, frozen=True, array_like=True, tag="find_records"):
    sender: Id
    to: IdOrNone
    key: Id
    salt: Salt
    after: Annotated[bytes, msgspec.Meta(max_length=32)]
    padding: bytes = b""


class Store(msgspec.Struct, frozen=True, array_like=True, tag="store"):
    sender: Id
    to: IdOrNone
    key: Id
    salt: Salt
    record: WireRecord
    padding: bytes = b""


class Introduce(msgspec.Struct, frozen=True, array_like=True, tag="introduce"):
    """Which certificates has the publisher with this key?"""

    sender: Id
    to: IdOrNone
    public_key: PublicKey
    padding: bytes = b""


class Leave(msgspec.Struct, frozen=True, array_like=True, tag="leave"):
    """Goodbye. The one request that has no reply."""

    sender: Id
    to: IdOrNone
    at_ms: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    public_key: PublicKey
    signature: Signature


Request = Ping | FindNode | FindRecords | Store | Introduce | Leave


class Home(msgspec.Struct, frozen=True, array_like=True):
    """The reply to ping: the proof that the holder of this key lives here.

    `seen_host` and `seen_port` are where the question came from; the signature covers them (`dht_proof.py`).
    """

    sender: Id
    public_key: PublicKey
    chain: Chain
    seen_host: Host
    seen_port: Port
    signature: Signature


class Named(msgspec.Struct, frozen=True, array_like=True):
    """The reply to find_node: nodes near the target, nearest first."""

    sender: Id
    nodes: NamedNodes


class Stored(msgspec.Struct, frozen=True, array_like=True):
    """The reply to store: nodes near the location, and whether the record is held now.

    `knows` is false if the publisher has to introduce itself by a ping before anything is held for it.
    """

    sender: Id
    nodes: NamedNodes
    held: bool
    knows: bool


class Page(msgspec.Struct, frozen=True, array_like=True):
    """The reply to find_records. `more` records follow this page; `digest` names the whole set, "" if this is all."""

    sender: Id
    nodes: NamedNodes
    records: list[WireRecord]
    more: Annotated[int, msgspec.Meta(ge=0)]
    digest: bytes


class Introduction(msgspec.Struct, frozen=True, array_like=True):
    """The reply to introduce; no certificates if the replier does not know that publisher."""

    sender: Id
    chain: Chain


AnyReply = Home | Named | Stored | Page | Introduction

encode = msgspec.msgpack.Encoder().encode
request_decoder = msgspec.msgpack.Decoder(Request)
_reply_types: dict[type, Any] = {
    Ping: Home,
    FindNode: Named,
    Store: Stored,
    FindRecords: Page,
    Introduce: Introduction,
}
reply_decoders = {asked: msgspec.msgpack.Decoder(reply) for asked, reply in _reply_types.items()}


def encode_request(request: Request) -> bytes:
    """Return `request` as msgpack, padded so that its datagram has at least `MIN_REQUEST_BYTES`."""
    body = encode(request)
    n_missing = MIN_REQUEST_BYTES - HEADER_BYTES - len(body)
    if n_missing <= 0 or isinstance(request, Leave):
        return body
    return body.removesuffix(_NO_PADDING) + _PADDING + n_missing.to_bytes(2, "big") + bytes(n_missing)


def location(key: bytes, salt: int) -> bytes:
    """Return where in the id space records under `key` lie. Salt 0 is the key itself."""
    return key if salt == 0 else hashlib.sha256(b"mpd dht location 1|%d|" % salt + key).digest()[:PEER_ID_BYTES]


def page_of(
    sender: bytes, records: Sequence[WireRecord], after: bytes, nodes: Sequence[tuple[bytes, str, int]]
) -> Page:
    """Return the page of `records` (sorted by key) behind `after`, with as many of `nodes` as fit beside it."""
    rest = [record for record in records if record.public_key > after]
    sizes = itertools.accumulate(RECORD_FIXED_BYTES + len(record.value) for record in rest)
    taken = [record for record, n_bytes in zip(rest, sizes, strict=True) if n_bytes <= _PAGE_BYTES]
    room = MAX_DATAGRAM_BYTES - _PAGE_FIXED_BYTES - sum(RECORD_FIXED_BYTES + len(record.value) for record in taken)
    sizes = itertools.accumulate(_NODE_FIXED_BYTES + len(host) for _, host, _ in nodes)
    named = [node for node, n_bytes in zip(nodes, sizes, strict=True) if n_bytes <= room][:NODES_WITH_RECORDS]
    more = len(rest) - len(taken)
    return Page(sender, named, taken, more, digest_of(records) if more else b"")
