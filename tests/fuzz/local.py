"""What people, trainers and the disk hand in: addresses, the local socket, and files in the state directory."""

import atexit
import base64
import functools
import hashlib
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fuzz.swarm import ADMITTER, BY_ADMITTER, NOW_S, PEER_KEY, ROOT, ROOT_KEY, SWARM, tokens
from fuzz.target import Target, vocabulary_seeds

from mpd.control import LOCAL, PREFIX_BYTES, Attach, body_length
from mpd.daemon.dht_bootstrap import load_known_peers, save_known_peers
from mpd.daemon.state import StateDir, private_pem
from mpd.daemon.swarm_store import DatagramKey, SwarmNews, SwarmStore, key_digest, raw_public
from mpd.errors import Fatal, LocalError
from mpd.ids import Endpoint, PeerId, parse_endpoint, parse_peer, peer_id_of, show_peer
from mpd.invites import parse_token
from mpd.layout import Layout, TensorSpec, Terms
from mpd.manifest import HASH_BYTES, Manifest
from mpd.revocations import Revocations, sign
from mpd.state_file import Kept, StateHead, head_bytes, pack_head, parse_head


def parse_address(data: bytes) -> Endpoint:
    """What people type is an address that is printed as it is read, or they are told what to type."""
    endpoint = parse_endpoint(data.decode("utf-8", "surrogateescape"), 4747)
    assert parse_endpoint(str(endpoint)) == endpoint
    assert endpoint.host.encode("idna")  # as resolvers do
    assert not (endpoint.is_loopback and endpoint.is_wildcard)
    return endpoint


def address_seeds() -> list[bytes]:
    typed = ["192.0.2.7:4747", "peer.example", "[2001:db8::7]:1", "fe80::1%eth0", "[fe80::1%eth0]:65535", "0.0.0.0:0"]
    return [text.encode() for text in typed]


def parse_peer_name(data: bytes) -> PeerId:
    """A peer that somebody names is shown as it was written, capitals aside."""
    text = data.decode("utf-8", "surrogateescape")
    peer = parse_peer(text)
    assert show_peer(peer) == text.lower()
    return peer


def parse_local_frame(data: bytes) -> object:
    """A frame of the local socket means the same passed on; an `Attach` is terms, or the trainer is told why not."""
    message = LOCAL.decode(data[PREFIX_BYTES:][: body_length(data[:PREFIX_BYTES].ljust(PREFIX_BYTES, b"\0"))])
    passed_on = LOCAL.encode(message)
    assert LOCAL.encode(LOCAL.decode(passed_on)) == passed_on
    if isinstance(message, Attach):
        terms = Terms(Layout(message.tensors), message.group_size, message.rounds, message.codec, message.aggregate)
        assert len(terms.digest) == 32
        assert terms.layout.n_bytes >= terms.layout.payload_bytes
    return message


def local_frame_seeds() -> list[bytes]:
    tensors = (TensorSpec("a", "float32", (2, 3)), TensorSpec("b", "bfloat16", ()))
    said = [body for body in vocabulary_seeds(LOCAL) if not isinstance(LOCAL.decode(body), Attach)]
    said += [LOCAL.encode(Attach("run", tensors, 4, rounds, "zstd", "mean")) for rounds in (1, "exact")]
    return [len(body).to_bytes(PREFIX_BYTES, "little") + body for body in said]


# ---------------------------------------------------------------------------------------------------------------- files


@functools.cache
def state() -> StateDir:
    """Return a state directory, made at the first use."""
    folder = tempfile.mkdtemp(prefix="mpd-fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return StateDir(Path(folder))


def file_target(
    name: str,
    load: Callable[[Path], object],
    blame: tuple[type[Exception], ...],
    seeds: Callable[[], Iterable[bytes]],
    max_bytes: int = 2048,
) -> Target:
    """Return the target of the file `name` in the state directory, which `load` reads."""

    def parse(data: bytes) -> object:
        path = state().path / name
        path.write_bytes(data)
        return load(path)

    return Target(parse, blame, seeds, max_bytes)


def armoured(target: Target, label: str, der: bytes) -> Target:
    """Return `target`, whose file is PEM, for inputs that are the bytes inside it as well: they are harder to hit."""

    def parse(data: bytes) -> object:
        if not data.startswith(b"-----"):
            lines = textwrap.fill(base64.b64encode(data).decode("ascii"), 64)
            data = f"-----BEGIN {label}-----\n{lines}\n-----END {label}-----\n".encode("ascii")
        return target.parse(data)

    return Target(parse, target.blame, lambda: [*target.seeds(), der])


def known_peers_seed() -> bytes:
    path = state().path / "peers.json"
    save_known_peers(path, [("192.0.2.7", 4747, b"p" * 20), ("2001:db8::7", 1, b"q" * 20)])
    return path.read_bytes()


def swarm_file(name: str) -> Target:
    """Return the target of one file in `swarm/`: the others are in order, and the daemon starts or says why not."""

    def parse(data: bytes) -> None:
        as_it_was, path = swarm_files()[name], state().path / "swarm" / name
        path.write_bytes(data)
        try:
            SwarmStore(state().path).check()
        finally:
            path.write_bytes(as_it_was)

    return Target(parse, (Fatal,), lambda: [swarm_files()[name]])


def pkcs8(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


@functools.cache
def swarm_files() -> dict[str, bytes]:
    """Return the files of an admitter that has let somebody in and has the root key, having written them."""
    store = SwarmStore(state().path)
    key = DatagramKey(b"d" * 32)
    revoked = Revocations(SWARM, 2, frozenset({PeerId(b"p" * 20)}), key_digest(key.key))
    news = SwarmNews(revoked, sign(ROOT_KEY, revoked), (key, DatagramKey(b"e" * 32, NOW_S)))
    admitter = peer_id_of(raw_public(ADMITTER))
    store.found(ROOT, BY_ADMITTER, news, {admitter: [Endpoint("192.0.2.7", 4747)]}, ROOT_KEY)
    for token in tokens():
        store.count_use(parse_token(token).invite, PeerId(b"q" * 20), 0.0)
    return {path.name: path.read_bytes() for path in store.folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------- state files


def parse_state_file(data: bytes) -> StateHead:
    """A state file says whose it is, proves it, and means the same when it is written again, or is refused."""
    file_bytes, head = int.from_bytes(data[1:9]), data[9:]
    if data[:1] == b"\1":
        head += hashlib.sha256(head).digest()
    found = parse_head(head, file_bytes)
    assert len(head) == head_bytes(head) == found.vector_at == file_bytes - found.kept.n_bytes
    assert len(found.manifest.hashes) == HASH_BYTES * found.manifest.n_chunks
    written = pack_head(found.kept, found.manifest)
    again = parse_head(written, len(written) + found.kept.n_bytes)
    assert (again.kept, again.manifest) == (found.kept, found.manifest)
    return found


def state_file_seeds() -> Iterator[bytes]:
    for n_chunks, metadata in ((1, b""), (3, b"epoch 7")):
        n_bytes = (n_chunks << 20) - 5
        kept = Kept("run", b"t" * 32, b"r" * 16, 12, n_bytes, NOW_S, metadata)
        head = pack_head(kept, Manifest(kept.terms, kept.round_id, kept.number, n_bytes, b"h" * HASH_BYTES * n_chunks))
        size = (len(head) + n_bytes).to_bytes(8)
        yield b"\0" + size + head
        yield b"\1" + size + head[:-32]


TARGETS = {
    "state-file": Target(parse_state_file, (LocalError,), state_file_seeds, max_bytes=1024),
    "address": Target(parse_address, (LocalError,), address_seeds, max_bytes=300),
    "peer-name": Target(parse_peer_name, (LocalError,), lambda: [show_peer(b"p" * 20).encode()], max_bytes=64),
    "local-frame": Target(parse_local_frame, (LocalError,), local_frame_seeds),
    "key-file": armoured(
        file_target("key.pem", lambda _: state().load_key(), (Fatal,), lambda: [private_pem(PEER_KEY)]),
        "PRIVATE KEY",
        pkcs8(PEER_KEY),
    ),
    "port-file": file_target("port", lambda _: state().last_port(), (), lambda: [b"4747", b"0", b"-1"], 32),
    "announced-file": file_target("announced", lambda _: state().last_announced(), (), lambda: [b"[::1]:4747"], 300),
    "known-peers-file": file_target("peers.json", load_known_peers, (ValueError,), lambda: [b"[]", known_peers_seed()]),
    "swarm-file": swarm_file("swarm.json"),
    "chain-file": armoured(swarm_file("chain.pem"), "CERTIFICATE", BY_ADMITTER[0]),
    "news-file": swarm_file("news.json"),
    "invites-file": swarm_file("invites.json"),
    "root-key-file": armoured(swarm_file("root.pem"), "PRIVATE KEY", pkcs8(ROOT_KEY)),
}
