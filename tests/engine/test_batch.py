from __future__ import annotations

import pytest

from cluster.messages import KVLayout, LayerGroup, Request
from engine.batch import Batch, Chunk, Plan
from engine.blocks import Block
from engine.cache import KVCache
from engine.sequence import Sequence

CACHE = KVCache(KVLayout((LayerGroup(1, 1, 2),), "float32"), blocks=8, block_size=4)


def made(tokens: list[int], blocks: list[int], computed: int = 0) -> Sequence:
    sequence = Sequence(Request("r", tuple(tokens)), 1, 0, 0.0)
    sequence.blocks = [Block(number, 0) for number in blocks]
    sequence.computed = computed
    return sequence


@pytest.mark.parametrize(("count", "samples"), [(1, False), (4, False), (5, True)])
def test_a_chunk_samples_when_it_reaches_the_last_token(count: int, samples: bool) -> None:
    assert Chunk(made([9] * 7, [0, 1], computed=2), count).samples is samples


def test_a_mixed_step_as_tensors() -> None:
    old = made([10, 11, 12, 13, 14], [6, 2], computed=4)
    young = made([20, 21], [5], computed=1)
    part = made([30, 31, 32, 33, 34, 35], [1, 7], computed=2)
    plan = Plan((Chunk(old, 1), Chunk(young, 1), Chunk(part, 3)))
    batch = Batch.of(plan, CACHE)
    assert plan.tokens == 5
    assert batch.tokens.tolist() == [14, 21, 32, 33, 34]
    assert batch.positions.tolist() == [4, 1, 2, 3, 4]
    assert batch.slots.tolist() == [8, 21, 6, 7, 28]
    assert batch.single == 2
    assert batch.block_table[0].tolist() == [6, 2]
    assert batch.block_table[1, :1].tolist() == [5]
    assert batch.block_table[2].tolist() == [1, 7]
    assert batch.starts.tolist() == [0, 1, 2, 5] and batch.counts == (1, 1, 3)
    assert batch.contexts.tolist() == [5, 2, 5] and batch.lengths == (5, 2, 5)
    assert [batch.rows_of(segment) for segment in range(3)] == [
        slice(0, 1),
        slice(1, 2),
        slice(2, 5),
    ]
    assert batch.sampled_rows.tolist() == [0, 1]
    assert batch.samples == (old, young)


def test_a_step_may_sample_nothing() -> None:
    batch = Batch.of(Plan((Chunk(made([1, 2, 3], [0]), 2),)), CACHE)
    assert batch.samples == () and batch.sampled_rows.shape == (0,)


def test_single_rows_count_only_up_to_the_first_longer_chunk() -> None:
    first, second = made([1, 2], [0]), made([3], [1])
    batch = Batch.of(Plan((Chunk(first, 2), Chunk(second, 1))), CACHE)
    assert batch.single == 0
    assert batch.sampled_rows.tolist() == [1, 2]
