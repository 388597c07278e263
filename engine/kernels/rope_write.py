"""rope_write: from packed qkv to rotated queries and to keys and values in their pages, one pass.

Limit   memory: one read of qkv, one write of q, k and v; cosines and sines are read once per row.
        Roof on one H200 (4.3 TB/s measured copy): 8192 rows of 32 + 2 * 8 heads of 128, bf16 =
        206 MB -> 48 us; below ~256 rows the launch itself, ~3 us.
Layout  qkv [rows, heads + 2 * kv_heads, d] with q, k, v in this order; pairs (i, i + d/2), so a
        head is two halves of d/2 columns. One program does one row: the norms are sums over d
        within it, the angles are loaded once for all its heads.
Source  RoFormer (Su et al. 2021); PagedAttention (Kwon et al. 2023), section 4.2; qk-norm as in
        Qwen3.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.layers.norm import rms_norm as rms_norm_reference
from engine.layers.rope import rotate as rotate_reference


def rope_write_reference(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> Tensor:
    parts = qkv.view(len(qkv), heads + 2 * kv_heads, -1)
    q, k, v = torch.split(parts, [heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm_reference(q, q_norm, eps), rms_norm_reference(k, k_norm, eps)
    real = slots >= 0
    keys[slots[real]] = rotate_reference(k, cos, sin)[real].to(keys.dtype)
    values[slots[real]] = v[real].to(values.dtype)
    return rotate_reference(q, cos, sin)


@triton.jit
def _rotated(
    source,
    weight,
    cos,
    sin,
    eps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    NORM: tl.constexpr,
):
    """The heads from `source` on: both rotated halves [heads, d/2], their offsets, their mask."""
    head = tl.arange(0, HEADS_PADDED)[:, None]
    column = tl.arange(0, HALF_PADDED)[None, :]
    offsets = head * D + column
    inside = (head < HEADS) & (column < D // 2)
    low = tl.load(source + offsets, mask=inside, other=0.0)
    high = tl.load(source + D // 2 + offsets, mask=inside, other=0.0)
    dtype = low.dtype
    first, second = low.to(tl.float32), high.to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        weight_inside = column < D // 2
        low_weight = tl.load(weight + column, mask=weight_inside, other=0.0).to(tl.float32)
        high_weight = tl.load(weight + D // 2 + column, mask=weight_inside, other=0.0).to(
            tl.float32
        )
        # Rounded where the definition rounds: after the norm and after its weight.
        first = ((first * scale).to(dtype).to(tl.float32) * low_weight).to(dtype).to(tl.float32)
        second = ((second * scale).to(dtype).to(tl.float32) * high_weight).to(dtype).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin, offsets, inside


@triton.jit
def rope_write_kernel(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    slots,
    q_out,
    keys,
    values,
    eps,
    qkv_stride,
    angle_stride,
    keys_stride,
    values_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    KV_HEADS_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    NORM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row + tl.zeros([1, 1], tl.int32))
    column = tl.arange(0, HALF_PADDED)[None, :]
    angle = row * angle_stride + column
    cosine = tl.load(cos + angle, mask=column < D // 2, other=0.0)
    sine = tl.load(sin + angle, mask=column < D // 2, other=0.0)
    source = qkv + row * qkv_stride

    low, high, offsets, inside = _rotated(
        source, q_norm, cosine, sine, eps, HEADS, D, HEADS_PADDED, HALF_PADDED, NORM
    )
    target = q_out + row * HEADS * D + offsets
    tl.store(target, low.to(q_out.dtype.element_ty), mask=inside)
    tl.store(target + D // 2, high.to(q_out.dtype.element_ty), mask=inside)

    low, high, offsets, inside = _rotated(
        source + HEADS * D,
        k_norm,
        cosine,
        sine,
        eps,
        KV_HEADS,
        D,
        KV_HEADS_PADDED,
        HALF_PADDED,
        NORM,
    )
    written = inside & (slot >= 0)
    target = keys + slot * keys_stride + offsets
    tl.store(target, low.to(keys.dtype.element_ty), mask=written)
    tl.store(target + D // 2, high.to(keys.dtype.element_ty), mask=written)

    source += (HEADS + KV_HEADS) * D
    low = tl.load(source + offsets, mask=inside, other=0.0)
    high = tl.load(source + D // 2 + offsets, mask=inside, other=0.0)
    target = values + slot * values_stride + offsets
    tl.store(target, low.to(values.dtype.element_ty), mask=written)
    tl.store(target + D // 2, high.to(values.dtype.element_ty), mask=written)


def rope_write(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> Tensor:
    """Returns q [rows, heads, d], new; k and v go to keys and values [slots, kv_heads, d].

    qkv [rows, (heads + 2 * kv_heads) * d]; q_norm, k_norm [d] or both None; cos, sin [rows, d/2]
    float32; slots int64 [rows]. A negative slot writes nothing: the row pads a captured batch.
    Raises ValueError for shapes, dtypes or strides that the kernel does not do.
    """
    d = _check(qkv, heads, kv_heads, q_norm, k_norm, cos, sin, keys, values, slots)
    rows = len(qkv)
    out = torch.empty((rows, heads, d), dtype=qkv.dtype, device=qkv.device)
    if rows:
        rope_write_kernel[(rows,)](
            qkv,
            qkv if q_norm is None else q_norm,
            qkv if k_norm is None else k_norm,
            cos,
            sin,
            slots,
            out,
            keys,
            values,
            eps,
            qkv.stride(0),
            cos.stride(0),
            keys.stride(0),
            values.stride(0),
            HEADS=heads,
            KV_HEADS=kv_heads,
            D=d,
            NORM=q_norm is not None,
            enable_fp_fusion=True,
            **configuration(heads, kv_heads, d),
        )
    return out


def configuration(heads: int, kv_heads: int, d: int) -> dict[str, Any]:
    """Padded shapes, and about 16 pairs of the queries per thread."""
    padded = triton.next_power_of_2(heads)
    half = triton.next_power_of_2(d // 2)
    return {
        "HEADS_PADDED": padded,
        "KV_HEADS_PADDED": triton.next_power_of_2(kv_heads),
        "HALF_PADDED": half,
        "num_warps": max(1, min(8, padded * half // 512)),
    }


def _check(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> int:
    """Returns head_dim."""
    if qkv.ndim != 2 or not qkv.is_floating_point() or qkv.dtype == torch.float64:
        raise ValueError(f"qkv must be 2-d in 16 or 32 bits, got {qkv.ndim}-d {qkv.dtype}")
    rows, columns = qkv.shape
    count = heads + 2 * kv_heads
    if heads < 1 or kv_heads < 1 or columns % (2 * count):
        raise ValueError(
            f"{columns} columns are not {heads} + 2 * {kv_heads} heads of an even size"
        )
    d = columns // count
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm come together")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and (
            norm.shape != (d,) or norm.dtype != qkv.dtype or not norm.is_contiguous()
        ):
            raise ValueError(f"{name} must be a contiguous [{d}] {qkv.dtype}")
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle.shape != (rows, d // 2) or angle.dtype != torch.float32:
            raise ValueError(f"{name} must be [{rows}, {d // 2}] float32, is {tuple(angle.shape)}")
    if cos.stride() != sin.stride() or cos.stride(-1) != 1 or qkv.stride(-1) != 1:
        raise ValueError("qkv, cos and sin need contiguous rows, cos and sin the same strides")
    for name, pages in (("keys", keys), ("values", values)):
        if pages.shape[1:] != (kv_heads, d) or pages.stride()[1:] != (d, 1):
            raise ValueError(
                f"{name} must be [slots, {kv_heads}, {d}] with contiguous slots, is "
                f"{tuple(pages.shape)} with strides {pages.stride()}"
            )
    if slots.shape != (rows,) or slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError(f"slots must be contiguous int64 [{rows}]")
    if {t.device for t in (cos, sin, keys, values, slots)} != {qkv.device}:
        raise ValueError("all tensors must be on one device")
    return d
