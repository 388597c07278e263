"""RMSNorm over the last dimension, computed in float32 whatever the input's dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.layers.linear import empty_parameter


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * w. The product with w is in the input's dtype.

    Source: Zhang and Sennrich 2019.
    """

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = empty_parameter(size, dtype=dtype, device=device)
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.rms_norm(x.float(), self.weight.shape, eps=self._eps)
        return normed.to(x.dtype) * self.weight
