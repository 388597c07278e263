"""KVCache: where values go, and that the wire form does not depend on blocks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.messages import KVLayout, LayerGroup
from engine.blocks import Block
from engine.cache import KVCache, group_spans
from engine.layers.attention import written
from tests.engine.fake_device import FakeDevice

GROUPS = (LayerGroup(2, 2, 4), LayerGroup(3, 1, 6, window=8))


def blocks(*numbers: int) -> list[Block]:
    return [Block(number, 0) for number in numbers]


def filled(cache: KVCache) -> KVCache:
    """Every element of its own value, as far as the dtype goes."""
    generator = torch.Generator().manual_seed(1)
    for layer in range(cache.layout.layers):
        for part in (cache.keys(layer), cache.values(layer)):
            part.copy_(torch.randn(part.shape, generator=generator))
    return cache


def test_slots_follow_the_block_list() -> None:
    cache = KVCache(KVLayout(GROUPS, "float32"), blocks=8, block_size=4)
    table = blocks(5, 0, 7)
    assert cache.slots_of(table, 0, 12).tolist() == [*range(20, 24), *range(4), *range(28, 32)]
    assert cache.slots_of(table, 3, 9).tolist() == [23, 0, 1, 2, 3, 28]
    assert cache.slots_of(table, 12, 12).tolist() == []


def test_written_keys_and_values_are_seen_at_their_slots() -> None:
    cache = KVCache(KVLayout(GROUPS, "float32"), blocks=4, block_size=4)
    slots = torch.from_numpy(cache.slots_of(blocks(2, 1), 2, 6))
    k, v = torch.randn(4, 1, 6), torch.randn(4, 1, 6)
    written(k, k, v)(cache.keys(3), cache.values(3), slots)
    assert torch.equal(cache.keys(3)[slots], k)
    assert torch.equal(cache.values(3)[slots], v)
    assert cache.keys(3).shape == (16, 1, 6)
    untouched = [layer for layer in range(5) if layer != 3]
    assert not any(cache.keys(layer).any() or cache.values(layer).any() for layer in untouched)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_wire_bytes_are_layers_then_kv_then_tokens_then_heads(dtype: str) -> None:
    cache = filled(KVCache(KVLayout(GROUPS, dtype), blocks=4, block_size=4))
    slots = cache.slots_of(blocks(3, 0), 1, 7)
    payload = cache.gather(range(2, 4), slots)
    rows = torch.from_numpy(slots)
    expected = torch.stack(
        [torch.stack([cache.keys(layer)[rows], cache.values(layer)[rows]]) for layer in (2, 3)]
    )
    assert expected.shape == (2, 2, 6, 1, 6)
    assert bytes(payload) == expected.view(torch.uint8).numpy().tobytes()
    assert len(payload) == 6 * cache.token_bytes(range(2, 4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("here", "there"), [(16, 64), (64, 16), (1, 5), (7, 3)])
@pytest.mark.parametrize("on_host", [True, False])  # False: the way of a device, here on the host
def test_content_survives_a_move_between_block_sizes(
    dtype: str, here: int, there: int, on_host: bool
) -> None:
    layout, tokens = KVLayout(GROUPS, dtype), 130
    gpu = None if on_host else FakeDevice()
    source = filled(KVCache(layout, 256 // here + 1, here, gpu=gpu))
    target = KVCache(layout, 256 // there + 1, there, gpu=gpu)
    order = np.random.default_rng(2)
    slots = [
        cache.slots_of(blocks(*order.permutation(cache.blocks)), 0, tokens)
        for cache in (source, target)
    ]
    for span in group_spans(layout):
        target.scatter(span, slots[1], bytes(source.gather(span, slots[0])))
    for layer in range(layout.layers):
        for part in (KVCache.keys, KVCache.values):
            moved, original = part(target, layer), part(source, layer)
            assert torch.equal(moved[slots[1]], original[slots[0]])
            elsewhere = np.setdiff1d(np.arange(len(moved)), slots[1])
            assert not moved[elsewhere].any()


@pytest.mark.parametrize("on_host", [True, False])
def test_a_range_of_heads_touches_only_those(on_host: bool) -> None:
    layout = KVLayout((LayerGroup(2, 5, 3),), "float16")
    gpu = None if on_host else FakeDevice()
    source, target = filled(KVCache(layout, 4, 4, gpu=gpu)), KVCache(layout, 4, 4, gpu=gpu)
    slots, layers, heads = source.slots_of(blocks(1, 2), 0, 7), range(1, 2), range(1, 4)
    payload = source.gather(layers, slots, heads)
    assert len(payload) == 7 * source.token_bytes(layers, heads)
    target.scatter(layers, slots, payload, heads)
    assert torch.equal(target.keys(1)[slots, 1:4], source.keys(1)[slots, 1:4])
    assert not target.keys(1)[:, [0, 4]].any()
    assert not target.keys(0).any()


def test_layers_across_groups_have_no_common_shape() -> None:
    cache = KVCache(KVLayout(GROUPS, "float32"), 4, 4)
    with pytest.raises(AssertionError, match="not inside one layer group"):
        cache.gather(range(1, 3), np.arange(4))


def test_a_pool_takes_memory_only_as_it_is_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    layout = KVLayout((LayerGroup(2, 4, 64),), "float32")
    cache = KVCache(layout, blocks=4096, block_size=16)  # 256 MiB
    assert resident() - before < 32 << 20
    assert not cache.keys(1)[-1].any()
    cache.keys(0).fill_(1.0)
    assert resident() - before > 32 << 20


def test_a_pool_is_taken_in_small_pages() -> None:
    """Clearing a huge one in each layer would hold a step up."""
    cache = KVCache(KVLayout((LayerGroup(1, 8, 128),), "float32"), blocks=4096, block_size=16)
    cache.keys(0)[0] = 1.0
    where = cache.keys(0).data_ptr()
    maps = re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(encoding="ascii"))
    [ours] = [text for text in maps if _holds(text, where)]
    assert "AnonHugePages:         0 kB" in ours
    assert "nh" in re.search(r"VmFlags: (.*)", ours)[1].split()  # type: ignore[index]


def _holds(mapping: str, address: int) -> bool:
    start, end = (int(text, 16) for text in mapping.split(maxsplit=1)[0].split("-"))
    return start <= address < end
