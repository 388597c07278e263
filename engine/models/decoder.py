"""Decoder: one parameterised transformer for Llama, Mistral, Qwen2 and Qwen3.

Tokens come packed: many sequences in one flat batch without padding. Whatever tells sequences
apart, and the KV cache with it, is in the `Attend` that the stage passes in; how things are
computed is in the `Ops`. The model holds parameters and the order of things.

Matrices that read the same input are stored as one: q, k, v as `qkv`, gate and up as `gate_up`.
The residual stream is one tensor, added to in place; what flows beside it is yet to be added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from cluster.model import ModelConfig
from engine.layers.attention import Attend
from engine.layers.linear import Linear, Part, empty_parameter
from engine.layers.rope import Rope
from engine.ops import Ops

Parts = Iterator[tuple[str, Part]]


class Norm(nn.Module):
    """The weight of an RMSNorm."""

    def __init__(self, size: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = empty_parameter(size, dtype=ops.dtype, device=ops.device)
        self.eps = eps

    def parts(self, name: str) -> Parts:
        yield f"{name}.weight", Part(tuple(self.weight.shape), self._fill)

    def _fill(self, first: int, weight: Tensor) -> None:
        self.weight[first : first + len(weight)].copy_(weight)


class Attention(nn.Module):
    """Projections, qk-norm and RoPE around the attention that is passed in."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self._layer = layer
        self._ops = ops
        self._heads = (config.heads, config.kv_heads)
        self._head_dim = config.head_dim
        self._eps = config.norm_eps
        queries = config.heads * config.head_dim
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = ops.linear(config.hidden_size, rows, config.qkv_bias)
        self.o = ops.linear(queries, config.hidden_size, config.o_bias)
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        if config.qk_norm:
            self.q_norm = Norm(config.head_dim, config.norm_eps, ops)
            self.k_norm = Norm(config.head_dim, config.norm_eps, ops)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm.weight, self.k_norm.weight
        write = self._ops.write_heads(self.qkv(x), self._heads, norms, self._eps, angles)
        return self.o(attend(self._layer, write).reshape(len(x), -1))

    def parts(self, prefix: str) -> Parts:
        queries, keys = (count * self._head_dim for count in self._heads)
        yield from _stacked(self.qkv, prefix, {"q_proj": queries, "k_proj": keys, "v_proj": keys})
        yield from _stacked(self.o, prefix, {"o_proj": self.o.outputs})
        if self.q_norm is not None and self.k_norm is not None:
            yield from self.q_norm.parts(f"{prefix}q_norm")
            yield from self.k_norm.parts(f"{prefix}k_norm")


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Source: Shazeer 2020."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up = ops.gated(hidden, inner, bias)
        self.down = ops.linear(inner, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate_up(x))

    def parts(self, prefix: str) -> Parts:
        inner = self.down.inputs
        yield from _stacked(self.gate_up, prefix, {"gate_proj": inner, "up_proj": inner})
        yield from _stacked(self.down, prefix, {"down_proj": self.down.outputs})


class Layer(nn.Module):
    """Attention and MLP, each normed before."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self._ops = ops
        self.attention_norm = Norm(config.hidden_size, config.norm_eps, ops)
        self.attention = Attention(config, layer, ops)
        self.mlp_norm = Norm(config.hidden_size, config.norm_eps, ops)
        self.mlp = MLP(config, ops)

    def forward(
        self, x: Tensor, residual: Tensor, angles: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        """`x` is added to `residual` in place; what is returned is yet to be. [tokens, hidden]"""
        add_norm, eps = self._ops.add_norm, self.mlp_norm.eps
        x = add_norm(x, residual, self.attention_norm.weight, eps)
        x = self.attention(x, angles, attend)
        x = add_norm(x, residual, self.mlp_norm.weight, eps)
        return self.mlp(x)  # type: ignore[no-any-return]

    def parts(self, prefix: str) -> Parts:
        yield from self.attention_norm.parts(f"{prefix}input_layernorm")
        yield from self.attention.parts(f"{prefix}self_attn.")
        yield from self.mlp_norm.parts(f"{prefix}post_attention_layernorm")
        yield from self.mlp.parts(f"{prefix}mlp.")


class Decoder(nn.Module):
    """Tokens to logits. Built with uninitialised parameters; `engine.models.load` fills them.

    Inference only: call it inside `torch.inference_mode()`.
    """

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        vocab, hidden = config.vocab_size, config.hidden_size
        self.head = ops.linear(hidden, vocab)
        self.embedding = self.head if config.tied else ops.embedding(vocab, hidden)
        self.layers = nn.ModuleList(Layer(config, layer, ops) for layer in range(config.layers))
        self.norm = Norm(hidden, config.norm_eps, ops)
        self.rope = Rope(config.rope, config.head_dim, ops.device)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens, positions [tokens] int64 -> hidden states after the last norm [tokens, hidden].

        A position counts from the start of the token's own sequence.
        """
        x = self.embedding.rows(tokens)
        residual = torch.zeros_like(x)
        angles = self.rope.angles(positions)
        for layer in self.layers:
            x = layer(x, residual, angles, attend)
        return self.ops.add_norm(x, residual, self.norm.weight, self.norm.eps)

    @property
    def bytes(self) -> int:
        """What its matrices take, the embedding too."""
        return sum(linear.bytes for linear in {self.head, self.embedding, *self.linears()})

    def linears(self) -> Iterator[Linear]:
        """All but the head, in order."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield from (layer.attention.qkv, layer.attention.o, layer.mlp.gate_up, layer.mlp.down)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> [rows, vocab] float32. Pass only the rows that sample."""
        return self.head(hidden).float()

    def checkpoint_parts(self) -> Parts:
        """Each tensor of a Hugging Face checkpoint and its place here."""
        yield from _stacked(self.embedding, "model.", {"embed_tokens": self.config.vocab_size})
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            yield from layer.parts(f"model.layers.{number}.")
        yield from self.norm.parts("model.norm")
        if not self.config.tied:
            yield from _stacked(self.head, "", {"lm_head": self.config.vocab_size})


def _stacked(linear: Linear, prefix: str, rows: dict[str, int]) -> Parts:
    """Weight, and bias if any, of each matrix stacked in one Linear."""
    first = 0
    for name, count in rows.items():
        fill, fill_bias = (
            partial(_fill, linear.fill, first),
            partial(_fill, linear.fill_bias, first),
        )
        yield f"{prefix}{name}.weight", Part((count, linear.inputs), fill)
        if linear.biased:
            yield f"{prefix}{name}.bias", Part((count,), fill_bias)
        first += count


def _fill(fill: Callable[[int, Tensor], None], offset: int, first: int, rows: Tensor) -> None:
    """Rows of one of the stacked matrices."""
    fill(offset + first, rows)
