"""That a step moves the pulse from within. What it computes is tested with the models."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from cluster.config import BUILT_IN
from cluster.messages import KVLayout, LayerGroup, Request, Sampling
from engine import sampler
from engine.batch import Batch, Chunk, Plan
from engine.blocks import Block
from engine.cache import KVCache
from engine.layers.attention import Attend, Write
from engine.models.load import load_model
from engine.runner import Runner
from engine.sampler import Candidates, Noise
from engine.sequence import Sequence
from tests.dense_cache import DenseCache
from tests.native import needs_native

KERNELS = ["torch", pytest.param("native", marks=needs_native)]
PROMPT = 5
CACHE = KVCache(KVLayout((LayerGroup(1, 1, 8),), "float32"), 9, PROMPT)


def prompts(count: int) -> Batch:
    chunks = []
    for number in range(count):
        request = Request(str(number), tuple(range(PROMPT)), Sampling(temperature=1.0))
        sequence = Sequence(request, 1, 0, 0.0)
        sequence.blocks = [Block(number, 0)]
        chunks.append(Chunk(sequence, PROMPT))
    return Batch.of(Plan(tuple(chunks)), CACHE)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_step_moves_the_pulse_from_layer_to_layer_and_from_row_to_row(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(BUILT_IN, kernels=kernels)
    runner = Runner(loaded.model)
    seen: list[int] = []

    def attention(batch: Batch) -> Attend:
        attend = DenseCache(loaded.config).attend(len(batch.tokens))

        def watched(layer: int, write: Write) -> torch.Tensor:
            seen.append(runner.pulse)
            return attend(layer, write)

        return watched

    def draw(candidates: Candidates, noise: Noise) -> int:
        seen.append(runner.pulse)
        return sampler.draw(candidates, noise)

    monkeypatch.setattr(loaded.model.ops, "draw", draw, raising=False)
    assert len(runner.launch(prompts(3), attention)()) == 3
    layers = loaded.config.layers
    assert len(seen) == layers + 3
    assert all(before < after for before, after in pairwise(seen))
    products = [after - before for before, after in pairwise(seen[:layers])]
    assert min(products) >= 4  # of one layer: into attention, out of it, up and down
