"""Other configurations of both attention kernels, each timed on a few shapes: which to ship."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from typing import Any, Final

import torch

from bench.gpu.paged import Paged, Shape, paged
from bench.gpu.setting import Row, Rows, Setting
from bench.gpu.speed_attention import attend_all, attend_layers, decode_layers
from bench.gpu.stopwatch import Stopwatch
from decode.kernels.splits import Config as SinglesConfig
from decode.kernels.splits import config_for
from prefill.kernels.attention import Config as PromptsConfig

_SINGLES: Final = {
    64: ((64, 4, 4, 3), (64, 4, 3, 4), (128, 4, 4, 2), (128, 4, 3, 3), (128, 8, 3, 2)),
    128: (
        (64, 4, 4, 2),
        (64, 4, 3, 3),
        (64, 8, 4, 2),
        (32, 4, 4, 3),
        (128, 8, 3, 1),
        (128, 4, 3, 1),
    ),
}
"""By head_dim: tile, warps, stages, programs."""

_CHIP: Final = 90


def decode(setting: Setting, head_dim: int) -> Rows:
    """A small batch, a usual one, a long one alone."""
    cases = ((8, 4096), (64, 4096), (1, 32768)) if setting.on_gpu else ((2, 40),)
    watch = Stopwatch(setting.place)
    candidates = [SinglesConfig(*numbers) for numbers in _SINGLES[head_dim]]
    if not setting.on_gpu:
        candidates = candidates[:1]
    group = setting.sizes.heads // setting.sizes.kv_heads
    shipped = config_for(head_dim, group, torch.bfloat16, _CHIP)
    for batch, context in cases:
        layers = decode_layers(setting, head_dim, [context] * batch)

        def seconds(config: SinglesConfig, layers: list[Paged] = layers) -> float:
            return watch.seconds(attend_layers(layers, config))

        yield from _ranked(f"decode x{head_dim} {batch} x {context}", candidates, seconds, shipped)


def prefill(setting: Setting, head_dim: int, block_size: int) -> Rows:
    """A long prompt, and short chunks of many over long prefixes."""
    sizes, watch = setting.sizes, Stopwatch(setting.place)
    shape = Shape(sizes.heads, sizes.kv_heads, head_dim, torch.bfloat16, block_size)
    cases = {"8192": ([8192], [8192]), "16 x 4 of 4096": ([4] * 16, [4096] * 16)}
    candidates = [
        PromptsConfig(m, n, warps, stages, descriptors=descriptors)
        for m, n, warps, stages, descriptors in product(
            (64, 128), (64, 128), (4, 8), (2, 3, 4), (False, True)
        )
        if (n <= block_size or not descriptors) and (warps == 4 or m == 128)
    ]
    if not setting.on_gpu:
        shape = Shape(4, 2, head_dim, torch.float32, block_size)
        cases, candidates = {"24": ([24], [24])}, candidates[:1]
    for name, (counts, lengths) in cases.items():
        inputs = paged(setting, shape, counts, lengths)

        def seconds(config: PromptsConfig, inputs: Paged = inputs) -> float:
            return watch.seconds([attend_all(inputs, config)])

        what = f"prefill x{head_dim} block={block_size} {name}"
        yield from _ranked(what, candidates, seconds, None)


def _ranked(
    what: str, candidates: list[Any], seconds: Callable[[Any], float], shipped: Any
) -> Rows:
    """The fastest first. What does not compile or fit is told and passed over."""
    rows: list[Row] = []
    for config in candidates:
        try:
            took = seconds(config)
        except Exception as error:  # Triton has no common one: too much shared memory, a bad shape
            print(f"{what} {config}: {type(error).__name__}: {error}", flush=True)
            continue
        numbers = asdict(config) | {"shipped": config == shipped}
        rows.append({"what": what, "us": took * 1e6, "config": numbers})
    yield from sorted(rows, key=lambda row: float(row["us"]))
