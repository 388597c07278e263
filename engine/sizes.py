"""Sizes that a worker takes when it is told none: what suits a CPU does not suit a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from cluster.config import WorkerConfig
from cluster.errors import StartError
from engine.memory import free_bytes

BLOCK_TOKENS: Final = {"cpu": 16, "cuda": 64}
"""The copy engine of a GPU fetches tiles of 64 keys or more, where a block holds as many."""

STEP_TOKENS: Final = {"cpu": 512, "cuda": 2048}
"""A GPU computes 512 tokens of a small model faster than their kernels are launched."""

CPU_KV_BYTES: Final = 1 << 30
GPU_KV_SHARE: Final = 0.4
"""Of the memory that is free once the weights are there: two workers that share a GPU, and start
side by side, leave each other room for their steps."""


def settled(config: WorkerConfig, device: torch.device) -> WorkerConfig:
    """With a block size and a token budget."""
    return replace(
        config,
        block_size=config.block_size or BLOCK_TOKENS[device.type],
        max_num_batched_tokens=config.max_num_batched_tokens or STEP_TOKENS[device.type],
    )


def kv_blocks(config: WorkerConfig, block_bytes: int, device: torch.device) -> int:
    """How many KV blocks a worker has. To be asked when the weights are there. Raises StartError
    for memory that holds none."""
    if config.num_blocks:
        return config.num_blocks
    memory = config.kv_cache_memory_bytes
    if not memory:
        on_gpu = device.type == "cuda"
        memory = int(GPU_KV_SHARE * free_bytes(device)) if on_gpu else CPU_KV_BYTES
    if memory < block_bytes:
        raise StartError(
            f"{memory} bytes for KV hold no block of {block_bytes} bytes: more "
            "--kv-cache-memory-bytes"
        )
    return memory // block_bytes
