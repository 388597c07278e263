"""What crosses from torch to a kernel: addresses of tensors that are exactly as it expects them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

PAGE_TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers by which the kernels know what pages are made of."""

MAX_HEAD_DIM: Final = 256


def address(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> int:
    """Where a contiguous CPU tensor begins. Raises ValueError if it is not as the kernel needs it.

    Nothing is converted or copied: a caller that would pay for that at every step should know.
    """
    if (
        tensor.dtype is not dtype
        or tensor.shape != shape
        or not tensor.is_contiguous()
        or not tensor.is_cpu
    ):
        raise ValueError(
            f"{name} must be a contiguous {dtype} CPU tensor of shape {list(shape)}, not "
            f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )
    return tensor.data_ptr()


class Pages(NamedTuple):
    """Keys and values of one layer, in the order that the kernels take them."""

    keys: int
    values: int
    type: int
    stride: int  # elements from slot to slot
    slots: int


def pages(keys: Tensor, values: Tensor, kv_heads: int, head_dim: int) -> Pages:
    """Addresses of keys and values [slots, kv_heads, head_dim], the last two dimensions dense.

    Raises ValueError for what no kernel reads.
    """
    check_head_dim(head_dim)
    slots = keys.shape[0]
    shape, strides = (slots, kv_heads, head_dim), keys.stride()
    if (
        keys.dtype not in PAGE_TYPES
        or keys.shape != shape
        or strides[1:] != (head_dim, 1)
        or values.dtype is not keys.dtype
        or values.shape != shape
        or values.stride() != strides
        or not keys.is_cpu
        or not values.is_cpu
    ):
        raise ValueError(
            f"keys and values must be alike, {list(shape)} with dense heads on the CPU and of "
            f"float32, bfloat16 or float16, not {keys.dtype} {list(keys.shape)} {keys.stride()} "
            f"and {values.dtype} {list(values.shape)} {values.stride()}"
        )
    return Pages(keys.data_ptr(), values.data_ptr(), PAGE_TYPES[keys.dtype], strides[0], slots)


def check_head_dim(head_dim: int) -> None:
    """Raises ValueError for a head size that the kernels do not do. A start-up can ask this too."""
    if head_dim % 8 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"the native kernels do head sizes that are a multiple of 8 up to {MAX_HEAD_DIM}, "
            f"not {head_dim}"
        )
