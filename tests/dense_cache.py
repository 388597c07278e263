"""Attention over a contiguous cache: what paged, batched attention must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.model import ModelConfig
from engine.layers.attention import Attend, Write, causal_attention_reference


class DenseCache:
    """Keys and values of one sequence from its first token, contiguous; no pages, no blocks.

    `dtype` is that of its keys and values.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        self._windows = config.windows
        self._scale = config.head_dim**-0.5
        self.shape = (config.kv_heads, config.head_dim)
        empty = torch.empty((2, 0, *self.shape), dtype=dtype)
        self._layers = [empty] * config.layers

    def attend(self, tokens: int) -> Attend:
        """For one forward of the next `tokens` tokens."""
        slots = torch.arange(tokens)

        def attend(layer: int, write: Write) -> Tensor:
            held = self._layers[layer]
            start = held.shape[1]
            keys, values = new = held.new_empty((2, tokens, *held.shape[2:]))
            q = write(keys, values, slots)
            self._layers[layer] = torch.cat((held, new), dim=1)
            k, v = self._layers[layer].to(q.dtype)
            window = self._windows[layer]
            return causal_attention_reference(q, k, v, self._scale, window, start)

        return attend
