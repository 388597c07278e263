"""Which prompt tokens the next step computes. Decides, changes nothing."""

from __future__ import annotations

from collections.abc import Sequence as List

from engine.batch import Chunk
from engine.sequence import Sequence


def chunks(prefilling: List[Sequence], budget: int) -> tuple[Chunk, ...]:
    """Half of the token budget goes to who came first, the rest to those with the least left.

    So several short prompts share a step, a long one takes many, and neither starves: a short one
    behind a long one waits for a step or two instead of for all of it, and a long one advances by
    half a budget at least, however many short ones keep coming. What either half does not need
    goes to the other. Oldest first in the result.
    """
    if not prefilling or budget <= 0:
        return ()
    counts = [0] * len(prefilling)
    counts[0] = min(prefilling[0].remaining, budget - budget // 2)
    left = budget - counts[0]
    for index in sorted(range(len(prefilling)), key=lambda i: prefilling[i].remaining - counts[i]):
        more = min(left, prefilling[index].remaining - counts[index])
        counts[index] += more
        left -= more
    return tuple(
        Chunk(sequence, count) for sequence, count in zip(prefilling, counts, strict=True) if count
    )
