"""NativeOps: a decoder's parts on the CPU by the C++ kernels. Activations are float32."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from cluster.model import ModelConfig
from engine.layers.attention import Write
from engine.layers.linear import Linear, TorchLinear
from engine.native import ops
from engine.native.attention import MAX_HEAD_DIM
from engine.native.draw import draw
from engine.native.linear import PackedLinear, Storage
from engine.sampler import Candidates, Noise


class NativeOps:
    """`storage` is how weights are kept."""

    name = "native"
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, kv_dtype: torch.dtype, storage: Storage) -> None:
        self.kv_dtype = kv_dtype
        self._storage = storage
        _keep_freed_pages()

    def linear(self, inputs: int, outputs: int, bias: bool = False) -> Linear:
        return PackedLinear(inputs, outputs, bias, self._storage)

    def gated(self, inputs: int, inner: int, bias: bool = False) -> Linear:
        return PackedLinear(inputs, 2 * inner, bias, self._storage, gated=True)

    def embedding(self, rows: int, columns: int) -> Linear:
        return TorchLinear(columns, rows, False, self.dtype, self.device)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return ops.add_rms_norm(x, residual, weight, eps)

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
            return ops.rope_write(qkv, *heads, q_norm, k_norm, eps, *angles, keys, values, slots)

        return write

    def argmax(self, logits: Tensor) -> Tensor:
        return ops.argmax(logits)

    def draw(self, candidates: Candidates, noise: Noise) -> int:
        return draw(candidates, noise)


@cache
def _keep_freed_pages() -> None:
    """Have the C library reuse what activations of a prompt took. By default it gives every large
    block back, and faulting it in again took a third of the int8 products of 2,048 rows."""
    m_trim_threshold, m_mmap_threshold, largest = -1, -3, 1 << 30
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(m_mmap_threshold, largest)
        mallopt(m_trim_threshold, largest)


def unfit(config: ModelConfig) -> str:
    """Why the kernels cannot compute a model; "" if they can."""
    if config.head_dim % 8 or config.head_dim > MAX_HEAD_DIM:
        return f"head_dim {config.head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    return ""
