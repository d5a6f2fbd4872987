"""News of the swarm: how a daemon hears who was revoked, passes it on, and knows where admitters are.

Strategy: news go two ways. Whoever meets says which revocation list it goes by, the other one sends a newer one, and
what is new to a daemon it passes on to all its links. And admitters say in the DHT which list they have, so that a
daemon without any link, which looks there a few times a minute, goes and gets it. A record in the DHT only ever makes
us dial; what we believe is signed by the root.

The disk may be slow or full, so it is served by one task: a list counts from the moment it was verified, and is written
down afterwards. The same task notices when a command on this machine has changed it.
"""

import hashlib
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from mpd.errors import PeerError
from mpd.identity import SwarmId
from mpd.ids import Endpoint, PeerId, show_peer
from mpd.messages import News
from mpd.vocabulary import Vocabulary

from .links import Link
from .rendezvous import Rendezvous
from .renewal import Candidate, InThread, Troubles
from .swarm import Swarm
from .swarm_store import SwarmStore

LOOK_S = 20.0  # how often the DHT is asked for admitters
FILES_S = 5.0  # how often the files are looked at
_MAX_PAUSE_S = 3600.0
_FETCH_S = 5.0  # how long a peer that has newer news may take to send them
_RECORD_TTL_S = 60.0

_log = logging.getLogger("mpd")


@dataclass(frozen=True, slots=True)
class Post:
    """An admitter's record in the DHT: where it is, the number of its revocation list, and if it has the root key."""

    host: str
    port: int
    news: int
    is_root: bool = False

    def __post_init__(self) -> None:
        if not self.endpoint.port or not 0 <= self.news < 1 << 62:
            raise ValueError("an admitter has a port, and a number is not negative")

    @property
    def endpoint(self) -> Endpoint:
        """Where it can be dialled."""
        return Endpoint(self.host, self.port)


POSTS = Vocabulary(PeerError, Post)


def admitters_key(swarm: SwarmId) -> bytes:
    """Return the key of the DHT under which the admitters of `swarm` announce themselves."""
    return hashlib.sha256(b"mpd admitters 1" + swarm).digest()[:20]


class Linking(Protocol):
    """What is needed of `Peers`."""

    @property
    def endpoint(self) -> Endpoint:
        """Where others are told to dial us."""

    def links(self) -> list[Link]:
        """Return all live links."""

    def get(self, peer: PeerId) -> Link | None:
        """Return the live link to `peer`."""

    async def link(self, peer: PeerId, endpoint: Endpoint | None) -> Link:
        """Return a link to `peer`, made if need be. Raises PeerError."""

    def recheck(self) -> None:
        """Cut the links to whoever is no member any more."""

    def cut(self, is_doomed: Callable[[Link], bool], reason: str) -> None:
        """End some links."""


class NewsDesk:
    """Keeps `swarm` up to date while `run` runs."""

    def __init__(
        self,
        swarm: Swarm,
        peers: Linking,
        rendezvous: Rendezvous,
        rng: random.Random,
        in_thread: InThread = trio.to_thread.run_sync,
    ) -> None:
        self._swarm = swarm
        self._peers = peers
        self._rendezvous = rendezvous
        self._rng = rng
        self._posts: dict[PeerId, Post] = {}
        self._shunned: dict[PeerId, tuple[float, float]] = {}  # who had promised news in vain: until when, for how long
        self._announced: Post | None = None
        self._saved_seq = swarm.news_seq
        self._revoked = set(swarm.revocations.peers)  # on any list that we have gone by
        self._learned = trio.Event()
        self._disk_work = trio.Event()
        self._troubles = Troubles(in_thread)

    @property
    def problem(self) -> str:
        """What the owner of this machine should know, in sentences; empty if all is well."""
        sentences = list(self._troubles)
        if self._swarm.is_revoked_here():
            name = self._swarm.name
            sentences.append(f"this machine, or the admitter that let it in, is revoked in swarm {name}")
        # Whoever revokes with an old state directory numbers its list too low: the swarm's own list wins.
        if forgotten := sorted(self._revoked - self._swarm.revocations.peers):
            sentences.append(
                f"list {self._swarm.news_seq} of the swarm replaced one of this machine and does not revoke "
                f"{', '.join(map(show_peer, forgotten[:8]))}: run `mpd swarm revoke` again where the root key is"
            )
        return "; ".join(sentences)

    async def admitters(self) -> list[Candidate]:
        """Return the other admitters that we know of: those in the DHT in random order, then those of old."""
        found = [Candidate(peer, post.endpoint, post.is_root) for peer, post in sorted(self._posts.items())]
        self._rng.shuffle(found)
        remembered = [
            Candidate(peer, address, False)
            for peer, addresses in (await self._remembered()).items()
            for address in addresses
            if peer != self._swarm.own
        ]
        here = {(each.peer, each.endpoint) for each in found}
        return [*found, *(each for each in remembered if (each.peer, each.endpoint) not in here)]

    # ----------------------------------------------------------------------------------------------------- from links

    def on_link_up(self, link: Link, their_seq: int) -> None:
        """A peer has said which list it goes by: send ours if that is newer."""
        news = self._swarm.news()
        if news is not None and their_seq < self._swarm.news_seq:
            link.send(news)

    def on_news(self, link: Link, message: News) -> None:
        """A peer has sent its list. Raises PeerError if that is a forgery."""
        if self._swarm.learn(message.revocations, message.datagram_key):
            self._disk_work.set()
            self._spread(source=link)

    def _spread(self, source: Link | None = None) -> None:
        """Act on a new list: cut whoever is on it, and tell the others."""
        swarm, news = self._swarm, self._swarm.news()
        n_revoked = len(swarm.revocations.peers)
        self._revoked |= swarm.revocations.peers
        _log.info("revocation list %d: %d peer%s revoked", swarm.news_seq, n_revoked, "s" * (n_revoked != 1))
        self._learned.set()
        self._learned = trio.Event()
        self._peers.recheck()
        for link in self._peers.links():
            # The news hold the new datagram key, which the revoked must not have.
            if link is not source and not swarm.revocations.names(link.member):
                link.send(news)

    # ---------------------------------------------------------------------------------------------------------- tasks

    async def run(self) -> None:
        """Work until cancelled. In an open swarm there is nothing to do."""
        if self._swarm.is_open:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_files)
            nursery.start_soon(self._watch_admitters)

    async def _keep_files(self) -> None:
        store = self._store
        seen: object = None
        while True:
            self._disk_work = trio.Event()
            stamp = store.news_stamp()
            if stamp != seen or self._saved_seq != self._swarm.news_seq:
                stored = await self._troubles.attempt("files", store.exchange_news, self._swarm.swarm_news)
                if stored is not None:
                    seen, self._saved_seq = stamp, stored.revocations.seq
                    if self._swarm.take_news(stored):
                        self._spread()
            with trio.move_on_after(FILES_S):
                await self._disk_work.wait()

    # ------------------------------------------------------------------------------------------------------ admitters

    async def _watch_admitters(self) -> None:
        while True:
            await self._announce()
            await self._look()
            await self._fetch()
            with trio.move_on_after(LOOK_S * self._rng.uniform(0.75, 1.25)):
                await self._learned.wait()  # others hear of it through our record

    async def _announce(self) -> None:
        """Say in the DHT that we admit, and what we know."""
        swarm, endpoint = self._swarm, self._peers.endpoint
        key = admitters_key(swarm.swarm_id)
        if swarm.may_admit and endpoint.port:
            is_root = bool(await self._troubles.attempt("root key", swarm.has_root_key))
            post = Post(endpoint.host, endpoint.port, swarm.news_seq, is_root)
            if post != self._announced:
                await self._rendezvous.announce(key, POSTS.encode(post), _RECORD_TTL_S)
            self._announced = post
        elif self._announced is not None:
            await self._rendezvous.withdraw(key)
            self._announced = None

    async def _look(self) -> None:
        """Ask the DHT who admits."""
        posts: dict[PeerId, Post] = {}
        for record in await self._rendezvous.seek(admitters_key(self._swarm.swarm_id)):
            post = _decode(record.value)
            if post is not None and record.publisher != self._swarm.own:
                posts[record.publisher] = post
        self._posts = posts
        for peer, addresses in (await self._remembered()).items():
            now_at = posts[peer].endpoint if peer in posts else addresses[0]
            if now_at not in addresses:
                await self._troubles.attempt("moved admitter", self._store.remember_admitter, peer, now_at)

    async def _fetch(self) -> None:
        """Link to a daemon that has newer news than we; without any record, to an admitter that we remember."""
        now = trio.current_time()
        newer = {peer: post.endpoint for peer, post in self._posts.items() if post.news > self._swarm.news_seq}
        if not self._posts and not self._peers.links():
            newer = {peer: addresses[0] for peer, addresses in (await self._remembered()).items()}
        self._shunned = {peer: shunned for peer, shunned in self._shunned.items() if peer in newer}
        for peer in self._rng.sample(sorted(newer), len(newer)):
            until, pause_s = self._shunned.get(peer, (now, LOOK_S))
            if until > now or peer == self._swarm.own:
                continue
            # Whoever promises what it does not have, or gives somebody else's address, is believed less and less often.
            self._shunned[peer] = now + pause_s, min(2 * pause_s, _MAX_PAUSE_S)
            if await self._fetch_from(peer, newer[peer]):
                break

    async def _fetch_from(self, peer: PeerId, endpoint: Endpoint) -> bool:
        """Return True if a link to `peer` brought news."""
        before, was_linked = self._swarm.news_seq, self._peers.get(peer) is not None
        try:
            link = await self._peers.link(peer, endpoint)
        except PeerError as error:
            _log.debug("no news from %s: %s", show_peer(peer), error)
            return False
        with trio.move_on_after(_FETCH_S):
            while self._swarm.news_seq == before:
                await self._learned.wait()
        if not was_linked and not link.busy:  # in a large idle swarm, an admitter has no room for a link to each
            self._peers.cut(lambda other: other is link, "it was called for news only")
        return self._swarm.news_seq > before

    async def _remembered(self) -> dict[PeerId, tuple[Endpoint, ...]]:
        return await self._troubles.attempt("known admitters", self._store.admitters) or {}

    @property
    def _store(self) -> SwarmStore:
        store = self._swarm.store
        assert store is not None, "an open swarm has no files"
        return store


def _decode(value: bytes) -> Post | None:
    """Return what a record says; None if it is nonsense, which any member may publish."""
    try:
        post = POSTS.decode(value)
    except PeerError:
        return None
    assert isinstance(post, Post)
    return post
