"""Which prompt tokens the next step computes. Decides, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from engine.batch import Chunk
from engine.sequence import Sequence


def chunks(prefilling: Iterable[Sequence], budget: int) -> tuple[Chunk, ...]:
    """First come, first served under a token budget.

    Several short prompts share a step; a long one takes as many steps as it needs, and what it
    leaves of the last step's budget goes to the next in line.
    """
    planned: list[Chunk] = []
    for sequence in prefilling:
        if budget <= 0:
            break
        count = min(budget, sequence.remaining)
        planned.append(Chunk(sequence, count))
        budget -= count
    return tuple(planned)
