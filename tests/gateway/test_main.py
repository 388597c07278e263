"""The gateway process from its ports to its end, around scripted answers."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2

from cluster.config import GatewayConfig
from cluster.ports import address
from cluster.pressure import Pressure
from cluster.wire import inference_pb2 as wire
from gateway import main
from gateway.gateway import Gateway
from gateway.keys import Keys
from tests.gateway.fakes import MODEL, FakePools, FakeSequencer, make_gateway, says, then

ASK = wire.GenerateRequest(model=MODEL, prompt="Q", max_tokens=9)
BODY = {"model": MODEL, "prompt": "Q", "max_tokens": 9, "stream": True}
GENERATE = "/baton.v1.Inference/GenerateStream"
GENERATE_WHOLE = "/baton.v1.Inference/Generate"


class Members(FakePools):
    """Pools with a life: remembers how many calls ran when it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gateway: Gateway | None = None
        self.active_at_close = -1

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        assert self.gateway is not None
        self.active_at_close = self.gateway.active


class Process:
    """One gateway, serving in this event loop. `gate` holds up every answer's second token."""

    def __init__(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        shutdown_timeout: float,
        host: str = "127.0.0.1",
    ) -> None:
        self.gate = asyncio.Event()
        self.host = host
        self.pools = Members()
        self.sequencer = FakeSequencer(then(says("abc"), self.gate, after=1))
        self.gateway = make_gateway(tmp_path, self.sequencer, pools=self.pools)
        self.pools.gateway = self.gateway
        monkeypatch.setattr(main, "build", lambda *_: (self.gateway, self.pools))
        self.http, grpc_port = free_ports(2)
        self.address = address(host, grpc_port)
        config = GatewayConfig(
            host=host,
            port=self.http,
            grpc_host=host,
            grpc_port=grpc_port,
            shutdown_timeout=shutdown_timeout,
        )
        self.stopping = asyncio.Event()
        self.serving = asyncio.create_task(main.serve(config, self.stopping))

    @asynccontextmanager
    async def callers(self) -> AsyncIterator[tuple[aiohttp.ClientSession, grpc.aio.Channel]]:
        while not await self.answers_http():
            await asyncio.sleep(0)
        http = aiohttp.ClientSession(f"http://{address(self.host, self.http)}")
        async with http, grpc.aio.insecure_channel(self.address) as channel:
            yield http, channel

    async def answers_http(self) -> bool:
        try:
            _, writer = await asyncio.open_connection(self.host, self.http)
        except ConnectionRefusedError:
            return False
        writer.close()
        await writer.wait_closed()
        return True


@pytest.fixture
def shutdown_timeout() -> float:
    return 1000.0


@pytest.fixture
def host() -> str:
    return "127.0.0.1"


@pytest.fixture
async def process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shutdown_timeout: float, host: str
) -> AsyncIterator[Process]:
    process = Process(tmp_path, monkeypatch, shutdown_timeout, host)
    yield process
    process.gate.set()
    process.stopping.set()
    await process.serving


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        servers = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


async def test_told_to_stop_it_takes_no_new_call_and_completes_the_others(process: Process) -> None:
    """Over both doors; and a health watcher, whose call has no end, holds nothing up."""
    async with process.callers() as (http, channel):
        watching = channel.unary_stream("/grpc.health.v1.Health/Watch")(
            health_pb2.HealthCheckRequest().SerializeToString(), wait_for_ready=True
        )
        assert _status(await watching.read()) == health_pb2.HealthCheckResponse.SERVING
        call = channel.unary_stream(GENERATE)(ASK.SerializeToString())
        answer = aiter(call)
        first = wire.GenerateResponse.FromString(await anext(answer))
        assert first.choices[0].text == "a"
        async with http.post("/v1/completions", json=BODY) as streamed:
            await streamed.content.readuntil(b"\n\n")
            process.stopping.set()
            assert _status(await watching.read()) == health_pb2.HealthCheckResponse.NOT_SERVING
            for path in ("/ready", "/health"):
                async with http.get(path) as reply:
                    assert (await reply.json())["error"]["code"] == "draining"
            async with http.get("/live") as reply:
                assert reply.status == 200
            async with http.post("/v1/completions", json=BODY) as reply:
                assert (reply.status, reply.headers["connection"]) == (503, "close")
                assert int(reply.headers["retry-after"]) >= 1
                assert (await reply.json())["error"]["code"] == "draining"
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(GENERATE_WHOLE)(ASK.SerializeToString())
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            process.gate.set()
            rest = (await streamed.content.read()).decode()
            assert '"text":"b"' in rest and '"text":"c"' in rest
            assert rest.endswith("data: [DONE]\n\n")
        told = [wire.GenerateResponse.FromString(data) async for data in answer]
        assert "".join(c.text for message in told for c in message.choices) == "bc"
        assert await process.serving == 0
        watching.cancel()
    assert process.pools.active_at_close == 0


@pytest.mark.parametrize("shutdown_timeout", [0.0])
async def test_what_does_not_end_in_time_is_told_why(process: Process) -> None:
    """A stream by its last event, whole answers and gRPC by their status; and nothing runs on."""
    async with process.callers() as (http, channel):
        call = channel.unary_stream(GENERATE)(ASK.SerializeToString(), wait_for_ready=True)
        await call.read()
        whole = asyncio.create_task(http.post("/v1/completions", json={**BODY, "stream": False}))
        async with http.post("/v1/completions", json=BODY) as streamed:
            await streamed.content.readuntil(b"\n\n")
            while len(process.sequencer.open) < 3:
                await asyncio.sleep(0)
            process.stopping.set()
            *_, last = (await streamed.content.read()).decode().split("\n\n")[:-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
        async with await whole as reply:
            assert reply.status == 503 and "retry-after" in reply.headers
            assert (await reply.json())["error"]["code"] == "draining"
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert dict(await call.trailing_metadata())["baton-code"] == "draining"
        assert await process.serving == 0
    assert len(process.sequencer.cancelled) == 3
    assert process.pools.active_at_close == 0


@pytest.mark.parametrize("shutdown_timeout", [0.0])
async def test_a_client_that_does_not_read_cannot_hold_up_the_end(
    process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    process.sequencer.script = says("x" * 100_000, finish="length")
    limits = process.gateway.limits
    process.gateway.limits = replace(limits, max_model_len=200_000, max_prompt_tokens=200_000)
    while not await process.answers_http():
        await asyncio.sleep(0)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", process.http))
        body = json.dumps({**BODY, "max_tokens": 100_000}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        while not process.sequencer.open:
            await asyncio.sleep(0)
        process.stopping.set()
        assert await process.serving == 0
    assert process.gateway.active == 0
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR], "not ended but cancelled"


def _status(data: object) -> int:
    assert isinstance(data, bytes)
    return int(health_pb2.HealthCheckResponse.FromString(data).status)


@pytest.mark.parametrize(
    "part", ["pools.watch", "keys.follow", "pressure.watch", "main.watch_readers"]
)
async def test_a_part_that_breaks_ends_it_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    """Else revoked keys would stay in force, or it would refuse for ever."""
    breaking = asyncio.Event()

    async def broken(*_: object) -> None:
        await breaking.wait()
        raise ZeroDivisionError("bug")

    owner, name = part.split(".")
    kinds = {"keys": Keys, "pressure": Pressure, "pools": Members}
    monkeypatch.setattr(kinds.get(owner, main), name, broken)
    process = Process(tmp_path, monkeypatch, 0.0)
    while not await process.answers_http():
        await asyncio.sleep(0)
    breaking.set()
    assert await process.serving == 1
    [record] = [r for r in caplog.records if r.levelno >= logging.CRITICAL]
    assert record.exc_info is not None and isinstance(record.exc_info[1], ZeroDivisionError)


async def test_what_strangers_send_fills_no_log(
    process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    while not await process.answers_http():
        await asyncio.sleep(0)
    for sent in (
        b"\x16\x03\x01 GET\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", process.http)
        writer.write(sent)
        writer.write_eof()
        assert await reader.read()
        writer.close()
        await writer.wait_closed()
    assert not [r for r in caplog.records if r.name.startswith("uvicorn")]


@pytest.mark.parametrize("host", ["::1"])
async def test_both_doors_over_ipv6(process: Process) -> None:
    process.gate.set()
    async with process.callers() as (http, channel):
        async with http.post("/v1/completions", json=BODY) as streamed:
            assert "[DONE]" in (await streamed.content.read()).decode()
        whole = await channel.unary_unary(GENERATE_WHOLE)(ASK.SerializeToString())
        assert wire.GenerateResponse.FromString(whole).choices[0].text == "abc"
