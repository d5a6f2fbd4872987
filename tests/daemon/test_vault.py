"""The bytes of one round, against numpy: exact means, refused records and payloads, memory that is never mixed."""

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd.codecs import codec_named
from mpd.daemon.vault import IN_PLACE, RegionVault
from mpd.errors import PeerError, RoundFailed
from mpd.exchange import Exchange, RoundPlan
from mpd.ids import RoundId
from mpd.layout import AGGREGATE_NAMES, CODEC_NAMES, ITEM_BYTES, Segment
from mpd.reduce import AccumulatorPool, as_array, bf16_from_f32, f32_from_bf16
from mpd.robust import pool_for
from mpd.schedule import Chunk, chunks
from mpd.wire import HEADER_BYTES, Header, Kind, pack_header, unpack_header

DTYPES = list(ITEM_BYTES)
CODECS = list(CODEC_NAMES)
N_ELEMS = 300


def store_values(values: npt.NDArray[np.float64], dtype: str) -> bytearray:
    """Return `values`, rounded to `dtype`, as they lie in memory."""
    memory = bytearray(values.size * ITEM_BYTES[dtype])
    if dtype == "bfloat16":
        bf16_from_f32(values.astype(np.float32), as_array(memory, dtype))
    else:
        as_array(memory, dtype)[:] = values
    return memory


def read_values(memory: bytes | bytearray | memoryview, dtype: str) -> npt.NDArray[np.float64]:
    values = as_array(memory, dtype)
    if dtype == "bfloat16":
        wide = np.empty(values.size, np.float32)
        f32_from_bf16(values, wide)
        values = wide
    return values.astype(np.float64)


class Group:
    """The vaults of all members of a round over one vector of `dtype`; all of them reduce."""

    def __init__(
        self,
        values: list[npt.NDArray[np.float64]],
        weights: list[float],
        dtype: str,
        codec: str,
        aggregate: str = "mean",
    ) -> None:
        n_elems, n = values[0].size, len(values)
        self.plan = chunks([Segment(dtype, 0, n_elems)], [1.0] * n, chunk_bytes=512)
        self.inputs = [store_values(v, dtype) for v in values]
        self.outs = [bytearray(n_elems * ITEM_BYTES[dtype]) for _ in values]
        self.vaults = [
            RegionVault(self.plan, memoryview(i), memoryview(o), weights, me).use(
                codec_named(codec), pool_for(aggregate)
            )
            for me, (i, o) in enumerate(zip(self.inputs, self.outs, strict=True))
        ]
        self.weights = weights

    def average(self) -> None:
        """Do a whole round by hand: every piece to its owner, every result to everybody."""
        senders = [i for i, weight in enumerate(self.weights) if weight > 0]
        for chunk in self.plan:
            owner = self.vaults[chunk.owner]
            owner.open(chunk.index)
            for sender in senders:
                if sender != chunk.owner:
                    piece = bytearray(self.vaults[sender].piece_payload(chunk.index))
                    assert not owner.accepts(chunk.index, chunk.owner, len(piece), owner.codec.code)
                    owner.add(chunk.index, sender, memoryview(piece))
            owner.close(chunk.index, sum(1 << sender for sender in senders))
            result = bytearray(owner.result_payload(chunk.index))
            for vault in self.vaults:
                if vault is not owner:
                    vault.store(chunk.index, memoryview(result))


def rounded(mean: npt.NDArray[np.float32] | npt.NDArray[np.float64], dtype: str, codec: str) -> npt.NDArray[np.float64]:
    """Return what remains of a mean in `dtype` after it has travelled."""
    values = read_values(store_values(mean, dtype), dtype)
    if codec == "float16" and ITEM_BYTES[dtype] > 2:
        values = np.clip(values, -65504, 65504).astype(np.float16).astype(np.float64)
    return values


@pytest.mark.parametrize(("dtype", "codec"), list(itertools.product(DTYPES, CODECS)))
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [5.0, 0.0, 2.0], [0.0, 0.0, 3.0], [1.0, 2.5, 4.0]])
def test_everybody_holds_the_exact_mean(dtype: str, codec: str, weights: list[float]) -> None:
    """Small integers: every sum is exact, so only the division rounds, and then the dtype and the codec."""
    rng = np.random.default_rng(1)
    values = [rng.integers(-100, 100, N_ELEMS).astype(np.float64) for _ in weights]
    group = Group(values, weights, dtype, codec)
    group.average()
    wide = np.float64 if dtype == "float64" else np.float32
    # Equal weights count as 1, so one sender alone has the weight 1.
    weights = [float(w > 0) for w in weights] if len({w for w in weights if w > 0}) == 1 else weights
    total = sum(v * w for v, w in zip(values, weights, strict=True)).astype(wide)
    expected = rounded(total / wide(sum(weights)), dtype, codec)
    assert all(out == group.outs[0] for out in group.outs)
    np.testing.assert_array_equal(read_values(group.outs[0], dtype), expected)


@pytest.mark.parametrize("aggregate", ["clip", "trimmed"])
@pytest.mark.parametrize(("dtype", "codec"), list(itertools.product(DTYPES, CODECS)))
def test_everybody_holds_what_the_rule_makes_of_the_pieces(aggregate: str, dtype: str, codec: str) -> None:
    """Four honest members near 1, one that sends 1000, and one that weighs nothing and sends nothing."""
    rng = np.random.default_rng(3)
    values = [*(1 + rng.integers(-8, 8, N_ELEMS) / 64 for _ in range(4)), np.full(N_ELEMS, 1000.0), np.zeros(N_ELEMS)]
    group = Group(values, [1.0, 2.0, 1.0, 1.0, 1.0, 0.0], dtype, codec, aggregate)
    group.average()
    result = read_values(group.outs[0], dtype)
    assert all(out == group.outs[0] for out in group.outs)
    assert (abs(result - 1) < 0.3).all()
    if aggregate == "trimmed":
        expected = np.sort(values[:5], axis=0)[1:4].mean(axis=0)
        rounding = 2**-8 if dtype == "bfloat16" else 2**-10
        np.testing.assert_allclose(result, expected, rtol=rounding)


@given(data=st.data())
def test_any_weights_give_the_mean_within_the_precision_of_the_sum(data: st.DataObject) -> None:
    weights = data.draw(
        st.lists(st.sampled_from([0.0, 1e-300, 1e-6, 0.1, 1.0, 7.0, 1e6, 1e15]), min_size=2, max_size=5)
    )
    if not any(weights):
        weights[0] = 1.0
    values = [np.arange(1.0, 9.0) * 10.0**i for i in range(len(weights))]
    group = Group(values, weights, "float32", "raw")
    group.average()
    expected = sum(v * (w / max(weights)) for v, w in zip(values, weights, strict=True)) / math.fsum(
        w / max(weights) for w in weights
    )
    np.testing.assert_allclose(read_values(group.outs[0], "float32"), expected, rtol=2e-5)


def test_the_mean_of_some_is_divided_by_their_weights_alone() -> None:
    group = Group([np.full(8, 1.0), np.full(8, 10.0), np.full(8, 100.0)], [1.0, 2.0, 4.0], "float32", "raw")
    owner = next(chunk.owner for chunk in group.plan)
    vault, others = group.vaults[owner], [i for i in range(3) if i != owner]
    vault.open(0)
    vault.add(0, others[1], group.vaults[others[1]].piece_payload(0))
    vault.close(0, 1 << owner | 1 << others[1])
    weight = {i: group.weights[i] for i in (owner, others[1])}
    expected = sum(10.0**i * w for i, w in weight.items()) / sum(weight.values())
    np.testing.assert_allclose(read_values(vault.slot_view(0), "float32"), expected, rtol=1e-6)


def one_chunk(
    values: npt.NDArray[np.float64],
    dtype: str = "float32",
    codec: str = "raw",
    weights: tuple[float, ...] = (1.0, 1.0),
    aggregate: str = "mean",
) -> RegionVault:
    """Return the vault of member 0, which owns the only chunk."""
    plan = [Chunk(0, 0, dtype, 0, values.size)]
    slots = memoryview(bytearray(b"\xaa" * (values.size * ITEM_BYTES[dtype])))
    vault = RegionVault(plan, memoryview(store_values(values, dtype)), slots, weights, 0)
    return vault.use(codec_named(codec), pool_for(aggregate))


# ---------------------------------------------------------------------------------------------------------- memory


class CountingPool:
    """A pool, and how much of it is out."""

    def __init__(self, aggregate: str) -> None:
        self.n_out = 0
        self._pool: Any = pool_for(aggregate)

    def take(self, dtype: str, n_elems: int) -> Any:
        self.n_out += 1
        return self._pool.take(dtype, n_elems)

    def give(self, sums: Any) -> None:
        self.n_out -= 1
        self._pool.give(sums)


@pytest.mark.parametrize("aggregate", AGGREGATE_NAMES)
def test_a_sum_takes_memory_with_its_first_piece_and_gives_it_back(aggregate: str) -> None:
    vault, pool = one_chunk(np.ones(4)), CountingPool(aggregate)
    vault.use(codec_named("raw"), pool)
    vault.open(0)
    assert pool.n_out == 0
    vault.add(0, 1, memoryview(store_values(np.ones(4), "float32")))
    assert pool.n_out == 1
    vault.close(0, 3)
    assert pool.n_out == 0


@pytest.mark.parametrize("aggregate", AGGREGATE_NAMES)
@pytest.mark.parametrize("how", ["discarded", "refused", "overflown"])
def test_a_sum_that_comes_to_nothing_gives_its_memory_back(how: str, aggregate: str) -> None:
    own = np.full(4, np.nan if how == "refused" else 3e38)
    vault, pool = one_chunk(own), CountingPool(aggregate)
    vault.use(codec_named("raw"), pool)
    vault.open(0)
    piece = memoryview(store_values(np.full(4, 3e38 if aggregate == "mean" else -3e38), "float32"))
    if how == "refused":
        with pytest.raises(RoundFailed):
            vault.add(0, 1, piece)
    else:
        vault.add(0, 1, piece)
    if how == "overflown":
        with pytest.raises(RoundFailed):
            vault.close(0, 3)
    vault.discard(0)
    assert pool.n_out == 0
    vault.discard(0)
    assert pool.n_out == 0


@pytest.mark.parametrize("aggregate", AGGREGATE_NAMES)
@pytest.mark.parametrize("codec", CODECS)
def test_a_redone_chunk_knows_nothing_of_the_pieces_before(codec: str, aggregate: str) -> None:
    vault = one_chunk(np.ones(4), codec=codec, weights=(1.0, 1.0, 1.0), aggregate=aggregate)
    for version, (sender, value, mean) in enumerate([(1, 9.0, 5.0), (2, 3.0, 2.0), (1, 5.0, 3.0)]):
        vault.open(0)
        if version == 1:
            vault.add(0, 1, memoryview(bytes(one_chunk(np.full(4, 100.0), codec=codec).piece_payload(0))))
            vault.discard(0)
            vault.open(0)
        vault.add(0, sender, memoryview(bytes(one_chunk(np.full(4, value), codec=codec).piece_payload(0))))
        vault.close(0, 1 | 1 << sender)
        assert read_values(vault.slot_view(0), "float32").tolist() == [mean] * 4


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("what", ["close", "store", "before_overwrite"])
def test_whoever_reads_a_slot_is_told_before_it_changes(codec: str, what: str) -> None:
    vault = one_chunk(np.arange(4.0), codec=codec)
    told: list[tuple[int, bytes]] = []
    vault.before_write = lambda chunk: told.append((chunk, bytes(vault.slot_view(chunk))))
    before = bytes(vault.slot_view(0))
    if what == "close":
        vault.open(0)
        vault.close(0, 1)
    elif what == "store":
        vault.store(0, memoryview(bytes(vault.piece_payload(0))))
    else:
        vault.before_overwrite(0)
    assert told == [(0, before)]


def test_a_result_that_lies_in_its_slot_already_disturbs_nobody() -> None:
    vault = one_chunk(np.arange(4.0))
    told: list[int] = []
    vault.before_write = told.append
    vault.slot_view(0)[:] = vault.input_view(0)
    vault.store(0, IN_PLACE)
    assert told == []


@pytest.mark.parametrize("codec", CODECS)
def test_a_result_is_sent_as_it_is_now_and_not_as_it_was(codec: str) -> None:
    vault = one_chunk(np.arange(4.0), codec=codec)
    vault.open(0)
    vault.close(0, 1)
    first = bytes(vault.result_payload(0))
    assert bytes(vault.result_payload(0)) == first
    other = one_chunk(np.arange(4.0) + 1, codec=codec)
    vault.store(0, memoryview(bytes(other.piece_payload(0))))
    assert bytes(vault.result_payload(0)) == bytes(other.piece_payload(0)) != first


def test_raw_payloads_are_the_memory_itself() -> None:
    vault = one_chunk(np.arange(4.0))
    vault.slot_view(0)[:4] = b"wxyz"
    assert vault.result_payload(0)[:4] == b"wxyz"
    piece = vault.piece_payload(0)
    vault.input_view(0)[:4] = b"abcd"
    assert piece[:4] == b"abcd"


def test_the_trainers_values_are_never_written() -> None:
    rng = np.random.default_rng(2)
    group = Group([rng.normal(size=N_ELEMS) for _ in range(3)], [1.0, 2.0, 0.0], "float32", "raw")
    before = [bytes(memory) for memory in group.inputs]
    group.average()
    assert group.inputs == before


# ------------------------------------------------------------------------------------------------------ what is refused


THREE = [Chunk(i, i, "float32", 400 * i, 100) for i in range(3)]
ROUND = RoundId(b"r" * 16)
PIECE = Header(Kind.PIECE, 0, member=0, chunk=0, length=400, version=0, round_id=ROUND, contributors=0)
RESULT = Header(Kind.CHUNK, 0, member=1, chunk=1, length=400, version=0, round_id=ROUND, contributors=0b111)


def judged(head: bytes) -> str:
    """Return what refuses a record from member 1 to member 0 of three, as its header passes each judge in turn."""
    memory = memoryview(bytearray(1200))
    vault = RegionVault(THREE, memory, memory, [1.0] * 3, 0).use(codec_named("raw"), AccumulatorPool())
    machine = Exchange(RoundPlan(3, 0, (0, 1, 2), 0b111, 0b111, deadline=60.0, progress_s=2.0), vault, 0.0)
    machine.start(0.0)
    payload = memoryview(store_values(np.ones(100), "float32"))
    try:
        header = unpack_header(head)
        if header.round_id != ROUND:
            return "no such round: dropped"
        if why := vault.accepts(header.chunk, header.member, header.length, header.codec):
            return f"plan: {why}"
        where = 1, header.chunk, header.version
        if header.kind is Kind.PIECE:
            wanted = machine.wants_piece(*where)
            machine.on_piece(0.0, *where, payload)
        else:
            wanted = machine.wants_result(*where)
            machine.on_result(0.0, *where, header.contributors, payload)
    except PeerError as error:
        return f"peer: {error}"
    return "taken" if wanted else "not wanted: read and dropped"


@pytest.mark.parametrize(
    ("record", "field", "values", "verdict"),
    [
        (PIECE, "kind", [0, 3], "peer: .* announces 400 bytes: it carries none"),
        (PIECE, "kind", [5, 255], "peer: there is no record of kind"),
        (PIECE, "kind", [2], "peer: it sends chunk 0, version 0, which I am still writing"),
        (PIECE, "codec", [1, 2, 255], "plan: codec .*; this run uses raw"),
        (PIECE, "member", [1, 2, 65535], "plan: .* it belongs to member 0"),
        (PIECE, "chunk", [1, 2], "plan: .* it belongs to member"),
        (PIECE, "chunk", [3, 2**32 - 1], "plan: chunk .* of a plan with 3 chunks"),
        (PIECE, "length", [0, 399, 401, 1 << 20, 2**32 - 1], "plan: .* bytes for chunk 0; 400 are planned"),
        (PIECE, "version", [1, 7, 2**32 - 1], "peer: .* which I do not write"),
        (PIECE, "round_id", [b"s" * 16, bytes(16)], "no such round: dropped"),
        (PIECE, "contributors", [1, 2**64 - 1], "taken"),  # a piece has one contributor, whoever sent it
        (RESULT, "kind", [0, 3], "peer: .* announces 400 bytes: it carries none"),
        (RESULT, "kind", [5, 255], "peer: there is no record of kind"),
        (RESULT, "kind", [1], "peer: it sends a piece of chunk 1, version 0, which I do not write"),
        (RESULT, "codec", [1, 2, 255], "plan: codec .*; this run uses raw"),
        (RESULT, "member", [0, 2, 65535], "plan: .* it belongs to member 1"),
        (RESULT, "chunk", [0, 2], "plan: .* it belongs to member"),
        (RESULT, "chunk", [3, 2**32 - 1], "plan: chunk .* of a plan with 3 chunks"),
        (RESULT, "length", [0, 399, 401, 1 << 20, 2**32 - 1], "plan: .* bytes for chunk 1; 400 are planned"),
        (RESULT, "version", [1, 2**32 - 1], "not wanted: read and dropped"),  # its plan may be on its way
        (RESULT, "round_id", [b"s" * 16, bytes(16)], "no such round: dropped"),
        (RESULT, "contributors", [0, 0b1000, 2**64 - 1], "peer: contributors .*: members of this round"),
    ],
    ids=lambda value: value.kind.name if isinstance(value, Header) else str(value)[:20],
)
def test_a_header_with_one_wrong_field_is_refused_by(
    record: Header, field: str, values: list[Any], verdict: str
) -> None:
    assert judged(pack_header(record)) == "taken"
    for value in values:
        assert re.match(verdict, judged(pack_header(replace(record, **{field: value})))), value


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_any_header_has_a_verdict(head: bytes) -> None:
    assert judged(head).startswith(("peer: ", "plan: ", "no such round"))


def test_a_compressed_payload_may_be_shorter_but_not_longer_than_planned() -> None:
    vault = one_chunk(np.ones(100), codec="zstd")
    limit = vault.codec.payload_limit("float32", 100)
    assert vault.accepts(0, 0, 0, 2) == vault.accepts(0, 0, 1, 2) == vault.accepts(0, 0, limit, 2) == ""
    assert "are planned" in vault.accepts(0, 0, limit + 1, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("aggregate", AGGREGATE_NAMES)
@pytest.mark.parametrize(("dtype", "codec"), list(itertools.product(DTYPES, CODECS)))
def test_values_that_are_not_finite_cost_whoever_has_them(dtype: str, codec: str, aggregate: str, bad: float) -> None:
    good, spoilt = np.ones(N_ELEMS), np.ones(N_ELEMS)
    spoilt[123] = bad
    payload = memoryview(bytes(one_chunk(spoilt, dtype, codec).piece_payload(0)))

    vault = one_chunk(good, dtype, codec, (1.0, 1.0, 1.0), aggregate)
    vault.open(0)
    with pytest.raises(PeerError, match="element 123"):
        vault.add(0, 1, payload)
    vault.add(0, 2, memoryview(bytes(one_chunk(good + 2, dtype, codec).piece_payload(0))))
    vault.close(0, 0b101)
    assert set(read_values(vault.slot_view(0), dtype)) == {2.0}  # nothing of the bad piece is in the sum

    with pytest.raises(PeerError, match="result for chunk 0 is not finite at element 123"):
        vault.store(0, payload)

    own = one_chunk(spoilt, dtype, codec, aggregate=aggregate)
    own.open(0)
    with pytest.raises(RoundFailed, match="this machine's own values cannot be averaged"):
        own.add(0, 1, memoryview(bytes(one_chunk(good, dtype, codec).piece_payload(0))))


def test_a_result_received_in_place_is_checked_like_any_other() -> None:
    vault = one_chunk(np.ones(4))
    vault.slot_view(0)[:] = store_values(np.array([1, 2, math.inf, 4]), "float32")
    with pytest.raises(PeerError, match="not finite at element 2"):
        vault.store(0, IN_PLACE)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("junk", [b"", b"x", b"\xff" * 400, bytes(401)])
def test_a_payload_of_the_wrong_size_or_shape_costs_its_sender(codec: str, junk: bytes) -> None:
    vault = one_chunk(np.ones(100), codec=codec)
    vault.open(0)
    with pytest.raises(PeerError):
        vault.add(0, 1, memoryview(junk))
    with pytest.raises(PeerError):
        vault.store(0, memoryview(junk))


def test_own_values_do_not_matter_where_they_do_not_count() -> None:
    vault = one_chunk(np.full(4, math.nan), weights=(0.0, 1.0))
    vault.open(0)
    vault.add(0, 1, memoryview(store_values(np.full(4, 5.0), "float32")))
    vault.close(0, 0b10)
    assert read_values(vault.slot_view(0), "float32").tolist() == [5.0] * 4


def test_a_sum_that_overflows_fails_the_round_and_not_a_peer() -> None:
    vault = one_chunk(np.full(4, 3e38))
    vault.open(0)
    vault.add(0, 1, memoryview(store_values(np.full(4, 3e38), "float32")))
    with pytest.raises(RoundFailed, match="too large"):
        vault.close(0, 3)
