from __future__ import annotations

import pytest
import torch

from decode.attention import DecodeAttention
from engine.layers.attention import written
from tests.engine.pages import WINDOWS, Pages

SHAPES = {
    "the first token": [(0, 1)],
    "one sequence": [(13, 1)],
    "contexts of many lengths": [(3, 1), (16, 1), (0, 1), (4, 1), (30, 1)],
    "prompts alone": [(0, 9), (5, 3)],
    "answers and prompts": [(11, 1), (2, 1), (0, 7), (8, 5)],
    "a prompt's last token": [(11, 1), (0, 6), (9, 1)],
}


@pytest.mark.parametrize("layer", range(len(WINDOWS)), ids=["full", "window"])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (7, 1)], ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 64])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_equals_dense_attention(
    shapes: list[tuple[int, int]], block_size: int, heads: tuple[int, int], layer: int
) -> None:
    pages = Pages.of(shapes, *heads, layer, block_size)
    attend = DecodeAttention(pages.cache, pages.batch, WINDOWS)
    out = attend(layer, written(pages.q, pages.k, pages.v))
    torch.testing.assert_close(out.double(), pages.expected(WINDOWS[layer]), rtol=1e-5, atol=1e-5)


def test_a_nan_of_one_sequence_stays_with_it() -> None:
    pages = Pages.of([(2, 1), (40, 1), (3, 1)], 4, 2, 0, block_size=4)
    theirs = pages.batch.block_table[1, :10].long()[:, None] * 4 + torch.arange(4)
    pages.cache.keys(0)[theirs] = pages.cache.values(0)[theirs] = float("nan")
    attend = DecodeAttention(pages.cache, pages.batch, WINDOWS)
    out = attend(0, written(pages.q, pages.k, pages.v))
    assert out.isnan().flatten(1).any(1).tolist() == [False, True, False]
