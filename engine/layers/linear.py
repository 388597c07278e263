"""Linear: a matrix product with parameters that a loader fills."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter for inference: memory is taken, nothing is written."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


@dataclass(frozen=True, slots=True)
class Part:
    """The place of one checkpoint tensor in a model: its shape, and how rows of it get in."""

    shape: tuple[int, ...]
    fill: Callable[[int, Tensor], object]  # the first row's number, and the rows


class Linear(Protocol):
    """y = x W^T + b, with W [outputs, inputs], in whatever form suits the kernel."""

    inputs: int
    outputs: int
    biased: bool

    @property
    def bytes(self) -> int:
        """What one pass over the weights reads."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, inputs] -> [rows, outputs], or half as many columns of a gated W."""

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [n] of W as activations [n, inputs]: W as a table of embeddings."""

    def fill(self, first_row: int, weight: Tensor) -> None:
        """Put [rows, inputs] of a checkpoint into W from `first_row` on."""

    def fill_bias(self, first_row: int, bias: Tensor) -> None: ...


Activation = Callable[[Tensor], Tensor]
"""[rows, 2 * inner] -> [rows, inner]"""


class TorchLinear(nn.Module):
    """W as checkpoints store it, in the dtype of the activations."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.biased = inputs, outputs, bias
        self.weight = empty_parameter(outputs, inputs, dtype=dtype, device=device)
        self.bias = empty_parameter(outputs, dtype=dtype, device=device) if bias else None

    @property
    def bytes(self) -> int:
        return self.weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def rows(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.weight)

    def fill(self, first_row: int, weight: Tensor) -> None:
        self.weight[first_row : first_row + len(weight)].copy_(weight)

    def fill_bias(self, first_row: int, bias: Tensor) -> None:
        assert self.bias is not None
        self.bias[first_row : first_row + len(bias)].copy_(bias)


class TorchGated(TorchLinear):
    """Gate and up as one matrix, gates first, and what becomes of the two: [rows, outputs / 2]."""

    def __init__(
        self,
        inputs: int,
        inner: int,
        bias: bool,
        activation: Activation,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(inputs, 2 * inner, bias, dtype, device)
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self._activation(super().forward(x))


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of each row. The definition. Source: Shazeer 2020."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
