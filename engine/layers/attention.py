"""Attention as the model sees it, and its definition in plain torch.

A stage passes its own `Attend` (paged, batched); what it must equal is written here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Write = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(keys, values [slots, kv_heads, head_dim], slots [tokens] int64) -> q [tokens, heads, head_dim].

Puts this layer's keys and values of the forward's tokens into those slots of one layer's pages, and
returns the queries, rotated like the keys. Called once: it is what the model computes up to there,
so that norm, rotation and write can be one pass over memory.
"""

Attend = Callable[[int, Write], Tensor]
"""(layer, write) -> [tokens, heads, head_dim].

Called once per layer, in order. It says where keys and values go, then attends over all that each
token may see, itself included, scaled by 1 / sqrt(head_dim).
"""


def written(q: Tensor, k: Tensor, v: Tensor) -> Write:
    """The Write of what is computed already; k and v [tokens, kv_heads, head_dim]."""

    def write(keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
        keys.index_copy_(0, slots, k.to(keys.dtype))
        values.index_copy_(0, slots, v.to(values.dtype))
        return q

    return write


def causal_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, q_start: int
) -> Tensor:
    """Causal attention of one sequence, the definition that kernels are held to.

    q [queries, heads, head_dim] are the tokens from position q_start on; k and v
    [keys, kv_heads, head_dim] those from position 0 on, with keys >= q_start + queries. `window`
    counts the tokens a query sees, itself included; 0 is all. Returns as q. Softmax in float32.

    Query heads that share a KV head are folded into the rows, so k and v are not repeated.
    """
    queries, heads, head_dim = q.shape
    keys, kv_heads, _ = k.shape
    group = heads // kv_heads
    rows = q.view(queries, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    rows = rows.reshape(kv_heads, group * queries, head_dim)
    scores = (rows @ k.permute(1, 2, 0)).float() * scale
    scores = scores.view(kv_heads, group, queries, keys)
    at = torch.arange(q_start, q_start + queries, device=q.device)[:, None]
    seen = torch.arange(keys, device=q.device)[None, :]
    hidden = seen > at
    if window:
        hidden |= seen <= at - window
    weights = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1).to(v.dtype)
    out = weights.view(kv_heads, group * queries, keys) @ v.transpose(0, 1)
    return out.view(kv_heads, group, queries, head_dim).permute(2, 0, 1, 3).reshape(q.shape)
