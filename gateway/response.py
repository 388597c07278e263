"""One call's HTTP response: runs the Answer and writes it, whole or as SSE, while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import Cancelled
from gateway.ask import Ask
from gateway.connection import outlet_of
from gateway.gateway import Gateway
from gateway.keys import Tenant
from gateway.reattach import Claim, Sink
from gateway.shapes import DONE, Shape, error_event, shape_of
from gateway.stream import Answer, Delta, children

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
    the client goes, streaming or not, all work for it is cancelled at once; with a claim, that is
    an Idempotency-Key, only when it does not come back in time.
    """

    def __init__(
        self,
        gateway: Gateway,
        ask: Ask,
        tenant: Tenant,
        arrived: float,
        claim: Claim | None = None,
    ) -> None:
        super().__init__()
        self._gateway = gateway
        self._ask = ask
        self._tenant = tenant
        self._arrived = arrived
        self._claim = claim

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises BatonError only while no byte is sent."""
        self._gateway.active += 1
        try:
            client = _Client(scope, receive, send, self._ask.stream)
            last = b""
            try:
                async with while_connected(receive):
                    await self._answer(client, scope["state"]["request_id"])
            except Exception as error:
                if not client.started:
                    raise
                known = self._gateway.account_for(error, scope["state"]["request_id"])
                last = error_event(known.body())
            await client.end(last)
        finally:
            self._gateway.active -= 1

    async def _answer(self, client: _Client, request_id: str) -> None:
        lost = partial(self._gateway.account_for, request_id=request_id)
        await self._gateway.kept.deliver(self._claim, self._make, client, lost)

    async def _make(self, sink: Sink) -> None:
        """The whole call, from tokenising its prompt to the last word of the answer."""
        self._gateway.calls.admit()
        async with self._gateway.calls.within(self._gateway.request_timeout_s):
            answer = await Answer.prepare(self._gateway, self._ask, self._tenant, self._arrived)
            shape = shape_of(self._gateway, self._ask, answer)
            if self._ask.stream:
                await self._stream(answer, shape, sink)
            else:
                await self._whole(answer, shape, sink)

    async def _whole(self, answer: Answer, shape: Shape, sink: Sink) -> None:
        deltas: list[Delta] = []

        async def collect(arrived: list[Delta]) -> None:
            deltas.extend(arrived)

        await answer.run(collect)
        sink.fallback = answer.fallback
        metrics = answer.timeline() if self._ask.return_timeline else None
        await sink.write(shape.whole(deltas, answer.usage, metrics))

    async def _stream(self, answer: Answer, shape: Shape, sink: Sink) -> None:
        with_usage, with_timeline = self._ask.include_usage, self._ask.return_timeline
        unfinished, first = len(answer.choices), True

        async def emit(deltas: list[Delta]) -> None:
            nonlocal unfinished, first
            events = ""
            for delta in deltas:
                metrics = None
                if delta.finish:
                    unfinished -= 1
                    if with_timeline and not with_usage and not unfinished:
                        # The timeline is complete now; the usage chunk is where it goes, but a
                        # client that did not ask for one must not get a chunk without choices.
                        metrics = answer.timeline()
                events += shape.events(delta, metrics)
            if not events:
                return
            if first:
                sink.fallback, first = answer.fallback, False
            await sink.write(events.encode())

        await answer.run(emit)
        end = DONE
        if with_usage:
            metrics = answer.timeline() if with_timeline else None
            end = shape.usage_event(answer.usage, metrics).encode() + end
        await sink.write(end)


class _Client:
    """One answer on its way out: by the connection's outlet, if there is one."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, stream: bool) -> None:
        self.started = False
        self.fallback = False
        self.reattached = False
        self._asgi = (scope, receive, send)
        self._send = send
        self._outlet = outlet_of(scope)
        self._stream = stream
        self._whole = b""

    async def write(self, data: bytes) -> None:
        if not self._stream:
            self._whole = data
            return
        if not self.started:
            self.started = True
            headers = [*_SSE_HEADERS, *self._marks()]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        outlet = self._outlet
        if outlet is None:
            await self._send(_body(data, more=True))
            return
        if outlet.full:
            await outlet.drained()
        outlet.write(data)

    async def end(self, last: bytes) -> None:
        """The end of a stream after this last event, if any; all of an answer that is none."""
        if not self._stream:
            response = Response(self._whole, media_type="application/json")
            response.raw_headers += self._marks()
            await response(*self._asgi)
            return
        with suppress(TimeoutError):  # the server cuts a response that is left incomplete
            async with asyncio.timeout(LAST_WORD_S):
                await self._send(_body(last, more=False))

    def _marks(self) -> list[tuple[bytes, bytes]]:
        marks = []
        if self.fallback:
            marks.append((b"x-baton-fallback", b"decode-prefill"))
        if self.reattached:
            marks.append((b"x-baton-reattached", b"true"))
        return marks


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
