"""TritonOps: a decoder's parts on CUDA. Matrix products are torch's (cuBLAS)."""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.model import ModelConfig
from engine.kernels.argmax import argmax
from engine.kernels.norm import MAX_HIDDEN, add_rms_norm
from engine.kernels.rope_write import rope_write
from engine.kernels.sampling import MAX_VOCAB
from engine.kernels.swiglu import swiglu
from engine.layers.attention import Write
from engine.layers.linear import Linear, TorchGated, TorchLinear
from engine.sampler import Plainly

HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCK_SIZES = (16, 32, 64)
MAX_GROUP = 64  # query heads of one KV head


class TritonOps(Plainly):
    """Activations, weights and KV have one dtype."""

    name = "triton"

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = self.kv_dtype = dtype
        self.device = device

    def linear(self, inputs: int, outputs: int, bias: bool = False) -> Linear:
        return TorchLinear(inputs, outputs, bias, self.dtype, self.device)

    def gated(self, inputs: int, inner: int, bias: bool = False) -> Linear:
        return TorchGated(inputs, inner, bias, swiglu, self.dtype, self.device)

    def embedding(self, rows: int, columns: int) -> Linear:
        return TorchLinear(columns, rows, False, self.dtype, self.device)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return add_rms_norm(x, residual, weight, eps)

    def write_heads(
        self,
        qkv: Tensor,
        heads: tuple[int, int],
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        angles: tuple[Tensor, Tensor],
    ) -> Write:
        q_norm, k_norm = norms or (None, None)

        def write(keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
            return rope_write(qkv, *heads, q_norm, k_norm, eps, *angles, keys, values, slots)

        return write

    def argmax(self, logits: Tensor) -> Tensor:
        return argmax(logits)


def unfit(config: ModelConfig, dtype: torch.dtype, block_size: int) -> str:
    """Why the kernels cannot compute a model; "" if they can."""
    if config.head_dim not in HEAD_DIMS:
        return f"head_dim {config.head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if block_size not in BLOCK_SIZES:
        return f"--block-size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}"
    if config.heads // config.kv_heads > MAX_GROUP:
        return f"{config.heads // config.kv_heads} query heads share a KV head, {MAX_GROUP} may"
    if config.hidden_size > MAX_HIDDEN:
        return f"hidden_size {config.hidden_size} is above {MAX_HIDDEN}"
    if config.vocab_size > MAX_VOCAB:
        return f"vocab_size {config.vocab_size} is above {MAX_VOCAB}"
    if dtype is torch.float32:
        return "--dtype float32 would run on no tensor core: take bfloat16 or float16"
    return ""
