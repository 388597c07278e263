"""The HTTP routes: each takes a request apart, calls one thing and gives its answer a shape."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from cluster.errors import (
    Cancelled,
    NotFound,
    NoWorkers,
    RequestTimeout,
    TooLarge,
    UnsupportedMedia,
)
from cluster.metrics import CONTENT_TYPE
from gateway import validate
from gateway.ask import Ask, Limits
from gateway.fields import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from gateway.gateway import Gateway
from gateway.keys import Tenant
from gateway.shapes import DONE, error_event, shape_of
from gateway.stream import Answer, Delta, children

Handler = Callable[..., Awaitable[Response]]
Validator = Callable[[Any, Limits, Mapping[str, float]], Ask]

MAX_BODY_PIECES = 16384
"""Far more pieces than any honest client needs for 4 MiB; each costs us a turn of the loop."""

LAST_WORD_S = 10.0
"""How long a reader that has stopped reading may hold up the end of its own response."""

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the tokens
]


class Routes:
    """The handlers, bound to one Gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def add_to(self, app: FastAPI) -> None:
        """Every route is guarded by the API key but the two that are listed as open."""
        guarded = [Depends(self.authorize)]
        app.add_api_route("/live", self.live, methods=["GET"])
        app.add_api_route("/ready", self.ready, methods=["GET"])
        reads: dict[str, Handler] = {
            "/health": self.health,
            "/version": self.version,
            "/load": self.load,
            "/status": self.status,
            "/metrics": self.metrics,
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
            "/openapi.json": self.openapi,
        }
        calls: dict[str, tuple[Handler, type[BaseModel]]] = {
            "/v1/completions": (self.completions, CompletionBody),
            "/v1/chat/completions": (self.chat_completions, ChatBody),
            "/tokenize": (self.tokenize, TokenizeBody),
            "/detokenize": (self.detokenize, DetokenizeBody),
        }
        for path, read in reads.items():
            app.add_api_route(path, read, methods=["GET"], dependencies=guarded)
        for path, (call, body) in calls.items():
            app.add_api_route(
                path, call, methods=["POST"], dependencies=guarded, openapi_extra=_documented(body)
            )

    async def authorize(self, request: Request) -> None:
        """Looks at the key alone, never at the path: a path can be dressed up as another."""
        values = [value for name, value in request.headers.raw if name == b"authorization"]
        request.state.tenant = self._gateway.keys.tenant(values)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, validate.completion)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, validate.chat)

    async def _answer(self, request: Request, validator: Validator) -> AnswerResponse:
        data = await self._json(request)
        arrived = self._gateway.clock()
        ask = validator(data, self._gateway.limits, self._gateway.defaults)
        return AnswerResponse(self._gateway, ask, request.state.tenant, arrived)

    async def _json(self, request: Request) -> Any:
        limits = self._gateway.limits
        body = await read_body(request, limits.max_body_bytes, self._gateway.body_timeout_s)
        return validate.parse_json(body)

    async def tokenize(self, request: Request) -> Response:
        gateway = self._gateway
        call = validate.tokenize(await self._json(request), gateway.limits)
        [tokens] = await gateway.text.encode(call.ask)
        body: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": gateway.limits.max_model_len,
            "tokens": tokens,
            "token_strs": None,
        }
        if call.return_token_strs:
            body["token_strs"] = [gateway.tokenizer.token_text(token) for token in tokens]
        return JSONResponse(body)

    async def detokenize(self, request: Request) -> Response:
        tokens = validate.detokenize(await self._json(request), self._gateway.limits)
        return JSONResponse({"prompt": await self._gateway.text.decode(tokens)})

    async def models(self) -> Response:
        names = self._gateway.limits.model_names
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, name: str) -> Response:
        if name not in self._gateway.limits.model_names:
            raise NotFound(
                f"The model `{name[:64]}` does not exist.", code="model_not_found", param="model"
            )
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._gateway.created,
            "owned_by": "baton",
            "root": name,
            "parent": None,
            "max_model_len": self._gateway.limits.max_model_len,
            "permission": [],
        }

    async def live(self) -> Response:
        """The process answers. Says nothing about workers."""
        return JSONResponse({"status": "live"})

    async def ready(self) -> Response:
        self._need_workers()
        return JSONResponse({"status": "ready"})

    async def health(self) -> Response:
        self._need_workers()
        return Response()

    def _need_workers(self) -> None:
        if not self._gateway.pools.ready():
            raise NoWorkers("No usable pair of workers yet.", retry_after=1)

    async def version(self) -> Response:
        return JSONResponse({"version": self._gateway.version})

    async def load(self) -> Response:
        return JSONResponse({"server_load": self._gateway.active})

    async def status(self) -> Response:
        return JSONResponse(self._gateway.pools.status())

    async def metrics(self) -> Response:
        return Response(self._gateway.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(request.app.openapi())


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

        async with while_connected(receive):
            answer = await self._prepare()
            await answer.run(collect, self._gateway.request_timeout_s)
        metrics = answer.timeline() if self._ask.return_timeline else None
        body = shape_of(self._gateway, self._ask, answer).whole(deltas, answer.usage, metrics)
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with while_connected(receive):
                answer = await self._prepare()
                shape = shape_of(self._gateway, self._ask, answer)
                unfinished = len(answer.choices)
                # The timeline is complete with the last finish; the usage chunk is where it goes,
                # but a client that did not ask for one must not get a chunk without choices.
                early = self._ask.return_timeline and not self._ask.include_usage

                async def emit(deltas: list[Delta]) -> None:
                    nonlocal started, unfinished
                    if not started:
                        started = True
                        await send(
                            {
                                "type": "http.response.start",
                                "status": 200,
                                "headers": _SSE_HEADERS,
                            }
                        )
                    events = []
                    for delta in deltas:
                        unfinished -= bool(delta.finish)
                        last = early and delta.finish and not unfinished
                        events.append(shape.events(delta, answer.timeline() if last else None))
                    if body := "".join(events):
                        await send(_body(body.encode(), more=True))

                await answer.run(emit, self._gateway.request_timeout_s)
            end = DONE
            if self._ask.include_usage:
                metrics = answer.timeline() if self._ask.return_timeline else None
                end = shape.usage_event(answer.usage, metrics).encode() + end
        except Exception as error:
            if not started:
                raise
            known = self._gateway.account_for(error, scope["state"]["request_id"])
            end = error_event(known.body())
        async with asyncio.timeout(LAST_WORD_S):
            await send(_body(end, more=False))


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


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The body, counted while it comes in. Raises UnsupportedMedia, TooLarge, RequestTimeout."""
    kind, *parameters = (
        part.strip().lower() for part in request.headers.get("content-type", "").split(";")
    )
    charsets = [p for p in parameters if p.startswith("charset=")]
    if kind != "application/json" or any(
        charset.partition("=")[2].strip('"') != "utf-8" for charset in charsets
    ):
        raise UnsupportedMedia("The Content-Type must be application/json.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMedia("A compressed body is not accepted.")
    too_large = TooLarge(f"The body is larger than {limit} bytes.")
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    body, pieces = bytearray(), 0
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                body += piece
                pieces += 1
                if len(body) > limit or pieces > MAX_BODY_PIECES:
                    raise too_large
    except TimeoutError:
        raise RequestTimeout(f"The body was not complete after {timeout_s:g} s.") from None
    except ClientDisconnect:
        raise Cancelled("The client went away.") from None
    return bytes(body)


def _body(data: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def _documented(body: type[BaseModel]) -> dict[str, Any]:
    """The request's schema for /openapi.json. We read bodies ourselves, FastAPI only shows this."""
    schema = body.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
