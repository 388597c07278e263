"""PrefillStage: prompts come in, their KV goes out while it is computed, and the first token.

    waiting -> prefilling -> handing off -> released
               holds blocks  holds blocks   free, or cached for the next prompt with that prefix

A sequence with a landing keeps its blocks until the sender says that nothing reads them any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cluster import metrics
from cluster.clock import Clock
from cluster.errors import BatonError
from cluster.messages import Cancel, Event, Failed, Landing, Load, Prefill
from cluster.orders import Drain, GiveBack, Ordered, SessionClosed, Tick
from engine.allocator import Allocator
from engine.batch import Attention, Batch, Plan
from engine.blocks import BlockPool
from engine.cache import KVCache, group_spans
from engine.layers.attention import Attend, Write
from engine.sampler import Sampled
from engine.sequence import Sequence
from engine.staging import Mark
from kvtransfer.sender import Announcement, Handoff
from prefill.attention import MakeAttend, PrefillAttention
from prefill.queue import PromptQueue
from prefill.scheduler import PromptScheduler


@dataclass(frozen=True, slots=True)
class HandoffEnded:
    """The sender lets go of a sequence's blocks. An error of None means the landing is sealed."""

    request_id: str
    attempt: int
    error: BatonError | None
    sent_bytes: int


class Pushes(Protocol):
    """The sender, as the step thread sees it: calls return at once and never fail.

    Every opened handoff is followed by one HandoffEnded, however it goes.
    """

    def open(self, handoff: Handoff) -> None: ...

    def announce(self, request_id: str, attempt: int, announcement: Announcement) -> None: ...

    def finish(self, request_id: str, attempt: int) -> None: ...

    def cancel(self, request_id: str, attempt: int) -> None: ...


class PrefillStage:
    """Owned by the step thread."""

    def __init__(
        self,
        cache: KVCache,
        pool: BlockPool,
        allocator: Allocator,
        windows: tuple[int, ...],
        pushes: Pushes,
        make_attend: MakeAttend = PrefillAttention,
        *,
        budget: int,
        chunk_bytes: int,
        clock: Clock,
    ) -> None:
        self._cache = cache
        self._pool = pool
        self._allocator = allocator
        self._windows = windows
        self._pushes = pushes
        self._make_attend = make_attend
        self._budget = budget
        self._chunk_bytes = chunk_bytes
        self._clock = clock
        self._queue = PromptQueue(allocator)
        self._scheduler = PromptScheduler()
        # Every sequence that holds or wants blocks; of those, who has a hold for the sender.
        self._live: dict[tuple[str, int], Sequence] = {}
        self._landings: dict[tuple[str, int], Landing] = {}
        self._mail: list[tuple[int, Event]] = []
        self._draining = False
        self._failures: Counter[str] = Counter()  # handoffs, by what ended them
        self._sent_bytes = self._steps = self._step_tokens = 0

    def apply(self, order: Any) -> None:
        match order:
            case Ordered(session, Prefill(request, landing, attempt), at):
                self._take(Sequence(request, attempt, session, at), landing)
            case Ordered(session, Cancel(request_id, attempt)):
                self._drop(lambda s: s.request.id == request_id and s.attempt <= attempt)
            case SessionClosed(session):
                self._drop(lambda s: s.session == session)
            case HandoffEnded():
                self._end(order)
            case Drain():
                self._draining = True
            case GiveBack():
                self._give_back()
            case Tick():
                pass  # every hold here ends with the sender, which has a timer of its own
            case Ordered(session, other):
                self._tell_failed(session, other.request_id, other.attempt, "wrong_role")

    def _take(self, sequence: Sequence, landing: Landing | None) -> None:
        request_id, attempt = sequence.key
        if any(key[0] == request_id and key[1] >= attempt for key in self._live):
            return  # said twice, or fenced
        code = ""
        if self._draining:
            code = "draining"
        elif sequence.blocks_for(len(sequence.tokens), self._pool.block_size) > self._pool.total:
            code = "too_large"
        if code:
            self._tell_failed(sequence.session, request_id, attempt, code)
            return
        self._live[sequence.key] = sequence
        if landing is not None:
            self._landings[sequence.key] = landing
            # Opened now and not when admitted, so that the landing's lease outlasts the queue.
            self._pushes.open(Handoff(*sequence.key, landing, len(sequence.tokens)))
        self._queue.waiting.append(sequence)

    def plan(self) -> Plan:
        for sequence in self._queue.admit(spare=0, seats=len(self._queue.waiting)):
            if sequence.computed and sequence.key in self._landings:  # found in the prefix cache
                layers = range(len(self._windows))
                self._announce(sequence, layers, 0, sequence.computed, self._cache.mark())
        plan = Plan(self._scheduler.chunks(self._queue.prefilling, self._budget))
        for chunk in plan.chunks:
            chunk.sequence.schedule(self._clock())
        return plan

    def make_room(self, plan: Plan) -> None:
        """Nothing to do: a prompt is admitted with blocks for all of its tokens."""

    def batch(self, plan: Plan) -> tuple[Batch, Attention]:
        pushed = [
            (chunk.sequence, chunk.sequence.computed, chunk.sequence.computed + chunk.count)
            for chunk in plan.chunks
            if chunk.sequence.key in self._landings
        ]
        ends = {part.stop - 1: part for part in self._layer_parts(plan.tokens)}

        def announcing(batch: Batch) -> Attend:
            attend = self.attention(batch)

            def attend_and_announce(layer: int, write: Write) -> torch.Tensor:
                out = attend(layer, write)
                if pushed and layer in ends:
                    ready = self._cache.mark()
                    for sequence, start, stop in pushed:
                        self._announce(sequence, ends[layer], start, stop, ready)
                return out

            return attend_and_announce

        return Batch.of(plan, self._cache), announcing

    def attention(self, batch: Batch) -> Attend:
        """Of a step whose KV goes to nobody."""
        return self._make_attend(self._cache, batch, self._windows)

    def accept(self, plan: Plan, sampled: list[Sampled | None]) -> None:
        self._steps += 1
        self._step_tokens += plan.tokens
        tokens = iter(sampled)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            first = next(tokens) if chunk.samples else None
            if chunk.samples and first is None:
                self._fail(sequence)
                continue
            self._allocator.publish(sequence)
            if first is not None:
                self._finish(sequence, first)

    def _finish(self, sequence: Sequence, sampled: Sampled) -> None:
        """The prompt is read: tell the first token. The sender may still need the blocks."""
        assert sequence.scheduled is not None
        sequence.spans["prefill"] = self._clock() - sequence.scheduled
        first = sequence.take(sampled.token, sampled.logprobs)
        self._mail.append((sequence.session, first))
        self._queue.remove(sequence)
        if sequence.key not in self._landings:
            self._forget(sequence)
        elif first.finish:
            sequence.unwanted = True
            self._pushes.cancel(*sequence.key)
        else:
            self._pushes.finish(*sequence.key)

    def fail(self, plan: Plan, error: Exception) -> None:
        for chunk in plan.chunks:
            self._fail(chunk.sequence)

    def _fail(self, sequence: Sequence) -> None:
        self._tell_failed(sequence.session, *sequence.key, "engine_error")
        self._give_up(sequence)

    def mail(self) -> list[Any]:
        mail, self._mail = self._mail, []
        return mail

    def load(self, progress: int) -> Load:
        counts = self._pool.counts()
        waiting = len(self._queue.waiting)
        return Load(
            progress=progress,
            running=len(self._live) - waiting,
            waiting=waiting,
            queued_tokens=self._queue.queued_tokens,
            free_blocks=counts.free,
            cached_blocks=counts.cached,
            promised_blocks=counts.promised,
            owned_blocks=counts.owned,
            counters=(
                (metrics.STEPS, self._steps),
                (metrics.STEP_TOKENS, self._step_tokens),
                (metrics.KV_TRANSFER_BYTES, self._sent_bytes),
                *(
                    (metrics.labelled(metrics.KV_TRANSFER_FAILURES, reason=code), number)
                    for code, number in self._failures.items()
                ),
            ),
        )

    def _give_back(self) -> None:
        for sequence in list(self._live.values()):
            if not sequence.unwanted:
                self._tell_failed(sequence.session, *sequence.key, "given_back")
                self._give_up(sequence)

    def _drop(self, unwanted: Callable[[Sequence], bool]) -> None:
        for sequence in [s for s in self._live.values() if unwanted(s)]:
            self._give_up(sequence)

    def _give_up(self, sequence: Sequence) -> None:
        """Compute it no further. Blocks that the sender may still read stay until it lets go."""
        sequence.unwanted = True
        self._queue.remove(sequence)
        if sequence.key in self._landings:
            self._pushes.cancel(*sequence.key)
        else:
            self._forget(sequence)

    def _end(self, ended: HandoffEnded) -> None:
        self._sent_bytes += ended.sent_bytes
        sequence = self._live[ended.request_id, ended.attempt]
        if ended.error is not None and not sequence.unwanted:
            self._failures[ended.error.code] += 1
            self._tell_failed(sequence.session, *sequence.key, "transfer_failed")
        self._queue.remove(sequence)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._allocator.free(sequence)
        self._landings.pop(sequence.key, None)
        del self._live[sequence.key]

    def _announce(
        self, sequence: Sequence, layers: range, start: int, stop: int, ready: Mark
    ) -> None:
        """This KV is final once `ready` has passed, and stays in these slots until the handoff has
        ended."""
        slots = self._cache.slots_of(sequence.blocks, start, stop)
        announcement = Announcement(layers, range(start, stop), slots, ready)
        self._pushes.announce(*sequence.key, announcement)

    def _layer_parts(self, tokens: int) -> list[range]:
        """The layers, cut so that this step's KV of one part is about `chunk_bytes`."""
        parts: list[range] = []
        for span in group_spans(self._cache.layout):
            layer_bytes = self._cache.token_bytes(span[:1]) * tokens
            step = max(1, self._chunk_bytes // layer_bytes)
            parts += [
                range(first, min(span.stop, first + step))
                for first in range(span.start, span.stop, step)
            ]
        return parts

    def _tell_failed(self, session: int, request_id: str, attempt: int, code: str) -> None:
        self._mail.append((session, Failed(request_id, attempt, code)))
