"""vLLM's CPU back-end: an LLMEngine in this process, compiled, stepped by hand."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from typing import Any

import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vLLM is imported
os.environ["DO_NOT_TRACK"] = "1"

import vllm  # type: ignore[import-not-found]
from vllm.engine.arg_utils import EngineArgs  # type: ignore[import-not-found]
from vllm.inputs import tokens_input  # type: ignore[import-not-found]
from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]
from vllm.v1.engine.llm_engine import LLMEngine  # type: ignore[import-not-found]

from bench.peers.protocol import Answer, Load, Memory, own_memory, serve

_BLOCK = 128  # tokens, its own choice on a CPU
_CHUNK = 512


class VllmEngine:
    """Held sequences are requests without an end."""

    def __init__(self, load: Load) -> None:
        self._context = load.context
        blocks = -(-load.tokens // _BLOCK) + 2 * load.sequences + 2
        self._engine: Any = LLMEngine.from_engine_args(
            EngineArgs(
                model=load.model,
                dtype="float32",
                max_model_len=max(load.context, load.prompt) + 1,
                max_num_seqs=load.sequences + 1,
                max_num_batched_tokens=_CHUNK,
                block_size=_BLOCK,
                num_gpu_blocks_override=blocks,
                kv_cache_memory_bytes=1,  # without one it claims most of the machine's memory
                enable_prefix_caching=False,
                skip_tokenizer_init=True,
                disable_log_stats=True,
            )
        )
        self._settings = f"compiled, chunk {_CHUNK}, block {_BLOCK}, one process"
        self._ids = itertools.count()
        self._held: list[str] = []

    def describe(self) -> dict[str, str]:
        version = f"{vllm.__version__}, torch {torch.__version__}"
        return {"name": "vLLM", "version": version, "settings": self._settings}

    def prefill(self, ids: Sequence[int]) -> float:
        start = time.perf_counter()
        self._until_told({self._ask(ids, 1)})
        return time.perf_counter() - start

    def hold(self, prompts: Sequence[Sequence[int]]) -> None:
        self._held = [self._ask(prompt, self._context - len(prompt)) for prompt in prompts]
        self._until_told(set(self._held))

    def decode(self, steps: int) -> float:
        start = time.perf_counter()
        tokens = sum(len(self._step()) for _ in range(steps))
        seconds = time.perf_counter() - start
        if tokens != steps * len(self._held):
            raise RuntimeError(f"{steps} steps made {tokens} tokens")
        return seconds

    def drop(self) -> None:
        self._engine.abort_request(self._held)
        self._held = []

    def answer(self, ids: Sequence[int], count: int) -> Answer:
        self._ask(ids, count)
        told: list[int] = []
        while len(told) < count:
            told += [token for _, token in self._step()]
        return Answer(told)

    def memory(self) -> Memory:
        return own_memory()

    def _ask(self, ids: Sequence[int], count: int) -> str:
        name = str(next(self._ids))
        params = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=count,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(name, tokens_input(list(ids)), params)
        return name

    def _step(self) -> list[tuple[str, int]]:
        """Who had a token, and which."""
        return [
            (output.request_id, token)
            for output in self._engine.step()
            for token in output.outputs[0].token_ids
        ]

    def _until_told(self, requests: set[str]) -> None:
        """Step until each of them has had a token."""
        while requests:
            requests -= {name for name, _ in self._step()}


if __name__ == "__main__":
    serve(VllmEngine)
