from __future__ import annotations

import pytest
import torch

from engine.layers.attention import written
from prefill.attention import PrefillAttention
from tests.engine.pages import WINDOWS, Pages

SHAPES = {
    "one token": [(0, 1)],
    "one block": [(0, 4)],
    "a chunk in the middle": [(7, 6)],
    "several prompts": [(0, 3), (9, 2), (4, 8), (0, 1), (12, 1)],
}


@pytest.mark.parametrize("layer", range(len(WINDOWS)), ids=["full", "window"])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (7, 1)], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_equals_dense_attention(
    shapes: list[tuple[int, int]], heads: tuple[int, int], layer: int
) -> None:
    pages = Pages.of(shapes, *heads, layer, block_size=4)
    attend = PrefillAttention(pages.cache, pages.batch, WINDOWS)
    out = attend(layer, written(pages.q, pages.k, pages.v))
    torch.testing.assert_close(out.double(), pages.expected(WINDOWS[layer]), rtol=1e-5, atol=1e-5)


def test_it_stores_the_steps_keys_and_values() -> None:
    pages = Pages.of([(3, 4)], 2, 1, 1, block_size=4)
    attend = PrefillAttention(pages.cache, pages.batch, WINDOWS)
    attend(1, written(pages.q, pages.k, pages.v))
    assert torch.equal(pages.cache.keys(1)[pages.batch.slots], pages.k)
    assert torch.equal(pages.cache.values(1)[pages.batch.slots], pages.v)
