"""KV into pages, held to numpy."""

from __future__ import annotations

import numpy as np
import pytest

from engine import native
from engine.native.scatter_rows import Rows, scatter_rows, scatter_rows_reference

LAYERS, SLOTS = 5, 40


def pages(row: int) -> Rows:
    raw = np.random.default_rng(row).integers(0, 256, (LAYERS, 2, SLOTS, row), dtype=np.uint8)
    return raw.view(np.dtype((np.void, row)))[..., 0]


@pytest.mark.parametrize("row", [1, 16, 96, 512, 4096])
@pytest.mark.parametrize(
    "chosen", [[], [0], [39], [3, 4, 5], [5, 4, 3], [*range(16, 32), *range(16)], [*range(40)]]
)
def test_any_slots_of_any_size(chosen: list[int], row: int) -> None:
    slots = np.array(chosen, dtype=np.int64)
    wire = np.random.default_rng(1).integers(0, 256, 3 * 2 * len(chosen) * row, dtype=np.uint8)
    wanted, got = pages(row), pages(row)
    scatter_rows_reference(wanted[1:4], slots, wire)
    scatter_rows(got[1:4], slots, wire)
    assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("wrong", [-1, SLOTS])
def test_a_slot_that_does_not_exist_writes_nothing(wrong: int) -> None:
    rows = pages(8)
    with pytest.raises(IndexError):
        scatter_rows(rows, np.array([0, 1, wrong]), np.zeros(LAYERS * 2 * 3 * 8, dtype=np.uint8))
    assert not native.available() or rows.tobytes() == pages(8).tobytes()


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")
def test_refuses_what_it_would_misread() -> None:
    rows, slots = pages(8), np.array([0, 1])
    wire = np.zeros(LAYERS * 2 * 2 * 8, dtype=np.uint8)
    with pytest.raises(ValueError, match="bytes are not 2 slots"):
        scatter_rows(rows, slots, wire[1:])
    for wrong in (slots.astype(np.int32), np.array([0, 9, 1, 9])[::2]):
        with pytest.raises(ValueError, match="must be contiguous"):
            scatter_rows(rows, wrong, wire)
    with pytest.raises(ValueError, match="must be contiguous"):
        scatter_rows(rows[:, :, ::2], slots, wire)
