"""A decoder's step for sequences with one new token each, in one call: launcher of decode_step.cpp.

Defined by `Decoder.forward` and `Decoder.logits`, to which it is equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine.batch import Batch
from engine.cache import KVCache
from engine.layers.linear import Linear, TorchLinear
from engine.models.decoder import Decoder, Layer
from engine.native import kernels
from engine.native.linear import PackedLinear
from engine.native.tensors import Pages, address, pages

_UNPACKED = 3  # as decode_step.cpp numbers storages


class DecodeStep:
    """Of one model with its keys and values in the pages of one cache; both stay where they are."""

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        config = model.config
        self._model = model
        self._cache = cache
        self._numbers = config.norm_eps, config.head_dim**-0.5
        self._vocab = model.head.outputs
        self._cos = self._sin = torch.empty(0, config.head_dim // 2)
        self._words = torch.tensor(list(_words(model, cache)))

    def logits(self, batch: Batch) -> Tensor:
        """Of every row [rows, vocab] float32. Raises ValueError, IndexError."""
        rows, width = batch.block_table.shape
        if (longest := max(batch.lengths)) > len(self._cos):
            self._cos, self._sin = self._model.rope.angles(torch.arange(2 * longest))
        logits = torch.empty(rows, self._vocab)
        wrong = kernels.decode_step(
            self._words.data_ptr(),
            *self._numbers,
            rows,
            address("tokens", batch.tokens, (rows,), torch.int64),
            address("positions", batch.positions, (rows,), torch.int64),
            self._cos.data_ptr(),
            self._sin.data_ptr(),
            len(self._cos),
            address("slots", batch.slots, (rows,), torch.int64),
            address("contexts", batch.contexts, (rows,), torch.int32),
            address("block_table", batch.block_table, (rows, width), torch.int32),
            width,
            logits.data_ptr(),
        )
        if wrong >= 0:
            raise IndexError(
                f"row {wrong}: token {batch.tokens[wrong]}, position {batch.positions[wrong]}, "
                f"slot {batch.slots[wrong]} or a block of it does not exist"
            )
        return logits


def _words(model: Decoder, cache: KVCache) -> Iterator[int]:
    """As `Model` of decode_step.cpp."""
    config = model.config
    places = [
        pages(cache.keys(layer), cache.values(layer), config.kv_heads, config.head_dim)
        for layer in range(config.layers)
    ]
    yield from (config.layers, config.heads, config.kv_heads, config.head_dim)
    yield from _matrix(model.embedding)
    yield from _matrix(model.head)
    yield from (model.norm.weight.data_ptr(), *places[0][2:], cache.block_size)
    for layer, place, window in zip(model.layers, places, config.windows, strict=True):
        assert place[2:] == places[0][2:], "layers whose pages differ"
        yield from _layer(layer, place, window)


def _layer(layer: nn.Module, place: Pages, window: int) -> Iterator[int]:
    assert isinstance(layer, Layer)
    attention, mlp = layer.attention, layer.mlp
    for norm in (layer.attention_norm, layer.mlp_norm, attention.q_norm, attention.k_norm):
        yield 0 if norm is None else norm.weight.data_ptr()
    for linear in (attention.qkv, attention.o, mlp.gate_up, mlp.down):
        yield from _matrix(linear)
    yield from (place.keys, place.values, window)


def _matrix(linear: Linear) -> tuple[int, ...]:
    if isinstance(linear, PackedLinear):
        return linear.words()
    assert isinstance(linear, TorchLinear), "an embedding that is not the head too"
    return _UNPACKED, linear.inputs, linear.outputs, linear.weight.data_ptr(), 0, 0, 0
