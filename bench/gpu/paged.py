"""Random prompts and contexts in pages, what attention over them must give, and how far off it is.

Slots that nothing may read hold NaN, and entries of the block table that say nothing point far out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from bench.gpu.setting import Setting

_PEAKED: Final = 2.0
"""Standard deviation of the queries: softmax then looks at some keys more than at others, and one
that is left out shows."""

_REFERENCE_ELEMENTS: Final = 1 << 27
"""Scores that the reference holds at once: 1 GiB in float64."""

_NOWHERE: Final = 1 << 29


@dataclass(frozen=True)
class Shape:
    """Of attention, and of the pages."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int = 16
    window: int = 0

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def token_bytes(self) -> int:
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Paged:
    """Segment i has `counts[i]` rows, the last of its first `lengths[i]` tokens."""

    shape: Shape
    q: Tensor  # [rows, heads, head_dim]
    keys: Tensor  # [slots, kv_heads, head_dim]
    values: Tensor
    starts: Tensor
    contexts: Tensor
    block_table: Tensor
    slots: Tensor  # [rows]: where the rows' own keys and values are
    counts: tuple[int, ...]
    lengths: tuple[int, ...]

    def tokens_of(self, segment: int) -> Tensor:
        """The slots [context] of one segment's tokens."""
        token = torch.arange(self.lengths[segment], device=self.keys.device)
        blocks = self.block_table[segment, token // self.shape.block_size].long()
        return blocks * self.shape.block_size + token % self.shape.block_size

    def rows_of(self, segment: int) -> slice:
        start = sum(self.counts[:segment])
        return slice(start, start + self.counts[segment])


def paged(
    setting: Setting,
    shape: Shape,
    counts: Sequence[int],
    lengths: Sequence[int],
    *,
    blocks: int = 0,
    number: int = 0,
) -> Paged:
    """`blocks`: of the pages, if there are to be more than needed."""
    device, random, size = setting.place, setting.random(number), shape.block_size
    widths = [-(-length // size) for length in lengths]
    blocks = max(blocks, sum(widths) + 3)
    order = torch.randperm(blocks, generator=random, device=device)[: sum(widths)].int()
    table = torch.full((len(counts), max(1, *widths)), _NOWHERE, dtype=torch.int32, device=device)
    pages = [
        torch.full(
            (blocks * size, shape.kv_heads, shape.head_dim),
            float("nan"),
            dtype=shape.dtype,
            device=device,
        )
        for _ in range(2)
    ]
    begin, own = 0, []
    for segment, (count, length, width) in enumerate(zip(counts, lengths, widths, strict=True)):
        mine = order[begin : begin + width]
        begin += width
        table[segment, :width] = mine
        token = torch.arange(length, device=device)
        slots = mine[token // size].long() * size + token % size
        for page in pages:
            page[slots] = torch.randn(
                (length, *page.shape[1:]), generator=random, device=device
            ).to(shape.dtype)
        own.append(slots[length - count :] if length else slots.new_full((count,), -1))
    rows = sum(counts)
    q = torch.randn((rows, shape.heads, shape.head_dim), generator=random, device=device)

    def int32(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return Paged(
        shape=shape,
        q=(_PEAKED * q).to(shape.dtype),
        keys=pages[0],
        values=pages[1],
        starts=int32([*accumulate(counts, initial=0)]),
        contexts=int32(lengths),
        block_table=table,
        slots=torch.cat(own),
        counts=tuple(counts),
        lengths=tuple(lengths),
    )


def attended(inputs: Paged, segment: int, rows: slice | None = None) -> Tensor:
    """The definition in float64, of `rows` of a segment or all: [rows, heads, head_dim]."""
    shape = inputs.shape
    count, length = inputs.counts[segment], inputs.lengths[segment]
    slots = inputs.tokens_of(segment)
    q = inputs.q[inputs.rows_of(segment)].double()
    keys, values = inputs.keys[slots].double(), inputs.values[slots].double()
    # [kv_heads, group, rows, head_dim] against [kv_heads, 1, tokens, head_dim]
    grouped = q.view(count, shape.kv_heads, -1, shape.head_dim).permute(1, 2, 0, 3)
    keys, values = keys.permute(1, 2, 0)[:, None], values.transpose(0, 1)[:, None]
    token = torch.arange(length, device=q.device)
    chosen = range(count)[rows or slice(None)]
    step = max(1, _REFERENCE_ELEMENTS // (shape.heads * max(1, length)))
    found = []
    for first in range(chosen.start, chosen.stop, step):
        some = slice(first, min(first + step, chosen.stop))
        row = torch.arange(some.start, some.stop, device=q.device)[:, None] + length - count
        hidden = token > row
        if shape.window:
            hidden |= token <= row - shape.window
        scores = grouped[:, :, some] @ keys * shape.scale
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        found.append((weights @ values).permute(2, 0, 1, 3).reshape(-1, *q.shape[1:]))
    return torch.cat(found)


def error_of(out: Tensor, wanted: Tensor) -> float:
    """The largest relative error of any vector along the last axis; NaN if there is one.

    Not of the whole: one wrong row among thousands must show. Of a vector that should be zero, its
    length.
    """
    if not out.numel():
        return 0.0
    off = (out.double() - wanted.double()).norm(dim=-1)
    length = wanted.double().norm(dim=-1)
    return float((off / length.where(length > 0, 1.0)).max())


def ulp(dtype: torch.dtype) -> float:
    """The step between numbers at 1: what rounding may do to each entry is half of it."""
    return torch.finfo(dtype).eps
