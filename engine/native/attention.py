"""Attention over paged keys and values: launchers and their definition in plain torch.

Pages and rows are described once for all back-ends: keys, values [slots, kv_heads, head_dim] of
one layer, slot = block * block_size + offset; `contexts` [segments] int32 counts the tokens of each
sequence, this step's included; `block_table` [segments, width] int32 names its blocks, arbitrary
past the context. `window` counts the tokens that a query sees, itself included; 0 is all. What the
step itself adds is already in the pages. q is float32 and contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.layers.attention import causal_attention_reference
from engine.native import kernels
from engine.native.tensors import MAX_HEAD_DIM, Pages, address, check_head_dim, pages

__all__ = [
    "MAX_HEAD_DIM",
    "attend_prompts",
    "attend_prompts_reference",
    "attend_singles",
    "attend_singles_reference",
    "check_head_dim",
]


def attend_prompts_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    contexts: Tensor,
    block_table: Tensor,
    block_size: int,
    window: int,
    scale: float,
    longest: int,
) -> Tensor:
    out = torch.empty_like(q)
    for begin, end, context, blocks in zip(
        starts[:-1].tolist(), starts[1:].tolist(), contexts.tolist(), block_table, strict=True
    ):
        if begin == end:
            continue
        at = torch.arange(context)
        slots = blocks[at // block_size].long() * block_size + at % block_size
        k, v = keys[slots].to(q.dtype), values[slots].to(q.dtype)
        out[begin:end] = causal_attention_reference(
            q[begin:end], k, v, scale, window, context - (end - begin)
        )
    return out


def attend_prompts(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    contexts: Tensor,
    block_table: Tensor,
    block_size: int,
    window: int,
    scale: float,
    longest: int,
) -> Tensor:
    """Causal attention of packed chunks: q [rows, heads, head_dim] -> as q.

    Segment i has the rows starts[i] .. starts[i + 1] - 1 (int32), which are its last tokens.
    `longest` is for back-ends that launch a grid. Raises ValueError, IndexError.
    """
    rows, heads, head_dim = q.shape
    segments = contexts.shape[0]
    place = _pages(keys, values, heads, head_dim)
    out = torch.empty_like(q)
    wrong = kernels.attend_prompts(
        address("q", q, (rows, heads, head_dim)),
        rows,
        heads,
        keys.shape[1],
        head_dim,
        *place,
        address("starts", starts, (segments + 1,), torch.int32),
        segments,
        *_table(contexts, block_table, segments, block_size),
        window,
        scale,
        out.data_ptr(),
    )
    if wrong >= 0:
        raise _misfit(wrong, contexts, place)
    return out


def attend_singles_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    contexts: Tensor,
    block_table: Tensor,
    block_size: int,
    window: int,
    scale: float,
) -> Tensor:
    starts = torch.arange(q.shape[0] + 1)
    return attend_prompts_reference(
        q, keys, values, starts, contexts, block_table, block_size, window, scale, 1
    )


def attend_singles(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    contexts: Tensor,
    block_table: Tensor,
    block_size: int,
    window: int,
    scale: float,
) -> Tensor:
    """Attention of one row for each sequence, its last: q [n, heads, head_dim] -> as q.

    Raises ValueError, IndexError.
    """
    rows, heads, head_dim = q.shape
    place = _pages(keys, values, heads, head_dim)
    out = torch.empty_like(q)
    wrong = kernels.attend_singles(
        address("q", q, (rows, heads, head_dim)),
        rows,
        heads,
        keys.shape[1],
        head_dim,
        *place,
        *_table(contexts, block_table, rows, block_size),
        window,
        scale,
        out.data_ptr(),
    )
    if wrong >= 0:
        raise _misfit(wrong, contexts, place)
    return out


def _pages(keys: Tensor, values: Tensor, heads: int, head_dim: int) -> Pages:
    kv_heads = keys.shape[1]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    return pages(keys, values, kv_heads, head_dim)


def _table(
    contexts: Tensor, block_table: Tensor, segments: int, block_size: int
) -> tuple[int, int, int, int]:
    if block_size < 1:
        raise ValueError(f"a block holds at least one token, not {block_size}")
    width = block_table.shape[1]
    return (
        address("contexts", contexts, (segments,), torch.int32),
        address("block_table", block_table, (segments, width), torch.int32),
        width,
        block_size,
    )


def _misfit(segment: int, contexts: Tensor, place: Pages) -> IndexError:
    return IndexError(
        f"segment {segment}, a context of {contexts[segment]}: its rows or blocks do not fit, or "
        f"it names a block beyond the {place.slots} slots"
    )
