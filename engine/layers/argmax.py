"""Greedy choice that does not hide a broken row."""

from __future__ import annotations

import torch
from torch import Tensor


def argmax(logits: Tensor) -> Tensor:
    """logits [rows, vocab] -> [rows] int64: the lowest index of the largest entry, -1 where the row
    holds a NaN or an infinity."""
    sound = torch.isfinite(logits).all(dim=-1)
    return logits.argmax(dim=-1).masked_fill_(~sound, -1)
