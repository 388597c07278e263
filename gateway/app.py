"""The HTTP door: what holds for every request whatever its route, and how errors look."""

from __future__ import annotations

import logging
import math
import re

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import (
    BadRequest,
    BatonError,
    Draining,
    EngineFailed,
    MethodNotAllowed,
    NotFound,
    RequestTimeout,
    TooLarge,
    Unauthorized,
    UnsupportedMedia,
)
from cluster.ids import label
from cluster.process import REQUEST
from gateway.connection import MAX_HEAD_BYTES, HeadersTooLarge
from gateway.gateway import Gateway
from gateway.routes import Routes

log = logging.getLogger(__name__)

MAX_HEADERS = 100

_HOST = re.compile(rb"[A-Za-z0-9.:\[\]-]+")


class AmbiguousBody(BadRequest):
    code = "ambiguous_body"


_BODY_LEFT = (AmbiguousBody, RequestTimeout, TooLarge, UnsupportedMedia)
"""Refused before the body was read: the connection is in the middle of it and cannot be reused."""


def create_app(gateway: Gateway) -> FastAPI:
    """The ASGI application over one Gateway. Starts and stops nothing of it."""
    app = FastAPI(
        title="Baton",
        version=gateway.version,
        openapi_url=None,  # served by a guarded route of ours
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    Routes(gateway).add_to(app)

    async def failed(request: Request, error: Exception) -> Response:
        return error_response(gateway.account_for(error, request.state.request_id))

    async def unrouted(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            response = await failed(request, MethodNotAllowed("This path has another method."))
            response.headers["allow"] = (error.headers or {}).get("Allow", "")
            return response
        return await failed(request, NotFound("There is nothing at this path."))

    app.add_exception_handler(BatonError, failed)
    app.add_exception_handler(HTTPException, unrouted)
    app.add_middleware(FrontDoor, gateway=gateway)
    return app


def error_response(error: BatonError) -> Response:
    """The one place where an error becomes an HTTP answer."""
    headers = {}
    if error.retry:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after or 1)))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, (Draining, *_BODY_LEFT)):
        headers["connection"] = "close"
    if error.http == 409 or isinstance(error, EngineFailed):
        headers["x-should-retry"] = "false"  # OpenAI's clients would, in vain or worse
    return JSONResponse(error.body(), error.http, headers)


class FrontDoor:
    """Host check, request id, one log line and one count per request, and the last catch."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = self._gateway.clock()
        request_id = _request_id(scope)
        REQUEST.set(request_id)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode("ascii")),
                ]
                if tenant := scope["state"].get("tenant"):  # its quotas, where it has any
                    message["headers"] += self._gateway.quotas.headers(tenant)
            await send(message)

        try:
            check_head(scope)
            await self._app(scope, receive, labelled)
        except Exception as error:
            known = self._gateway.account_for(error, request_id)
            if status:
                raise  # half an answer is out: only a cut connection says so
            await error_response(known)(scope, receive, labelled)
        finally:
            self._tell(scope, status, self._gateway.clock() - arrived)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        matched = scope["path"] if "endpoint" in scope else "none"  # a plain route has no pattern
        handler = str(getattr(scope.get("route"), "path", matched))
        self._gateway.metrics.http(handler, scope["method"], status, seconds)
        log.info(
            "http request",
            extra={
                "request_id": scope["state"]["request_id"],
                "method": scope["method"],
                "handler": handler,
                "status": status,
                "seconds": round(seconds, 6),
            },
        )


def check_head(scope: Scope) -> None:
    """Raises BadRequest or HeadersTooLarge for a head that no honest client sends."""
    headers = scope["headers"]
    if len(headers) > MAX_HEADERS or sum(len(n) + len(v) for n, v in headers) > MAX_HEAD_BYTES:
        raise HeadersTooLarge("The request has too many or too large headers.")
    names = {name for name, _ in headers}
    if {b"content-length", b"transfer-encoding"} <= names:
        # Two readers could see two different ends of the body, and a request hidden between them.
        raise AmbiguousBody("Content-Length and Transfer-Encoding exclude each other.")
    if not scope["raw_path"].startswith(b"/") and scope["raw_path"] != b"*":
        raise BadRequest("The request's target must be a path.", code="invalid_target")
    hosts = [value for name, value in headers if name == b"host"]
    if not hosts and scope["http_version"] == "1.0":
        return
    if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
        raise BadRequest("The Host header is missing or malformed.", code="invalid_host")


def _request_id(scope: Scope) -> str:
    return label([value for name, value in scope["headers"] if name == b"x-request-id"])
