"""Decoder: one parameterised transformer for Llama, Mistral, Qwen2 and Qwen3.

Tokens come packed: many sequences in one flat batch without padding. Whatever tells sequences
apart, and the KV cache with it, is in the `Attend` that the stage passes in; the model holds
parameters only.

Matrices that read the same input are stored as one: q, k, v as `qkv`, gate and up as `gate_up`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from cluster.model import ModelConfig
from engine.layers.attention import Attend
from engine.layers.linear import Linear, empty_parameter
from engine.layers.norm import RMSNorm
from engine.layers.rope import Rope, rotate

__all__ = ["Attend", "Decoder"]  # what a stage needs: the model, and the attention it takes


class Attention(nn.Module):
    """Projections, qk-norm and RoPE around the attention that is passed in."""

    def __init__(
        self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self._layer = layer
        self._split = (config.heads, config.kv_heads, config.kv_heads)
        self._head_dim = config.head_dim
        queries = config.heads * config.head_dim
        rows = sum(self._split) * config.head_dim
        self.qkv = Linear(config.hidden_size, rows, config.qkv_bias, dtype, device)
        self.o = Linear(queries, config.hidden_size, config.o_bias, dtype, device)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps, dtype, device)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps, dtype, device)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        heads = self.qkv(x).view(x.shape[0], -1, self._head_dim)
        q, k, v = heads.split(self._split, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(self._layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o(out.reshape(x.shape[0], -1))  # type: ignore[no-any-return]

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        sizes = [count * self._head_dim for count in self._split]
        yield from _parts(self.qkv, [f"{prefix}{name}_proj" for name in "qkv"], sizes)
        yield from _parts(self.o, [f"{prefix}o_proj"], [self.o.weight.shape[0]])
        if self.q_norm is not None and self.k_norm is not None:
            yield f"{prefix}q_norm.weight", self.q_norm.weight
            yield f"{prefix}k_norm.weight", self.k_norm.weight


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up = Linear(hidden, 2 * inner, bias, dtype, device)
        self.down = Linear(inner, hidden, bias, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)  # type: ignore[no-any-return]

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        inner = self.down.weight.shape[1]
        yield from _parts(self.gate_up, [f"{prefix}gate_proj", f"{prefix}up_proj"], [inner, inner])
        yield from _parts(self.down, [f"{prefix}down_proj"], [self.down.weight.shape[0]])


class Layer(nn.Module):
    """Attention and MLP, each normed before and added back."""

    def __init__(
        self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype, device)
        self.attention = Attention(config, layer, dtype, device)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype, device)
        self.mlp = MLP(config, dtype, device)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, attend)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{prefix}input_layernorm.weight", self.attention_norm.weight
        yield from self.attention.checkpoint_tensors(f"{prefix}self_attn.")
        yield f"{prefix}post_attention_layernorm.weight", self.mlp_norm.weight
        yield from self.mlp.checkpoint_tensors(f"{prefix}mlp.")


class Decoder(nn.Module):
    """Tokens to logits. Built with uninitialised parameters; `engine.models.load` fills them.

    Inference only: call it inside `torch.inference_mode()`.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.config = config
        self.dtype = dtype
        self.device = device
        table = (config.vocab_size, config.hidden_size)
        self.embedding = empty_parameter(*table, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            Layer(config, layer, dtype, device) for layer in range(config.layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype, device)
        self.head = (
            self.embedding if config.tied else empty_parameter(*table, dtype=dtype, device=device)
        )
        self.rope = Rope(config.rope, config.head_dim, device)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens, positions [tokens] int64 -> hidden states after the last norm [tokens, hidden].

        A position counts from the start of the token's own sequence.
        """
        x = functional.embedding(tokens, self.embedding)
        cos, sin = self.rope.angles(positions)
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        return self.norm(x)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> [rows, vocab] float32. Pass only the rows that sample."""
        return functional.linear(hidden, self.head).float()

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of a Hugging Face checkpoint and the part of a parameter that it fills."""
        yield "model.embed_tokens.weight", self.embedding
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            yield from layer.checkpoint_tensors(f"model.layers.{number}.")
        yield "model.norm.weight", self.norm.weight
        if not self.config.tied:
            yield "lm_head.weight", self.head


def _parts(linear: Linear, names: list[str], rows: list[int]) -> Iterator[tuple[str, Tensor]]:
    """Weight, and bias if any, of each matrix stacked in one Linear."""
    begin = 0
    for name, count in zip(names, rows, strict=True):
        yield f"{name}.weight", linear.weight[begin : begin + count]
        if linear.bias is not None:
            yield f"{name}.bias", linear.bias[begin : begin + count]
        begin += count
