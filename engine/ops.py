"""Ops: what a decoder computes around attention, once for each kind of kernels.

    torch    plain torch, any device: the definition that the others are held to
    native   C++ for the CPU: float32 activations, weights in float32, bfloat16 or int8
    triton   fused kernels for CUDA, matrix products by torch

Chosen once per worker by `engine.backend`; the model and the stages never ask which.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from engine.layers.attention import Write, written
from engine.layers.linear import Linear, TorchGated, TorchLinear, swiglu
from engine.layers.norm import rms_norm
from engine.layers.rope import rotate
from engine.sampler import Candidates, Noise, Plainly


class Ops(Protocol):
    """`dtype` is that of activations, `kv_dtype` that of keys and values."""

    @property
    def name(self) -> str:
        """torch, native or triton: the stages' attention goes with it."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def kv_dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def linear(self, inputs: int, outputs: int, bias: bool = False) -> Linear:
        """An unfilled matrix in the form that this kind computes with."""

    def gated(self, inputs: int, inner: int, bias: bool = False) -> Linear:
        """One of 2 * inner rows, gates above ups: x -> silu(gate) * up [rows, inner]."""

    def embedding(self, rows: int, columns: int) -> Linear:
        """An unfilled table that is only looked up, never multiplied with."""

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x in place; returns RMSNorm(residual) * weight. All [rows, hidden]."""

    def write_heads(
        self,
        qkv: Tensor,
        heads: tuple[int, int],
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        angles: tuple[Tensor, Tensor],
    ) -> Write:
        """What turns qkv [rows, (heads + 2 * kv_heads) * head_dim] into queries and pages.

        `heads` are (heads, kv_heads), `norms` the weights of qk-norm [head_dim], `angles` cosine
        and sine [rows, head_dim / 2] float32.
        """

    def argmax(self, logits: Tensor) -> Tensor:
        """As `engine.layers.argmax`."""

    def draw(self, candidates: Candidates, noise: Noise) -> int:
        """As `engine.sampler.draw`."""


class TorchOps(Plainly):
    """The definition of every op."""

    name = "torch"

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.dtype = self.kv_dtype = dtype
        self.device = torch.device(device)

    def linear(self, inputs: int, outputs: int, bias: bool = False) -> Linear:
        return TorchLinear(inputs, outputs, bias, self.dtype, self.device)

    def gated(self, inputs: int, inner: int, bias: bool = False) -> Linear:
        return TorchGated(inputs, inner, bias, swiglu, self.dtype, self.device)

    def embedding(self, rows: int, columns: int) -> Linear:
        return TorchLinear(columns, rows, False, self.dtype, self.device)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(residual.add_(x), weight, eps)

    def write_heads(
        self,
        qkv: Tensor,
        heads: tuple[int, int],
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        angles: tuple[Tensor, Tensor],
    ) -> Write:
        count, kv_count = heads
        parts = qkv.view(len(qkv), count + 2 * kv_count, -1)
        q, k, v = torch.split(parts, [count, kv_count, kv_count], dim=1)
        if norms is not None:
            q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
        return written(rotate(q, *angles), rotate(k, *angles), v)
