"""What the next step of a decode worker does. Decides, changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List

from engine.batch import Chunk, Plan
from engine.sequence import Sequence
from prefill.scheduler import PromptScheduler


def plan(
    running: List[Sequence],
    prefilling: List[Sequence],
    available_blocks: int,
    block_size: int,
    budget: int,
    prompts: PromptScheduler,
    gives_back: Callable[[Sequence], int],
) -> Plan:
    """One token for every running sequence, then prompt chunks within what the budget leaves.

    `running` is in order of age. When the next tokens need more blocks than there are, the youngest
    give theirs up and are recomputed later: first those that are still prefilling, who have lost
    least, then the running. `gives_back` says how many blocks a sequence alone holds.
    """
    running, prefilling = list(running), list(prefilling)
    evicted: list[Sequence] = []
    needed = [sequence.blocks_for(sequence.computed + 1, block_size) for sequence in running]
    missing = sum(needed) - available_blocks
    while missing > 0:
        if prefilling:
            victim = prefilling.pop()
        else:
            victim = running.pop()
            missing -= needed.pop()
        missing -= gives_back(victim)
        evicted.append(victim)
    singles = tuple(Chunk(sequence, 1) for sequence in running)
    chunks = singles + prompts.chunks(prefilling, budget - len(singles))
    if not chunks:
        return Plan()  # an eviction that lets nobody run is for nothing: wait for landings to go
    return Plan(chunks, tuple(evicted))
