"""transformers: a loop over `forward` with a DynamicCache and sdpa, which is what `generate` does.

Without `generate`'s own work around each step: that would only slow it down.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from bench.peers.protocol import Answer, Load, Memory, own_memory, serve


class TransformersEngine:
    """Sequences of one length run as one batch without padding."""

    def __init__(self, load: Load) -> None:
        if load.precision != "fp32":
            raise ValueError(
                f"transformers has no {load.precision} on a CPU without other packages"
            )
        torch.set_num_threads(load.threads)
        torch.set_grad_enabled(False)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            load.model, dtype=torch.float32, attn_implementation="sdpa"
        )
        self._batch: DynamicCache | None = None
        self._last = torch.empty(0, 1, dtype=torch.int64)

    def describe(self) -> dict[str, str]:
        return {
            "name": "transformers",
            "version": f"{transformers.__version__}, torch {torch.__version__}",
            "settings": "forward loop, DynamicCache, sdpa",
        }

    def prefill(self, ids: Sequence[int]) -> float:
        start = time.perf_counter()
        self._run(torch.tensor([ids]), DynamicCache())
        return time.perf_counter() - start

    def hold(self, prompts: Sequence[Sequence[int]]) -> None:
        caches, first = [], []
        for prompt in prompts:
            caches.append(DynamicCache())
            first.append(int(self._run(torch.tensor([prompt]), caches[-1])))
        self._batch = DynamicCache()
        for layer in range(self._model.config.num_hidden_layers):
            parts: list[Any] = [cache.layers[layer] for cache in caches]
            keys = torch.cat([part.keys for part in parts])
            self._batch.update(keys, torch.cat([part.values for part in parts]), layer)
        self._last = torch.tensor(first)[:, None]

    def decode(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self._last = self._run(self._last, self._batch)[:, None]
        return time.perf_counter() - start

    def drop(self) -> None:
        self._batch = None

    def answer(self, ids: Sequence[int], count: int) -> Answer:
        cache, tokens = DynamicCache(), []
        given = torch.tensor([ids])
        for _ in range(count):
            given = self._run(given, cache)[:, None]
            tokens.append(int(given))
        return Answer(tokens)

    def memory(self) -> Memory:
        return own_memory()

    def _run(self, ids: torch.Tensor, cache: DynamicCache | None) -> torch.Tensor:
        """ids [sequences, tokens] -> the next token of each [sequences]."""
        logits = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return torch.argmax(logits[:, -1], dim=-1)


if __name__ == "__main__":
    serve(TransformersEngine)
