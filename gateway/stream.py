"""Answer: all choices of one call, run side by side and merged in the order their tokens come.

    prompts x n  ->  one pump each: Sequencer -> TextStream -> Delta  ->  emit

HTTP and gRPC only differ in what they do with a Delta. However an Answer ends, by its last token,
an error, a stop string or a cancelled task, no sequencer generator is left open.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from cluster.errors import EngineFailed, Forbidden
from cluster.ids import new_id
from cluster.messages import Request, Token
from gateway import validate
from gateway.ask import Ask
from gateway.fair import ANYBODY, Standing
from gateway.gateway import Gateway
from gateway.keys import Tenant
from gateway.quota import NOTHING, Reservation
from gateway.relay import Watch
from gateway.text import TextStream

PROMPT_TAIL = 16
"""Prompt tokens that the text of the first new token may depend on, by a joined character."""

Emit = Callable[[list["Delta"]], Awaitable[None]]


class Delta(NamedTuple):
    """What one choice grew by: usually one token, several where earlier ones gave no text yet."""

    choice: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()  # per token, if asked for
    so_far: int = 0  # tokens of this choice
    opens: bool = False  # the choice's first token exists now, even if it has no text yet
    finish: str = ""
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Choice:
    """One request of the call, and how far its text and its clock are."""

    def __init__(self, index: int, request: Request, text: TextStream, watch: Watch) -> None:
        self.index = index
        self.request = request
        self.text = text
        self.watch = watch
        self.started = asyncio.Event()
        self.count = 0
        self.cached_tokens = 0
        self.first_at = self.last_at = 0.0
        self.finish = ""
        self.stop_reason: str | int | None = None
        # Tokens whose text is not there yet: half a character, or what may begin a stop string.
        self._tokens: list[int] = []
        self._logprobs: list[tuple[tuple[int, float], ...]] = []

    def hold(self, token: Token) -> None:
        assert token.index == self.count, "the sequencer let a token get lost or come twice"
        self.count += 1
        self._tokens.append(token.token)
        if token.logprobs:
            self._logprobs.append(token.logprobs)

    def release(self, text: str, opens: bool) -> Delta | None:
        """The next Delta with all that was held, or None while there is nothing to show."""
        if not text and not self.finish:
            return Delta(self.index, "", so_far=self.count, opens=True) if opens else None
        tokens, logprobs = tuple(self._tokens), tuple(self._logprobs)
        self._tokens.clear()
        self._logprobs.clear()
        return Delta(
            self.index, text, tokens, logprobs, self.count, opens, self.finish, self.stop_reason
        )


class Answer:
    """Made by `prepare`, run once by `run`; `usage` and `timeline` are complete afterwards."""

    def __init__(
        self,
        gateway: Gateway,
        ask: Ask,
        prompts: Sequence[tuple[int, ...]],
        echoes: Sequence[str],
        choices: Sequence[Choice],
        arrived: float,
        standing: Standing = ANYBODY,
        reserved: Reservation = NOTHING,
    ) -> None:
        self.prompts = prompts
        self.echoes = echoes
        self.choices = choices
        self._gateway = gateway
        self._ask = ask
        self._arrived = arrived
        self._standing = standing
        self._reserved = reserved

    @classmethod
    async def prepare(cls, gateway: Gateway, ask: Ask, tenant: Tenant, arrived: float) -> Answer:
        """Tokenise, check against the context and take the call's place among the others'.

        What would be refused whatever the prompt says is refused before it is tokenised, which
        costs the tenant a request whatever comes of it. Raises
        BadRequest, Forbidden, RateLimited, Overloaded; no worker knows of it yet.
        """
        standing = _standing(ask, tenant)
        gateway.sequencer.admit(standing, ask.n)
        reserved = gateway.quotas.request(tenant, _fewest_tokens(ask))
        prompts = await gateway.text.encode(ask, gateway.limits.max_model_len)
        max_tokens = validate.fit(ask, prompts, gateway.limits_now())
        echoes = [await _echo(gateway, ask, number, ids) for number, ids in enumerate(prompts)]
        gateway.sequencer.admit(standing, ask.n * len(prompts))  # others came meanwhile
        most = sum(len(prompt) + ask.n * max_tokens for prompt in prompts)
        gateway.quotas.reserve(reserved, most)
        ready = gateway.clock()
        gateway.metrics.call(ask.n, max_tokens)

        requests = validate.requests(
            ask,
            prompts,
            max_tokens,
            eos_ids=gateway.eos_ids,
            new_id=new_id,
            new_seed=lambda: secrets.randbits(63),
            salt=tenant.salted(ask.cache_salt),
        )
        choices = [
            Choice(
                index,
                request,
                TextStream(
                    gateway.tokenizer,
                    request.tokens[-PROMPT_TAIL:],
                    ask.stop,
                    ask.include_stop,
                    ask.skip_special_tokens,
                    ask.sampling.min_tokens,
                ),
                Watch(arrived=ready, spans={"tokenize": ready - arrived}),
            )
            for index, request in enumerate(requests)
        ]
        return cls(gateway, ask, prompts, echoes, choices, arrived, standing, reserved)

    async def run(self, emit: Emit) -> None:
        """Call `emit` with all that comes, until every choice has its finish.

        No choice fetches more before what it has is emitted, so a slow reader slows only its own
        call. Raises BatonError after all that came before it was emitted.
        """
        if len(self.choices) > 1:
            emit = _in_turn(emit)
        try:
            async with children() as tasks:
                for choice in self.choices:
                    tasks.create_task(self._pump(choice, emit))
        finally:
            usage = self.usage
            delivered = usage.prompt_tokens if usage.completion_tokens else 0
            self._gateway.quotas.settle(self._reserved, delivered + usage.completion_tokens)

    async def _pump(self, choice: Choice, emit: Emit) -> None:
        """One choice from the sequencer to its reader, in one task: nothing is handed over."""
        leader = self.choices[choice.index - choice.index % self._ask.n]
        if leader is not choice:
            # The leader's prompt is in the prefix cache by then: computed once, not n times.
            await leader.started.wait()
        tokens = self._gateway.sequencer.answer(choice.request, choice.watch, self._standing)
        async with aclosing(tokens):
            async for token in tokens:
                delta = self._take(choice, token)
                if delta is not None:
                    await emit([delta])
                if choice.finish:
                    return
        raise EngineFailed("The answer ended before it was complete.")

    def _take(self, choice: Choice, token: Token) -> Delta | None:
        """Token -> text -> Delta, and the clock."""
        choice.hold(token)
        text = ""
        # The token that ends an answer is not part of its text, unless that was asked for.
        if token.finish != "stop" or self._ask.include_stop:
            piece = choice.text.push(token.token)
            text = piece.text
            if piece.stopped is not None:
                choice.finish, choice.stop_reason = "stop", piece.stopped
        if token.finish and not choice.finish:
            tail = choice.text.finish(token.finish)
            text += tail.text
            choice.finish, choice.stop_reason = token.finish, tail.stopped
            if tail.stopped is not None:
                choice.finish = "stop"
            elif token.stop_token in self._ask.sampling.stop_token_ids:
                choice.stop_reason = token.stop_token  # one the client named, so not the model's
        opens = choice.count == 1
        if opens:
            text = self.echoes[choice.index // self._ask.n] + text
        self._observe(choice, token)
        return choice.release(text, opens)

    def _observe(self, choice: Choice, token: Token) -> None:
        now, metrics = self._gateway.clock(), self._gateway.metrics
        if choice.count == 1:
            choice.first_at = now
            choice.cached_tokens = token.cached_tokens or choice.watch.cached_tokens
            choice.started.set()
            # What is left once all else is named is our own: text, and the way through the loop.
            known = sum(choice.watch.spans.values())
            choice.watch.spans["detokenize"] = max(0.0, now - self._arrived - known)
            prompt_tokens = choice.request.prompt_tokens
            metrics.first_token(now - self._arrived, prompt_tokens, choice.cached_tokens)
        else:
            metrics.next_token(now - choice.last_at)
        choice.last_at = now
        if choice.finish:
            decoding = choice.last_at - choice.first_at
            spans = choice.watch.spans
            metrics.finished(choice.finish, choice.count, now - self._arrived, decoding, spans)

    @property
    def usage(self) -> Usage:
        """What was delivered so far. A prompt counts once, however many choices it has."""
        return Usage(
            sum(len(prompt) for prompt in self.prompts),
            sum(choice.count for choice in self.choices),
            sum(choice.cached_tokens for choice in self.choices[:: self._ask.n]),
        )

    @property
    def fallback(self) -> bool:
        """Whether a decode worker had to read a prompt of ours (R10), as far as is known now."""
        return any(choice.watch.fallback for choice in self.choices)

    def timeline(self) -> dict[str, Any]:
        """The first choice's way through the cluster, in milliseconds."""
        choice = self.choices[0]
        spans, generation = choice.watch.spans, choice.last_at - choice.first_at
        whole = choice.last_at - self._arrived
        waiting = sum(spans.get(phase, 0.0) for phase in ("queue", "landing", "prefill_queue"))
        return {
            "time_to_first_token_ms": _ms(choice.first_at - self._arrived),
            "generation_time_ms": _ms(generation),
            "queue_time_ms": _ms(waiting),
            "mean_itl_ms": _ms(generation / (choice.count - 1)) if choice.count > 1 else None,
            "tokens_per_second": round(choice.count / whole, 3) if whole > 0 else None,
            "timeline_ms": {phase: _ms(seconds) for phase, seconds in spans.items()},
            "recoveries": [
                {"phase": loss.phase, "cause": loss.cause, "pause_ms": _ms(loss.seconds)}
                for loss in choice.watch.recoveries
            ],
            "prefill_worker": choice.watch.prefill_worker,
            "decode_worker": choice.watch.decode_worker,
        }


def _in_turn(emit: Emit) -> Emit:
    """Never two at a time, and together what came in one step: one write, not one per choice."""
    waiting: list[Delta] = []
    turn = asyncio.Lock()

    async def emit_in_turn(deltas: list[Delta]) -> None:
        waiting.extend(deltas)
        async with turn:
            if waiting:  # else another has taken ours along
                await asyncio.sleep(0)  # the step's other tokens are in this turn of the loop
                together = waiting[:]
                waiting.clear()
                await emit(together)

    return emit_in_turn


@asynccontextmanager
async def children() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup whose failure is the failure itself, not a group that holds it."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


def _standing(ask: Ask, tenant: Tenant) -> Standing:
    """0, which is what clients send who say nothing, is as urgent as the tenant may be at most."""
    priority = ask.priority or max(0, tenant.priority)
    if priority < tenant.priority:
        raise Forbidden(
            f"This API key may ask for priorities from {tenant.priority} on.",
            code="priority_forbidden",
            param="priority",
        )
    return Standing(tenant.name, tenant.weight, priority)


def _fewest_tokens(ask: Ask) -> int:
    """What the call comes to at least, as far as it shows before tokenising."""
    prompts = [len(prompt) if isinstance(prompt, tuple) else 1 for prompt in ask.prompts] or [1]
    return sum(prompts) + ask.n * ask.sampling.max_tokens * len(prompts)


async def _echo(gateway: Gateway, ask: Ask, number: int, ids: tuple[int, ...]) -> str:
    if not ask.echo:
        return ""
    prompt = ask.prompts[number]
    return prompt if isinstance(prompt, str) else await gateway.text.decode(ids)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
