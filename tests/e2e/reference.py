"""What a cluster's answers are held to: transformers, and our own model in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.messages import Request, Sampling
from engine.models.decoder import Decoder
from engine.models.load import load_model
from engine.sampler import sample
from engine.sequence import Sequence
from tests.dense_cache import DenseCache


class Transformers:
    """Greedy decoding by transformers, float32 and its plainest attention."""

    def __init__(self, directory: Path) -> None:
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """`count` tokens, EOS like any other."""
        answer: list[int] = []
        tokens, kept = torch.tensor([prompt]), None
        while len(answer) < count:
            out = self._model(tokens, past_key_values=kept, use_cache=True)
            kept = out.past_key_values
            answer.append(int(out.logits[0, -1].argmax()))
            tokens = torch.tensor([answer[-1:]])
        return answer


class OneProcess:
    """Our model and sampler without pages, batches, chunks or a second process."""

    def __init__(self, directory: Path) -> None:
        self._model: Decoder = load_model(directory, kernels="torch").model

    @torch.inference_mode()
    def answer(self, prompt: list[int], count: int, choice: int = 0, **fields: Any) -> list[int]:
        """`fields` are a request's sampling fields by their HTTP names."""
        bias = fields.pop("logit_bias", {})
        logit_bias = tuple((int(token), float(value)) for token, value in bias.items())
        sampling = Sampling(max_tokens=count, logit_bias=logit_bias, choice=choice, **fields)
        sequence = Sequence(Request("reference", tuple(prompt), sampling), 1, 0, 0.0)
        cache = DenseCache(self._model.config)
        while sequence.next_index < count:
            tokens = torch.tensor(sequence.tokens[sequence.computed :])
            positions = torch.arange(sequence.computed, len(sequence.tokens))
            hidden = self._model(tokens, positions, cache.attend(len(tokens)))
            sequence.computed = len(sequence.tokens)
            [sampled] = sample(self._model.logits(hidden[-1:]), [sequence])
            sequence.tokens.append(sampled.token)
        return sequence.tokens[len(prompt) :]


def prompt_of(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Random ids. The same length and seed give the same prompt; a longer one begins otherwise."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()
