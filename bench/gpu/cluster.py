"""Prefill and decode as two processes on the one device, and an undivided worker, over HTTP."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp

from bench import serve
from bench.gpu import shapes
from bench.gpu.setting import Row, Rows, Setting, checked
from bench.options import ServeOptions
from bench.stand import Mode, Seat, running
from cluster.config import WorkerConfig
from cluster.messages import BOTH, DECODE, PREFILL
from engine.tiny import questions

_AT_ONCE: Final = 8
_PROMPT, _ANSWER = 1024, 128
_SMALL_PROMPT, _SMALL_ANSWER = 40, 8
_KV_BYTES: Final = 16 << 30


def tiny(setting: Setting) -> Rows:
    """The built-in model says word for word what it has learned, in either form."""
    for mode in _modes(setting):
        yield from asyncio.run(_up(mode, _worker(setting, ""), 64, _recite(setting, mode.name)))


def served(setting: Setting) -> Rows:
    """Random prompts at a modest load, the same for either form: what a client sees."""
    name = shapes.QWEN_06B if setting.on_gpu else shapes.SMALL
    with tempfile.TemporaryDirectory() as directory:
        model = str(shapes.write_model(Path(directory), name))
        for mode in _modes(setting):
            ask = _load(setting, f"{name} {mode.name}", model)
            chunk = setting.sizes.chunk
            yield from asyncio.run(_up(mode, _worker(setting, model), chunk, ask))


def _modes(setting: Setting) -> tuple[Mode, ...]:
    """The cores are shared out: a worker's threads do nothing but launch."""
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    first, second = tuple(cores[:half][:4]), tuple((cores[half:] or cores)[:4])
    return (
        Mode("1 prefill + 1 decode", (Seat(PREFILL, first), Seat(DECODE, second))),
        Mode("1 both", (Seat(BOTH, first),)),
    )


def _worker(setting: Setting, model: str) -> WorkerConfig:
    fields: dict[str, Any] = {}
    if model:
        fields = {"model": model, "load_format": "dummy"}
    if model and setting.on_gpu:
        fields |= {"dtype": "bfloat16", "kv_cache_memory_bytes": _KV_BYTES}
    return WorkerConfig(
        device=setting.device,
        peak_tflops=setting.limits.products / 1e12,
        peak_gbps=setting.limits.copy / 1e9,
        log_level="warning",
        **fields,
    )


async def _up(
    mode: Mode, base: WorkerConfig, chunk: int, ask: Callable[[str], Awaitable[list[Row]]]
) -> list[Row]:
    """Start it, ask it, end it."""
    clock = asyncio.get_running_loop().time
    began = clock()
    async with running(mode, chunk, base) as url:
        ready = {"what": f"{mode.name}: ready", "us": (clock() - began) * 1e6}
        return [ready, *await ask(url)]


def _recite(setting: Setting, name: str) -> Callable[[str], Awaitable[list[Row]]]:
    known = questions()[: setting.sizes.answers]

    async def ask(url: str) -> list[Row]:
        free = asyncio.Semaphore(_AT_ONCE)
        async with aiohttp.ClientSession() as session:

            async def one(number: int) -> tuple[int, str]:
                async with (
                    free,
                    session.post(
                        f"{url}/v1/chat/completions", json=_chat(known[number].turns)
                    ) as answer,
                ):
                    body = await answer.json()
                    if answer.status != 200:
                        return number, f"HTTP {answer.status}: {body}"
                    return number, str(body["choices"][0]["message"]["content"])

            said = await asyncio.gather(*(one(number) for number in range(len(known))))
        wrong = [text for number, text in said if text != known[number].turns[-1][1]]
        what = f"baton-tiny, {name}: {len(known)} answers, wrong ones"
        return [checked(what, len(wrong), 0, wrong=wrong[:3])]

    return ask


def _chat(turns: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return {"model": "baton-tiny", "messages": messages[:-1], "temperature": 0}


def _load(setting: Setting, name: str, model: str) -> Callable[[str], Awaitable[list[Row]]]:
    async def ask(url: str) -> list[Row]:
        prompt, answer = (_PROMPT, _ANSWER) if setting.on_gpu else (_SMALL_PROMPT, _SMALL_ANSWER)
        report = await serve.run(
            ServeOptions(
                base_url=url,
                tokenizer=model,
                num_prompts=setting.sizes.requests,
                num_warmups=_AT_ONCE,
                random_input_len=prompt,
                random_output_len=answer,
                max_concurrency=_AT_ONCE,
                ignore_eos=True,
                disable_tqdm=True,
                timeline=True,
                request_timeout=120.0,
                seed=setting.seed,
            )
        )
        numbers = report.to_json()
        told = {key: numbers[key] for key in _TOLD}
        told |= {key: value for key, value in numbers.items() if key.endswith("_ms")}
        what = f"{name}: {_AT_ONCE} at once, {prompt} in, {answer} out"
        return [checked(f"{what}: failed", report.summary.failed, 0), {"what": what, **told}]

    return ask


_TOLD: Final = ("completed", "duration", "output_throughput", "total_token_throughput")
