"""Cells: which part of a landing has been written, exactly, for boxes that come in any order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.messages import KVLayout
from engine.cache import group_spans
from kvtransfer.frames import Box


class Cells:
    """One byte for each layer x kv-head x token of a landing.

    So checking a box costs what the box is large, however many came before it, and the map is
    hundreds of times smaller than the KV that it stands for.
    """

    def __init__(self, layout: KVLayout, tokens: range) -> None:
        self._tokens = tokens
        self._spans = group_spans(layout)
        self._groups: list[npt.NDArray[np.bool_]] = [
            np.zeros((group.layers, group.kv_heads, len(tokens)), dtype=np.bool_)
            for group in layout.groups
        ]
        self._left = sum(part.size for part in self._groups)

    @property
    def full(self) -> bool:
        return self._left == 0

    def inside(self, box: Box) -> bool:
        """Whether all of it belongs to the landing, and its layers to one group."""
        return self._group(box) is not None and (
            self._tokens.start <= box.tokens.start and box.tokens.stop <= self._tokens.stop
        )

    def free(self, box: Box) -> bool:
        """Whether none of it is written. It is inside."""
        return not self._part(box).any()

    def fill(self, box: Box) -> None:
        """All of it is written now. It was free."""
        self._part(box)[:] = True
        self._left -= box.cells

    def _part(self, box: Box) -> npt.NDArray[np.bool_]:
        """[layers, kv_heads, tokens], a view."""
        group = self._group(box)
        assert group is not None, f"{box} is outside the landing"
        layer, token = self._spans[group].start, self._tokens.start
        return self._groups[group][
            box.layers.start - layer : box.layers.stop - layer,
            box.heads.start : box.heads.stop,
            box.tokens.start - token : box.tokens.stop - token,
        ]

    def _group(self, box: Box) -> int | None:
        for index, (span, part) in enumerate(zip(self._spans, self._groups, strict=True)):
            if span.start <= box.layers.start and box.layers.stop <= span.stop:
                return index if box.heads.stop <= part.shape[1] else None
        return None
