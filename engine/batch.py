"""Plan: what the next step will do. Batch: that plan as tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from engine.cache import KVCache
from engine.layers.attention import Attend
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `count` tokens of one sequence."""

    sequence: Sequence
    count: int
    samples: bool = field(init=False)  # it reaches the last token there is: a new one follows

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", self.count == self.sequence.remaining)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: single-token chunks first, then prompt chunks. Lives one step."""

    chunks: tuple[Chunk, ...] = ()
    evicted: tuple[Sequence, ...] = ()  # give their blocks up first, to be recomputed later

    @property
    def tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    def launch(self) -> None:
        """Its step is under way: count its tokens as computed, and the sampled ones as there."""
        samples = 0
        for chunk in self.chunks:
            chunk.sequence.launch(chunk.count, samples if chunk.samples else None)
            samples += chunk.samples


@dataclass(frozen=True, slots=True)
class Batch:
    """A Plan as tensors, all sequences packed one after another without padding.

    Segment i is one sequence's part: rows `starts[i]` to `starts[i + 1]`, which are the last of its
    first `contexts[i]` tokens. Their keys and values are in the blocks `block_table[i]`; entries
    beyond the context say nothing.
    """

    tokens: torch.Tensor  # [rows] int64; -1 - i: what sample i of the step before will be
    positions: torch.Tensor  # [rows] int64
    slots: torch.Tensor  # [rows] int64: where each row's keys and values go
    starts: torch.Tensor  # [segments + 1] int32
    contexts: torch.Tensor  # [segments] int32
    block_table: torch.Tensor  # [segments, width] int32
    sampled_rows: torch.Tensor  # [samples] int64
    samples: tuple[Sequence, ...]  # whose next token the step yields
    counts: tuple[int, ...]  # rows of each segment, on the host
    lengths: tuple[int, ...]  # contexts, on the host
    single: int  # the first `single` segments have one row each

    @classmethod
    def of(cls, plan: Plan, cache: KVCache) -> Batch:
        sequences = [chunk.sequence for chunk in plan.chunks]
        counts = np.array([chunk.count for chunk in plan.chunks])
        computed = np.array([sequence.computed for sequence in sequences])
        contexts = computed + counts
        table = _block_table(sequences, contexts, cache.block_size)
        single = _leading_ones(plan)
        # A row's place in its segment, then in its sequence, then in the cache.
        if single == len(sequences):  # most steps: a row each
            starts = np.arange(single + 1)
            segment, positions = starts[:-1], computed
        else:
            starts = np.zeros(len(counts) + 1, dtype=np.int64)
            np.cumsum(counts, out=starts[1:])
            segment = np.repeat(np.arange(len(counts)), counts)
            positions = np.arange(starts[-1]) + np.repeat(computed - starts[:-1], counts)
        blocks = table[segment, positions // cache.block_size].astype(np.int64)
        slots = blocks * cache.block_size + positions % cache.block_size
        tokens: list[int] = []
        for sequence, stop in zip(sequences, contexts.tolist(), strict=True):
            tokens += sequence.tokens[sequence.computed : stop]
        samples = [number for number, chunk in enumerate(plan.chunks) if chunk.samples]
        return cls(
            tokens=torch.from_numpy(np.array(tokens, dtype=np.int64)),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(slots),
            starts=torch.from_numpy(starts.astype(np.int32)),
            contexts=torch.from_numpy(contexts.astype(np.int32)),
            block_table=torch.from_numpy(table),
            sampled_rows=torch.from_numpy(starts[1:][samples] - 1),
            samples=tuple(sequences[number] for number in samples),
            counts=tuple(counts.tolist()),
            lengths=tuple(contexts.tolist()),
            single=single,
        )

    def on(self, **tensors: torch.Tensor) -> Batch:
        """The same with these tensors in place of its own, such as their copies on a device."""
        return replace(self, **tensors)  # type: ignore[arg-type]

    @property
    def longest(self) -> int:
        """The most rows of any segment."""
        return max(self.counts)

    def rows_of(self, segment: int) -> slice:
        start = sum(self.counts[:segment])
        return slice(start, start + self.counts[segment])


Attention = Callable[[Batch], Attend]
"""Makes the attention of a step from its batch, wherever the runner has put its tensors."""


def _block_table(
    sequences: list[Sequence], contexts: npt.NDArray[np.int64], block_size: int
) -> npt.NDArray[np.int32]:
    widths = -(-contexts // block_size)
    table = np.zeros((len(sequences), widths.max()), dtype=np.int32)
    for row, sequence, width in zip(table, sequences, widths.tolist(), strict=True):
        row[:width] = sequence.block_numbers()[:width]
    return table


def _leading_ones(plan: Plan) -> int:
    for number, chunk in enumerate(plan.chunks):
        if chunk.count != 1:
            return number
    return len(plan.chunks)
