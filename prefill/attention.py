"""Attention of prompt chunks over a paged prefix: the plain-torch one, and the kernels' frame."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from engine.batch import Batch
from engine.cache import KVCache
from engine.layers.attention import Attend, Write

Kernel = Callable[..., torch.Tensor]
"""attend_prompts or attend_singles of some kernels; they have the same arguments."""

MakeAttend = Callable[[KVCache, Batch, tuple[int, ...]], Attend]
"""(cache, batch, each layer's sliding window or 0) -> the attention of one step."""


class PrefillAttention:
    """The `attend` of a step made of prompt chunks, in plain torch.

    The step's keys and values go into the pages first: a chunk then attends to its paged prefix and
    to itself in one go.
    """

    def __init__(self, cache: KVCache, batch: Batch, windows: tuple[int, ...]) -> None:
        self._cache = cache
        self._batch = batch
        self._windows = windows
        self._masks: dict[tuple[int, int], torch.Tensor] = {}
        offsets = torch.arange(cache.block_size)
        table = batch.block_table[:, :, None] * cache.block_size + offsets
        self._slots = [
            row.flatten()[:length] for row, length in zip(table, batch.lengths, strict=True)
        ]

    def __call__(self, layer: int, write: Write) -> torch.Tensor:
        """-> [rows, heads, head_dim]"""
        q = write(self._cache.keys(layer), self._cache.values(layer), self._batch.slots)
        out = torch.empty_like(q)
        for segment in range(len(self._slots)):
            rows = self._batch.rows_of(segment)
            out[rows] = self.attend_segment(layer, segment, q[rows])
        return out

    def attend_segment(self, layer: int, segment: int, q: torch.Tensor) -> torch.Tensor:
        """One sequence's rows q [count, heads, head_dim] over all of its context.

        The query heads of one KV head are folded into the rows, so that keys are read once for the
        whole group instead of being repeated.
        """
        slots = self._slots[segment]
        keys = self._cache.keys(layer)[slots].transpose(0, 1)
        values = self._cache.values(layer)[slots].transpose(0, 1)
        count, heads, head_dim = q.shape
        kv_heads = keys.shape[0]
        group = heads // kv_heads
        folded = q.view(count, kv_heads, group, head_dim).permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(
            folded.reshape(1, kv_heads, group * count, head_dim),
            keys[None],
            values[None],
            attn_mask=self._mask(segment, count, self._windows[layer], group),
        )
        out = out.view(kv_heads, group, count, head_dim).permute(2, 0, 1, 3)
        return out.reshape(count, heads, head_dim)

    def _mask(self, segment: int, count: int, window: int, group: int) -> torch.Tensor:
        """[group * count, context] bool, True where a row may look."""
        key = (segment, window)
        if key not in self._masks:
            context = self._batch.lengths[segment]
            row = torch.arange(context - count, context)[:, None]
            column = torch.arange(context)[None, :]
            mask = column <= row
            if window:
                mask &= column > row - window
            self._masks[key] = mask.repeat(group, 1)
        return self._masks[key]


class FusedPrefillAttention:
    """The same by one kernel call for each layer, whatever segments there are."""

    def __init__(
        self,
        kernel: Kernel,
        cache: KVCache,
        batch: Batch,
        windows: tuple[int, ...],
    ) -> None:
        self._kernel = kernel
        self._cache = cache
        self._batch = batch
        self._windows = windows

    def __call__(self, layer: int, write: Write) -> torch.Tensor:
        """-> [rows, heads, head_dim]"""
        cache, batch = self._cache, self._batch
        keys, values = cache.keys(layer), cache.values(layer)
        q = write(keys, values, batch.slots)
        return self._kernel(
            q,
            keys,
            values,
            batch.starts,
            batch.contexts,
            batch.block_table,
            cache.block_size,
            self._windows[layer],
            q.shape[2] ** -0.5,
            batch.longest,
        )


def make_attend(kernels: str) -> MakeAttend:
    """The prompt attention that goes with the worker's Ops."""
    if kernels == "torch":
        return PrefillAttention
    kernel = prompts_kernel(kernels)
    return lambda cache, batch, windows: FusedPrefillAttention(kernel, cache, batch, windows)


def prompts_kernel(kernels: str) -> Kernel:
    """`attend_prompts` of these kernels."""
    if kernels == "native":
        from engine.native import attention as native

        return native.attend_prompts
    from prefill.kernels import attention as triton

    return triton.attend_prompts
