"""vllm_proxy: each request to vLLM's prefill server for one token, then to its decode server.

    python -m bench.vllm_proxy PORT PREFILL_URL DECODE_URL

vLLM leaves this to its users. The first answer says where the keys and values lie; the second
request passes that on, and its stream goes to the client as it comes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import uvloop
from aiohttp import web


class Proxy:
    """What leads to the two servers."""

    def __init__(self, prefill: str, decode: str) -> None:
        self._prefill = prefill
        self._decode = decode

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.cleanup_ctx.append(self._connect)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        return app

    async def _connect(self, _: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as self._session:
            yield

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        async with self._session.get(self._decode + request.path) as reply:
            return web.Response(body=await reply.read(), content_type="application/json")

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body: dict[str, Any] = await request.json()
        one = {key: value for key, value in body.items() if key != "stream_options"}
        one |= {"max_tokens": 1, "stream": False}
        one["kv_transfer_params"] = {"do_remote_decode": True, "do_remote_prefill": False}
        async with self._session.post(self._prefill + request.path, json=one) as reply:
            if reply.status != 200:
                return web.Response(status=reply.status, body=await reply.read())
            body["kv_transfer_params"] = (await reply.json())["kv_transfer_params"]
        async with self._session.post(self._decode + request.path, json=body) as reply:
            answer = web.StreamResponse(status=reply.status)
            answer.content_type = reply.content_type
            await answer.prepare(request)
            async for piece in reply.content.iter_any():
                await answer.write(piece)
            return answer


def main(argv: Sequence[str]) -> None:
    port, prefill, decode = argv
    proxy = Proxy(prefill, decode)
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    web.run_app(
        proxy.app(), host="127.0.0.1", port=int(port), access_log=None, print=None, loop=loop
    )


if __name__ == "__main__":
    main(sys.argv[1:])
