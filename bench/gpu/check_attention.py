"""Both attention kernels against float64: every head size, groups, windows, blocks, mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from bench.gpu.paged import Paged, Shape, attended, error_of, paged, ulp
from bench.gpu.setting import HALVES, Rows, Setting, checked
from decode.kernels.attention import attend_singles
from decode.kernels.splits import plan_splits
from prefill.kernels.attention import attend_prompts

_ROUNDINGS: Final = 2.0
"""Of weights and of the result: each half a step of the dtype at most, in every entry."""

_LAYOUTS: Final = ((32, 8, 16, 0), (14, 2, 64, 0), (4, 4, 32, 700), (32, 4, 64, 4096))
"""Heads, KV heads, block size, window. A group of 7 leaves rows of a tile empty."""

_PROMPTS: Final = ((1, 0), (17, 0), (333, 31), (64, 8000), (2048, 100), (3, 4095), (5000, 0))
"""Rows of each segment, and the tokens before them."""

_CONTEXTS: Final = (32768, 0, 1, 15, 16, 17, 0, 1000, 8192, 699, 700, 701, 4096, 4097, 63, 65, 0)

_SMALL_LAYOUTS: Final = ((4, 2, 16, 0), (7, 1, 32, 9))
_SMALL_PROMPTS: Final = ((1, 0), (17, 0), (3, 31))
_SMALL_CONTEXTS: Final = (40, 0, 1, 17)


def prefill(setting: Setting, half: str, head_dim: int) -> Rows:
    """Packed segments of different lengths over paged prefixes."""
    for number, shape in enumerate(_shapes(setting, half, head_dim)):
        segments = _PROMPTS if setting.on_gpu else _SMALL_PROMPTS
        counts = [count for count, _ in segments]
        inputs = paged(setting, shape, counts, [sum(pair) for pair in segments], number=number)
        yield _row(inputs, _prompts(inputs))


def decode(setting: Setting, half: str, head_dim: int) -> Rows:
    """A mixture of lengths; a long one alone; many more slices than the device has room for."""
    mixed = _CONTEXTS if setting.on_gpu else _SMALL_CONTEXTS
    for number, shape in enumerate(_shapes(setting, half, head_dim)):
        for contexts, slices in ((mixed, None), (mixed[:1], None), (mixed, 1024)):
            inputs = paged(setting, shape, [1] * len(contexts), contexts, number=number)
            yield _row(inputs, _singles(inputs, slices if setting.on_gpu else slices and 9), slices)


def merging(setting: Setting, half: str) -> Rows:
    """The same again and again: pieces that meet in another order must not change a bit."""
    shape = Shape(setting.sizes.heads, setting.sizes.kv_heads, 128, HALVES[half])
    longest = max(setting.sizes.contexts)
    inputs = paged(setting, shape, [1] * 3, [longest, longest // 3, 5])
    for slices in (None, 16 * (longest // 256 + 1)):
        first = _singles(inputs, slices).clone()
        moved = sum(
            not torch.equal(first, _singles(inputs, slices)) for _ in range(setting.sizes.repeats)
        )
        yield checked(f"{_name(inputs)} slices={slices}: runs that differ", moved, 0)


def captured(setting: Setting, half: str) -> Rows:
    """One graph, replayed for other contexts and tables, with rows that only pad."""
    shape = Shape(setting.sizes.heads, setting.sizes.kv_heads, 128, HALVES[half])
    rows, longest = 24, max(setting.sizes.contexts) // 4
    held = paged(setting, shape, [1] * rows, [longest] * rows)
    order = torch.randperm(rows, generator=setting.random(7), device=setting.place)

    def attend() -> Tensor:
        return _singles(held, None)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for lengths in ((longest, 1, 0), (0, 0, 0), (33, longest, 700), (longest,) * 3):
        contexts = [lengths[row % 3] for row in range(rows)]
        held.contexts.copy_(torch.tensor(contexts, dtype=torch.int32))
        held.block_table.copy_(held.block_table[order])
        out.fill_(float("nan"))
        graph.replay()
        now = replace(held, lengths=tuple(contexts))
        yield _row(now, out)


def far(setting: Setting) -> Rows:
    """Pages so large that offsets of elements take more than 32 bits."""
    half = torch.bfloat16 if setting.on_gpu else torch.float32
    shape = Shape(setting.sizes.heads, setting.sizes.kv_heads, 128, half)
    blocks = setting.sizes.far // (shape.kv_heads * shape.head_dim * shape.block_size)
    counts, lengths = [200, 1, 40], [200, 900, 1000]
    if not setting.on_gpu:
        counts, lengths = [3, 1], [3, 20]
    inputs = paged(setting, shape, counts, lengths, blocks=blocks)
    yield _row(inputs, _prompts(inputs))
    inputs = paged(setting, shape, [1] * len(lengths), lengths, blocks=blocks, number=1)
    yield _row(inputs, _singles(inputs, None))


def _shapes(setting: Setting, half: str, head_dim: int) -> list[Shape]:
    layouts = _LAYOUTS if setting.on_gpu else _SMALL_LAYOUTS
    return [
        Shape(heads, kv_heads, head_dim, HALVES[half], block_size, window)
        for heads, kv_heads, block_size, window in layouts
    ]


def _prompts(inputs: Paged) -> Tensor:
    shape = inputs.shape
    return attend_prompts(
        inputs.q,
        inputs.keys,
        inputs.values,
        inputs.starts,
        inputs.contexts,
        inputs.block_table,
        shape.block_size,
        shape.window,
        shape.scale,
        max(inputs.counts),
        out=torch.full_like(inputs.q, float("nan")),
    )


def _singles(inputs: Paged, slices: int | None) -> Tensor:
    shape = inputs.shape
    heads = shape.heads, shape.kv_heads, shape.head_dim
    return attend_singles(
        inputs.q,
        inputs.keys,
        inputs.values,
        inputs.contexts,
        inputs.block_table,
        shape.block_size,
        shape.window,
        shape.scale,
        plan_splits(inputs.contexts, *heads, shape.dtype, shape.window, slices=slices),
        torch.full_like(inputs.q, float("nan")),
    )


def _row(inputs: Paged, out: Tensor, slices: int | None = None) -> dict[str, object]:
    errors = []
    for segment, length in enumerate(inputs.lengths):
        mine = out[inputs.rows_of(segment)]
        wanted = attended(inputs, segment) if length else torch.zeros_like(mine)
        errors.append(error_of(mine, wanted))
    # max() passes over a NaN that is not the first.
    worst = max(errors, key=lambda error: (error != error, error))
    bound = _ROUNDINGS * ulp(inputs.shape.dtype) if out.dtype != torch.float32 else 1e-5
    what = _name(inputs) + (f" slices={slices}" if slices else "")
    return checked(what, worst, bound)


def _name(inputs: Paged) -> str:
    shape = inputs.shape
    segments = f"{_several(inputs.counts)} rows of {_several(inputs.lengths)}"
    return (
        f"{shape.heads}/{shape.kv_heads}x{shape.head_dim} block={shape.block_size} "
        f"window={shape.window} {segments}"
    )


def _several(numbers: Sequence[int]) -> str:
    return f"{min(numbers)}-{max(numbers)}" if min(numbers) < max(numbers) else str(max(numbers))
