"""Streams over a real server: what goes past h11 must be what h11 would have sent."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h11
import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from cluster.errors import Cancelled
from gateway.app import create_app
from gateway.connection import Connection, Outlet, outlet_of
from gateway.gateway import Gateway
from tests.gateway.fakes import MODEL, FakeSequencer, make_gateway, says, then

ASK = json.dumps({"model": MODEL, "prompt": "Q", "max_tokens": 50, "stream": True}).encode()
TEXT = "Grüße, a\r\n\r\n0\r\n\r\nb €"


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    gateway = make_gateway(tmp_path, FakeSequencer(says(TEXT)), wall_clock=lambda: 1.0)
    gateway.text.start()
    yield gateway
    gateway.text.stop()


@asynccontextmanager
async def served(gateway: Gateway, protocol: type[H11Protocol] = Connection) -> AsyncIterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(gateway), http=protocol, ws="none", lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await running


def request(version: str = "1.1") -> bytes:
    head = f"POST /v1/completions HTTP/{version}\r\nHost: test\r\nX-Request-Id: me\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(ASK)}\r\n\r\n"
    return head.encode() + ASK


async def raw(port: int, sent: bytes, until: Callable[[bytes], bool]) -> bytes:
    """All bytes of the answer, up to when they are enough or the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    data = b""
    while not until(data) and (piece := await reader.read(1 << 16)):
        data += piece
    writer.close()
    await writer.wait_closed()
    return data


def events(body: bytes) -> list[Any]:
    *lines, rest = body.decode().split("\n\n")
    assert rest == "" and lines[-1] == "data: [DONE]"
    found = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    return [{**event, "id": ""} for event in found]


async def test_a_strict_client_reads_what_h11_would_have_sent(gateway: Gateway) -> None:
    bodies = []
    for protocol in (Connection, H11Protocol):
        async with served(gateway, protocol) as port:
            data = await raw(port, request(), lambda data: data.endswith(b"\r\n0\r\n\r\n"))
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="POST", target="/", headers=[("host", "test")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        body = b""
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            body += bytes(event.data) if isinstance(event, h11.Data) else b""
        assert client.trailing_data == (b"", False)
        bodies.append(events(body))
    assert bodies[0] == bodies[1]
    assert "".join(event["choices"][0]["text"] for event in bodies[0]) == TEXT


async def test_http_1_0_gets_no_chunks(gateway: Gateway) -> None:
    async with served(gateway) as port:
        data = await raw(port, request("1.0"), lambda data: False)
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert "".join(event["choices"][0]["text"] for event in events(body)) == TEXT


async def test_the_connection_is_good_for_the_next_call(gateway: Gateway) -> None:
    """Two at once, as HTTP allows, and one that is not streamed between others."""

    def call(port: int) -> list[str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        found = []
        for stream in (True, False, True):
            body = json.dumps({**json.loads(ASK), "stream": stream})
            connection.request(
                "POST", "/v1/completions", body, {"Content-Type": "application/json"}
            )
            found.append(connection.getresponse().read().decode())
        connection.close()
        return found

    async with served(gateway) as port:
        twice = await raw(port, 2 * request(), lambda data: data.count(b"data: [DONE]") == 2)
        assert twice.count(b"HTTP/1.1 200 OK") == 2
        first, whole, second = await asyncio.to_thread(call, port)
    assert json.loads(whole)["choices"][0]["text"] == TEXT
    for streamed in (first, second):
        text = [event["choices"][0]["text"] for event in events(streamed.encode())]
        assert "".join(text) == TEXT


async def test_a_client_that_leaves_cancels(gateway: Gateway) -> None:
    sequencer = gateway.sequencer
    assert isinstance(sequencer, FakeSequencer)
    sequencer.script = then(says("abc"), asyncio.Event(), after=1)
    async with served(gateway) as port:
        await raw(port, request(), lambda data: b"data: " in data)
        async with asyncio.timeout(30):
            await sequencer.idle.wait()
    assert len(sequencer.cancelled) == 1
    assert gateway.active == 0


async def test_a_client_that_does_not_read_holds_up_its_own_answer(gateway: Gateway) -> None:
    sequencer = gateway.sequencer
    assert isinstance(sequencer, FakeSequencer)
    fetched = 0

    def endless(request: Any) -> Any:
        nonlocal fetched
        for step in says("x" * 100_000, finish="length")(request):
            fetched += 1
            yield step

    sequencer.script = endless
    gateway.limits = type(gateway.limits)((MODEL,), 257, 200_000, 200_000)
    body = json.dumps({**json.loads(ASK), "max_tokens": 100_000}).encode()
    head = request().partition(b"\r\n\r\n")[0].rpartition(b"\r\n")[0]
    async with served(gateway) as port:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(head + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            before = -1
            while fetched == 0 or fetched != before:  # until it stands still
                before = fetched
                await asyncio.sleep(0.05)
            assert 0 < fetched < 50_000
        async with asyncio.timeout(30):
            await sequencer.idle.wait()
    assert sequencer.cancelled


class Pipe:
    """As much of a transport as an Outlet sees."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closing = False

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def is_closing(self) -> bool:
        return self.closing


def outlet() -> tuple[Outlet, Any, Pipe]:
    pipe: Any = Pipe()
    cycle: Any = SimpleNamespace(disconnected=False, flow=FlowControl(pipe))
    return Outlet(cycle, pipe), cycle, pipe


async def test_a_full_outlet_waits_for_its_reader() -> None:
    out, cycle, pipe = outlet()
    out.write(b"x" * 17)
    assert pipe.sent == [b"11\r\n" + b"x" * 17 + b"\r\n"]
    assert not out.full
    cycle.flow.pause_writing()
    assert out.full
    waiting = asyncio.create_task(out.drained())
    await asyncio.sleep(0)
    assert not waiting.done()
    cycle.flow.resume_writing()
    await waiting


@pytest.mark.parametrize("end", ["disconnected", "closing"])
async def test_nothing_is_written_to_who_is_gone(end: str) -> None:
    out, cycle, pipe = outlet()
    cycle.disconnected, pipe.closing = end == "disconnected", end == "closing"
    with pytest.raises(Cancelled):
        out.write(b"x")
    assert pipe.sent == []


def test_a_server_that_knows_no_outlet_is_served_too() -> None:
    assert outlet_of({"type": "http"}) is None
    assert outlet_of({"type": "http", "extensions": {"other": {}}}) is None
