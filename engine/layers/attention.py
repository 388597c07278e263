"""Attention as the model sees it, its definition in plain torch, and a cache for one sequence.

A stage passes its own `Attend` (paged, batched); what it must equal is written here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cluster.model import ModelConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]) -> as q.

Called once per layer, in order, with rotated q and k of this forward's tokens. It stores k and v
and attends over all that each token may see, scaled by 1 / sqrt(head_dim).
"""


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


def make_dense_attend(config: ModelConfig) -> Attend:
    """An Attend over one sequence from its first token, with a contiguous cache that grows.

    Each forward's tokens follow those before. The single-process reference of tests and accuracy
    measurements; a new sequence needs a new one.
    """
    cache: list[tuple[Tensor, Tensor] | None] = [None] * config.layers
    scale = config.head_dim**-0.5

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        held = cache[layer]
        start = 0
        if held is not None:
            start = held[0].shape[0]
            k, v = torch.cat((held[0], k)), torch.cat((held[1], v))
        cache[layer] = (k, v)
        return causal_attention_reference(q, k, v, scale, config.windows[layer], start)

    return attend
