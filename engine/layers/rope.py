"""Rotary position embedding: from a RopeConfig to frequencies, and from positions to a rotation.

Pairs are (i, i + head_dim / 2), the layout of Hugging Face checkpoints. Angles, cosines and the
rotation itself are float32. Frequencies do not depend on how long a sequence is, so rotated keys
stay valid as it grows and when they are shared.

Source: RoFormer (Su et al. 2021); Llama 3.1's release (llama3); YaRN (Peng et al. 2023), 3.1-3.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cluster.model import RopeConfig


class Rope:
    """Rotates queries and keys by their positions. Holds [head_dim / 2] frequencies, no cache."""

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        self._frequencies = frequencies(config, head_dim).to(device)
        self._scale = config.attention_factor

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine for positions [tokens], each [tokens, head_dim / 2] float32.

        The same for all layers and heads: computed once per forward.
        """
        angle = positions.float()[:, None] * self._frequencies
        return angle.cos() * self._scale, angle.sin() * self._scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [tokens, heads, head_dim]; returns a new tensor of the same dtype."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position for each pair, [head_dim / 2] float32 on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    plain = 1.0 / config.theta**exponents
    if config.type == "linear":
        return plain / config.factor
    if config.type == "llama3":
        return _llama3(config, plain)
    if config.type == "yarn":
        return _yarn(config, plain, head_dim)
    return plain


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Keep fast pairs, slow the slow ones down by the factor, blend in between."""
    turns = config.original_max_len * plain / (2 * math.pi)  # in the trained context
    span = config.high_freq_factor - config.low_freq_factor
    keep = ((turns - config.low_freq_factor) / span).clamp(0.0, 1.0)
    return keep * plain + (1.0 - keep) * plain / config.factor


def _yarn(config: RopeConfig, plain: Tensor, head_dim: int) -> Tensor:
    """As llama3, but blending linearly over the pair's number instead of its frequency."""

    def pair_with(turns: float) -> float:
        length = config.original_max_len / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(config.theta))

    low, high = pair_with(config.beta_fast), pair_with(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    slowed = ((pairs - low) / (high - low)).clamp(0.0, 1.0)
    return slowed * plain / config.factor + (1.0 - slowed) * plain
