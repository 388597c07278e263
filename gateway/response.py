"""One call's HTTP response: runs the Answer and writes it, whole or as SSE, while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import Cancelled
from gateway.ask import Ask
from gateway.connection import outlet_of
from gateway.gateway import Gateway
from gateway.keys import Tenant
from gateway.shapes import DONE, Shape, error_event, shape_of
from gateway.stream import Answer, Delta, children, within

LAST_WORD_S = 10.0
"""How long a reader that has stopped reading may hold up the end of its own response."""

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the tokens
]


class AnswerResponse(Response):
    """Runs one call and writes its answer, whole or as a stream.

    Nothing is sent before the first token exists, so what fails until then has its own status. When
    the client goes, streaming or not, all work for it is cancelled at once.
    """

    def __init__(self, gateway: Gateway, ask: Ask, tenant: Tenant, arrived: float) -> None:
        super().__init__()
        self._gateway = gateway
        self._ask = ask
        self._tenant = tenant
        self._arrived = arrived

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises BatonError only while no byte is sent."""
        self._gateway.active += 1
        try:
            if self._ask.stream:
                await self._stream(scope, receive, send)
            else:
                await self._whole(scope, receive, send)
        finally:
            self._gateway.active -= 1

    async def _prepare(self) -> Answer:
        return await Answer.prepare(self._gateway, self._ask, self._tenant, self._arrived)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        deltas: list[Delta] = []

        async def collect(arrived: list[Delta]) -> None:
            deltas.extend(arrived)

        async with while_connected(receive), within(self._gateway.request_timeout_s):
            answer = await self._prepare()
            await answer.run(collect)
        metrics = answer.timeline() if self._ask.return_timeline else None
        body = shape_of(self._gateway, self._ask, answer).whole(deltas, answer.usage, metrics)
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = _Events(scope, send)
        with_usage, with_timeline = self._ask.include_usage, self._ask.return_timeline
        try:
            async with while_connected(receive), within(self._gateway.request_timeout_s):
                answer = await self._prepare()
                shape = shape_of(self._gateway, self._ask, answer)
                # The timeline is complete with the last finish; the usage chunk is where it goes,
                # but a client that did not ask for one must not get a chunk without choices.
                events.of(answer, shape, with_timeline and not with_usage)
                await answer.run(events.emit)
            end = DONE
            if with_usage:
                metrics = answer.timeline() if with_timeline else None
                end = shape.usage_event(answer.usage, metrics).encode() + end
        except Exception as error:
            if not events.started:
                raise
            known = self._gateway.account_for(error, scope["state"]["request_id"])
            end = error_event(known.body())
        with suppress(TimeoutError):  # the server cuts a response that is left incomplete
            async with asyncio.timeout(LAST_WORD_S):
                await send(_body(end, more=False))


class _Events:
    """One answer's SSE events on their way out: by the connection's outlet, if there is one."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.started = False
        self._outlet = outlet_of(scope)
        self._send = send

    def of(self, answer: Answer, shape: Shape, timeline: bool) -> None:
        """What `emit` writes. `timeline` puts one into the last choice's last event."""
        self._answer = answer
        self._shape = shape
        self._timeline = timeline
        self._unfinished = len(answer.choices)

    async def emit(self, deltas: list[Delta]) -> None:
        if not self.started:
            self.started = True
            head = {"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS}
            await self._send(head)
        events = ""
        for delta in deltas:
            metrics = None
            if delta.finish:
                self._unfinished -= 1
                if self._timeline and not self._unfinished:
                    metrics = self._answer.timeline()
            events += self._shape.events(delta, metrics)
        if not events:
            return
        outlet = self._outlet
        if outlet is None:
            await self._send(_body(events.encode(), more=True))
            return
        outlet.write(events.encode())
        if outlet.full:
            await outlet.drained()


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Inside, the client is there: the block is cancelled and Cancelled raised when it goes.

    The request's body must have been read.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        raise Cancelled("The client went away.")

    async with children() as tasks:
        watcher = tasks.create_task(watch())
        yield
        watcher.cancel()


def _body(data: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}
