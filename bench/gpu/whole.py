"""Whole models with random weights, stepped as a worker steps them: prefill, then decode steps."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any, Final

from bench.cpu_report import matrix_weights, prefill_flops
from bench.gpu import shapes
from bench.gpu.engine import EngineHere
from bench.gpu.setting import Row, Rows, Setting, checked, timed
from cluster.messages import BOTH, PREFILL
from cluster.model import ModelConfig
from engine.models.load import LoadedModel, load_model
from engine.tiny import TINY_DIR, Conversation, questions
from engine.tiny.corpus import Lesson
from engine.tiny.tokenizer import encode

MFU_AIM: Final = 0.55
STEP_AIMS: Final = {1: 1 / 1.25, 64: 1 / 1.4}
"""Share of the byte limit, by batch: of 8 billion parameters."""

PUBLISHED_FLOPS: Final = 989e12
"""bf16, dense, of an H100 and H200 by their data sheet: what MFU is of in others' papers."""

_GRAPHS: Final = "with graphs"
_RUNS: Final = 3
_WARM: Final = 4  # steps
_PROMPT: Final = 1024


def load(setting: Setting, name: str) -> LoadedModel:
    dtype = "bfloat16" if setting.on_gpu else "float32"
    with tempfile.TemporaryDirectory() as directory:
        path = shapes.write_config(Path(directory), name)
        return load_model(path, dtype=dtype, device=setting.device, load_format="dummy")


def prefill(setting: Setting, name: str) -> Rows:
    """One prompt at a time through a prefill worker's stage, in chunks, to its first token."""
    loaded = load(setting, name)
    chunk, prompts = setting.sizes.chunk, setting.sizes.prompts
    engine = EngineHere(loaded, PREFILL, sequences=1, context=max(prompts) + 1, budget=chunk)
    yield _warmth(name, engine.run_with(graphs=()))
    dice = Random(setting.seed)
    for tokens in prompts:
        runs = []
        for _ in range(_RUNS + 1):  # the first finds kernels that were not compiled yet
            engine.order(_ids(dice, engine.config, tokens), 1)
            began = time.perf_counter()
            told = engine.finish()
            runs.append(time.perf_counter() - began)
            assert len(told) == 1
        seconds, flops = statistics.median(runs[1:]), prefill_flops(engine.config, tokens)
        yield timed(
            f"{name} prefill {tokens} in chunks of {chunk}",
            seconds,
            flops / setting.limits.products,
            aim=MFU_AIM if name == shapes.LLAMA_8B else None,
            tokens_per_s=tokens / seconds,
            mfu_published=flops / seconds / PUBLISHED_FLOPS,
            tflops=flops / seconds / 1e12,
        )


def decode(setting: Setting, name: str) -> Rows:
    """Steps of more and more sequences with about `_PROMPT` tokens, with graphs and without.

    The prompts are computed here too: in chunks that ride in steps with those that run already.
    """
    loaded, sizes = load(setting, name), setting.sizes
    prompt = _PROMPT if setting.on_gpu else max(sizes.prompts)
    steps = sizes.steps + _WARM + 2  # two may be under way
    answer = 2 * steps * len(sizes.batches) + sum(sizes.batches)
    engine = EngineHere(
        loaded,
        BOTH,
        sequences=max(sizes.batches),
        context=prompt + answer,
        budget=sizes.chunk,
    )
    dice, held = Random(setting.seed), 0
    for batch in sizes.batches:
        engine.run_with(graphs=())
        for _ in range(batch - held):
            engine.order(_ids(dice, engine.config, prompt), answer)
        begun = time.perf_counter()
        fresh: set[str] = set()
        while len(fresh) < batch - held:
            fresh |= {token.request_id for token in engine.step() if token.index == 0}
        filled = (batch - held) * prompt / (time.perf_counter() - begun)
        held = batch
        yield _steps(setting, name, engine, batch, "eager") | {"fill_tokens_per_s": filled}
        yield _warmth(f"{name} graph of {batch}", engine.run_with(graphs=(batch,)))
        yield _steps(setting, name, engine, batch, _GRAPHS)
    del engine, loaded
    gc.collect()


def _steps(setting: Setting, name: str, engine: EngineHere, batch: int, how: str) -> Row:
    for _ in range(_WARM):
        engine.step()
    engine.settle()
    engine.host.seconds.clear()
    began, told = time.perf_counter(), []
    for _ in range(setting.sizes.steps):
        told += engine.step()
    told += engine.settle()
    seconds = (time.perf_counter() - began) / setting.sizes.steps
    assert len(told) == batch * setting.sizes.steps
    prompt = _PROMPT if setting.on_gpu else max(setting.sizes.prompts)
    lengths = prompt + round(statistics.mean(token.index for token in told))
    half = 2 if setting.on_gpu else 4
    moved = half * matrix_weights(engine.config) + batch * lengths * _kv_bytes(engine.config, half)
    flops = 2.0 * matrix_weights(engine.config) * batch
    limit = max(moved / setting.limits.copy, flops / setting.limits.products)
    return timed(
        f"{name} step of {batch} at ~{lengths} {how}",
        seconds,
        limit,
        aim=STEP_AIMS.get(batch) if how == _GRAPHS and name == shapes.LLAMA_8B else None,
        tokens_per_s=batch / seconds,
        host_us=1e6 * statistics.median(engine.host.seconds),
    )


def answers(setting: Setting, half: str) -> Rows:
    """The built-in model, word for word: greedy answers learned by heart, all at once and mixed
    with each other's prompts, from graphs and eager."""
    from tokenizers import Tokenizer

    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[half]
    loaded = load_model(TINY_DIR, dtype=dtype, device=setting.device)
    tokenizer = Tokenizer.from_file(str(TINY_DIR / "tokenizer.json"))
    known = questions()[: setting.sizes.answers]
    for graphs in ((1, 2, 4, 8), ()) if setting.on_gpu else ((),):
        engine = EngineHere(loaded, BOTH, sequences=8, context=1024, budget=48)
        engine.run_with(graphs=graphs)
        wanted = {}
        for talk in known:
            prompt, answer = _recital(tokenizer, talk)
            wanted[engine.order(prompt, len(answer) + 8, engine.config.eos_ids)] = answer
        said: dict[str, list[int]] = {}
        for token in engine.finish():
            said.setdefault(token.request_id, []).append(token.token)
        wrong = [
            tokenizer.decode(said.get(request, []))
            for request, answer in wanted.items()
            if said.get(request) != answer
        ]
        what = f"{half}, {'graphs' if graphs else 'eager'}: {len(known)} answers, wrong ones"
        yield checked(what, len(wrong), 0, wrong=wrong[:3])


def _recital(tokenizer: Any, talk: Conversation) -> tuple[list[int], list[int]]:
    """What to ask the built-in model, and what it must answer to the last token."""
    ids, own = encode(tokenizer, Lesson(talk.turns))
    start = len(own) - own[::-1].index(False)
    return ids[:start], ids[start:]


def _ids(dice: Random, config: ModelConfig, count: int) -> list[int]:
    return [dice.randrange(config.vocab_size) for _ in range(count)]


def _kv_bytes(config: ModelConfig, size: int) -> int:
    return 2 * config.layers * config.kv_heads * config.head_dim * size


def _warmth(name: str, seconds: float) -> Row:
    return {"what": f"{name}: warm-up", "us": seconds * 1e6}
