"""The HTTP port with TLS: a connection counts, and has a deadline, before its handshake is over."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvloop

from deploy.keys import make
from gateway.app import create_app
from gateway.connection import Crowd
from gateway.handshake import Handshake
from tests.gateway.fakes import FakeSequencer, make_gateway, says
from tests.gateway.transport import get

HOST = "127.0.0.1"


class House:
    """A served gateway, who is counted there, and what was told of the refused."""

    def __init__(self, tmp_path: Path) -> None:
        make(tmp_path / "keys")
        self._keys = tmp_path / "keys"
        self.trust = ssl.create_default_context(cafile=str(self._keys / "ca.pem"))
        self.told: Counter[str] = Counter()
        self.crowd = Crowd(most=2, head_s=0.2, tell=lambda code: self.told.update([code]))
        self._gateway = make_gateway(tmp_path, FakeSequencer(says("Hi")))

    async def serve(self, meet: Callable[[House], Awaitable[None]]) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._keys / "gateway.pem", self._keys / "gateway.key")
        listener = socket.create_server((HOST, 0))
        self.port = listener.getsockname()[1]
        protocol: Any = partial(Handshake, context=context, crowd=self.crowd)
        app = create_app(self._gateway)
        config = uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve(sockets=[listener]))
        async with asyncio.timeout(60):
            await meet(self)
            while self.crowd.total:
                await asyncio.sleep(0.01)
        server.should_exit = True
        await running

    async def live(self) -> bytes:
        """The answer to a request, and that its connection is counted once."""
        reader, writer = await asyncio.open_connection(HOST, self.port, ssl=self.trust)
        writer.write(get("/live"))
        answer = await reader.readuntil(b"}")
        assert self.crowd.total == 1
        writer.close()
        return answer


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


async def said_to(house: House, sent: bytes) -> bytes:
    """Until the server hangs up."""
    reader, writer = await asyncio.open_connection(HOST, house.port)
    writer.write(sent)
    try:
        return await reader.read()
    finally:
        writer.close()


async def silence(house: House) -> None:
    assert await said_to(house, b"") == b""
    assert house.told == {"tls_handshake": 1}
    assert (await house.live()).startswith(b"HTTP/1.1 200 ")


async def half_a_hello(house: House) -> None:
    assert await said_to(house, b"\x16\x03\x01\x02\x00\x01") == b""
    assert house.told == {"tls_handshake": 1}


async def no_tls(house: House) -> None:
    for _ in range(5):
        await said_to(house, get("/live"))
    assert (await house.live()).startswith(b"HTTP/1.1 200 ")
    assert house.told == {"tls_handshake": 5}


async def too_many(house: House) -> None:
    house.crowd.head_s = 60.0
    silent = [await asyncio.open_connection(HOST, house.port) for _ in range(2)]
    while house.crowd.total < 2:
        await asyncio.sleep(0.01)
    assert await said_to(house, b"") == b""
    assert house.told == {"too_many_connections": 1}
    for _, writer in silent:
        writer.close()
    while house.crowd.total:
        await asyncio.sleep(0.01)
    assert (await house.live()).startswith(b"HTTP/1.1 200 ")


async def the_last_place(house: House) -> None:
    """It is the same connection's before the handshake and after."""
    house.crowd.most = 1
    assert (await house.live()).startswith(b"HTTP/1.1 200 ")


MEETINGS = (silence, half_a_hello, no_tls, too_many, the_last_place)


@pytest.mark.parametrize("loop", [asyncio, uvloop])
@pytest.mark.parametrize("meet", MEETINGS)
def test_before_the_handshake(
    house: House, meet: Callable[[House], Awaitable[None]], loop: Any
) -> None:
    """On the loop that serves, and on Python's own."""
    loop.run(house.serve(meet))
    assert not house.crowd.by_peer
