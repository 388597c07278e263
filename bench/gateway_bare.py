"""The peer of `bench.gateway`: a bare ASGI application under uvicorn as it comes.

It has the events of one recorded answer in memory and sends them on every stream, one per step, to
the same client. uvicorn is at its best: uvloop, httptools, no access log, no middleware. Speaks to
its parent as `bench.gateway_workers` does.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from typing import Any

import uvicorn

from bench.gateway_workers import lines, tell
from cluster.clock import monotonic
from cluster.process import die_with_parent, run


class Bare:
    def __init__(self, events: list[bytes]) -> None:
        self._events = events
        self._step = 0
        self._ticked = asyncio.Event()
        self.open = 0
        self.changed = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send(send, self._events[0])
        self.open += 1
        self.changed.set()
        for number, event in enumerate(self._events[1:], start=1):
            while self._step < number:
                await self._ticked.wait()
            await self._send(send, event)
        self.open -= 1
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @staticmethod
    async def _send(send: Any, event: bytes) -> None:
        await send({"type": "http.response.body", "body": event, "more_body": True})

    async def steps(self, pace: float) -> list[float]:
        """One event on every stream per step; when each step began."""
        told: list[float] = []
        due = monotonic()
        for _ in self._events[1:]:
            if pace:
                due += 1 / pace
                await asyncio.sleep(max(0.0, due - monotonic()))
            else:
                await asyncio.sleep(0)
            told.append(monotonic())
            self._step += 1
            self._ticked.set()
            self._ticked = asyncio.Event()
        while self.open:
            await asyncio.sleep(0.001)
        self._step = 0
        return told


async def serve(port: int, stopping: asyncio.Event) -> int:
    orders = await lines()
    app = Bare([event.encode() for event in json.loads(await orders.readline())])
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", port), backlog=2048)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    tell(event="up")
    while line := await orders.readline():
        order = json.loads(line)
        while app.open < order["streams"]:
            app.changed.clear()
            await app.changed.wait()
        tell(event="full")
        await orders.readline()
        tell(event="ended", steps=await app.steps(order["pace"]))
    server.should_exit = True
    await serving
    return 0


def main() -> int:
    die_with_parent(os.getppid())
    return run(lambda stopping: serve(int(sys.argv[1]), stopping))


if __name__ == "__main__":
    sys.exit(main())
