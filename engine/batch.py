"""Plan: what the next step will do. Batch: that plan as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.cache import KVCache
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `count` tokens of one sequence."""

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last known token, so that a new one follows."""
        return self.count == self.sequence.remaining


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: single-token chunks first, then prompt chunks. Lives one step."""

    chunks: tuple[Chunk, ...] = ()
    evicted: tuple[Sequence, ...] = ()  # give their blocks up first, to be recomputed later

    @property
    def tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's rows in a batch.

    `slots` [context] are the cache slots of its tokens 0 .. context - 1; its `rows` are the last
    `count` of those tokens.
    """

    rows: slice
    count: int
    context: int
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """A Plan as tensors, all sequences packed one after another without padding."""

    tokens: torch.Tensor  # [rows] int64
    positions: torch.Tensor  # [rows] int64
    slots: torch.Tensor  # [rows] int64: where each row's keys and values go
    segments: tuple[Segment, ...]
    single: int  # the first `single` segments have one row each
    sampled_rows: torch.Tensor  # [samples] int64
    samples: tuple[Sequence, ...]  # whose next token the step yields

    @classmethod
    def of(cls, plan: Plan, cache: KVCache) -> Batch:
        tokens: list[int] = []
        positions: list[np.ndarray] = []
        segments: list[Segment] = []
        sampled_rows: list[int] = []
        samples: list[Sequence] = []
        single = 0
        for chunk in plan.chunks:
            sequence, start = chunk.sequence, chunk.sequence.computed
            stop = start + chunk.count
            slots = torch.from_numpy(cache.slots_of(sequence.blocks, 0, stop))
            segments.append(
                Segment(slice(len(tokens), len(tokens) + chunk.count), chunk.count, stop, slots)
            )
            single += chunk.count == 1 and single == len(segments) - 1
            tokens += sequence.tokens[start:stop]
            positions.append(np.arange(start, stop))
            if chunk.samples:
                sampled_rows.append(len(tokens) - 1)
                samples.append(sequence)
        return cls(
            tokens=torch.tensor(tokens),
            positions=torch.from_numpy(np.concatenate(positions)),
            slots=torch.cat([segment.slots[-segment.count :] for segment in segments]),
            segments=tuple(segments),
            single=single,
            sampled_rows=torch.tensor(sampled_rows, dtype=torch.int64),
            samples=tuple(samples),
        )
