"""Runner: a Batch goes in, sampled tokens come out. The only caller of the model."""

from __future__ import annotations

import torch

from engine.batch import Attention, Batch
from engine.layers.attention import Write
from engine.loop import Outcome
from engine.models.decoder import Decoder
from engine.sampler import sample


class Runner:
    """Owns the model. Called by the step thread alone."""

    ahead = False  # it computes in the call

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self.layers = 0  # begun so far: shows that a long step goes on

    def warm_up(self, attention: Attention) -> None:
        """Nothing is compiled or captured here."""

    @torch.inference_mode()
    def launch(self, batch: Batch, attention: Attention) -> Outcome:
        """One step. Its attention, which also says where the step's KV goes, is the stage's.

        The outcome has one Sampled for each of `batch.samples`, None where the logits were not
        finite.
        """
        attend = attention(batch)

        def counted(layer: int, write: Write) -> torch.Tensor:
            self.layers += 1
            return attend(layer, write)

        hidden = self._model.forward(batch.tokens, batch.positions, counted)
        if not batch.samples:
            return list
        logits = self._model.logits(hidden[batch.sampled_rows])
        sampled = sample(logits, batch.samples, self._model.ops)
        return lambda: sampled
