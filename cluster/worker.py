"""The event-loop side of every worker: a report stream for each gateway, membership, draining.

             session(orders) ------ post(order) ------>
gateways                                                 step thread
             reports         <----- tell(mail, load) --
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import Any

import grpc

from cluster import rpc
from cluster.clock import Clock, monotonic
from cluster.credentials import Credentials
from cluster.errors import HandshakeRefused
from cluster.messages import Event, Hello, Load, Order, Report
from cluster.orders import Drain, GiveBack, Ordered, SessionClosed, Tick
from cluster.wire import codec

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.2
"""How often a worker reports its load. A gateway counts a worker as lost after several missed."""

REJOIN_S = 0.5

GIVE_BACK_S = 3.0
"""For the last step to end and for gateways to hear what they get back."""

_REFUSALS = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED)

LINGER_S = 3 * HEARTBEAT_S
"""How long a drained worker stays. Orders already on their way are refused and go elsewhere instead
of being lost with it, and whoever got the last handoffs from here has seen them arrive."""


class WorkerService:
    """Owned by the event loop. `post` hands an order to the step thread.

    `pulse` counts on within a step, where no new Load comes from; `counters` are what the event
    loop's side of the data plane has counted, beside the step thread's own.
    """

    def __init__(
        self,
        hello: Hello,
        post: Callable[[Any], None],
        pulse: Callable[[], int] = lambda: 0,
        counters: Callable[[], Iterable[tuple[str, float]]] = tuple,
        credentials: Credentials | None = None,
        clock: Clock = monotonic,
    ) -> None:
        self.hello = hello
        self._credentials = credentials
        self.load = Load(progress=0, free_blocks=hello.blocks)
        self._post = post
        self._pulse = pulse
        self._counters = counters
        self._clock = clock
        self._numbers = count(1)
        self._reports: dict[int, asyncio.Queue[Report]] = {}
        self._draining = False
        self._told = asyncio.Event()

    async def session(
        self, orders: AsyncIterator[Order], context: object = None
    ) -> AsyncGenerator[Report, None]:
        """One gateway's stream, until either side ends it. Its requests end with it."""
        session = next(self._numbers)
        reports = self._reports[session] = asyncio.Queue()
        intake = asyncio.create_task(self._take_orders(session, orders, reports))
        try:
            while (report := await reports.get()).events:
                yield report
        finally:
            del self._reports[session]
            intake.cancel()
            self._post(SessionClosed(session))

    async def _take_orders(
        self, session: int, orders: AsyncIterator[Order], reports: asyncio.Queue[Report]
    ) -> None:
        """Ends the session, by an empty report, when the gateway stops sending."""
        try:
            async for order in orders:
                self._post(Ordered(session, order, self._clock()))
        except Exception:  # the top of a task that nobody awaits
            log.exception("session broke", extra={"session": session})
        finally:
            reports.put_nowait(Report())

    def tell(self, mail: list[tuple[int, Event]], load: Load | None) -> None:
        """What a step had to say: one report for each gateway concerned."""
        if load is not None:
            self.load = replace(load, draining=self._draining)
            self._told.set()
        by_session: dict[int, list[Event]] = defaultdict(list)
        for session, event in mail:
            by_session[session].append(event)
        for session, events in by_session.items():
            if session in self._reports:
                self._reports[session].put_nowait(Report(tuple(events)))

    def close(self) -> None:
        """End every session from this side, so that no stream is cut in the middle."""
        for reports in self._reports.values():
            reports.put_nowait(Report())

    async def tick(self, every: float) -> None:
        """The timer behind every lease."""
        while True:
            await asyncio.sleep(every)
            self._post(Tick())

    async def membership(self, welcome: asyncio.Event) -> AsyncGenerator[Hello | Load, None]:
        """What a registry is told, for as long as it listens. Nothing but Hello until we are
        welcome: grpc.aio tells a caller that is refused while it writes INTERNAL and no reason."""
        yield self.hello
        await welcome.wait()
        while True:
            load = self.load
            yield replace(
                load,
                progress=load.progress + self._pulse(),
                counters=(*load.counters, *self._counters()),
            )
            await asyncio.sleep(HEARTBEAT_S)

    async def join(self, address: str, joined: Callable[[], object] = lambda: None) -> None:
        """Stay a member of the gateway at `address`, through its restarts, until we drain.

        `joined` is called each time it has taken us. Raises HandshakeRefused when it does not.
        """
        told = ""
        while not self._draining:
            async with rpc.open_channel(address, self._credentials) as channel:
                call = channel.stream_stream(
                    codec.JOIN,
                    request_serializer=codec.encode_membership,
                    response_deserializer=codec.decode_welcome,
                )
                welcome = asyncio.Event()
                try:
                    async for gateway in call(self.membership(welcome)):
                        welcome.set()
                        log.info("joined", extra={"gateway": gateway, "address": address})
                        joined()
                except grpc.aio.AioRpcError as error:
                    if error.code() in _REFUSALS:
                        raise HandshakeRefused(error.details() or "refused") from None
                    log.info("gateway out of reach", extra={"address": address})
                    if (reason := rpc.why_not(error)) and reason != told:
                        log.warning(
                            "no way into a gateway", extra={"address": address, "reason": reason}
                        )
                    told = reason
                finally:
                    welcome.set()  # what sends would wait for it for ever
            await asyncio.sleep(REJOIN_S)

    async def drain(self, limit: float) -> None:
        """Take nothing new, finish what runs and, after `limit` seconds, give the rest back to the
        gateways, which let other workers go on. Returns when nothing has been here for a while."""
        self._draining = True
        self._post(Drain())
        try:
            async with asyncio.timeout(limit):
                await self._idle()
        except TimeoutError:
            self._post(GiveBack())
            with suppress(TimeoutError):
                async with asyncio.timeout(GIVE_BACK_S):
                    await self._idle()

    async def _idle(self) -> None:
        idle = False
        while True:
            self._told.clear()
            await self._told.wait()
            load = self.load
            if load.running or load.waiting or load.promised_blocks or load.owned_blocks:
                idle = False
            elif idle:
                return
            else:
                idle = True
                await asyncio.sleep(LINGER_S)
