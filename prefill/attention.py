"""Causal attention of prompt chunks over a paged prefix, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.batch import Batch, Segment
from engine.cache import KVCache


class PrefillAttention:
    """The `attend` of a step made of prompt chunks.

    Writes the step's keys and values into the pages first: a chunk then attends to its paged prefix
    and to itself in one go. `windows` holds each layer's sliding window, 0 for full attention.
    """

    def __init__(self, cache: KVCache, batch: Batch, windows: tuple[int, ...]) -> None:
        self._cache = cache
        self._batch = batch
        self._windows = windows
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q [rows, heads, head_dim], k and v [rows, kv_heads, head_dim] -> like q."""
        self._cache.write(layer, self._batch.slots, k, v)
        out = torch.empty_like(q)
        for number, segment in enumerate(self._batch.segments):
            out[segment.rows] = self.attend_segment(layer, number, segment, q[segment.rows])
        return out

    def attend_segment(
        self, layer: int, number: int, segment: Segment, q: torch.Tensor
    ) -> torch.Tensor:
        """One sequence's rows q [count, heads, head_dim] over all of its context.

        The query heads of one KV head are folded into the rows, so that keys are read once for the
        whole group instead of being repeated.
        """
        keys = self._cache.keys(layer)[segment.slots].transpose(0, 1)
        values = self._cache.values(layer)[segment.slots].transpose(0, 1)
        count, heads, head_dim = q.shape
        kv_heads = keys.shape[0]
        group = heads // kv_heads
        folded = q.view(count, kv_heads, group, head_dim).permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(
            folded.reshape(1, kv_heads, group * count, head_dim),
            keys[None],
            values[None],
            attn_mask=self._mask(number, segment, self._windows[layer], group),
        )
        out = out.view(kv_heads, group, count, head_dim).permute(2, 0, 1, 3)
        return out.reshape(count, heads, head_dim)

    def _mask(self, number: int, segment: Segment, window: int, group: int) -> torch.Tensor:
        """[group * count, context] bool, True where a row may look."""
        key = (number, window)
        if key not in self._masks:
            row = torch.arange(segment.context - segment.count, segment.context)[:, None]
            column = torch.arange(segment.context)[None, :]
            mask = column <= row
            if window:
                mask &= column > row - window
            self._masks[key] = mask.repeat(group, 1)
        return self._masks[key]
