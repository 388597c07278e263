from __future__ import annotations

import pytest
import torch

from cluster.config import WorkerConfig
from cluster.errors import StartError
from engine import sizes

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_what_is_not_said_depends_on_the_device() -> None:
    told = [sizes.settled(WorkerConfig(), device) for device in (CPU, GPU)]
    assert [(one.block_size, one.max_num_batched_tokens) for one in told] == [(16, 512), (64, 2048)]


def test_what_is_said_holds_on_any_device() -> None:
    config = WorkerConfig(block_size=32, max_num_batched_tokens=100)
    assert sizes.settled(config, CPU) == sizes.settled(config, GPU) == config


@pytest.mark.parametrize(
    ("said", "device", "blocks"),
    [
        ({}, CPU, 1024),
        ({}, GPU, 4000),  # two fifths of what is free
        ({"kv_cache_memory_bytes": 10 << 20}, GPU, 10),
        ({"kv_cache_memory_bytes": (10 << 20) - 1}, CPU, 9),
        ({"num_blocks": 7, "kv_cache_memory_bytes": 10 << 20}, GPU, 7),
    ],
)
def test_blocks_by_number_by_memory_or_by_the_device(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, int], device: torch.device, blocks: int
) -> None:
    monkeypatch.setattr(sizes, "free_bytes", lambda device: 10_000 << 20)
    assert sizes.kv_blocks(WorkerConfig(**said), 1 << 20, device) == blocks


def test_memory_that_holds_no_block() -> None:
    with pytest.raises(StartError, match="1023 bytes for KV hold no block of 1024 bytes"):
        sizes.kv_blocks(WorkerConfig(kv_cache_memory_bytes=1023), 1024, CPU)
