"""Measures: how far logits are from those that they should be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Measures:
    """Sums over rows; a row is the logits after one token.

    `error` of a row is the length of the difference over the length of the reference, both taken
    about the row's mean: what all logits have in common changes no probability.
    """

    rows: int = 0
    error_sum: float = 0.0
    error_max: float = 0.0
    kl_sum: float = 0.0
    kl_max: float = 0.0
    same_top: int = 0
    targets: int = 0
    loss_sum: float = 0.0
    reference_loss_sum: float = 0.0

    def add(self, logits: Tensor, reference: Tensor, targets: Tensor) -> None:
        """logits, reference [rows, vocab]; targets [rows] int64, the next token, -1 for none."""
        ours, theirs = logits.double(), reference.double()
        ours -= ours.mean(dim=-1, keepdim=True)
        theirs -= theirs.mean(dim=-1, keepdim=True)
        error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        ours, theirs = ours.log_softmax(dim=-1), theirs.log_softmax(dim=-1)
        kl = (theirs.exp() * (theirs - ours)).sum(dim=-1)
        self.rows += len(logits)
        self.error_sum += float(error.sum())
        self.error_max = max(self.error_max, float(error.max()))
        self.kl_sum += float(kl.sum())
        self.kl_max = max(self.kl_max, float(kl.max()))
        self.same_top += int((logits.argmax(dim=-1) == reference.argmax(dim=-1)).sum())
        known = torch.nonzero(targets >= 0).squeeze(1)
        chosen = targets[known, None]
        self.targets += len(known)
        self.loss_sum -= float(ours[known].gather(1, chosen).sum())
        self.reference_loss_sum -= float(theirs[known].gather(1, chosen).sum())

    @property
    def error_mean(self) -> float:
        return self.error_sum / self.rows

    @property
    def kl_mean(self) -> float:
        """Nats a token."""
        return self.kl_sum / self.rows

    @property
    def top1(self) -> float:
        """Share of rows whose likeliest token is the reference's."""
        return self.same_top / self.rows

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss_sum / self.targets) if self.targets else math.nan

    @property
    def reference_perplexity(self) -> float:
        return math.exp(self.reference_loss_sum / self.targets) if self.targets else math.nan

    @property
    def perplexity_ratio(self) -> float:
        """What the difference costs in guessing the text; below 1 it is luck."""
        return self.perplexity / self.reference_perplexity

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "error_mean": self.error_mean,
            "error_max": self.error_max,
            "kl_mean": self.kl_mean,
            "kl_max": self.kl_max,
            "top1": self.top1,
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
        }
