"""PromptQueue: prompts on a worker, from arrival until their last token is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from cluster.errors import BlocksExhausted
from engine.allocator import Allocator
from engine.sequence import Sequence


class PromptQueue:
    """First come, first served: `waiting` hold nothing, `prefilling` hold blocks for all tokens."""

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.prefilling
        yield from self.waiting

    @property
    def queued_tokens(self) -> int:
        return sum(sequence.remaining for sequence in self)

    def admit(self, spare: int, seats: int) -> list[Sequence]:
        """Give blocks to those who have waited longest while `spare` blocks stay available.

        At most `seats` are admitted. Nobody overtakes: a prompt that does not fit yet holds up
        those behind it, so that it is not starved by shorter ones.
        """
        admitted: list[Sequence] = []
        while self.waiting and len(admitted) < seats:
            sequence = self.waiting[0]
            try:
                self._allocator.admit(sequence, spare)
            except BlocksExhausted:
                break
            admitted.append(self.waiting.popleft())
        self.prefilling += admitted
        return admitted

    def remove(self, sequence: Sequence) -> None:
        """Forget it, whether waiting, prefilling or neither. Its blocks are the caller's affair."""
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
