"""Sequences with random keys and values on shuffled pages, and what attention must make of them."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.messages import KVLayout, LayerGroup, Request
from engine.batch import Batch, Chunk, Plan
from engine.blocks import Block
from engine.cache import KVCache
from engine.layers.attention import written
from engine.sequence import Sequence

WINDOWS = (0, 5)
HEAD_DIM = 8


def dense(q: Tensor, k: Tensor, v: Tensor, first: int, window: int) -> Tensor:
    """One sequence in float64, written as plainly as can be: row by row, head by head.

    q [rows, heads, head_dim] from position `first` on; k and v [context, kv_heads, head_dim].
    """
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for row in range(q.shape[0]):
        at = first + row
        seen = slice(max(0, at - window + 1) if window else 0, at + 1)
        for head in range(q.shape[1]):
            keys, values = k[seen, head // group], v[seen, head // group]
            weights = torch.softmax(keys @ q[row, head] / q.shape[2] ** 0.5, dim=0)
            out[row, head] = weights @ values
    return out


@dataclass(frozen=True)
class Pages:
    """A step of several sequences: (context before it, rows in it) for each."""

    cache: KVCache
    batch: Batch
    q: Tensor
    k: Tensor
    v: Tensor
    parts: List[tuple[int, Tensor, Tensor]]
    """For each sequence where its rows begin, and its keys and values from position 0 on."""

    @classmethod
    def of(
        cls, shapes: List[tuple[int, int]], heads: int, kv_heads: int, layer: int, block_size: int
    ) -> Pages:
        random = torch.Generator().manual_seed(len(shapes) * 100 + heads)
        layout = KVLayout((LayerGroup(len(WINDOWS), kv_heads, HEAD_DIM),), "float32")
        needed = [-(-(before + rows) // block_size) for before, rows in shapes]
        cache = KVCache(layout, sum(needed) + 3, block_size)
        cache.keys(layer).fill_(float("nan"))  # what nobody wrote must not be looked at
        cache.values(layer).fill_(float("nan"))
        numbers = torch.randperm(cache.blocks, generator=random).tolist()
        chunks, parts, new = [], [], []
        for (before, rows), count in zip(shapes, needed, strict=True):
            sequence = Sequence(Request("r", tuple(range(before + rows))), 1, 0, 0.0)
            sequence.blocks = [Block(numbers.pop(), 0) for _ in range(count)]
            sequence.computed = before
            k, v = torch.randn((2, before + rows, kv_heads, HEAD_DIM), generator=random)
            slots = torch.from_numpy(cache.slots_of(sequence.blocks, 0, before))
            written(k, k[:before], v[:before])(cache.keys(layer), cache.values(layer), slots)
            chunks.append(Chunk(sequence, rows))
            parts.append((before, k, v))
            new.append((k[before:], v[before:]))
        rows = sum(rows for _, rows in shapes)
        return cls(
            cache,
            Batch.of(Plan(tuple(chunks)), cache),
            torch.randn((rows, heads, HEAD_DIM), generator=random),
            torch.cat([k for k, _ in new]),
            torch.cat([v for _, v in new]),
            parts,
        )

    def expected(self, window: int) -> Tensor:
        rows = [self.batch.rows_of(segment) for segment in range(len(self.parts))]
        return torch.cat(
            [
                dense(self.q[at], k, v, first, window)
                for at, (first, k, v) in zip(rows, self.parts, strict=True)
            ]
        )
