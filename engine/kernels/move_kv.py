"""gather_kv, scatter_kv: keys and values of a chunk between pages and wire, all layers at once.

Limit   memory: one read and one write of layers * 2 * tokens * heads * head_dim elements; to or
        from pinned host memory the bus instead (~55 GB/s on PCIe 5 x16).
        Roof on one H200 (4.3 TB/s measured copy): 32 layers, 512 tokens, 8 heads of 128, bf16 =
        134 MB -> 31 us within the device.
Layout  pages [layers, 2, slots, kv_heads, head_dim]; wire [layers, 2, tokens, heads, head_dim],
        contiguous. Elements are moved as integers: the bits of any dtype, no conversion.
Source  engine/cache.py, which defines the wire form.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS: Final = 4096  # of one program; 16 bytes x 4 per thread under way for 2-byte elements
_INTEGERS: Final = {2: torch.int16, 4: torch.int32}


def gather_kv_reference(pages: Tensor, slots: Tensor, heads: range | None = None) -> Tensor:
    chosen = pages[:, :, slots]
    return (chosen if heads is None else chosen[:, :, :, heads.start : heads.stop]).contiguous()


def scatter_kv_reference(
    pages: Tensor, slots: Tensor, wire: Tensor, heads: range | None = None
) -> None:
    part = pages if heads is None else pages[:, :, :, heads.start : heads.stop]
    part[:, :, slots] = wire


@triton.jit
def move_kernel(
    pages,
    wire,
    slots,
    tokens,
    layer_stride,
    kind_stride,
    slot_stride,
    first,
    RUN: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TO_WIRE: tl.constexpr,
):
    """RUN: the contiguous elements of one token, those of the chosen heads from `first` on."""
    plane = tl.program_id(2).to(tl.int64)  # layer * 2 + (0 for keys, 1 for values)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(slots + token, mask=token < tokens, other=0)
    inside = (token < tokens)[:, None] & (column < RUN)[None, :]
    page = pages + (plane // 2) * layer_stride + (plane % 2) * kind_stride + first
    page_at = page + slot[:, None] * slot_stride + column[None, :]
    wire_at = wire + (plane * tokens + token.to(tl.int64))[:, None] * RUN + column[None, :]
    if TO_WIRE:
        tl.store(wire_at, tl.load(page_at, mask=inside, other=0), mask=inside)
    else:
        tl.store(page_at, tl.load(wire_at, mask=inside, other=0), mask=inside)


def gather_kv(
    pages: Tensor, slots: Tensor, heads: range | None = None, out: Tensor | None = None
) -> Tensor:
    """A copy of `slots` int64 [tokens] of all layers of `pages` in wire form; without `heads`, all.

    `out` [layers, 2, tokens, heads, head_dim] may be pinned host memory: it is written over the bus
    and can be read after the stream is synchronised. Raises ValueError for what cannot be done.
    """
    heads = range(pages.shape[3]) if heads is None else heads
    shape = (*pages.shape[:2], len(slots), len(heads), pages.shape[-1])
    if out is None:
        out = torch.empty(shape, dtype=pages.dtype, device=pages.device)
    _launch(pages, slots, out, heads, to_wire=True)
    return out


def scatter_kv(pages: Tensor, slots: Tensor, wire: Tensor, heads: range | None = None) -> None:
    """Write into `slots` what gather_kv made. No slot may stand there twice.

    `wire` may be pinned host memory, which must stay as it is until the stream is synchronised.
    """
    _launch(pages, slots, wire, range(pages.shape[3]) if heads is None else heads, to_wire=False)


def _launch(pages: Tensor, slots: Tensor, wire: Tensor, heads: range, to_wire: bool) -> None:
    _check(pages, slots, wire, heads)
    layers, _, _, _, head_dim = pages.shape
    tokens, run = len(slots), len(heads) * head_dim
    if not wire.numel():
        return
    shape = configuration(run)
    integer = _INTEGERS[pages.element_size()]
    grid = (triton.cdiv(tokens, shape["TOKENS"]), triton.cdiv(run, shape["COLUMNS"]), layers * 2)
    move_kernel[grid](
        pages.view(integer),
        wire.view(integer),
        slots,
        tokens,
        pages.stride(0),
        pages.stride(1),
        pages.stride(2),
        heads.start * head_dim,
        RUN=run,
        TO_WIRE=to_wire,
        enable_fp_fusion=True,
        **shape,
    )


def configuration(run: int) -> dict[str, Any]:
    columns = min(triton.next_power_of_2(run), ELEMENTS)
    return {"COLUMNS": columns, "TOKENS": ELEMENTS // columns, "num_warps": 4}


def _check(pages: Tensor, slots: Tensor, wire: Tensor, heads: range) -> None:
    if pages.ndim != 5 or pages.shape[1] != 2 or pages.element_size() not in _INTEGERS:
        raise ValueError(
            "pages must be [layers, 2, slots, kv_heads, head_dim] of 2- or 4-byte elements, are "
            f"{tuple(pages.shape)} {pages.dtype}"
        )
    kv_heads, head_dim = pages.shape[3:]
    if pages.stride()[3:] != (head_dim, 1):
        raise ValueError(f"a slot of pages must be contiguous, strides are {pages.stride()}")
    if heads.step != 1 or not 0 <= heads.start < heads.stop <= kv_heads:
        raise ValueError(f"{heads} are not some of {kv_heads} heads")
    if slots.ndim != 1 or slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError("slots must be contiguous int64 [tokens]")
    shape = (*pages.shape[:2], len(slots), len(heads), head_dim)
    if wire.shape != shape or wire.dtype != pages.dtype or not wire.is_contiguous():
        raise ValueError(
            f"the wire form must be contiguous {shape} {pages.dtype}, is {tuple(wire.shape)} "
            f"{wire.dtype}"
        )
    pinned = wire.device.type == "cpu" and pages.is_cuda and wire.is_pinned()
    if slots.device != pages.device or not (wire.device == pages.device or pinned):
        raise ValueError("slots must be on the device of pages, the wire form there or pinned")
