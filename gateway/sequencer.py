"""Sequencer: takes one request the whole way, from queue to last token, whoever dies meanwhile.

    queue -> promise a landing -> prefill (first token) -> start -> one token per step
      ^      decode worker        prefill worker           decode worker        |
      `------ a worker is lost: prompt and emitted tokens are read again -------'

It owns the truth of every request: prompt, parameters, seed and the tokens that the client has, so
that an attempt can end anywhere and another one goes on from there (R5).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from cluster.clock import Clock, monotonic
from cluster.errors import BadRequest, BatonError, NoWorkers, WorkerLost
from cluster.lifecycle import Phase
from cluster.messages import (
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
from gateway.admission import Admission
from gateway.fair import ANYBODY, Standing
from gateway.pools import Member, Pools, Route
from gateway.relay import Recovery, Relay, Watch, fail

log = logging.getLogger(__name__)

E = TypeVar("E", Promised, Token)

SEALED_S = 0.5
"""How long a landing whose prefill worker is lost may take to show that it was complete."""


class _Refused(Exception):
    """A worker would not take the attempt now; another may."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer


class Sequencer:
    """Runs every request of this gateway. At most `max_waiting` of them wait for a first token.

    `handed` is told how each handoff went: "sealed" or the code of the error; `recovered` of each
    loss that a request got over; `fell_back` of each prompt that a decode worker reads by itself.
    """

    def __init__(
        self,
        pools: Pools,
        *,
        handed: Callable[[str], None] = lambda outcome: None,
        recovered: Callable[[Recovery], None] = lambda recovery: None,
        fell_back: Callable[[], None] = lambda: None,
        clock: Clock = monotonic,
        max_waiting: int = 1024,
        max_queue_delay: float = 0.0,
        queue_timeout: float = 60.0,
        no_worker_timeout: float = 5.0,
    ) -> None:
        self._pools = pools
        self._handed = handed
        self._recovered = recovered
        self._fell_back = fell_back
        self._clock = clock
        self._admission = Admission(
            pools,
            clock,
            max_waiting=max_waiting,
            max_delay=max_queue_delay,
            queue_timeout=queue_timeout,
            no_worker_timeout=no_worker_timeout,
        )
        self.running = 0

    @property
    def waiting(self) -> int:
        """Requests without a first token."""
        return self._admission.waiting

    @property
    def held_back(self) -> int:
        """Those of them that were sent to no worker yet."""
        return self._admission.held_back

    def admit(self, standing: Standing, requests: int = 1) -> None:
        """For a call before it is answered. Raises Overloaded if it would wait for too long."""
        self._admission.admit(standing, requests)

    def delay(self) -> float:
        """Seconds that a newcomer without a key would have to wait, by what was measured."""
        return self._admission.delay(ANYBODY)

    async def answer(
        self, request: Request, watch: Watch, standing: Standing | None = None
    ) -> AsyncGenerator[Token, None]:
        """Tokens in order, the last with a finish. Closing it early cancels on all workers at once.

        `standing` is of a call that was admitted. Raises Overloaded, NoWorkers, BadRequest;
        EngineFailed for a request that two workers died of; WorkerLost, TransferFailed or TokenLost
        when all attempts are used up.
        """
        if standing is None:
            standing = ANYBODY
            self.admit(standing)
        with self._relay(request, watch, standing) as relay:
            while True:
                try:
                    token = await self._next(relay)
                except BatonError as error:
                    cause = relay.lose(error, self._clock())
                    if cause == "transfer":
                        self._pools.shun(relay.route)
                    log.info("request lost", extra={"request": request.id, "cause": cause})
                    continue
                if relay.lost_at is not None:
                    self._settle(relay)
                yield token
                if token.finish:
                    return

    @contextmanager
    def _relay(self, request: Request, watch: Watch, standing: Standing) -> Iterator[Relay]:
        """One answer's account. However it ends, nothing of it runs on afterwards."""
        with self._admission.seat(request, standing) as seat:
            relay = Relay(request, watch, seat)
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
                computed = request.prompt_tokens - watch.cached_tokens
                self._admission.ended(seat, computed, len(relay.emitted) - request.emitted)

    async def _next(self, relay: Relay) -> Token:
        """The token that follows what the client has. Raises what befell the attempt."""
        decode = relay.route.decode
        match relay.phase:
            case Phase.QUEUED:
                return await self._first_token(relay)
            case Phase.HANDING_OFF:
                token = await self._second_token(relay)
            case _:
                token = await relay.next_token()
        if token.finish:
            assert decode is not None
            relay.dismiss(decode)  # before the end goes out: who has it asks for no more
        return token

    def _settle(self, relay: Relay) -> None:
        """A token has come again: the losses since the one before it are over."""
        assert relay.lost_at is not None
        seconds, relay.lost_at = self._clock() - relay.lost_at, None
        for recovery in relay.watch.recoveries:
            if not recovery.seconds:
                recovery.seconds = seconds
                self._recovered(recovery)

    async def _first_token(self, relay: Relay) -> Token:
        """The first one of an attempt, for which the request waits while no worker has room."""
        with self._admission.counted(relay.seat):
            token = await self._read(relay)
        if token.finish:
            return token
        decode = relay.route.decode
        assert decode is not None
        if relay.route.prefill is None:
            relay.to(Phase.DECODING)
        else:
            # Before the token goes out: a client that reads slowly holds up nobody but itself.
            relay.to(Phase.HANDING_OFF)
            decode.session.send(Start(relay.request.id, token.token, relay.attempt))
            relay.handed_at = self._clock()
        return token

    async def _second_token(self, relay: Relay) -> Token:
        """The decode worker's first: the handoff is over, one way or the other."""
        prefill = relay.route.prefill
        assert prefill is not None
        try:
            token = await self._sealed(relay, prefill)
        except BatonError as error:
            self._handed(error.code)
            raise
        self._handed("sealed")
        relay.dismiss(prefill)
        relay.to(Phase.DECODING)
        relay.note(token, self._clock() - relay.handed_at, "wire_second")
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

    async def _read(self, relay: Relay) -> Token:
        """Wait for a turn, route and prefill; to the front of the queue again while workers refuse
        for want of room. Who was lost on the way goes before those who have nothing yet."""
        seat, refused = relay.seat, set[Peer]()
        if relay.watch.recoveries:
            seat.place.resume()
        route: Route | None = None
        try:
            while True:
                if route is None:
                    refused.clear()
                    route = await seat.turn(lambda: self._offer(relay, refused))
                try:
                    return await self._attempt(relay, route)
                except _Refused as refusal:
                    refused.add(refusal.peer)
                    relay.release()  # while it waits it holds nothing
                    relay.keep = None
                    if relay.phase is not Phase.QUEUED:
                        relay.to(Phase.QUEUED)
                    route = self._offer(relay, refused)
        finally:
            seat.leave()

    def _offer(self, relay: Relay, refused: set[Peer]) -> Route | None:
        """Where the request can go now. Who was lost on the way goes where another would wait."""
        lost = bool(relay.watch.recoveries)
        route = None
        while route is None:
            avoid = refused | relay.avoid
            try:
                route = self._pools.route(
                    relay.request, avoid, relay.keep, paced=not lost, apart=relay.losses.suspect
                )
            except BadRequest:
                if not lost:
                    raise
                raise NoWorkers("The workers that had room for this request were lost.") from None
            if route is not None:
                relay.seat.take(route, len(relay.request.tokens))
            elif relay.keep is not None:
                relay.keep = None  # it has gone too
            elif relay.avoid:
                relay.avoid.clear()  # there is nobody else
            else:
                break
        return route

    async def _attempt(self, relay: Relay, route: Route) -> Token:
        """One try to get the first token. Raises _Refused if a worker has no room for it.

        With room found the turn is over: whoever is next need not wait for our prefill.
        """
        relay.begin(route)
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
        relay.span("queue", sent - watch.arrived - watch.spans.get("recovery", 0.0))
        order: Order
        if route.prefill is None:
            relay.to(Phase.PREFILLING)
            if route.fallback:
                watch.fallback = True
                self._fell_back()
            order = Generate(request, relay.attempt)
        else:
            landing = None
            if route.decode is not None:
                landing = await self._land(relay, route.decode)
            relay.span("landing", self._clock() - sent)
            relay.to(Phase.PREFILLING)
            order = Prefill(request, landing, relay.attempt)
        relay.seat.through()
        worker = involved[-1]
        sent = self._clock()
        worker.session.send(order)
        first = relay.accept(await self._expect(relay, worker, Token))
        relay.seat.read(first.cached_tokens)
        if relay.first:
            watch.cached_tokens = first.cached_tokens
        relay.note(first, self._clock() - sent, "wire")
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
                fail(event)
            if isinstance(event, kind):
                return event
