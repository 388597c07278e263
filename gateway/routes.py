"""The HTTP routes: each takes a request apart, calls one thing and gives its answer a shape."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Depends, FastAPI
from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from cluster.errors import (
    Cancelled,
    NoWorkers,
    RequestTimeout,
    TooLarge,
    UnsupportedMedia,
)
from cluster.metrics import CONTENT_TYPE
from gateway import schemas, validate
from gateway.ask import Ask, Limits
from gateway.fields import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from gateway.gateway import Gateway
from gateway.parse import SMALL_BODY, parse_json
from gateway.reattach import Claim, digest_of, key_of
from gateway.response import AnswerResponse

Handler = Callable[..., Awaitable[Response]]
Validator = Callable[[Any, Limits, Mapping[str, float]], Ask]
T = TypeVar("T")

PASSED_BYTES = 32 << 20
PASSED_PAUSE_S = 0.2
"""How much of a body that is too large is read past, and how long a pause ends that."""

MAX_BODY_PIECES = 16384
"""Far more pieces than any honest client needs for 4 MiB; each costs us a turn of the loop."""


class Routes:
    """The handlers, bound to one Gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def add_to(self, app: FastAPI) -> None:
        """Every route asks for the API key, one more would too; the two open ones stand apart."""
        app.router.dependencies.append(Depends(self.authorize))
        for path, probe in {"/live": self.live, "/ready": self.ready}.items():
            app.add_route(path, probe, methods=["GET"])
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
            app.add_api_route(
                path,
                read,
                methods=["GET"],
                response_class=Response,
                responses=schemas.responses(path),
            )
        for path, (call, body) in calls.items():
            app.add_api_route(
                path,
                call,
                methods=["POST"],
                response_class=Response,
                responses=schemas.responses(path),
                openapi_extra=schemas.request(body),
            )

    async def authorize(self, request: Request) -> None:
        """Looks at the key alone, never at the path: a path can be dressed up as another."""
        values = [value for name, value in request.headers.raw if name == b"authorization"]
        tenant = request.state.tenant = self._gateway.keys.tenant(values)
        request.state.limits = tenant.limits(self._gateway.limits)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, validate.completion)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, validate.chat)

    async def _answer(self, request: Request, validator: Validator) -> AnswerResponse:
        gateway = self._gateway
        gateway.check_pressure()
        body = await self._body(request)
        arrived = gateway.clock()
        headers = request.headers.raw
        key = key_of([value for name, value in headers if name == b"idempotency-key"])
        limits, tenant = request.state.limits, request.state.tenant
        path = request.scope["path"].encode()

        def read(data: Any) -> tuple[Ask, Claim | None]:
            ask = validator(data, limits, gateway.defaults)
            return ask, None if key is None else Claim(tenant.salt, key, digest_of(path, body))

        ask, claim = await self._read(body, read)
        return AnswerResponse(gateway, ask, tenant, arrived, claim)

    async def _body(self, request: Request) -> bytes:
        limit = self._gateway.limits.max_body_bytes
        return await read_body(request, limit, self._gateway.body_timeout_s)

    async def _read(self, body: bytes, validator: Callable[[Any], T]) -> T:
        """Parse and validate; a large body off the event loop, so that no stream waits for it."""

        def work() -> T:
            return validator(parse_json(body))

        if len(body) <= SMALL_BODY:
            return work()
        return await self._gateway.text.run(work)

    def _charge(self, request: Request) -> None:
        """One request, for what takes no worker's time. Raises Overloaded, RateLimited."""
        self._gateway.check_pressure()
        self._gateway.quotas.request(request.state.tenant, 0)

    async def tokenize(self, request: Request) -> Response:
        gateway = self._gateway
        self._charge(request)
        asked = await self._body(request)
        call = await self._read(asked, lambda data: validate.tokenize(data, request.state.limits))
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
        gateway = self._gateway
        self._charge(request)
        body = await self._body(request)
        tokens = await self._read(
            body, lambda data: validate.detokenize(data, request.state.limits)
        )
        return JSONResponse({"prompt": await gateway.text.decode(tokens)})

    async def models(self, request: Request) -> Response:
        names = request.state.limits.usable_names()
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, request: Request, name: str) -> Response:
        return JSONResponse(self._card(validate.check_model(name, request.state.limits)))

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

    async def live(self, request: Request) -> Response:
        """The process answers. Says nothing about workers."""
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        self._need_workers()
        return JSONResponse({"status": "ready"})

    async def health(self) -> Response:
        self._need_workers()
        return Response()

    def _need_workers(self) -> None:
        self._gateway.calls.admit()
        self._gateway.check_pressure()
        if not self._gateway.pools.ready():
            raise NoWorkers("No usable pair of workers yet.", retry_after=1)

    async def version(self) -> Response:
        return JSONResponse({"version": self._gateway.version})

    async def load(self) -> Response:
        return JSONResponse({"server_load": self._gateway.active})

    async def status(self) -> Response:
        """As this process sees it; where several share a port it says which, and which others."""
        status, siblings = self._gateway.pools.status(), self._gateway.siblings
        if siblings is not None:
            status["gateway"] = siblings.addresses[siblings.own]
            status["gateways"] = siblings.addresses
        return JSONResponse(status)

    async def metrics(self, request: Request) -> Response:
        """This process's; of the port that several share, theirs all."""
        text, siblings = self._gateway.metrics.exposition(), self._gateway.siblings
        if siblings is not None and request.scope["server"][1] == siblings.port:
            key = next((v for n, v in request.headers.raw if n == b"authorization"), b"")
            text = await siblings.scrape(text, key)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(request.app.openapi())


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
        await _let_it_pass(request)
        raise too_large
    body, pieces = bytearray(), 0
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                body += piece
                pieces += 1
                if len(body) > limit or pieces > MAX_BODY_PIECES:
                    await _let_it_pass(request)
                    raise too_large
    except TimeoutError:
        raise RequestTimeout(f"The body was not complete after {timeout_s:g} s.") from None
    except ClientDisconnect:
        raise Cancelled("The client went away.") from None
    return bytes(body)


async def _let_it_pass(request: Request) -> None:
    """Read on and throw away for a moment: a client that is still writing when the connection is
    closed gets a reset instead of the answer that says why."""
    if "expect" in request.headers:
        return  # it waits for a word before it writes: the answer is that word
    passed = 0
    with suppress(TimeoutError, ClientDisconnect):
        while passed < PASSED_BYTES:
            async with asyncio.timeout(PASSED_PAUSE_S):
                message = await request.receive()
            passed += len(message.get("body", b""))
            if not message.get("more_body", False):
                return
