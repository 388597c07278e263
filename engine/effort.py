"""Effort: what the steps of a worker cost, beside what the hardware could do (MFU, MBU).

Floating point operations and bytes are counted from the batch and the model's shape, not measured:
matrix products and attention, weights and KV. Activations are left out: they stay in caches.

Source: Chowdhery et al. 2022 (PaLM), appendix B, for model FLOPs utilisation.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch

from cluster import metrics
from cluster.clock import Clock
from engine.batch import Batch
from engine.models.decoder import Decoder

_HALF_LIFE_S: Final = 10.0  # of busy time, in the gauges


@dataclass(frozen=True, slots=True)
class Peak:
    """What the device can do at best: operations and bytes in a second."""

    flops: float
    bytes: float


class Costs:
    """Operations and bytes of a step of one model."""

    def __init__(self, model: Decoder) -> None:
        config = model.config
        linears = list(model.linears())
        self._row_flops = 2 * sum(linear.inputs * linear.outputs for linear in linears)
        self._weight_bytes = sum(linear.bytes for linear in linears)
        self._head_flops = 2 * model.head.inputs * model.head.outputs
        self._head_bytes = model.head.bytes
        self._pair_flops = 4 * config.heads * config.head_dim
        self._kv_bytes = 2 * config.kv_heads * config.head_dim * model.ops.kv_dtype.itemsize
        self._layers = len(config.windows)
        self._windows = tuple(Counter(config.windows).items())  # (window, layers with it)

    def of(self, batch: Batch) -> tuple[int, int]:
        """(operations, bytes moved) of one step."""
        rows, samples = sum(batch.counts), len(batch.samples)
        pairs = kept = 0
        for window, layers in self._windows:
            for count, context in zip(batch.counts, batch.lengths, strict=True):
                pairs += layers * (_pairs(context, window) - _pairs(context - count, window))
                kept += layers * (min(context, window + count - 1) if window else context)
        flops = self._row_flops * rows + self._head_flops * samples + self._pair_flops * pairs
        moved = self._weight_bytes + self._head_bytes * bool(samples)
        return flops, moved + self._kv_bytes * (kept + rows * self._layers)


def _pairs(tokens: int, window: int) -> int:
    """How many (query, key) pairs the first `tokens` tokens of a sequence make."""
    if not window or tokens <= window:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


class Effort:
    """Told of each step by the step thread; read from the event loop."""

    def __init__(self, costs: Costs, peak: Peak) -> None:
        self._costs = costs
        self._peak = peak
        self._overhead = [0] * (len(metrics.OVERHEAD_BUCKETS) + 1)
        self._overhead_s = 0.0
        self._recent = (0.0, 0.0, 0.0)  # seconds, operations, bytes: older ones count for less

    def step(self, batch: Batch, forward_s: float, whole_s: float) -> None:
        overhead = max(0.0, whole_s - forward_s)
        self._overhead[bisect_left(metrics.OVERHEAD_BUCKETS, overhead)] += 1
        self._overhead_s += overhead
        flops, moved = self._costs.of(batch)
        kept = math.exp2(-whole_s / _HALF_LIFE_S)
        seconds, before_flops, before_moved = self._recent
        self._recent = (
            seconds * kept + whole_s,
            before_flops * kept + flops,
            before_moved * kept + moved,
        )

    def metrics(self) -> Iterator[tuple[str, float]]:
        """Gauges of the recent past, and the histogram of host overhead."""
        seconds, flops, moved = self._recent
        if seconds:
            yield metrics.MFU, flops / seconds / self._peak.flops
            yield metrics.MBU, moved / seconds / self._peak.bytes
        reached = 0
        bounds = (*metrics.OVERHEAD_BUCKETS, math.inf)
        for bound, count in zip(bounds, tuple(self._overhead), strict=True):
            reached += count
            yield metrics.labelled(metrics.STEP_OVERHEAD, le=metrics.bound(bound)), reached
        yield metrics.STEP_OVERHEAD_SUM, self._overhead_s


def measure_peak(device: torch.device, clock: Clock = time.perf_counter) -> Peak:
    """A short look at what matrix products and reading reach here; tens of milliseconds."""
    on_gpu = device.type == "cuda"
    side, size = (4096, 1 << 30) if on_gpu else (768, 64 << 20)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    square = torch.ones((side, side), dtype=dtype, device=device)
    block = torch.ones(size // 4, dtype=torch.float32, device=device)
    flops = 2 * side**3 / _best(lambda: square @ square, device, clock)
    moved = block.nbytes / _best(block.sum, device, clock)
    return Peak(flops, moved)


def _best(work: Callable[[], object], device: torch.device, clock: Clock) -> float:
    """Seconds of the fastest of a few runs."""
    times = []
    for _ in range(4):
        began = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - began)
    return min(times)
