"""Finding the records under a key, and believing only what proves itself.

Records under a key lie at more than one place of the id space, so that whoever gathers nodes around one of them can
hide nothing; a lookup crawls to all places at once and unites what it finds (compare the disjoint paths of S/Kademlia,
Baumgart and Mies, 2007). While a node knows no more others than hold a record anyway, one place is everywhere.

Every record is verified here, whoever held it, and a node that hands out one that is not genuine is not listened to
any further. In a private swarm a publisher that we have never met is asked about: its certificates prove themselves.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from kademlia.node import Node

from .dht_calls import Answer
from .dht_messages import Page, location
from .dht_proof import Proofs
from .dht_protocol import GuardedProtocol
from .dht_records import WireRecord, digest_of, valid
from .dht_routing import Crawl, Strangers

PARALLEL = 5  # questions of one crawl in flight
N_SALTS = 2
MAX_PAGES = 128  # that one node is asked for
MAX_INTRODUCTIONS = 64  # of one lookup
MAX_SOURCES = 3  # that are asked who a publisher is

Ask = Callable[[Any, int], Answer]  # (node, salt)


def salts_of(protocol: GuardedProtocol, replicas: int) -> range:
    """Return the salts under which we look now."""
    return range(1) if len(protocol.router.contacts) <= replicas else range(N_SALTS)


async def look_up(protocol: GuardedProtocol, key: bytes, replicas: int, ask: Ask) -> list[tuple[Any, Any]]:
    """Crawl to all places of `key` and return (node, reply) of everyone who answered `ask(node, salt)`."""
    strangers = Strangers(protocol.neighbourhood)

    async def crawl(salt: int) -> dict[Any, Any]:
        place = Node(location(key, salt))
        return await Crawl(protocol, place, replicas, PARALLEL, lambda node: ask(node, salt), strangers).find()

    found = await asyncio.gather(*map(crawl, salts_of(protocol, replicas)))
    return [(node, reply) for answers in found for node, reply in answers.items()]


class Seeker:
    """Finds records of others. `clock` returns milliseconds since 1970."""

    def __init__(
        self,
        protocol: GuardedProtocol,
        proofs: Proofs,
        clock: Callable[[], int],
        replicas: int,
        refused: Counter[str],
    ) -> None:
        self._protocol = protocol
        self._proofs = proofs
        self._clock = clock
        self._replicas = replicas
        self._refused = refused

    async def seek(self, key: bytes) -> dict[bytes, WireRecord]:
        """Return the newest genuine record of each publisher under `key`, tombstones included, by public key."""
        answers = await look_up(
            self._protocol,
            key,
            self._replicas,
            lambda node, salt: self._protocol.call_find_records(node, key, salt, b""),
        )
        pages = {node.id: (node, page) for node, page in answers}
        sources = [(node, page.records) for node, page in pages.values()]
        sources += await self._turn_pages(key, [(node, page) for node, page in pages.values() if page.more])
        found, strangers = self._genuine(key, [(None, self._protocol.storage.records(key)), *sources])
        asked = list(strangers.items())[:MAX_INTRODUCTIONS]
        await asyncio.gather(*(self._meet(public_key, nodes) for public_key, nodes in asked))
        return {each: record for each, record in found.items() if self._proofs.is_member(each)}

    async def _turn_pages(self, key: bytes, first: list[tuple[Any, Page]]) -> list[tuple[Any, list[WireRecord]]]:
        """Read what did not fit on the first pages. Of nodes that hold the same set, one is read."""
        by_digest: dict[bytes, list[tuple[Any, Page]]] = {}
        for node, page in first:
            by_digest.setdefault(page.digest, []).append((node, page))
        read = await asyncio.gather(*(self._read_one(key, digest, same) for digest, same in by_digest.items()))
        return [source for sources in read for source in sources]

    async def _read_one(
        self, key: bytes, digest: bytes, first: list[tuple[Any, Page]]
    ) -> list[tuple[Any, list[WireRecord]]]:
        sources = []
        for node, page in first:
            records = list(page.records)
            for _ in range(MAX_PAGES):
                if not (page.more and page.records):
                    break
                after = page.records[-1].public_key
                page = await self._protocol.call_find_records(node, key, 0, after)
                if page is None or not page.records or page.records[0].public_key <= after:
                    break
                records += page.records
            sources.append((node, records))
            if digest_of(records) == digest:
                break  # this node really holds the set it named, so the others have nothing to add
        return sources

    def _genuine(
        self, key: bytes, sources: Iterable[tuple[Any, list[WireRecord]]]
    ) -> tuple[dict[bytes, WireRecord], dict[bytes, list[Any]]]:
        """Return the newest genuine record of each public key, and who can tell us about those we do not know."""
        now_ms = self._clock()
        found: dict[bytes, WireRecord] = {}
        strangers: dict[bytes, list[Any]] = {}
        liars: set[bytes] = set()
        for node, records in sources:
            if node is not None and node.id in liars:
                continue  # what it said on other pages is worth no more
            for record in records:
                publisher = record.public_key
                if not valid(record, now_ms):
                    continue
                if publisher not in found or record.seq > found[publisher].seq:
                    if not self._proofs.is_genuine(key, record):
                        self._refused["forged record"] += 1
                        if node is not None:
                            liars.add(node.id)
                        break
                    found[publisher] = record
                if node is not None and not self._proofs.is_member(publisher):
                    strangers.setdefault(publisher, []).append(node)
        return found, strangers

    async def _meet(self, public_key: bytes, nodes: list[Any]) -> None:
        """Ask for the certificates of a publisher."""
        for node in nodes[:MAX_SOURCES]:
            introduction = await self._protocol.call_introduce(node, public_key)
            if introduction is not None and self._proofs.admit(public_key, introduction.chain):
                return
        self._refused["publisher is no member"] += 1
