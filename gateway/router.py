"""Which workers get a request: one small pure function per pool.

A prefill worker costs the time until ours is done: the prompt tokens queued, and of ours those that
its prefix cache lacks, at its measured speed. A decode worker costs the share of its blocks in use
once ours is there, because that is what slows its steps and what runs out. The cheapest wins; ties
go to the worker with fewer requests, then by name, so that a choice can be explained afterwards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.messages import Request


@dataclass(frozen=True, slots=True)
class View:
    """What a policy sees of one worker."""

    name: str
    requests: int  # this gateway's, on it now
    queued_tokens: int
    total_blocks: int
    used_blocks: int  # promised or owned: neither free nor merely cached
    block_size: int
    cached_prefix: int  # tokens of this prompt that it probably holds
    speed: float = 0.0  # prompt tokens per second as measured; 0 while it is not


def choose_prefill(workers: Iterable[View], prompt_tokens: int) -> View | None:
    """The worker that will have read the prompt first; one not measured yet is as fast as usual."""
    workers = list(workers)
    known = [worker.speed for worker in workers if worker.speed]
    usual = sum(known) / len(known) if known else 1.0
    return min(
        workers, key=lambda w: (_prefill_cost(w, prompt_tokens, usual), w.name), default=None
    )


def choose_decode(workers: Iterable[View], prompt_tokens: int) -> View | None:
    """The worker with the smallest share of its blocks in use, the request included.

    A cached prefix costs no block and no transfer.
    """
    return min(workers, key=lambda w: (_decode_cost(w, prompt_tokens), w.name), default=None)


def _prefill_cost(worker: View, prompt_tokens: int, usual: float) -> tuple[float, int]:
    tokens = worker.queued_tokens + prompt_tokens - worker.cached_prefix
    return tokens / (worker.speed or usual), worker.requests


def _decode_cost(worker: View, prompt_tokens: int) -> tuple[float, int]:
    lacking = -(-(prompt_tokens - worker.cached_prefix) // worker.block_size)
    return (worker.used_blocks + lacking) / max(1, worker.total_blocks), worker.requests


PREFIX_STEP = 32
"""Prompts are remembered in steps of this many tokens."""


class PrefixMemory:
    """Which prompts a worker has seen lately: a guess of what its prefix cache holds.

    A guess is enough: the worker's own cache decides, a wrong one costs only a worse choice.
    `capacity` is the number of tokens that the worker's blocks hold.
    """

    def __init__(self, capacity: int) -> None:
        self._most = max(1, capacity // PREFIX_STEP)
        self._seen: OrderedDict[int, None] = OrderedDict()

    def hit(self, marks: Sequence[int]) -> int:
        """Tokens of the longest remembered prefix of a prompt with these `marks`."""
        known = 0
        for mark in marks:
            if mark not in self._seen:
                break
            known += 1
        return known * PREFIX_STEP

    def remember(self, marks: Sequence[int]) -> None:
        for mark in reversed(marks):  # the head last: without it the rest cannot be found
            self._seen[mark] = None
            self._seen.move_to_end(mark)
        while len(self._seen) > self._most:
            self._seen.popitem(last=False)


def prefix_marks(request: Request) -> list[int]:
    """One hash per PREFIX_STEP tokens, each over everything before it and the tenant's salt."""
    marks: list[int] = []
    mark = hash(request.salt)
    for start in range(0, len(request.tokens) - PREFIX_STEP + 1, PREFIX_STEP):
        mark = hash((mark, request.tokens[start : start + PREFIX_STEP]))
        marks.append(mark)
    return marks
