"""Baton itself: the stage and step loop of an undivided worker, without gateway and gRPC."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Sequence
from pathlib import Path

from bench.peers.protocol import Answer, Load, Memory, own_memory, serve

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `baton worker` has it, before torch

from bench.cpu_engine import Choice, EngineHere
from cluster.messages import Token


class BatonEngine:
    """Held sequences are requests without an end."""

    def __init__(self, load: Load) -> None:
        choice = Choice(
            dtype="float32",
            kernels=load.options.get("kernels", "auto"),
            quantization="int8" if load.precision == "int8" else "none",
        )
        self._context = load.context
        self._chunk = load.options.get("chunk", 512)
        self._engine = EngineHere(
            Path(load.model),
            choice,
            threads=load.threads,
            sequences=load.sequences + 1,
            tokens=load.tokens,
            budget=self._chunk + load.sequences,
        )
        self._held: list[str] = []

    def describe(self) -> dict[str, str]:
        settings = f"{self._engine.kernels} kernels, chunk {self._chunk}, block 16"
        version = importlib.metadata.version("baton-serve")
        return {"name": "Baton", "version": version, "settings": settings}

    def prefill(self, ids: Sequence[int]) -> float:
        start = time.perf_counter()
        request = self._engine.generate(ids, 1)
        self._until_told({request})
        return time.perf_counter() - start

    def hold(self, prompts: Sequence[Sequence[int]]) -> None:
        longest = self._context
        self._held = [self._engine.generate(prompt, longest - len(prompt)) for prompt in prompts]
        self._until_told(set(self._held))

    def decode(self, steps: int) -> float:
        start = time.perf_counter()
        tokens = sum(len(self._engine.step()) for _ in range(steps))
        seconds = time.perf_counter() - start
        if tokens != steps * len(self._held):
            raise RuntimeError(f"{steps} steps made {tokens} tokens")
        return seconds

    def drop(self) -> None:
        for request in self._held:
            self._engine.cancel(request)
        self._held.clear()

    def answer(self, ids: Sequence[int], count: int) -> Answer:
        self._engine.generate(ids, count, logprobs=2)
        told: list[Token] = []
        while len(told) < count:
            told += self._engine.step()
        margins = [_margin([logprob for _, logprob in token.logprobs]) for token in told]
        return Answer([token.token for token in told], margins)

    def memory(self) -> Memory:
        return own_memory()

    def _until_told(self, requests: set[str]) -> None:
        """Step until each of them has had a token."""
        while requests:
            requests -= {token.request_id for token in self._engine.step()}


def _margin(logprobs: list[float]) -> float:
    """The chosen token's lead: log-probabilities differ by what logits do."""
    chosen, *best = logprobs
    return chosen - min(best)


if __name__ == "__main__":
    serve(BatonEngine)
