"""The gateway process from its ports to its end, around scripted answers."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from cluster.config import GatewayConfig
from cluster.wire import inference_pb2 as wire
from gateway import main
from gateway.gateway import Gateway
from tests.gateway.fakes import MODEL, FakePools, FakeSequencer, make_gateway, says, then


class Members(FakePools):
    """Pools with a life: remembers how many calls ran when it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gateway: Gateway | None = None
        self.active_at_close = -1

    async def watch(self) -> None:
        await self.failure

    async def close(self) -> None:
        assert self.gateway is not None
        self.active_at_close = self.gateway.active


class Process:
    """One gateway, serving in this event loop. `gate` holds up every answer's second token."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = asyncio.Event()
        self.pools = Members()
        sequencer = FakeSequencer(then(says("abc"), self.gate, after=1))
        self.pools.gateway = make_gateway(tmp_path, sequencer, pools=self.pools)
        monkeypatch.setattr(main, "build", lambda *_: (self.pools.gateway, self.pools))
        self.http_ended = asyncio.Event()
        http_serve = main._Uvicorn.serve

        async def serve(server: main._Uvicorn, sockets: list[socket.socket]) -> None:
            await http_serve(server, sockets)
            self.http_ended.set()

        monkeypatch.setattr(main._Uvicorn, "serve", serve)
        self.http, grpc_port = free_ports(2)
        self.address = f"127.0.0.1:{grpc_port}"
        config = GatewayConfig(port=self.http, grpc_port=grpc_port, shutdown_timeout=1000.0)
        self.stopping = asyncio.Event()
        self.serving = asyncio.create_task(main.serve(config, self.stopping))

    async def answers_http(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.http)
        except ConnectionRefusedError:
            return False
        writer.close()
        await writer.wait_closed()
        return True


@pytest.fixture
async def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Process]:
    process = Process(tmp_path, monkeypatch)
    yield process
    process.gate.set()
    process.stopping.set()
    await process.serving


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        servers = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


async def test_told_to_stop_it_completes_grpc_answers(process: Process) -> None:
    """HTTP is down before, and a health watcher, whose call has no end, holds nothing up."""
    async with grpc.aio.insecure_channel(process.address) as channel:
        watching = channel.unary_stream("/grpc.health.v1.Health/Watch")(
            health_pb2.HealthCheckRequest().SerializeToString(), wait_for_ready=True
        )
        assert await watching.read()
        request = wire.GenerateRequest(model=MODEL, prompt="Q", max_tokens=9)
        call = channel.unary_stream("/baton.v1.Inference/GenerateStream")(
            request.SerializeToString()
        )
        answer = aiter(call)
        first = wire.GenerateResponse.FromString(await anext(answer))
        assert first.choices[0].text == "a"
        process.stopping.set()
        await process.http_ended.wait()
        for _ in range(20):  # turns of the loop in which the pools could be closed too early
            await asyncio.sleep(0)
        process.gate.set()
        rest = [wire.GenerateResponse.FromString(data) async for data in answer]
        assert "".join(c.text for message in rest for c in message.choices) == "bc"
        assert await process.serving == 0
        watching.cancel()
    assert process.pools.active_at_close == 0


async def test_a_part_that_breaks_ends_it_and_is_told(
    process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    while not await process.answers_http():
        await asyncio.sleep(0)
    process.pools.failure.set_exception(ZeroDivisionError("bug"))
    assert await process.serving == 1
    [record] = [r for r in caplog.records if r.levelno >= logging.CRITICAL]
    assert record.exc_info is not None and isinstance(record.exc_info[1], ZeroDivisionError)
