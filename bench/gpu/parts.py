"""All parts, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Final

from bench.gpu import shapes
from bench.gpu.options import GpuOptions
from bench.gpu.part import Later, Part

HEAD_DIMS: Final = (128, 64, 80, 96, 256)


def chosen(options: GpuOptions) -> list[Part]:
    """What the flags ask for. A part that is named runs though it is no usual one."""
    parts = list(all_parts("cuda" in options.device))
    if options.only:
        parts = [part for part in parts if any(map(part.matches, options.only))]
    else:
        parts = [part for part in parts if not part.extra or options.tune]
    return [part for part in parts if not any(map(part.matches, options.skip))]


def all_parts(on_gpu: bool) -> Iterator[Part]:
    """Without a GPU fp32 stands in for bf16, and what needs a graph is left out."""
    halves = ("bf16", "fp16") if on_gpu else ("fp32", "fp16")
    yield Part("machine", Later("machine", "machine"), limit_s=60)
    for name, work, arguments in _checks(halves, on_gpu):
        yield Part(f"check.{name}", work, arguments, limit_s=150, alone=False)
    for half in halves if on_gpu else halves[:1]:
        yield Part(f"check.answers.{half}", Later("whole", "answers"), (half,), 90, alone=False)
    # The goals of the whole first: what the time is not enough for is known the least.
    for model in (shapes.LLAMA_8B, shapes.QWEN_06B) if on_gpu else (shapes.SMALL,):
        short = model.partition("-")[0]
        yield Part(f"model.prefill.{short}", Later("whole", "prefill"), (model,), 90)
        yield Part(f"model.decode.{short}", Later("whole", "decode"), (model,), 150)
    for head_dim in (128, 64):
        for name, limit_s in (("prefill", 60), ("decode", 75)):
            work = Later("speed_attention", name)
            yield Part(f"speed.{name}.d{head_dim}", work, (head_dim,), limit_s)
    for name in ("fused", "choosing", "moving", "products"):
        yield Part(f"speed.{name}", Later("speed_ops", name), limit_s=60)
    yield Part("cluster.tiny", Later("cluster", "tiny"), limit_s=120)
    yield Part("cluster.served", Later("cluster", "served"), limit_s=150)
    yield Part("model.peer", Later("peer", "beside"), limit_s=120)
    for head_dim in (128, 64):
        work = Later("tune", "decode")
        yield Part(f"tune.decode.d{head_dim}", work, (head_dim,), 240, extra=True)
        for block_size in (16, 64):
            name, work = f"tune.prefill.d{head_dim}.b{block_size}", Later("tune", "prefill")
            yield Part(name, work, (head_dim, block_size), 400, extra=True)


def _checks(halves: tuple[str, ...], on_gpu: bool) -> Iterator[tuple[str, Later, tuple[Any, ...]]]:
    attention, ops, sampling = "check_attention", "check_ops", "check_sampling"
    for head_dim, half in product(HEAD_DIMS, halves):
        for name in ("prefill", "decode"):
            yield f"{name}.{half}.d{head_dim}", Later(attention, name), (half, head_dim)
    for half in halves:
        yield f"merging.{half}", Later(attention, "merging"), (half,)
        yield f"norm.{half}", Later(ops, "norms"), (half,)
        yield f"swiglu.{half}", Later(ops, "activation"), (half,)
        for head_dim in HEAD_DIMS:
            yield f"rope.{half}.d{head_dim}", Later(ops, "rope"), (half, head_dim)
    if on_gpu:
        yield "graph", Later(attention, "captured"), ("bf16",)
    yield "far", Later(attention, "far"), ()
    yield "argmax", Later(ops, "greedy"), ()
    yield "move_kv", Later(ops, "moving"), ()
    yield "sampling", Later(sampling, "drawing"), ()
    yield "sampling_ties", Later(sampling, "ties"), ()
