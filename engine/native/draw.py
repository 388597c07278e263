"""Drawing a token: launcher of draw.cpp. Its definition is `engine.sampler.draw`."""

from __future__ import annotations

import torch

from engine.native import kernels
from engine.sampler import Candidates, Noise


def draw(candidates: Candidates, noise: Noise) -> int:
    """The token with the highest score + Gumbel noise, -1 if none may be drawn. Raises
    ValueError."""
    scores, ids = candidates.scores, candidates.ids
    if scores.dtype != torch.float32 or scores.ndim != 1 or not scores.is_contiguous():
        raise ValueError(f"scores must be contiguous float32 [n], not {scores.dtype}")
    if ids is not None:
        if ids.dtype != torch.int64 or ids.shape != scores.shape or not ids.is_contiguous():
            raise ValueError(f"ids must be contiguous int64 {list(scores.shape)}, not {ids.dtype}")
    elif not 0 <= candidates.likely < len(scores):
        raise ValueError(f"{candidates.likely} is not one of {len(scores)} scores")
    at: int = kernels.draw(
        scores.data_ptr(),
        None if ids is None else ids.data_ptr(),
        len(scores),
        candidates.likely,
        candidates.least,
        noise.seed & 0xFFFFFFFF,
        noise.seed >> 32 & 0xFFFFFFFF,
        noise.choice,
        noise.position,
    )
    return at if ids is None or at < 0 else int(ids[at])
