"""Sequence: a Request in progress on one worker. Mutable, owned by the step thread."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.messages import Request, Token
from engine.blocks import Block


@dataclass(eq=False, slots=True)
class Sequence:
    """The tokens known so far, and how many of them have their KV in `blocks`."""

    request: Request
    attempt: int
    session: int  # which gateway's stream gets its events
    arrived: float  # on the worker's clock
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[Block] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # prefix-cache keys of its full blocks
    published: int = 0  # how many of its blocks are findable in the prefix cache
    cached_tokens: int = 0  # prompt tokens that a cache held when it was admitted
    scheduled: float | None = None  # when its first step was planned
    unwanted: bool = False  # cancelled: nobody is to be told of it any more
    spans: dict[str, float] = field(default_factory=dict)  # go out with its next token

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = list(self.request.tokens)

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to be computed; the last of them yields the next token."""
        return len(self.tokens) - self.computed

    @property
    def next_index(self) -> int:
        """Where the next sampled token stands in the answer."""
        return len(self.tokens) - self.request.prompt_tokens

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

    def take(self, token: int, logprobs: tuple[tuple[int, float], ...]) -> Token:
        """Append a sampled token. Returns what the gateway is told: it and the spans it ended."""
        index = self.next_index
        self.tokens.append(token)
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
        """("stop" | "length" | "", the token id that stopped it) once `token` is appended."""
        sampling = self.request.sampling
        if token in sampling.stop_token_ids and self.next_index > sampling.min_tokens:
            return "stop", token
        if self.next_index >= sampling.max_tokens:
            return "length", None
        return "", None
