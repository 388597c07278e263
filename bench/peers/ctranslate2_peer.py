"""CTranslate2: whole answers from its Generator; it offers no single steps.

A decode is timed as an answer less the first token's time: the held context is a static prompt,
computed once and then copied to each sequence, so that every sequence has its own keys and values.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import ctranslate2  # type: ignore[import-not-found]

from bench.peers.protocol import Answer, Load, Memory, own_memory, serve

_COMPUTE = {"fp32": "float32", "int8": "int8_float32"}


class Ctranslate2Engine:
    """One Generator, quantised while it loads."""

    def __init__(self, load: Load) -> None:
        directory = Path(load.model).parent / "ctranslate2"
        self._compute = _COMPUTE[load.precision]
        self._generator = ctranslate2.Generator(
            str(directory), device="cpu", compute_type=self._compute, intra_threads=load.threads
        )
        vocabulary = json.loads((directory / "vocabulary.json").read_text(encoding="utf-8"))
        self._words: list[str] = vocabulary
        self._held: list[Sequence[int]] = []

    def describe(self) -> dict[str, str]:
        return {
            "name": "CTranslate2",
            "version": ctranslate2.__version__,
            "settings": f"{self._compute}, generate_batch",
        }

    def prefill(self, ids: Sequence[int]) -> float:
        start = time.perf_counter()
        self._generate([ids], 1)
        return time.perf_counter() - start

    def hold(self, prompts: Sequence[Sequence[int]]) -> None:
        self._held = list(prompts)
        self._answer_held(1)  # the shared context is computed here

    def decode(self, steps: int) -> float:
        first = self._answer_held(1)
        return self._answer_held(1 + steps) - first

    def drop(self) -> None:
        self._held.clear()

    def answer(self, ids: Sequence[int], count: int) -> Answer:
        return Answer(self._generate([ids], count)[0])

    def memory(self) -> Memory:
        return own_memory()

    def _answer_held(self, count: int) -> float:
        """Every sequence: the first one's context, then the last token of its own prompt."""
        shared = [self._words[token] for token in self._held[0][:-1]]
        start = time.perf_counter()
        self._generate([prompt[-1:] for prompt in self._held], count, shared)
        return time.perf_counter() - start

    def _generate(
        self, prompts: Sequence[Sequence[int]], count: int, shared: list[str] | None = None
    ) -> list[list[int]]:
        results = self._generator.generate_batch(
            [[self._words[token] for token in prompt] for prompt in prompts],
            static_prompt=shared,
            max_length=count,
            min_length=count,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        tokens = [list(result.sequences_ids[0]) for result in results]
        if {len(answer) for answer in tokens} != {count}:
            raise RuntimeError(f"asked for {count} tokens, got {[len(t) for t in tokens]}")
        return tokens


if __name__ == "__main__":
    serve(Ctranslate2Engine)
