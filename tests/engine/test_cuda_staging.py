"""DeviceStaging: nobody waits for the device, and nothing is read or reused too early."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from cluster.messages import KVLayout, LayerGroup
from engine.cache import KVCache
from engine.cuda_staging import DESKS
from engine.staging import NOW, TURNS, DeviceBody, passed
from tests.engine.fake_device import FakeDevice, FakeMark

LAYOUT = KVLayout((LayerGroup(2, 3, 4),), "float16")
LAYERS = range(2)
SLOTS = np.array([5, 1, 30], dtype=np.int64)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def filled(gpu: FakeDevice | None = None, device: str = "cpu") -> KVCache:
    cache = KVCache(LAYOUT, 8, 4, device, gpu)
    generator = torch.Generator().manual_seed(1)
    for layer in LAYERS:
        for part in (cache.keys(layer), cache.values(layer)):
            part.copy_(torch.randn(part.shape, generator=generator))
    return cache


def room(cache: KVCache, slots: np.ndarray = SLOTS) -> memoryview:
    return memoryview(bytearray(cache.token_bytes(LAYERS) * len(slots)))


async def fill(cache: KVCache, out: memoryview, slots: np.ndarray = SLOTS) -> None:
    filling = cache.fill(LAYERS, slots, out)
    assert filling is not None
    await filling


async def test_a_mark_is_looked_for_in_a_few_turns_and_then_now_and_then() -> None:
    await passed(NOW)
    mark, looks = FakeMark(False), 0
    done = mark.done

    def look() -> bool:
        nonlocal looks
        looks += 1
        mark.over = looks > TURNS + 2
        return done()

    mark.done = look  # type: ignore[method-assign]
    await passed(mark)
    assert looks == TURNS + 3
    assert not mark.waited


async def test_on_the_host_there_is_nothing_to_await() -> None:
    cache = filled()
    out = room(cache)
    assert cache.fill(LAYERS, SLOTS, out) is None
    assert bytes(out) == bytes(cache.gather(LAYERS, SLOTS))
    assert cache.mark() is NOW
    assert cache.gpu is None


async def test_the_event_loop_goes_on_until_the_chunk_is_there() -> None:
    gpu = FakeDevice(late=True)
    cache = filled(gpu)
    out = room(cache)
    filling = asyncio.create_task(fill(cache, out))
    for _ in range(3 * TURNS):
        await asyncio.sleep(0)
    assert not filling.done()
    assert not any(out), "read before it was there"
    gpu.marks[-1].over = True
    await filling
    assert bytes(out) == bytes(filled().gather(LAYERS, SLOTS))
    assert not gpu.marks[-1].waited


async def test_no_more_are_on_their_way_than_there_is_memory_for() -> None:
    gpu = FakeDevice(late=True)
    cache = filled(gpu)
    rooms = [room(cache) for _ in range(3 * DESKS)]
    fills = [asyncio.create_task(fill(cache, out)) for out in rooms]
    done = 0
    while done < len(fills):
        for _ in range(TURNS):
            await asyncio.sleep(0)
        assert gpu.gathers <= done + DESKS
        gpu.marks[done].over = True
        await asyncio.wait(fills[done : done + 1])
        done += 1
    expected = bytes(filled().gather(LAYERS, SLOTS))
    assert all(bytes(out) == expected for out in rooms)
    once = gpu.pinned_bytes
    gpu.late = False
    await asyncio.gather(*(fill(cache, out) for out in rooms))
    assert gpu.pinned_bytes == once


@pytest.mark.parametrize("turns", [1, 5, 40])
async def test_who_gives_up_has_ended_reading_when_it_is_told(turns: int) -> None:
    gpu = FakeDevice(late=True)
    cache = filled(gpu)
    out = room(cache)
    filling = asyncio.create_task(fill(cache, out))
    for _ in range(turns):
        await asyncio.sleep(0)
    assert gpu.gathers == 1
    filling.cancel()
    await asyncio.wait([filling])
    assert filling.cancelled()
    assert gpu.marks[-1].waited
    assert not any(out)


async def test_who_gives_up_before_its_turn_reads_nothing() -> None:
    gpu = FakeDevice(late=True)
    cache = filled(gpu)
    fills = [asyncio.create_task(fill(cache, room(cache))) for _ in range(DESKS + 1)]
    for _ in range(5):
        await asyncio.sleep(0)
    fills[-1].cancel()
    await asyncio.wait(fills[-1:])
    gpu.late = False
    for mark in gpu.marks:
        mark.over = True
    await asyncio.gather(*fills[:-1])
    assert gpu.gathers == DESKS


async def test_a_device_that_fails_costs_no_memory() -> None:
    gpu = FakeDevice()
    cache = filled(gpu)

    def fail() -> None:
        raise RuntimeError("no device")

    gpu.before_gather = fail
    for _ in range(DESKS + 1):
        with pytest.raises(RuntimeError, match="no device"):
            await fill(cache, room(cache))
    gpu.before_gather = lambda: None
    out = room(cache)
    await fill(cache, out)
    assert bytes(out) == bytes(filled().gather(LAYERS, SLOTS))


async def test_a_failure_that_shows_later_is_raised() -> None:
    gpu = FakeDevice(late=True)
    filling = asyncio.create_task(fill(cache := filled(gpu), room(cache)))
    await asyncio.sleep(0)
    gpu.marks[-1].error = RuntimeError("an illegal address")
    with pytest.raises(RuntimeError, match="illegal address"):
        await filling


def test_memory_that_is_copied_from_is_not_written_to() -> None:
    gpu = FakeDevice(late=True)
    cache, source = KVCache(LAYOUT, 8, 4, gpu=gpu), filled()
    body = bytes(source.gather(LAYERS, SLOTS))
    for _ in range(DESKS):
        cache.scatter(LAYERS, SLOTS, body)
    assert not any(mark.waited for mark in gpu.marks)
    cache.scatter(LAYERS, SLOTS, body)
    assert [mark.waited for mark in gpu.marks] == [True] + [False] * DESKS
    assert bytes(cache.gather(LAYERS, SLOTS)) == body


class There(DeviceBody):
    """A body that never comes to the host."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.content = torch.zeros(size, dtype=torch.uint8)

    def write(self, wire: torch.Tensor) -> None:
        self.content.copy_(wire)

    def read(self) -> torch.Tensor:
        return self.content


async def test_a_body_on_the_device_is_written_and_read_there() -> None:
    gpu = FakeDevice()
    cache, target = filled(gpu), KVCache(LAYOUT, 16, 2, gpu=gpu)
    body = There(cache.token_bytes(LAYERS) * len(SLOTS))
    filling = cache.fill(LAYERS, SLOTS, body)
    assert filling is not None
    await filling
    target.scatter(LAYERS, SLOTS[::-1].copy(), body)
    assert bytes(target.gather(LAYERS, SLOTS[::-1].copy())) == bytes(cache.gather(LAYERS, SLOTS))
    assert bytes(body) == bytes(cache.gather(LAYERS, SLOTS))


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 3, 16, 32])
async def test_on_a_gpu_content_survives(tokens: int) -> None:
    source, target = filled(device="cuda"), KVCache(LAYOUT, 8, 4, "cuda")
    order = np.random.default_rng(tokens)
    here, there = (order.permutation(32)[:tokens] for _ in range(2))
    out = room(source, here)
    torch.cuda._sleep(10_000_000)  # KV that is not there yet: the fill has to be told of it
    for layer in LAYERS:
        source.keys(layer).add_(1)
    await passed(source.mark())
    await fill(source, out, here)
    target.scatter(LAYERS, there, bytes(out))
    for layer in LAYERS:
        for part in (KVCache.keys, KVCache.values):
            moved, original = part(target, layer), part(source, layer)
            assert torch.equal(moved[there], original[here])
            assert not moved[np.setdiff1d(np.arange(32), there)].any()
    expected = filled()
    for layer in LAYERS:
        expected.keys(layer).add_(1)
    assert bytes(out) == bytes(expected.gather(LAYERS, here))


@needs_gpu
async def test_on_a_gpu_a_fill_does_not_wait_for_the_steps() -> None:
    cache = filled(device="cuda")
    torch.cuda._sleep(2_000_000_000)  # about a second of a step
    behind = cache.mark()
    await fill(cache, room(cache))
    assert not behind.done()
    behind.wait()
