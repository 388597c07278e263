"""attend_singles for one step: the layers with one window share the splits planned for it."""

from __future__ import annotations

from torch import Tensor

from decode.kernels.attention import attend_singles
from decode.kernels.splits import Splits, plan_splits


class PlannedSingles:
    """Plans at the first layer with a window; what it plans holds for one step's contexts."""

    def __init__(self) -> None:
        self._splits: dict[int, Splits] = {}

    def __call__(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        contexts: Tensor,
        block_table: Tensor,
        block_size: int,
        window: int,
        scale: float,
    ) -> Tensor:
        """As `attend_singles`."""
        if window not in self._splits:
            shape = (q.shape[1], keys.shape[1], q.shape[2])
            self._splits[window] = plan_splits(contexts, *shape, q.dtype, window)
        splits = self._splits[window]
        return attend_singles(
            q, keys, values, contexts, block_table, block_size, window, scale, splits
        )
