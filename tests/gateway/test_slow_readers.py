"""Clients that read slowly, or not at all, over a real server."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from gateway.app import create_app
from gateway.connection import Connection, watch_readers
from gateway.gateway import Gateway
from tests.gateway.fakes import MODEL, FakeSequencer, make_gateway, says

TIMEOUT_S = 0.4
COUNT = 20_000


class House:
    """One gateway that hangs up after TIMEOUT_S on who reads nothing, and says `x` COUNT times."""

    def __init__(self, gateway: Gateway, sequencer: FakeSequencer) -> None:
        self.gateway = gateway
        self.sequencer = sequencer
        self.port = 0
        self.connections: set[Any] = set()

    def request(self, stream: bool) -> bytes:
        body = json.dumps(
            {"model": MODEL, "prompt": "Q", "max_tokens": COUNT, "stream": stream, "logprobs": 5}
        )
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    sequencer = FakeSequencer(says("x" * COUNT, finish="length"))
    gateway = make_gateway(tmp_path, sequencer)
    gateway.limits = replace(gateway.limits, max_model_len=10**6, max_prompt_tokens=10**6)
    gateway.text.start()
    house = House(gateway, sequencer)
    async with served(house):
        yield house
    gateway.text.stop()


@asynccontextmanager
async def served(house: House) -> AsyncIterator[None]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(house.gateway), http=Connection, ws="none", lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    house.port = listener.getsockname()[1]
    house.connections = server.server_state.connections
    watching = asyncio.create_task(watch_readers(house.connections, TIMEOUT_S))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        watching.cancel()
        server.should_exit = True
        await running


@pytest.mark.parametrize("stream", [True, False])
async def test_one_that_never_reads_is_hung_up_on(house: House, stream: bool) -> None:
    """A stream's work ends with it; of a whole answer, what is left of it in our memory goes."""
    with socket.socket() as client, socket.create_connection(("127.0.0.1", house.port)) as silent:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", house.port))
        client.sendall(house.request(stream))
        async with asyncio.timeout(60):
            while len(house.connections) < 2:
                await asyncio.sleep(0.01)
            while len(house.connections) == 2:
                await asyncio.sleep(0.01)
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):  # nothing waits for it to read: it is left alone
            silent.recv(1)
    while house.gateway.active:
        await asyncio.sleep(0)
    assert len(house.sequencer.cancelled) == stream


async def test_one_that_reads_slowly_is_left_alone(house: House) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", house.port, limit=1 << 14)
    writer.write(house.request(stream=True))
    data = b""
    while not data.endswith(b"\r\n0\r\n\r\n") and (piece := await reader.read(1 << 18)):
        data += piece
        await asyncio.sleep(TIMEOUT_S / 10)
    writer.close()
    await writer.wait_closed()
    assert data.count(b'"text":"x"') == COUNT


async def test_meanwhile_nobody_else_waits(house: House) -> None:
    """Ten of them, and the memory for each is bounded."""
    clients = [socket.socket() for _ in range(10)]
    for client in clients:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", house.port))
        client.sendall(house.request(stream=True))
    while len(house.sequencer.requests) < 10:
        await asyncio.sleep(0.01)
    house.sequencer.script = says("Hi")
    for _ in range(3):
        reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
        writer.write(house.request(stream=True))
        assert b"data: [DONE]" in await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.close()
    sizes = [one.transport.get_write_buffer_size() for one in house.connections]
    assert max(sizes) < 100_000
    for client in clients:
        client.close()
