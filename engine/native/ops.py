"""The small operations between the linear layers, fused: launchers.

Activations are float32 and contiguous, one row for each token. Defined in plain torch: rms_norm and
argmax by those of `engine.layers`, the others by the `*_reference` beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.layers.norm import rms_norm as rms_norm_reference
from engine.layers.rope import rotate
from engine.native import kernels
from engine.native.tensors import address, pages


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [rows, hidden], weight [hidden] -> x / sqrt(mean(x^2) + eps) * weight, as x."""
    rows, hidden = x.shape
    normed = torch.empty_like(x)
    kernels.rms_norm(
        address("x", x, (rows, hidden)),
        address("weight", weight, (hidden,)),
        normed.data_ptr(),
        rows,
        hidden,
        eps,
    )
    return normed


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    residual += x
    return rms_norm_reference(residual, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add x to `residual` in place, both [rows, hidden]; returns the rms_norm of the sum."""
    rows, hidden = x.shape
    normed = torch.empty_like(x)
    kernels.add_rms_norm(
        address("x", x, (rows, hidden)),
        address("residual", residual, (rows, hidden)),
        address("weight", weight, (hidden,)),
        normed.data_ptr(),
        rows,
        hidden,
        eps,
    )
    return normed


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
    if q_norm is not None:
        q = rms_norm_reference(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm_reference(k, k_norm, eps)
    keys[slots] = rotate(k, cos, sin).to(keys.dtype)
    values[slots] = v.to(values.dtype)
    return rotate(q, cos, sin)


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
    """Split the projection's output, norm q and k if there are weights, rotate, write k and v.

    qkv [rows, (heads + 2 kv_heads) * head_dim]; q_norm, k_norm [head_dim]; cos, sin
    [rows, head_dim / 2]; keys, values [slots, kv_heads, head_dim] of float32, bfloat16 or float16;
    slots [rows] int64, no two alike. Returns q [rows, heads, head_dim]. Raises ValueError, and
    IndexError before it writes anything.
    """
    rows, width = qkv.shape
    head_dim = width // (heads + 2 * kv_heads)
    place = pages(keys, values, kv_heads, head_dim)
    q = qkv.new_empty((rows, heads, head_dim))
    wrong = kernels.rope_write(
        address("qkv", qkv, (rows, (heads + 2 * kv_heads) * head_dim)),
        rows,
        heads,
        kv_heads,
        head_dim,
        None if q_norm is None else address("q_norm", q_norm, (head_dim,)),
        None if k_norm is None else address("k_norm", k_norm, (head_dim,)),
        eps,
        address("cos", cos, (rows, head_dim // 2)),
        address("sin", sin, (rows, head_dim // 2)),
        *place,
        address("slots", slots, (rows,), torch.int64),
        q.data_ptr(),
    )
    if wrong >= 0:
        raise IndexError(f"row {wrong}: slot {slots[wrong]} is not one of {place.slots}")
    return q


def argmax(logits: Tensor) -> Tensor:
    """logits [rows, vocab] -> [rows] int64: the lowest index of a largest entry.

    -1 for a row that holds a NaN or an infinity: whatever it was computed from is broken.
    """
    rows, vocab = logits.shape
    if not vocab:
        raise ValueError("there is no largest of 0 logits")
    chosen = torch.empty(rows, dtype=torch.int64)
    kernels.argmax(address("logits", logits, (rows, vocab)), chosen.data_ptr(), rows, vocab)
    return chosen
