"""Runner: a Batch goes in, sampled tokens come out. The only caller of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from engine import native
from engine.batch import Attention, Batch
from engine.cache import KVCache
from engine.loop import Outcome
from engine.models.decoder import Decoder
from engine.sampler import sample
from engine.sequence import Sequence

if TYPE_CHECKING:  # needs kernels that are built
    from engine.native.decode_step import DecodeStep


class Runner:
    """Owns the model. Called by the step thread alone."""

    ahead = False  # it computes in the call

    def __init__(self, model: Decoder, cache: KVCache | None = None) -> None:
        """`cache` is a decode worker's: with native kernels a step of single tokens is one call
        then, which does not ask for its attention."""
        self._model = model
        self._decode: DecodeStep | None = None
        if model.ops.name == "native" and cache is not None:
            from engine.native.decode_step import DecodeStep

            self._decode = DecodeStep(model, cache)
        self._beats = 0
        if model.ops.name != "native":  # whose kernels count for themselves
            for linear in (*model.linears(), model.head):
                assert isinstance(linear, nn.Module)
                linear.register_forward_pre_hook(self._beat)

    @property
    def pulse(self) -> int:
        """Moves many times within a step. For any thread.

        With native kernels every few milliseconds, otherwise with each matrix product.
        """
        return self._beats + native.tasks_done()

    def _beat(self, *_: object) -> None:
        self._beats += 1

    def warm_up(self, attention: Attention) -> None:
        """Nothing is compiled or captured here."""

    @torch.inference_mode()
    def launch(self, batch: Batch, attention: Attention) -> Outcome:
        """One step. Its attention, which also says where the step's KV goes, is the stage's.

        The outcome has one Sampled for each of `batch.samples`, None where the logits were not
        finite.
        """
        if self._decode is not None and len(batch.samples) == batch.single == len(batch.counts):
            logits = self._decode.logits(batch)
        else:
            hidden = self._model.forward(batch.tokens, batch.positions, attention(batch))
            if not batch.samples:
                return list
            logits = self._model.logits(hidden[batch.sampled_rows])
        sampled = sample(logits, self._each(batch.samples), self._model.ops)
        return lambda: sampled

    def _each(self, sequences: tuple[Sequence, ...]) -> Iterator[Sequence]:
        """Them, with a beat for each: choosing for hundreds from a large vocabulary takes time."""
        for sequence in sequences:
            self._beat()
            yield sequence
