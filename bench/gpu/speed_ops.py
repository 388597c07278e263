"""What moves memory beside the copy rate, and the matrix products of a model of 8 billion."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu.setting import Rows, Setting, timed
from bench.gpu.stopwatch import Call, Stopwatch
from cluster.messages import Request, Sampling
from decode.kernels.splits import plan_splits
from engine.kernels.argmax import argmax
from engine.kernels.move_kv import gather_kv, scatter_kv
from engine.kernels.norm import add_rms_norm, rms_norm
from engine.kernels.rope_write import rope_write
from engine.kernels.sampling import sample
from engine.kernels.sampling_tensors import SamplingTensors
from engine.kernels.swiglu import swiglu
from engine.sequence import Sequence as Answer

AIM: Final = 0.8  # of the copy rate, at thousands of rows
_MANY: Final = 4096
_SMALL_CALLS: Final = 4  # in one graph, whose own start counts that much less
_LEAST_BYTES: Final = 256 << 20
"""What the calls that take turns move: more than any L2 cache holds."""


def fused(setting: Setting) -> Rows:
    """At few rows a launch is the limit: what stands there is the time of one, in a graph."""
    watch, sizes = Stopwatch(setting.place), setting.sizes
    for rows in sizes.rows:
        for name, moved, call in _fused_calls(setting, rows):
            seconds = watch.seconds(call)
            aim = AIM if rows >= _MANY else None
            yield timed(f"{name} {rows} rows", seconds, moved / setting.limits.copy, aim=aim)


def _fused_calls(setting: Setting, rows: int) -> list[tuple[str, int, list[Call]]]:
    """(name, bytes of a call, calls that take turns)."""
    sizes, half = setting.sizes, _half(setting)
    hidden, inner, d = sizes.hidden, sizes.inner, sizes.hidden // sizes.heads
    heads = sizes.heads, sizes.kv_heads
    weight = _randn(setting, (hidden,))
    cos, sin = torch.rand((2, rows, d // 2), generator=setting.random(), device=setting.place)
    slots = torch.randperm(rows, generator=setting.random(), device=setting.place)
    packed = (heads[0] + 2 * heads[1]) * d

    def norm() -> Call:
        x = _randn(setting, (rows, hidden))
        return lambda: rms_norm(x, weight, 1e-5)

    def add() -> Call:
        x, residual = _randn(setting, (2, rows, hidden))
        return lambda: add_rms_norm(x, residual, weight, 1e-5)

    def rope() -> Call:
        qkv, pages = _randn(setting, (rows, packed)), _randn(setting, (2, rows, heads[1], d))
        keys, values = pages
        angles = None, None, 1e-5, cos, sin
        return lambda: rope_write(qkv, heads[0], heads[1], *angles, keys, values, slots)

    def gate() -> Call:
        gate_up = _randn(setting, (rows, 2 * inner))
        return lambda: swiglu(gate_up)

    size = half.itemsize
    made: tuple[tuple[str, int, Callable[[], Call]], ...] = (
        ("rms_norm", 2 * rows * hidden * size, norm),
        ("add_rms_norm", 4 * rows * hidden * size, add),
        ("rope_write", 2 * rows * packed * size + rows * d * 4, rope),
        ("swiglu", 3 * rows * inner * size, gate),
    )
    return [(name, moved, _several(setting, make, moved)) for name, moved, make in made]


def choosing(setting: Setting) -> Rows:
    """Greedy and drawn tokens of float32 logits; what a step plans of attention."""
    watch, sizes = Stopwatch(setting.place), setting.sizes
    for rows in sizes.batches:
        logits = torch.randn((rows, sizes.vocab), generator=setting.random(), device=setting.place)
        limit = logits.nbytes / setting.limits.copy
        seconds = watch.seconds([partial(argmax, logits)] * _SMALL_CALLS)
        yield timed(f"argmax {rows}x{sizes.vocab}", seconds, limit)
        for name, sampling in _SAMPLINGS.items():
            answers = [Answer(Request("", (1, 2, 3), sampling), 1, 1, 0.0) for _ in range(rows)]
            how = SamplingTensors.of(answers, setting.place)
            seconds = watch.seconds([partial(sample, logits, how)] * _SMALL_CALLS)
            yield timed(f"sample {name} {rows}x{sizes.vocab}", seconds, limit)
        contexts = torch.full((rows,), 1024, dtype=torch.int32, device=setting.place)
        shape = sizes.heads, sizes.kv_heads, 128, _half(setting), 0
        seconds = watch.seconds([partial(plan_splits, contexts, *shape)] * _SMALL_CALLS)
        yield timed(f"plan_splits {rows}", seconds, 0.0)


_SAMPLINGS: Final = {
    "free": Sampling(temperature=1.0, seed=5),
    "top_k=50 top_p=0.9": Sampling(temperature=0.7, top_k=50, top_p=0.9, seed=5),
    "top_p=0.95": Sampling(temperature=1.0, top_p=0.95, seed=5),
    "penalised": Sampling(temperature=0.7, repetition_penalty=1.2, seed=5),
}


def moving(setting: Setting) -> Rows:
    """KV of a chunk into wire form and back, all layers; within the device, then over the bus."""
    watch, layers = Stopwatch(setting.place), 32
    for tokens in (512, 2048) if setting.on_gpu else (8,):
        shape = (layers, 2, 2 * tokens, setting.sizes.kv_heads, 128)
        pages = _randn(setting, shape)
        slots = torch.randperm(2 * tokens, generator=setting.random(), device=setting.place)[
            :tokens
        ]
        wire = gather_kv(pages, slots)
        limit, what = 2 * wire.nbytes / setting.limits.copy, f"{layers} layers, {tokens} tokens"
        calls: dict[str, Call] = {
            "gather": partial(gather_kv, pages, slots, out=wire),
            "scatter": partial(scatter_kv, pages, slots, wire),
        }
        for name, call in calls.items():
            yield timed(f"{name} {what}", watch.seconds([call]), limit, aim=AIM)
        if setting.on_gpu:
            yield from _over_the_bus(watch, pages, slots, wire, what)


def _over_the_bus(watch: Stopwatch, pages: Tensor, slots: Tensor, wire: Tensor, what: str) -> Rows:
    pinned = torch.empty(wire.shape, dtype=wire.dtype, pin_memory=True)
    out = watch.seconds([lambda: pinned.copy_(wire, non_blocking=True)])
    back = watch.seconds([lambda: wire.copy_(pinned, non_blocking=True)])
    gathered = watch.seconds([lambda: gather_kv(pages, slots, out=pinned)])
    scattered = watch.seconds([lambda: scatter_kv(pages, slots, pinned)])
    for name, seconds, limit in (("gather to", gathered, out), ("scatter from", scattered, back)):
        rate = wire.nbytes / seconds / 1e9
        yield timed(f"{name} pinned memory {what}", seconds, limit, gbps=rate)


def products(setting: Setting) -> Rows:
    """torch's own, which the model uses: what they reach bounds every step."""
    watch, sizes, half = Stopwatch(setting.place), setting.sizes, _half(setting)
    hidden, d = sizes.hidden, sizes.hidden // sizes.heads
    shapes = {
        "qkv": (hidden, (sizes.heads + 2 * sizes.kv_heads) * d),
        "o": (hidden, hidden),
        "gate_up": (hidden, 2 * sizes.inner),
        "down": (sizes.inner, hidden),
        "head": (hidden, sizes.vocab),
    }
    for name, (inputs, outputs) in shapes.items():
        moved = inputs * outputs * half.itemsize

        def matrix(inputs: int = inputs, outputs: int = outputs) -> Tensor:
            return _randn(setting, (outputs, inputs))

        weights = [matrix() for _ in range(_count(setting, moved))]
        for rows in sorted({*sizes.batches, *sizes.rows}):
            x = _randn(setting, (rows, inputs))
            turns: Sequence[Tensor] = weights if rows < _MANY else weights[:1]
            calls = [partial(functional.linear, x, weight) for weight in turns]
            work = 2.0 * rows * inputs * outputs / setting.limits.products
            whole = moved + rows * (inputs + outputs) * half.itemsize
            limit = max(work, whole / setting.limits.copy)
            yield timed(f"{name} {rows}x{inputs}x{outputs}", watch.seconds(calls), limit)


def _half(setting: Setting) -> torch.dtype:
    return torch.bfloat16 if setting.on_gpu else torch.float32


_numbers = itertools.count(1)


def _randn(setting: Setting, shape: tuple[int, ...]) -> Tensor:
    """Other numbers each time."""
    random = setting.random(next(_numbers))
    return torch.randn(shape, generator=random, device=setting.place).to(_half(setting))


def _count(setting: Setting, moved: int) -> int:
    return max(1, min(32, -(-_LEAST_BYTES // moved))) if setting.on_gpu else 1


def _several(setting: Setting, make: Callable[[], Call], moved: int) -> list[Call]:
    """Activations of few rows come from the L2 cache in a model too; larger ones take turns."""
    return [make() for _ in range(_count(setting, moved) if moved > 1 << 20 else 8)]
