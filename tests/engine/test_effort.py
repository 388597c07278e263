from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cluster import metrics
from cluster.messages import KVLayout, LayerGroup, Request
from engine.batch import Batch, Chunk, Plan
from engine.blocks import Block
from engine.cache import KVCache
from engine.effort import Costs, Effort, Peak, measure_peak
from engine.models.decoder import Decoder
from engine.ops import TorchOps
from engine.sequence import Sequence
from tests.engine.shapes import CONFIG

CACHE = KVCache(KVLayout((LayerGroup(2, 2, 8),), "float32"), blocks=16, block_size=4)


def batch_of(*chunks: tuple[int, int, int]) -> Batch:
    """(tokens known, tokens computed before, tokens in the step) for each sequence."""
    made = []
    for known, computed, count in chunks:
        sequence = Sequence(Request("r", (1,) * known), 1, 0, 0.0)
        sequence.blocks = [Block(0, 0)] * -(-known // 4)
        sequence.computed = computed
        made.append(Chunk(sequence, count))
    return Batch.of(Plan(tuple(made)), CACHE)


def costs(window: int = 0) -> Costs:
    config = replace(CONFIG, windows=(window,) * CONFIG.layers)
    return Costs(Decoder(config, TorchOps(torch.float32, "meta")))


def brute(batch: Batch, window: int) -> tuple[int, int]:
    """Counted pair by pair, matrix by matrix."""
    c = CONFIG
    elements = c.layers * (
        c.hidden_size * (c.heads + 2 * c.kv_heads) * c.head_dim
        + c.heads * c.head_dim * c.hidden_size
        + 3 * c.hidden_size * c.intermediate_size
    )
    head = c.hidden_size * c.vocab_size
    flops = 2 * elements * len(batch.tokens) + 2 * head * len(batch.samples)
    moved = 4 * elements + (4 * head if batch.samples else 0)
    token_bytes = 2 * c.kv_heads * c.head_dim * 4
    for count, context in zip(batch.counts, batch.lengths, strict=True):
        seen: set[int] = set()
        for position in range(context - count, context):
            first = max(0, position - window + 1) if window else 0
            seen.update(range(first, position + 1))
            flops += c.layers * 4 * c.heads * c.head_dim * (position + 1 - first)
        moved += c.layers * token_bytes * (len(seen) + count)
    return flops, moved


@pytest.mark.parametrize("window", [0, 1, 3, 9])
@pytest.mark.parametrize(
    "chunks",
    [[(1, 0, 1)], [(7, 6, 1), (13, 12, 1)], [(20, 4, 9)], [(9, 8, 1), (16, 0, 16), (16, 3, 4)]],
)
def test_counted_as_pair_by_pair(chunks: list[tuple[int, int, int]], window: int) -> None:
    batch = batch_of(*chunks)
    assert costs(window).of(batch) == brute(batch, window)


def test_ratios_to_the_peak_and_the_histogram() -> None:
    batch = batch_of((7, 6, 1))
    flops, moved = costs().of(batch)
    effort = Effort(costs(), Peak(flops=flops * 100, bytes=moved * 50))
    effort.step(batch, forward_s=0.9, whole_s=1.0)
    sent = dict(effort.metrics())
    assert sent[metrics.MFU] == pytest.approx(0.01)
    assert sent[metrics.MBU] == pytest.approx(0.02)
    assert sent[metrics.STEP_OVERHEAD_SUM] == pytest.approx(0.1)
    assert sent[metrics.labelled(metrics.STEP_OVERHEAD, le="0.03")] == 0
    assert sent[metrics.labelled(metrics.STEP_OVERHEAD, le="0.1")] == 1
    assert sent[metrics.labelled(metrics.STEP_OVERHEAD, le="+Inf")] == 1


def test_old_steps_count_for_less() -> None:
    batch = batch_of((7, 6, 1))
    flops, moved = costs().of(batch)
    effort = Effort(costs(), Peak(flops, moved))
    effort.step(batch, 0.0, 1000.0)
    for _ in range(200):
        effort.step(batch, 0.0, 1.0)
    assert dict(effort.metrics())[metrics.MFU] == pytest.approx(1.0, rel=0.01)


def test_a_worker_that_has_not_stepped_has_no_ratio() -> None:
    sent = dict(Effort(costs(), Peak(1, 1)).metrics())
    assert metrics.MFU not in sent and metrics.MBU not in sent


def test_the_peak_is_the_fastest_of_a_few_runs() -> None:
    ticks = iter([0.0, 5.0, 5.0, 7.0, 7.0, 8.0, 8.0, 12.0, *[20.0, 24.0] * 4])
    peak = measure_peak(torch.device("cpu"), clock=lambda: next(ticks))
    assert peak.flops == 2 * 768**3 and peak.bytes == (64 << 20) / 4
