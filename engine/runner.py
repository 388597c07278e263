"""Runner: a Batch goes in, sampled tokens come out. The only caller of the model."""

from __future__ import annotations

import torch

from engine.batch import Batch
from engine.models.decoder import Attend, Decoder
from engine.sampler import Sampled, sample


class Runner:
    """Owns the model. Called by the step thread alone."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self.layers = 0  # begun so far: shows that a long step goes on

    @torch.inference_mode()
    def forward(self, batch: Batch, attend: Attend) -> list[Sampled | None]:
        """One step. `attend` computes attention and writes the step's KV; it comes from the stage.

        Returns one Sampled for each of `batch.samples`, None where the logits were not finite.
        """

        def counted(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.layers += 1
            return attend(layer, q, k, v)

        hidden = self._model.forward(batch.tokens, batch.positions, counted)
        if not batch.samples:
            return []
        return sample(self._model.logits(hidden[batch.sampled_rows]), batch.samples)
