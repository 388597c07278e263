"""OpenVINO GenAI: its continuous batching pipeline over paged attention, step by step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]

from bench.peers.protocol import Answer, Load, Memory, own_memory, serve

_ENDLESS = 1 << 20
_BLOCK = 32  # tokens, its own choice on a CPU


class OpenVinoEngine:
    """One pipeline. Held sequences are requests without an end."""

    def __init__(self, load: Load) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = load.options.get("chunk", 512)
        scheduler.max_num_seqs = load.sequences + 1
        scheduler.num_kv_blocks = load.tokens // _BLOCK + 2 * load.sequences + 1
        scheduler.enable_prefix_caching = False
        properties: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": load.threads,
            # Not as it likes: on a CPU with bf16 instructions that would be bf16.
            "INFERENCE_PRECISION_HINT": load.options.get("precision", "f32"),
        }
        if load.precision == "fp32":
            properties["KV_CACHE_PRECISION"] = "f32"
        directory = Path(load.model).parent / f"openvino-{load.precision}"
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(directory), scheduler, "CPU", properties
        )
        self._ids = itertools.count()
        self._held: list[Any] = []
        self._settings = {**properties, "max_num_batched_tokens": scheduler.max_num_batched_tokens}

    def describe(self) -> dict[str, str]:
        settings = ", ".join(f"{name}={value}" for name, value in self._settings.items())
        version = openvino_genai.__version__
        return {"name": "OpenVINO GenAI", "version": version, "settings": settings}

    def prefill(self, ids: Sequence[int]) -> float:
        start = time.perf_counter()
        request = self._ask(ids, 1)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        seconds = time.perf_counter() - start
        _read(request)
        return seconds

    def hold(self, prompts: Sequence[Sequence[int]]) -> None:
        self._held = [self._ask(prompt, _ENDLESS) for prompt in prompts]
        while not all(request.can_read() for request in self._held):
            self._pipeline.step()
        self._read_held()

    def decode(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self._pipeline.step()
        seconds = time.perf_counter() - start
        counts = {len(tokens) for tokens in self._read_held()}
        if counts != {steps}:
            raise RuntimeError(f"{steps} steps made {sorted(counts)} tokens")
        return seconds

    def drop(self) -> None:
        for request in self._held:
            request.cancel()
        self._held.clear()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()

    def answer(self, ids: Sequence[int], count: int) -> Answer:
        request = self._ask(ids, count)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return Answer(_read(request))

    def memory(self) -> Memory:
        return own_memory()

    def _ask(self, ids: Sequence[int], count: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = count
        config.do_sample = False
        config.ignore_eos = True
        tensor = openvino.Tensor(np.array([ids], dtype=np.int64))
        return self._pipeline.add_request(next(self._ids), tensor, config)

    def _read_held(self) -> list[list[int]]:
        return [_read(request) for request in self._held]


def _read(request: Any) -> list[int]:
    """The tokens since the last time."""
    tokens: list[int] = []
    while request.can_read():
        for output in request.read().values():
            tokens += output.generated_ids
    return tokens


if __name__ == "__main__":
    serve(OpenVinoEngine)
