"""Prefill attention beside torch's back-ends, decode attention beside the copy rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu.paged import Paged, Shape, paged
from bench.gpu.setting import Row, Rows, Setting, timed
from bench.gpu.stopwatch import Stopwatch
from decode.kernels.attention import attend_singles
from decode.kernels.splits import Config as SinglesConfig
from decode.kernels.splits import plan_splits
from prefill.kernels.attention import Config as PromptsConfig
from prefill.kernels.attention import attend_prompts

PREFILL_AIM: Final = 0.9  # of the best back-end of torch
DECODE_AIM: Final = 0.85  # of the copy rate, from 8 x 4096 tokens on

_PEERS: Final = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_MOST_BYTES: Final = 60e9
_LAYERS: Final = 24  # pages that take turns, so that none is in the L2 cache


def prefill(setting: Setting, head_dim: int) -> Rows:
    """One whole prompt; then a chunk at the end of a long one, which SDPA has no call for."""
    watch = Stopwatch(setting.place)
    for tokens in setting.sizes.prompts:
        peers = _peers(setting, watch, head_dim, tokens)
        for block_size in (16, 64):
            inputs = _prompt(setting, head_dim, block_size, tokens, tokens)
            yield _prefill_row(setting, watch, inputs, peers, PREFILL_AIM)
    rows, tokens = setting.sizes.prompts[0], setting.sizes.prompts[-1]
    if rows < tokens:
        inputs = _prompt(setting, head_dim, 16, rows, tokens)
        yield _prefill_row(setting, watch, inputs, {}, None)


def _prompt(setting: Setting, head_dim: int, block_size: int, rows: int, tokens: int) -> Paged:
    sizes = setting.sizes
    half = torch.bfloat16 if setting.on_gpu else torch.float32
    shape = Shape(sizes.heads, sizes.kv_heads, head_dim, half, block_size)
    return paged(setting, shape, [rows], [tokens])


def _prefill_row(
    setting: Setting,
    watch: Stopwatch,
    inputs: Paged,
    peers: dict[str, float],
    aim: float | None,
) -> Row:
    shape, [rows], [tokens] = inputs.shape, inputs.counts, inputs.lengths
    seconds = watch.seconds([attend_all(inputs)])
    pairs = rows * (tokens - rows) + rows * (rows + 1) / 2
    work = 4.0 * shape.heads * shape.head_dim * pairs
    return timed(
        f"{rows} rows of {tokens}, {shape.heads}/{shape.kv_heads}x{shape.head_dim} "
        f"block={shape.block_size}",
        seconds,
        work / setting.limits.products,
        peers=peers,
        aim=aim if peers else None,
        tflops=work / seconds / 1e12,
    )


def attend_all(inputs: Paged, config: PromptsConfig | None = None) -> Callable[[], Tensor]:
    """One call of attend_prompts."""
    shape, out = inputs.shape, torch.empty_like(inputs.q)
    return lambda: attend_prompts(
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
        out,
        config,
    )


def _peers(setting: Setting, watch: Stopwatch, head_dim: int, tokens: int) -> dict[str, float]:
    """Seconds of each back-end that does this shape, with keys and values as it likes them best."""
    sizes, half = setting.sizes, torch.bfloat16 if setting.on_gpu else torch.float32
    random = setting.random(1)

    def heads(count: int) -> Tensor:
        shape = (1, count, tokens, head_dim)
        return torch.randn(shape, generator=random, device=setting.place).to(half)

    q, k, v = heads(sizes.heads), heads(sizes.kv_heads), heads(sizes.kv_heads)
    group = sizes.heads // sizes.kv_heads
    repeated = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    found: dict[str, float] = {}
    for name, backend in _PEERS.items() if setting.on_gpu else (("math", SDPBackend.MATH),):
        for keys, values, grouped in ((k, v, True), (*repeated, False)):

            def call(
                backend: SDPBackend = backend,
                keys: Tensor = keys,
                values: Tensor = values,
                grouped: bool = grouped,
            ) -> Tensor:
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(
                        q, keys, values, is_causal=True, enable_gqa=grouped
                    )

            try:
                seconds = watch.seconds([call])
            except RuntimeError as error:
                way = "grouped" if grouped else "repeated"
                print(f"SDPA {name} {way}: {str(error).splitlines()[0]}", flush=True)
                continue
            found[name] = min(seconds, found.get(name, seconds))
    return found


def decode(setting: Setting, head_dim: int) -> Rows:
    """Every batch at every context, then a mixture of very different ones."""
    watch, sizes = Stopwatch(setting.place), setting.sizes
    for context in sizes.contexts:
        for batch in sizes.batches:
            large = batch * context >= 8 * 4096
            yield _decode_row(setting, watch, head_dim, [context] * batch, DECODE_AIM * large)
    few, longest = max(1, sizes.batches[-1] // 4), sizes.contexts[-1]
    mixed = [longest >> (2 * (n % 4)) for n in range(few)]
    yield _decode_row(setting, watch, head_dim, mixed, DECODE_AIM)


def _decode_row(
    setting: Setting, watch: Stopwatch, head_dim: int, contexts: list[int], aim: float
) -> Row:
    layers = decode_layers(setting, head_dim, contexts)
    seconds = watch.seconds(attend_layers(layers))
    read = sum(contexts) * layers[0].shape.token_bytes
    shape = layers[0].shape
    tokens = str(contexts[0]) if len(set(contexts)) == 1 else f"{min(contexts)}-{max(contexts)}"
    return timed(
        f"{len(contexts)} x {tokens}, {shape.heads}/{shape.kv_heads}x{head_dim} block=16",
        seconds,
        read / setting.limits.copy,
        aim=aim or None,
        gbps=read / seconds / 1e9,
    )


def decode_layers(setting: Setting, head_dim: int, contexts: list[int]) -> list[Paged]:
    """The same contexts in pages of several layers; as many as fit."""
    sizes, half = setting.sizes, torch.bfloat16 if setting.on_gpu else torch.float32
    shape = Shape(sizes.heads, sizes.kv_heads, head_dim, half)
    most = _MOST_BYTES / (2 * shape.token_bytes * sum(contexts))
    count = max(1, min(_LAYERS if setting.on_gpu else 1, int(most)))
    return [
        paged(setting, shape, [1] * len(contexts), contexts, number=number)
        for number in range(count)
    ]


def attend_layers(
    layers: list[Paged], config: SinglesConfig | None = None
) -> list[Callable[[], Tensor]]:
    """A call for each layer; all share what is planned once a step, which is not timed."""
    first, shape = layers[0], layers[0].shape
    heads = shape.heads, shape.kv_heads, shape.head_dim
    splits = plan_splits(first.contexts, *heads, shape.dtype, shape.window, config=config)

    def call(layer: Paged) -> Callable[[], Tensor]:
        out = torch.empty_like(layer.q)
        return lambda: attend_singles(
            layer.q,
            layer.keys,
            layer.values,
            first.contexts,
            layer.block_table,
            shape.block_size,
            shape.window,
            shape.scale,
            splits,
            out,
        )

    return [call(layer) for layer in layers]
