"""Which prompt tokens the next step computes."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Final

from engine.batch import Chunk
from engine.sequence import Sequence

LEAST_STEP: Final = 1 / 8
"""Of the token budget: what a step counts for at least, since its weights are read for one token
as for many."""


class PromptScheduler:
    """Short prompts soon, long ones in chunks, and nobody starved. Decides; computes nothing.

    Prompts with less left than the oldest that can be finished at once get a step to themselves,
    the shorter for it: a short prompt behind a long one waits for the rest of one step and no more.
    The oldest makes that good while nobody else is there. When it is a whole token budget behind,
    half of each step is its, however many short ones keep coming.
    """

    def __init__(self) -> None:
        self._overtaken = 0  # tokens by which others have been given more than the oldest

    def chunks(self, prefilling: List[Sequence], budget: int) -> tuple[Chunk, ...]:
        """Of `prefilling`, oldest first, what fits into `budget` tokens; in the same order."""
        if not prefilling or budget <= 0:
            return ()
        oldest, *others = prefilling
        counts = self._shared(prefilling, budget)
        if sum(counts) < sum(sequence.remaining for sequence in prefilling):
            quick = self._quick(oldest, others, budget - self._overtaken)
            if quick:
                counts = [s.remaining if s in quick else 0 for s in prefilling]
        given = sum(counts[1:])
        if not counts[0]:
            given = max(given, int(LEAST_STEP * budget))
        self._overtaken = max(0, self._overtaken + given - counts[0])
        return tuple(
            Chunk(sequence, count)
            for sequence, count in zip(prefilling, counts, strict=True)
            if count
        )

    @staticmethod
    def _quick(oldest: Sequence, others: List[Sequence], budget: int) -> list[Sequence]:
        """Who can be finished before the oldest, within `budget` tokens for all of them."""
        quick = []
        for sequence in sorted(others, key=lambda sequence: sequence.remaining):
            budget -= sequence.remaining
            if budget < 0 or sequence.remaining >= oldest.remaining:
                break
            quick.append(sequence)
        return quick

    @staticmethod
    def _shared(prefilling: List[Sequence], budget: int) -> list[int]:
        """Half for the oldest, the rest for those with the least left; what either half does not
        need goes to the other."""
        counts = [0] * len(prefilling)
        counts[0] = min(prefilling[0].remaining, budget - budget // 2)
        left = budget - counts[0]
        order = sorted(range(len(counts)), key=lambda i: prefilling[i].remaining - counts[i])
        for index in order:
            more = min(left, prefilling[index].remaining - counts[index])
            counts[index] += more
            left -= more
        return counts
