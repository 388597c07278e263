"""Sequence: a Request in progress on one worker. Mutable, owned by the step thread."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cluster.messages import Request, Token
from engine.blocks import Block


@dataclass(eq=False, slots=True)
class Sequence:
    """The tokens so far, and how many of them have their KV in `blocks`.

    While a step is under way its part counts as computed, and the token that it samples is in
    `tokens` with a placeholder: what the step after it needs to know, if that is launched before.
    """

    request: Request
    attempt: int
    session: int  # which gateway's stream gets its events
    arrived: float  # on the worker's clock
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    pending: int = 0  # of the last tokens, how many are placeholders
    blocks: list[Block] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # prefix-cache keys of its full blocks
    published: int = 0  # how many of its blocks are findable in the prefix cache
    cached_tokens: int = 0  # prompt tokens that a cache held when it was admitted
    scheduled: float | None = None  # when its first step was planned
    unwanted: bool = False  # cancelled: nobody is to be told of it any more
    ended: bool = False  # gone from its worker; a step under way may still have a part of it
    spans: dict[str, float] = field(default_factory=dict)  # go out with its next token
    _numbers: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    _count: int = 0
    _numbered: list[Block] = field(default_factory=list)  # whose numbers those are

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = list(self.request.tokens)

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to be computed; the last of them yields the next token."""
        return len(self.tokens) - self.computed

    @property
    def known(self) -> int:
        """How many of its tokens are not placeholders."""
        return len(self.tokens) - self.pending

    @property
    def next_index(self) -> int:
        """Where the next token to be told stands in the answer."""
        return self.known - self.request.prompt_tokens

    @property
    def key(self) -> tuple[str, int]:
        return self.request.id, self.attempt

    def schedule(self, now: float) -> None:
        """A step with a part of it begins. The first time ends its wait."""
        if self.scheduled is None:
            self.scheduled = now
            handed_over = "transfer_tail" in self.spans
            self.spans["decode_admit" if handed_over else "prefill_queue"] = now - self.arrived

    def blocks_for(self, tokens: int, block_size: int) -> int:
        """How many blocks it lacks to hold its first `tokens` tokens."""
        return max(0, -(-tokens // block_size) - len(self.blocks))

    def block_numbers(self) -> npt.NDArray[np.int32]:
        """The numbers of its blocks, kept from step to step: only new blocks are looked at.

        Blocks are appended to the list; a sequence that loses them gets another list.
        """
        blocks = self.blocks
        if self._numbered is not blocks:
            self._numbered, self._count = blocks, 0
        if len(blocks) > len(self._numbers):
            grown = np.empty(2 * len(blocks), np.int32)
            grown[: self._count] = self._numbers[: self._count]
            self._numbers = grown
        for index in range(self._count, len(blocks)):
            self._numbers[index] = blocks[index].number
        self._count = len(blocks)
        return self._numbers[: self._count]

    @property
    def full(self) -> bool:
        """Its last token is there or under way: nothing is left to compute."""
        return len(self.tokens) - self.request.prompt_tokens >= self.request.sampling.max_tokens

    def launch(self, count: int, sample: int | None) -> None:
        """A step with its next `count` tokens is under way. `sample`: its number among those that
        yield a token."""
        self.computed += count
        if sample is not None:
            self.tokens.append(-1 - sample)
            self.pending += 1

    def take(self, token: int, logprobs: tuple[tuple[int, float], ...]) -> Token:
        """What the oldest placeholder stands for. Returns what the gateway is told: it and the
        spans that it ended."""
        index = self.next_index
        self.tokens[-self.pending] = token
        self.pending -= 1
        finish, stop_token = self._finish_after(token)
        told = Token(
            request_id=self.request.id,
            attempt=self.attempt,
            index=index,
            token=token,
            finish=finish,
            stop_token=stop_token,
            logprobs=logprobs,
            spans=tuple(self.spans.items()),
            cached_tokens=self.cached_tokens,
        )
        self.spans.clear()
        return told

    def _finish_after(self, token: int) -> tuple[str, int | None]:
        """("stop" | "length" | "", the token id that stopped it) once `token` is taken."""
        sampling = self.request.sampling
        if token in sampling.stop_token_ids and self.next_index > sampling.min_tokens:
            return "stop", token
        if self.next_index >= sampling.max_tokens:
            return "length", None
        return "", None
