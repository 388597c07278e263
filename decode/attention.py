"""Attention of a decode worker's step: single tokens over their paged contexts, then chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from engine.batch import Batch
from engine.cache import KVCache
from engine.layers.attention import Write
from prefill.attention import Kernel, MakeAttend, PrefillAttention, prompts_kernel


class DecodeAttention:
    """The `attend` of a step of a decode worker, in plain torch.

    The one-row segments are padded to the longest context; chunks go the prefill way.
    """

    def __init__(self, cache: KVCache, batch: Batch, windows: tuple[int, ...]) -> None:
        self._cache = cache
        self._batch = batch
        self._windows = windows
        self._chunks = PrefillAttention(cache, batch, windows)
        self._contexts = batch.contexts[: batch.single]
        self._longest = max(batch.lengths[: batch.single], default=0)
        # The mask gives padding no weight, but a NaN spreads even so: never another's.
        column = torch.arange(self._longest)[None, :].expand(batch.single, -1)
        column = column.where(column < self._contexts[:, None], 0)
        blocks = batch.block_table[: batch.single].long().gather(1, column // cache.block_size)
        self._slots = blocks * cache.block_size + column % cache.block_size
        self._masks: dict[int, torch.Tensor] = {}

    def __call__(self, layer: int, write: Write) -> torch.Tensor:
        """-> [rows, heads, head_dim]"""
        q = write(self._cache.keys(layer), self._cache.values(layer), self._batch.slots)
        out = torch.empty_like(q)
        single = self._batch.single
        if single:
            out[:single] = self._attend_singles(layer, q[:single])
        for segment in range(single, len(self._batch.counts)):
            rows = self._batch.rows_of(segment)
            out[rows] = self._chunks.attend_segment(layer, segment, q[rows])
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


class FusedDecodeAttention:
    """The same by at most two kernel calls for each layer: the singles, then all chunks."""

    def __init__(
        self,
        singles: Kernel,
        prompts: Kernel,
        cache: KVCache,
        batch: Batch,
        windows: tuple[int, ...],
    ) -> None:
        self._singles = singles
        self._prompts = prompts
        self._cache = cache
        self._batch = batch
        self._windows = windows
        self._starts = batch.starts[batch.single :] - batch.single
        self._longest = max(batch.counts[batch.single :], default=0)

    def __call__(self, layer: int, write: Write) -> torch.Tensor:
        """-> [rows, heads, head_dim]"""
        cache, batch, single = self._cache, self._batch, self._batch.single
        pages = cache.keys(layer), cache.values(layer)
        q = write(*pages, batch.slots)
        about = cache.block_size, self._windows[layer], q.shape[2] ** -0.5
        parts = []
        if single:
            table = batch.block_table[:single]
            parts.append(self._singles(q[:single], *pages, batch.contexts[:single], table, *about))
        if self._longest:
            contexts, table = batch.contexts[single:], batch.block_table[single:]
            parts.append(
                self._prompts(
                    q[single:], *pages, self._starts, contexts, table, *about, self._longest
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def make_attend(kernels: str) -> MakeAttend:
    """The attention of a decode worker that goes with its Ops."""
    if kernels == "torch":
        return DecodeAttention
    make_singles, prompts = _singles(kernels), prompts_kernel(kernels)
    return lambda cache, batch, windows: FusedDecodeAttention(
        make_singles(), prompts, cache, batch, windows
    )


def _singles(kernels: str) -> Callable[[], Kernel]:
    """Makes, for one step, the `attend_singles` of these kernels."""
    if kernels == "native":
        from engine.native.attention import attend_singles

        return lambda: attend_singles
    from decode.kernels.step import PlannedSingles

    return PlannedSingles
