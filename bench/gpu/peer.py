"""Our engine and transformers' continuous batching on the same prompts, model and device."""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import torch

from bench.gpu import shapes
from bench.gpu.engine import EngineHere
from bench.gpu.setting import Row, Rows, Setting
from bench.gpu.whole import load
from cluster.messages import BOTH
from engine.cuda import GRAPH_SIZES

_ANSWER = 128


def beside(setting: Setting) -> Rows:
    """All prompts at once, greedy answers of one length: tokens answered per second, warm.

    Without the peer, or where it fails, the reason stands in its place.
    """
    name = shapes.QWEN_06B if setting.on_gpu else shapes.SMALL
    dice = Random(setting.seed)
    length, answer = (1024, _ANSWER) if setting.on_gpu else (24, 4)
    vocab = shapes.CONFIGS[name]["vocab_size"]

    def prompts(count: int) -> list[list[int]]:
        return [[dice.randrange(vocab) for _ in range(length)] for _ in range(count)]

    warm, real = prompts(4), prompts(setting.sizes.requests)
    yield _ours(setting, name, warm, real, answer)
    try:
        yield _transformers(setting, name, warm, real, answer)
    except Exception as error:  # whatever another project's engine raises is not our failure
        yield {"what": f"{name} transformers", "left_out": f"{type(error).__name__}: {error}"[:300]}


def _ours(
    setting: Setting, name: str, warm: list[list[int]], real: list[list[int]], answer: int
) -> Row:
    engine = EngineHere(
        load(setting, name),
        BOTH,
        sequences=len(real),
        context=len(real[0]) + answer,
        budget=setting.sizes.chunk,
    )
    engine.run_with(graphs=GRAPH_SIZES if setting.on_gpu else ())
    for prompts in (warm, real):
        for ids in prompts:
            engine.order(ids, answer)
        began = time.perf_counter()
        tokens = len(engine.finish())
        seconds = time.perf_counter() - began
    return _row(f"{name} baton, undivided", len(real), tokens, seconds)


def _transformers(
    setting: Setting, name: str, warm: list[list[int]], real: list[list[int]], answer: int
) -> Row:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, __version__

    gc.collect()  # it takes what memory it finds free
    if setting.on_gpu:
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as directory:
        config = AutoConfig.from_pretrained(shapes.write_config(Path(directory), name))
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32
    make: Any = AutoModelForCausalLM.from_config
    choose: Any = GenerationConfig
    with setting.place:
        model = make(config, dtype=dtype).eval()
    greedy = choose(max_new_tokens=answer, do_sample=False, eos_token_id=-1)
    for prompts in (warm, real):
        found = model.generate_batch(prompts, generation_config=greedy).values()
    # By its own clock from the first request on: what it prepares for a call is not counted.
    begun = min(one.created_time for one in found)
    seconds = max(one.lifespan[1] for one in found) - begun
    tokens = sum(len(one.generated_tokens) for one in found)
    if tokens != len(real) * answer:
        raise RuntimeError(f"{tokens} tokens of {len(real) * answer} came back")
    return _row(f"{name} transformers {__version__}", len(real), tokens, seconds)


def _row(what: str, requests: int, tokens: int, seconds: float) -> Row:
    return {
        "what": f"{what}: {requests} prompts at once",
        "us": seconds * 1e6,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
    }
