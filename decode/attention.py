"""Attention of single tokens over their paged contexts, all sequences at once, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.batch import Batch
from engine.cache import KVCache
from prefill.attention import PrefillAttention


class DecodeAttention:
    """The `attend` of a step of a decode worker: one-row segments first, prompt chunks after.

    The one-row segments are padded to the longest context; chunks go the prefill way.
    """

    def __init__(self, cache: KVCache, batch: Batch, windows: tuple[int, ...]) -> None:
        self._cache = cache
        self._batch = batch
        self._windows = windows
        self._chunks = PrefillAttention(cache, batch, windows)
        singles = batch.segments[: batch.single]
        self._longest = max((segment.context for segment in singles), default=0)
        self._contexts = torch.tensor([segment.context for segment in singles])
        self._slots = torch.zeros(len(singles), self._longest, dtype=torch.int64)
        for row, segment in zip(self._slots, singles, strict=True):
            row[: segment.context] = segment.slots
            # The mask gives padding no weight, but a NaN spreads even so: never another's.
            row[segment.context :] = segment.slots[0]
        self._masks: dict[int, torch.Tensor] = {}

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q [rows, heads, head_dim], k and v [rows, kv_heads, head_dim] -> like q."""
        self._cache.write(layer, self._batch.slots, k, v)
        out = torch.empty_like(q)
        single = self._batch.single
        if single:
            out[:single] = self._attend_singles(layer, q[:single])
        for number, segment in enumerate(self._batch.segments[single:]):
            rows = segment.rows
            out[rows] = self._chunks.attend_segment(layer, number, segment, q[rows])
        return out

    def _attend_singles(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """q [singles, heads, head_dim]; the query heads of one KV head are its rows."""
        keys = self._cache.keys(layer)[self._slots].transpose(1, 2)
        values = self._cache.values(layer)[self._slots].transpose(1, 2)
        singles, heads, head_dim = q.shape
        out = F.scaled_dot_product_attention(
            q.view(singles, keys.shape[1], -1, head_dim),
            keys,
            values,
            attn_mask=self._mask(self._windows[layer]),
        )
        return out.reshape(singles, heads, head_dim)

    def _mask(self, window: int) -> torch.Tensor:
        """[singles, 1, 1, longest] bool, True where a token may look."""
        if window not in self._masks:
            column = torch.arange(self._longest)[None, :]
            context = self._contexts[:, None]
            mask = column < context
            if window:
                mask &= column >= context - window
            self._masks[window] = mask[:, None, None, :]
        return self._masks[window]
