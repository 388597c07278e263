"""Sender to Landings, the whole way: every byte, every ending, one release for each handoff."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster import metrics
from cluster.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    HandshakeRefused,
    StartError,
    TransferFailed,
    WorkerLost,
)
from cluster.messages import KVLayout, Landing, LayerGroup, Peer
from engine.blocks import Block, block_keys
from engine.cache import KVCache
from kvtransfer.frames import MAX_BODY, Buffer, Chunk, Manifest, Renew, decode
from kvtransfer.link import FramedLink, Link
from kvtransfer.receiver import Arrived
from kvtransfer.sender import Announcement, Carried, Handoff, Sender
from tests.engine.fake_device import FakeDevice
from tests.kvtransfer.fakes import (
    DECODE_PEER,
    LAYOUT,
    DecodeSide,
    MemoryHost,
    MemoryWire,
    content,
    prefill_hello,
    request,
)
from tests.virtual import clock, on_virtual_time


class Pair:
    """A prefill worker's cache and sender, and the decode worker it sends to."""

    def __init__(
        self,
        prefill_block: int = 16,
        decode_block: int = 4,
        tokens: int = 37,
        layout: KVLayout = LAYOUT,
        chunk_bytes: int = 1 << 20,
        gpu: FakeDevice | None = None,
        **options: int,
    ) -> None:
        self.tokens = tokens
        self.decode = DecodeSide(decode_block, 200 // decode_block + 2, layout, gpu, **options)
        self.host = MemoryHost(self.decode.receiver)
        self.connects = 0
        self.answer_timeout = 60.0
        count = 200 // prefill_block + 2
        self.cache = KVCache(layout, count, prefill_block, gpu=gpu)
        order = np.random.default_rng(3)
        self.blocks = [Block(int(number), 0) for number in order.permutation(count)]
        for layer in range(layout.layers):
            for part in (self.cache.keys(layer), self.cache.values(layer)):
                raw = part.view(torch.uint8).numpy()
                raw[:] = order.integers(0, 256, raw.shape)
        self.released: list[tuple[Handoff, BatonError | None, Carried]] = []
        self.ended = asyncio.Event()
        self.sender = Sender(self.cache, self.connect, self.release, chunk_bytes)

    def connect(self, landing: Landing) -> Link:
        self.connects += 1
        return FramedLink(
            MemoryWire(self.host),
            prefill_hello(layout=self.cache.layout),
            landing.peer,
            answer_timeout=self.answer_timeout,
        )

    def release(self, handoff: Handoff, error: BatonError | None, carried: Carried) -> None:
        self.released.append((handoff, error, carried))
        self.ended.set()

    def open(self, name: str = "r", attempt: int = 1, keys: tuple[bytes, ...] = ()) -> Handoff:
        asked = request(name, self.tokens)
        landing = self.decode.landings.promise(asked, attempt, self.decode.now, keys)
        handoff = Handoff(name, attempt, landing, self.tokens)
        self.sender.open(handoff)
        return handoff

    def announce(self, handoff: Handoff, layers: range, tokens: range) -> None:
        slots = self.cache.slots_of(self.blocks, tokens.start, tokens.stop)
        announcement = Announcement(layers, tokens, slots, self.cache.mark())
        self.sender.announce(*handoff.key, announcement)

    def announce_all(self, handoff: Handoff, step: int = 1000) -> None:
        for start in range(0, self.tokens, step):
            tokens = range(start, min(start + step, self.tokens))
            self.announce(handoff, range(self.cache.layout.layers), tokens)
        self.sender.finish(*handoff.key)

    async def outcome(self) -> BatonError | None:
        """How the one handoff that was opened ended."""
        await self.ended.wait()
        await asyncio.sleep(0)
        assert len(self.released) == 1
        assert len(self.sender) == 0
        return self.released[0][1]

    def started_content(self, name: str = "r", attempt: int = 1) -> bytes:
        site = self.decode.landings.start(name, attempt)
        assert site is not None
        return self.decode.content(site.blocks, 0, self.tokens)

    def content(self) -> bytes:
        return content(self.cache, self.blocks, 0, self.tokens)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    async with pair.sender:
        yield pair


@pytest.mark.parametrize(("here", "there"), [(16, 64), (64, 16), (16, 16), (3, 7), (1, 5)])
@pytest.mark.parametrize("step", [1000, 40, 7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_content_arrives_across_block_sizes_and_chunk_counts(
    here: int, there: int, step: int, dtype: str
) -> None:
    pair = Pair(here, there, 80, KVLayout(LAYOUT.groups, dtype))
    async with pair.sender:
        pair.announce_all(pair.open(), step)
        assert await pair.outcome() is None
    assert pair.decode.sealed == [("r", 1)]
    assert pair.started_content() == pair.content()
    carried = pair.released[0][2]
    assert carried.bytes == len(pair.content())
    assert carried.chunks == 2 * -(-80 // step)  # two layer groups


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1000, 10**6])
async def test_announcements_are_cut_to_size_and_lose_nothing(chunk_bytes: int) -> None:
    pair = Pair(chunk_bytes=chunk_bytes, layout=KVLayout((LayerGroup(5, 3, 2),), "float16"))
    async with pair.sender:
        pair.announce_all(pair.open(), 9)
        assert await pair.outcome() is None
    assert pair.started_content() == pair.content()
    smallest = pair.cache.token_bytes(range(1))
    assert pair.decode.landings.counters["chunks"] >= len(pair.content()) / max(
        chunk_bytes, smallest
    )


@pytest.mark.parametrize("credit", [64, 100, 900])
async def test_no_chunk_exceeds_the_credit_whatever_its_size_should_be(credit: int) -> None:
    pair = Pair(chunk_bytes=10**6, credit=credit)
    async with pair.sender:
        pair.announce_all(pair.open())
        assert await pair.outcome() is None
    assert pair.started_content() == pair.content()


async def test_no_chunk_exceeds_a_frame_whatever_its_size_should_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvtransfer.frames.MAX_BODY", 1000)
    monkeypatch.setattr("kvtransfer.sender.MAX_BODY", 1000)
    pair = Pair(chunk_bytes=10**6)
    async with pair.sender:
        pair.announce_all(pair.open())
        assert await pair.outcome() is None
    assert pair.started_content() == pair.content()


async def test_a_model_whose_kv_fits_no_frame_is_refused_at_the_start() -> None:
    layout = KVLayout((LayerGroup(1, 1, MAX_BODY // 4 + 1),), "bfloat16")
    cache = KVCache(layout, 1, 1)
    with pytest.raises(StartError, match=f"{MAX_BODY + 4} bytes of KV"):
        Sender(cache, lambda landing: pytest.fail("connects"), lambda *_: None)


async def test_layer_by_layer_in_any_order_while_computing(pair: Pair) -> None:
    handoff = pair.open()
    for layer in (2, 0, 1):
        for tokens in (range(20, 37), range(20)):
            pair.announce(handoff, range(layer, layer + 1), tokens)
            await asyncio.sleep(0)
    assert pair.released == []
    pair.sender.finish(*handoff.key)
    assert await pair.outcome() is None
    assert pair.started_content() == pair.content()


async def test_pushing_overlaps_with_computing(pair: Pair) -> None:
    handoff = pair.open()
    pair.announce(handoff, range(3), range(30))
    while pair.decode.landings.counters["chunks"] < 2:
        await asyncio.sleep(0)
    assert pair.released == []


async def test_only_what_the_decoder_lacks_is_sent() -> None:
    pair = Pair(tokens=38)
    keys = tuple(block_keys(request("r", 38).tokens, 4, b"root"))
    async with pair.sender:
        first = pair.open("a", keys=keys)
        pair.announce_all(first)
        await pair.outcome()
        expected = pair.content()
        pair.released.clear()
        pair.ended.clear()
        second = pair.open("b", keys=keys)
        assert second.landing.cached_tokens == 36
        pair.announce_all(second, step=10)
        assert await pair.outcome() is None
    assert pair.released[0][2].bytes == len(expected) // 38 * 2
    assert pair.started_content("b") == expected


async def test_many_handoffs_share_one_link() -> None:
    pair = Pair(tokens=10, decode_block=2)
    async with pair.sender:
        handoffs = [pair.open(f"r{number}") for number in range(8)]
        for handoff in handoffs:
            pair.announce_all(handoff, 3)
        while len(pair.released) < 8:
            await asyncio.sleep(0)
    assert [error for _, error, _ in pair.released] == [None] * 8
    assert pair.connects == 1
    for number in range(8):
        assert pair.started_content(f"r{number}") == pair.content()


async def test_small_credit_only_slows_down() -> None:
    pair = Pair(chunk_bytes=400, credit=450)
    async with pair.sender:
        pair.announce_all(pair.open())
        assert await pair.outcome() is None
    assert pair.decode.receiver.counters["overdrawn"] == 0
    assert pair.started_content() == pair.content()


@pytest.mark.parametrize("steps", range(12))
async def test_cancel_in_every_phase_releases_once_and_reads_nothing_more(steps: int) -> None:
    pair = Pair()
    async with pair.sender:
        handoff = pair.open()
        pair.announce(handoff, range(3), range(30))
        for _ in range(steps):
            await asyncio.sleep(0)
        pair.sender.cancel(*handoff.key)
        pair.sender.cancel(*handoff.key)
        error = await pair.outcome()
        assert isinstance(error, Cancelled)
        pair.cache.gather = None  # type: ignore[method-assign,assignment]
        pair.announce_all(handoff)
        pair.sender.cancel(*handoff.key)
        for _ in range(20):
            await asyncio.sleep(0)
    assert len(pair.released) == 1


@pytest.mark.parametrize("steps", range(40))
async def test_a_cancel_that_races_with_the_end_has_one_outcome(steps: int) -> None:
    pair = Pair()
    async with pair.sender:
        handoff = pair.open()
        pair.announce_all(handoff)
        for _ in range(steps):
            await asyncio.sleep(0)
        pair.sender.cancel(*handoff.key)
        error = await pair.outcome()
    assert error is None or isinstance(error, Cancelled)
    if error is None:
        assert pair.started_content() == pair.content()


async def test_leaving_releases_whatever_is_open() -> None:
    pair = Pair()
    async with pair.sender:
        pair.open("a")
        pair.announce(pair.open("b"), range(3), range(5))
    assert sorted(handoff.request_id for handoff, _, _ in pair.released) == ["a", "b"]
    assert all(isinstance(error, Cancelled) for _, error, _ in pair.released)


async def test_a_lost_worker_fails_the_handoff_and_the_next_one_connects_anew(pair: Pair) -> None:
    handoff = pair.open()
    pair.announce(handoff, range(3), range(10))
    while not pair.decode.landings.counters["chunks"]:
        await asyncio.sleep(0)
    pair.host.close()
    pair.announce_all(handoff)
    assert isinstance(await pair.outcome(), WorkerLost)
    pair.released.clear()
    pair.announce_all(pair.open("again"))
    while not pair.released:
        await asyncio.sleep(0)
    assert pair.released[0][1] is None
    assert pair.connects == 2


async def test_a_loss_while_only_waiting_shows_at_the_next_push(pair: Pair) -> None:
    handoff = pair.open()
    while not pair.host.wires:
        await asyncio.sleep(0)
    pair.host.close()
    pair.announce(handoff, range(3), range(10))
    assert isinstance(await pair.outcome(), WorkerLost)


async def test_a_restarted_decoder_gets_a_new_link_and_the_old_one_is_closed(pair: Pair) -> None:
    pair.announce_all(pair.open())
    assert await pair.outcome() is None
    old = next(iter(pair.sender._links.values()))
    landing = pair.open("next").landing
    newer = Landing("ef" * 16, 1, Peer("d", 99), "memory", 0, 10.0)
    pair.sender.open(Handoff("x", 1, newer, 5))
    while not old.lost:
        await asyncio.sleep(0)
    assert landing.peer == DECODE_PEER
    while len(pair.released) < 3:
        await asyncio.sleep(0)
    errors = {handoff.request_id: error for handoff, error, _ in pair.released}
    assert isinstance(errors["next"], WorkerLost)
    assert isinstance(errors["x"], HandshakeRefused)


async def test_a_stale_attempt_is_told_and_released(pair: Pair) -> None:
    handoff = pair.open()
    pair.decode.landings.promise(request("r", pair.tokens), 2, 0.0)
    pair.announce(handoff, range(3), range(10))
    error = await pair.outcome()
    assert isinstance(error, TransferFailed)
    assert "stale generation" in error.message


async def test_a_landing_that_was_cancelled_is_noticed_by_the_next_push(pair: Pair) -> None:
    handoff = pair.open()
    pair.decode.landings.cancel("r", 1)
    pair.announce(handoff, range(3), range(10))
    error = await pair.outcome()
    assert isinstance(error, TransferFailed)
    assert "unknown landing" in error.message


async def test_what_was_never_announced_never_seals(pair: Pair) -> None:
    handoff = pair.open()
    pair.announce(handoff, range(2), range(37))
    pair.sender.finish(*handoff.key)
    error = await pair.outcome()
    assert isinstance(error, TransferFailed)
    assert "chunks are missing" in error.message
    assert pair.decode.landings.start("r", 1) is None


async def test_damage_is_mended_on_the_way(pair: Pair) -> None:
    damaged: set[int] = set()

    def alter(parts: list[Buffer]) -> list[Buffer]:
        frame = decode(parts)
        if isinstance(frame.fields, Chunk) and frame.fields.index not in damaged:
            damaged.add(frame.fields.index)
            body = bytearray(parts[1])
            body[len(body) // 2] ^= 4
            return [parts[0], body]
        return parts

    pair.host.alter = alter
    pair.announce_all(pair.open(), 10)
    assert await pair.outcome() is None
    assert pair.started_content() == pair.content()
    assert pair.decode.receiver.counters["damaged"] == len(damaged) == 8


@on_virtual_time
async def test_what_handoffs_took_and_what_was_sent_again_is_told() -> None:
    pair = Pair()
    spoilt = 0

    def alter(parts: list[Buffer]) -> list[Buffer]:
        nonlocal spoilt
        if spoilt == 2 or not isinstance(decode(parts).fields, Chunk):
            return parts
        spoilt += 1
        return [parts[0], bytes(len(parts[1]))]

    pair.host.alter = alter
    post = pair.decode.receiver._post
    pair.decode.receiver._post = lambda arrived: delayed(1.5, post, arrived)
    async with pair.sender:
        pair.announce_all(pair.open())
        assert await pair.outcome() is None
        chunks = pair.released[0][2].chunks
        pair.announce_all(pair.open("fails"))
        pair.decode.landings.cancel("fails", 1)
        while len(pair.released) < 2:
            await asyncio.sleep(0.1)
        pair.host.close()
        pair.open("again")  # on a new link
        assert dict(pair.sender.metrics()) == {
            metrics.HANDOFFS_SENT: 1,
            metrics.KV_TRANSFER_SECONDS: 3.0,  # a chunk, the manifest
            metrics.KV_CHUNKS: chunks,
            metrics.KV_CHUNKS_RESENT: 2,
        }
        await asyncio.sleep(1)
        assert pair.connects == 2
        assert dict(pair.sender.metrics())[metrics.KV_CHUNKS_RESENT] == 2


def delayed(seconds: float, function: Callable[..., None], *arguments: object) -> None:
    asyncio.get_running_loop().call_later(seconds, function, *arguments)


async def test_duplicated_frames_change_nothing(pair: Pair) -> None:
    def alter(parts: list[Buffer]) -> list[Buffer]:
        route = next(iter(pair.host.wires))
        if not isinstance(decode(parts).fields, Manifest):
            asyncio.get_running_loop().call_soon(pair.host.receiver.take, route, list(parts))
        return parts

    handoff = pair.open()
    while not pair.host.wires:
        await asyncio.sleep(0)
    pair.host.alter = alter
    pair.announce_all(handoff, 10)
    assert await pair.outcome() is None
    assert pair.started_content() == pair.content()
    assert pair.decode.landings.counters["duplicate_chunks"] == 8


async def test_a_lease_is_kept_alive_while_there_is_nothing_to_send(pair: Pair) -> None:
    given = pair.decode.landings.promise(request("r", pair.tokens), 1, 0.0)
    handoff = Handoff("r", 1, replace(given, lease_s=0.03), pair.tokens)
    renewed = 0

    def alter(parts: list[Buffer]) -> list[Buffer]:
        nonlocal renewed
        renewed += isinstance(decode(parts).fields, Renew)
        return parts

    pair.host.alter = alter
    pair.sender.open(handoff)
    while renewed < 3:
        await asyncio.sleep(0)
    pair.announce_all(handoff)
    assert await pair.outcome() is None
    assert pair.started_content() == pair.content()


def count_renewals(pair: Pair) -> Callable[[], int]:
    renewals = 0

    def alter(parts: list[Buffer]) -> list[Buffer]:
        nonlocal renewals
        renewals += isinstance(decode(parts).fields, Renew)
        return parts

    pair.host.alter = alter
    return lambda: renewals


@on_virtual_time
async def test_announcing_what_the_decoder_has_does_not_delay_renewals() -> None:
    pair = Pair(tokens=38)
    pair.decode.clock = clock
    renewals = count_renewals(pair)
    keys = tuple(block_keys(request("r", 38).tokens, 4, b"root"))
    async with pair.sender:
        pair.announce_all(pair.open("a", keys=keys))
        assert await pair.outcome() is None
        pair.started_content("a")
        pair.released.clear()
        pair.ended.clear()
        second = pair.open("b", keys=keys)
        assert (second.landing.cached_tokens, renewals()) == (36, 0)
        for tokens in range(1, 21):  # a quarter of a lease each
            pair.announce(second, range(3), range(tokens))
            await asyncio.sleep(second.landing.lease_s / 4)
            assert pair.decode.landings.sweep(clock()) == []
        assert 13 <= renewals() <= 15
        pair.announce_all(second)
        assert await pair.outcome() is None


@on_virtual_time
async def test_a_chunk_is_as_good_as_a_renewal() -> None:
    pair = Pair(tokens=38)
    pair.decode.clock = clock
    renewals = count_renewals(pair)
    async with pair.sender:
        handoff = pair.open()
        for token in range(38):
            pair.announce(handoff, range(3), range(token, token + 1))
            await asyncio.sleep(handoff.landing.lease_s / 4)
        assert renewals() == 0
        pair.sender.finish(*handoff.key)
        assert await pair.outcome() is None


@on_virtual_time
async def test_the_lease_is_renewed_while_the_last_chunks_wait_for_credit() -> None:
    pair = Pair(chunk_bytes=6000, credit=6000)
    pair.decode.clock = clock
    post, withheld = pair.decode.receiver._post, list[Arrived]()

    def hold_back(arrived: Arrived) -> None:
        ours = arrived.fields.address.landing == first.landing.id
        withheld.append(arrived) if ours and not withheld else post(arrived)

    pair.decode.receiver._post = hold_back
    async with pair.sender:
        first, second = pair.open("a"), pair.open("b")
        lease = first.landing.lease_s
        await asyncio.sleep(0.2 * lease)
        pair.announce_all(first)
        await asyncio.sleep(0.1 * lease)
        pair.announce_all(second)
        await asyncio.sleep(0.8 * lease)
        assert [len(pair.released), len(withheld)] == [0, 1]
        post(withheld[0])
        while len(pair.released) < 2:
            await asyncio.sleep(0)
    assert [error for _, error, _ in pair.released] == [None, None]


@on_virtual_time
async def test_a_line_may_be_slow_if_it_moves() -> None:
    """All is asked at once, and the last of it answered after several leases."""
    pair = Pair(chunk_bytes=3000)
    pair.decode.clock = clock
    post, moments = pair.decode.receiver._post, [clock()]
    async with pair.sender:
        handoff = pair.open()
        pair.answer_timeout = lease = handoff.landing.lease_s

        def later(arrived: Arrived) -> None:
            moments.append(max(clock(), moments[-1]) + 0.8 * lease)
            asyncio.get_running_loop().call_at(moments[-1], post, arrived)

        pair.decode.receiver._post = later
        pair.announce_all(handoff)
        assert await pair.outcome() is None
    assert clock() - moments[0] > 3 * lease


@on_virtual_time
async def test_a_line_that_stands_still_is_lost_though_it_moved_before() -> None:
    pair = Pair(chunk_bytes=3000)
    post, answered = pair.decode.receiver._post, list[Arrived]()
    async with pair.sender:
        handoff = pair.open()
        pair.answer_timeout = 0.5 * handoff.landing.lease_s

        def once(arrived: Arrived) -> None:
            if not answered:
                answered.append(arrived)
                asyncio.get_running_loop().call_later(pair.answer_timeout / 2, post, arrived)

        pair.decode.receiver._post = once
        pair.announce_all(handoff)
        assert isinstance(await pair.outcome(), WorkerLost)
        assert clock() == pytest.approx(1.5 * pair.answer_timeout, abs=0.1)


async def test_after_the_last_announcement_the_lease_is_the_deadline(pair: Pair) -> None:
    given = pair.decode.landings.promise(request("r", pair.tokens), 1, 0.0)
    handoff = Handoff("r", 1, replace(given, lease_s=0.05), pair.tokens)
    pair.decode.receiver._post = lambda arrived: None  # a decoder that never answers
    pair.sender.open(handoff)
    pair.announce_all(handoff)
    assert isinstance(await pair.outcome(), DeadlineExceeded)


async def test_a_failure_of_our_own_is_released_too(pair: Pair) -> None:
    handoff = pair.open()

    def gather(*_: object) -> memoryview:
        raise RuntimeError("no device")

    pair.cache.fill = gather  # type: ignore[method-assign,assignment]
    pair.announce_all(handoff)
    error = await pair.outcome()
    assert isinstance(error, TransferFailed)
    assert "no device" not in error.message


@pytest.mark.parametrize("step", [1000, 7])
async def test_content_arrives_from_device_to_device(step: int) -> None:
    pair = Pair(gpu=FakeDevice())
    async with pair.sender:
        pair.announce_all(pair.open(), step)
        assert await pair.outcome() is None
    assert pair.started_content() == pair.content()


async def turns(count: int = 100) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_nothing_is_read_and_no_credit_taken_before_the_kv_is_there() -> None:
    gpu = FakeDevice(late=True)
    pair = Pair(gpu=gpu)
    async with pair.sender:
        pair.announce_all(pair.open())
        await turns()
        (link,) = pair.sender._links.values()
        assert isinstance(link, FramedLink) and link._credit is not None
        assert (gpu.gathers, link._credit.free) == (0, link._credit.total)
        gpu.late = False
        gpu.marks[0].over = True
        assert await pair.outcome() is None
    assert pair.started_content() == pair.content()


@pytest.mark.parametrize("reading", [False, True])
async def test_nothing_reads_a_device_after_the_release(reading: bool) -> None:
    gpu = FakeDevice(late=True)
    pair = Pair(gpu=gpu)
    async with pair.sender:
        handoff = pair.open()
        pair.announce(handoff, range(3), range(37))
        await turns()
        if reading:
            gpu.marks[0].over = True
            while gpu.gathers < 2:
                await asyncio.sleep(0)
        read = gpu.gathers
        pair.sender.cancel(*handoff.key)
        assert isinstance(await pair.outcome(), Cancelled)
        assert all(mark.over for mark in gpu.marks[1:])
        await turns()
        assert gpu.gathers == read == 2 * reading
