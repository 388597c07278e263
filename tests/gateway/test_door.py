"""The HTTP door on a real socket: every row of the catalogue about keys, heads and connections."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from gateway.app import create_app
from gateway.ask import Limits
from gateway.connection import Connection, Crowd, peer_of
from gateway.gateway import Gateway
from gateway.keys import Keys
from tests.gateway.catalogue import INSIDES
from tests.gateway.fakes import MODEL, FakeSequencer, make_gateway, says
from tests.gateway.transport import (
    ALIAS,
    KEY_FILE,
    check,
    converse,
    exchanges,
    get,
    good,
)

HOST = "127.0.0.1"


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    gateway = make_gateway(tmp_path, FakeSequencer(says("Hi")))
    gateway.limits = Limits((MODEL, ALIAS), 257, 200, 199)
    file = tmp_path / "keys.json"
    file.write_text(KEY_FILE)
    gateway.keys = Keys(file=file)
    gateway.text.start()
    yield gateway
    gateway.text.stop()


@asynccontextmanager
async def served(gateway: Gateway, crowd: Crowd | None = None) -> AsyncIterator[int]:
    listener = socket.create_server((HOST, 0), backlog=2048)
    crowd = crowd or Crowd()
    crowd.tell = gateway.metrics.error
    protocol: Any = partial(Connection, crowd=crowd)
    config = uvicorn.Config(
        create_app(gateway), http=protocol, ws="none", lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
        async with asyncio.timeout(30):
            while crowd.total:  # whoever has left is not counted any more
                await asyncio.sleep(0.01)
        assert not crowd.by_peer
    finally:
        server.should_exit = True
        await running


def refused(gateway: Gateway, code: str) -> float:
    labels = {"model_name": MODEL, "code": code}
    return gateway.metrics.registry.get_sample_value("baton_errors_total", labels) or 0.0


async def test_every_row(gateway: Gateway) -> None:
    asked = gateway.sequencer.requests  # type: ignore[attr-defined]
    async with served(gateway) as port:
        for exchange in exchanges(MODEL):
            answer = await check(HOST, port, exchange)
            assert not INSIDES.search(answer.body.decode()), str(exchange)
            assert len(asked) == (exchange.status == 200), str(exchange)
            asked.clear()
            assert (await converse(HOST, port, good(MODEL))).status == 200, str(exchange)
            asked.clear()


# Rows 81 to 84: connections.


async def silence(port: int, sent: bytes = b"") -> bytes:
    """What the server says to that by itself before it hangs up."""
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(sent)
        said = await reader.read()
        writer.close()
        await writer.wait_closed()
        return said


@pytest.mark.parametrize("sent", [b"GET", b"GET /live HTTP/1.1\r\nHost: x\r\nX: "])
async def test_a_head_that_does_not_end(gateway: Gateway, sent: bytes) -> None:
    async with served(gateway, Crowd(head_s=0.1)) as port:
        said = await silence(port, sent)
    assert said.startswith(b"HTTP/1.1 408 ") and b'"request_timeout"' in said
    assert refused(gateway, "request_timeout") == 1


async def test_a_head_in_single_bytes(gateway: Gateway) -> None:
    """The deadline is the head's, not that of its next byte."""
    async with served(gateway, Crowd(head_s=0.2)) as port, asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(HOST, port)

        async def trickle() -> None:
            while True:
                writer.write(b"x")
                await asyncio.sleep(0.02)

        trickling = asyncio.create_task(trickle())
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        trickling.cancel()
        writer.close()


async def test_who_says_nothing_is_shown_out(gateway: Gateway) -> None:
    async with served(gateway, Crowd(head_s=0.1)) as port:
        assert await silence(port) == b""


async def test_a_further_head_has_a_deadline_of_its_own(gateway: Gateway) -> None:
    async with served(gateway, Crowd(head_s=0.1)) as port:
        said = await silence(port, good(MODEL) + b"GET /live")
        assert re.findall(rb"HTTP/1.1 (\d+) ", said) == [b"200", b"408"]
        async with asyncio.timeout(30):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(get("/live"))
            await reader.readuntil(b'"live"}')
            writer.write(b"GET /live")
            assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
            writer.close()


async def test_the_body_of_an_answered_call_has_a_deadline(gateway: Gateway) -> None:
    """401 is said before the body is read; nobody may go on sending it for ever."""
    async with served(gateway, Crowd(head_s=0.1)) as port, asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        await reader.readuntil(b"}}")
        writer.write(b"x")
        assert await reader.read() == b""
        writer.close()


async def test_an_answer_may_take_longer_than_a_head(gateway: Gateway) -> None:
    gate = asyncio.Event()
    asyncio.get_running_loop().call_later(0.3, gate.set)
    gateway.sequencer.script = lambda request: [gate, *says("Hi")(request)]  # type: ignore[attr-defined]
    async with served(gateway, Crowd(head_s=0.05)) as port:
        assert (await converse(HOST, port, good(MODEL, stream=True))).status == 200


async def test_more_connections_than_there_may_be(gateway: Gateway) -> None:
    async with served(gateway, Crowd(most=3)) as port:
        held = [await asyncio.open_connection(HOST, port) for _ in range(3)]
        answer = await converse(HOST, port, b"", closes=True)
        assert (answer.status, answer.headers["retry-after"], answer.closed) == (503, "1", True)
        assert json.loads(answer.body)["error"]["code"] == "too_many_connections"
        assert refused(gateway, "too_many_connections") == 1
        for _, writer in held[:1]:
            writer.close()
        async with asyncio.timeout(30):
            while (await converse(HOST, port, good(MODEL), closes=False)).status != 200:
                await asyncio.sleep(0.01)
        for _, writer in held:
            writer.close()


def test_one_peer_leaves_room_for_others() -> None:
    crowd = Crowd(most=5, most_per_peer=3)
    assert [crowd.admit("a") for _ in range(4)] == [True, True, True, False]
    assert [crowd.admit("b") for _ in range(3)] == [True, True, False]
    crowd.leave("a")
    assert crowd.admit("b")
    for peer in "aabbb":
        crowd.leave(peer)
    assert (crowd.total, len(crowd.by_peer)) == (0, 0)


def test_one_host_is_one_peer() -> None:
    """An IPv6 host chooses among 2^64 addresses."""
    assert peer_of(("10.0.0.1", 5)) == peer_of(("10.0.0.1", 6)) != peer_of(("10.0.0.2", 5))
    assert peer_of(("2001:db8::1", 5)) == peer_of(("2001:db8::ffff", 5)) != peer_of(("::1", 5))
    assert peer_of(("::ffff:10.0.0.1", 5)) == "10.0.0.1"
    assert peer_of(("fe80::1%eth0", 5)) == peer_of(("fe80::2%eth0", 5))
    assert peer_of(None) == ""


async def test_forwarded_addresses_are_not_believed(gateway: Gateway) -> None:
    """Neither as the peer nor as anything else: only a key tells callers apart."""
    crowd = Crowd()
    async with served(gateway, crowd) as port:
        for number in range(20):
            spoofed = (f"X-Forwarded-For: 10.0.0.{number}", f"Forwarded: for=10.0.1.{number}")
            assert (await converse(HOST, port, good(MODEL, *spoofed))).status == 200
            assert set(crowd.by_peer) <= {HOST}
    requests = gateway.sequencer.requests  # type: ignore[attr-defined]
    assert len({request.salt for request in requests}) == 1


async def test_pipelined_calls_are_answered_in_their_order(gateway: Gateway) -> None:
    async with served(gateway) as port:
        said = await silence(port, good(MODEL) + good("other") + good(MODEL) + b"bad\n\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+) ", said) == [b"200", b"404", b"200", b"400"]


async def test_garbage_behind_an_answer_that_still_runs(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    """The body is broken while its early answer is being, or has been, written."""
    async with served(gateway) as port:
        head = get("/live", "Transfer-Encoding: chunked", method="POST")
        said = await silence(port, head + b"zz\r\n")
        assert said.startswith(b"HTTP/1.1 4")
        async with asyncio.timeout(30):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(head)
            await reader.readuntil(b"}}")
            writer.write(b"zz\r\n")
            assert await reader.read() == b""
            writer.close()
        assert (await converse(HOST, port, good(MODEL))).status == 200
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


async def test_many_idle_connections_are_in_nobodys_way(gateway: Gateway) -> None:
    async with served(gateway) as port:
        idle = [await asyncio.open_connection(HOST, port) for _ in range(300)]
        for _ in range(20):
            assert (await converse(HOST, port, good(MODEL))).status == 200
        for _, writer in idle:
            writer.close()
