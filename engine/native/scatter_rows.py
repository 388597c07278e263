"""scatter_rows: KV off the wire into pages; launcher of scatter_rows.cpp, numpy where it is not.

`rows` [layers, 2, slots], an element being all bytes of a slot; `chosen` [count] int64, no two
alike; `wire` uint8, [layers, 2, count] of such elements. Neither holds the interpreter's lock.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine import native

Rows = npt.NDArray[np.void]
Chosen = npt.NDArray[np.int64]
Wire = npt.NDArray[np.uint8]


def scatter_rows_reference(rows: Rows, chosen: Chosen, wire: Wire) -> None:
    rows[:, :, chosen] = wire.view(rows.dtype).reshape(*rows.shape[:2], len(chosen))


def scatter_rows(rows: Rows, chosen: Chosen, wire: Wire) -> None:
    """Raises ValueError, and IndexError before it writes anything."""
    if not native.available():
        scatter_rows_reference(rows, chosen, wire)
        return
    layers, two, slots = rows.shape
    arrays = (rows, chosen, wire)
    if not all(array.flags.c_contiguous for array in arrays) or chosen.dtype != np.int64:
        raise ValueError("rows, chosen and wire must be contiguous, and chosen int64")
    if wire.nbytes != layers * two * len(chosen) * rows.itemsize:
        raise ValueError(f"{wire.nbytes} bytes are not {len(chosen)} slots of {rows.shape}")
    pages, places, source = (array.__array_interface__["data"][0] for array in arrays)
    wrong = native.kernels.scatter_rows(
        pages, layers * two, slots, rows.itemsize, places, len(chosen), source
    )
    if wrong >= 0:
        raise IndexError(f"slot {chosen[wrong]} is not one of {slots}")
