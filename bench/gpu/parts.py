"""All parts, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Final

from bench.gpu import (
    check_attention,
    check_ops,
    check_sampling,
    cluster,
    machine,
    peer,
    shapes,
    speed_attention,
    speed_ops,
    tune,
    whole,
)
from bench.gpu.options import GpuOptions
from bench.gpu.part import Part
from bench.gpu.setting import Rows

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
    yield Part("machine", machine.machine, limit_s=60)
    for name, work, arguments in _checks(halves, on_gpu):
        yield Part(f"check.{name}", work, arguments, limit_s=150, alone=False)
    for half in halves if on_gpu else halves[:1]:
        yield Part(f"check.answers.{half}", whole.answers, (half,), 90, alone=False)
    # The goals of the whole first: what the time is not enough for is known the least.
    for model in (shapes.LLAMA_8B, shapes.QWEN_06B) if on_gpu else (shapes.SMALL,):
        short = model.partition("-")[0]
        yield Part(f"model.prefill.{short}", whole.prefill, (model,), 90)
        yield Part(f"model.decode.{short}", whole.decode, (model,), 150)
    for head_dim in (128, 64):
        yield Part(f"speed.prefill.d{head_dim}", speed_attention.prefill, (head_dim,), 60)
        yield Part(f"speed.decode.d{head_dim}", speed_attention.decode, (head_dim,), 75)
    for name, work in _SPEEDS.items():
        yield Part(f"speed.{name}", work, limit_s=60)
    yield Part("cluster.tiny", cluster.tiny, limit_s=120)
    yield Part("cluster.served", cluster.served, limit_s=150)
    yield Part("model.peer", peer.beside, limit_s=120)
    for head_dim in (128, 64):
        yield Part(f"tune.decode.d{head_dim}", tune.decode, (head_dim,), 240, extra=True)
        for block_size in (16, 64):
            name = f"tune.prefill.d{head_dim}.b{block_size}"
            yield Part(name, tune.prefill, (head_dim, block_size), 400, extra=True)


_SPEEDS: Final[dict[str, Callable[..., Rows]]] = {
    "fused": speed_ops.fused,
    "choosing": speed_ops.choosing,
    "moving": speed_ops.moving,
    "products": speed_ops.products,
}


def _checks(
    halves: tuple[str, ...], on_gpu: bool
) -> Iterator[tuple[str, Callable[..., Rows], tuple[Any, ...]]]:
    for head_dim, half in product(HEAD_DIMS, halves):
        for name, work in (
            ("prefill", check_attention.prefill),
            ("decode", check_attention.decode),
        ):
            yield f"{name}.{half}.d{head_dim}", work, (half, head_dim)
    for half in halves:
        yield f"merging.{half}", check_attention.merging, (half,)
        yield f"norm.{half}", check_ops.norms, (half,)
        yield f"swiglu.{half}", check_ops.activation, (half,)
        for head_dim in HEAD_DIMS:
            yield f"rope.{half}.d{head_dim}", check_ops.rope, (half, head_dim)
    if on_gpu:
        yield "graph", check_attention.captured, ("bf16",)
    yield "far", check_attention.far, ()
    yield "argmax", check_ops.greedy, ()
    yield "move_kv", check_ops.moving, ()
    yield "sampling", check_sampling.drawing, ()
    yield "sampling_ties", check_sampling.ties, ()
