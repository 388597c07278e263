"""DecodeStage: promises landings, takes KV in, and gives every running sequence one token a step.

    promised -> sealed -> running -> done          from a prefill worker
                waiting -> prefilling -> running   computed here: Generate, or evicted before

The role `both` is this stage with nothing but the lower way: prompt chunks ride in the same step as
the running sequences' tokens.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster import metrics
from cluster.clock import Clock
from cluster.errors import BatonError, BlocksExhausted
from cluster.messages import (
    Cancel,
    Event,
    Failed,
    Generate,
    Load,
    Promise,
    Promised,
    Request,
    Start,
)
from cluster.orders import Drain, GiveBack, Ordered, SessionClosed, Tick
from decode import scheduler
from decode.attention import DecodeAttention
from engine.allocator import Allocator
from engine.batch import Attention, Batch, Plan
from engine.blocks import BlockPool
from engine.cache import KVCache
from engine.layers.attention import Attend
from engine.sampler import Sampled
from engine.sequence import Sequence
from kvtransfer.landing import Landings, Site
from kvtransfer.receiver import Arrived
from prefill.attention import MakeAttend
from prefill.queue import PromptQueue
from prefill.scheduler import PromptScheduler


@dataclass(frozen=True, slots=True)
class _Started:
    """A Start that came before its landing was sealed."""

    start: Start
    session: int
    at: float


class DecodeStage:
    """Owned by the step thread."""

    def __init__(
        self,
        cache: KVCache,
        pool: BlockPool,
        allocator: Allocator,
        windows: tuple[int, ...],
        landings: Landings,
        make_attend: MakeAttend = DecodeAttention,
        *,
        budget: int,
        max_sequences: int,
        clock: Clock,
        short: Callable[[], object] = lambda: False,
    ) -> None:
        """`short`: whether the process lacks what another sequence would take."""
        self._cache = cache
        self._pool = pool
        self._allocator = allocator
        self._windows = windows
        self._landings = landings
        self._make_attend = make_attend
        self._budget = budget
        self._max_sequences = max_sequences
        self._clock = clock
        self._short = short
        self._queue = PromptQueue(allocator)
        self._prompts = PromptScheduler()
        self._running: list[Sequence] = []  # oldest first
        self._promised: dict[str, int] = {}  # landings' request ids, with their sessions
        self._started: dict[str, _Started] = {}
        self._mail: list[tuple[int, Event]] = []
        self._draining = False
        self._preemptions = self._steps = self._step_tokens = 0

    def apply(self, order: Any) -> None:
        match order:
            case Arrived():
                sealed = self._landings.receive(order, self._clock())
                if sealed is not None and sealed[0] in self._started:
                    self._join(self._started.pop(sealed[0]))
            case Ordered(session, Promise(request, attempt)):
                self._promise(session, request, attempt)
            case Ordered(session, Start() as start, at):
                self._join(_Started(start, session, at))
            case Ordered(session, Generate(request, attempt), at):
                self._generate(Sequence(request, attempt, session, at))
            case Ordered(_, Cancel(request_id, attempt)):
                self._cancel(request_id, attempt)
            case SessionClosed(session):
                self._close(session)
            case Tick():
                for site in self._landings.sweep(self._clock()):
                    self._lose(site.request.id, site.attempt, "lease_expired")
            case Drain():
                self._draining = True
            case GiveBack():
                self._give_back()
            case Ordered(session, other):
                self._tell_failed(session, other.request_id, other.attempt, "wrong_role")

    def _promise(self, session: int, request: Request, attempt: int) -> None:
        if self._known(request.id, attempt):
            return  # said twice, or fenced
        self._end_older(request.id, attempt)
        keys = self._allocator.prompt_keys(request)
        code = self._refusal(request)
        if not code and request.id not in self._promised:  # else its room is there already
            code = self._fullness(request, keys)
        if not code:
            try:
                landing = self._landings.promise(request, attempt, self._clock(), keys)
            except BlocksExhausted:
                code = "full"
                self._promised.pop(request.id, None)  # an older attempt's landing made room for it
            except BatonError as error:
                code = error.code
        if code:
            self._tell_failed(session, request.id, attempt, code)
        else:
            self._promised[request.id] = session
            self._mail.append((session, Promised(request.id, attempt, landing)))

    def _generate(self, sequence: Sequence) -> None:
        if self._known(*sequence.key):
            return  # said twice, or fenced
        request_id, attempt = sequence.key
        self._cancel(request_id, attempt - 1)
        code = self._refusal(sequence.request)
        if code:
            self._tell_failed(sequence.session, *sequence.key, code)
        else:
            self._queue.waiting.append(sequence)

    def _end_older(self, request_id: str, attempt: int) -> None:
        """A newer attempt is known: whatever runs or is to start of older ones is nobody's."""
        self._drop(lambda s: s.request.id == request_id and s.attempt < attempt)
        started = self._started.get(request_id)
        if started is not None and started.start.attempt < attempt:
            del self._started[request_id]

    def _known(self, request_id: str, attempt: int) -> bool:
        """Whether this attempt, or a newer one, runs or waits here already."""
        return any(
            s.request.id == request_id and s.attempt >= attempt
            for s in (*self._running, *self._queue)
        )

    def _refusal(self, request: Request) -> str:
        """Why it is not taken, or nothing."""
        if self._draining:
            return "draining"
        # An answer's last token needs no room: nothing is computed from it.
        longest = request.prompt_tokens + request.sampling.max_tokens - 1
        return "too_large" if longest > self._pool.total * self._pool.block_size else ""

    def _fullness(self, request: Request, keys: list[bytes]) -> str:
        """Whether there is no seat or no room for a landing now."""
        if len(self._running) + len(self._landings) >= self._max_sequences:
            return "full"
        if self._queue.waiting:
            return "full"  # the evicted come first, or newcomers would starve them
        if self._spare and self._short():
            return "full"  # what runs gives back; with nothing here nobody would
        found, unheld = self._pool.peek(keys)
        lacking = -(-len(request.tokens) // self._pool.block_size) - found
        return "full" if lacking + unheld + self._spare > self._pool.available else ""

    @property
    def _spare(self) -> int:
        """The watermark: a block for each sequence to grow into, so that a newcomer does not at
        once evict somebody."""
        return len(self._running) + len(self._landings)

    def _join(self, started: _Started) -> None:
        """Into the running batch if the landing is sealed; otherwise once it is."""
        start = started.start
        if self._known(start.request_id, start.attempt):
            return  # said twice, or fenced
        try:
            site = self._landings.start(start.request_id, start.attempt)
        except BatonError:
            self._tell_failed(started.session, start.request_id, start.attempt, "lease_expired")
            return
        if site is None:
            self._started[start.request_id] = started
            return
        self._promised.pop(start.request_id)
        insort(self._running, self._sequence(site, started), key=lambda s: s.arrived)

    def _sequence(self, site: Site, started: _Started) -> Sequence:
        ready = max(site.sealed_at, started.at)
        prompt = len(site.request.tokens)
        sequence = Sequence(site.request, site.attempt, started.session, ready)
        sequence.tokens.append(started.start.first_token)
        sequence.blocks = site.blocks
        sequence.keys = list(site.keys)
        sequence.computed = prompt
        sequence.published = prompt // self._pool.block_size
        sequence.spans["transfer_tail"] = ready - started.at
        return sequence

    def plan(self) -> Plan:
        now = self._clock()
        taken = len(self._running) + len(self._queue.prefilling) + len(self._landings)
        self._queue.admit(self._spare, self._max_sequences - taken)
        running, prefilling = self._running, self._queue.prefilling
        # With the last of its prompt under way it wants room for a next token, like who runs.
        if read := [sequence for sequence in prefilling if sequence.pending]:
            running = sorted([*running, *read], key=lambda s: s.arrived)
            prefilling = [sequence for sequence in prefilling if not sequence.pending]
        plan = scheduler.plan(
            [sequence for sequence in running if not sequence.full],
            prefilling,
            self._pool.available,
            self._pool.block_size,
            self._budget,
            self._prompts,
            lambda sequence: self._pool.held_alone(sequence.blocks),
        )
        for chunk in plan.chunks:
            chunk.sequence.schedule(now)
        return plan

    def make_room(self, plan: Plan) -> None:
        for sequence in plan.evicted:
            self._preemptions += 1
            self._remove(sequence)
            self._allocator.free(sequence)
            self._queue.waiting.appendleft(sequence)
        for chunk in plan.chunks:
            self._allocator.grow(chunk.sequence, chunk.sequence.computed + chunk.count)

    def batch(self, plan: Plan) -> tuple[Batch, Attention]:
        return Batch.of(plan, self._cache), self.attention

    def attention(self, batch: Batch) -> Attend:
        return self._make_attend(self._cache, batch, self._windows)

    def accept(self, plan: Plan, sampled: list[Sampled | None]) -> None:
        self._steps += 1
        self._step_tokens += plan.tokens
        tokens = iter(sampled)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            token = next(tokens) if chunk.samples else None
            if sequence.ended:
                continue  # by the step before, when this one was under way
            if chunk.samples and token is None:
                self._fail(sequence)
                continue
            self._allocator.publish(sequence)
            if token is not None:
                self._append(sequence, token)

    def _append(self, sequence: Sequence, sampled: Sampled) -> None:
        """Tell the token. Who came through the queue runs from here on; who is finished leaves."""
        assert sequence.scheduled is not None
        elapsed = self._clock() - sequence.scheduled
        if "decode_admit" in sequence.spans:
            sequence.spans["first_step"] = elapsed
        elif "prefill_queue" in sequence.spans:
            sequence.spans["prefill"] = elapsed
        token = sequence.take(sampled.token, sampled.logprobs)
        self._mail.append((sequence.session, token))
        if token.finish:
            self._end(sequence)
        elif sequence in self._queue.prefilling:
            self._queue.remove(sequence)
            insort(self._running, sequence, key=lambda s: s.arrived)

    def fail(self, plan: Plan, error: Exception) -> None:
        for chunk in plan.chunks:
            if not chunk.sequence.ended:
                self._fail(chunk.sequence)

    def _fail(self, sequence: Sequence) -> None:
        self._tell_failed(sequence.session, *sequence.key, "engine_error")
        self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        sequence.ended = True
        self._remove(sequence)
        self._allocator.free(sequence)

    def mail(self) -> list[Any]:
        mail, self._mail = self._mail, []
        return mail

    def load(self, progress: int) -> Load:
        counts = self._pool.counts()
        return Load(
            progress=progress,
            running=len(self._running) + len(self._queue.prefilling),
            waiting=len(self._queue.waiting),
            queued_tokens=self._queue.queued_tokens,
            free_blocks=counts.free,
            cached_blocks=counts.cached,
            promised_blocks=counts.promised,
            owned_blocks=counts.owned,
            counters=(
                (metrics.STEPS, self._steps),
                (metrics.STEP_TOKENS, self._step_tokens),
                (metrics.PREEMPTIONS, self._preemptions),
                *self._landings.metrics(),
            ),
        )

    def _cancel(self, request_id: str, attempt: int) -> None:
        if self._landings.cancel(request_id, attempt):
            self._promised.pop(request_id, None)
            self._started.pop(request_id, None)
        self._drop(lambda s: s.request.id == request_id and s.attempt <= attempt)

    def _close(self, session: int) -> None:
        for request_id in [r for r, owner in self._promised.items() if owner == session]:
            self._landings.cancel(request_id, attempt=2**32)
            del self._promised[request_id]
            self._started.pop(request_id, None)
        self._drop(lambda s: s.session == session)

    def _give_back(self) -> None:
        for sequence in self._running + list(self._queue):
            self._tell_failed(sequence.session, *sequence.key, "given_back")
        for site in self._landings.give_up():
            self._lose(site.request.id, site.attempt, "given_back")
        self._drop(lambda sequence: True)

    def _lose(self, request_id: str, attempt: int, code: str) -> None:
        session = self._promised.pop(request_id)
        self._started.pop(request_id, None)
        self._tell_failed(session, request_id, attempt, code)

    def _drop(self, unwanted: Callable[[Sequence], bool]) -> None:
        for sequence in [s for s in (*self._running, *self._queue) if unwanted(s)]:
            self._end(sequence)

    def _remove(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._queue.remove(sequence)

    def _tell_failed(self, session: int, request_id: str, attempt: int, code: str) -> None:
        self._mail.append((session, Failed(request_id, attempt, code)))
