"""Cells against a plain set of (layer, head, token)."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.cells import Cells
from kvtransfer.frames import Box
from tests.kvtransfer.fakes import LAYOUT

TOKENS = range(3, 9)
GROUPS = ((range(2), 2), (range(2, 3), 3))  # layers, kv-heads


def ranges(stop: int) -> st.SearchStrategy[range]:
    borders = st.sets(st.integers(0, stop), min_size=2, max_size=2)
    return borders.map(lambda pair: range(min(pair), max(pair)))


boxes = st.builds(Box, ranges(4), ranges(4), ranges(10))


def cells_of(box: Box) -> set[tuple[int, int, int]]:
    return set(product(box.layers, box.heads, box.tokens))


WHOLE = [
    {*product(layers, range(heads), TOKENS)} for layers, heads in GROUPS
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(boxes, max_size=40))
def test_any_boxes_in_any_order_are_judged_exactly(given_boxes: list[Box]) -> None:
    cells, written = Cells(LAYOUT, TOKENS), set[tuple[int, int, int]]()
    for box in given_boxes:
        wanted = cells_of(box)
        assert cells.inside(box) == any(wanted <= group for group in WHOLE)
        if not cells.inside(box):
            continue
        assert cells.free(box) == written.isdisjoint(wanted)
        if cells.free(box):
            cells.fill(box)
            written |= wanted
        assert cells.full == (written == set.union(*WHOLE))


@given(st.permutations([*product(range(2), range(2)), *product((2,), range(3))]))
def test_full_with_the_last_cell_and_not_before(rows: list[tuple[int, int]]) -> None:
    cells = Cells(LAYOUT, TOKENS)
    for layer, head in rows:
        assert not cells.full
        cells.fill(Box(range(layer, layer + 1), range(head, head + 1), TOKENS))
    assert cells.full


def test_of_no_tokens_all_is_written() -> None:
    assert Cells(LAYOUT, range(8, 8)).full
