"""Linear: a matrix product with parameters that a loader fills."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter for inference: memory is taken, nothing is written."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class Linear(nn.Module):
    """y = x W^T + b, with W [outputs, inputs] as checkpoints store it."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = empty_parameter(outputs, inputs, dtype=dtype, device=device)
        self.bias = empty_parameter(outputs, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)
