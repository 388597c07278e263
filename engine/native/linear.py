"""PackedLinear: a matrix product whose weights lie as the CPU kernels read them.

Limit   few rows: bytes of the weights / memory bandwidth. Many rows: 2 * rows * weights flops.
Layout  linear.h; kernels in linear.cpp (float32, bfloat16), linear_int8.cpp, linear_pack.cpp.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine import native

Storage = Literal["float32", "bfloat16", "int8"]

_PANEL: Final = 32  # outputs side by side, as in linear.h
_PAIRS: Final = 16  # of gate and up in one panel
_SOURCES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q int8, scales [rows, 1]) of x [rows, n] float32, symmetric, so that x ~ q * scale.

    Below 1e-30 a row is zero; one with a NaN or an infinity gets NaN as its scale.
    """
    largest = x.abs().amax(1, keepdim=True)
    finite = largest.isfinite()
    steps = torch.full_like(largest, 127.0)  # a tensor: number / tensor goes by the reciprocal
    inverse = torch.where(finite & (largest >= 1e-30), steps / largest, 0.0)
    q = torch.where(finite, x, 0.0).mul(inverse).round().to(torch.int8)
    return q, torch.where(finite, largest / steps, float("nan"))


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, storage: Storage) -> Tensor:
    """x [rows, inputs] W^T + b with W [outputs, inputs] rounded as it is stored: the definition.

    Floats are exact up to float32's rounding of sums, which differ in order; int8 to the last bit.
    A gated matrix's product is `engine.layers.linear.swiglu` of it.
    """
    if storage == "int8":
        q, x_scales = quantise_rows(x)
        w, w_scales = quantise_rows(weight.float())
        out = (q.double() @ w.double().T).float() * x_scales * w_scales.T
        return out if bias is None else out + bias
    return functional.linear(x, weight.to(_DTYPES[storage]).float(), bias)


class PackedLinear(nn.Module):
    """y = x W^T + b for float32 x on the CPU; a loader fills W [outputs, inputs] part by part.

    `storage` is how W is kept. Weights: float32 as they are; bfloat16, computed in float32; int8
    with a scale per output, activations then int8 with a scale per row. A `gated` one holds gates
    above as many ups, and gives silu(gate) * up. Raises RuntimeError without native kernels.
    """

    def __init__(
        self, inputs: int, outputs: int, bias: bool, storage: Storage, gated: bool = False
    ) -> None:
        super().__init__()
        if not native.available():
            raise RuntimeError(native.why_not())
        if inputs < 1 or outputs < 1 or storage not in _DTYPES or (gated and outputs % 2):
            raise ValueError(f"no linear layer {inputs} -> {outputs} stored as {storage!r}")
        self.inputs, self.outputs, self.storage = inputs, outputs, storage
        self.biased = bias
        self._gates = outputs // 2 if gated else 0
        panels = -(-outputs // _PANEL)
        depth = -(-inputs // 4) * 4 if storage == "int8" else inputs
        # Not zeroed as a whole: memory is taken when it is filled.
        self._packed = torch.empty(panels, depth * _PANEL, dtype=_DTYPES[storage])
        if depth > inputs:
            self._packed.zero_()
        self._packed[-1].zero_()
        self._bias = torch.zeros(panels * _PANEL)
        quantised = panels * _PANEL if storage == "int8" else 0
        self._scales = torch.zeros(quantised)
        self._sums = torch.zeros(quantised, dtype=torch.int32)

    @property
    def bytes(self) -> int:
        """Memory held, padding included."""
        held = (self._packed, self._bias, self._scales, self._sums)
        return sum(tensor.nbytes for tensor in held)

    def words(self) -> tuple[int, ...]:
        """What a kernel that is made of others needs of it, as `Matrix` of decode_step.cpp."""
        held = (self._packed, self._bias, self._scales, self._sums)
        addresses = (tensor.data_ptr() for tensor in held)
        return list(_DTYPES).index(self.storage), self.inputs, self.outputs, *addresses

    def fill(self, first_row: int, weight: Tensor) -> None:
        """Set rows of W, from first_row on, to weight [rows, inputs] of any float dtype.

        Of a gated one they are all gates or all ups.
        """
        rows = weight.shape[0]
        if weight.shape != (rows, self.inputs) or not self._fits(first_row, rows):
            raise ValueError(
                f"weight {list(weight.shape)} at row {first_row} does not fit "
                f"[{self.outputs}, {self.inputs}]"
            )
        if weight.dtype not in _SOURCES:
            weight = weight.float()
        weight = weight.contiguous()
        pack = getattr(native.kernels, f"pack_{self.storage}")
        where = [self._packed, self._scales, self._sums][: 3 if self.storage == "int8" else 1]
        pack(
            weight.data_ptr(),
            _SOURCES[weight.dtype],
            rows,
            self.inputs,
            first_row,
            self._gates,
            *(tensor.data_ptr() for tensor in where),
        )

    def fill_bias(self, first_row: int, bias: Tensor) -> None:
        """Set b from first_row on."""
        if not self.biased or not self._fits(first_row, len(bias)):
            raise ValueError(f"bias {list(bias.shape)} at row {first_row} does not fit")
        places = torch.arange(first_row, first_row + len(bias))
        if self._gates:
            pair = places % self._gates
            places = pair // _PAIRS * _PANEL + pair % _PAIRS + places // self._gates * _PAIRS
        self._bias[places] = bias.float()

    def _fits(self, first_row: int, rows: int) -> bool:
        last = self._gates if first_row < self._gates else self.outputs
        return 0 <= first_row <= last - rows

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, inputs] float32, contiguous -> [rows, outputs] float32, half of it if gated."""
        rows = x.shape[0]
        if x.dtype != torch.float32 or x.shape != (rows, self.inputs) or not x.is_contiguous():
            raise ValueError(
                f"needs contiguous float32 [rows, {self.inputs}], not {x.dtype} {list(x.shape)}"
            )
        gated = self._gates > 0
        out = torch.empty(rows, self._gates or self.outputs)
        if self.storage == "int8":
            native.kernels.linear_int8(
                x.data_ptr(),
                rows,
                self.inputs,
                self._packed.data_ptr(),
                self._scales.data_ptr(),
                self._sums.data_ptr(),
                self.outputs,
                gated,
                self._bias.data_ptr(),
                out.data_ptr(),
            )
            return out
        kernel = getattr(native.kernels, f"linear_{self.storage}")
        kernel(
            x.data_ptr(),
            rows,
            self.inputs,
            self._packed.data_ptr(),
            self.outputs,
            gated,
            self._bias.data_ptr(),
            out.data_ptr(),
        )
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """Rows ids [n] int64 of W as it is stored, [n, inputs] float32: an embedding lookup.

        W is not gated. Ids must be in [0, outputs). Raises IndexError.
        """
        assert not self._gates, "a gated matrix is no table of embeddings"
        if ids.dtype != torch.int64 or ids.dim() != 1:
            raise ValueError(f"needs int64 [n], not {ids.dtype} {list(ids.shape)}")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.outputs:
            raise IndexError(f"ids reach from {int(ids.min())} to {int(ids.max())}")
        ids = ids.contiguous()
        out = torch.empty(len(ids), self.inputs)
        where = [self._packed, self._scales][: 2 if self.storage == "int8" else 1]
        kernel = getattr(native.kernels, f"rows_{self.storage}")
        addresses = (tensor.data_ptr() for tensor in where)
        kernel(ids.data_ptr(), len(ids), self.inputs, *addresses, out.data_ptr())
        return out
