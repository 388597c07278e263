"""Landings against everything a network and late writers can do to them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster import metrics
from cluster.errors import BlocksExhausted, TransferFailed
from cluster.lifecycle import LandingState
from cluster.messages import KVLayout, Landing, LayerGroup, Request
from engine.blocks import Block, BlockPool, block_keys
from engine.cache import KVCache
from kvtransfer.frames import (
    Ack,
    Address,
    Box,
    Chunk,
    Fields,
    Manifest,
    Reject,
    Renew,
    Sealed,
    combined,
    digest_of,
)
from kvtransfer.landing import Landings, Rejected, Site
from kvtransfer.receiver import Arrived
from tests.kvtransfer.fakes import DECODE_PEER, LAYOUT, content, request

ROOT = b"root"
LEASE = 10.0


class Source:
    """A prefill worker's cache with one request's KV, and its chunks in any cutting."""

    def __init__(self, tokens: int, seed: int, block_size: int = 3) -> None:
        self.tokens = tokens
        blocks = -(-tokens // block_size) + 1
        self.cache = KVCache(LAYOUT, blocks, block_size)
        self.blocks = [Block(number, 0) for number in reversed(range(blocks))]
        random = np.random.default_rng(seed)
        for layer in range(LAYOUT.layers):
            for part in (self.cache.keys(layer), self.cache.values(layer)):
                part.numpy()[:] = random.standard_normal(part.shape)

    def boxes(self, start: int, cuts: Random) -> list[Box]:
        """[start, tokens) of all layers and heads, cut at random."""
        boxes, first = [], 0
        for group in LAYOUT.groups:
            layers = range(first, first + group.layers)
            first += group.layers
            for part in cut(layers, cuts):
                for heads in cut(range(group.kv_heads), cuts):
                    boxes += [
                        Box(part, heads, span) for span in cut(range(start, self.tokens), cuts)
                    ]
        cuts.shuffle(boxes)
        return boxes

    def body(self, box: Box) -> bytes:
        slots = self.cache.slots_of(self.blocks, box.tokens.start, box.tokens.stop)
        return bytes(self.cache.gather(box.layers, slots, box.heads))

    def content(self, stop: int | None = None) -> bytes:
        return content(self.cache, self.blocks, 0, self.tokens if stop is None else stop)


def cut(whole: range, cuts: Random) -> list[range]:
    borders = sorted({whole.start, whole.stop, *(c for c in whole if cuts.random() < 0.3)})
    return [range(a, b) for a, b in pairwise(borders)]


def address_of(landing: Landing, attempt: int) -> Address:
    return Address(landing.id, landing.generation, landing.peer.incarnation, attempt)


class Writer:
    """One attempt's view: its landing, its chunks, and what it has got through."""

    def __init__(self, source: Source, landing: Landing, attempt: int, cuts: Random) -> None:
        self.source, self.landing, self.attempt = source, landing, attempt
        self.address = address_of(landing, attempt)
        boxes = source.boxes(landing.cached_tokens, cuts)
        self.chunks = [Chunk(self.address, i, box, "float32") for i, box in enumerate(boxes)]
        self.bodies = [source.body(box) for box in boxes]
        digest = combined(enumerate(map(digest_of, self.bodies)))
        tokens = range(landing.cached_tokens, source.tokens)
        self.manifest = Manifest(self.address, len(boxes), tokens, digest)
        self.through: set[int] = set()

    def write(self, landings: Landings, index: int, now: float) -> None:
        body = self.bodies[index]
        landings.write(self.chunks[index], body, digest_of(body), now)
        self.through.add(index)


class Bench:
    def __init__(self, block_size: int = 4, blocks: int = 8) -> None:
        self.pool = BlockPool(blocks, block_size)
        self.cache = KVCache(LAYOUT, blocks, block_size)
        self.landings = Landings(self.pool, self.cache, DECODE_PEER, "memory", LEASE)

    def writer(self, tokens: int = 10, name: str = "r", attempt: int = 1, seed: int = 1) -> Writer:
        landing = self.landings.promise(request(name, tokens), attempt, 0.0)
        return Writer(Source(tokens, seed), landing, attempt, Random(seed))

    def keyed(self, tokens: int, name: str) -> Landing:
        asked = request(name, tokens)
        keys = block_keys(asked.tokens, self.pool.block_size, ROOT)
        return self.landings.promise(asked, 1, 0.0, keys)

    def content(self, site: Site) -> bytes:
        return content(self.cache, site.blocks, 0, len(site.request.tokens))


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize("block_size", [1, 4, 5, 16, 64])
@pytest.mark.parametrize("tokens", [1, 3, 16, 33])
def test_sealed_content_equals_the_source_for_any_cut_and_order(
    block_size: int, tokens: int
) -> None:
    bench = Bench(block_size, blocks=40)
    for seed in range(5):
        writer = bench.writer(tokens, f"r{seed}", seed=seed)
        for index in range(len(writer.chunks)):
            writer.write(bench.landings, index, 0.0)
        assert bench.landings.conclude(writer.manifest, 0.0)
        site = bench.landings.start(f"r{seed}", 1)
        assert site is not None
        assert bench.content(site) == writer.source.content()
        bench.pool.release(site.blocks)
    assert bench.pool.counts().free == 40


def test_a_manifest_before_the_last_chunk_is_remembered(bench: Bench) -> None:
    writer = bench.writer()
    last = len(writer.chunks) - 1
    for index in range(last):
        writer.write(bench.landings, index, 0.0)
    assert not bench.landings.conclude(writer.manifest, 0.0)
    assert bench.landings.start("r", 1) is None
    answers: list[Fields] = []
    body = writer.bodies[last]
    arrived = Arrived(
        writer.chunks[last], body, digest_of(body), lambda fields, text: answers.append(fields)
    )
    assert bench.landings.receive(arrived, 0.0) == ("r", 1)
    assert bench.landings.conclude(writer.manifest, 0.0)
    assert answers == [Ack()]


def test_a_manifest_said_again_after_the_start_is_no_failure(bench: Bench) -> None:
    """A sender whose last chunk came late does not know that this chunk has sealed the landing."""
    writer = bench.writer()
    for index in range(len(writer.chunks)):
        writer.write(bench.landings, index, 0.0)
    assert bench.landings.conclude(writer.manifest, 0.0)
    assert bench.landings.start("r", 1) is not None
    assert bench.landings.conclude(writer.manifest, 0.0)
    with pytest.raises(Rejected):
        bench.landings.conclude(replace(writer.manifest, digest=bytes(16)), 0.0)


def test_receive_answers_each_kind_and_tells_of_the_seal_once(bench: Bench) -> None:
    writer = bench.writer()
    answers: list[tuple[Fields, str]] = []

    def receive(fields: Chunk | Manifest | Renew, body: bytes = b"") -> tuple[str, int] | None:
        arrived = Arrived(fields, body, digest_of(body), lambda *answer: answers.append(answer))
        return bench.landings.receive(arrived, 1.0)

    told = [receive(c, b) for c, b in zip(writer.chunks, writer.bodies, strict=True)]
    assert not any(told)
    assert receive(Renew(writer.address)) is None
    assert receive(replace(writer.manifest, digest=bytes(16))) is None
    assert receive(writer.manifest) == ("r", 1)
    assert receive(writer.manifest) is None
    assert answers[: len(writer.chunks) + 1] == [(Ack(), "")] * (len(writer.chunks) + 1)
    assert answers[-3:] == [
        (Reject(), "manifest does not match"), (Sealed(), ""), (Sealed(), "")
    ]  # fmt: skip
    assert bench.landings.rejected == {"manifest does not match": 1}


def rename(chunk: Chunk, **changes: object) -> Chunk:
    return replace(chunk, address=chunk.address._replace(**changes))  # type: ignore[arg-type]


def shifted(chunk: Chunk, **ranges: range) -> Chunk:
    return replace(chunk, box=replace(chunk.box, **ranges))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: rename(c, landing="cd" * 16), "unknown landing"),
        (lambda c: rename(c, generation=2), "stale generation"),
        (lambda c: rename(c, generation=0), "stale generation"),
        (lambda c: rename(c, incarnation=1), "wrong incarnation"),
        (lambda c: rename(c, attempt=2), "stale attempt"),
        (lambda c: replace(c, dtype="float16"), "wrong dtype"),
        (lambda c: shifted(c, tokens=range(11)), "outside the landing"),
        (lambda c: shifted(c, tokens=range(10, 2**32 - 1)), "outside the landing"),
        (lambda c: shifted(c, layers=range(3)), "outside the landing"),
        (lambda c: shifted(c, layers=range(3, 4)), "outside the landing"),
        (lambda c: shifted(c, layers=range(1), heads=range(3)), "outside the landing"),
        (lambda c: shifted(c, tokens=range(len(c.box.tokens) + 1)), "wrong size"),
    ],
)
def test_a_frame_that_does_not_fit_is_not_written(
    bench: Bench, change: Callable[[Chunk], Chunk], reason: str
) -> None:
    bench.writer()
    box = Box(range(2), range(2), range(5))
    site_id = next(iter(bench.landings._by_id))
    chunk = Chunk(Address(site_id, 1, DECODE_PEER.incarnation, 1), 0, box, "float32")
    body = b"\1" * (5 * bench.cache.token_bytes(box.layers))
    with pytest.raises(Rejected, match=reason):
        bench.landings.write(change(chunk), body, 1, 0.0)
    assert not any(bench.cache.keys(layer).any() for layer in range(3))


def test_overlap_and_index_reuse_are_rejected_a_repeat_is_not_written_twice(bench: Bench) -> None:
    writer = bench.writer()
    writer.write(bench.landings, 0, 0.0)
    chunk, body = writer.chunks[0], writer.bodies[0]
    with pytest.raises(Rejected, match="overlap"):
        bench.landings.write(replace(chunk, index=99), body, digest_of(body), 0.0)
    with pytest.raises(Rejected, match="index used twice"):
        bench.landings.write(chunk, b"\1" * len(body), 1, 0.0)
    before = bytes(bench.cache.gather(chunk.box.layers, np.arange(32)))
    bench.landings.write(chunk, b"\1" * len(body), digest_of(body), 0.0)  # a lie about its digest
    assert bytes(bench.cache.gather(chunk.box.layers, np.arange(32))) == before
    assert bench.landings.counters["duplicate_chunks"] == 1


@pytest.mark.parametrize("changes", [{"chunks": 1}, {"digest": bytes(16)}, {"tokens": range(9)}])
def test_a_manifest_that_does_not_match_seals_nothing(
    bench: Bench, changes: dict[str, object]
) -> None:
    writer = bench.writer()
    for index in range(len(writer.chunks)):
        writer.write(bench.landings, index, 0.0)
    with pytest.raises(Rejected, match="manifest does not match"):
        bench.landings.conclude(replace(writer.manifest, **changes), 0.0)  # type: ignore[arg-type]
    assert bench.landings.start("r", 1) is None
    assert bench.landings.conclude(writer.manifest, 0.0)


def test_a_bad_early_manifest_does_not_seal_when_the_last_chunk_comes(bench: Bench) -> None:
    writer = bench.writer()
    assert not bench.landings.conclude(replace(writer.manifest, digest=bytes(16)), 0.0)
    for index in range(len(writer.chunks)):
        writer.write(bench.landings, index, 0.0)
    assert bench.landings.start("r", 1) is None


def test_promising_again_is_idempotent_rearms_or_is_refused(bench: Bench) -> None:
    asked = request("r", 10)
    first = bench.landings.promise(asked, 2, 0.0)
    assert bench.landings.promise(asked, 2, 5.0) == first
    with pytest.raises(TransferFailed, match="attempt 1 is over, 2 is current"):
        bench.landings.promise(asked, 1, 0.0)
    again = bench.landings.promise(asked, 3, 0.0)
    assert again == replace(first, generation=2)
    assert bench.pool.counts().promised == 3


def test_the_attempt_before_cannot_write_after_rearming_and_the_new_one_starts_afresh(
    bench: Bench,
) -> None:
    old = bench.writer(seed=1)
    half = len(old.chunks) // 2
    for index in range(half):
        old.write(bench.landings, index, 0.0)
    new = bench.writer(attempt=2, seed=2)
    for index in range(half, len(old.chunks)):
        with pytest.raises(Rejected, match="stale generation"):
            old.write(bench.landings, index, 0.0)
    for index in range(len(new.chunks)):
        new.write(bench.landings, index, 0.0)
    with pytest.raises(Rejected, match="stale generation"):
        bench.landings.conclude(old.manifest, 0.0)
    assert bench.landings.conclude(new.manifest, 0.0)
    site = bench.landings.start("r", 2)
    assert site is not None
    assert bench.content(site) == new.source.content()


def test_a_longer_prompt_or_a_sealed_landing_gets_a_new_one(bench: Bench) -> None:
    first = bench.landings.promise(request("r", 10), 1, 0.0)
    longer = bench.landings.promise(request("r", 11), 2, 0.0)
    assert longer.id != first.id
    writer = Writer(Source(11, 1), longer, 2, Random(1))
    for index in range(len(writer.chunks)):
        writer.write(bench.landings, index, 0.0)
    assert bench.landings.conclude(writer.manifest, 0.0)
    third = bench.landings.promise(request("r", 11), 3, 0.0)
    assert third.id != longer.id
    with pytest.raises(Rejected, match="unknown landing"):
        bench.landings.conclude(writer.manifest, 0.0)
    assert bench.pool.counts().promised == 3
    assert len(bench.landings) == 1


def test_the_prefix_cache_shortens_what_is_sent_and_is_never_written(bench: Bench) -> None:
    first = bench.keyed(10, "a")
    assert first.cached_tokens == 0
    writer = Writer(Source(10, 1), first, 1, Random(1))
    for index in range(len(writer.chunks)):
        writer.write(bench.landings, index, 0.0)
    second = bench.keyed(10, "b")
    assert second.cached_tokens == 0  # nothing is findable before it is sealed
    bench.landings.conclude(writer.manifest, 0.0)
    third = bench.keyed(10, "c")
    assert third.cached_tokens == 8
    chunk = Chunk(address_of(third, 1), 0, Box(range(2), range(2), range(7, 9)), "float32")
    with pytest.raises(Rejected, match="outside the landing"):
        bench.landings.write(chunk, bytes(2 * bench.cache.token_bytes(range(2))), 1, 0.0)
    tail = Writer(Source(10, 1), third, 1, Random(2))
    for index in range(len(tail.chunks)):
        tail.write(bench.landings, index, 0.0)
    assert bench.landings.conclude(tail.manifest, 0.0)
    site = bench.landings.start("c", 1)
    assert site is not None
    assert bench.content(site) == writer.source.content()


def test_with_all_blocks_cached_an_empty_manifest_seals(bench: Bench) -> None:
    writer = Writer(Source(8, 1), bench.keyed(8, "a"), 1, Random(1))
    for index in range(len(writer.chunks)):
        writer.write(bench.landings, index, 0.0)
    bench.landings.conclude(writer.manifest, 0.0)
    landing = bench.keyed(8, "b")
    assert landing.cached_tokens == 8
    empty = Manifest(address_of(landing, 1), 0, range(8, 8), combined([]))
    assert bench.landings.conclude(empty, 0.0)
    bench.landings.cancel("a", 1)
    bench.landings.cancel("b", 1)
    assert bench.pool.counts().cached == 2


def test_a_full_pool_says_so_and_takes_nothing(bench: Bench) -> None:
    bench.keyed(8, "a")
    before = bench.pool.counts()
    with pytest.raises(BlocksExhausted):
        bench.landings.promise(request("b", 100), 1, 0.0)
    assert bench.pool.counts() == before
    assert len(bench.landings) == 1


def test_the_lease_ends_a_promise_and_an_unstarted_seal_and_work_renews_it(bench: Bench) -> None:
    writer = bench.writer()
    writer.write(bench.landings, 0, 9.0)
    bench.landings.renew(writer.address, 18.0)
    assert bench.landings.sweep(27.9) == []
    with pytest.raises(Rejected, match="lease expired"):
        writer.write(bench.landings, 1, 28.0)
    assert [site.key for site in bench.landings.sweep(28.0)] == [("r", 1)]
    assert bench.landings.sweep(28.0) == []
    assert bench.pool.counts().free == 8
    sealed = bench.writer()
    for index in range(len(sealed.chunks)):
        sealed.write(bench.landings, index, 0.0)
    bench.landings.conclude(sealed.manifest, 5.0)
    bench.landings.renew(sealed.address, 14.0)
    assert [site.state for site in bench.landings.sweep(15.0)] == [LandingState.RELEASED]
    assert bench.pool.counts().free == 8
    with pytest.raises(TransferFailed, match="expired") as error:
        bench.landings.start("r", 1)
    assert error.value.code == "lease_expired"


def test_cancel_is_idempotent_and_an_older_one_is_a_no_op(bench: Bench) -> None:
    bench.writer(attempt=2)
    assert not bench.landings.cancel("r", 1)
    assert bench.landings.cancel("r", 2)
    assert not bench.landings.cancel("r", 2)
    assert not bench.landings.cancel("unknown", 1)
    assert bench.pool.counts().free == 8


def test_a_newer_cancel_ends_an_older_landing(bench: Bench) -> None:
    bench.writer(attempt=1)
    assert bench.landings.cancel("r", 2)
    assert bench.pool.counts().free == 8


def test_a_block_that_is_no_longer_promised_is_not_written(bench: Bench) -> None:
    """The last line of defence, were the landing's own checks ever to miss something."""
    writer = bench.writer()
    site = bench.landings._sites["r"]
    bench.pool.revoke(site.blocks)
    bench.pool.promise(8)
    with pytest.raises(Rejected, match="no longer promised"):
        writer.write(bench.landings, 0, 0.0)


LETTERS = ["a", "b", "c"]


class LandingMachine(RuleBasedStateMachine):
    """Three requests fight for six blocks while every old writer keeps writing.

    Running sequences fill the blocks they own with a mark of their own; whatever happens later,
    the mark and every sealed byte must still be there when they are looked at.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(block_size=4, blocks=6)
        self.now = 0.0
        self.seed = 0
        self.writers: list[Writer] = []
        self.current: dict[str, Writer] = {}
        self.expires: dict[str, float] = {}
        self.sealed: set[str] = set()
        self.running: list[tuple[list[Block], int, bytes]] = []

    @rule(name=st.sampled_from(LETTERS), tokens=st.integers(1, 13), step=st.integers(0, 2))
    def promise(self, name: str, tokens: int, step: int) -> None:
        known = self.current.get(name)
        attempt = (known.attempt if known else 1) + step
        if known is not None and (step == 0 or name in "ab"):  # only c may come back longer
            tokens = known.source.tokens
        rearms = known is not None and name not in self.sealed and known.source.tokens == tokens
        try:
            landing = self.bench.landings.promise(request(name, tokens), attempt, self.now)
        except BlocksExhausted:
            if known is not None:
                self.forget(name)
            return
        if known is not None and step == 0:
            assert landing == known.landing
            return
        if rearms:
            assert known is not None
            assert landing == replace(known.landing, generation=known.landing.generation + 1)
        elif known is not None:
            assert landing.id != known.landing.id
        self.forget(name)
        self.seed += 1
        writer = Writer(Source(tokens, self.seed), landing, attempt, Random(self.seed))
        self.writers.append(writer)
        self.current[name] = writer
        self.expires[name] = self.now + LEASE

    def forget(self, name: str) -> None:
        self.current.pop(name, None)
        self.expires.pop(name, None)
        self.sealed.discard(name)

    def name_of(self, writer: Writer) -> str | None:
        return next((name for name, known in self.current.items() if known is writer), None)

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), count=st.integers(1, 30))
    def write(self, data: st.DataObject, count: int) -> None:
        """Any writer that ever was, any of its chunks, again and again."""
        writer = data.draw(st.sampled_from(self.writers))
        for _ in range(count):
            index = data.draw(st.integers(0, len(writer.chunks) - 1))
            self.attempt(
                writer, lambda index=index: writer.write(self.bench.landings, index, self.now)
            )  # type: ignore[misc]

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def write_all(self, data: st.DataObject) -> None:
        writer = data.draw(st.sampled_from(self.writers))
        for index in range(len(writer.chunks)):
            self.attempt(
                writer, lambda index=index: writer.write(self.bench.landings, index, self.now)
            )  # type: ignore[misc]

    def attempt(self, writer: Writer, write: Callable[[], None]) -> None:
        """The write gets through exactly if its writer is the current one and has a lease."""
        name = self.name_of(writer)
        before = len(writer.through)
        try:
            write()
        except Rejected:
            assert name is None or self.now >= self.expires[name] or name in self.sealed
        else:
            assert name is not None and self.now < self.expires[name]
            if name not in self.sealed and len(writer.through) > before:
                self.expires[name] = self.now + LEASE
            self.note_seal(name, writer)

    def note_seal(self, name: str, writer: Writer) -> None:
        """An early manifest may have sealed it with this very write."""
        site = self.bench.landings._sites[name]
        if site.state is LandingState.SEALED and name not in self.sealed:
            assert writer.through == set(range(len(writer.chunks)))
            self.sealed.add(name)
            self.expires[name] = self.now + LEASE

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def conclude(self, data: st.DataObject) -> None:
        writer = data.draw(st.sampled_from(self.writers))
        name = self.name_of(writer)
        try:
            sealed = self.bench.landings.conclude(writer.manifest, self.now)
        except Rejected:
            assert name is None or self.now >= self.expires[name]
        else:
            assert name is not None
            assert sealed == (writer.through == set(range(len(writer.chunks))))
            self.note_seal(name, writer)

    @rule(name=st.sampled_from(LETTERS), offset=st.integers(-1, 1))
    def start(self, name: str, offset: int) -> None:
        known = self.current.get(name)
        attempt = (known.attempt if known else 1) + offset
        try:
            site = self.bench.landings.start(name, attempt)
        except TransferFailed:
            assert known is None or offset
            return
        assert known is not None and not offset
        assert (site is not None) == (name in self.sealed)
        if site is None:
            return
        assert self.bench.content(site) == known.source.content()
        self.forget(name)
        self.seed += 1
        self.run(site.blocks)

    def run(self, blocks: list[Block]) -> None:
        """A sequence that writes its mark all over the blocks it owns."""
        mark, size = self.seed, self.bench.pool.block_size
        slots = self.bench.cache.slots_of(blocks, 0, len(blocks) * size)
        for layer in range(LAYOUT.layers):
            self.bench.cache.keys(layer)[slots] = float(mark)
            self.bench.cache.values(layer)[slots] = float(-mark)
        self.running.append((blocks, mark, content(self.bench.cache, blocks, 0, len(slots))))

    @rule(count=st.integers(1, 3))
    def take(self, count: int) -> None:
        if count <= self.bench.pool.available:
            self.seed += 1
            self.run(self.bench.pool.take(count))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        blocks, _, _ = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.bench.pool.release(blocks)

    @rule(name=st.sampled_from(LETTERS), offset=st.integers(-1, 1))
    def cancel(self, name: str, offset: int) -> None:
        known = self.current.get(name)
        attempt = (known.attempt if known else 1) + offset
        freed = self.bench.landings.cancel(name, attempt)
        assert freed == (known is not None and offset >= 0)
        if freed:
            self.forget(name)

    @rule(seconds=st.floats(0, 6))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def sweep(self) -> None:
        swept = {site.request.id for site in self.bench.landings.sweep(self.now)}
        assert swept == {name for name, end in self.expires.items() if end <= self.now}
        for name in swept:
            self.forget(name)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        counts = self.bench.pool.counts()
        assert counts.free + counts.promised + counts.owned + counts.cached == 6
        size = self.bench.pool.block_size
        sizes = {name: -(-w.source.tokens // size) for name, w in self.current.items()}
        assert counts.promised == sum(n for name, n in sizes.items() if name not in self.sealed)
        assert counts.owned == sum(sizes[name] for name in self.sealed) + sum(
            len(blocks) for blocks, _, _ in self.running
        )
        assert len(self.bench.landings) == len(self.current) == len(self.bench.landings._by_id)

    @invariant()
    def nothing_wrote_to_a_running_sequence(self) -> None:
        for blocks, _, before in self.running:
            slots = len(blocks) * self.bench.pool.block_size
            assert content(self.bench.cache, blocks, 0, slots) == before

    @invariant()
    def what_is_sealed_stays_what_was_sent(self) -> None:
        for name in self.sealed:
            site = self.bench.landings._sites[name]
            assert self.bench.content(site) == self.current[name].source.content()


LandingMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLandings = LandingMachine.TestCase


def test_captured_frames_replayed_after_the_blocks_were_given_on_change_nothing() -> None:
    """vLLM#52234: a reference that went stale after its blocks were re-used."""
    bench = Bench(blocks=3)
    old = bench.writer(12, "old", seed=1)
    for index in range(len(old.chunks)):
        old.write(bench.landings, index, 0.0)
    bench.landings.cancel("old", 1)
    new = bench.writer(12, "new", seed=2)
    for index in range(len(new.chunks)):
        new.write(bench.landings, index, 0.0)
    assert bench.landings.conclude(new.manifest, 0.0)
    for index in range(len(old.chunks)):
        with pytest.raises(Rejected, match="unknown landing"):
            old.write(bench.landings, index, 0.0)
    site = bench.landings.start("new", 1)
    assert site is not None
    assert bench.content(site) == new.source.content()


def calls_in(work: Callable[[], object]) -> int:
    """How many functions were entered, Python's and C's."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    gc.collect()  # or what other tests left behind is cleared away, and counted, meanwhile
    gc.disable()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
        gc.enable()
    return calls


def test_the_ten_thousandth_chunk_is_checked_with_as_little_work_as_the_first() -> None:
    """The step thread has a token for everybody to write meanwhile."""
    tokens = 3334
    bench = Bench(block_size=16, blocks=tokens // 16 + 1)
    landing = bench.landings.promise(request("r", tokens), 1, 0.0)
    address = address_of(landing, 1)
    boxes = [
        Box(range(layer, layer + 1), range(3 if layer == 2 else 2), range(token, token + 1))
        for layer in range(3)
        for token in range(tokens)
    ]
    Random(1).shuffle(boxes)
    bodies = [bytes(bench.cache.token_bytes(box.layers)) for box in boxes]

    def write(index: int) -> None:
        chunk = Chunk(address, index, boxes[index], "float32")
        bench.landings.write(chunk, bodies[index], index, 0.0)

    write(0)
    early = calls_in(lambda: write(1))
    last = len(boxes) - 1
    assert last >= 10_000
    for index in range(2, last):
        write(index)
    assert calls_in(lambda: write(last)) == early
    digest = combined((index, index) for index in range(len(boxes)))
    assert bench.landings.conclude(Manifest(address, len(boxes), range(tokens), digest), 0.0)


def test_what_was_refused_and_what_became_of_landings_is_told(bench: Bench) -> None:
    stale = bench.writer()
    writer = bench.writer(attempt=2)
    for old in (stale.chunks[0], stale.chunks[1]):
        arrived = Arrived(old, b"", 0, lambda fields, text: None)
        bench.landings.receive(arrived, 0.0)
    for index in (0, *range(len(writer.chunks))):
        writer.write(bench.landings, index, 0.0)
    bench.landings.conclude(writer.manifest, 0.0)
    bench.landings.start("r", 2)
    bench.writer(4, "late")
    bench.landings.sweep(LEASE)
    told = dict(bench.landings.metrics())
    assert told[metrics.labelled(metrics.FRAMES_REJECTED, reason="stale generation")] == 2
    assert told[metrics.KV_CHUNKS] == len(writer.chunks)
    assert told[metrics.KV_CHUNKS_REPEATED] == 1
    assert told[metrics.KV_TRANSFER_BYTES] == sum(map(len, writer.bodies))
    assert told[metrics.KV_LEASE_EXPIRED] == 1
    events = {"promised": 2, "rearmed": 1, "sealed": 1, "started": 1, "replaced": 0, "cancelled": 0}
    for event, number in events.items():
        assert told[metrics.labelled(metrics.LANDINGS, event=event)] == number


def test_odd_layouts_need_every_group_to_seal() -> None:
    layout = KVLayout((LayerGroup(1, 1, 2), LayerGroup(2, 3, 1)), "bfloat16")
    pool, cache = BlockPool(4, 4), KVCache(layout, 4, 4)
    landings = Landings(pool, cache, DECODE_PEER, "memory")
    landing = landings.promise(Request("r", (1, 2)), 1, 0.0)
    digests = {}
    for index, box in enumerate(
        [Box(range(1), range(1), range(2)), Box(range(1, 3), range(3), range(2))]
    ):
        manifest = Manifest(
            address_of(landing, 1), index, range(2), combined(digests.items())
        )  # fmt: skip
        assert not landings.conclude(manifest, 0.0)
        body = bytes(2 * cache.token_bytes(box.layers))
        digests[index] = digest_of(body)
        chunk = Chunk(address_of(landing, 1), index, box, "bfloat16")
        landings.write(chunk, body, digests[index], 0.0)
    manifest = Manifest(address_of(landing, 1), 2, range(2), combined(digests.items()))
    assert landings.conclude(manifest, 0.0)
