"""Sequencer: takes one request the whole way, from queue to last token.

    queue -> promise a landing -> prefill (first token) -> start -> one token per step
             decode worker        prefill worker           decode worker

It owns the truth of every request: prompt, parameters, seed and the tokens that the client has, so
that an attempt can end anywhere and another one can go on from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from cluster.clock import Clock, monotonic
from cluster.errors import (
    BadRequest,
    BatonError,
    EngineFailed,
    NoWorkers,
    Overloaded,
    TransferFailed,
    WorkerLost,
)
from cluster.lifecycle import Phase, advance
from cluster.messages import (
    Cancel,
    Event,
    Failed,
    Generate,
    Landing,
    Order,
    Peer,
    Prefill,
    Promise,
    Promised,
    Request,
    Start,
    Token,
)
from gateway.pools import Member, Pools, Route
from gateway.session import Mailbox

log = logging.getLogger(__name__)

E = TypeVar("E", Promised, Token)

SEALED_S = 1.0
"""How long a landing whose prefill worker is lost may take to show that it was complete."""


@dataclass
class Watch:
    """What one request went through; filled while it runs, read by its response and the metrics.

    `spans` are seconds by phase on this gateway's clock (R9). Up to the first token they add up to
    TTFT: queue, landing, prefill_queue, prefill, wire. Between first and second token they add up
    to that gap: transfer_tail, decode_admit, first_step, wire_second.
    """

    arrived: float = field(default_factory=monotonic)
    spans: dict[str, float] = field(default_factory=dict)
    prefill_worker: str = ""
    decode_worker: str = ""
    cached_tokens: int = 0


class _Refused(Exception):
    """A worker would not take the attempt now; another may."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer


class Relay:
    """One answer on its way. Every message about an older attempt, or out of order, is a no-op."""

    def __init__(self, request: Request, watch: Watch) -> None:
        self.request = request
        self.watch = watch
        self.phase = Phase.QUEUED
        self.attempt = 0
        self.emitted = list(request.tokens[request.prompt_tokens :])
        self.mailbox = Mailbox()
        self._members: list[Member] = []

    def begin(self) -> None:
        self.release()
        self.attempt += 1

    def involve(self, member: Member) -> None:
        """From now on this worker's events about the request come here. Raises WorkerLost."""
        member.session.listen(self.request.id, self.mailbox)
        self._members.append(member)

    def dismiss(self, member: Member) -> None:
        """It has done its part: what happens to it no longer concerns the request."""
        member.session.forget(self.request.id)
        self._members.remove(member)

    def release(self) -> None:
        """Cancel on every worker involved. Idempotent, in every phase (R4)."""
        for member in self._members:
            member.session.send(Cancel(self.request.id, self.attempt))
            member.session.forget(self.request.id)
        self._members.clear()
        self.mailbox = Mailbox()

    async def next_event(self) -> Event:
        """The next event of the current attempt. Raises what befell it."""
        while (event := self._take()) is None:
            await self.mailbox.filled()
        return event

    async def next_token(self) -> Token:
        """The token that follows what the client has."""
        while True:
            event = self._take()
            if event is None:
                await self.mailbox.filled()
            elif isinstance(event, Failed):
                _fail(event)
            elif isinstance(event, Token) and event.index >= len(self.emitted):
                if event.index > len(self.emitted):
                    raise EngineFailed("A token of this answer got lost.")
                self.emitted.append(event.token)
                return event

    def _take(self) -> Event | None:
        """What is there now of the current attempt. Raises what befell it."""
        while (mail := self.mailbox.take()) is not None:
            if isinstance(mail, BatonError):
                raise mail
            if mail.attempt == self.attempt:
                return mail
        return None

    def to(self, phase: Phase) -> None:
        self.phase = advance(self.phase, phase)


def _fail(failed: Failed) -> NoReturn:
    match failed.code:
        case "too_large":
            raise BadRequest(
                "The prompt and max_tokens do not fit into this server's KV cache.",
                code="prompt_too_large_for_server",
                param="prompt",
            )
        case "transfer_failed" | "lease_expired":
            raise TransferFailed("The prompt's KV cache did not arrive whole. Please try again.")
        case "full" | "draining":
            raise Overloaded("No worker has room for this request now.", retry_after=1)
    raise EngineFailed("The engine could not complete this request.")


class Sequencer:
    """Runs every request of this gateway. At most `max_waiting` of them wait for a first token.

    `handed` is told how each handoff went: "sealed" or the code of the error.
    """

    def __init__(
        self,
        pools: Pools,
        *,
        handed: Callable[[str], None] = lambda outcome: None,
        clock: Clock = monotonic,
        max_waiting: int = 1024,
        queue_timeout: float = 60.0,
    ) -> None:
        self._pools = pools
        self._handed = handed
        self._clock = clock
        self._max_waiting = max_waiting
        self._queue_timeout = queue_timeout
        self._turn = asyncio.Lock()  # FIFO among those who found every decode worker full
        self.waiting = 0
        self.running = 0

    async def answer(self, request: Request, watch: Watch) -> AsyncGenerator[Token, None]:
        """Tokens in order, the last with a finish. Closing it early cancels on all workers at once.

        Raises Overloaded, NoWorkers, WorkerLost, TransferFailed, EngineFailed, BadRequest.
        """
        if self.waiting >= self._max_waiting:
            raise Overloaded("Too many requests are waiting.", retry_after=1)
        with self._relay(request, watch) as relay:
            self.waiting += 1
            try:
                route, token = await self._first_token(relay)
            finally:
                self.waiting -= 1
            if token.finish:
                yield token
                return
            assert route.decode is not None
            if route.prefill is not None:
                # Before the token goes out: a client that reads slowly holds up nobody but itself.
                relay.to(Phase.HANDING_OFF)
                route.decode.session.send(Start(request.id, token.token, relay.attempt))
                handed = self._clock()
                yield token
                token = await self._second_token(relay, route.prefill)
                self._note(watch, token, self._clock() - handed, "wire_second")
            relay.to(Phase.DECODING)
            while not token.finish:
                yield token
                token = await relay.next_token()
            relay.dismiss(route.decode)  # before the end goes out: who has it asks for no more
            yield token

    @contextmanager
    def _relay(self, request: Request, watch: Watch) -> Iterator[Relay]:
        """One answer's account. However it ends, nothing of it runs on afterwards."""
        relay = Relay(request, watch)
        self.running += 1
        try:
            yield relay
            relay.to(Phase.DONE)
        except BatonError:
            relay.to(Phase.FAILED)
            raise
        finally:
            self.running -= 1
            if relay.phase not in (Phase.DONE, Phase.FAILED):
                relay.to(Phase.CANCELLED)
            relay.release()

    async def _second_token(self, relay: Relay, prefill: Member) -> Token:
        """The decode worker's first: the handoff is over, one way or the other."""
        try:
            token = await self._sealed(relay, prefill)
        except BatonError as error:
            self._handed(error.code)
            raise
        self._handed("sealed")
        relay.dismiss(prefill)
        return token

    @staticmethod
    async def _sealed(relay: Relay, prefill: Member) -> Token:
        """The decode worker may have all it needs with the prefill worker gone."""
        try:
            return await relay.next_token()
        except WorkerLost as error:
            if error is not prefill.session.lost:
                raise
            try:
                async with asyncio.timeout(SEALED_S):
                    return await relay.next_token()
            except TimeoutError:
                raise error from None

    async def _first_token(self, relay: Relay) -> tuple[Route, Token]:
        """Route and prefill; goes round again, in turn, while workers refuse for want of room."""
        give_up = self._clock() + self._queue_timeout
        refused: set[Peer] = set()
        async with _Turn(self._turn) as turn:
            if self._turn.locked():
                await turn.take(self._queue_timeout)
            while True:
                route = self._pools.route(relay.request, refused)
                if route is not None:
                    try:
                        return route, await self._attempt(relay, route, turn)
                    except _Refused as refusal:
                        refused.add(refusal.peer)
                        if relay.phase is not Phase.QUEUED:
                            relay.to(Phase.QUEUED)
                        continue
                if not refused:
                    raise NoWorkers("No worker is there to take this request.", retry_after=2)
                if turn.mine:
                    try:
                        await self._pools.changed(give_up - self._clock())
                    except TimeoutError:
                        raise _no_room() from None
                else:
                    await turn.take(give_up - self._clock())
                refused.clear()

    async def _attempt(self, relay: Relay, route: Route, turn: _Turn) -> Token:
        """One try to get the first token. Raises _Refused if a worker has no room for it.

        With room found the turn is over: whoever is next need not wait for our prefill.
        """
        relay.begin()
        request, watch = relay.request, relay.watch
        involved = [member for member in (route.decode, route.prefill) if member is not None]
        for member in involved:
            try:
                relay.involve(member)
            except WorkerLost:
                raise _Refused(member.peer) from None
        watch.prefill_worker = (route.prefill or involved[0]).peer.name
        watch.decode_worker = involved[0].peer.name
        sent = self._clock()
        watch.spans["queue"] = sent - watch.arrived
        order: Order
        if route.prefill is None:
            relay.to(Phase.PREFILLING)
            order = Generate(request, relay.attempt)
        else:
            landing = None
            if route.decode is not None:
                landing = await self._land(relay, route.decode)
            watch.spans["landing"] = self._clock() - sent
            relay.to(Phase.PREFILLING)
            order = Prefill(request, landing, relay.attempt)
        turn.leave()
        worker = involved[-1]
        sent = self._clock()
        worker.session.send(order)
        first = await self._expect(relay, worker, Token)
        relay.emitted.append(first.token)
        watch.cached_tokens = first.cached_tokens
        self._note(watch, first, self._clock() - sent, "wire")
        return first

    async def _land(self, relay: Relay, decode: Member) -> Landing:
        relay.to(Phase.PROMISING)
        decode.session.send(Promise(relay.request, relay.attempt))
        return (await self._expect(relay, decode, Promised)).landing

    async def _expect(self, relay: Relay, worker: Member, kind: type[E]) -> E:
        """The next event, which is of this kind or a failure."""
        while True:
            event = await relay.next_event()
            if isinstance(event, Failed):
                if event.code in ("full", "draining"):
                    raise _Refused(worker.peer)
                _fail(event)
            if isinstance(event, kind):
                return event

    @staticmethod
    def _note(watch: Watch, token: Token, elapsed: float, rest: str) -> None:
        """Add the worker's own durations; what they leave of the elapsed time is `rest`."""
        spans = dict(token.spans)
        watch.spans.update(spans)
        watch.spans[rest] = max(0.0, elapsed - sum(spans.values()))


def _no_room() -> Overloaded:
    return Overloaded("No worker had room in time.", retry_after=5)


class _Turn:
    """Holds a lock from the first `take` to the end of the block."""

    def __init__(self, lock: asyncio.Lock) -> None:
        self._lock = lock
        self.mine = False

    async def __aenter__(self) -> _Turn:
        return self

    async def take(self, timeout: float) -> None:
        """Wait behind those who came first. Raises Overloaded."""
        if self.mine:
            return
        try:
            async with asyncio.timeout(timeout):
                await self._lock.acquire()
        except TimeoutError:
            raise _no_room() from None
        self.mine = True

    def leave(self) -> None:
        """Let the next one in. Idempotent."""
        if self.mine:
            self.mine = False
            self._lock.release()

    async def __aexit__(self, *exception: object) -> None:
        self.leave()
