"""A small OpenAI-like server whose streams are scripted, byte for byte."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

CUT = object()  # in a script: drop the connection here


def chunk(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return event({"id": "cmpl-1", "choices": [choice]})


def event(body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def usage(prompt: int, output: int, **extra: Any) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": output}
    return event({"id": "cmpl-1", "choices": [], "usage": counts, **extra})


DONE = b"data: [DONE]\n\n"


def whole(*texts: str, prompt: int = 3) -> list[bytes]:
    """A complete answer, one chunk per text."""
    chunks = [chunk(text) for text in texts[:-1]] + [chunk(texts[-1], "length")]
    return [*chunks, usage(prompt, len(texts)), DONE]


@dataclass
class ScriptedServer:
    """Answers each completion with what `script` makes of its body; keeps every body."""

    script: Callable[[dict[str, Any]], list[Any] | web.Response]
    tokenizes: bool = False
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    open: int = 0
    most_open: int = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        script = self.script(body)
        if isinstance(script, web.Response):
            return script
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in script:
            if part is CUT:
                assert request.transport is not None
                request.transport.abort()
                break
            await response.write(part)
        self.open -= 1
        return response

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "scripted/model", "root": "scripted"}]})

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"tokens": [ord(char) for char in body["prompt"]]})

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"prompt": "".join(map(chr, body["tokens"]))})

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        if self.tokenizes:
            app.router.add_post("/tokenize", self.tokenize)
            app.router.add_post("/detokenize", self.detokenize)
        return app


@pytest.fixture
async def serve_script() -> AsyncIterator[Callable[..., Any]]:
    """Start a ScriptedServer; all are closed when the test ends."""
    running: list[TestServer] = []

    async def start(script: Any, *, tokenizes: bool = False) -> ScriptedServer:
        answer = script if callable(script) else lambda body: script
        server = ScriptedServer(answer, tokenizes)
        http = TestServer(server.app())
        await http.start_server()
        running.append(http)
        server.url = str(http.make_url("")).rstrip("/")
        return server

    yield start
    for http in running:
        await http.close()
