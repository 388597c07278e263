"""RMSNorm over the last dimension, computed in float32 whatever the input's dtype."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * w. The product with w is in the input's dtype.

    Source: Zhang and Sennrich 2019.
    """
    normed = functional.rms_norm(x.float(), weight.shape, eps=eps)
    return normed.to(x.dtype) * weight
